//! C6, local failure stays local: who survives on its node keeps its life, and no life computes anything twice in a step; and a node
//! that was told to end is let go only when nothing lives on it (LV-1). Checked at every epoch, every job and every release.

use super::Broken;
use crate::ids::{Address, NodeId};
use crate::table::Table;
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

/// LV-1.
pub(in crate::sim) fn released(node: Option<NodeId>, table: &Table) -> Result<(), Broken> {
    let left = table.entries.iter().find(|(_, entry)| Some(entry.node) == node);
    left.map_or(Ok(()), |(actor, entry)| Err(("LV-1", format!("{actor} lives on {}, which was released", entry.node))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ActorId;
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
        let busy = table.entries.values().map(|entry| entry.node).max();
        assert_eq!(released(busy, &table).unwrap_err().0, "LV-1");
        assert!(released(Some(NodeId(999)), &table).is_ok() && released(None, &table).is_ok());
    }
}
