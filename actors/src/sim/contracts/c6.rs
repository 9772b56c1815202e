//! C6, local failure stays local: who survives on its node keeps its life, and its place until a commit, and no life computes
//! anything twice in a step; and a node that was told to end is let go only when nothing lives on it (LV-1). Checked at every
//! epoch, every job and every release.

use super::Broken;
use crate::ids::{Address, NodeId};
use crate::table::Table;
use std::collections::BTreeSet;

/// A job begins; the tally says whether its life has done it before in this step.
pub(in crate::sim) fn once(again: Option<String>) -> Result<(), Broken> {
    again.map_or(Ok(()), |what| Err(("C6", what)))
}

/// An epoch follows another, neither of a job that goes back: who survives on its node and has not failed keeps its life, and goes
/// elsewhere only with a commit (SU-6), whose record is the one before.
pub(in crate::sim) fn local(
    before: &Table,
    after: &Table,
    failed: &BTreeSet<Address>,
    with_commit: bool,
) -> Result<(), Broken> {
    for (actor, old) in &before.entries {
        let life = Address { actor: *actor, incarnation: old.incarnation };
        let stays = [before, after].iter().all(|table| table.nodes.contains_key(&old.node)) && !failed.contains(&life);
        let Some(new) = after.entries.get(actor).filter(|_| stays) else { continue };
        let what = match new.node == old.node {
            true if new.incarnation != old.incarnation => "has not failed, and has another life",
            false if !with_commit => "is moved without a commit",
            true | false => continue,
        };
        return Err(("C6", format!("{life} {what} in epoch {}", after.epoch)));
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
        assert!(local(&table, &table, &BTreeSet::new(), false).is_ok());
        assert_eq!(local(&table, &other, &BTreeSet::new(), false).unwrap_err().0, "C6");
        assert!(local(&table, &other, &BTreeSet::from([life]), false).is_ok());
        let mut elsewhere = table.clone();
        let away = table.nodes.keys().copied().find(|node| Some(*node) != table.node_of(stage)).unwrap();
        elsewhere.entries.get_mut(&stage).unwrap().node = away;
        let moves = |failed: &[Address], with_commit| {
            local(&table, &elsewhere, &failed.iter().copied().collect(), with_commit).is_ok()
        };
        assert_eq!([moves(&[], false), moves(&[], true), moves(&[life], false)], [false, true, true]);
        assert!(local(&table, &other, &BTreeSet::new(), true).is_err(), "nobody moved");
        let busy = table.entries.values().map(|entry| entry.node).max();
        assert_eq!(released(busy, &table).unwrap_err().0, "LV-1");
        assert!(released(Some(NodeId(999)), &table).is_ok() && released(None, &table).is_ok());
    }
}
