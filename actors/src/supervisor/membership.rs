//! Who was heard of: a node is taken for dead when it is silent for longer than its own beats make likely.
//!
//! An accrual detector for each node (Hayashibara et al., "The phi accrual failure detector", SRDS 2004), of which only the
//! threshold is wanted. Its normal distribution expects too little of a busy machine, where beats are late in bursts: the
//! latest ones seen count too.
//! - MB-1: a node expires only if it was silent for longer than is allowed it, as the supervisor saw time.
//! - MB-2: the supervisor's own stalls don't count: time that passed between two of its looks or beats beyond
//!   [`LOOK_MAX`] is given back to every node.
//! - MB-3: what is allowed lies between [`LEAST`] and [`MOST`], whatever came before: there is nothing to tune. Only the
//!   first beat may take [`FIRST`] longer.

use crate::ids::NodeId;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Silence that is allowed even to a node whose beats come like a clock's: several of them may be late at once.
const LEAST: Duration = Duration::from_millis(500);
/// Silence that is allowed at most, and to a node of which little is known: with a look it stays under a second.
const MOST: Duration = Duration::from_millis(850);
/// So much more is allowed before the first beat: a new node has its actors to start, and one that a new life of the
/// supervisor knows from its log must find it first.
const FIRST: Duration = Duration::from_millis(2000);
/// The supervisor looks at least this often unless it was stalled itself.
const LOOK_MAX: Duration = Duration::from_millis(100);
/// Pauses between beats that are remembered, and with how few nothing is known yet.
const PAUSES: usize = 200;
const PAUSES_MIN: usize = 10;
/// Deviations from the mean pause: phi of 12, a false alarm in 10^12 pauses if they were distributed normally.
const DEVIATIONS: f64 = 7.0;
/// And so many times the longest pause that is remembered.
const LONGEST: f64 = 2.5;

/// What is known of a node's beats.
#[derive(Debug)]
struct Beats {
    /// When it was heard of last.
    heard: Duration,
    /// Whether it was heard of at all.
    begun: bool,
    /// Pauses before its last beats, in seconds.
    pauses: VecDeque<f64>,
}

impl Beats {
    fn beat(&mut self, now: Duration) {
        if std::mem::replace(&mut self.begun, true) {
            let pause = now.saturating_sub(self.heard);
            self.pauses.push_back(pause.as_secs_f64());
            if self.pauses.len() > PAUSES {
                self.pauses.pop_front();
            }
        }
        self.heard = now;
    }

    /// Silence that is allowed (MB-3).
    fn allowed(&self) -> Duration {
        if self.pauses.len() < PAUSES_MIN {
            return MOST;
        }
        let n = self.pauses.len() as f64;
        let mean = self.pauses.iter().sum::<f64>() / n;
        let variance = self.pauses.iter().map(|p| (p - mean) * (p - mean)).sum::<f64>() / n;
        let longest = self.pauses.iter().copied().fold(0.0, f64::max);
        let likely = (mean + DEVIATIONS * variance.sqrt()).max(LONGEST * longest);
        Duration::from_secs_f64(likely.min(MOST.as_secs_f64())).max(LEAST)
    }
}

/// A node that was silent for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Silent {
    /// Which.
    pub(crate) node: NodeId,
    /// For how long.
    pub(crate) silence: Duration,
    /// What was allowed.
    pub(crate) allowed: Duration,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Membership {
    beats: BTreeMap<NodeId, Beats>,
    looked: Duration,
}

impl Membership {
    /// A node is in the job, and will be heard of.
    pub(crate) fn expect(&mut self, now: Duration, node: NodeId) {
        self.beats.insert(node, Beats { heard: now + FIRST, begun: false, pauses: VecDeque::new() });
    }

    /// A node's beat.
    pub(crate) fn beat(&mut self, now: Duration, node: NodeId) {
        self.look(now);
        if let Some(beats) = self.beats.get_mut(&node) {
            beats.beat(now);
        }
    }

    /// Gives back what the supervisor itself slept through (MB-2).
    fn look(&mut self, now: Duration) {
        let before = std::mem::replace(&mut self.looked, now);
        let stall = now.saturating_sub(before).saturating_sub(LOOK_MAX);
        if stall.is_zero() {
            return;
        }
        for beats in self.beats.values_mut() {
            let moved = beats.heard + stall;
            // A first beat that is not due yet is due later.
            beats.heard = if beats.heard > before { moved } else { moved.min(now) };
        }
    }

    /// Whether every node was heard of.
    pub(crate) fn all_heard(&self) -> bool {
        self.beats.values().all(|beats| beats.begun)
    }

    /// How long ago a node was heard of.
    pub(crate) fn silence(&self, now: Duration, node: NodeId) -> Duration {
        self.beats.get(&node).map_or(Duration::ZERO, |beats| now.saturating_sub(beats.heard))
    }

    /// A node is gone.
    pub(crate) fn forget(&mut self, node: NodeId) {
        self.beats.remove(&node);
    }

    /// Nodes that are silent for too long.
    pub(crate) fn expired(&mut self, now: Duration) -> Vec<Silent> {
        self.look(now);
        let look = |(node, beats): (&NodeId, &Beats)| {
            let silence = now.saturating_sub(beats.heard);
            // Most were heard a moment ago: nothing is worked out for them.
            let allowed = (silence >= LEAST).then(|| beats.allowed()).filter(|allowed| silence >= *allowed)?;
            Some(Silent { node: *node, silence, allowed })
        };
        self.beats.iter().filter_map(look).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    const NODE: NodeId = NodeId(1);

    /// A node whose beats had these pauses, and when the last one came.
    fn after(pauses: impl IntoIterator<Item = u64>) -> (Membership, u64) {
        let mut m = Membership::default();
        let mut now = 0;
        m.expect(ms(now), NODE);
        m.beat(ms(now), NODE);
        for pause in pauses {
            let end = now + pause;
            while now < end {
                now = end.min(now + 50);
                assert!(m.expired(ms(now)).is_empty(), "at {now} ms, in a pause of {pause}");
            }
            m.beat(ms(now), NODE);
        }
        (m, now)
    }

    /// Milliseconds of silence after which it expires.
    fn found((mut m, last): (Membership, u64)) -> u64 {
        (0..).map(|n| 10 * n).find(|n| !m.expired(ms(last + n)).is_empty()).expect("it is silent")
    }

    /// MB-1.
    #[test]
    fn a_silent_node_expires_and_a_talking_one_does_not() {
        let (mut m, mut now) = after([]);
        m.expect(ms(now), NodeId(2));
        m.expect(ms(now), NodeId(3));
        let expired = loop {
            now += 50;
            m.beat(ms(now), NodeId(2));
            let expired = m.expired(ms(now));
            if !expired.is_empty() {
                break expired;
            }
        };
        assert_eq!(expired, [Silent { node: NODE, silence: MOST, allowed: MOST }]);
        m.forget(NODE);
        // Before its first beat a node has longer.
        assert!(m.expired(ms(now)).is_empty());
        let end = |m: &mut Membership, now: u64| {
            m.beat(ms(now), NodeId(2));
            !m.expired(ms(now)).is_empty()
        };
        let first = (now / 50..).map(|n| 50 * n).find(|now| end(&mut m, *now));
        assert_eq!(first, Some(2850));
    }

    /// MB-3: the steadier the beats, the sooner silence is noticed, within limits.
    #[test]
    fn what_is_allowed_follows_the_beats() {
        assert_eq!(found(after([50; 300])), 500);
        assert_eq!(found(after([50; 5])), 850, "too few are known");
        assert_eq!(found(after((0..300).map(|n| if n % 50 == 7 { 240 } else { 50 }))), 600, "a burst each 2.5 s");
        assert_eq!(found(after((0..300).map(|n| if n % 50 == 7 { 700 } else { 50 }))), 850);
        assert_eq!(found(after([700].into_iter().chain([50; 300]))), 500, "bad times are forgotten");
    }

    /// MB-1: beats that get later and later, up to twice as late as ever before, raise no alarm.
    #[test]
    fn a_machine_that_gets_busier_is_not_taken_for_dead() {
        after([50; 100].into_iter().chain([100; 5]).chain([150; 5]).chain([290; 5]).chain([490; 5]).chain([800; 50]));
    }

    /// MB-2.
    #[test]
    fn the_supervisors_own_stall_kills_nobody() {
        let (mut m, now) = after([50; 100]);
        assert!(m.expired(ms(now + 60_000)).is_empty());
        m.beat(ms(now + 60_050), NODE);
        assert!(m.expired(ms(now + 60_100)).is_empty());
        assert_eq!(found((m, now + 60_100)), 450, "it was heard of 50 ms before");
    }

    /// MB-2: nor does it teach the detector that long pauses are usual, or hurry a node that has just come.
    #[test]
    fn a_stall_changes_nothing_that_was_learned() {
        let (mut m, now) = after([50; 100]);
        m.beat(ms(now + 60_000), NODE);
        assert!(m.expired(ms(now + 60_001)).is_empty());
        assert_eq!(found((m, now + 60_001)), 500);
        let (mut m, now) = after([50; 100]);
        m.expect(ms(now), NodeId(2));
        assert!(!m.all_heard());
        m.beat(ms(now + 60_000), NODE);
        let found = (0..).map(|n| now + 60_000 + 50 * n).find(|at| {
            m.beat(ms(*at), NODE);
            !m.expired(ms(*at)).is_empty()
        });
        assert_eq!(found.map(|at| at - now - 60_000), Some(2750), "all but the 100 ms of an ordinary look");
        m.beat(ms(now), NodeId(2));
        assert!(m.all_heard());
    }
}
