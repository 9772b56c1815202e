//! How fast sessions over QUIC are between two processes of this machine, beside TCP with TLS 1.3 (rustls, one stream) in the same run.
//!
//! usage: link_speed [ROUNDS]. It starts itself as the other process. Figures are medians of the rounds, which take turns.

use everstep_transport::{Credentials, Hub, HubEvent, Lane, Message};
use rustls::pki_types::ServerName;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Words of a tensor: 4 MiB.
const WORDS: usize = 1 << 20;
/// Tensors of a round.
const TENSORS: usize = 512;
/// Messages on their way at most: what a pipeline of micro-batches has.
const AHEAD: usize = 8;
/// Small messages of a round, and the bytes of each.
const SMALL: usize = 2_000_000;
const SMALL_BYTES: usize = 100;
/// Round trips of a round.
const TRIPS: usize = 5_000;
const IDLE: Duration = Duration::from_secs(60);

fn hub(folder: &Path, me: u64) -> Result<(Hub, mpsc::Receiver<HubEvent>), Failure> {
    Ok(Hub::open("127.0.0.1:0".parse()?, &Credentials::load(folder)?, me)?)
}

async fn message(events: &mut mpsc::Receiver<HubEvent>) -> Result<Message, Failure> {
    loop {
        match events.recv().await.ok_or("the hub has ended")? {
            HubEvent::Message(_, message) => return Ok(message),
            HubEvent::Broken(_, why) => return Err(why.into()),
            _ => {}
        }
    }
}

/// The other process: sends what is asked for, and answers.
async fn other(folder: &Path, address: &str) -> Result<(), Failure> {
    let (hub, mut events) = hub(folder, 2)?;
    hub.keep(1, address.parse()?);
    let region = Arc::new(vec![1.0f32; WORDS]);
    let small = bytes::Bytes::from(vec![7u8; SMALL_BYTES]);
    loop {
        let Ok(asked) = message(&mut events).await else { return Ok(()) };
        match &asked.header[..] {
            b"bulk" => {
                for n in 0..TENSORS {
                    if n >= AHEAD {
                        message(&mut events).await?;
                    }
                    let tensor = Message { header: b"t"[..].into(), regions: vec![Arc::clone(&region)] };
                    hub.send(1, Lane::Bulk, tensor);
                }
                for _ in 0..AHEAD {
                    message(&mut events).await?;
                }
            }
            b"small" => {
                for n in 0..SMALL {
                    hub.send(1, Lane::Control, Message::small(small.clone()));
                    // The receiver says when half of what may wait has come.
                    if n % 20_000 == 19_999 && n >= 40_000 {
                        message(&mut events).await?;
                    }
                }
                for _ in 0..2 {
                    message(&mut events).await?;
                }
            }
            b"trip" => hub.send(1, Lane::Control, asked),
            other => return Err(format!("asked for {other:?}").into()),
        }
    }
}

/// Gigabytes a second of tensors through a session.
async fn bulk(hub: &Hub, events: &mut mpsc::Receiver<HubEvent>) -> Result<f64, Failure> {
    hub.send(2, Lane::Control, Message::small(b"bulk".to_vec()));
    let began = Instant::now();
    for _ in 0..TENSORS {
        let got = message(events).await?;
        if got.regions.first().is_none_or(|r| r.len() != WORDS) {
            return Err("a tensor has other words".into());
        }
        hub.send(2, Lane::Control, Message::small(b"t".to_vec()));
    }
    Ok((TENSORS * WORDS * 4) as f64 / began.elapsed().as_secs_f64() / 1e9)
}

/// Millions of messages a second.
async fn small(hub: &Hub, events: &mut mpsc::Receiver<HubEvent>) -> Result<f64, Failure> {
    hub.send(2, Lane::Control, Message::small(b"small".to_vec()));
    let began = Instant::now();
    for n in 0..SMALL {
        let got = message(events).await?;
        if got.header.len() != SMALL_BYTES {
            return Err("a message has other bytes".into());
        }
        if n % 20_000 == 19_999 {
            hub.send(2, Lane::Control, Message::small(b"s".to_vec()));
        }
    }
    Ok(SMALL as f64 / began.elapsed().as_secs_f64() / 1e6)
}

/// Microseconds of round trips, sorted.
async fn trips(hub: &Hub, events: &mut mpsc::Receiver<HubEvent>) -> Result<Vec<f64>, Failure> {
    let mut all = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        let began = Instant::now();
        hub.send(2, Lane::Control, Message::small(b"trip".to_vec()));
        message(events).await?;
        all.push(began.elapsed().as_secs_f64() * 1e6);
    }
    all.sort_by(f64::total_cmp);
    Ok(all)
}

/// Hundredths of a second of a core that a process has had.
fn cpu(process: u32) -> Result<u64, Failure> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // After the name, which may have spaces: user and system time are the 12th and 13th.
    let (_, rest) = text.rsplit_once(')').ok_or("a stat without a name")?;
    let times = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    Ok(times.sum::<Result<u64, _>>()?)
}

/// The share of a core that both ends of a session without messages take together, in percent.
async fn idle(other: u32) -> Result<f64, Failure> {
    let both = || Ok::<_, Failure>(cpu(std::process::id())? + cpu(other)?);
    let before = both()?;
    tokio::time::sleep(IDLE).await;
    Ok((both()? - before) as f64 / IDLE.as_secs_f64())
}

/// A certificate of its own for TLS over TCP.
fn tls() -> Result<(Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>), Failure> {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone())?;
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok((Arc::new(server), Arc::new(client)))
}

/// Gigabytes a second through one stream of TLS over TCP, from another thread: with no process between, its better case.
fn tcp() -> Result<f64, Failure> {
    let (server, client) = tls()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let bytes = TENSORS * WORDS * 4;
    let sending = std::thread::spawn(move || -> Result<(), Failure> {
        let connection = rustls::ClientConnection::new(client, ServerName::try_from("localhost")?)?;
        let mut stream = rustls::StreamOwned::new(connection, TcpStream::connect(address)?);
        let region = vec![1u8; WORDS * 4];
        for _ in 0..TENSORS {
            stream.write_all(&region)?;
        }
        stream.flush()?;
        stream.conn.send_close_notify();
        stream.flush()?;
        Ok(())
    });
    let (tcp, _) = listener.accept()?;
    let mut stream = rustls::StreamOwned::new(rustls::ServerConnection::new(server)?, tcp);
    let (mut got, mut region) = (0, vec![0u8; WORDS * 4]);
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Ends the other process whatever happens.
struct Other(Child, PathBuf);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = std::fs::remove_dir_all(&self.1);
    }
}

async fn measure(rounds: usize) -> Result<(), Failure> {
    let folder = std::env::temp_dir().join(format!("link-speed-{}", std::process::id()));
    Credentials::create(&folder)?;
    let (hub, mut events) = hub(&folder, 1)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--other").arg(&folder).arg(hub.address()?.to_string()).stdin(Stdio::null());
    let other = Other(command.spawn()?, folder);
    while !hub.is_linked(2) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (mut quic, mut tls, mut messages, mut half, mut most) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        quic.push(bulk(&hub, &mut events).await?);
        tls.push(tokio::task::spawn_blocking(tcp).await??);
        messages.push(small(&hub, &mut events).await?);
        let trips = trips(&hub, &mut events).await?;
        half.push(trips[TRIPS / 2]);
        most.push(trips[TRIPS * 99 / 100]);
    }
    let (quic, tls) = (median(quic), median(tls));
    println!("tensors of 4 MiB: {quic:.2} GB/s; TLS 1.3 over TCP {tls:.2} GB/s; {:.2} of it", quic / tls);
    println!("messages of {SMALL_BYTES} bytes, one way: {:.2} million/s", median(messages));
    println!("round trips: {:.0} us (median), {:.0} us (99%)", median(half), median(most));
    println!("without messages: {:.3}% of a core, both ends together", idle(other.0.id()).await?);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [mode, folder, address] if mode == "--other" => other(Path::new(folder), address).await,
        _ => measure(arguments.first().and_then(|n| n.parse().ok()).unwrap_or(5)).await,
    }
}
