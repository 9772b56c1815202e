//! A node: the ractor actor that hosts workers and carries messages, around the router's pure core.
//!
//! Owns the node's workers, the threads for jobs, and the sessions with the supervisor and other nodes.
//! Supervises every worker: a failed one is reported, never restarted here.
//! - ND-1: the supervisor's next life gets everything that the last one may have missed.
//! - ND-2: a fenced node gives up all it has; its process joins as new.

use super::pool::Pool;
use super::worker::{self, Worker};
use super::{AnyError, HUB_EVENTS, machine, new_name, send, tell};
use crate::config::Config;
use crate::control::{ActorRequest, Control};
use crate::data::Corpus;
use crate::effect::{Effect, Event};
use crate::ids::{ActorId, Address, Incarnation, NodeId, SUPERVISOR_NODE};
use crate::message::Envelope;
use crate::router::{Action, Router};
use crate::spec::Layout;
use crate::table::NodeInfo;
use crate::wire::Unit;
use crate::worker::Materials;
use everstep_kernels::{Backend, CpuBackend};
use everstep_transport::{Credentials, Hub, HubEvent, Peer};
use ractor::{Actor, ActorCell, ActorId as CellId, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

const HEARTBEAT: Duration = Duration::from_millis(100);
/// Without a supervisor for so long, a node ends.
const SUPERVISOR_WAIT: Duration = Duration::from_secs(60);
const REDIAL: Duration = Duration::from_millis(50);
/// Bytes of the corpus that are asked for at once, and the most that are taken.
const CORPUS_MAX: u64 = 16 << 30;

/// How to be a node.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The supervisor's address.
    pub join: SocketAddr,
    /// Where this node listens.
    pub listen: SocketAddr,
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

/// What a node is told.
#[derive(Debug)]
pub(super) enum Msg {
    /// From the hub, with the place in the mailbox that it takes until it is handled.
    Hub(HubEvent, OwnedSemaphorePermit),
    /// From a worker.
    Effects { from: Address, effects: Vec<Effect> },
    /// From our own ticker: says that the node lives.
    Beat,
    /// From the task that looks for the supervisor: it answers, perhaps as a new life.
    SupervisorFound(Peer),
    /// From that task: it gave up.
    SupervisorGone(String),
    /// From the task that asked a worker to describe itself.
    Described { ticket: u64, text: String },
}

/// A worker that runs here.
#[derive(Debug)]
struct Running {
    incarnation: Incarnation,
    actor: ActorRef<worker::Msg>,
}

struct State {
    hub: Hub,
    supervisor: Peer,
    join: SocketAddr,
    router: Router,
    materials: Materials,
    pool: Pool,
    workers: BTreeMap<ActorId, Running>,
    lives: BTreeMap<CellId, Address>,
    /// Peers with which a session is kept.
    peers: BTreeMap<NodeId, Peer>,
    looking: bool,
    end: mpsc::Sender<NodeEnd>,
}

struct Args {
    hub: Hub,
    supervisor: Peer,
    join: SocketAddr,
    materials: Materials,
    pool: Pool,
    end: mpsc::Sender<NodeEnd>,
}

struct Node;

/// Joins a job and serves it until it ends or this node is fenced.
pub async fn run_node(options: &NodeOptions) -> Result<NodeEnd, AnyError> {
    let credentials = Credentials::load(&options.credentials)?;
    let (hub, mut events) = Hub::open(options.listen, &credentials, new_name())?;
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
    let places = Arc::new(Semaphore::new(HUB_EVENTS));
    let result = loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => {
                    let place = Arc::clone(&places).acquire_owned().await?;
                    let _ = node.cast(Msg::Hub(event, place));
                }
                None => break Err(NodeError::Start("the endpoint closed".to_owned())),
            },
            end = ended.recv() => break end.ok_or_else(|| NodeError::Start("the node's actor failed".to_owned())),
        }
    };
    node.stop(None);
    let _ = handle.await;
    hub.shut_down();
    Ok(result?)
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

/// Dials until somebody answers. A foreign job is an answer.
async fn find(hub: &Hub, address: SocketAddr, wait: Duration) -> Result<Peer, AnyError> {
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

impl Actor for Node {
    type Msg = Msg;
    type State = State;
    type Arguments = Args;

    async fn pre_start(&self, myself: ActorRef<Msg>, args: Args) -> Result<State, ActorProcessingErr> {
        myself.send_interval(HEARTBEAT, || Msg::Beat);
        let Args { hub, supervisor, join, materials, pool, end } = args;
        Ok(State {
            router: Router::new(materials.plant),
            hub,
            supervisor,
            join,
            materials,
            pool,
            workers: BTreeMap::new(),
            lives: BTreeMap::new(),
            peers: BTreeMap::new(),
            looking: false,
            end,
        })
    }

    async fn handle(&self, myself: ActorRef<Msg>, message: Msg, state: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            Msg::Hub(event, _place) => state.on_hub(&myself, event).await,
            Msg::Effects { from, effects } => state.perform(&myself, from, effects).await,
            Msg::Beat => {
                if let Some(node) = state.router.node() {
                    state.say(Control::Heartbeat { node, work: state.pool.work() });
                }
            }
            Msg::SupervisorFound(peer) => state.on_supervisor(peer),
            Msg::SupervisorGone(why) => {
                let _ = state.end.try_send(NodeEnd::Dismissed(why));
            }
            Msg::Described { ticket, text } => state.say(Control::Described { ticket, text }),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Msg>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(cell, error) => state.on_failure(&cell, error.to_string()),
            // We stop workers ourselves; they are forgotten when we do.
            SupervisionEvent::ActorTerminated(..)
            | SupervisionEvent::ActorStarted(_)
            | SupervisionEvent::ProcessGroupChanged(_) => {}
        }
        Ok(())
    }
}

impl State {
    fn say(&self, control: Control) {
        tell(&self.hub, self.supervisor, control);
    }

    fn on_failure(&mut self, cell: &ActorCell, reason: String) {
        let Some(address) = self.lives.remove(&cell.get_id()) else { return };
        self.workers.remove(&address.actor);
        tracing::warn!(actor = %address, reason, "a worker failed");
        if matches!(address.actor, ActorId::Host { .. }) {
            // A host has no life in the table: the node is not whole without it, and leaves.
            let _ = self.end.try_send(NodeEnd::Fenced);
            return;
        }
        self.router.fail(address, reason.clone());
        self.say(Control::ActorFailed { address, reason });
    }

    async fn on_hub(&mut self, myself: &ActorRef<Msg>, event: HubEvent) {
        match event {
            HubEvent::Message(peer, message) => match Unit::decode(message) {
                Ok(Unit::Control(control)) if peer == self.supervisor => self.on_control(myself, control).await,
                Ok(Unit::Control(_)) => {}
                Ok(Unit::Bundle(bundle)) => {
                    let actions = self.router.arrive(bundle);
                    self.act(myself, actions).await;
                }
                Err(error) => {
                    tracing::warn!(peer, %error, "garbage from a member of the job: its session ends");
                    self.hub.close(peer);
                }
            },
            HubEvent::Down(peer) if peer == self.supervisor => self.look(myself),
            HubEvent::Broken(peer, why) if peer == self.supervisor => {
                // The supervisor has forgotten the session: for it this node is dead.
                tracing::warn!(why, "the session with the supervisor is over");
                let _ = self.end.try_send(NodeEnd::Fenced);
            }
            HubEvent::Broken(peer, why) if self.peers.values().any(|p| *p == peer) => {
                // Something may be lost that nobody sends again: this life cannot be trusted any more.
                tracing::warn!(peer, why, "the session with a node is over");
                let _ = self.end.try_send(NodeEnd::Fenced);
            }
            HubEvent::Refused(why) => tracing::warn!(why, "a stranger was refused"),
            HubEvent::Up(_) | HubEvent::Down(_) | HubEvent::Broken(..) => {}
        }
    }

    /// Looks for the supervisor: the same life after a broken link, or the next one.
    fn look(&mut self, myself: &ActorRef<Msg>) {
        if std::mem::replace(&mut self.looking, true) {
            return;
        }
        let (hub, join, myself) = (self.hub.clone(), self.join, myself.clone());
        tokio::spawn(async move {
            let message = match find(&hub, join, SUPERVISOR_WAIT).await {
                Ok(peer) => Msg::SupervisorFound(peer),
                Err(error) => Msg::SupervisorGone(error.to_string()),
            };
            let _ = myself.cast(message);
        });
    }

    fn on_supervisor(&mut self, peer: Peer) {
        self.looking = false;
        if peer == self.supervisor {
            return;
        }
        self.hub.close(self.supervisor);
        self.supervisor = peer;
        let Some(node) = self.router.node() else {
            // It was never welcomed: the life that might have is gone, so it joins as new.
            let _ = self.end.try_send(NodeEnd::Fenced);
            return;
        };
        self.say(Control::Return { node });
        for (address, reason) in self.router.failures() {
            self.say(Control::ActorFailed { address: *address, reason: reason.clone() });
        }
    }

    async fn on_control(&mut self, myself: &ActorRef<Msg>, control: Control) {
        match control {
            Control::Welcome { node } => self.router.welcome(node),
            Control::Table(table) => {
                let actions = self.router.on_table(Arc::clone(&table));
                self.meet_peers();
                self.act(myself, actions).await;
            }
            Control::Fence => {
                let _ = self.end.try_send(NodeEnd::Fenced);
            }
            Control::Dismiss { why } => {
                let _ = self.end.try_send(NodeEnd::Dismissed(why));
            }
            Control::Actor { address, request, ticket } => self.on_request(myself, address, request, ticket),
            // What nodes say to the supervisor, or before joining.
            Control::Enquire
            | Control::Join { .. }
            | Control::Return { .. }
            | Control::Heartbeat { .. }
            | Control::ActorFailed { .. }
            | Control::Described { .. }
            | Control::CorpusWanted { .. }
            | Control::CorpusPart { .. }
            | Control::Job { .. }
            | Control::Admin { .. } => {}
        }
    }

    fn on_request(&self, myself: &ActorRef<Msg>, address: Address, request: ActorRequest, ticket: u64) {
        let running = self.workers.get(&address.actor).filter(|w| w.incarnation == address.incarnation);
        let Some(running) = running else {
            self.say(Control::Described { ticket, text: format!("{address} does not run here") });
            return;
        };
        match request {
            ActorRequest::Panic => {
                let _ = running.actor.cast(worker::Msg::Panic);
                self.say(Control::Described { ticket, text: format!("{address} was made to panic") });
            }
            ActorRequest::Describe => {
                let (actor, myself) = (running.actor.clone(), myself.clone());
                tokio::spawn(async move {
                    let answer = ractor::call_t!(actor, |reply| worker::Msg::Describe { reply }, 1000);
                    let text = answer.unwrap_or_else(|e| format!("no answer: {e}"));
                    let _ = myself.cast(Msg::Described { ticket, text });
                });
            }
        }
    }

    /// Sessions with the nodes of the table: the newer of two nodes dials.
    fn meet_peers(&mut self) {
        let table = Arc::clone(self.router.table());
        let me = self.router.node();
        for (node, info) in &table.nodes {
            if Some(*node) == me || self.peers.contains_key(node) {
                continue;
            }
            self.peers.insert(*node, info.peer);
            if me > Some(*node)
                && let Ok(address) = info.address.parse()
            {
                self.hub.keep(info.peer, address);
            }
        }
    }

    async fn act(&mut self, myself: &ActorRef<Msg>, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Spawn(address) => self.spawn(myself, address).await,
                Action::Stop(address) => {
                    if self.workers.get(&address.actor).is_some_and(|w| w.incarnation == address.incarnation)
                        && let Some(running) = self.workers.remove(&address.actor)
                    {
                        self.lives.remove(&running.actor.get_id());
                        running.actor.stop(None);
                    }
                }
                Action::Deliver(actor, event) => self.deliver(actor, event),
                Action::Transmit(node, bundle) => self.transmit(node, bundle),
                Action::Forget(nodes) => {
                    for node in nodes {
                        if let Some(peer) = self.peers.remove(&node) {
                            self.hub.close(peer);
                        }
                    }
                }
            }
        }
    }

    async fn spawn(&mut self, myself: &ActorRef<Msg>, address: Address) {
        let Some(core) = self.materials.core(address) else { return };
        let args = worker::Args { address, core, node: myself.clone(), pool: self.pool.clone() };
        match Actor::spawn_linked(None, Worker, args, myself.get_cell()).await {
            Ok((actor, _)) => {
                self.lives.insert(actor.get_id(), address);
                self.workers.insert(address.actor, Running { incarnation: address.incarnation, actor });
            }
            Err(error) => {
                self.router.fail(address, error.to_string());
                self.say(Control::ActorFailed { address, reason: error.to_string() });
            }
        }
    }

    fn deliver(&self, actor: ActorId, event: Event) {
        if let Some(running) = self.workers.get(&actor) {
            // A worker that has just failed is reported by its supervision event.
            let _ = running.actor.cast(worker::Msg::Event(event));
        }
    }

    fn transmit(&self, node: NodeId, bundle: Vec<Envelope>) {
        let peer = if node == SUPERVISOR_NODE { Some(self.supervisor) } else { self.peers.get(&node).copied() };
        if let Some(peer) = peer {
            send(&self.hub, peer, Unit::Bundle(bundle));
        }
    }

    async fn perform(&mut self, myself: &ActorRef<Msg>, me: Address, effects: Vec<Effect>) {
        // A worker that has been replaced may still have something to say: nobody wants it.
        if self.workers.get(&me.actor).is_none_or(|w| w.incarnation != me.incarnation) {
            return;
        }
        let mut messages = Vec::new();
        for effect in effects {
            match effect {
                Effect::Send { from, to, body } => messages.push((from.unwrap_or(me), to, body)),
                Effect::Tell { to, local } => self.deliver(to, Event::Local { from: me.actor, local }),
                // The worker starts its jobs itself.
                Effect::Compute { .. } => {}
            }
        }
        let actions = self.router.send(messages);
        self.act(myself, actions).await;
    }
}
