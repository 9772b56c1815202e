//! What a generator of faults has reached: kinds of faults, and which messages were lost to what. What is missing is what it is
//! blind for.

use super::plan::Fault;
use crate::message::Body;
use crate::wire::Unit;
use everstep_transport::Frame;
use std::collections::BTreeMap;

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Messages that were on their way, by kind and by what they were lost to.
    pub lost: BTreeMap<(&'static str, &'static str), u64>,
    /// Jobs that ended because nobody held their state and no checkpoint was whole.
    pub nothing_left: u64,
}

/// What messages are lost to.
const TO: [&str; 2] = ["their link", "their receiver's end"];

impl Coverage {
    pub(super) fn fault(&mut self, fault: Fault) {
        *self.faults.entry(fault.kind()).or_default() += 1;
    }

    /// A frame on its way is lost: to its link, or to the end of its receiver.
    pub(super) fn lose(&mut self, frame: &Frame<Unit>, receiver_ended: bool) {
        let to = TO[usize::from(receiver_ended)];
        let mut lose = |kind| *self.lost.entry((kind, to)).or_default() += 1;
        match frame {
            Frame::Data { unit: Unit::Bundle(bundle), .. } => bundle.iter().for_each(|e| lose(e.body.kind())),
            Frame::Data { unit: Unit::Control(_), .. } => lose("control"),
            Frame::Grant { .. } => lose("grant"),
        }
    }

    /// Adds another seed's.
    pub fn add(&mut self, other: &Self) {
        other.faults.iter().for_each(|(kind, n)| *self.faults.entry(kind).or_default() += n);
        self.nothing_left += other.nothing_left;
        other.lost.iter().for_each(|(key, n)| *self.lost.entry(*key).or_default() += n);
    }

    /// All that there could be, with how often it was: faults, then messages and what they were lost to.
    pub fn table(&self) -> Vec<(String, u64)> {
        let faults =
            Fault::KINDS.into_iter().map(|kind| (kind.to_owned(), self.faults.get(kind).copied().unwrap_or(0)));
        let kinds = Body::<()>::KINDS.into_iter().chain(["control", "grant"]);
        let lost = kinds
            .flat_map(|kind| TO.map(|to| (kind, to)))
            .map(|(kind, to)| (format!("{kind} lost to {to}"), self.lost.get(&(kind, to)).copied().unwrap_or(0)));
        let nothing_left = [("jobs of which nothing was left".to_owned(), self.nothing_left)];
        faults.chain(nothing_left).chain(lost).collect()
    }
}
