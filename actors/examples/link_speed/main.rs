//! How fast a session is between two processes of this machine, over RDMA where there is a device, else over QUIC. In the same run: TCP with
//! TLS 1.3 (rustls, one stream), and round trips of a stream of QUIC alone.
//!
//! usage: link_speed idle, or link_speed [ROUNDS [MIB [KIB]]]: of so many MiB each, in tensors of so many KiB. It starts itself as the
//! other process. Figures are medians of the rounds, which take turns. Round trips of sessions are between two actors.

mod peers;

use everstep_transport::{Credentials, Hub, HubEvent, Lane, Message, Way};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// The program's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Tensors on their way at most: what a pipeline of micro-batches has.
const AHEAD: usize = 8;
const SMALL_BYTES: usize = 100;
/// Small messages on their way at most, and after how many the receiver says so.
const SMALL_AHEAD: usize = 40_000;
const SMALL_STEP: usize = 20_000;
/// A path over RDMA is proven by then, where there is a device.
const PROVEN: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(60);

/// How much there is of what.
#[derive(Clone, Copy)]
struct Sizes {
    rounds: usize,
    /// Tensors of a round, and words of each.
    tensors: usize,
    words: usize,
    /// Small messages of a round.
    small: usize,
    /// Round trips of a round.
    trips: usize,
}

impl Sizes {
    fn read(arguments: &[String]) -> Result<Self, Failure> {
        let number = |at: usize, default| arguments.get(at).map_or(Ok(default), |n| n.parse::<usize>());
        let (rounds, mib, kib) = (number(0, 5)?, number(1, 2048)?, number(2, 4096)?);
        let tensors = (mib * 1024 / kib).max(AHEAD);
        Ok(Self { rounds, tensors, words: kib * 256, small: (mib * 1000).max(SMALL_AHEAD), trips: (mib * 3).max(200) })
    }
}

/// What the other process is asked for: a kind, and two numbers.
fn order(kind: u8, numbers: [usize; 2]) -> Message {
    let numbers = numbers.iter().flat_map(|n| (*n as u64).to_le_bytes());
    Message::small([kind].into_iter().chain(numbers).collect::<Vec<u8>>())
}

/// Bytes of an order.
const ORDER: usize = 17;

fn numbers(order: &[u8]) -> [usize; 2] {
    [1, 9].map(|at| order.get(at..).and_then(|n| n.first_chunk()).map_or(0, |n| u64::from_le_bytes(*n) as usize))
}

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

/// Answers what it gets.
struct Answerer;

impl Actor for Answerer {
    type Msg = Message;
    type State = Hub;
    type Arguments = Hub;

    async fn pre_start(&self, _: ActorRef<Message>, hub: Hub) -> Result<Hub, ActorProcessingErr> {
        Ok(hub)
    }

    async fn handle(&self, _: ActorRef<Message>, asked: Message, hub: &mut Hub) -> Result<(), ActorProcessingErr> {
        hub.send(1, Lane::Control, asked);
        Ok(())
    }
}

/// Asks again whenever it is answered, and gives the microseconds that each answer took.
struct Asker;

struct Asking {
    hub: Hub,
    began: Instant,
    took: Vec<f64>,
    trips: usize,
    done: Option<oneshot::Sender<Vec<f64>>>,
}

impl Asking {
    fn ask(&mut self) {
        self.began = Instant::now();
        self.hub.send(2, Lane::Control, order(b't', [0; 2]));
    }
}

impl Actor for Asker {
    type Msg = Message;
    type State = Asking;
    type Arguments = (Hub, usize, oneshot::Sender<Vec<f64>>);

    async fn pre_start(
        &self,
        _: ActorRef<Message>,
        (hub, trips, done): Self::Arguments,
    ) -> Result<Asking, ActorProcessingErr> {
        let mut asking =
            Asking { hub, began: Instant::now(), took: Vec::with_capacity(trips), trips, done: Some(done) };
        asking.ask();
        Ok(asking)
    }

    async fn handle(&self, _: ActorRef<Message>, _: Message, asking: &mut Asking) -> Result<(), ActorProcessingErr> {
        asking.took.push(asking.began.elapsed().as_secs_f64() * 1e6);
        if asking.took.len() < asking.trips {
            asking.ask();
        } else if let Some(done) = asking.done.take() {
            let _ = done.send(std::mem::take(&mut asking.took));
        }
        Ok(())
    }
}

/// The other process: sends what is asked for, and answers.
async fn other(folder: PathBuf, address: String) -> Result<(), Failure> {
    let (hub, mut events) = hub(&folder, 2)?;
    let (answerer, _) = Actor::spawn(None, Answerer, hub.clone()).await?;
    hub.keep(1, address.parse()?);
    let small = bytes::Bytes::from(vec![7u8; SMALL_BYTES]);
    loop {
        let Ok(asked) = message(&mut events).await else { return Ok(()) };
        let [count, words] = numbers(&asked.header);
        match asked.header.first() {
            Some(b'b') => {
                let region = Arc::new(vec![1.0f32; words]);
                for n in 0..count {
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
            Some(b's') => {
                let steps = count / SMALL_STEP;
                for step in 0..steps {
                    if step >= SMALL_AHEAD / SMALL_STEP {
                        message(&mut events).await?;
                    }
                    for _ in 0..SMALL_STEP {
                        hub.send(1, Lane::Control, Message::small(small.clone()));
                    }
                }
                for _ in 0..SMALL_AHEAD / SMALL_STEP {
                    message(&mut events).await?;
                }
            }
            Some(b't') => answerer.cast(asked)?,
            Some(b'q') => {
                let certificate = asked.header[ORDER..].to_vec();
                tokio::spawn(peers::answer(([127, 0, 0, 1], count as u16).into(), certificate));
            }
            _ => return Err("asked for something else".into()),
        }
    }
}

/// Gigabytes a second of tensors through a session.
async fn bulk(hub: &Hub, events: &mut mpsc::Receiver<HubEvent>, sizes: Sizes) -> Result<f64, Failure> {
    hub.send(2, Lane::Control, order(b'b', [sizes.tensors, sizes.words]));
    let began = Instant::now();
    for _ in 0..sizes.tensors {
        let got = message(events).await?;
        if got.regions.first().is_none_or(|r| r.len() != sizes.words) {
            return Err("a tensor has other words".into());
        }
        hub.send(2, Lane::Control, Message::small(b"t".to_vec()));
    }
    Ok((sizes.tensors * sizes.words * 4) as f64 / began.elapsed().as_secs_f64() / 1e9)
}

/// Millions of messages a second.
async fn small(hub: &Hub, events: &mut mpsc::Receiver<HubEvent>, sizes: Sizes) -> Result<f64, Failure> {
    let count = sizes.small / SMALL_STEP * SMALL_STEP;
    hub.send(2, Lane::Control, order(b's', [count, 0]));
    let began = Instant::now();
    for n in 0..count {
        let got = message(events).await?;
        if got.header.len() != SMALL_BYTES {
            return Err("a message has other bytes".into());
        }
        if n % SMALL_STEP == SMALL_STEP - 1 {
            hub.send(2, Lane::Control, Message::small(b"s".to_vec()));
        }
    }
    Ok(count as f64 / began.elapsed().as_secs_f64() / 1e6)
}

/// Microseconds of round trips, sorted.
async fn trips(hub: &Hub, events: &mut mpsc::Receiver<HubEvent>, sizes: Sizes) -> Result<Vec<f64>, Failure> {
    let (done, mut all) = oneshot::channel();
    let (asker, _) = Actor::spawn(None, Asker, (hub.clone(), sizes.trips, done)).await?;
    let mut took = loop {
        tokio::select! {
            answer = message(events) => asker.cast(answer?)?,
            took = &mut all => break took?,
        }
    };
    asker.stop(None);
    took.sort_by(f64::total_cmp);
    Ok(took)
}

/// The same of a stream of QUIC alone.
async fn raw_trips(hub: &Hub, sizes: Sizes) -> Result<Vec<f64>, Failure> {
    let asking = peers::Asking::open()?;
    let asked = order(b'q', [asking.port()?.into(), 0]).header;
    hub.send(2, Lane::Control, Message::small([&asked[..], asking.certificate()].concat()));
    asking.trips(sizes.trips, SMALL_BYTES).await
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

/// A hub, and another process with a session to it.
async fn two_processes() -> Result<(Hub, mpsc::Receiver<HubEvent>, Other), Failure> {
    let folder = std::env::temp_dir().join(format!("link-speed-{}", std::process::id()));
    Credentials::create(&folder)?;
    let (hub, events) = hub(&folder, 1)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--other").arg(&folder).arg(hub.address()?.to_string()).stdin(Stdio::null());
    let other = Other(command.spawn()?, folder);
    let until = Instant::now() + PROVEN;
    let is_rdma = |way: Option<&Way>| matches!(way, Some(Way::Rdma(_)));
    while !hub.is_linked(2) || (!is_rdma(hub.ways().get(&2)) && Instant::now() < until) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("over {}", hub.ways().get(&2).map_or("nothing".to_owned(), ToString::to_string));
    Ok((hub, events, other))
}

async fn measure_idle() -> Result<(), Failure> {
    let (_hub, _events, other) = two_processes().await?;
    println!("without messages: {:.3}% of a core, both ends together", idle(other.0.id()).await?);
    Ok(())
}

async fn measure(sizes: Sizes) -> Result<(), Failure> {
    let (hub, mut events, _other) = two_processes().await?;
    let (mut ours, mut tls, mut messages) = (vec![], vec![], vec![]);
    let (mut half, mut most) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in 0..sizes.rounds {
        ours.push(bulk(&hub, &mut events, sizes).await?);
        tls.push(tokio::task::spawn_blocking(move || peers::tcp(sizes.tensors, sizes.words * 4)).await??);
        messages.push(small(&hub, &mut events, sizes).await?);
        let trips = [trips(&hub, &mut events, sizes).await?, raw_trips(&hub, sizes).await?];
        for (of, trips) in trips.iter().enumerate() {
            half[of].push(trips[sizes.trips / 2]);
            most[of].push(trips[sizes.trips * 99 / 100]);
        }
    }
    let (ours, tls) = (median(ours), median(tls));
    println!(
        "tensors of {} KiB: {ours:.3} GB/s; TLS 1.3 over TCP {tls:.3} GB/s; {:.2} of it",
        sizes.words / 256,
        ours / tls
    );
    println!("messages of {SMALL_BYTES} bytes, one way: {:.3} million/s", median(messages));
    let ([half, raw_half], [most, raw_most]) = (half.map(median), most.map(median));
    println!("round trips: {half:.0} us (median), {most:.0} us (99%); a stream alone {raw_half:.0}, {raw_most:.0}");
    Ok(())
}

// As many threads as a node's messages have on a few cores: the others compute.
#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // On threads of the runtime, as all work is: the first thread is none.
    let ended = match &arguments[..] {
        [mode, folder, address] if mode == "--other" => tokio::spawn(other(folder.into(), address.clone())).await,
        [mode] if mode == "idle" => tokio::spawn(measure_idle()).await,
        _ => tokio::spawn(measure(Sizes::read(&arguments)?)).await,
    };
    ended?
}
