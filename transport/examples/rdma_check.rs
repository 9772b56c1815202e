//! Two hubs on machines with RDMA devices: their session goes over RDMA, is disturbed in the middle of tensors, goes on over QUIC or stays,
//! and is over RDMA again, with every message once and in order.
//!
//! usage: rdma_check [give|take ADDRESS CREDENTIALS] ROUNDS [leaves|may DISTURB RESTORE]...
//!
//! One process is both ends, or one of each machine is one: who takes listens at the address. A round has one of the disturbances, in
//! turn: a line of shell (`$DEVICE`: the session's), or `fail` for queue pairs in their error state; whether the session leaves RDMA for
//! sure; and the line that ends it. Fails where there is no device.

use everstep_transport::{Credentials, Hub, HubEvent, Lane, Message, Way};
use std::net::SocketAddr;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

const PATIENCE: Duration = Duration::from_secs(60);
/// Messages of a round, on each lane.
const MESSAGES: u32 = 60;
/// The one before which the wire is disturbed.
const MIDDLE: u32 = 20;
const END: &[u8] = b"end";

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A tensor whose words say where they are, of a length that no fragment is a multiple of.
fn tensor(n: u32) -> Vec<f32> {
    let length = if n.is_multiple_of(7) { 1_000_003 } else { 10 + 997 * (n % 31) };
    (0..length).map(|i| (n * 31 + i) as f32).collect()
}

fn header(lane: Lane, n: u32) -> Vec<u8> {
    let mut header = vec![if lane == Lane::Bulk { 1 } else { 0 }];
    header.extend(n.to_le_bytes());
    // Some small messages are longer than a packet.
    if lane == Lane::Control && n.is_multiple_of(5) {
        header.resize(30_000, n as u8);
    }
    header
}

async fn next(events: &mut mpsc::Receiver<HubEvent>, what: &str) -> Result<HubEvent, Failure> {
    let event = timeout(PATIENCE, events.recv()).await.map_err(|_| format!("nothing happens: {what}"))?;
    match event.ok_or("the hub has ended")? {
        HubEvent::Down(_) => Err("the session has no way: the connection was lost".into()),
        HubEvent::Broken(_, why) => Err(why.into()),
        event => Ok(event),
    }
}

/// Takes messages, which must come once and in order; answers when all of a round are there.
async fn take(hub: Hub, mut events: mpsc::Receiver<HubEvent>) -> Result<(), Failure> {
    let mut came = [0u32; 2];
    loop {
        let HubEvent::Message(from, message) = next(&mut events, "a message is due").await? else { continue };
        if message.header[..] == *END {
            return Ok(());
        }
        let lane = if message.header[0] == 1 { Lane::Bulk } else { Lane::Control };
        let expected = &mut came[usize::from(message.header[0])];
        if message.header[..] != header(lane, *expected)[..] {
            return Err(format!("a message came where {lane:?} message {expected} was due").into());
        }
        if lane == Lane::Bulk && *message.regions[0] != tensor(*expected) {
            return Err(format!("tensor {expected} came with other words").into());
        }
        *expected += 1;
        let all: u32 = came.iter().sum();
        if came[0] == came[1] && all.is_multiple_of(2 * MESSAGES) {
            hub.send(from, Lane::Control, Message::small(all.to_le_bytes().to_vec()));
        }
    }
}

/// What the giving end sees of its session.
struct Seen {
    events: mpsc::Receiver<HubEvent>,
    began: Instant,
    way: Option<Way>,
    /// How often it has left RDMA.
    left: u32,
    /// Messages that have come.
    came: u32,
}

impl Seen {
    async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) -> Result<(), Failure> {
        while !holds(self) {
            match next(&mut self.events, what).await? {
                HubEvent::Way(_, way) => {
                    println!("{:>8.3} s  {way}", self.began.elapsed().as_secs_f64());
                    self.left += u32::from(matches!(way, Way::Quic(_)));
                    self.way = Some(way);
                }
                HubEvent::Message(_, message) => {
                    self.came = u32::from_le_bytes(message.header[..].try_into()?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn device(&self) -> Option<&str> {
        match &self.way {
            Some(Way::Rdma(device)) => Some(device),
            _ => None,
        }
    }
}

/// A disturbance.
#[derive(Clone)]
struct Fault {
    leaves: bool,
    disturb: String,
    restore: String,
}

fn shell(line: &str, device: &str) -> Result<(), Failure> {
    let status = Command::new("sh").args(["-c", line]).env("DEVICE", device).status()?;
    if status.success() { Ok(()) } else { Err(format!("{line}: {status}").into()) }
}

async fn give(
    hub: Hub,
    events: mpsc::Receiver<HubEvent>,
    to: SocketAddr,
    rounds: u32,
    faults: Vec<Fault>,
) -> Result<(), Failure> {
    let mut seen = Seen { events, began: Instant::now(), way: None, left: 0, came: 0 };
    hub.keep(2, to);
    seen.until("the session takes no RDMA", |seen| seen.device().is_some()).await?;
    for round in 0..rounds {
        let fault = faults.get(round as usize % faults.len().max(1));
        let device = seen.device().unwrap_or_default().to_owned();
        seen.left = 0;
        for n in round * MESSAGES..(round + 1) * MESSAGES {
            if n % MESSAGES == MIDDLE
                && let Some(fault) = fault
            {
                println!("{:>8.3} s  {}", seen.began.elapsed().as_secs_f64(), fault.disturb);
                if fault.disturb == "fail" { hub.break_rdma() } else { shell(&fault.disturb, &device)? }
            }
            hub.send(
                2,
                Lane::Bulk,
                Message { header: header(Lane::Bulk, n).into(), regions: vec![Arc::new(tensor(n))] },
            );
            hub.send(2, Lane::Control, Message::small(header(Lane::Control, n)));
        }
        seen.until("messages are missing", |seen| seen.came == 2 * (round + 1) * MESSAGES).await?;
        if let Some(fault) = fault {
            seen.until("the session stays with RDMA", |seen| !fault.leaves || seen.left > 0).await?;
            shell(&fault.restore, &device)?;
            seen.until("the session does not come back to RDMA", |seen| seen.device().is_some()).await?;
        }
    }
    hub.send(2, Lane::Control, Message::small(END));
    println!("{} messages, each once and in order", 2 * rounds * MESSAGES);
    Ok(())
}

async fn both(rounds: u32, faults: Vec<Fault>) -> Result<(), Failure> {
    let folder = std::env::temp_dir().join(format!("rdma-check-{}", std::process::id()));
    Credentials::create(&folder)?;
    let credentials = Credentials::load(&folder)?;
    std::fs::remove_dir_all(&folder)?;
    let any = "127.0.0.1:0".parse()?;
    let (giving, giving_events) = Hub::open(any, &credentials, 1)?;
    let (taking, taking_events) = Hub::open(any, &credentials, 2)?;
    let to = taking.address()?;
    let taken = tokio::spawn(take(taking, taking_events));
    tokio::select! {
        given = give(giving, giving_events, to, rounds, faults) => given,
        taken = taken => taken?,
    }
}

async fn check(arguments: &[String]) -> Result<(), Failure> {
    let (one_end, rest) = match arguments {
        [end, address, credentials, rest @ ..] if end == "give" || end == "take" => {
            (Some((end, address.parse()?, Credentials::load(credentials.as_ref())?)), rest)
        }
        rest => (None, rest),
    };
    let rounds = rest.first().map_or(Ok(1), |n| n.parse())?;
    let fault =
        |words: &[String]| Fault { leaves: words[0] == "leaves", disturb: words[1].clone(), restore: words[2].clone() };
    let faults = rest.get(1..).unwrap_or_default().chunks_exact(3).map(fault).collect();
    match one_end {
        None => both(rounds, faults).await,
        Some((end, address, credentials)) if end == "take" => {
            let (hub, events) = Hub::open(address, &credentials, 2)?;
            take(hub, events).await
        }
        Some((_, address, credentials)) => {
            let (hub, events) = Hub::open("0.0.0.0:0".parse()?, &credentials, 1)?;
            let given = give(hub, events, address, rounds, faults).await;
            // What was said last still has to go.
            tokio::time::sleep(Duration::from_secs(1)).await;
            given
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::new("everstep_transport=debug");
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match check(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
