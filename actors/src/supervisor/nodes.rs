//! Nodes: how they come and come back, what their beats tell, how they are given up.

use super::{Happening, Supervisor, SupervisorEffect};
use crate::ids::NodeId;
use crate::message::Body;
use crate::plant::{Bug, planted};
use crate::table::NodeInfo;
use crate::tally::Operations;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Dead nodes that are remembered to have spoken.
const FENCED_MAX: usize = 1024;

/// Adds to the newest [`FENCED_MAX`] nodes. Gives whether it is new.
pub(super) fn remember(nodes: &mut BTreeSet<NodeId>, node: NodeId) -> bool {
    let new = nodes.insert(node);
    if nodes.len() > FENCED_MAX {
        nodes.pop_first();
    }
    new
}

impl Supervisor {
    pub(super) fn join(&mut self, info: NodeInfo) -> Vec<SupervisorEffect> {
        let node = NodeId(self.next_node);
        self.next_node += 1;
        self.membership.expect(self.now, node);
        self.work.insert(node, Default::default());
        self.table.nodes.insert(node, info.clone());
        let note = Happening::NodeJoined { node: node.0, address: info.address.clone() };
        let mut effects = vec![SupervisorEffect::Note(note)];
        effects.extend(self.settle(vec![SupervisorEffect::Welcome(node, info)]));
        effects
    }

    /// What has no place gets one on a node that reaches the others (SU-7), and more with the next commit.
    pub(super) fn admit(&mut self, node: NodeId) -> Vec<SupervisorEffect> {
        if !self.admitted.insert(node) {
            return Vec::new();
        }
        self.uneven = true;
        self.place(planted(Bug::MovedTooSoon));
        self.settle(Vec::new())
    }

    pub(super) fn returned(&mut self, node: NodeId) -> Vec<SupervisorEffect> {
        if !self.table.nodes.contains_key(&node) {
            return self.fence(node);
        }
        self.membership.expect(self.now, node);
        let mut then = vec![SupervisorEffect::Announce(Arc::new(self.table.clone()))];
        // The commit may have been logged and never sent. Nobody lacks that of the checkpoint from which all began.
        if let Some(last) = self.last.filter(|last| last.commit.step > self.table.base) {
            then.extend(self.reducers().map(|to| SupervisorEffect::Send(to, Body::Commit(last.commit))));
        }
        then.extend(self.audits_on(node));
        let mut effects = vec![SupervisorEffect::Note(Happening::NodeReturned { node: node.0 })];
        effects.extend(self.after_sync(then));
        effects
    }

    /// Takes a node out of the job. Gives whether it was in it.
    pub(super) fn forget(&mut self, node: NodeId) -> bool {
        if self.table.nodes.remove(&node).is_none() {
            return false;
        }
        self.table.leaving.remove(&node);
        self.membership.forget(node);
        self.speeds.forget(node);
        self.links.forget(node);
        self.admitted.remove(&node);
        self.work.remove(&node);
        true
    }

    /// A node speaks that is none any more: it is told, and people are told once.
    pub(super) fn fence(&mut self, node: NodeId) -> Vec<SupervisorEffect> {
        if self.released.contains(&node) {
            return self.after_sync(vec![SupervisorEffect::Release(node)]);
        }
        // The record of its death may be on its way still.
        let mut effects = self.after_sync(vec![SupervisorEffect::Fence(node)]);
        if remember(&mut self.fenced, node) {
            effects.push(SupervisorEffect::Note(Happening::NodeFenced { node: node.0 }));
        }
        effects
    }

    pub(super) fn heartbeat(&mut self, node: NodeId, done: Operations, down: &[NodeId]) -> Vec<SupervisorEffect> {
        if !self.table.nodes.contains_key(&node) {
            return self.fence(node);
        }
        self.membership.beat(self.now, node);
        // What a node had done before this life of the supervisor has been reported by an earlier one.
        self.work.entry(node).or_insert([done; 2])[0] = done;
        // It may not have heard yet that a node is gone.
        let down: Vec<NodeId> = down.iter().copied().filter(|other| self.table.nodes.contains_key(other)).collect();
        let healed = self.links.beat(self.now, node, &down);
        self.uneven |= healed;
        self.healed |= healed;
        if down.iter().any(|other| self.admitted.contains(other)) { Vec::new() } else { self.admit(node) }
    }

    /// Gives up a node that does not reach others. Beats that wait are handled before a tick, so that old ones decide nothing.
    pub(super) fn cut(&mut self) -> Vec<SupervisorEffect> {
        if self.links.are_quiet() {
            return Vec::new();
        }
        // Nodes without actors need no links.
        let busy = self.table.entries.values().map(|e| e.node).filter(|n| self.table.nodes.contains_key(n)).collect();
        let silence = |node| self.membership.silence(self.now, node);
        let Some((node, others)) = self.links.victim(self.now, &busy, silence) else { return Vec::new() };
        let down = self.links.since(node, &others).map_or(Duration::ZERO, |since| self.now.saturating_sub(since));
        let down = down.max(silence(node));
        let others: Vec<String> = others.iter().map(ToString::to_string).collect();
        self.dead(&[(node, format!("it has no link to {}", others.join(", ")), down)])
    }
}
