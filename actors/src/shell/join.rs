//! How a process becomes a node: finds the supervisor, gets the job and its text, joins, serves.

use super::node::{Args, Msg, Node};
use super::pool::Pool;
use super::{AnyError, machine, new_name, pump, tell};
use crate::config::Config;
use crate::control::Control;
use crate::data::Corpus;
use crate::spec::Layout;
use crate::table::NodeInfo;
use crate::wire::Unit;
use crate::worker::Materials;
use everstep_kernels::{Backend, CpuBackend};
use everstep_transport::{Credentials, Hub, HubEvent, Peer};
use ractor::Actor;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Without a supervisor for so long, a node ends.
pub(super) const SUPERVISOR_WAIT: Duration = Duration::from_secs(60);
const REDIAL: Duration = Duration::from_millis(50);
/// Bytes of the corpus that are asked for at once, and the most that are taken.
const CORPUS_MAX: u64 = 16 << 30;

/// How to be a node.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The supervisor's address.
    pub join: SocketAddr,
    /// Where this node listens for other nodes; by default at the address from which it reaches the
    /// supervisor.
    pub listen: Option<SocketAddr>,
    /// The folder of the job's credentials.
    pub credentials: std::path::PathBuf,
    /// Threads for jobs.
    pub threads: usize,
}

/// How being a node ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeEnd {
    /// The supervisor said so.
    Dismissed(String),
    /// It was declared dead, or cannot be trusted any more; the process joins as new.
    Fenced,
}

/// Joins a job and serves it until it ends or this node is fenced.
pub async fn run_node(options: &NodeOptions) -> Result<NodeEnd, AnyError> {
    let credentials = Credentials::load(&options.credentials)?;
    let listen = options.listen.map_or_else(|| facing(options.join), Ok)?;
    if listen.ip().is_unspecified() {
        let why =
            format!("--listen {listen}: other nodes must be able to reach it: expected the address of an interface");
        return Err(NodeError::Start(why).into());
    }
    let (hub, mut events) = Hub::open(listen, &credentials, new_name())?;
    let supervisor = find(&hub, options.join, SUPERVISOR_WAIT).await?;
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend);
    let Some(materials) = receive_job(&hub, supervisor, &mut events).await? else { return Ok(NodeEnd::Fenced) };
    let (pid, machine) = (std::process::id(), machine());
    let info = NodeInfo { address: hub.address()?.to_string(), peer: hub.me(), pid, machine };
    let join = Control::Join { info, device_class: backend.class().0 };
    tell(&hub, supervisor, join);
    let (end, mut ended) = mpsc::channel(1);
    let pool = Pool::new(options.threads, &backend)?;
    let args = Args { hub: hub.clone(), supervisor, join: options.join, materials, pool, end };
    let (node, handle) = Actor::spawn(None, Node, args).await.map_err(|e| NodeError::Start(e.to_string()))?;
    let result = pump(&mut events, &node, Msg::Hub, &mut ended).await;
    node.stop(None);
    let _ = handle.await;
    hub.shut_down();
    result?.ok_or_else(|| NodeError::Start("the node's actor failed".to_owned()).into())
}

/// Why being a node failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    /// The supervisor does not answer.
    #[error("no supervisor at {address} for {seconds} s; last: {last}")]
    NoSupervisor {
        /// Where it should be.
        address: SocketAddr,
        /// How long it was looked for.
        seconds: u64,
        /// The last attempt's failure.
        last: String,
    },
    /// What the supervisor sent is of no use.
    #[error("the supervisor's job is not usable: {0}")]
    Job(String),
    /// The node could not run.
    #[error("the node cannot run: {0}")]
    Start(String),
}

/// The address of the interface that faces `peer`, with any port. Nothing is sent.
fn facing(peer: SocketAddr) -> std::io::Result<SocketAddr> {
    let any: SocketAddr = if peer.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = std::net::UdpSocket::bind(any)?;
    socket.connect(peer)?;
    Ok(SocketAddr::new(socket.local_addr()?.ip(), 0))
}

/// Dials until somebody answers. A foreign job is an answer.
pub(super) async fn find(hub: &Hub, address: SocketAddr, wait: Duration) -> Result<Peer, AnyError> {
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        match hub.dial(address).await {
            Ok(peer) => return Ok(peer),
            Err(error @ everstep_transport::QuicError::ForeignJob { .. }) => return Err(error.into()),
            Err(error) if tokio::time::Instant::now() > deadline => {
                return Err(
                    NodeError::NoSupervisor { address, seconds: wait.as_secs(), last: error.to_string() }.into()
                );
            }
            Err(_) => tokio::time::sleep(REDIAL).await,
        }
    }
}

/// Asks for the job and its text. None: the supervisor went away meanwhile, there may be another.
async fn receive_job(
    hub: &Hub,
    supervisor: Peer,
    events: &mut mpsc::Receiver<HubEvent>,
) -> Result<Option<Materials>, AnyError> {
    tell(hub, supervisor, Control::Enquire);
    let mut job = None;
    let mut bytes: Vec<u8> = Vec::new();
    loop {
        let event = tokio::time::timeout(SUPERVISOR_WAIT, events.recv()).await;
        let event = event.ok().flatten().ok_or_else(|| NodeError::Job("it does not come".to_owned()))?;
        let message = match event {
            HubEvent::Message(_, message) => message,
            HubEvent::Down(peer) | HubEvent::Broken(peer, _) if peer == supervisor => return Ok(None),
            HubEvent::Up(_) | HubEvent::Down(_) | HubEvent::Broken(..) | HubEvent::Refused(_) => continue,
        };
        match Unit::decode(message)? {
            Unit::Control(Control::Job { config, corpus_bytes, corpus_hash }) => {
                if corpus_bytes > CORPUS_MAX {
                    return Err(NodeError::Job(format!("its text has {corpus_bytes} bytes")).into());
                }
                job = Some((config, corpus_bytes, corpus_hash));
                tell(hub, supervisor, Control::CorpusWanted { from: 0 });
            }
            Unit::Control(Control::CorpusPart { from, bytes: part }) if from == bytes.len() as u64 => {
                bytes.extend(part);
                let Some((config, length, hash)) = &job else { continue };
                if (bytes.len() as u64) < *length {
                    tell(hub, supervisor, Control::CorpusWanted { from: bytes.len() as u64 });
                    continue;
                }
                let got = blake3::hash(&bytes).to_hex().to_string();
                if got != *hash {
                    return Err(NodeError::Job(format!("its text has hash {got}, expected {hash}")).into());
                }
                let spec = Arc::new(Config::parse(config, "the supervisor's configuration", &[])?.spec);
                let corpus = Corpus::new(Arc::new(bytes), &spec)?;
                return Ok(Some(Materials { layout: Layout::new(&spec), spec, corpus, plant: None }));
            }
            Unit::Control(Control::Dismiss { why }) => return Err(NodeError::Job(why).into()),
            Unit::Control(_) | Unit::Bundle(_) => {}
        }
    }
}
