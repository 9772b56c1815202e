//! Links between nodes, as their beats tell of them. Two nodes that reach the supervisor and not each other would wait for
//! each other for ever: one of them is given up.
//!
//! - LI-1: a link counts as cut once one of its ends has said so in [`BEATS`] beats in a row and for [`TIME`]: links that
//!   break come back sooner. Beats are counted, so that the supervisor's own stall makes no cut, and time, so that beats that
//!   waited and come all at once make none.
//! - LI-2: the node with the most cut links is given up, of equals the one that was silent longest, then the newest. So a
//!   node that is cut off from all others goes, not those.

use crate::ids::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// See LI-1.
const BEATS: u32 = 4;
/// See LI-1.
const TIME: Duration = Duration::from_millis(150);

/// That a node does not reach another: beats in a row, and since when.
type Row = (u32, Duration);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// By node and the node that it does not reach.
    down: BTreeMap<NodeId, BTreeMap<NodeId, Row>>,
}

impl Links {
    /// A node's beat names the nodes that it does not reach. Gives whether it reaches one again.
    pub(super) fn beat(&mut self, now: Duration, node: NodeId, down: &[NodeId]) -> bool {
        let before = self.down.remove(&node).unwrap_or_default();
        let row =
            |other: &NodeId| before.get(other).map_or((1, now), |(beats, since)| (beats.saturating_add(1), *since));
        let rows: BTreeMap<NodeId, Row> = down.iter().map(|other| (*other, row(other))).collect();
        let again = before.keys().any(|other| !rows.contains_key(other));
        if !rows.is_empty() {
            self.down.insert(node, rows);
        }
        again
    }

    /// Whether every node reaches all others.
    pub(super) fn are_quiet(&self) -> bool {
        self.down.is_empty()
    }

    /// Which nodes do not reach which others, for people.
    pub(super) fn describe(&self) -> Option<String> {
        let all = self.down.iter().map(|(node, others)| {
            let others: Vec<String> = others.keys().map(ToString::to_string).collect();
            format!("{node} does not reach {}", others.join(", "))
        });
        (!self.down.is_empty()).then(|| all.collect::<Vec<_>>().join("; "))
    }

    /// A node is gone.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.down.remove(&node);
        for others in self.down.values_mut() {
            others.remove(&node);
        }
    }

    /// What both ends say of a link.
    fn rows(&self, a: NodeId, b: NodeId) -> impl Iterator<Item = Row> {
        [(a, b), (b, a)].into_iter().filter_map(|(a, b)| self.down.get(&a).and_then(|others| others.get(&b)).copied())
    }

    /// Since when the first of these links has been down.
    pub(super) fn since(&self, node: NodeId, others: &[NodeId]) -> Option<Duration> {
        others.iter().flat_map(|other| self.rows(node, *other)).map(|(_, since)| since).min()
    }

    /// Whether the link of two nodes is cut (LI-1).
    pub(super) fn is_cut(&self, now: Duration, a: NodeId, b: NodeId) -> bool {
        self.rows(a, b).any(|(beats, since)| beats >= BEATS && now.saturating_sub(since) >= TIME)
    }

    /// Whether every two of these nodes reach each other.
    pub(super) fn all_up(&self, nodes: &[NodeId]) -> bool {
        let up = |(n, a): (usize, &NodeId)| nodes[n + 1..].iter().all(|b| self.rows(*a, *b).next().is_none());
        self.down.is_empty() || nodes.iter().enumerate().all(up)
    }

    /// The node among these that is to be given up, and the nodes that it does not reach (LI-2).
    pub(super) fn victim(
        &self,
        now: Duration,
        nodes: &BTreeSet<NodeId>,
        silence: impl Fn(NodeId) -> Duration,
    ) -> Option<(NodeId, Vec<NodeId>)> {
        let cut = |a: NodeId| nodes.iter().copied().filter(|b| *b != a && self.is_cut(now, a, *b)).collect::<Vec<_>>();
        let all = nodes.iter().map(|node| (*node, cut(*node))).filter(|(_, others)| !others.is_empty());
        all.max_by_key(|(node, others)| (others.len(), silence(*node), *node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(node: u64) -> NodeId {
        NodeId(node)
    }

    fn among(count: u64) -> BTreeSet<NodeId> {
        (1..=count).map(NodeId).collect()
    }

    fn no_silence(_: NodeId) -> Duration {
        Duration::ZERO
    }

    fn ms(n: u32) -> Duration {
        Duration::from_millis(u64::from(n))
    }

    /// LI-1: a link that comes back in time is no cut, however often it breaks.
    #[test]
    fn a_link_that_comes_back_is_not_cut() {
        let mut links = Links::default();
        let mut now = 0;
        for _ in 0..10 {
            for _ in 1..BEATS {
                now += 50;
                assert!(!links.beat(ms(now), n(1), &[n(2)]));
                assert_eq!(links.victim(ms(now), &among(3), no_silence), None);
                assert!(!links.all_up(&[n(1), n(2)]) && links.all_up(&[n(2), n(3)]));
            }
            assert_eq!(links.describe().as_deref(), Some("node 1 does not reach node 2"));
            assert!(links.beat(ms(now), n(1), &[]) && links.are_quiet() && links.describe().is_none());
        }
        for _ in 0..BEATS {
            now += 50;
            links.beat(ms(now), n(1), &[n(2)]);
        }
        let now = ms(now);
        assert!(links.is_cut(now, n(2), n(1)) && !links.is_cut(now, n(2), n(3)));
        assert_eq!(links.victim(now, &among(3), no_silence), Some((n(2), vec![n(1)])), "of equals the newest");
        let silent = |node: NodeId| ms(if node == n(1) { 300 } else { 20 });
        assert_eq!(links.victim(now, &among(3), silent), Some((n(1), vec![n(2)])), "or the one that is silent");
        assert_eq!(links.victim(now, &[n(2), n(3)].into(), no_silence), None, "node 1 has no actors");
        links.forget(n(2));
        assert_eq!(links.victim(now, &among(3), no_silence), None);
    }

    /// LI-1: beats that waited for the same link come all at once; the last of them may say that all is well.
    #[test]
    fn beats_that_waited_make_no_cut() {
        let mut links = Links::default();
        for _ in 0..100 {
            links.beat(ms(7000), n(1), &[n(2), n(3)]);
        }
        assert_eq!(links.victim(ms(7040), &among(3), no_silence), None);
    }

    /// LI-2: the node that nobody reaches goes, whoever says so.
    #[test]
    fn the_one_that_is_cut_off_goes() {
        for asked in [true, false] {
            let mut links = Links::default();
            for beat in 0..BEATS {
                let now = ms(50 * beat);
                if asked {
                    links.beat(now, n(1), &[n(2), n(3), n(4)]);
                } else {
                    for other in [2, 3, 4] {
                        links.beat(now, n(other), &[n(1)]);
                    }
                }
            }
            assert_eq!(links.victim(ms(300), &among(4), no_silence), Some((n(1), vec![n(2), n(3), n(4)])));
        }
    }
}
