//! QUIC: endpoints, TLS 1.3 with both sides proving that they belong to the job, and links of two streams of a connection, one for each
//! lane.
//!
//! Before a link is taken, on its control stream: the accepting side says what it has of the dialler's session, then the
//! dialler says what it has of the other's ([`crate::connection`]).

use crate::codec::{self, FrameReader};
use crate::credentials::{Credentials, random};
use crate::disturb::{Disturbances, DisturbedSocket};
use crate::hub::Refusals;
use crate::link::{Link, QUEUE};
use crate::message::Fragment;
use crate::session::Frame;
use crate::socket;
use bytes::Bytes;
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, Connection, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, IdleTimeout,
    MtuDiscoveryConfig, RecvStream, SendStream, TransportConfig, VarInt,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};

/// Both ends must speak the same: that of sessions, or that of calls.
const PROTOCOL: &[u8] = b"everstep/3";
const CALLS: &[u8] = b"everstep-calls/1";
/// Bytes that a stream of a link may hold at its receiver.
const STREAM_WINDOW: u32 = 16 << 20;
/// Bytes that a link holds at most beside the messages at its ends: of its two streams one carries tensors.
pub const LINK_BYTES: u64 = STREAM_WINDOW as u64;
/// Streams of a connection: that of the way, two of a link, and those of links before that are not closed yet.
const STREAMS: u32 = 16;
/// A connection without a sign of life for so long is broken. Those of sessions know sooner ([`crate::liveness`]).
const IDLE: Duration = Duration::from_secs(30);
const IDLE_OF_CALLS: Duration = Duration::from_millis(500);
const KEEP_ALIVE_OF_CALLS: Duration = Duration::from_millis(100);
/// What a round trip is taken for before the first: what is lost of a handshake is sent again after three of these.
const ROUND_TRIP: Duration = Duration::from_millis(50);
/// Bytes on their way at first: probes for how large datagrams may be are among them, and leave room for others.
const WINDOW: u64 = 256 << 10;
/// Bytes of datagrams that are kept, and never read: questions whether an end is there.
const QUESTIONS: usize = 64;
/// Packets that one acknowledgement is for, while they come fast.
const ACKNOWLEDGED: u32 = 8;
/// Frames that are written, or pieces that are read, with one look at a stream.
const WRITTEN: usize = 256;
const READ: usize = 64;
/// A handshake must be over by then.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(3);

/// One life of a process, by its random name.
pub type Peer = u64;

/// A link could not be made.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The endpoint could not be opened.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The certificates are of no use.
    #[error("the credentials are not usable: {0}")]
    Tls(String),
    /// One side's certificate is not of the other's job.
    #[error(
        "{address} belongs to another job: its certificate or ours is not signed by the other's authority ({reason})"
    )]
    ForeignJob {
        /// The other side.
        address: SocketAddr,
        /// What TLS said.
        reason: String,
    },
    /// One side's certificate is not valid any more, or not yet, by the other's clock.
    #[error("{address}: its certificate or ours has expired ({reason}): is a clock wrong?")]
    Expired {
        /// The other side.
        address: SocketAddr,
        /// What TLS said.
        reason: String,
    },
    /// Somebody else answers than who was looked for, or that one is not looked for any more.
    #[error("nobody is looked for at {address} any more")]
    NotSought {
        /// Where.
        address: SocketAddr,
    },
    /// Nobody answers, or the connection broke.
    #[error("no link to {address}: {reason}")]
    Unreachable {
        /// The other side.
        address: SocketAddr,
        /// What happened.
        reason: String,
    },
}

fn transport(is_for_calls: bool) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    // What the path and the peer take is found out, beginning with what any network takes.
    let mut search = MtuDiscoveryConfig::default();
    search.upper_bound(u16::MAX);
    config.mtu_discovery_config(Some(search));
    let mut congestion = CubicConfig::default();
    congestion.initial_window(WINDOW);
    config.congestion_controller_factory(Arc::new(congestion));
    let mut acknowledge = AckFrequencyConfig::default();
    acknowledge.ack_eliciting_threshold(VarInt::from_u32(ACKNOWLEDGED));
    config.ack_frequency_config(Some(acknowledge));
    let idle = if is_for_calls { IDLE_OF_CALLS } else { IDLE };
    config.max_idle_timeout(Some(IdleTimeout::try_from(idle).expect("some seconds are a valid time-out")));
    config.keep_alive_interval(is_for_calls.then_some(KEEP_ALIVE_OF_CALLS));
    config.initial_rtt(ROUND_TRIP).datagram_receive_buffer_size(Some(QUESTIONS));
    config.stream_receive_window(VarInt::from_u32(STREAM_WINDOW)).receive_window(VarInt::from_u32(64 << 20));
    config.send_window(64 << 20).max_concurrent_bidi_streams(VarInt::from_u32(STREAMS));
    Arc::new(config)
}

/// Every process of a job makes the same stateless-reset tokens (RFC 9000, section 10.3) from the job's
/// key. So the next life of a process on a port tells peers of the last one at their first packet that
/// the connection is gone; they need not wait for its time-out.
fn endpoint_config(credentials: &Credentials, datagram: u16) -> EndpointConfig {
    let secret = ring::digest::digest(&ring::digest::SHA256, credentials.key.secret_der());
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_ref());
    let mut config = EndpointConfig::new(Arc::new(key));
    config.cid_generator(|| Box::new(RandomIds));
    config.max_udp_payload_size(datagram).expect("more than 1200 bytes");
    config
}

/// Connection ids that any life of a process takes for possible: quinn's own carry a check by a key of
/// one life, and packets that fail it are dropped without a word.
struct RandomIds;

const ID_BYTES: usize = 8;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&random::<ID_BYTES>())
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Whether a connection is for calls; else it is for a session.
pub(crate) fn is_for_calls(connection: &Connection) -> bool {
    let data = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    data.is_some_and(|data| data.protocol.as_deref() == Some(CALLS))
}

/// AES with keys of 128 bits: no other is as fast with the processor's own instructions.
fn cipher() -> rustls::crypto::CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.retain(|suite| suite.suite() == rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// Opens an endpoint that accepts and dials members of the job: for sessions, unless a connection is made with the
/// configuration for calls, which is given beside it.
pub(crate) fn open(
    bind: SocketAddr,
    credentials: &Credentials,
    disturbances: Disturbances,
) -> Result<(Endpoint, quinn::ClientConfig), QuicError> {
    let tls = |e: &dyn std::fmt::Display| QuicError::Tls(e.to_string());
    let provider = Arc::new(cipher());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(credentials.authority.clone()).map_err(|e| tls(&e))?;
    let roots = Arc::new(roots);
    let chain = || vec![credentials.certificate.clone()];
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|e| tls(&e))?;
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| tls(&e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(), credentials.key.clone_key())
        .map_err(|e| tls(&e))?;
    server.alpn_protocols = vec![PROTOCOL.to_vec(), CALLS.to_vec()];
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| tls(&e))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain(), credentials.key.clone_key())
        .map_err(|e| tls(&e))?;
    client.alpn_protocols = vec![PROTOCOL.to_vec()];
    let mut server =
        quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).map_err(|e| tls(&e))?));
    server.transport_config(transport(false));
    let dialler = |tls_config, is_for_calls| -> Result<_, QuicError> {
        let mut config =
            quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls_config).map_err(|e| tls(&e))?));
        config.transport_config(transport(is_for_calls));
        Ok(config)
    };
    let mut caller = client.clone();
    caller.alpn_protocols = vec![CALLS.to_vec()];
    let (client, caller) = (dialler(client, false)?, dialler(caller, true)?);
    let bind_error = |source| QuicError::Bind { address: bind, source };
    let runtime = Arc::new(quinn::TokioRuntime);
    let (inner, datagram) = socket::open(bind, &*runtime).map_err(bind_error)?;
    let socket = Arc::new(DisturbedSocket { inner, disturbances });
    let mut endpoint =
        Endpoint::new_with_abstract_socket(endpoint_config(credentials, datagram), Some(server), socket, runtime)
            .map_err(bind_error)?;
    endpoint.set_default_client_config(client);
    Ok((endpoint, caller))
}

/// Tells a foreign certificate from a broken connection.
pub(crate) fn explain(address: SocketAddr, error: &quinn::ConnectionError) -> QuicError {
    let reason = error.to_string();
    // TLS alerts about certificates: RFC 8446 section 6.2, codes 42 to 51 and 116, as QUIC error 0x100 + code.
    let alert = match error {
        quinn::ConnectionError::TransportError(e) => Some(u64::from(e.code)),
        quinn::ConnectionError::ConnectionClosed(e) => Some(u64::from(e.error_code)),
        _ => None,
    };
    match alert {
        Some(0x12d) => QuicError::Expired { address, reason },
        Some(code) if (0x12a..=0x133).contains(&code) || code == 0x174 => QuicError::ForeignJob { address, reason },
        _ => QuicError::Unreachable { address, reason },
    }
}

/// Of a peer that has a certificate of the job, and yet sent this.
pub(crate) fn garbage(connection: &Connection, error: &dyn std::fmt::Display) -> String {
    format!("garbage from a member of the job, {}: {error}", connection.remote_address())
}

/// Why a connection is of no more use.
pub(crate) fn broken(connection: &Connection, reason: impl std::fmt::Display) -> QuicError {
    let address = connection.remote_address();
    match connection.close_reason() {
        Some(error) => explain(address, &error),
        None => QuicError::Unreachable { address, reason: reason.to_string() },
    }
}

/// A link over two streams, carried by tasks of their own until the session drops it or either stream ends.
pub(crate) fn link(
    connection: &Connection,
    control: (SendStream, RecvStream),
    bulk: (SendStream, RecvStream),
    written: &Arc<Notify>,
    refusals: &Refusals,
) -> Link {
    let (control_sender, control_queue) = mpsc::channel(QUEUE);
    let (bulk_sender, bulk_queue) = mpsc::channel(QUEUE);
    let (arrived, incoming) = mpsc::channel(256);
    // Control goes first wherever both lanes have something to send.
    let _ = control.0.set_priority(1);
    tokio::spawn(write(control.0, control_queue, Arc::clone(written)));
    tokio::spawn(write(bulk.0, bulk_queue, Arc::clone(written)));
    tokio::spawn(read(connection.clone(), control.1, arrived.clone(), refusals.clone()));
    tokio::spawn(read(connection.clone(), bulk.1, arrived, refusals.clone()));
    Link { control: control_sender, bulk: bulk_sender, incoming }
}

async fn write(mut stream: SendStream, mut queue: mpsc::Receiver<Frame<Fragment>>, written: Arc<Notify>) {
    let mut frames = Vec::with_capacity(WRITTEN);
    while queue.recv_many(&mut frames, WRITTEN).await > 0 {
        written.notify_one();
        let mut pieces = codec::encode(frames.drain(..));
        if stream.write_all_chunks(&mut pieces).await.is_err() {
            return;
        }
    }
    // The session goes another way: what is still on this one goes there again.
    let _ = stream.reset(VarInt::from_u32(0));
}

async fn read(
    connection: Connection,
    mut stream: RecvStream,
    arrived: mpsc::Sender<Frame<Fragment>>,
    refusals: Refusals,
) {
    let (mut reader, mut pieces) = (FrameReader::default(), [const { Bytes::new() }; READ]);
    while let Ok(Some(count)) = stream.read_chunks(&mut pieces).await {
        for piece in &mut pieces[..count] {
            let mut piece = std::mem::take(piece);
            loop {
                match reader.next(&mut piece) {
                    Ok(None) => break,
                    Ok(Some(frame)) => {
                        if arrived.send(frame).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        refusals.add(garbage(&connection, &error));
                        connection.close(VarInt::from_u32(1), error.to_string().as_bytes());
                        return;
                    }
                }
            }
        }
    }
}
