//! Nodes that leave on purpose, and nodes that are held ready: both live, and have no actors in the end.
//!
//! - LV-1: a node that is to leave is dismissed only when no actor lives on it any more: nothing of a step is done again
//!   because it left.
//! - LV-2: the last node cannot leave: it works on until another comes.

use super::copies::Home;
use super::nodes::remember;
use super::{Happening, Supervisor, SupervisorEffect};
use crate::ids::NodeId;
use crate::plant::{Bug, planted};
use crate::table::Entry;
use std::collections::BTreeSet;

impl Supervisor {
    /// Nodes that actors may be on: neither to leave, nor cut off, nor spare. Spares are the newest of the nodes beyond those that the
    /// job wants.
    pub(super) fn working(&self) -> Vec<NodeId> {
        let mut working = self.ready();
        let mut count = self.nodes_wanted.max(working.len().saturating_sub(self.spares));
        if self.spec.thin_waits {
            // A spare of a domain that a step waits for (CO-6) is none.
            let mut domains = BTreeSet::new();
            let last = working.iter().position(|node| {
                domains.insert(self.table.domain_of(*node));
                domains.len() > self.spec.mirrors as usize
            });
            count = count.max(last.map_or(0, |last| last + 1));
        }
        working.truncate(count);
        working
    }

    /// The same, and spares after them.
    pub(super) fn ready(&self) -> Vec<NodeId> {
        let stays = |node: &NodeId| !self.table.leaving.contains(node);
        let mut staying: Vec<NodeId> = self.admitted.iter().copied().filter(stays).collect();
        // Those that have actors count before those that wait for some.
        let busy: BTreeSet<NodeId> = self.table.entries.values().map(|entry| entry.node).collect();
        staying.sort_by_key(|node| (!busy.contains(node), *node));
        if staying.is_empty() {
            return self.admitted.iter().copied().collect();
        }
        if !self.links.are_quiet() {
            // A node that does not reach one before it waits until it does.
            let mut linked: Vec<NodeId> = Vec::new();
            for node in staying {
                if linked.iter().all(|older| !self.links.is_cut(self.now, *older, node)) {
                    linked.push(node);
                }
            }
            staying = linked;
        }
        staying
    }

    fn is_empty(&self, node: NodeId) -> bool {
        !self.table.entries.values().any(|Entry { node: at, .. }| *at == node)
    }

    /// Whether something lives where it is not to stay: on a node that is to leave, or as a copy that is to.
    pub(super) fn is_moving(&self) -> bool {
        let working = self.working();
        let stays = working.iter().any(|n| !self.table.leaving.contains(n));
        (stays && self.table.leaving.iter().any(|node| !self.is_empty(*node)))
            || (0..self.spec.shards).any(|s| self.homes(s, &working).iter().any(|(_, home)| *home == Home::Leaving))
    }

    /// Whether no other node stays.
    fn is_last(&self, node: NodeId) -> bool {
        !self.admitted.iter().any(|other| *other != node && !self.table.leaving.contains(other))
    }

    /// What an operator is told who wants a node to leave.
    pub fn parting(&self, node: NodeId) -> String {
        let actors = self.table.actors_of(node).count();
        if !self.table.nodes.contains_key(&node) {
            let nodes: Vec<String> = self.table.nodes.keys().map(ToString::to_string).collect();
            format!("there is no {node}: there are {}", nodes.join(", "))
        } else if self.table.leaving.contains(&node) {
            format!("{node} is leaving already; {actors} actors live on it")
        } else if self.is_last(node) {
            format!("{node} is to leave, and there is no other: it works on until one comes")
        } else {
            format!("{node} leaves: {actors} actors move with the next commits")
        }
    }

    /// A node is to leave.
    pub(super) fn leave(&mut self, node: NodeId) -> Vec<SupervisorEffect> {
        let told = self.parting(node);
        if !self.table.nodes.contains_key(&node) || !self.table.leaving.insert(node) {
            return Vec::new();
        }
        let actors = self.table.actors_of(node).count();
        let mut effects = vec![SupervisorEffect::Note(Happening::NodeLeaving { node: node.0, actors })];
        if self.is_last(node) {
            effects.push(SupervisorEffect::Note(Happening::Waiting { why: told }));
        } else {
            self.place(false);
        }
        effects.extend(self.settle(Vec::new()));
        effects
    }

    /// Takes nodes that are to leave and are empty out of the table. Gives their dismissals, which follow the table's sync.
    pub(super) fn depart(&mut self) -> Vec<SupervisorEffect> {
        let empty = |node: &NodeId| self.is_empty(*node) || planted(Bug::ReleasedWithActors);
        let empty: BTreeSet<NodeId> = self.table.leaving.iter().copied().filter(empty).collect();
        let mut effects = Vec::new();
        for node in empty {
            if self.table.nodes.len() == 1 {
                break;
            }
            self.forget(node);
            remember(&mut self.released, node);
            effects.push(SupervisorEffect::Release(node));
            effects.push(SupervisorEffect::Note(Happening::NodeLeft { node: node.0 }));
        }
        effects
    }
}
