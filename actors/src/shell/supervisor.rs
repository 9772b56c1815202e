//! The supervisor's process: the ractor actor around supervisor, keeper and router.
//!
//! Owns the run folder's files (through threads of their own), the endpoint that nodes join, and the
//! watch over processes of this machine. Of several supervisors' processes one has this actor: the one that leads.

use super::checkpoints::Checkpoints;
use super::replicated::Replicated;
use super::restore::Restored;
use super::run_folder::{MetricsLine, RunFolder, RunIdentity};
use super::scribe::{Files, Line, start_scribe};
use super::watch::watch;
use super::{machine, milliseconds, send, tell};
use crate::config::Config;
use crate::control::Control;
use crate::ids::{NodeId, Step};
use crate::keeper::{KeeperCore, KeeperEvent};
use crate::root::{Root, RootEffect, RootEvent};
use crate::storing::Newest;
use crate::supervisor::{Happening, Nodes, Report, Supervisor, SupervisorEvent};
use crate::tokens::Tokens;
use crate::wire::Unit;
use everstep_checkpoint::Switch;
use everstep_transport::{Hub, HubEvent, Peer};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

const TICK: Duration = Duration::from_millis(50);
/// Bytes of a source in one answer.
const TOKENS_PART: usize = 1 << 20;
/// Refused strangers are told of at most so often.
const STRANGERS_EVERY: Duration = Duration::from_secs(1);
/// A dead node's session is kept for so long, so that it is fenced if it wakes.
const FENCE_FOR: Duration = Duration::from_secs(120);

/// How a supervisor's life ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SupervisorEnd {
    /// All steps are committed and stored.
    Finished,
    /// The job cannot go on.
    Failed(String),
    /// This life cannot go on; the next one may.
    Panicked,
    /// It was one of several and does not lead any more: the process begins anew.
    Deposed(String),
}

/// What the supervisor's process is told.
#[derive(Debug)]
pub(super) enum Msg {
    /// From the hub, with the place in the mailbox that it takes until it is handled.
    Hub(HubEvent, OwnedSemaphorePermit),
    /// From our own ticker.
    Tick,
    /// From the scribe: the oldest record that was not synced is.
    Synced,
    /// From the scribe: all is written.
    Flushed,
    /// From the store's thread: it is open. With the fingerprints from its newest checkpoint's step on.
    Opened(Newest, BTreeMap<Step, String>),
    /// From the store's threads.
    Keeper(KeeperEvent),
    /// From either thread: the disk said no.
    DiskFailed(String),
    /// From the store's thread: a state that is wanted cannot be read any more.
    StateDamaged(String),
    /// From the store's thread: the store said no, and is tried again.
    StoreFails(String),
    /// From a watch over a process of this machine.
    ProcessEnded(Peer),
}

pub(super) struct State {
    pub(super) root: Root,
    config: Config,
    identity: RunIdentity,
    run: RunFolder,
    tokens: Vec<Tokens>,
    pub(super) hub: Hub,
    began: Instant,
    scribe: mpsc::Sender<Line>,
    /// There are other supervisors.
    among: bool,
    /// What the store of checkpoints said when it failed, until it takes something again.
    pub(super) store_fails: Option<String>,
    store: Checkpoints,
    /// Makes the store fail (chaos).
    pub(super) switch: Switch,
    peers: BTreeMap<NodeId, Peer>,
    reported_at: Option<u64>,
    pub(super) operators: BTreeMap<u64, (Peer, u64)>,
    pub(super) next_ticket: u64,
    class: String,
    /// How the job ended, until that is written.
    result: Option<Result<(), String>>,
    /// When a refused stranger was last told of.
    stranger: Option<Instant>,
    end: mpsc::Sender<SupervisorEnd>,
}

/// Where decisions and lines go.
pub(super) enum Sink {
    /// Into the run folder.
    Alone(Files),
    /// To all supervisors.
    Replicated(Replicated),
}

pub(super) struct Args {
    pub(super) restored: Restored,
    pub(super) sink: Sink,
    pub(super) config: Config,
    pub(super) identity: RunIdentity,
    pub(super) run: RunFolder,
    pub(super) tokens: Vec<Tokens>,
    pub(super) switch: Switch,
    pub(super) hub: Hub,
    pub(super) end: mpsc::Sender<SupervisorEnd>,
}

pub(super) struct SupervisorProcess;

impl Actor for SupervisorProcess {
    type Msg = Msg;
    type State = State;
    type Arguments = Args;

    async fn pre_start(&self, myself: ActorRef<Msg>, args: Args) -> Result<State, ActorProcessingErr> {
        let Args { restored, sink, config, identity, run, tokens, switch, hub, end } = args;
        let spec = Arc::new(config.spec.clone());
        let layout = crate::spec::Layout::new(&spec);
        let identity_class = identity.class.clone();
        let keeper = KeeperCore::new(Arc::clone(&spec), Arc::clone(&layout));
        let nodes = Nodes { wanted: config.nodes, spares: config.spares, relieve: config.relieve };
        let (supervisor, first) = Supervisor::new(spec, nodes, &restored.records, restored.reported, Duration::ZERO);
        let (root, effects) = Root::new(supervisor, first, keeper);
        let store = Checkpoints::start(restored.opening, &config.spec, layout, &myself)?;
        let mut state = State {
            root,
            config,
            identity,
            run,
            tokens,
            hub,
            switch,
            began: Instant::now(),
            store_fails: None,
            among: matches!(sink, Sink::Replicated(_)),
            scribe: match sink {
                Sink::Alone(files) => start_scribe(files, myself.clone())?,
                Sink::Replicated(replicated) => replicated.writer(myself.clone()),
            },
            store,
            peers: BTreeMap::new(),
            reported_at: None,
            operators: BTreeMap::new(),
            next_ticket: 0,
            class: identity_class,
            result: None,
            stranger: None,
            end,
        };
        state.perform(effects);
        // Nodes that an earlier life knew may have ended with it.
        state.root.supervisor.table().nodes.values().for_each(|info| watch(&myself, info));
        myself.send_interval(TICK, || Msg::Tick);
        Ok(state)
    }

    async fn handle(&self, myself: ActorRef<Msg>, message: Msg, state: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            Msg::Hub(event, _place) => state.on_hub(&myself, event),
            Msg::Tick => state.supervise(SupervisorEvent::Tick),
            Msg::Synced => state.supervise(SupervisorEvent::Synced),
            Msg::Flushed => {
                if let Some(result) = state.result.take() {
                    state.dismiss("the job is over");
                    let end = result.map_or_else(SupervisorEnd::Failed, |()| SupervisorEnd::Finished);
                    let _ = state.end.try_send(end);
                }
            }
            Msg::Opened(newest, reported) => state.opened(newest, reported),
            Msg::Keeper(event) => state.kept(event),
            Msg::DiskFailed(why) => {
                if !state.among {
                    state.dismiss(&why);
                }
                state.cannot(why);
            }
            Msg::StateDamaged(why) => {
                // The next life puts its checkpoint aside, and the job goes back to the one before.
                tracing::error!(why, "the newest checkpoint is damaged");
                let end = if state.among { SupervisorEnd::Deposed(why) } else { SupervisorEnd::Panicked };
                let _ = state.end.try_send(end);
            }
            Msg::StoreFails(why) => state.store_fails(why),
            Msg::ProcessEnded(peer) => state.on_end_of(peer, "its process ended".to_owned()),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Msg>,
        event: SupervisionEvent,
        _: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            // It has no children: nodes are other processes.
            SupervisionEvent::ActorStarted(_)
            | SupervisionEvent::ActorFailed(..)
            | SupervisionEvent::ActorTerminated(..)
            | SupervisionEvent::ProcessGroupChanged(_) => Ok(()),
        }
    }
}

impl State {
    pub(super) fn supervise(&mut self, event: SupervisorEvent) {
        self.root_event(RootEvent::Supervisor(event));
    }

    fn root_event(&mut self, event: RootEvent) {
        let effects = self.root.on(self.began.elapsed(), event);
        self.perform(effects);
    }

    fn write(&self, line: Line) {
        // The queue is full only if the disk hangs, or the other supervisors do.
        if let Err(error) = self.scribe.try_send(line) {
            self.cannot(format!("what is to be written cannot be: {error}"));
        }
    }

    /// This process cannot go on. If it is the only supervisor, nobody can; else another one leads.
    fn cannot(&self, why: String) {
        let end = if self.among { SupervisorEnd::Deposed(why) } else { SupervisorEnd::Failed(why) };
        let _ = self.end.try_send(end);
    }

    /// Operators are told once.
    fn store_fails(&mut self, why: String) {
        if self.store_fails.is_none() {
            tracing::warn!(why, "the store of checkpoints fails: training goes on, and it is tried again");
            self.note(&Happening::StoreFails { why: why.clone() });
        }
        self.store_fails = Some(why);
    }

    fn opened(&mut self, newest: Newest, reported: BTreeMap<Step, String>) {
        for why in newest.wrong {
            tracing::warn!(why, "a checkpoint is not readable");
            self.note(&Happening::CheckpointRefused { why });
        }
        self.store_works();
        self.root_event(RootEvent::Found { newest: newest.step, reported });
    }

    fn kept(&mut self, event: KeeperEvent) {
        if matches!(event, KeeperEvent::Stored { .. } | KeeperEvent::Published(_) | KeeperEvent::Refused) {
            self.store_works();
        }
        self.root_event(RootEvent::Keeper(event));
    }

    fn store_works(&mut self) {
        if self.store_fails.take().is_some() {
            self.note(&Happening::StoreWorks);
        }
    }

    fn note(&self, happening: &Happening) {
        let mut value = serde_json::to_value(happening).expect("a happening is an object");
        if let Some(object) = value.as_object_mut() {
            object.insert("time".to_owned(), milliseconds().into());
        }
        self.write(Line::Event(value.to_string()));
    }

    fn perform(&mut self, effects: Vec<RootEffect>) {
        for effect in effects {
            match effect {
                RootEffect::Append(record) => {
                    self.write(Line::Record(Box::new(record)));
                }
                RootEffect::Tell(node, control) => {
                    if let Some(peer) = self.peer_of(node) {
                        tell(&self.hub, peer, control);
                    }
                }
                RootEffect::TellAll(nodes, control) => {
                    // Encoded once: a table is large.
                    let unit = Unit::Control(control);
                    let (lane, message) = (unit.lane(), unit.encode());
                    let peers: Vec<Peer> = nodes.into_iter().filter_map(|node| self.peer_of(node)).collect();
                    peers.into_iter().for_each(|peer| self.hub.send(peer, lane, message.clone()));
                }
                RootEffect::Transmit(node, bundle) => {
                    if let Some(peer) = self.peer_of(node) {
                        send(&self.hub, peer, Unit::Bundle(bundle));
                    }
                }
                RootEffect::Forget(nodes) => nodes.into_iter().for_each(|n| self.forget(n)),
                RootEffect::Report(report) => self.report(report),
                RootEffect::Note(happening) => self.note(&happening),
                RootEffect::Write(write) => self.taken(self.store.write(write)),
                RootEffect::Read(read) => self.taken(self.store.read(read)),
                RootEffect::Finish(result) => {
                    self.write(Line::End(result.clone()));
                    self.result = Some(result);
                }
            }
        }
    }

    fn taken(&self, taken: bool) {
        if !taken {
            self.cannot("a thread of checkpoints has ended".to_owned());
        }
    }

    /// The session of a node: of its last word, or as the table has it.
    pub(super) fn peer_of(&mut self, node: NodeId) -> Option<Peer> {
        if let Some(peer) = self.peers.get(&node) {
            return Some(*peer);
        }
        let peer = self.root.supervisor.table().nodes.get(&node)?.peer;
        self.peers.insert(node, peer);
        Some(peer)
    }

    fn forget(&mut self, node: NodeId) {
        // Later words of the node name its session again, and are answered by fencing it.
        if let Some(peer) = self.peers.remove(&node) {
            let hub = self.hub.clone();
            tokio::spawn(async move {
                tokio::time::sleep(FENCE_FOR).await;
                hub.close(peer);
            });
        }
    }

    fn report(&mut self, report: Report) {
        let now = milliseconds();
        let tokens = self.config.spec.targets_of_step(report.commit.commit.step);
        let line = MetricsLine::new(report, tokens, now, self.reported_at.replace(now));
        self.write(Line::Metrics(serde_json::to_string(&line).expect("a line of metrics can be written")));
    }

    fn dismiss(&mut self, why: &str) {
        let nodes: Vec<NodeId> = self.root.supervisor.table().nodes.keys().copied().collect();
        for node in nodes {
            if let Some(peer) = self.peer_of(node) {
                tell(&self.hub, peer, Control::Dismiss { why: why.to_owned() });
            }
        }
    }

    fn on_end_of(&mut self, peer: Peer, why: String) {
        let node = self.root.supervisor.table().nodes.iter().find(|(_, info)| info.peer == peer).map(|(n, _)| *n);
        if let Some(node) = node {
            self.supervise(SupervisorEvent::Lost { node, why });
        }
    }

    fn on_hub(&mut self, myself: &ActorRef<Msg>, event: HubEvent) {
        match event {
            HubEvent::Message(peer, message) => match Unit::decode(message) {
                Ok(Unit::Control(control)) => self.on_control(myself, peer, control),
                Ok(Unit::Bundle(bundle)) => self.root_event(RootEvent::Arrived(bundle)),
                Err(error) => {
                    tracing::warn!(peer, %error, "garbage from a member of the job: its session ends");
                    self.hub.close(peer);
                }
            },
            HubEvent::Refused(why) => {
                // A stranger must not fill the disk.
                let quiet = self.stranger.is_some_and(|at| at.elapsed() < STRANGERS_EVERY);
                if !quiet {
                    self.stranger = Some(Instant::now());
                    let refused = self.hub.refused();
                    tracing::warn!(why, refused, "refused");
                    self.note(&Happening::StrangerRefused { why, refused });
                }
            }
            // An operator, or a node that never joined, has gone.
            // Whether a member lives is for its beats and its process to say.
            // It may have come back since.
            HubEvent::Down(peer) if !self.peers.values().any(|p| *p == peer) && !self.hub.is_linked(peer) => {
                self.hub.close(peer);
            }
            HubEvent::Broken(peer, why) => self.on_end_of(peer, format!("its session is over: {why}")),
            // The other end tells.
            HubEvent::Up(_) | HubEvent::Down(_) | HubEvent::Way(..) => {}
        }
    }

    fn on_control(&mut self, myself: &ActorRef<Msg>, peer: Peer, control: Control) {
        match control {
            Control::Enquire => {
                let job = Control::Job {
                    config: self.config.text.clone(),
                    sources: self.identity.sources.clone(),
                    folder: self.run.0.display().to_string(),
                    machine: machine(),
                };
                tell(&self.hub, peer, job);
            }
            Control::TokensWanted { source, from } => {
                let all = self.tokens.get(source as usize).map_or(&[][..], Tokens::as_bytes);
                let start = usize::try_from(from).unwrap_or(usize::MAX).min(all.len());
                let end = start.saturating_add(TOKENS_PART).min(all.len());
                tell(&self.hub, peer, Control::TokensPart { source, from, bytes: all[start..end].to_vec() });
            }
            Control::Join { info, device_class } => {
                if device_class != self.class {
                    let why =
                        format!("its device class is {device_class}, the job's is {}: their bits differ", self.class);
                    tell(&self.hub, peer, Control::Dismiss { why });
                    return;
                }
                watch(myself, &info);
                self.supervise(SupervisorEvent::Join(info));
            }
            Control::Return { node } => {
                self.peers.insert(node, peer);
                self.supervise(SupervisorEvent::Return(node));
            }
            Control::Heartbeat { node, operations, rates, down } => {
                self.peers.insert(node, peer);
                self.supervise(SupervisorEvent::Heartbeat { node, operations, rates, down });
            }
            Control::ActorFailed { address, reason } => {
                self.supervise(SupervisorEvent::ActorFailed { address, reason });
            }
            Control::Described { ticket, text } => {
                if let Some((operator, ticket)) = self.operators.remove(&ticket) {
                    tell(&self.hub, operator, Control::Described { ticket, text });
                }
            }
            Control::Admin { ticket, request } => self.on_admin(peer, ticket, request),
            Control::Way { node, with, way } => {
                self.note(&Happening::WayChanged { node: node.0, with: with.map(|w| w.0), way });
            }
            Control::Leave { node } => self.supervise(SupervisorEvent::Leave(node)),
            // What only the supervisor says.
            Control::Welcome { .. }
            | Control::Dismiss { .. }
            | Control::Table(_)
            | Control::Fence
            | Control::Actor { .. }
            | Control::Links { .. }
            | Control::Disturb(..)
            | Control::TokensPart { .. }
            | Control::Job { .. } => {}
        }
    }
}
