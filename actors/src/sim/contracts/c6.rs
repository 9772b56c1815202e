//! C6, local failure stays local: survivors keep their work, so no life computes anything twice in a step; and a node that was
//! told to end is let go only when nothing lives on it (LV-1). Checked at every job and every release.

use super::Broken;
use crate::ids::NodeId;
use crate::table::Table;

/// A job begins; the tally says whether its life has done it before in this step.
pub(in crate::sim) fn once(again: Option<String>) -> Result<(), Broken> {
    again.map_or(Ok(()), |what| Err(("C6", what)))
}

/// LV-1.
pub(in crate::sim) fn released(node: Option<NodeId>, table: &Table) -> Result<(), Broken> {
    let left = table.entries.iter().find(|(_, entry)| Some(entry.node) == node);
    left.map_or(Ok(()), |(actor, entry)| Err(("LV-1", format!("{actor} lives on {}, which was released", entry.node))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{materials, table};

    #[test]
    fn what_is_done_twice_or_let_go_too_soon_is_seen() {
        assert!(once(None).is_ok());
        assert_eq!(once(Some("again".to_owned())).unwrap_err().0, "C6");
        let table = table(&materials());
        let busy = table.entries.values().map(|entry| entry.node).max();
        assert_eq!(released(busy, &table).unwrap_err().0, "LV-1");
        assert!(released(Some(NodeId(999)), &table).is_ok() && released(None, &table).is_ok());
    }
}
