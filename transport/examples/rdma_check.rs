//! Two hubs of one process on a machine with RDMA devices: their session goes over RDMA, is disturbed in the middle of tensors, goes
//! on over QUIC, and then back, with every message once and in order.
//!
//! usage: rdma_check ROUNDS [DISTURB RESTORE]: lines of shell (`$DEVICE`: that of the session), or `fail` for
//! queue pairs in their error state. Fails where there is no device.

use everstep_transport::{Credentials, Hub, HubEvent, Lane, Message, Way};
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

/// Takes messages, which must come once and in order; tells how many of both lanes came.
async fn take(mut events: mpsc::Receiver<HubEvent>, came: mpsc::Sender<u32>) -> Result<(), Failure> {
    let mut next = [0u32; 2];
    while let Some(event) = events.recv().await {
        match event {
            HubEvent::Message(_, message) => {
                let lane = if message.header[0] == 1 { Lane::Bulk } else { Lane::Control };
                let expected = &mut next[usize::from(message.header[0])];
                if message.header[..] != header(lane, *expected)[..] {
                    return Err(format!("a message came where {lane:?} message {expected} was due").into());
                }
                if lane == Lane::Bulk && *message.regions[0] != tensor(*expected) {
                    return Err(format!("tensor {expected} came with other words").into());
                }
                *expected += 1;
                came.send(next.iter().sum()).await?;
            }
            HubEvent::Down(_) => return Err("the session has no way: the connection was lost".into()),
            HubEvent::Broken(_, why) => return Err(why.into()),
            HubEvent::Up(_) | HubEvent::Refused(_) | HubEvent::Way(..) => {}
        }
    }
    Ok(())
}

/// Waits for a way, and prints those on the way to it.
async fn until(events: &mut mpsc::Receiver<HubEvent>, is: fn(&Way) -> bool) -> Result<Way, Failure> {
    let began = Instant::now();
    let wait = async {
        loop {
            match events.recv().await.ok_or("the hub has ended")? {
                HubEvent::Way(_, way) => {
                    println!("{:>8.3} s  {way}", began.elapsed().as_secs_f64());
                    if is(&way) {
                        return Ok(way);
                    }
                }
                HubEvent::Down(_) => return Err("the connection was lost".into()),
                _ => {}
            }
        }
    };
    timeout(PATIENCE, wait).await.map_err(|_| "the session does not take that way")?
}

fn shell(line: &str, way: &Way) -> Result<(), Failure> {
    let Way::Rdma(device) = way else { return Err("the session does not go over RDMA".into()) };
    let status = Command::new("sh").args(["-c", line]).env("DEVICE", device).status()?;
    if status.success() { Ok(()) } else { Err(format!("{line}: {status}").into()) }
}

async fn check(rounds: u32, lines: Option<[String; 2]>) -> Result<(), Failure> {
    let folder = std::env::temp_dir().join(format!("rdma-check-{}", std::process::id()));
    Credentials::create(&folder)?;
    let credentials = Credentials::load(&folder)?;
    std::fs::remove_dir_all(&folder)?;
    let any = "127.0.0.1:0".parse()?;
    let (a, mut a_events) = Hub::open(any, &credentials, 1)?;
    let (b, b_events) = Hub::open(any, &credentials, 2)?;
    let (sender, mut came) = mpsc::channel(1024);
    let taking = tokio::spawn(take(b_events, sender));
    a.keep(2, b.address()?);
    let rdma = |way: &Way| matches!(way, Way::Rdma(_));
    let mut way = until(&mut a_events, rdma).await?;
    for round in 0..rounds {
        for n in round * MESSAGES..(round + 1) * MESSAGES {
            if n % MESSAGES == MIDDLE
                && let Some([disturb, _]) = &lines
            {
                if disturb == "fail" { b.break_rdma() } else { shell(disturb, &way)? }
            }
            a.send(2, Lane::Bulk, Message { header: header(Lane::Bulk, n).into(), regions: vec![Arc::new(tensor(n))] });
            a.send(2, Lane::Control, Message::small(header(Lane::Control, n)));
        }
        let all = 2 * (round + 1) * MESSAGES;
        let wait = async {
            while came.recv().await.ok_or("the receiver has ended")? < all {}
            Ok::<_, Failure>(())
        };
        if let Err(error) = timeout(PATIENCE, wait).await.map_err(|_| "messages are missing".into()).and_then(|r| r) {
            if taking.is_finished() {
                taking.await??;
            }
            return Err(error);
        }
        if let Some([_, restore]) = &lines {
            until(&mut a_events, |way| matches!(way, Way::Quic(_))).await?;
            shell(restore, &way)?;
            way = until(&mut a_events, rdma).await?;
        }
    }
    println!("{} messages, each once and in order", 2 * rounds * MESSAGES);
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rounds = arguments.first().and_then(|n| n.parse().ok()).unwrap_or(1);
    let lines = arguments.get(1..3).and_then(|lines| lines.to_vec().try_into().ok());
    match check(rounds, lines).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
