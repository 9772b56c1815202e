//! The timeline of a recovery, from a failure to the first step that is committed after it.
//!
//! Phases: *detect* (silence before the failure was noticed; none if the kernel told; a supervisor's death is counted from the
//! beginning of the next life), *decide* (until the new lives are
//! decided), *fence* (until that is on disk and announced: whoever is of an older epoch is not heard any more), *fetch* (until
//! every new stage and expert has its weights; nobody waits for a new mirror), *replay* (until the step is prepared
//! everywhere), *commit* (until that is on disk).
//! - TL-1: phases follow each other without gaps: they add up to the whole.
//! - TL-2: a failure on the way belongs to the same recovery, which goes through its phases again: the time is counted to
//!   the phase that it was lost for. So does a node that comes and takes what had no place.
//! - TL-3: what is kept of one recovery is bounded, however long it takes.

use crate::ids::{ActorId, Address, Incarnation};
use crate::table::Table;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Causes that are kept by name.
const CAUSES_MAX: usize = 32;

/// Microseconds that the phases of a recovery took, as the module has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Phases {
    pub detect: u64,
    pub decide: u64,
    pub fence: u64,
    pub fetch: u64,
    pub replay: u64,
    pub commit: u64,
}

impl Phases {
    /// Of the whole.
    pub(super) fn sum(&self) -> u64 {
        self.detect + self.decide + self.fence + self.fetch + self.replay + self.commit
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Timeline {
    /// What failed, in the order in which it was noticed: the first [`CAUSES_MAX`], and how many there were.
    causes: Vec<String>,
    failures: usize,
    /// Nothing has been decided about the last one.
    open: bool,
    began: Duration,
    silence: Duration,
    /// Lives before the failure.
    before: BTreeMap<ActorId, Incarnation>,
    /// New stages and experts that have nothing yet.
    waiting: BTreeSet<Address>,
    /// New lives of all kinds.
    pub(super) lives: usize,
    decided: Option<Duration>,
    announced: Option<Duration>,
    fetched: Option<Duration>,
    replayed: Option<Duration>,
}

impl Timeline {
    /// A failure is noticed, after `silence`.
    pub(super) fn new(now: Duration, table: &Table) -> Self {
        Self {
            causes: Vec::new(),
            failures: 0,
            open: false,
            began: now,
            silence: Duration::ZERO,
            before: table.entries.iter().map(|(actor, entry)| (*actor, entry.incarnation)).collect(),
            waiting: BTreeSet::new(),
            lives: 0,
            decided: None,
            announced: None,
            fetched: None,
            replayed: None,
        }
    }

    /// Why, and how long it had gone unnoticed.
    pub(super) fn cause(&mut self, why: String, silence: Duration) {
        if self.failures == 0 {
            self.silence = silence;
        }
        self.failures += 1;
        self.open = true;
        if self.causes.len() < CAUSES_MAX {
            self.causes.push(why);
        }
    }

    /// What failed, for people.
    pub(super) fn take_causes(&mut self) -> Vec<String> {
        let mut causes = std::mem::take(&mut self.causes);
        if self.failures > causes.len() {
            causes.push(format!("and {} more", self.failures - causes.len()));
        }
        causes
    }

    /// A table is decided. What was moved without a failure once the step is prepared is no part of the recovery.
    pub(super) fn decided(&mut self, now: Duration, table: &Table) {
        let is_new = |(actor, incarnation): &(ActorId, Incarnation)| {
            !matches!(actor, ActorId::Supervisor | ActorId::Keeper) && self.before.get(actor) != Some(incarnation)
        };
        let lives: Vec<_> = table.entries.iter().map(|(a, e)| (*a, e.incarnation)).filter(is_new).collect();
        self.before.extend(lives.iter().copied());
        if !self.open && (lives.is_empty() || self.replayed.is_some()) {
            return;
        }
        self.open = false;
        self.lives += lives.len();
        // A life that is over is not waited for.
        self.waiting.retain(|life| table.address(life.actor) == Some(*life));
        let waits = lives.iter().filter(|(actor, _)| matches!(actor, ActorId::Stage { .. } | ActorId::Expert { .. }));
        self.waiting.extend(waits.map(|(actor, incarnation)| Address { actor: *actor, incarnation: *incarnation }));
        self.decided = Some(now);
        (self.announced, self.fetched, self.replayed) = (None, None, None);
    }

    /// The decision is on disk and announced.
    pub(super) fn announced(&mut self, now: Duration) {
        self.announced.get_or_insert(now);
        if self.waiting.is_empty() {
            self.fetched.get_or_insert(now);
        }
    }

    /// A new life has its weights or state.
    pub(super) fn ready(&mut self, now: Duration, life: Address) {
        if self.waiting.remove(&life) && self.waiting.is_empty() {
            self.fetched = Some(now);
        }
    }

    /// A step is prepared everywhere.
    pub(super) fn replayed(&mut self, now: Duration) {
        self.replayed.get_or_insert(now);
    }

    /// Its commit is on disk: none, if that was of a step before the failure.
    pub(super) fn committed(&self, now: Duration) -> Option<Phases> {
        let replayed = self.replayed?;
        let mut from = self.began;
        // What was not heard of, because reports of others overtook it, was over when the next phase was.
        let mut phase = |end: Option<Duration>| {
            let end = end.unwrap_or(replayed).clamp(from, replayed.max(from));
            let took = end - from;
            from = end;
            took.as_micros() as u64
        };
        let (decide, fence) = (phase(self.decided), phase(self.announced));
        let (fetch, replay) = (phase(self.fetched), phase(Some(replayed)));
        let commit = now.saturating_sub(from).as_micros() as u64;
        Some(Phases { detect: self.silence.as_micros() as u64, decide, fence, fetch, replay, commit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::NodeId;
    use crate::table::Entry;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn table(incarnations: [u32; 3]) -> Table {
        let actors =
            [ActorId::Supervisor, ActorId::Stage { lane: 0, stage: 0 }, ActorId::Expert { layer: 1, expert: 0 }];
        let entry = |incarnation| Entry { node: NodeId(1), incarnation: Incarnation(incarnation) };
        Table { entries: actors.into_iter().zip(incarnations.map(entry)).collect(), ..Table::default() }
    }

    fn life(table: &Table, actor: ActorId) -> Address {
        table.address(actor).unwrap()
    }

    const STAGE: ActorId = ActorId::Stage { lane: 0, stage: 0 };
    const EXPERT: ActorId = ActorId::Expert { layer: 1, expert: 0 };

    /// TL-1.
    #[test]
    fn phases_add_up_to_the_whole() {
        let mut t = Timeline::new(ms(100), &table([1, 1, 1]));
        t.cause("silent".into(), ms(300));
        let now = table([2, 2, 2]);
        t.decided(ms(101), &now);
        assert_eq!(t.lives, 2, "the supervisor is no part of it");
        t.announced(ms(104));
        t.announced(ms(120));
        t.ready(ms(110), life(&now, STAGE));
        assert!(t.committed(ms(111)).is_none(), "nothing was prepared");
        t.ready(ms(117), life(&now, EXPERT));
        t.replayed(ms(160));
        let phases = t.committed(ms(162)).unwrap();
        let expected =
            Phases { detect: 300_000, decide: 1000, fence: 3000, fetch: 13_000, replay: 43_000, commit: 2000 };
        assert_eq!((phases, phases.sum()), (expected, 362_000));
    }

    /// TL-2.
    #[test]
    fn a_failure_on_the_way_belongs_to_it() {
        let mut t = Timeline::new(ms(0), &table([1, 1, 1]));
        t.cause("first".into(), ms(0));
        let first = table([1, 2, 1]);
        t.decided(ms(1), &first);
        t.announced(ms(2));
        t.ready(ms(9), life(&first, STAGE));
        t.cause("second".into(), ms(500));
        let second = table([1, 3, 2]);
        t.decided(ms(20), &second);
        t.announced(ms(21));
        t.ready(ms(22), life(&first, STAGE));
        t.ready(ms(30), life(&second, STAGE));
        t.ready(ms(31), life(&second, EXPERT));
        t.replayed(ms(40));
        let phases = t.committed(ms(41)).unwrap();
        assert_eq!(
            phases,
            Phases { detect: 0, decide: 20_000, fence: 1000, fetch: 10_000, replay: 9000, commit: 1000 }
        );
        assert_eq!((t.take_causes().len(), t.lives), (2, 3));
    }

    /// TL-1: what nobody told of was over with the phase after it.
    #[test]
    fn reports_that_are_late_leave_no_gap() {
        let mut t = Timeline::new(ms(0), &table([1, 1, 1]));
        t.cause("failed".into(), ms(0));
        t.decided(ms(0), &table([1, 2, 1]));
        t.announced(ms(1));
        t.replayed(ms(5));
        let phases = t.committed(ms(6)).unwrap();
        assert_eq!((phases.fetch, phases.replay, phases.sum()), (4000, 0, 6000));
    }

    const MIRROR: ActorId = ActorId::Reducer { shard: 0, replica: 1 };

    /// Nobody waits for a mirror, nor for what a commit moves.
    #[test]
    fn only_what_a_step_waits_for_is_waited_for() {
        let mut before = table([1, 1, 1]);
        before.entries.insert(MIRROR, Entry { node: NodeId(1), incarnation: Incarnation(1) });
        let mut t = Timeline::new(ms(0), &before);
        t.cause("failed".into(), ms(0));
        let mut now = table([1, 2, 1]);
        now.entries.insert(MIRROR, Entry { node: NodeId(1), incarnation: Incarnation(2) });
        t.decided(ms(0), &now);
        t.announced(ms(1));
        t.ready(ms(3), life(&now, STAGE));
        t.replayed(ms(5));
        let mut moved = now.clone();
        moved.entries.get_mut(&EXPERT).unwrap().incarnation = Incarnation(2);
        t.decided(ms(5), &moved);
        let phases = t.committed(ms(6)).unwrap();
        assert_eq!((phases.fetch, phases.replay, phases.commit, t.lives), (2000, 2000, 1000, 2));
    }

    /// TL-2: what had no place is decided about when a node comes.
    #[test]
    fn the_wait_for_a_node_is_part_of_deciding() {
        let mut t = Timeline::new(ms(0), &table([1, 1, 1]));
        t.cause("no node is left".into(), ms(0));
        t.decided(ms(1), &table([1, 1, 1]));
        t.announced(ms(2));
        let later = table([1, 2, 2]);
        t.decided(ms(900), &later);
        t.announced(ms(901));
        t.ready(ms(905), life(&later, STAGE));
        t.ready(ms(906), life(&later, EXPERT));
        t.replayed(ms(910));
        let phases = t.committed(ms(911)).unwrap();
        assert_eq!((phases.decide, phases.fence, phases.fetch), (900_000, 1000, 5000));
    }

    /// TL-3.
    #[test]
    fn a_storm_of_failures_is_counted_not_listed() {
        let mut t = Timeline::new(ms(0), &table([1, 1, 1]));
        (0..1000).for_each(|n| t.cause(format!("failure {n}"), ms(0)));
        let causes = t.take_causes();
        assert_eq!((causes.len(), causes[31].as_str(), causes[32].as_str()), (33, "failure 31", "and 968 more"));
    }
}
