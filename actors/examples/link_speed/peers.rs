//! What sessions are compared with: TLS over TCP, and QUIC without sessions.

use super::Failure;
use quinn::Endpoint;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::pki_types::ServerName;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Instant;

const NAME: &str = "localhost";

/// A server with a certificate of its own, which is given.
fn server() -> Result<(rustls::ServerConfig, Vec<u8>), Failure> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()])?;
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let server = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    Ok((server, made.cert.der().to_vec()))
}

/// Whoever talks to the server with that certificate.
fn client(certificate: Vec<u8>) -> Result<rustls::ClientConfig, Failure> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.into())?;
    Ok(rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// Gigabytes a second through one stream of TLS over TCP, from another thread: with no process between, its better case.
pub(crate) fn tcp(tensors: usize, tensor_bytes: usize) -> Result<f64, Failure> {
    let (server, certificate) = server()?;
    let (server, client) = (Arc::new(server), Arc::new(client(certificate)?));
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let bytes = tensors * tensor_bytes;
    let sending = std::thread::spawn(move || -> Result<TcpStream, Failure> {
        let connection = rustls::ClientConnection::new(client, ServerName::try_from(NAME)?)?;
        let mut stream = rustls::StreamOwned::new(connection, TcpStream::connect(address)?);
        let region = vec![1u8; tensor_bytes];
        for _ in 0..tensors {
            stream.write_all(&region)?;
        }
        stream.flush()?;
        // Kept open until all has come: what was never read of the server's would reset it.
        Ok(stream.sock)
    });
    let (tcp, _) = listener.accept()?;
    let mut stream = rustls::StreamOwned::new(rustls::ServerConnection::new(server)?, tcp);
    let (mut got, mut region) = (0, vec![0u8; tensor_bytes]);
    let began = Instant::now();
    while got < bytes {
        let read = stream.read(&mut region)?;
        if read == 0 {
            return Err("the stream ended early".into());
        }
        got += read;
    }
    let rate = bytes as f64 / began.elapsed().as_secs_f64() / 1e9;
    sending.join().map_err(|_| "the sender panicked")??;
    Ok(rate)
}

/// Who asks over a stream of QUIC alone, and waits for who answers.
pub(crate) struct Asking {
    endpoint: Endpoint,
    certificate: Vec<u8>,
}

impl Asking {
    pub(crate) fn open() -> Result<Self, Failure> {
        let (server, certificate) = server()?;
        let server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
        Ok(Self { endpoint: Endpoint::server(server, "127.0.0.1:0".parse()?)?, certificate })
    }

    pub(crate) fn port(&self) -> Result<u16, Failure> {
        Ok(self.endpoint.local_addr()?.port())
    }

    pub(crate) fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// Microseconds of round trips of so many bytes, sorted.
    pub(crate) async fn trips(self, count: usize, bytes: usize) -> Result<Vec<f64>, Failure> {
        let connection = self.endpoint.accept().await.ok_or("the endpoint has ended")?.await?;
        let (mut send, mut receive) = connection.accept_bi().await?;
        let mut message = vec![7; bytes];
        receive.read_exact(&mut message[..1]).await?;
        let mut took = Vec::with_capacity(count);
        for _ in 0..count {
            let began = Instant::now();
            send.write_all(&message).await?;
            receive.read_exact(&mut message).await?;
            took.push(began.elapsed().as_secs_f64() * 1e6);
        }
        took.sort_by(f64::total_cmp);
        Ok(took)
    }
}

/// Answers what comes on a stream with the same, until it ends.
pub(crate) async fn answer(address: SocketAddr, certificate: Vec<u8>) -> Result<(), Failure> {
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client(certificate)?)?));
    let connection = Endpoint::client("127.0.0.1:0".parse()?)?.connect_with(config, address, NAME)?.await?;
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&[0]).await?;
    while let Some(piece) = receive.read_chunk(usize::MAX, true).await? {
        send.write_chunk(piece.bytes).await?;
    }
    Ok(())
}
