//! C6, local failure stays local: who survives on its node keeps its life, and its place until a commit, and no life computes
//! anything twice in a step; and a node
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

/// An epoch follows another, neither of a job that goes back: who survives on its node and has not failed goes elsewhere only with a
/// commit (SU-6), whose record is the one before.
pub(in crate::sim) fn stays(
    before: &Table,
    after: &Table,
    failed: &BTreeSet<Address>,
    with_commit: bool,
) -> Result<(), Broken> {
    let moved = |(actor, old): (&ActorId, &Entry)| {
        let life = Address { actor: *actor, incarnation: old.incarnation };
        let elsewhere = after.entries.get(actor).is_some_and(|new| new.node != old.node);
        (elsewhere && after.nodes.contains_key(&old.node) && !failed.contains(&life)).then_some(life)
    };
    let moved = before.entries.iter().find_map(moved).filter(|_| !with_commit);
    moved.map_or(Ok(()), |life| Err(("C6", format!("{life} is moved in epoch {} without a commit", after.epoch))))
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
        let moves = |failed: &[Address], with_commit| {
            stays(&table, &elsewhere, &failed.iter().copied().collect(), with_commit).is_ok()
        };
        assert_eq!([moves(&[], false), moves(&[], true), moves(&[life], false)], [false, true, true]);
        assert!(stays(&table, &other, &BTreeSet::new(), false).is_ok());
        let busy = table.entries.values().map(|entry| entry.node).max();
        assert_eq!(released(busy, &table).unwrap_err().0, "LV-1");
        assert!(released(Some(NodeId(999)), &table).is_ok() && released(None, &table).is_ok());
    }
}
