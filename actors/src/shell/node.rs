//! A node: the ractor actor that hosts workers and carries messages, around the router's pure core.
//!
//! Owns the node's workers, the threads for jobs, and the sessions with the supervisor and other nodes.
//! Supervises every worker: a failed one is reported, never restarted here.
//! - ND-1: the supervisor's next life gets everything that the last one may have missed.
//! - ND-2: a fenced node gives up all it has; its process joins as new.

use super::join::{NodeEnd, SUPERVISOR_WAIT, find};
use super::pool::Pool;
use super::pulse::Pulse;
use super::worker::{self, Worker};
use super::{send, tell};
use crate::control::{ActorRequest, BadWire, Control};
use crate::effect::{Effect, Event};
use crate::ids::{ActorId, Address, Incarnation, NodeId, SUPERVISOR_NODE};
use crate::message::Envelope;
use crate::router::{Action, Router};
use crate::tally::Tally;
use crate::wire::Unit;
use crate::worker::Materials;
use everstep_transport::{Disturbance, Hub, HubEvent, Peer, Way};
use ractor::{Actor, ActorCell, ActorId as CellId, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// What a node is told.
#[derive(Debug)]
pub(super) enum Msg {
    /// From the hub, with the place in the mailbox that it takes until it is handled.
    Hub(HubEvent, OwnedSemaphorePermit),
    /// From a worker.
    Effects { from: Address, effects: Vec<Effect> },
    /// From the task that looks for the supervisor: it answers, perhaps as a new life.
    SupervisorFound(Peer),
    /// From that task: it gave up.
    SupervisorGone(String),
    /// The process was told to end: it asks to leave. Told again, it ends at once.
    Leave,
    /// From the task that asked a worker to describe itself.
    Described { ticket: u64, text: String },
}

/// A worker that runs here.
#[derive(Debug)]
struct Running {
    incarnation: Incarnation,
    actor: ActorRef<worker::Msg>,
}

pub(super) struct State {
    hub: Hub,
    supervisor: Peer,
    join: Vec<SocketAddr>,
    router: Router,
    materials: Materials,
    pool: Pool,
    pulse: Pulse,
    workers: BTreeMap<ActorId, Running>,
    lives: BTreeMap<CellId, Address>,
    /// Peers with which a session is kept.
    peers: BTreeMap<NodeId, Peer>,
    /// The ways of sessions that the supervisor was told of.
    told: BTreeMap<Peer, Way>,
    looking: bool,
    leaving: bool,
    /// Chaos: what stages compute here is wrong, until the node is given up.
    wrong: bool,
    /// The supervisor lets it leave.
    drained: bool,
    end: mpsc::Sender<NodeEnd>,
}

pub(super) struct Args {
    pub(super) hub: Hub,
    pub(super) supervisor: Peer,
    pub(super) join: Vec<SocketAddr>,
    pub(super) materials: Materials,
    pub(super) pool: Pool,
    pub(super) end: mpsc::Sender<NodeEnd>,
}

pub(super) struct Node;

impl Actor for Node {
    type Msg = Msg;
    type State = State;
    type Arguments = Args;

    async fn pre_start(&self, _: ActorRef<Msg>, args: Args) -> Result<State, ActorProcessingErr> {
        let Args { hub, supervisor, join, materials, pool, end } = args;
        let pulse = Pulse::start(hub.clone(), supervisor, pool.clone())?;
        Ok(State {
            router: Router::new(),
            hub,
            supervisor,
            join,
            materials,
            pool,
            pulse,
            workers: BTreeMap::new(),
            lives: BTreeMap::new(),
            peers: BTreeMap::new(),
            told: BTreeMap::new(),
            looking: false,
            leaving: false,
            wrong: false,
            drained: false,
            end,
        })
    }

    async fn handle(&self, myself: ActorRef<Msg>, message: Msg, state: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            Msg::Hub(event, _place) => state.on_hub(&myself, event).await,
            Msg::Effects { from, effects } => state.perform(&myself, from, effects).await,
            Msg::SupervisorFound(peer) => state.on_supervisor(&myself, peer),
            Msg::SupervisorGone(why) => {
                state.finish(NodeEnd::Dismissed(why));
            }
            Msg::Leave => state.leave(),
            Msg::Described { ticket, text } => state.say(Control::Described { ticket, text }),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Msg>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(cell, error) => state.on_failure(&myself, &cell, error.to_string()).await,
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

    fn leave(&mut self) {
        match self.router.node() {
            Some(node) if !std::mem::replace(&mut self.leaving, true) => self.say(Control::Leave { node }),
            Some(_) | None => self.finish(NodeEnd::Left),
        }
    }

    fn finish(&self, end: NodeEnd) {
        let end = if (self.leaving || self.drained) && end == NodeEnd::Fenced { NodeEnd::Left } else { end };
        let _ = self.end.try_send(end);
    }

    async fn on_failure(&mut self, myself: &ActorRef<Msg>, cell: &ActorCell, reason: String) {
        let Some(address) = self.lives.remove(&cell.get_id()) else { return };
        self.workers.remove(&address.actor);
        tracing::warn!(actor = %address, reason, "a worker failed");
        let ActorId::Host { layer } = address.actor else {
            self.report_failure(address, reason);
            return;
        };
        // A host has no life in the table. It starts again here; rows that were with it are lost, so
        // its experts get new lives, which count.
        let here =
            self.workers.iter().filter(|(actor, _)| matches!(actor, ActorId::Expert { layer: l, .. } if *l == layer));
        let experts: Vec<Address> =
            here.map(|(actor, w)| Address { actor: *actor, incarnation: w.incarnation }).collect();
        for expert in experts {
            self.stop(expert);
            self.report_failure(expert, format!("its host failed: {reason}"));
        }
        self.spawn(myself, address).await;
        let table = Arc::clone(self.router.table());
        self.deliver(address.actor, Event::Table(table));
    }

    fn report_failure(&mut self, address: Address, reason: String) {
        self.router.fail(address, reason.clone());
        self.say(Control::ActorFailed { address, reason });
    }

    /// Stops a worker, if that life of it runs here.
    fn stop(&mut self, address: Address) {
        if self.workers.get(&address.actor).is_some_and(|w| w.incarnation == address.incarnation)
            && let Some(running) = self.workers.remove(&address.actor)
        {
            self.lives.remove(&running.actor.get_id());
            running.actor.stop(None);
        }
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
            HubEvent::Down(peer) if peer == self.supervisor => {
                self.told.remove(&peer);
                if !self.hub.is_linked(peer) {
                    self.look(myself);
                }
            }
            HubEvent::Broken(peer, why) if peer == self.supervisor => {
                // The supervisor has forgotten the session: for it this node is dead.
                tracing::warn!(why, "the session with the supervisor is over");
                self.finish(NodeEnd::Fenced);
            }
            HubEvent::Broken(peer, why) if self.peers.values().any(|p| *p == peer) => {
                // Something may be lost that nobody sends again: this life cannot be trusted any more.
                tracing::warn!(peer, why, "the session with a node is over");
                self.finish(NodeEnd::Fenced);
            }
            HubEvent::Refused(why) => tracing::warn!(why, refused = self.hub.refused(), "refused"),
            HubEvent::Up(peer) => self.on_link(peer, true),
            HubEvent::Down(peer) => {
                self.told.remove(&peer);
                self.on_link(peer, false);
            }
            HubEvent::Way(peer, way) => self.on_way(peer, way),
            HubEvent::Broken(..) => {}
        }
    }

    /// The node at the other end of a session, if it is one that is known.
    fn with(&self, peer: Peer) -> Option<NodeId> {
        self.peers.iter().find(|(_, p)| **p == peer).map(|(node, _)| *node)
    }

    /// Tells the supervisor of a new way, once this node is a member. That a session begins over QUIC is nothing new.
    fn on_way(&mut self, peer: Peer, way: Way) {
        let Some(node) = self.router.node() else { return };
        let with = self.with(peer);
        // Another node may dial before the table has it: [`Self::meet_peers`] tells then.
        if with.is_none() && peer != self.supervisor {
            return;
        }
        let before = self.told.get(&peer);
        if before == Some(&way) || (before.is_none() && matches!(way, Way::Quic(_))) {
            return;
        }
        self.say(Control::Way { node, with, way: way.to_string() });
        self.told.insert(peer, way);
    }

    fn tell_ways(&mut self) {
        self.hub.ways().into_iter().for_each(|(peer, way)| self.on_way(peer, way));
    }

    fn links(&self) -> String {
        let name = |peer| match self.with(peer) {
            Some(node) => node.to_string(),
            None if peer == self.supervisor => "the supervisor".to_owned(),
            None => format!("a process that no table has yet ({peer:x})"),
        };
        let lines = self.hub.ways().into_iter().map(|(peer, way)| format!("{}: {way}\n", name(peer)));
        lines.chain([format!("refused: {}\n", self.hub.refused())]).collect()
    }

    fn on_link(&self, peer: Peer, up: bool) {
        if let Some(node) = self.with(peer) {
            self.pulse.link(node, up);
        }
    }

    /// Looks for the supervisor: the same life after a broken link, or the next one.
    fn look(&mut self, myself: &ActorRef<Msg>) {
        if std::mem::replace(&mut self.looking, true) {
            return;
        }
        let (hub, join, myself) = (self.hub.clone(), self.join.clone(), myself.clone());
        tokio::spawn(async move {
            let message = match find(&hub, &join, SUPERVISOR_WAIT).await {
                Ok(peer) => Msg::SupervisorFound(peer),
                Err(error) => Msg::SupervisorGone(error.to_string()),
            };
            let _ = myself.cast(message);
        });
    }

    fn on_supervisor(&mut self, myself: &ActorRef<Msg>, peer: Peer) {
        self.looking = false;
        // The link that was found may be down again: that was told while this node was looking.
        if !self.hub.is_linked(peer) {
            self.look(myself);
        }
        if peer == self.supervisor {
            return;
        }
        self.hub.close(self.supervisor);
        self.supervisor = peer;
        self.pulse.talk_to(peer);
        let Some(node) = self.router.node() else {
            // It was never welcomed: the life that might have is gone, so it joins as new.
            self.finish(NodeEnd::Fenced);
            return;
        };
        self.say(Control::Return { node });
        if self.leaving {
            self.say(Control::Leave { node });
        }
        for (address, reason) in self.router.failures() {
            self.say(Control::ActorFailed { address: *address, reason: reason.clone() });
        }
    }

    /// The wire is bad for a while (chaos).
    fn disturb(&self, bad: BadWire, ms: u32) {
        if bad.rdma_fails {
            self.hub.break_rdma();
        }
        let address = |node| self.router.table().nodes.get(&node)?.address.parse().ok();
        let with = bad.with.map(address);
        // Of one that is not there any more there is nothing to disturb.
        if with == Some(None) {
            return;
        }
        self.hub.disturb(Disturbance {
            with: with.flatten(),
            lost_percent: bad.lost_percent,
            both_ways: bad.both_ways,
            delay: Duration::from_millis(bad.delay_ms.into()),
            lasts: Duration::from_millis(ms.into()),
        });
    }

    async fn on_control(&mut self, myself: &ActorRef<Msg>, control: Control) {
        match control {
            Control::Welcome { node } => {
                self.router.welcome(node);
                self.tell_ways();
            }
            Control::Table(table) => {
                let actions = self.router.on_table(Arc::clone(&table));
                self.meet_peers();
                if let Some(node) = self.router.node() {
                    self.drained |= table.leaving.contains(&node);
                    // Its beats begin when it knows whom it has to reach.
                    self.pulse.welcome(node);
                }
                self.act(myself, actions).await;
            }
            Control::Fence => self.finish(NodeEnd::Fenced),
            Control::Leave { .. } => self.finish(NodeEnd::Left),
            Control::Dismiss { why } => {
                self.finish(NodeEnd::Dismissed(why));
            }
            Control::Actor { address, request, ticket } => self.on_request(myself, address, request, ticket),
            Control::Disturb(bad, ms) => self.disturb(bad, ms),
            Control::Links { ticket } => self.say(Control::Described { ticket, text: self.links() }),
            // What nodes say to the supervisor, or before joining.
            Control::Enquire
            | Control::Join { .. }
            | Control::Return { .. }
            | Control::Heartbeat { .. }
            | Control::ActorFailed { .. }
            | Control::Described { .. }
            | Control::TokensWanted { .. }
            | Control::TokensPart { .. }
            | Control::Job { .. }
            | Control::Way { .. }
            | Control::Admin { .. } => {}
        }
    }

    fn on_request(&mut self, myself: &ActorRef<Msg>, address: Address, request: ActorRequest, ticket: u64) {
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
            ActorRequest::Flip => {
                let is_stage = |actor: &ActorId| matches!(actor, ActorId::Stage { .. });
                self.wrong |= is_stage(&address.actor);
                for (actor, running) in &self.workers {
                    if *actor == address.actor || (self.wrong && is_stage(actor)) {
                        let _ = running.actor.cast(worker::Msg::Flip);
                    }
                }
                self.say(Control::Described { ticket, text: format!("a bit of {address} was flipped") });
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
            self.pulse.link(*node, self.hub.is_linked(info.peer));
            if me > Some(*node)
                && let Ok(address) = info.address.parse()
            {
                self.hub.keep(info.peer, address);
            }
        }
        self.tell_ways();
    }

    async fn act(&mut self, myself: &ActorRef<Msg>, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Spawn(address) => self.spawn(myself, address).await,
                Action::Stop(address) => self.stop(address),
                Action::Deliver(actor, event) => self.deliver(actor, event),
                Action::Transmit(node, bundle) => self.transmit(node, bundle),
                Action::Forget(nodes) => {
                    for node in nodes {
                        if let Some(peer) = self.peers.remove(&node) {
                            self.pulse.link(node, true);
                            self.hub.close(peer);
                        }
                    }
                }
            }
        }
    }

    async fn spawn(&mut self, myself: &ActorRef<Msg>, address: Address) {
        let Some(mut core) = self.materials.core(address) else { return };
        if self.wrong && matches!(address.actor, ActorId::Stage { .. }) {
            core.flip();
        }
        let args =
            worker::Args { address, core, node: myself.clone(), pool: self.pool.clone(), tally: Tally::default() };
        match Actor::spawn_linked(None, Worker, args, myself.get_cell()).await {
            Ok((actor, _)) => {
                self.lives.insert(actor.get_id(), address);
                self.workers.insert(address.actor, Running { incarnation: address.incarnation, actor });
            }
            Err(error) => self.report_failure(address, error.to_string()),
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
