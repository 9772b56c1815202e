//! What the control log holds. Records are read by the next life of the supervisor.

use crate::coded;
use crate::ids::Step;
use crate::message::Commit;
use crate::table::Table;
use everstep_checkpoint::RECORD_MAX;
use serde::{Deserialize, Serialize};

/// The first byte of a record: of the form of what follows. Records of the first programs had none, and began with 0 or 1.
const VERSION: u8 = 2;

/// Records of the control log after which a shorter one that says the same ([`Record::compacted`]) takes its place.
pub(crate) const RECORDS_MAX: usize = 1000;

/// A committed step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CommitRecord {
    /// The numbers that every shard gets.
    pub commit: Commit,
    /// Mean loss of the step's targets.
    pub loss: f64,
    /// Mean loss of multi-token prediction's targets, if there is any.
    pub mtp_loss: Option<f64>,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// The fewest domains in which a shard was safe.
    pub copies: u32,
    /// Samples that every copy of every shard counted in its sums.
    pub samples: u64,
}

/// One decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// A new epoch.
    Epoch {
        /// Its table.
        table: Table,
        /// The number that the next node gets.
        next_node: u64,
    },
    /// A step is committed.
    Commit(CommitRecord),
    /// A node computed wrongly, perhaps for a while: fingerprints of steps after this one, which are done again, may be others.
    Doubt(Step),
}

impl Record {
    /// The shortest log that says the same.
    pub fn compacted(log: &[Self]) -> Vec<Self> {
        let epoch = log.iter().rev().find(|r| matches!(r, Self::Epoch { .. }));
        // A commit before a way back is not one any more.
        let went_back =
            |r: &Self| matches!(r, Self::Epoch { table, .. } if table.primaries.iter().all(Option::is_none));
        let since = log.iter().rposition(went_back).map_or(0, |at| at + 1);
        let commit = log[since..].iter().rev().find(|r| matches!(r, Self::Commit(_)));
        epoch.into_iter().chain(commit).chain(unsettled(log)).cloned().collect()
    }

    /// As the log has it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        coded::encode(VERSION, self)
    }

    /// Reads a record as [`Record::encode`] writes it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        coded::decode::<Self, RECORD_MAX>(VERSION, bytes)
    }
}

/// The last doubt of a log, if what it is about may not have been done again. A commit comes after the report of the step
/// before it, and the first step that is reported again takes the place of all reports since.
pub(super) fn unsettled(log: &[Record]) -> Option<&Record> {
    let at = log.iter().rposition(|r| matches!(r, Record::Doubt(_)))?;
    let Record::Doubt(after) = &log[at] else { return None };
    let done = |r: &Record| matches!(r, Record::Commit(c) if c.commit.step > after + 1);
    (!log[at..].iter().any(done)).then(|| &log[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_another_form_are_named_not_misread() {
        let record = Record::Epoch { table: Table::default(), next_node: 7 };
        let bytes = record.encode();
        assert_eq!(Record::decode(&bytes), Ok(record));
        for other in [&bytes[1..], &[], &[9, 9]] {
            assert!(Record::decode(other).unwrap_err().contains("another version"), "{other:?}");
        }
        assert!(Record::decode(&bytes[..bytes.len() - 1]).unwrap_err().contains("cannot be decoded"));
    }
}
