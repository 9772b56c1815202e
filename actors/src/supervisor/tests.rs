//! The promises of the supervisor and of the commit, one by one.

use super::*;
use crate::message::{Body, Commit, Corruption};
use crate::rates::Rates;
use crate::testing::{address, committed, info, materials};
use everstep_kernels::Tensor;

const NOW: Duration = Duration::from_secs(1);
const NODES: Nodes = Nodes { wanted: 2, spares: 0, relieve: false };

/// The store was read, and there are no metrics.
fn read_as(newest: Result<Step, String>) -> SupervisorEvent {
    SupervisorEvent::Found { newest, reported: BTreeMap::new() }
}

/// A supervisor whose records are synced at once, and all that it asked for.
struct Job {
    supervisor: Supervisor,
    log: Vec<Record>,
    asked: Vec<SupervisorEffect>,
    now: Duration,
}

impl Job {
    fn from_log(log: Vec<Record>) -> Self {
        let mut job = Self::unread(log);
        job.on(read_as(Ok(0)));
        job
    }

    /// Its store of checkpoints is not read yet.
    fn unread(log: Vec<Record>) -> Self {
        Self::of(materials().spec, NODES, log)
    }

    fn of(spec: Arc<JobSpec>, nodes: Nodes, log: Vec<Record>) -> Self {
        let (supervisor, first) = Supervisor::new(spec, nodes, &log, BTreeMap::new(), Duration::ZERO);
        let mut job = Self { supervisor, log, asked: Vec::new(), now: NOW };
        job.take(first);
        job
    }

    fn take(&mut self, effects: Vec<SupervisorEffect>) {
        for effect in effects {
            if let SupervisorEffect::Append(record) = effect {
                self.log.push(record);
                let effects = self.supervisor.on(self.now, SupervisorEvent::Synced);
                self.take(effects);
            } else {
                self.asked.push(effect);
            }
        }
    }

    fn on(&mut self, event: SupervisorEvent) -> Vec<SupervisorEffect> {
        self.asked.clear();
        let effects = self.supervisor.on(self.now, event);
        self.take(effects);
        std::mem::take(&mut self.asked)
    }

    /// A node comes, and says that it reaches the others.
    fn join(&mut self, peer: u64) -> Vec<SupervisorEffect> {
        let mut effects = self.on(SupervisorEvent::Join(info(peer)));
        let node = *self.supervisor.table().nodes.keys().last().unwrap();
        effects.extend(self.on(beat(node.0, &[])));
        effects
    }

    fn say(&mut self, shard: u32, replica: u32, body: Body<Tensor>) -> Vec<SupervisorEffect> {
        let actor = ActorId::Reducer { shard, replica };
        let from = self.supervisor.table().address(actor).unwrap();
        self.on(SupervisorEvent::Message { from, body })
    }

    fn everybody(&mut self, body: impl Fn(u32) -> Body<Tensor>) -> Vec<SupervisorEffect> {
        let mut all = Vec::new();
        for (shard, replica) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            all.extend(self.say(shard, replica, body(shard)));
        }
        all
    }
}

fn sums(shard: u32, value: u128) -> Vec<(u32, u128)> {
    materials().layout.of_shard(shard).into_iter().map(|n| (n, value)).collect()
}

fn applied(step: Step) -> impl Fn(u32) -> Body<Tensor> {
    move |shard| Body::Applied { step, sums: sums(shard, u128::from(step)) }
}

fn prepared(step: Step, samples: u64) -> impl Fn(u32) -> Body<Tensor> {
    move |shard| Body::Prepared {
        step,
        norm: vec![(shard, vec![0.25])],
        losses: (shard == 0).then_some([8.0, 0.0]),
        samples,
        digest: Some(u128::from(shard)),
    }
}

fn commits(effects: &[SupervisorEffect]) -> Vec<Commit> {
    let commit =
        |e: &SupervisorEffect| if let SupervisorEffect::Send(_, Body::Commit(c)) = e { Some(*c) } else { None };
    effects.iter().filter_map(commit).collect()
}

fn failure(effects: &[SupervisorEffect]) -> Option<String> {
    effects.iter().find_map(|e| if let SupervisorEffect::Finish(Err(why)) = e { Some(why.clone()) } else { None })
}

/// Two nodes, all copies with the initial state.
fn started() -> Job {
    begun(Job::from_log(Vec::new()))
}

fn begun(mut job: Job) -> Job {
    job.join(1);
    job.join(2);
    job.everybody(applied(0));
    job
}

/// SU-1: a commit goes out after its record is synced, not before.
#[test]
fn nothing_is_announced_before_it_is_synced() {
    let mut job = started();
    for (shard, replica) in [(0, 0), (0, 1), (1, 0)] {
        assert!(commits(&job.say(shard, replica, prepared(1, 4)(shard))).is_empty());
    }
    let from = job.supervisor.table().address(ActorId::Reducer { shard: 1, replica: 1 }).unwrap();
    let effects = job.supervisor.on(NOW, SupervisorEvent::Message { from, body: prepared(1, 4)(1) });
    assert!(matches!(effects[..], [SupervisorEffect::Append(Record::Commit(_))]), "{effects:?}");
    assert_eq!(commits(&job.supervisor.on(NOW, SupervisorEvent::Synced)).len(), 4);
}

/// SU-2: epochs grow by one, lives never go back, also over a restart from the log.
#[test]
fn epochs_and_lives_only_grow() {
    let mut job = started();
    let before = job.supervisor.table().clone();
    job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
    let epochs: Vec<u64> = job
        .log
        .iter()
        .filter_map(|r| if let Record::Epoch { table, .. } = r { Some(table.epoch) } else { None })
        .collect();
    assert!(epochs.windows(2).all(|w| w[1] == w[0] + 1), "{epochs:?}");
    let next = Job::from_log(job.log.clone());
    for (actor, entry) in &before.entries {
        assert!(next.supervisor.table().entries[actor].incarnation >= entry.incarnation, "{actor}");
    }
    assert_eq!(next.supervisor.table().entries[&ActorId::Supervisor].incarnation, Incarnation(2));
}

/// A shorter log says the same, also after a way back.
#[test]
fn a_compacted_log_says_the_same() {
    let mut job = started();
    job.everybody(prepared(1, 4));
    job.everybody(applied(1));
    for _ in 0..2 {
        let whole = Job::from_log(job.log.clone());
        let short = Job::from_log(Record::compacted(&job.log));
        assert_eq!(short.supervisor.table(), whole.supervisor.table());
        assert_eq!(short.supervisor.committed(), whole.supervisor.committed());
        // The second time all is lost, and step 1 is to be done again.
        job.on(SupervisorEvent::Lost { node: NodeId(1), why: "test".to_owned() });
        job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
    }
    assert_eq!(job.supervisor.committed(), 0);
}

/// SU-3: a node that was declared dead is fenced whatever it says.
#[test]
fn the_dead_stay_dead() {
    let mut job = started();
    job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
    for event in [
        SupervisorEvent::Heartbeat {
            node: NodeId(2),
            operations: Operations::default(),
            rates: Rates::default(),
            down: Vec::new(),
        },
        SupervisorEvent::Return(NodeId(2)),
    ] {
        let effects = job.on(event);
        assert!(matches!(effects[0], SupervisorEffect::Fence(NodeId(2))), "{effects:?}");
    }
    job.join(3);
    assert!(job.supervisor.table().nodes.contains_key(&NodeId(3)));
}

/// SU-4, CO-2: a commit waits for every copy in sync, and no longer for one that died.
#[test]
fn a_commit_waits_for_every_copy_in_sync() {
    let mut job = started();
    for (shard, replica) in [(0, 0), (0, 1), (1, 0)] {
        assert!(commits(&job.say(shard, replica, prepared(1, 4)(shard))).is_empty());
    }
    let address = address(ActorId::Reducer { shard: 1, replica: 1 }, 1);
    let effects = job.on(SupervisorEvent::ActorFailed { address, reason: "test".to_owned() });
    assert_eq!(commits(&effects).first().map(|c| c.step), Some(1));
    let thin = job.log.iter().any(|r| matches!(r, Record::Commit(c) if c.copies == 1));
    assert!(thin, "the record names the protection that the step had");
}

/// CO-1: the next step is not committed before the last is applied and reported.
#[test]
fn steps_are_committed_one_after_another() {
    let mut job = started();
    assert_eq!(commits(&job.everybody(prepared(1, 4))).len(), 4);
    assert!(commits(&job.everybody(prepared(2, 4))).is_empty());
    let effects = job.everybody(applied(1));
    let reports = effects.iter().filter(|e| matches!(e, SupervisorEffect::Report(_))).count();
    assert_eq!(reports, 1);
    assert_eq!(commits(&effects).first().map(|c| c.step), Some(2));
}

/// CO-3: a sample that is missing or counted twice ends the job.
#[test]
fn unbalanced_books_end_the_job() {
    for samples in [3, 8] {
        let effects = started().everybody(prepared(1, samples));
        assert!(failure(&effects).unwrap().contains(&format!("counted {samples} samples in step 1, expected 4")));
    }
}

/// Why a job goes back.
fn way_back(effects: &[SupervisorEffect]) -> Option<String> {
    let corrupted = effects.iter().any(|e| matches!(e, SupervisorEffect::Note(Happening::Corrupted { .. })));
    effects.iter().find_map(|e| match e {
        SupervisorEffect::Note(Happening::RolledBack { why, .. }) if corrupted => Some(why.clone()),
        _ => None,
    })
}

/// CO-4: copies that differ, by sums or by state, send the job back before anything is told of the step.
#[test]
fn copies_that_differ_send_the_job_back() {
    // Another norm; and the same norm of other bits, as a flipped sign gives.
    for (part, digest) in [(0.26, 0), (0.25, 0xabc)] {
        let mut job = started();
        job.say(0, 0, prepared(1, 4)(0));
        let (norm, losses) = (vec![(0, vec![part])], Some([8.0, 0.0]));
        job.say(0, 1, Body::Prepared { step: 1, norm, losses, samples: 4, digest: Some(digest) });
        job.say(1, 0, prepared(1, 4)(1));
        let why = way_back(&job.say(1, 1, prepared(1, 4)(1))).unwrap();
        assert!(why.contains("copies 0 and 1 of shard 0 differ in sums of step 1"), "{why}");
        assert!(why.contains(&format!("{:032x} and {digest:032x}", 0)), "{why}");
    }
    let mut job = started();
    job.everybody(prepared(1, 4));
    for (shard, replica) in [(0, 0), (0, 1), (1, 0)] {
        let effects = job.say(shard, replica, applied(1)(shard));
        assert!(
            !effects.iter().any(|e| matches!(e, SupervisorEffect::Report(_))),
            "not before all copies are compared"
        );
    }
    let effects = job.say(1, 1, Body::Applied { step: 1, sums: sums(1, 99) });
    assert!(way_back(&effects).unwrap().contains("shard 1 differ in state of step 1"));
    assert!(job.supervisor.table().primaries.iter().all(Option::is_none));
    assert_eq!(job.supervisor.committed(), 0);
    // A machine that does so again and again is not worked around.
    for n in 2..=6 {
        job.everybody(applied(0));
        job.everybody(prepared(1, 4));
        job.say(0, 0, applied(1)(0));
        let effects = job.say(0, 1, Body::Applied { step: 1, sums: sums(0, 99) });
        assert_eq!((way_back(&effects).is_some(), failure(&effects).is_some()), (n < 6, n == 6));
    }
}

/// RE-7: a copy that finds itself corrupt sends the job back, and is named.
#[test]
fn a_copy_that_is_corrupt_is_named() {
    let mut job = started();
    let found = Corruption { step: 0, parameter: 0, hashes: [1, 2] };
    let why = way_back(&job.say(0, 1, Body::Corrupt(found))).unwrap();
    assert!(why.contains("copy 1 of shard 0 is corrupt: its lm_head.weight after step 0"), "{why}");
    assert_eq!(job.supervisor.committed(), 0);
    // The number is a stranger's word.
    let why = way_back(&started().say(1, 0, Body::Corrupt(Corruption { parameter: u32::MAX, ..found }))).unwrap();
    assert!(why.contains("copy 0 of shard 1 is corrupt: its state"), "{why}");
}

/// CO-5: the norm is that of all parts; a norm above the limit scales gradients down to it.
#[test]
fn the_norm_is_of_all_shards_and_clips() {
    let mut job = started();
    let of = |shard: u32| Body::Prepared {
        step: 1,
        norm: vec![(shard, vec![2.0, 6.0])],
        losses: (shard == 0).then_some([8.0, 0.0]),
        samples: 4,
        digest: Some(7),
    };
    let effects = job.everybody(of);
    assert_eq!(commits(&effects)[0].clip, (1.0f64 / 4.0) as f32);
    assert!(matches!(job.log.last(), Some(Record::Commit(c)) if c.grad_norm == 4.0 && c.loss == 0.5 && c.copies == 2));
}

/// SU-5: a shard without a copy sends everybody back, with new lives.
#[test]
fn a_lost_shard_sends_the_job_back() {
    let mut job = started();
    job.everybody(prepared(1, 4));
    job.everybody(applied(1));
    let before = job.supervisor.table().clone();
    job.on(SupervisorEvent::Lost { node: NodeId(1), why: "test".to_owned() });
    assert_eq!(job.supervisor.committed(), 1, "the mirrors have it");
    job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
    assert_eq!(job.supervisor.committed(), 0, "nobody has it, and there is no checkpoint");
    let effects = job.join(3);
    assert!(effects.iter().any(|e| matches!(e, SupervisorEffect::Welcome(NodeId(3), _))));
    let after = job.supervisor.table();
    assert_eq!((after.base, after.primaries.clone()), (0, vec![None, None]));
    for (actor, entry) in before.entries.iter().filter(|(a, _)| !matches!(a, ActorId::Supervisor | ActorId::Keeper)) {
        assert!(after.entries[actor].incarnation > entry.incarnation, "{actor}");
    }
}

/// Restart intensity: an actor that fails again and again gets another node, which may be why; if it fails there too, the job
/// ends with its words.
#[test]
fn an_actor_that_fails_everywhere_ends_the_job() {
    let mut job = started();
    let stage = ActorId::Stage { lane: 0, stage: 0 };
    let (first, most) = (job.supervisor.table().node_of(stage), RESTARTS_MAX as u32);
    for life in 1..=2 * most + 2 {
        let failed = SupervisorEvent::ActorFailed { address: address(stage, life), reason: "boom".to_owned() };
        let effects = job.on(failed);
        let why = failure(&effects);
        assert_eq!(job.supervisor.table().node_of(stage) == first, life <= most, "life {life}");
        assert_eq!(why.is_some(), life == 2 * most + 2, "life {life}");
        assert!(why.is_none_or(|w| w.contains("stage.0.0 failed 6 times") && w.contains("boom")));
    }
}

/// A copy of a shard that fails again and again gets a node without another copy, if there is one.
#[test]
fn a_copy_that_fails_again_and_again_goes_to_a_free_domain() {
    for nodes in [2, 3] {
        let mut job = started();
        (2..nodes).for_each(|peer| drop(job.join(peer + 1)));
        let copy = ActorId::Reducer { shard: 0, replica: 0 };
        let first = job.supervisor.table().node_of(copy);
        let mut why = None;
        for life in 1..=RESTARTS_MAX as u32 + 1 {
            assert_eq!((job.supervisor.table().node_of(copy), &why), (first, &None), "life {life}");
            why = failure(
                &job.on(SupervisorEvent::ActorFailed { address: address(copy, life), reason: "boom".to_owned() }),
            );
        }
        let moved = job.supervisor.table().node_of(copy) == Some(NodeId(3));
        assert_eq!((moved, why.is_some()), (nodes == 3, nodes == 2), "{why:?}");
    }
}

/// A copy whose node is dead, and for which there is no other node, has failed already.
#[test]
fn the_homeless_fail_no_more() {
    let mut job = started();
    job.on(SupervisorEvent::Lost { node: NodeId(2), why: "test".to_owned() });
    let before = job.supervisor.table().clone();
    let lost: Vec<ActorId> = before.entries.iter().filter(|(_, e)| e.node == NodeId(2)).map(|(a, _)| *a).collect();
    assert!(!lost.is_empty());
    for actor in lost {
        let address = before.address(actor).unwrap();
        assert!(job.on(SupervisorEvent::ActorFailed { address, reason: "late".to_owned() }).is_empty());
    }
    assert_eq!(*job.supervisor.table(), before);
}

/// A copy knows more than the log: the log has lost a record, and the job goes back instead of waiting for ever.
#[test]
fn a_log_that_lost_its_end_is_noticed() {
    let mut job = started();
    let before = job.supervisor.table().clone();
    let (copy, _) = before.entries.iter().find(|(a, _)| matches!(a, ActorId::Reducer { .. })).unwrap();
    let from = before.address(*copy).unwrap();
    let effects = job.on(SupervisorEvent::Message { from, body: Body::Applied { step: 7, sums: Vec::new() } });
    let told = effects.iter().find_map(|e| match e {
        SupervisorEffect::Note(Happening::RolledBack { why, .. }) => Some(why.clone()),
        _ => None,
    });
    assert!(told.is_some_and(|why| why.contains("after step 7, the control log ends with step 0")));
}

/// A recovery is told once, when the first commit after it is on disk; a job that began is none.
#[test]
fn a_recovery_ends_with_the_next_commit() {
    let recoveries = |effects: &[SupervisorEffect]| {
        let recovered =
            |e: &&SupervisorEffect| matches!(e, SupervisorEffect::Note(Happening::Recovered { step: 2, lives: 1, .. }));
        let all = effects.iter().filter(|e| matches!(e, SupervisorEffect::Note(Happening::Recovered { .. })));
        (all.count(), effects.iter().filter(recovered).count())
    };
    let mut job = started();
    let mut effects = job.everybody(prepared(1, 4));
    effects.extend(job.everybody(applied(1)));
    assert_eq!(recoveries(&effects), (0, 0));
    let address = job.supervisor.table().address(ActorId::Stage { lane: 0, stage: 0 }).unwrap();
    effects = job.on(SupervisorEvent::ActorFailed { address, reason: "test".to_owned() });
    assert_eq!(recoveries(&effects), (0, 0));
    let address = job.supervisor.table().address(address.actor).unwrap();
    effects = job.on(SupervisorEvent::Message { from: address, body: Body::Ready });
    assert_eq!(recoveries(&effects), (0, 0));
    effects = job.everybody(prepared(2, 4));
    assert_eq!(recoveries(&effects), (1, 1));
    effects = job.everybody(applied(2));
    effects.extend(job.everybody(prepared(3, 4)));
    assert_eq!(recoveries(&effects), (0, 0));
}

fn beat(node: u64, down: &[u64]) -> SupervisorEvent {
    let down = down.iter().map(|n| NodeId(*n)).collect();
    SupervisorEvent::Heartbeat { node: NodeId(node), operations: Operations::default(), rates: Rates::default(), down }
}

mod audits;
mod back;
mod nodes;
