//! C4, fenced: an actor never gets a message of or to a life that its process knows to be over. Checked whenever messages come to a
//! process, the supervisor's too, and at every delivery on a node.

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

/// Messages among these that are of or to a life that is over by this table.
pub(in crate::sim) fn stale(bundle: &[Envelope], table: &Table) -> u64 {
    let is_over = |of: &Address| table.address(of.actor).is_some_and(|now| of.incarnation < now.incarnation);
    bundle.iter().filter(|e| is_over(&e.from) || is_over(&e.to)).count() as u64
}

/// So many were stale, and so many were refused.
pub(in crate::sim) fn refused(stale: u64, refused: u64) -> Result<(), Broken> {
    let what = || format!("of {stale} messages of or to lives that are over {refused} were refused");
    if refused >= stale { Ok(()) } else { Err(("C4", what())) }
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
    use crate::message::Body;
    use crate::testing::{address, materials, table};

    #[test]
    fn another_life_is_seen() {
        let (to, from) = (ActorId::Supervisor, ActorId::Stage { lane: 0, stage: 0 });
        let table = table(&materials());
        let known = table.address(from).unwrap();
        assert!(fenced(to, &known, &table).is_ok());
        assert_eq!(fenced(to, &address(from, known.incarnation.0 + 1), &table).unwrap_err().0, "C4");
        let envelope = |from: Address, to: Address| Envelope { from, to, body: Body::Ready };
        let old = address(from, known.incarnation.0 - 1);
        let bundle = [envelope(old, known), envelope(known, old), envelope(known, known)];
        assert_eq!(stale(&bundle, &table), 2);
        assert!(refused(2, 2).is_ok() && refused(2, 1).is_err());
    }
}
