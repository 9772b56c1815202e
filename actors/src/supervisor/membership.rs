//! Leases: a node is alive while it was heard of within [`LEASE`].
//!
//! - MB-1: a node expires only if a whole lease went by without a word, as the supervisor saw time.
//! - MB-2: the supervisor's own stalls don't count: time that passed between two looks beyond
//!   [`LOOK_MAX`] is given back to every node.

use crate::ids::NodeId;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a node may be silent.
pub(crate) const LEASE: Duration = Duration::from_millis(1500);
/// Nodes that come back to a new life of the supervisor get so much more: they must find it first.
pub(crate) const RETURN: Duration = Duration::from_millis(2000);
/// The supervisor looks at least this often unless it was stalled itself.
pub(crate) const LOOK_MAX: Duration = Duration::from_millis(250);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Membership {
    heard: BTreeMap<NodeId, Duration>,
    looked: Duration,
}

impl Membership {
    /// A node was heard of.
    pub(crate) fn heard(&mut self, now: Duration, node: NodeId) {
        self.heard.insert(node, now);
    }

    /// A node is gone.
    pub(crate) fn forget(&mut self, node: NodeId) {
        self.heard.remove(&node);
    }

    /// Nodes whose lease has run out.
    pub(crate) fn expired(&mut self, now: Duration) -> Vec<NodeId> {
        let stall = now.saturating_sub(self.looked).saturating_sub(LOOK_MAX);
        self.looked = now;
        for heard in self.heard.values_mut() {
            *heard = (*heard + stall).min(now.max(*heard));
        }
        self.heard.iter().filter(|(_, heard)| now.saturating_sub(**heard) >= LEASE).map(|(node, _)| *node).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// MB-1.
    #[test]
    fn a_silent_node_expires_and_a_talking_one_does_not() {
        let mut m = Membership::default();
        m.heard(ms(0), NodeId(1));
        m.heard(ms(0), NodeId(2));
        for t in (100..=1400).step_by(100) {
            assert!(m.expired(ms(t)).is_empty());
            m.heard(ms(t), NodeId(2));
        }
        assert_eq!(m.expired(ms(1500)), [NodeId(1)]);
    }

    /// MB-2.
    #[test]
    fn the_supervisors_own_stall_kills_nobody() {
        let mut m = Membership::default();
        m.heard(ms(0), NodeId(1));
        assert!(m.expired(ms(100)).is_empty());
        assert!(m.expired(ms(60_000)).is_empty());
        m.heard(ms(60_050), NodeId(1));
        assert!(m.expired(ms(60_200)).is_empty());
    }
}
