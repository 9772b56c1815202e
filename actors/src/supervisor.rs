//! The core of the supervisor: who is in the job, where actors live, which steps are committed.
//!
//! Owns the table and the control log. Decides; the process around it syncs, sends and spawns.
//! - SU-1: an epoch or a commit is announced only after its record is synced (contract C2).
//! - SU-2: epochs and steps grow by one; an incarnation never goes back.
//! - SU-3: a node that was declared dead stays dead; what it says is answered by fencing it.
//! - SU-4: a step is committed only when every copy in sync of every shard is prepared, and each has
//!   counted every sample once (contracts C2, C3).
//! - SU-5: a shard without a copy in sync sends the whole job back to the newest checkpoint, with new
//!   lives for all; a step done again must give the fingerprint that was reported.
//! - SU-6: an actor whose node lives is moved only with a commit: nothing of a step is done again because a node came.

mod commit;
mod events;
mod membership;
mod placement;
mod record;
mod steps;
mod timeline;

use commit::CommitCore;
pub use events::{Happening, Report, SupervisorEffect, SupervisorEvent};
use membership::{Membership, Silent};
use placement::{Costs, Placement};
pub use record::{CommitRecord, Record};
pub use timeline::Phases;
use timeline::Timeline;

use crate::ids::{ActorId, Address, Incarnation, NodeId, SUPERVISOR_NODE, Step};
use crate::message::Body;
use crate::plant::Bug;
use crate::spec::{JobSpec, Layout};
use crate::table::{Entry, NodeInfo, Table};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Restarts of one actor within [`RESTART_WINDOW`] that are still taken for accidents.
pub(crate) const RESTARTS_MAX: usize = 5;
/// Dead nodes that are remembered to have spoken.
const FENCED_MAX: usize = 1024;
/// See [`RESTARTS_MAX`].
pub(crate) const RESTART_WINDOW: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub struct Supervisor {
    spec: Arc<JobSpec>,
    costs: Costs,
    nodes_wanted: usize,
    table: Table,
    membership: Membership,
    commit: CommitCore,
    /// The newest numbers of a committed step.
    last: Option<CommitRecord>,
    checkpoint: Step,
    next_node: u64,
    restarts: BTreeMap<ActorId, VecDeque<Duration>>,
    /// Effects that wait for the sync of the record before them.
    held: VecDeque<Vec<SupervisorEffect>>,
    /// Work of each node, and how much of it has been reported.
    work: BTreeMap<NodeId, (u64, u64)>,
    /// Fingerprints of steps that may be done again: they must match.
    reported: BTreeMap<Step, String>,
    /// Of failures after which no step has been committed yet.
    recovery: Option<Timeline>,
    /// A node came that may take over work at the next commit.
    uneven: bool,
    finished: bool,
    /// Dead nodes that spoke, the newest [`FENCED_MAX`].
    fenced: BTreeSet<NodeId>,
    plant: Option<Bug>,
}

impl Supervisor {
    /// A supervisor from its control log; an empty log is a new job. `checkpoint` is the step of the newest
    /// one that exists (0: none), `reported` are the fingerprints in metrics.jsonl. Gives the first effects too.
    pub fn new(
        spec: Arc<JobSpec>,
        nodes_wanted: usize,
        log: &[Record],
        checkpoint: Step,
        reported: BTreeMap<Step, String>,
        now: Duration,
        plant: Option<Bug>,
    ) -> (Self, Vec<SupervisorEffect>) {
        let layout = Layout::new(&spec);
        let mut s = Self {
            costs: Costs::new(&spec),
            commit: CommitCore::new(Arc::clone(&spec), layout),
            nodes_wanted,
            table: Table { primaries: vec![None; spec.shards as usize], ..Table::default() },
            membership: Membership::default(),
            last: None,
            checkpoint,
            next_node: 1,
            restarts: BTreeMap::new(),
            held: VecDeque::new(),
            work: BTreeMap::new(),
            reported,
            recovery: None,
            uneven: !log.is_empty(),
            finished: false,
            fenced: BTreeSet::new(),
            plant,
            spec,
        };
        for record in log {
            s.replay(record);
        }
        let restarted = !log.is_empty();
        let life = s.table.entries.get(&ActorId::Supervisor).map_or(Incarnation(1), |e| e.incarnation.next());
        for actor in [ActorId::Supervisor, ActorId::Keeper] {
            s.table.entries.insert(actor, Entry { node: SUPERVISOR_NODE, incarnation: life });
        }
        let nodes: Vec<NodeId> = s.table.nodes.keys().copied().collect();
        for node in nodes {
            s.membership.expect(now, node);
        }
        let unheard = if s.table.primaries.contains(&None) { BTreeSet::new() } else { s.placed_copies() };
        s.commit.restore(s.last.as_ref().map_or(s.table.base, |l| l.commit.step), unheard);
        if s.table.primaries.contains(&None) && s.table.base > s.checkpoint {
            // The checkpoint that reducers were to start from turned out to be damaged.
            s.roll_back("its checkpoint is not readable any more".to_owned());
        }
        let mut effects = s.publish(Vec::new());
        if restarted {
            s.failed(now, "the supervisor ended".to_owned(), Duration::ZERO);
            s.decided(now);
            let committed = s.commit.committed();
            effects.push(SupervisorEffect::Note(Happening::SupervisorRestarted { incarnation: life.0, committed }));
        }
        (s, effects)
    }

    fn placed_copies(&self) -> BTreeSet<(u32, u32)> {
        let copy = |(actor, entry): (&ActorId, &Entry)| match actor {
            ActorId::Reducer { shard, replica } if self.table.nodes.contains_key(&entry.node) => {
                Some((*shard, *replica))
            }
            _ => None,
        };
        self.table.entries.iter().filter_map(copy).collect()
    }

    /// The number of a job's last committed step.
    pub fn committed(&self) -> Step {
        self.commit.committed()
    }

    /// The present epoch.
    pub fn table(&self) -> &Table {
        &self.table
    }

    fn replay(&mut self, record: &Record) {
        match record {
            Record::Epoch { table, next_node } => {
                if table.primaries.iter().all(Option::is_none) {
                    // The job went back: what was committed after the checkpoint is to be done again.
                    self.last = None;
                }
                self.table = table.clone();
                self.next_node = *next_node;
            }
            Record::Commit(commit) => self.last = Some(*commit),
        }
    }

    /// The shortest log that says the same.
    pub fn compacted(log: &[Record]) -> Vec<Record> {
        let epoch = log.iter().rev().find(|r| matches!(r, Record::Epoch { .. }));
        // A commit before a way back is not one any more.
        let went_back =
            |r: &Record| matches!(r, Record::Epoch { table, .. } if table.primaries.iter().all(Option::is_none));
        let since = log.iter().rposition(went_back).map_or(0, |at| at + 1);
        let commit = log[since..].iter().rev().find(|r| matches!(r, Record::Commit(_)));
        epoch.into_iter().chain(commit).cloned().collect()
    }

    /// Takes an event and gives what is to be done.
    pub fn on(&mut self, now: Duration, event: SupervisorEvent) -> Vec<SupervisorEffect> {
        if self.finished && !matches!(event, SupervisorEvent::Synced) {
            return Vec::new();
        }
        let mut effects = match event {
            SupervisorEvent::Join(info) => self.join(now, info),
            SupervisorEvent::Return(node) => self.returned(now, node),
            SupervisorEvent::Heartbeat { node, work } => self.heartbeat(now, node, work),
            SupervisorEvent::Lost { node, why } => self.dead(now, &[(node, why, Duration::ZERO)]),
            SupervisorEvent::ActorFailed { address, reason } => self.actor_failed(now, address, reason),
            SupervisorEvent::Message { from, body } => self.message(now, from, body),
            SupervisorEvent::Checkpointed(step) => self.checkpointed(step),
            SupervisorEvent::Synced => {
                let held = self.held.pop_front().unwrap_or_default();
                self.synced(now, held)
            }
            SupervisorEvent::Tick => {
                let why = |s: &Silent| {
                    format!("silent for {} ms, {} are allowed it", s.silence.as_millis(), s.allowed.as_millis())
                };
                let silent: Vec<_> = self.membership.expired(now).iter().map(|s| (s.node, why(s), s.silence)).collect();
                if silent.is_empty() { Vec::new() } else { self.dead(now, &silent) }
            }
        };
        // A report may complete a step, and so may the death of the copy that it waited for.
        effects.extend(self.decide(now));
        effects
    }

    /// Logs a record; `then` follows its sync.
    fn log(&mut self, record: Record, then: Vec<SupervisorEffect>) -> Vec<SupervisorEffect> {
        let mut effects = vec![SupervisorEffect::Append(record)];
        if self.plant == Some(Bug::AcknowledgedBeforeSynced) {
            effects.extend(then);
            self.held.push_back(Vec::new());
        } else {
            self.held.push_back(then);
        }
        effects
    }

    /// Makes the changed table the next epoch; `first` goes out before it, after the sync.
    fn publish(&mut self, mut first: Vec<SupervisorEffect>) -> Vec<SupervisorEffect> {
        self.table.epoch += 1;
        let announce = SupervisorEffect::Announce(Arc::new(self.table.clone()));
        let record = Record::Epoch { table: self.table.clone(), next_node: self.next_node };
        first.push(announce);
        self.log(record, first)
    }

    fn join(&mut self, now: Duration, info: NodeInfo) -> Vec<SupervisorEffect> {
        let node = NodeId(self.next_node);
        self.next_node += 1;
        self.membership.expect(now, node);
        self.work.insert(node, (0, 0));
        self.table.nodes.insert(node, info.clone());
        let note = Happening::NodeJoined { node: node.0, address: info.address.clone() };
        let mut effects = vec![SupervisorEffect::Note(note)];
        // What has no place gets one now.
        self.place(false);
        self.uneven = true;
        effects.extend(self.settle(vec![SupervisorEffect::Welcome(node, info)]));
        effects
    }

    fn returned(&mut self, now: Duration, node: NodeId) -> Vec<SupervisorEffect> {
        if !self.table.nodes.contains_key(&node) {
            return self.fence(node);
        }
        self.membership.expect(now, node);
        let mut then = vec![SupervisorEffect::Announce(Arc::new(self.table.clone()))];
        // The commit may have been logged and never sent.
        if let Some(last) = self.last {
            then.extend(self.reducers().map(|to| SupervisorEffect::Send(to, Body::Commit(last.commit))));
        }
        let mut effects = vec![SupervisorEffect::Note(Happening::NodeReturned { node: node.0 })];
        effects.extend(self.after_sync(then));
        effects
    }

    /// Effects that must not overtake the records before them.
    fn after_sync(&mut self, then: Vec<SupervisorEffect>) -> Vec<SupervisorEffect> {
        match self.held.back_mut() {
            Some(last) => {
                last.extend(then);
                Vec::new()
            }
            None => then,
        }
    }

    fn reducers(&self) -> impl Iterator<Item = ActorId> {
        (0..self.spec.shards).flat_map(|shard| self.table.replicas(shard).collect::<Vec<_>>())
    }

    /// A dead node speaks: it is told, and people are told once.
    fn fence(&mut self, node: NodeId) -> Vec<SupervisorEffect> {
        let mut effects = vec![SupervisorEffect::Fence(node)];
        if self.fenced.insert(node) {
            effects.push(SupervisorEffect::Note(Happening::NodeFenced { node: node.0 }));
        }
        if self.fenced.len() > FENCED_MAX {
            self.fenced.pop_first();
        }
        effects
    }

    fn heartbeat(&mut self, now: Duration, node: NodeId, work: u64) -> Vec<SupervisorEffect> {
        if !self.table.nodes.contains_key(&node) {
            return self.fence(node);
        }
        self.membership.beat(now, node);
        // What a node had done before this life of the supervisor has been reported by an earlier one.
        self.work.entry(node).or_insert((work, work)).0 = work;
        Vec::new()
    }

    /// Places what has no place. With `level`, evens out what may be moved too (at first there is nothing else).
    /// Gives the actors that were moved.
    fn place(&mut self, level: bool) -> Vec<ActorId> {
        let started = self.table.entries.len() > 2;
        let level = level || !started;
        if self.table.nodes.is_empty() || (!started && self.table.nodes.len() < self.nodes_wanted) {
            return Vec::new();
        }
        let nodes: Vec<NodeId> = self.table.nodes.keys().copied().collect();
        let present = self.table.entries.iter().filter(|(a, _)| !matches!(a, ActorId::Supervisor | ActorId::Keeper));
        let present: BTreeMap<ActorId, NodeId> = present.map(|(a, e)| (*a, e.node)).collect();
        let wanted = Placement::new(&self.spec, &self.costs, &nodes).place(&present, level);
        let mut moved = Vec::new();
        for (actor, node) in wanted {
            let life = self.table.entries.get(&actor).copied();
            if life.is_none_or(|e| e.node != node) {
                let incarnation = life.map_or(Incarnation(1), |e| e.incarnation.next());
                self.table.entries.insert(actor, Entry { node, incarnation });
                self.commit.out_of_sync(actor);
                moved.push(actor);
            }
        }
        moved
    }

    fn dead(&mut self, now: Duration, lost: &[(NodeId, String, Duration)]) -> Vec<SupervisorEffect> {
        let mut effects = Vec::new();
        let mut any = false;
        for (node, why, silence) in lost {
            if self.table.nodes.remove(node).is_none() {
                continue;
            }
            any = true;
            self.failed(now, format!("{node}: {why}"), *silence);
            self.membership.forget(*node);
            self.work.remove(node);
            let note = Happening::NodeDead { node: node.0, why: why.clone(), epoch: self.table.epoch + 1 };
            effects.push(SupervisorEffect::Note(note));
        }
        if !any {
            return effects;
        }
        effects.extend(self.replace_homeless());
        self.decided(now);
        effects
    }

    /// Gives every actor whose node is gone a new life, and every shard a primary that is in sync.
    fn replace_homeless(&mut self) -> Vec<SupervisorEffect> {
        let homeless = |t: &Table, e: &Entry| e.node != SUPERVISOR_NODE && !t.nodes.contains_key(&e.node);
        let lost: Vec<ActorId> =
            self.table.entries.iter().filter(|(_, e)| homeless(&self.table, e)).map(|(a, _)| *a).collect();
        for actor in &lost {
            self.commit.out_of_sync(*actor);
        }
        // Without a node they keep their last entry, and get a new life with the first one that joins.
        let moved = self.place(false);
        let mut effects = self.settle(Vec::new());
        let note = if self.table.nodes.is_empty() {
            Happening::Waiting { why: "no node is left".to_owned() }
        } else {
            let actors = moved.iter().map(ToString::to_string).collect();
            Happening::Moved { epoch: self.table.epoch, actors }
        };
        effects.push(SupervisorEffect::Note(note));
        effects
    }

    /// Whether a shard's primary has no state, and a copy is known that has. At the start of a job, and
    /// after a way back, all shards get their first primaries together.
    fn can_elect(&self) -> bool {
        let unfit = |(shard, primary): (usize, &Option<u32>)| match primary {
            Some(replica) => !self.commit.in_sync(shard as u32, *replica) && self.commit.has_copy(shard as u32),
            None => self.commit.all_in_sync(),
        };
        self.table.primaries.iter().enumerate().any(unfit)
    }

    /// Publishes the changed table, with primaries that are in sync or everybody back at the checkpoint.
    fn settle(&mut self, first: Vec<SupervisorEffect>) -> Vec<SupervisorEffect> {
        let note = self.elect();
        let mut effects = self.publish(first);
        effects.extend(note.map(SupervisorEffect::Note));
        effects
    }

    /// Gives each shard a primary that is in sync. A shard that lost all its copies sends the job back.
    fn elect(&mut self) -> Option<Happening> {
        for shard in 0..self.spec.shards {
            let at = shard as usize;
            let in_sync = |r: u32| self.commit.in_sync(shard, r);
            let present = self.table.primaries[at];
            if present.is_some_and(in_sync) {
                continue;
            }
            let heir = (0..=self.spec.mirrors).find(|r| in_sync(*r));
            if present.is_some() && heir.is_none() && !self.commit.unheard(shard) {
                return Some(self.roll_back(format!("shard {shard} lost all its copies")));
            }
            // First primaries come together, so that "none" always means: nobody has trained on this state.
            if heir.is_some() && (present.is_some() || self.commit.all_in_sync()) {
                self.table.primaries[at] = heir;
            }
        }
        None
    }

    /// Everybody gets a new life at the newest checkpoint.
    fn roll_back(&mut self, why: String) -> Happening {
        let to_step = self.checkpoint;
        self.table.base = to_step;
        self.table.primaries.fill(None);
        for (actor, entry) in &mut self.table.entries {
            if !matches!(actor, ActorId::Supervisor | ActorId::Keeper) {
                entry.incarnation = entry.incarnation.next();
            }
        }
        self.place(true);
        self.last = None;
        // A commit whose record is not synced yet is not announced any more: the job is before it now.
        for held in &mut self.held {
            held.retain(|effect| !matches!(effect, SupervisorEffect::Send(..)));
        }
        self.commit.restore(to_step, BTreeSet::new());
        Happening::RolledBack { to_step, epoch: self.table.epoch + 1, why }
    }

    fn actor_failed(&mut self, now: Duration, address: Address, reason: String) -> Vec<SupervisorEffect> {
        if self.table.address(address.actor) != Some(address) {
            return Vec::new();
        }
        let times = self.restarts.entry(address.actor).or_default();
        times.retain(|at| now.saturating_sub(*at) < RESTART_WINDOW);
        times.push_back(now);
        if times.len() > RESTARTS_MAX {
            let why = format!(
                "{} failed {} times within {} s; last: {reason}",
                address.actor,
                times.len(),
                RESTART_WINDOW.as_secs()
            );
            return self.finish(Err(why));
        }
        self.failed(now, format!("{}: {reason}", address.actor), Duration::ZERO);
        if let Some(entry) = self.table.entries.get_mut(&address.actor) {
            entry.incarnation = entry.incarnation.next();
        }
        self.commit.out_of_sync(address.actor);
        let mut effects = self.settle(Vec::new());
        self.decided(now);
        effects.push(SupervisorEffect::Note(Happening::ActorFailed {
            actor: address.actor.to_string(),
            incarnation: address.incarnation.0,
            reason,
            epoch: self.table.epoch,
        }));
        effects
    }

    fn finish(&mut self, result: Result<(), String>) -> Vec<SupervisorEffect> {
        self.finished = true;
        vec![SupervisorEffect::Finish(result)]
    }

    /// Which copies the next commit waits for, for operators.
    pub fn describe(&self) -> String {
        format!(
            "epoch {}, {} nodes, step {} committed, checkpoint of step {}; {}",
            self.table.epoch,
            self.table.nodes.len(),
            self.committed(),
            self.checkpoint,
            self.commit.describe()
        )
    }
}

#[cfg(test)]
mod tests;
