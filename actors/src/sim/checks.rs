//! The contracts, as the simulator checks them. Each is stated over what can be seen from outside the
//! cores, so that a bug in a core cannot hide itself.

use crate::ids::{ActorId, NodeId, Step};
use crate::message::Envelope;
use crate::supervisor::{Record, Report};
use crate::table::Table;

/// A broken contract and what broke it.
pub(super) type Broken = (&'static str, String);

/// C1: the fingerprint of a committed step is that of the undisturbed run.
pub(super) fn same_bits(report: &Report, reference: &[String]) -> Result<(), Broken> {
    let step = report.commit.commit.step as usize;
    match reference.get(step - 1) {
        Some(expected) if *expected == report.fingerprint => Ok(()),
        expected => Err(("C1", format!("step {step} has fingerprint {}, expected {expected:?}", report.fingerprint))),
    }
}

/// C2: what was announced as committed is on disk.
pub(super) fn durable(announced: Step, disk: &[Record]) -> Result<(), Broken> {
    // A record from before a way back stands for nothing any more.
    let went_back =
        |r: &Record| matches!(r, Record::Epoch { table, .. } if table.primaries.iter().all(Option::is_none));
    let since = disk.iter().rposition(went_back).map_or(0, |at| at + 1);
    let on_disk = disk[since..].iter().any(|r| matches!(r, Record::Commit(c) if c.commit.step == announced));
    if on_disk { Ok(()) } else { Err(("C2", format!("step {announced} was announced, but its record is not on disk"))) }
}

/// C2: a checkpoint is made known only once all of it is stored, with the bits of its step.
pub(super) fn stored(step: Step, read: Result<String, String>, reference: &[String]) -> Result<(), Broken> {
    let expected = reference.get(step as usize - 1);
    match read {
        Ok(fingerprint) if Some(&fingerprint) == expected => Ok(()),
        got => Err(("C2", format!("the checkpoint of step {step} was published with {got:?}, expected {expected:?}"))),
    }
}

/// C3: steps are reported once each and in order. That every sample is in them once is checked before
/// each commit by the commit core, whose refusal ends the job, which is a violation here.
pub(super) fn in_order(report: &Report, before: Step) -> Result<(), Broken> {
    let step = report.commit.commit.step;
    if step == before + 1 { Ok(()) } else { Err(("C3", format!("step {step} was reported after step {before}"))) }
}

/// C4: an actor never gets a message of or to a life that its node knows to be over.
pub(super) fn fenced(envelope: (ActorId, &crate::ids::Address), table: &Table) -> Result<(), Broken> {
    let (to, from) = envelope;
    let known = table.address(from.actor);
    if known == Some(*from) {
        return Ok(());
    }
    Err(("C4", format!("{to} got a message of {from}, but the table of epoch {} has {known:?}", table.epoch)))
}

/// The same for rows that reach a host.
pub(super) fn fenced_batch(batch: &[Envelope], table: &Table) -> Result<(), Broken> {
    batch.iter().try_for_each(|e| {
        fenced((e.to.actor, &e.from), table)?;
        fenced((e.from.actor, &e.to), table)
    })
}

/// C6: survivors keep their work: no life computes anything twice in a step.
pub(super) fn once(again: Option<String>) -> Result<(), Broken> {
    again.map_or(Ok(()), |what| Err(("C6", what)))
}

/// LV-1: a node that was told to end is released only when nothing lives on it.
pub(super) fn released(node: Option<NodeId>, table: &Table) -> Result<(), Broken> {
    let left = table.entries.iter().find(|(_, entry)| Some(entry.node) == node);
    left.map_or(Ok(()), |(actor, entry)| Err(("LV-1", format!("{actor} lives on {}, which was released", entry.node))))
}

/// C5: no queue is longer than its bound.
pub(super) fn bounded(what: impl Fn() -> String, length: usize, bound: usize) -> Result<(), Broken> {
    if length <= bound { Ok(()) } else { Err(("C5", format!("{} holds {length}, more than {bound}", what()))) }
}
