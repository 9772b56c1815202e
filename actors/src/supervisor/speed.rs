//! Which nodes are slow: a straggler delays every step, and nobody dies of it.
//!
//! - SP-1: a node's time is compared with what the others would have taken for the same work of the same kinds, by their
//!   median: more work, or other work, does not make a node slow.
//! - SP-2: a node is slow after [`PERIODS`] periods in a row in which it took [`SLOW`] percent of the others' time or more, and
//!   keeps up again after as many in which it took less than [`EVEN`], or after [`SILENT`] in which it did little, which say
//!   nothing: it may have nothing left to do. Each time that it is named again it has to keep up for twice as long, for it may
//!   be slow only when it has its share.

use super::{Happening, Supervisor, SupervisorEffect};
use crate::ids::NodeId;
use crate::rates::Rates;
use std::collections::BTreeMap;
use std::time::Duration;

/// What is compared at one time.
const PERIOD: Duration = Duration::from_secs(5);
/// So many of them in a row decide.
const PERIODS: u32 = 3;
/// So many, as a node that does little is not looked at.
const SILENT: u32 = 12;
/// Doublings of what a node has to keep up for.
const DOUBLINGS: u32 = 8;
/// Percent of the others' time.
const SLOW: u64 = 200;
const EVEN: u64 = 150;
/// No node is said to be slower than this.
const SLOWEST: u64 = 1000;
/// Microseconds of work in a period without which it says nothing.
const LITTLE: u64 = 250_000;

/// A node whose standing changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) node: NodeId,
    /// Percent of the others' time that it takes; none: it keeps up again.
    pub(super) percent: Option<u64>,
}

#[derive(Debug, Default)]
struct Standing {
    /// At the beginning of the period, and now.
    begun: Option<Rates>,
    now: Rates,
    /// Periods in a row that speak for a change, and those that say nothing.
    periods: u32,
    silent: u32,
    slow: Option<u64>,
    /// Times that it was named.
    named: u32,
}

impl Standing {
    /// A period's percent of the others' time, if it says anything. Gives whether the standing changes (SP-2).
    fn period(&mut self, percent: Option<u64>) -> bool {
        let (speaks, needed) = match (percent, self.slow) {
            (Some(percent), None) => (percent >= SLOW, PERIODS),
            (Some(percent), Some(_)) => (percent < EVEN, PERIODS << (self.named - 1).min(DOUBLINGS)),
            (None, None) => return false,
            (None, Some(_)) => {
                self.silent += 1;
                (false, PERIODS)
            }
        };
        self.periods = if speaks { self.periods + 1 } else { 0 };
        let over = self.silent >= SILENT << self.named.saturating_sub(1).min(DOUBLINGS);
        if self.periods < needed && !over {
            return false;
        }
        (self.periods, self.silent) = (0, 0);
        self.slow = if self.slow.is_some() { None } else { percent.map(|percent| percent.min(SLOWEST)) };
        self.named += u32::from(self.slow.is_some());
        true
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Speeds {
    nodes: BTreeMap<NodeId, Standing>,
    began: Duration,
}

impl Speeds {
    /// A node's rates, by its heartbeat.
    pub(super) fn beat(&mut self, node: NodeId, rates: Rates) {
        let standing = self.nodes.entry(node).or_default();
        standing.begun.get_or_insert(rates);
        standing.now = rates;
    }

    /// A node is none any more.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.nodes.remove(&node);
    }

    /// Percent of the others' time that slow nodes take.
    pub(super) fn slow(&self) -> BTreeMap<NodeId, u64> {
        self.nodes.iter().filter_map(|(node, standing)| Some((*node, standing.slow?))).collect()
    }

    /// Ends a period if it is time to.
    pub(super) fn look(&mut self, now: Duration) -> Vec<Change> {
        if now.saturating_sub(self.began) < PERIOD {
            return Vec::new();
        }
        self.began = now;
        let done = |(node, standing): (&NodeId, &Standing)| Some((*node, standing.now.since(&standing.begun?)));
        let done: BTreeMap<NodeId, Rates> = self.nodes.iter().filter_map(done).collect();
        let mut changes = Vec::new();
        for (node, standing) in &mut self.nodes {
            standing.begun = Some(standing.now);
            if standing.period(percent_of_others(*node, &done)) {
                changes.push(Change { node: *node, percent: standing.slow });
            }
        }
        changes
    }
}

/// SP-1; none if it did little, or nobody else did the same.
fn percent_of_others(node: NodeId, done: &BTreeMap<NodeId, Rates>) -> Option<u64> {
    let (mut own, mut usual) = (0, 0.0);
    for (kind, [work, time]) in done.get(&node)?.0.into_iter().enumerate() {
        let of = |(other, rates): (&NodeId, &Rates)| {
            let [work, time] = rates.0[kind];
            (*other != node && work > 0).then(|| time as f64 / work as f64)
        };
        let mut others: Vec<f64> = done.iter().filter_map(of).collect();
        others.sort_by(f64::total_cmp);
        let Some(median) = others.get(others.len() / 2) else { continue };
        own = u64::saturating_add(own, time);
        usual += work as f64 * median;
    }
    (own >= LITTLE && usual > 0.0).then(|| (100.0 * own as f64 / usual) as u64)
}

impl Supervisor {
    /// Names nodes that are slow, or are not any more; with the next commit they have less to do, if that is wanted.
    pub(super) fn compare_speeds(&mut self) -> Vec<SupervisorEffect> {
        let changes = self.speeds.look(self.now);
        self.uneven |= self.relieve && !changes.is_empty();
        let tell = |change: Change| {
            let node = change.node.0;
            SupervisorEffect::Note(match change.percent {
                Some(percent) => Happening::NodeSlow { node, percent },
                None => Happening::NodeKeepsUp { node },
            })
        };
        changes.into_iter().map(tell).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes work for `periods`; each does so much work of a kind in so many milliseconds.
    fn after(speeds: &mut Speeds, from: u64, periods: u64, work: &[(u64, usize, u64, u64)]) -> Vec<Change> {
        let mut changes = Vec::new();
        for period in from..from + periods {
            for (node, kind, work, milliseconds) in work {
                let standing = speeds.nodes.entry(NodeId(*node)).or_default();
                let mut rates = standing.now;
                rates.0[*kind][0] += work;
                rates.0[*kind][1] += milliseconds * 1000;
                standing.begun.get_or_insert_with(Rates::default);
                speeds.beat(NodeId(*node), rates);
            }
            changes.extend(speeds.look(PERIOD * (period as u32 + 1)));
        }
        changes
    }

    /// SP-2.
    #[test]
    fn a_slow_node_is_named_once_and_again_when_it_keeps_up() {
        let mut speeds = Speeds::default();
        let slow = [(1, 0, 100, 1000), (2, 0, 100, 1100), (3, 0, 100, 3300)];
        assert!(after(&mut speeds, 0, 2, &slow).is_empty(), "it may be a hiccup");
        assert_eq!(after(&mut speeds, 2, 1, &slow), [Change { node: NodeId(3), percent: Some(300) }]);
        assert!(after(&mut speeds, 3, 5, &slow).is_empty());
        assert_eq!(speeds.slow(), [(NodeId(3), 300)].into());
        let even = [(1, 0, 100, 1000), (2, 0, 100, 1100), (3, 0, 100, 1200)];
        assert_eq!(after(&mut speeds, 8, 3, &even), [Change { node: NodeId(3), percent: None }]);
        // The second time it has to keep up for longer.
        assert_eq!(after(&mut speeds, 11, 3, &slow).len(), 1);
        assert!(after(&mut speeds, 14, 5, &even).is_empty());
        assert_eq!(after(&mut speeds, 19, 1, &even), [Change { node: NodeId(3), percent: None }]);
    }

    /// SP-2: a node that was relieved of all is not slow for ever.
    #[test]
    fn a_node_that_has_nothing_to_do_is_looked_at_again() {
        let mut speeds = Speeds::default();
        assert_eq!(after(&mut speeds, 0, 3, &[(1, 0, 100, 1000), (2, 0, 100, 3000)]).len(), 1);
        let idle = [(1, 0, 100, 1000), (2, 0, 0, 0)];
        assert!(after(&mut speeds, 3, u64::from(SILENT) - 1, &idle).is_empty());
        assert_eq!(after(&mut speeds, 20, 1, &idle), [Change { node: NodeId(2), percent: None }]);
    }

    /// SP-1: twice the work in twice the time, other work, little work, or nobody to compare with.
    #[test]
    fn only_the_same_work_tells_who_is_slow() {
        for work in [
            [(1, 0, 100, 1000), (2, 0, 300, 3000)],
            [(1, 0, 1000, 100), (2, 2, 10, 4000)],
            [(1, 0, 1000, 1000), (2, 0, 10, 200)],
        ] {
            assert!(after(&mut Speeds::default(), 0, 9, &work).is_empty(), "{work:?}");
        }
        assert!(after(&mut Speeds::default(), 0, 9, &[(1, 0, 1, 5000)]).is_empty());
    }

    /// The time before a supervisor began, or a node came, does not count.
    #[test]
    fn what_a_node_did_before_does_not_count() {
        let mut speeds = Speeds::default();
        let mut rates = Rates::default();
        rates.0[0] = [1, 1 << 40];
        speeds.beat(NodeId(2), rates);
        assert!(after(&mut speeds, 0, 9, &[(1, 0, 100, 1000), (2, 0, 100, 1000)]).is_empty());
    }
}
