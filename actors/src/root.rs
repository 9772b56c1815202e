//! The pure half of the supervisor's process: supervisor, keeper and router as one.

use crate::control::Control;
use crate::effect::Event;
use crate::ids::{ActorId, Address, NodeId, SUPERVISOR_NODE, Step};
use crate::keeper::{KeeperCore, KeeperEffect, KeeperEvent};
use crate::message::{Body, Envelope};
use crate::router::{Action, Router};
use crate::storing::{Read, Write};
use crate::supervisor::{Happening, Record, Report, Supervisor, SupervisorEffect, SupervisorEvent};
use everstep_kernels::Tensor;
use std::collections::BTreeMap;
use std::time::Duration;

/// What the process is told.
#[derive(Debug)]
pub(crate) enum RootEvent {
    /// For the supervisor.
    Supervisor(SupervisorEvent),
    /// For the keeper.
    Keeper(KeeperEvent),
    /// The store was read for the first time: what [`SupervisorEvent::Found`] says.
    Found { newest: Result<Step, String>, reported: BTreeMap<Step, String> },
    /// Messages from a node.
    Arrived(Vec<Envelope>),
}

/// What the process is to do.
#[derive(Debug)]
pub(crate) enum RootEffect {
    /// Append to the control log and sync; answer with `Synced`.
    Append(Record),
    /// Say to a node.
    Tell(NodeId, Control),
    /// Say the same to all of these.
    TellAll(Vec<NodeId>, Control),
    /// Send messages to a node.
    Transmit(NodeId, Vec<Envelope>),
    /// Nodes left the job.
    Forget(Vec<NodeId>),
    /// A line of metrics.jsonl.
    Report(Report),
    /// A line of events.jsonl.
    Note(Happening),
    /// Write to the store of checkpoints; answer with what it gives.
    Write(Write),
    /// Read from it; the same.
    Read(Read),
    /// The job is over.
    Finish(Result<(), String>),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Root {
    /// Decides.
    pub supervisor: Supervisor,
    keeper: KeeperCore,
    router: Router,
}

impl Root {
    /// From a supervisor and its first effects.
    pub(crate) fn new(
        supervisor: Supervisor,
        first: Vec<SupervisorEffect>,
        keeper: KeeperCore,
    ) -> (Self, Vec<RootEffect>) {
        let mut router = Router::new();
        router.welcome(SUPERVISOR_NODE);
        let mut root = Self { supervisor, keeper, router };
        let effects = root.supervised(Duration::ZERO, first);
        (root, effects)
    }

    /// Takes an event and gives what is to be done.
    pub(crate) fn on(&mut self, now: Duration, event: RootEvent) -> Vec<RootEffect> {
        match event {
            RootEvent::Supervisor(event) => self.tell_supervisor(now, event),
            RootEvent::Keeper(event) => {
                let effects = self.keeper.on(event);
                self.kept(now, effects)
            }
            RootEvent::Found { newest, reported } => {
                let effects = self.keeper.on(KeeperEvent::Found(newest.clone()));
                let mut out = self.kept(now, effects);
                out.extend(self.tell_supervisor(now, SupervisorEvent::Found { newest, reported }));
                out
            }
            RootEvent::Arrived(bundle) => {
                let actions = self.router.arrive(bundle);
                self.routed(now, actions)
            }
        }
    }

    fn tell_supervisor(&mut self, now: Duration, event: SupervisorEvent) -> Vec<RootEffect> {
        let effects = self.supervisor.on(now, event);
        self.supervised(now, effects)
    }

    fn supervised(&mut self, now: Duration, effects: Vec<SupervisorEffect>) -> Vec<RootEffect> {
        let mut out = Vec::new();
        let (mut messages, mut verified) = (Vec::new(), Vec::new());
        for effect in effects {
            match effect {
                SupervisorEffect::Append(record) => out.push(RootEffect::Append(record)),
                SupervisorEffect::Announce(table) => {
                    let nodes = table.nodes.keys().copied().collect();
                    out.push(RootEffect::TellAll(nodes, Control::Table(table.clone())));
                    let actions = self.router.on_table(table.clone());
                    out.extend(self.routed(now, actions));
                }
                SupervisorEffect::Welcome(node, _) => {
                    out.push(RootEffect::Tell(node, Control::Welcome { node }));
                }
                SupervisorEffect::Release(node) => out.push(RootEffect::Tell(node, Control::Leave { node })),
                SupervisorEffect::Fence(node) => out.push(RootEffect::Tell(node, Control::Fence)),
                SupervisorEffect::Send(to, body) => messages.push((ActorId::Supervisor, to, body)),
                SupervisorEffect::Verified(step, fingerprint) => {
                    verified.push(KeeperEvent::Verified(step, fingerprint))
                }
                SupervisorEffect::Report(report) => out.push(RootEffect::Report(report)),
                SupervisorEffect::Note(happening) => out.push(RootEffect::Note(happening)),
                SupervisorEffect::Finish(result) => out.push(RootEffect::Finish(result)),
            }
        }
        out.extend(self.send(now, messages));
        // What the keeper says to it may be decided upon: records of that come after those of before.
        for event in verified {
            let effects = self.keeper.on(event);
            out.extend(self.kept(now, effects));
        }
        out
    }

    fn kept(&mut self, now: Duration, effects: Vec<KeeperEffect>) -> Vec<RootEffect> {
        let mut out = Vec::new();
        for effect in effects {
            match effect {
                KeeperEffect::Write(write) => out.push(RootEffect::Write(write)),
                KeeperEffect::Read(read) => out.push(RootEffect::Read(read)),
                KeeperEffect::Send(to, body) => out.extend(self.send(now, vec![(ActorId::Keeper, to, body)])),
                KeeperEffect::Checkpointed(step) => {
                    out.extend(self.tell_supervisor(now, SupervisorEvent::Checkpointed(step)))
                }
                KeeperEffect::Damaged(why) => {
                    out.extend(self.tell_supervisor(now, SupervisorEvent::SnapshotDamaged(why)))
                }
            }
        }
        out
    }

    fn send(&mut self, now: Duration, messages: Vec<(ActorId, ActorId, Body<Tensor>)>) -> Vec<RootEffect> {
        let table = self.supervisor.table();
        let [supervisor, keeper] = [ActorId::Supervisor, ActorId::Keeper].map(|actor| table.address(actor));
        let address = |from| if from == ActorId::Supervisor { supervisor } else { keeper };
        let stamped: Vec<(Address, ActorId, Body<Tensor>)> =
            messages.into_iter().filter_map(|(from, to, body)| Some((address(from)?, to, body))).collect();
        let actions = self.router.send(stamped);
        self.routed(now, actions)
    }

    fn routed(&mut self, now: Duration, actions: Vec<Action>) -> Vec<RootEffect> {
        let mut out = Vec::new();
        for action in actions {
            match action {
                Action::Transmit(node, bundle) => out.push(RootEffect::Transmit(node, bundle)),
                Action::Forget(nodes) => out.push(RootEffect::Forget(nodes)),
                Action::Deliver(ActorId::Supervisor, Event::Message { from, body }) => {
                    out.extend(self.tell_supervisor(now, SupervisorEvent::Message { from, body }));
                }
                Action::Deliver(ActorId::Keeper, event) => {
                    let event = match event {
                        Event::Table(table) => KeeperEvent::Table(table),
                        Event::Message { from, body } => KeeperEvent::Message { from, body },
                        Event::Local { .. } | Event::Computed(_) => continue,
                    };
                    let effects = self.keeper.on(event);
                    out.extend(self.kept(now, effects));
                }
                Action::Deliver(..) | Action::Spawn(_) | Action::Stop(_) => {}
            }
        }
        out
    }

    /// The router, for operators and the simulator's checks.
    pub(crate) fn router(&self) -> &Router {
        &self.router
    }
}
