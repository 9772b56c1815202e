//! C4, fenced: an actor never gets a message of or to a life that its node knows to be over. Checked at every delivery.

use super::Broken;
use crate::ids::{ActorId, Address};
use crate::message::Envelope;
use crate::table::Table;

/// A message of a life reaches an actor on a node with this table.
pub(in crate::sim) fn fenced(to: ActorId, from: &Address, table: &Table) -> Result<(), Broken> {
    let known = table.address(from.actor);
    if known == Some(*from) {
        return Ok(());
    }
    Err(("C4", format!("{to} got a message of {from}, but the table of epoch {} has {known:?}", table.epoch)))
}

/// The same for rows that reach a host.
pub(in crate::sim) fn fenced_batch(batch: &[Envelope], table: &Table) -> Result<(), Broken> {
    batch.iter().try_for_each(|e| {
        fenced(e.to.actor, &e.from, table)?;
        fenced(e.from.actor, &e.to, table)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{address, materials, table};

    #[test]
    fn another_life_is_seen() {
        let (to, from) = (ActorId::Supervisor, ActorId::Stage { lane: 0, stage: 0 });
        let table = table(&materials());
        let known = table.address(from).unwrap();
        assert!(fenced(to, &known, &table).is_ok());
        assert_eq!(fenced(to, &address(from, known.incarnation.0 + 1), &table).unwrap_err().0, "C4");
    }
}
