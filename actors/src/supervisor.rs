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
//! - SU-6: an actor whose node lives is moved only with a commit (nothing of a step is done again because a node came),
//!   by an audit, because it fails again and again where it is, or because it is in the way of one that has no room.
//! - SU-7: a node gets its first actors when a beat of it says that it reaches all that have had theirs.
//! - SU-8: damaged checkpoints end a job only if nobody holds its state any more.
//! - SU-9: a job goes on before its store of checkpoints is read; what would send it back waits until that is known to which step.

mod audit;
mod back;
mod commit;
mod copies;
mod events;
mod leave;
mod links;
mod lives;
mod membership;
mod nodes;
mod outlook;
mod placement;
mod record;
mod speed;
mod steps;
mod timeline;

use audit::Audit;
use back::Back;
use commit::CommitCore;
pub use events::{Happening, Report, SupervisorEffect, SupervisorEvent};
use links::Links;
use lives::Wait;
use membership::{Membership, Silent};
pub use outlook::{Limit, Outlook};
pub(crate) use record::RECORDS_MAX;
pub use record::{CommitRecord, Record};
use record::{last_commit, pending, unfinished};
use speed::Speeds;
use steps::compared;
pub use timeline::Phases;
use timeline::Timeline;

use crate::costs::Costs;
use crate::ids::{ActorId, Incarnation, NodeId, SUPERVISOR_NODE, Step};
use crate::plant::{Bug, planted};
use crate::spec::{JobSpec, Layout};
use crate::table::{Entry, Table};
use crate::tally::Operations;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Restarts of one actor within [`RESTART_WINDOW`] that are still taken for accidents.
pub(crate) const RESTARTS_MAX: usize = 5;
/// Times that copies may differ within [`CORRUPTION_WINDOW`].
const CORRUPTIONS_MAX: usize = 5;
/// See [`CORRUPTIONS_MAX`].
const CORRUPTION_WINDOW: Duration = Duration::from_secs(3600);
/// See [`RESTARTS_MAX`].
pub(crate) const RESTART_WINDOW: Duration = Duration::from_secs(60);

/// How many nodes a job has.
#[derive(Debug, Clone, Copy)]
pub struct Nodes {
    /// It begins with so many.
    pub wanted: usize,
    /// So many of those beyond are held ready without actors.
    pub spares: usize,
    /// Slow ones are given less to do.
    pub relieve: bool,
}

/// Counts one more within a window of time.
fn count_within(times: &mut VecDeque<Duration>, now: Duration, window: Duration) -> usize {
    times.retain(|at| now.saturating_sub(*at) < window);
    times.push_back(now);
    times.len()
}

/// See the module.
#[derive(Debug)]
pub struct Supervisor {
    spec: Arc<JobSpec>,
    costs: Costs,
    nodes_wanted: usize,
    /// Nodes beyond those that are held ready without actors.
    spares: usize,
    /// Slow nodes are given less to do.
    relieve: bool,
    table: Table,
    membership: Membership,
    speeds: Speeds,
    links: Links,
    commit: CommitCore,
    /// The newest numbers of a committed step.
    last: Option<CommitRecord>,
    /// The step of the newest checkpoint (0: there is none), once that is known.
    checkpoint: Option<Step>,
    /// Why none of the checkpoints that exist can be read, if that is so.
    unreadable: Option<String>,
    /// What sends the job back once that is known (SU-9), and whether the log has it.
    back: Option<(Back, bool)>,
    /// A link is there again, since copies were last placed that a thin step waits for.
    healed: bool,
    /// In how many domains the next step would be safe, if it waits only for more (CO-6).
    thin: Option<u32>,
    next_node: u64,
    restarts: BTreeMap<ActorId, VecDeque<Duration>>,
    /// Actors that failed again and again and got another node for it: where that was, and when.
    moved_away: BTreeMap<ActorId, (NodeId, Duration)>,
    /// Effects that wait for the sync of the record before them.
    held: VecDeque<Vec<SupervisorEffect>>,
    /// What each node has computed, and how much of it has been reported.
    work: BTreeMap<NodeId, [Operations; 2]>,
    /// Fingerprints of steps that may be done again: they must match.
    reported: BTreeMap<Step, String>,
    /// What earlier lives reported of steps after this one stands for nothing.
    doubted: Option<Step>,
    /// Of failures after which no step has been committed yet.
    recovery: Option<Timeline>,
    /// Nodes that have reached those before them (SU-7).
    admitted: BTreeSet<NodeId>,
    /// A node came that may take over work at the next commit.
    uneven: bool,
    /// Actors that have no room on any node.
    no_room: Option<Wait>,
    /// What operators were last told that the job waits for.
    told_wait: Option<Wait>,
    /// When this life began.
    began: Duration,
    /// When copies of a shard differed, lately.
    corruptions: VecDeque<Duration>,
    /// Of the next step, once it could be committed.
    audit: Option<Audit>,
    finished: bool,
    /// Dead nodes that spoke, the newest of them.
    fenced: BTreeSet<NodeId>,
    /// Nodes that were let go, as many.
    released: BTreeSet<NodeId>,
    /// The time of the event that is handled.
    now: Duration,
}

impl Supervisor {
    /// A supervisor from its control log; an empty log is a new job. `reported` are the fingerprints in metrics.jsonl from the step
    /// on that the job of the log has reached. What is in the store of checkpoints it is told ([`SupervisorEvent::Found`]). Gives
    /// the first effects too.
    pub fn new(
        spec: Arc<JobSpec>,
        nodes: Nodes,
        log: &[Record],
        reported: BTreeMap<Step, String>,
        now: Duration,
    ) -> (Self, Vec<SupervisorEffect>) {
        let mut s = Self::without_log(spec, nodes, reported, now);
        s.uneven = !log.is_empty();
        s.replay(log);
        let life = s.table.entries.get(&ActorId::Supervisor).map_or(Incarnation(1), |e| e.incarnation.next());
        for actor in [ActorId::Supervisor, ActorId::Keeper] {
            s.table.entries.insert(actor, Entry { node: SUPERVISOR_NODE, incarnation: life });
        }
        let nodes: Vec<NodeId> = s.table.nodes.keys().copied().collect();
        for node in nodes {
            s.membership.expect(now, node);
            // One without actors is to say again that it reaches the others.
            if s.table.actors_of(node).next().is_some() {
                s.admitted.insert(node);
            }
        }
        let unheard = if s.table.goes_back() { BTreeSet::new() } else { s.placed_copies() };
        s.commit.restore(s.last.as_ref().map_or(s.table.base, |l| l.commit.step), unheard);
        let restarted = !log.is_empty();
        if restarted {
            s.failed("the supervisor ended".to_owned(), Duration::ZERO);
        }
        if let Some(why) = pending(log) {
            s.roll_back(why);
        }
        let mut effects = s.publish(Vec::new());
        effects.extend(s.log_back());
        effects.extend(compared(&s.reported));
        if restarted {
            let restarted = Happening::SupervisorRestarted { incarnation: life.0, committed: s.commit.committed() };
            effects.push(SupervisorEffect::Note(restarted));
        }
        (s, effects)
    }

    fn without_log(spec: Arc<JobSpec>, nodes: Nodes, reported: BTreeMap<Step, String>, now: Duration) -> Self {
        let layout = Layout::new(&spec);
        Self {
            costs: Costs::new(&spec),
            commit: CommitCore::new(Arc::clone(&spec), layout),
            nodes_wanted: nodes.wanted,
            spares: nodes.spares,
            relieve: nodes.relieve,
            table: Table {
                primaries: vec![None; spec.shards as usize],
                copies: vec![0; spec.shards as usize],
                ..Table::default()
            },
            membership: Membership::default(),
            speeds: Speeds::default(),
            links: Links::default(),
            last: None,
            checkpoint: None,
            unreadable: None,
            back: None,
            healed: false,
            thin: None,
            next_node: 1,
            restarts: BTreeMap::new(),
            moved_away: BTreeMap::new(),
            held: VecDeque::new(),
            work: BTreeMap::new(),
            reported,
            doubted: None,
            recovery: None,
            admitted: BTreeSet::new(),
            uneven: false,
            no_room: None,
            told_wait: None,
            began: now,
            corruptions: VecDeque::new(),
            audit: None,
            finished: false,
            fenced: BTreeSet::new(),
            released: BTreeSet::new(),
            now,
            spec,
        }
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

    fn replay(&mut self, log: &[Record]) {
        let epoch = log.iter().rev().find_map(|r| match r {
            Record::Epoch { table, next_node } => Some((table, next_node)),
            // Settled by what follows, or not.
            Record::Commit(_) | Record::Doubt(_) | Record::Audit { .. } | Record::Back(_) => None,
        });
        if let Some((table, next_node)) = epoch {
            (self.table, self.next_node) = (table.clone(), *next_node);
        }
        if let Some(Record::Commit(commit)) = last_commit(log).filter(|_| !planted(Bug::LastCommitOverlooked)) {
            self.last = Some(*commit);
        }
        if let Some(after) = Record::doubted(log) {
            self.doubt(after);
        }
        if let Some(Record::Audit { step, actor, made }) = unfinished(log) {
            self.go_on_with_audit(*step, *actor, made.clone());
        }
    }

    /// What was reported of steps after this one stands for nothing: they are reported again as they are done again.
    fn doubt(&mut self, after: Step) {
        self.doubted = Some(after);
        self.reported.retain(|step, _| *step <= after);
    }

    /// Takes an event and gives what is to be done.
    pub fn on(&mut self, now: Duration, event: SupervisorEvent) -> Vec<SupervisorEffect> {
        if self.finished && !matches!(event, SupervisorEvent::Synced) {
            return Vec::new();
        }
        self.now = now;
        let mut effects = match event {
            SupervisorEvent::Join(info) => self.join(info),
            SupervisorEvent::Return(node) => self.returned(node),
            SupervisorEvent::Heartbeat { node, operations, rates, down } => {
                if self.table.nodes.contains_key(&node) {
                    self.speeds.beat(node, rates);
                }
                self.heartbeat(node, operations, &down)
            }
            SupervisorEvent::Lost { node, why } => self.dead(&[(node, why, Duration::ZERO)]),
            SupervisorEvent::Leave(node) => self.leave(node),
            SupervisorEvent::ActorFailed { address, reason } => self.actor_failed(address, reason),
            SupervisorEvent::Message { from, body } => self.message(from, body),
            SupervisorEvent::Found { newest, reported } => self.found(newest, reported),
            SupervisorEvent::Checkpointed(step) => self.checkpointed(step),
            // It goes back already.
            SupervisorEvent::SnapshotDamaged(_) if self.table.goes_back() => Vec::new(),
            SupervisorEvent::SnapshotDamaged(why) => self.corrupt(why, false),
            SupervisorEvent::Synced => {
                let held = self.held.pop_front().unwrap_or_default();
                self.synced(held)
            }
            SupervisorEvent::Tick => {
                let why = |s: &Silent| {
                    format!("silent for {} ms, {} are allowed it", s.silence.as_millis(), s.allowed.as_millis())
                };
                let silent: Vec<_> = self.membership.expired(now).iter().map(|s| (s.node, why(s), s.silence)).collect();
                let none = silent.is_empty() || planted(Bug::SilenceOverlooked);
                let mut effects = if none { Vec::new() } else { self.dead(&silent) };
                effects.extend(self.cut());
                effects.extend(self.compare_speeds());
                effects.extend(self.thicken());
                effects
            }
        };
        // A report may complete a step, and so may the death of the copy that it waited for.
        effects.extend(self.decide());
        effects.extend(self.log_back());
        effects.extend(self.tell_wait());
        effects
    }

    /// Logs a record; `then` follows its sync.
    fn log(&mut self, record: Record, then: Vec<SupervisorEffect>) -> Vec<SupervisorEffect> {
        let mut effects = vec![SupervisorEffect::Append(record)];
        if planted(Bug::AcknowledgedBeforeSynced) {
            effects.extend(then);
            self.held.push_back(Vec::new());
        } else {
            self.held.push_back(then);
        }
        effects
    }

    /// Makes the changed table the next epoch; `first` goes out before it, after the sync. A job that would begin from what
    /// cannot be read ends (SU-8).
    fn publish(&mut self, mut first: Vec<SupervisorEffect>) -> Vec<SupervisorEffect> {
        if let Some(why) = self.unreadable.clone().filter(|_| self.table.goes_back()) {
            return self.finish(Err(why));
        }
        self.table.epoch += 1;
        if let Some(recovery) = &mut self.recovery {
            recovery.decided(self.now, &self.table);
        }
        let announce = SupervisorEffect::Announce(Arc::new(self.table.clone()));
        let record = Record::Epoch { table: self.table.clone(), next_node: self.next_node };
        first.push(announce);
        self.log(record, first)
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

    fn finish(&mut self, result: Result<(), String>) -> Vec<SupervisorEffect> {
        self.finished = true;
        vec![SupervisorEffect::Finish(result)]
    }

    /// Which copies the next commit waits for, for operators.
    pub fn describe(&self) -> String {
        let waits: String = self
            .waits()
            .map(|w| self.words_of(w))
            .into_iter()
            .chain(self.links.describe())
            .map(|why| format!("; {why}"))
            .collect();
        format!(
            "epoch {}, {} nodes, step {} committed, {}; {}{waits}",
            self.table.epoch,
            self.table.nodes.len(),
            self.committed(),
            self.checkpoint.map_or("its store is not read yet".to_owned(), |step| format!("checkpoint of step {step}")),
            self.commit.describe()
        )
    }
}

#[cfg(test)]
mod tests;
