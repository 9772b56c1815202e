//! How a process becomes a node: finds the supervisor, gets the job and its text, joins, serves.

use super::node::{Args, Msg, Node};
use super::pool::Pool;
use super::run_folder::{RunFolder, open_tokens, verify_tokens};
use super::{AnyError, machine, new_name, pump, tell};
use crate::config::Config;
use crate::control::Control;
use crate::data::Corpus;
use crate::spec::{JobSpec, Layout};
use crate::table::NodeInfo;
use crate::tokens::{SourceInfo, Tokens};
use crate::wire::Unit;
use crate::worker::Materials;
use everstep_checkpoint::Mapped;
use everstep_kernels::{Backend, CpuBackend};
use everstep_transport::{Credentials, Hub, HubEvent, Peer, QuicError};
use ractor::{Actor, ActorRef};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Without a supervisor for so long, a node ends: another life of it may have a large checkpoint to verify first.
pub(super) const SUPERVISOR_WAIT: Duration = Duration::from_secs(300);
/// After so long people are told that it is looked for.
const TELL: Duration = Duration::from_secs(5);
const REDIAL: Duration = Duration::from_millis(50);
/// Bytes of a source that are taken over the wire; a greater one must be at the supervisor's path here too.
const TOKENS_MAX: u64 = 16 << 30;

/// How to be a node.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The supervisor's address, or those of all supervisors. At least one.
    pub join: Vec<SocketAddr>,
    /// Where this node listens for other nodes; by default at the address from which it reaches the
    /// supervisor.
    pub listen: Option<SocketAddr>,
    /// The folder of the job's credentials.
    pub credentials: std::path::PathBuf,
    /// Threads for jobs.
    pub threads: usize,
    /// See [`NodeInfo::domain`].
    pub domain: String,
    /// See [`NodeInfo::memory`].
    pub memory: u64,
    /// Its launcher has compared the hashes of the run's text.
    pub verified: bool,
}

/// How being a node ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeEnd {
    /// The supervisor said so.
    Dismissed(String),
    /// It was declared dead, or cannot be trusted any more; the process joins as new.
    Fenced,
    /// It was told to end, and nothing lives on it any more.
    Left,
}

/// Joins a job and serves it until it ends or this node is fenced. `told` counts how often the process was told to end: the
/// first time the node asks to leave, the second time it ends at once.
pub async fn run_node(options: &NodeOptions, mut told: watch::Receiver<u32>) -> Result<NodeEnd, AnyError> {
    let joined = tokio::select! {
        joined = join(options) => joined?,
        // Before it is a member it has nothing to give back.
        _ = told.wait_for(|times| *times > 0) => return Ok(NodeEnd::Left),
    };
    match joined {
        Some(member) => member.serve(told).await,
        None => Ok(NodeEnd::Fenced),
    }
}

/// A process that has asked to become a node.
struct Member {
    hub: Hub,
    events: mpsc::Receiver<HubEvent>,
    node: ActorRef<Msg>,
    handle: tokio::task::JoinHandle<()>,
    ended: mpsc::Receiver<NodeEnd>,
}

impl Member {
    async fn serve(mut self, mut told: watch::Receiver<u32>) -> Result<NodeEnd, AnyError> {
        let leaving = self.node.clone();
        told.mark_changed();
        let listener = tokio::spawn(async move {
            let mut heard = 0;
            while told.changed().await.is_ok() {
                let times = *told.borrow_and_update();
                (heard..times).for_each(|_| drop(leaving.cast(Msg::Leave)));
                heard = times;
            }
        });
        let result = pump(&mut self.events, &self.node, Msg::Hub, &mut self.ended).await;
        listener.abort();
        self.node.stop(None);
        let _ = self.handle.await;
        self.hub.shut_down();
        result?.ok_or_else(|| NodeError::Start("the node's actor failed".to_owned()).into())
    }
}

/// None: the supervisor went away meanwhile, there may be another.
async fn join(options: &NodeOptions) -> Result<Option<Member>, AnyError> {
    let credentials = Credentials::load(&options.credentials)?;
    let first = *options.join.first().ok_or_else(|| NodeError::Start("--join names no supervisor".to_owned()))?;
    let listen = options.listen.map_or_else(|| facing(first), Ok)?;
    if listen.ip().is_unspecified() {
        let why =
            format!("--listen {listen}: other nodes must be able to reach it: expected the address of an interface");
        return Err(NodeError::Start(why).into());
    }
    let (hub, mut events) = Hub::open(listen, &credentials, new_name())?;
    let supervisor = find(&hub, &options.join, SUPERVISOR_WAIT).await?;
    let Some((materials, pace)) = receive_job(&hub, supervisor, &mut events, options.verified).await? else {
        return Ok(None);
    };
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(materials.spec.precision));
    let (pid, machine) = (std::process::id(), machine());
    let info = NodeInfo {
        address: hub.address()?.to_string(),
        peer: hub.me(),
        pid,
        machine,
        domain: options.domain.clone(),
        memory: options.memory,
    };
    let join = Control::Join { info, device_class: backend.class().0 };
    tell(&hub, supervisor, join);
    let (end, ended) = mpsc::channel(1);
    let pool = Pool::new(options.threads, &backend, pace)?;
    let args = Args { hub: hub.clone(), supervisor, join: options.join.clone(), materials, pool, end };
    let (node, handle) = Actor::spawn(None, Node, args).await.map_err(|e| NodeError::Start(e.to_string()))?;
    Ok(Some(Member { hub, events, node, handle, ended }))
}

/// Why being a node failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    /// No supervisor answers.
    #[error("no supervisor at {} for {seconds} s; last: {last}", listed(addresses))]
    NoSupervisor {
        /// Where it should be.
        addresses: Vec<SocketAddr>,
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

fn listed(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Dials all addresses until the supervisor that leads answers at one of them. A foreign job is an answer.
pub async fn find(hub: &Hub, addresses: &[SocketAddr], wait: Duration) -> Result<Peer, AnyError> {
    let deadline = tokio::time::Instant::now() + wait;
    // Each by itself: one that is stopped takes long not to answer.
    let mut looking = tokio::task::JoinSet::new();
    for address in addresses {
        looking.spawn(find_at(hub.clone(), *address, deadline));
    }
    let mut last = "it has no address".to_owned();
    while let Some(looked) = looking.join_next().await {
        match looked? {
            Ok(peer) => return Ok(peer),
            Err(error @ (QuicError::ForeignJob { .. } | QuicError::Expired { .. })) => return Err(error.into()),
            Err(error) => last = error.to_string(),
        }
    }
    Err(NodeError::NoSupervisor { addresses: addresses.to_vec(), seconds: wait.as_secs(), last }.into())
}

async fn find_at(hub: Hub, address: SocketAddr, deadline: tokio::time::Instant) -> Result<Peer, QuicError> {
    let mut tell_at = tokio::time::Instant::now() + TELL;
    loop {
        match hub.dial(address).await {
            Err(error @ QuicError::Unreachable { .. }) if tokio::time::Instant::now() < deadline => {
                if tokio::time::Instant::now() >= tell_at {
                    tell_at = deadline;
                    tracing::warn!(%address, %error, seconds = SUPERVISOR_WAIT.as_secs(), "no supervisor yet: it is looked for");
                }
                tokio::time::sleep(REDIAL).await;
            }
            result => return result,
        }
    }
}

/// Asks for the job and the pace at which it is to be computed, opens its sources of text or asks for them. None: the
/// supervisor went away meanwhile, there may be another. `verified`: of those on this machine.
async fn receive_job(
    hub: &Hub,
    supervisor: Peer,
    events: &mut mpsc::Receiver<HubEvent>,
    verified: bool,
) -> Result<Option<(Materials, Option<f64>)>, AnyError> {
    tell(hub, supervisor, Control::Enquire);
    let mut job: Option<(Arc<JobSpec>, Vec<SourceInfo>)> = None;
    let mut pace = None;
    let mut tokens: Vec<Tokens> = Vec::new();
    let mut coming: Option<Coming> = None;
    loop {
        if let Some((spec, sources)) = &job {
            if tokens.len() == sources.len() {
                let corpus = Corpus::new(tokens, spec)?;
                let materials = Materials { layout: Layout::new(spec), spec: Arc::clone(spec), corpus };
                return Ok(Some((materials, pace)));
            }
            let (source, from) = (tokens.len() as u32, coming.as_ref().map_or(0, |c| c.length));
            tell(hub, supervisor, Control::TokensWanted { source, from });
        }
        match next_control(supervisor, events).await? {
            Some(Control::Job { config, sources, folder, machine: theirs }) => {
                let config = Config::parse(&config, "the supervisor's configuration", &[])?;
                pace = config.pace;
                let spec = Arc::new(config.spec);
                let run = RunFolder(folder.into());
                if theirs == machine() {
                    let wanted = sources.clone();
                    let open = move || {
                        if !verified {
                            verify_tokens(&run, &wanted)?;
                        }
                        open_tokens(&run, &wanted)
                    };
                    match tokio::task::spawn_blocking(open).await? {
                        Ok(here) => tokens = here,
                        Err(error) => {
                            tracing::warn!(%error, "the run's text on this machine is of no use: it is asked for")
                        }
                    }
                }
                if let Some(big) = sources.iter().skip(tokens.len()).find(|s| s.bytes() > TOKENS_MAX) {
                    return Err(NodeError::Job(format!("a source of text has {} bytes", big.bytes())).into());
                }
                job = Some((spec, sources));
            }
            Some(Control::TokensPart { source, from, bytes }) => {
                let Some((_, sources)) = &job else { continue };
                let info = &sources[tokens.len()];
                let so_far = coming.take().map_or_else(Coming::new, Ok)?;
                if source as usize != tokens.len() || from != so_far.length {
                    coming = Some(so_far);
                    continue;
                }
                let so_far = so_far.add(&bytes)?;
                if so_far.length < info.bytes() && !bytes.is_empty() {
                    coming = Some(so_far);
                } else {
                    tokens.push(so_far.finish(info)?);
                }
            }
            Some(Control::Dismiss { why }) => return Err(NodeError::Job(why).into()),
            Some(_) => {}
            None => return Ok(None),
        }
    }
}

/// The next word of the supervisor. None: it went away.
async fn next_control(supervisor: Peer, events: &mut mpsc::Receiver<HubEvent>) -> Result<Option<Control>, AnyError> {
    loop {
        let event = tokio::time::timeout(SUPERVISOR_WAIT, events.recv()).await;
        let event = event.ok().flatten().ok_or_else(|| NodeError::Job("it does not come".to_owned()))?;
        match event {
            HubEvent::Message(_, message) => {
                if let Unit::Control(control) = Unit::decode(message)? {
                    return Ok(Some(control));
                }
            }
            HubEvent::Down(peer) | HubEvent::Broken(peer, _) if peer == supervisor => return Ok(None),
            HubEvent::Up(_) | HubEvent::Down(_) | HubEvent::Broken(..) | HubEvent::Refused(_) | HubEvent::Way(..) => {}
        }
    }
}

/// A source that comes over the wire, in a file without a name.
struct Coming {
    file: std::fs::File,
    length: u64,
    hash: blake3::Hasher,
}

impl Coming {
    fn new() -> Result<Self, AnyError> {
        let path = std::env::temp_dir().join(format!("everstep-{:016x}.tokens", new_name()));
        let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Self { file, length: 0, hash: blake3::Hasher::new() })
    }

    fn add(mut self, bytes: &[u8]) -> Result<Self, AnyError> {
        std::io::Write::write_all(&mut self.file, bytes)?;
        self.length += bytes.len() as u64;
        self.hash.update(bytes);
        Ok(self)
    }

    fn finish(self, info: &SourceInfo) -> Result<Tokens, AnyError> {
        let got = self.hash.finalize().to_hex().to_string();
        if got != info.hash {
            return Err(NodeError::Job(format!("its text has hash {got}, expected {}", info.hash)).into());
        }
        Ok(Tokens::new(Arc::new(Mapped::of(&self.file)?), info.width))
    }
}
