//! Links between nodes, as their beats tell of them. Two nodes that reach the supervisor and not each other would wait for
//! each other for ever: one of them is given up.
//!
//! - LI-1: a link counts as cut once one of its ends has said so in [`BEATS`] beats in a row: links that break come back
//!   sooner. Beats are counted, not time: the supervisor's own stall makes no cut.
//! - LI-2: the node with the most cut links is given up, of equals the one that was silent longest, then the newest. So a
//!   node that is cut off from all others goes, not those.

use crate::ids::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// See LI-1.
const BEATS: u32 = 6;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// By node and the node that it does not reach: beats in a row.
    down: BTreeMap<NodeId, BTreeMap<NodeId, u32>>,
}

impl Links {
    /// A node's beat names the nodes that it does not reach. Gives whether it reaches one again.
    pub(super) fn beat(&mut self, node: NodeId, down: &[NodeId]) -> bool {
        let before = self.down.remove(&node).unwrap_or_default();
        let now: BTreeMap<NodeId, u32> =
            down.iter().map(|other| (*other, before.get(other).map_or(1, |beats| (beats + 1).min(BEATS)))).collect();
        let again = before.keys().any(|other| !now.contains_key(other));
        if !now.is_empty() {
            self.down.insert(node, now);
        }
        again
    }

    /// A node is gone.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.down.remove(&node);
        for others in self.down.values_mut() {
            others.remove(&node);
        }
    }

    fn beats(&self, a: NodeId, b: NodeId) -> u32 {
        let of = |a: NodeId, b: NodeId| self.down.get(&a).and_then(|others| others.get(&b)).copied().unwrap_or(0);
        of(a, b).max(of(b, a))
    }

    /// Whether the link of two nodes is cut (LI-1).
    pub(super) fn is_cut(&self, a: NodeId, b: NodeId) -> bool {
        self.beats(a, b) == BEATS
    }

    /// Whether every two of these nodes reach each other.
    pub(super) fn all_up(&self, nodes: &[NodeId]) -> bool {
        let up = |(n, a): (usize, &NodeId)| nodes[n + 1..].iter().all(|b| self.beats(*a, *b) == 0);
        self.down.is_empty() || nodes.iter().enumerate().all(up)
    }

    /// The node among these that is to be given up, and the nodes that it does not reach (LI-2).
    pub(super) fn victim(
        &self,
        nodes: &BTreeSet<NodeId>,
        silence: impl Fn(NodeId) -> Duration,
    ) -> Option<(NodeId, Vec<NodeId>)> {
        if self.down.is_empty() {
            return None;
        }
        let cut = |a: NodeId| nodes.iter().copied().filter(|b| *b != a && self.is_cut(a, *b)).collect::<Vec<_>>();
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

    /// LI-1: a link that comes back in time is no cut, however often it breaks.
    #[test]
    fn a_link_that_comes_back_is_not_cut() {
        let mut links = Links::default();
        for _ in 0..10 {
            for _ in 1..BEATS {
                assert!(!links.beat(n(1), &[n(2)]));
                assert_eq!(links.victim(&among(3), no_silence), None);
                assert!(!links.all_up(&[n(1), n(2)]) && links.all_up(&[n(2), n(3)]));
            }
            assert!(links.beat(n(1), &[]));
        }
        for _ in 0..BEATS {
            links.beat(n(1), &[n(2)]);
        }
        assert!(links.is_cut(n(2), n(1)) && !links.is_cut(n(2), n(3)));
        assert_eq!(links.victim(&among(3), no_silence), Some((n(2), vec![n(1)])), "of equals the newest");
        let silent = |node: NodeId| Duration::from_millis(if node == n(1) { 300 } else { 20 });
        assert_eq!(links.victim(&among(3), silent), Some((n(1), vec![n(2)])), "or the one that is silent");
        assert_eq!(links.victim(&[n(2), n(3)].into(), no_silence), None, "node 1 has no actors");
        links.forget(n(2));
        assert_eq!(links.victim(&among(3), no_silence), None);
    }

    /// LI-2: the node that nobody reaches goes, whoever says so.
    #[test]
    fn the_one_that_is_cut_off_goes() {
        for asked in [true, false] {
            let mut links = Links::default();
            for _ in 0..BEATS {
                if asked {
                    links.beat(n(1), &[n(2), n(3), n(4)]);
                } else {
                    for other in [2, 3, 4] {
                        links.beat(n(other), &[n(1)]);
                    }
                }
            }
            assert_eq!(links.victim(&among(4), no_silence), Some((n(1), vec![n(2), n(3), n(4)])));
        }
    }
}
