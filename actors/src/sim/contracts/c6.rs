//! C6, local failure stays local: who survives on its node keeps its life and its place, unless nodes came or went, and no life
//! computes anything twice in a step; and a node
//! that was told to end is let go only when nothing lives on it (LV-1). Checked at every epoch, every job and every release.

use super::Broken;
use crate::ids::{ActorId, Address, NodeId};
use crate::table::{Entry, Table};
use std::collections::BTreeSet;

/// A job begins; the tally says whether its life has done it before in this step.
pub(in crate::sim) fn once(again: Option<String>) -> Result<(), Broken> {
    again.map_or(Ok(()), |what| Err(("C6", what)))
}

/// An epoch follows another, neither of a job that goes back: a life ends only where it failed, or when its actor moves.
pub(in crate::sim) fn local(before: &Table, after: &Table, failed: &BTreeSet<Address>) -> Result<(), Broken> {
    for (actor, old) in &before.entries {
        let Some(new) = after.entries.get(actor).filter(|new| new.node == old.node) else { continue };
        let life = Address { actor: *actor, incarnation: old.incarnation };
        let survives =
            [before, after].iter().all(|table| table.nodes.contains_key(&old.node)) && !failed.contains(&life);
        if survives && new.incarnation != old.incarnation {
            return Err(("C6", format!("{life} has not failed, and has another life in epoch {}", after.epoch)));
        }
    }
    Ok(())
}

/// The first life that survives on its node, and has not failed, and whose actor goes elsewhere in the next epoch: a move of which
/// there must be a reason.
pub(in crate::sim) fn moved(before: &Table, after: &Table, failed: &BTreeSet<Address>) -> Option<Address> {
    let of = |(actor, old): (&ActorId, &Entry)| {
        let life = Address { actor: *actor, incarnation: old.incarnation };
        let elsewhere = after.entries.get(actor).is_some_and(|new| new.node != old.node);
        (elsewhere && after.nodes.contains_key(&old.node) && !failed.contains(&life)).then_some(life)
    };
    before.entries.iter().find_map(of)
}

/// Why actors that survive may be moved: each reason for one epoch.
#[derive(Debug, Default)]
pub(in crate::sim) struct Reasons {
    /// The supervisor or the job began anew: what was due before may be done.
    pub(in crate::sim) anew: bool,
    /// Nodes came, went, or are to leave.
    pub(in crate::sim) nodes: bool,
    /// Some do not reach each other, or do again.
    pub(in crate::sim) links: bool,
}

impl Reasons {
    /// A life was moved in an epoch.
    pub(in crate::sim) fn use_one(&mut self, moved: Address, epoch: u64) -> Result<(), Broken> {
        let reason = [&mut self.nodes, &mut self.links, &mut self.anew].into_iter().find(|reason| **reason);
        match reason {
            Some(reason) => *reason = false,
            None => return Err(("C6", format!("{moved} is moved in epoch {epoch}, for which there is no reason"))),
        }
        Ok(())
    }
}

/// LV-1.
pub(in crate::sim) fn released(node: Option<NodeId>, table: &Table) -> Result<(), Broken> {
    let left = table.entries.iter().find(|(_, entry)| Some(entry.node) == node);
    left.map_or(Ok(()), |(actor, entry)| Err(("LV-1", format!("{actor} lives on {}, which was released", entry.node))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{materials, replace, table};

    #[test]
    fn what_is_done_twice_or_let_go_too_soon_is_seen() {
        assert!(once(None).is_ok());
        assert_eq!(once(Some("again".to_owned())).unwrap_err().0, "C6");
        let table = table(&materials());
        let stage = ActorId::Stage { lane: 0, stage: 0 };
        let (life, other) = (table.address(stage).unwrap(), replace(&table, stage));
        assert!(local(&table, &table, &BTreeSet::new()).is_ok());
        assert_eq!(local(&table, &other, &BTreeSet::new()).unwrap_err().0, "C6");
        assert!(local(&table, &other, &BTreeSet::from([life])).is_ok());
        let mut elsewhere = table.clone();
        let away = table.nodes.keys().copied().find(|node| Some(*node) != table.node_of(stage)).unwrap();
        elsewhere.entries.get_mut(&stage).unwrap().node = away;
        assert_eq!(moved(&table, &elsewhere, &BTreeSet::new()), Some(life));
        assert_eq!(moved(&table, &elsewhere, &BTreeSet::from([life])), None);
        assert_eq!(moved(&table, &other, &BTreeSet::new()), None);
        let mut reasons = Reasons { nodes: true, ..Reasons::default() };
        assert!(reasons.use_one(life, 2).is_ok());
        assert_eq!(reasons.use_one(life, 3).unwrap_err().0, "C6");
        let busy = table.entries.values().map(|entry| entry.node).max();
        assert_eq!(released(busy, &table).unwrap_err().0, "LV-1");
        assert!(released(Some(NodeId(999)), &table).is_ok() && released(None, &table).is_ok());
    }
}
