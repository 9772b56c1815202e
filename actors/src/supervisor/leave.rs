//! Nodes that leave on purpose, and nodes that are held ready: both live, and have no actors in the end.
//!
//! - LV-1: a node that is to leave is dismissed only when no actor lives on it any more: nothing of a step is done again
//!   because it left.
//! - LV-2: the last node cannot leave: it works on until another comes.

use super::{FENCED_MAX, Happening, Supervisor, SupervisorEffect};
use crate::ids::NodeId;
use crate::table::Entry;
use std::collections::BTreeSet;

impl Supervisor {
    /// Nodes that actors may be on: neither to leave, nor cut off, nor spare. Spares are the newest of the nodes beyond those that the
    /// job wants.
    pub(super) fn working(&self) -> Vec<NodeId> {
        let stays = |node: &NodeId| !self.table.leaving.contains(node);
        let mut staying: Vec<NodeId> = self.admitted.iter().copied().filter(stays).collect();
        // Those that have actors count before those that wait for some.
        staying.sort_by_key(|node| (self.is_empty(*node), *node));
        if staying.is_empty() {
            return self.admitted.iter().copied().collect();
        }
        // A node that does not reach one before it waits until it does.
        let mut linked: Vec<NodeId> = Vec::new();
        for node in staying {
            if linked.iter().all(|older| !self.links.is_cut(self.now, *older, node)) {
                linked.push(node);
            }
        }
        let mut staying = linked;
        staying.truncate(self.nodes_wanted.max(staying.len().saturating_sub(self.spares)));
        staying
    }

    fn is_empty(&self, node: NodeId) -> bool {
        !self.table.entries.values().any(|Entry { node: at, .. }| *at == node)
    }

    /// Whether a node is to leave and actors still live on it.
    pub(super) fn is_leaving(&self) -> bool {
        self.working().iter().any(|n| !self.table.leaving.contains(n))
            && self.table.leaving.iter().any(|node| !self.is_empty(*node))
    }

    /// A node is to leave. Gives what an operator is told.
    pub fn drain(&mut self, node: NodeId) -> (String, Vec<SupervisorEffect>) {
        if !self.table.nodes.contains_key(&node) {
            let nodes: Vec<String> = self.table.nodes.keys().map(ToString::to_string).collect();
            return (format!("there is no {node}: there are {}", nodes.join(", ")), Vec::new());
        }
        let actors = self.table.actors_of(node).count();
        if !self.table.leaving.insert(node) {
            return (format!("{node} is leaving already; {actors} actors live on it"), Vec::new());
        }
        let mut effects = vec![SupervisorEffect::Note(Happening::NodeLeaving { node: node.0, actors })];
        if self.working().iter().all(|n| self.table.leaving.contains(n)) {
            let why = format!("{node} is to leave, and there is no other: it works on until one comes");
            effects.push(SupervisorEffect::Note(Happening::Waiting { why: why.clone() }));
            effects.extend(self.settle(Vec::new()));
            return (why, effects);
        }
        self.place(false);
        effects.extend(self.settle(Vec::new()));
        (format!("{node} leaves: {actors} actors move with the next commits"), effects)
    }

    /// Takes nodes that are to leave and are empty out of the table. Gives their dismissals, which follow the table's sync.
    pub(super) fn depart(&mut self) -> Vec<SupervisorEffect> {
        let empty: BTreeSet<NodeId> = self.table.leaving.iter().copied().filter(|n| self.is_empty(*n)).collect();
        let mut effects = Vec::new();
        for node in empty {
            if self.table.nodes.len() == 1 {
                break;
            }
            self.table.leaving.remove(&node);
            if self.table.nodes.remove(&node).is_some() {
                self.membership.forget(node);
                self.admitted.remove(&node);
                self.links.forget(node);
                self.work.remove(&node);
                self.released.insert(node);
                if self.released.len() > FENCED_MAX {
                    self.released.pop_first();
                }
                effects.push(SupervisorEffect::Release(node));
                effects.push(SupervisorEffect::Note(Happening::NodeLeft { node: node.0 }));
            }
        }
        effects
    }
}
