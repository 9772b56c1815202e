//! What the control log holds. Records are read by the next life of the supervisor.

use crate::coded;
use crate::ids::{ActorId, NodeId, Step};
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
    /// A node computed wrongly, perhaps for a while: fingerprints of steps after this one, which are done again, may be others. The
    /// epoch that goes back follows.
    Doubt(Step),
    /// An actor's work of a step is made again: what its lives made of it so far, and where.
    Audit {
        /// The step, which is not committed.
        step: Step,
        /// Who is audited.
        actor: ActorId,
        /// Hashes by node, in order.
        made: Vec<(NodeId, u128)>,
    },
    /// For this reason the job goes back to its newest checkpoint, once it is known which that is (SU-9).
    Back(String),
}

impl Record {
    /// The shortest log that says the same.
    pub fn compacted(log: &[Self]) -> Vec<Self> {
        let epoch = log.iter().rev().find(|r| matches!(r, Self::Epoch { .. }));
        let commit = last_commit(log);
        let doubt = unsettled(log);
        // A doubt after which the job went back stays before that.
        let is_doubted = doubt.is_some_and(|doubt| is_pending(log, doubt));
        let back = log.iter().rev().find(|r| r.goes_back()).filter(|back| !is_doubted && Some(*back) != epoch);
        let [first, last] = if is_doubted { [None, doubt] } else { [doubt, None] };
        let all = first.into_iter().chain(back.filter(|_| first.is_some())).chain(epoch).chain(commit);
        all.chain(last).chain(wish(log)).chain(unfinished(log)).cloned().collect()
    }

    /// How far the job of a log has come: what is stored of later steps is of what it went back from.
    pub(crate) fn reached(log: &[Self]) -> Option<Step> {
        if let Some(doubt @ Self::Doubt(after)) = unsettled(log)
            && is_pending(log, doubt)
        {
            return Some(*after);
        }
        let commit = |r: &Self| if let Self::Commit(c) = r { Some(c.commit.step) } else { None };
        let base = |r: &Self| if let Self::Epoch { table, .. } = r { Some(table.base) } else { None };
        last_commit(log).and_then(commit).or_else(|| log.iter().rev().find_map(base))
    }

    /// The step after which what the job of a log has reported stands for nothing, if there is one.
    pub(crate) fn doubted(log: &[Self]) -> Option<Step> {
        if let Self::Doubt(after) = unsettled(log)? { Some(*after) } else { None }
    }

    /// Whether it sends everybody back to a checkpoint: then no shard has a primary.
    fn goes_back(&self) -> bool {
        matches!(self, Self::Epoch { table, .. } if table.goes_back())
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

/// The last commit of a log. One before a way back is not one any more, but for that of the step to which it goes: that may not be
/// reported yet.
pub(super) fn last_commit(log: &[Record]) -> Option<&Record> {
    log.iter().fold(None, |last, record| match record {
        Record::Commit(_) => Some(record),
        Record::Epoch { table, .. } if table.goes_back() => {
            last.filter(|last| matches!(last, Record::Commit(commit) if commit.commit.step == table.base))
        }
        Record::Epoch { .. } | Record::Doubt(_) | Record::Audit { .. } | Record::Back(_) => last,
    })
}

/// The last doubt of a log, if what it is about may not have been done again. A commit comes after the report of the step
/// before it, and the first step that is reported again takes the place of all reports since.
fn unsettled(log: &[Record]) -> Option<&Record> {
    let at = log.iter().rposition(|r| matches!(r, Record::Doubt(_)))?;
    let Record::Doubt(after) = &log[at] else { return None };
    let done = |r: &Record| matches!(r, Record::Commit(c) if c.commit.step > after + 1);
    (!log[at..].iter().any(done)).then(|| &log[at])
}

/// Whether the job has not gone back since a record of its log: its author died before that.
fn is_pending(log: &[Record], record: &Record) -> bool {
    let at = log.iter().rposition(|r| r == record);
    at.is_some_and(|at| !log[at..].iter().any(Record::goes_back))
}

/// The wish to go back with which a log ends.
fn wish(log: &[Record]) -> Option<&Record> {
    log.iter().rev().find(|r| matches!(r, Record::Back(_))).filter(|back| is_pending(log, back))
}

/// Why the job of a log is to go back, if it is and has not done so.
pub(super) fn pending(log: &[Record]) -> Option<String> {
    let doubt = unsettled(log).filter(|doubt| is_pending(log, doubt));
    let audit = doubt.map(|_| "an audit had found a difference when the supervisor ended".to_owned());
    audit.or_else(|| if let Record::Back(why) = wish(log)? { Some(why.clone()) } else { None })
}

/// The audit that was under way when a log ends.
pub(super) fn unfinished(log: &[Record]) -> Option<&Record> {
    let at = log.iter().rposition(|r| matches!(r, Record::Audit { .. }))?;
    let over = |r: &Record| matches!(r, Record::Commit(_) | Record::Doubt(_)) || r.goes_back();
    (!log[at..].iter().any(over)).then(|| &log[at])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::committed;

    fn epoch(primary: Option<u32>) -> Record {
        Record::Epoch { table: Table { primaries: vec![primary], ..Table::default() }, next_node: 1 }
    }

    #[test]
    fn what_is_under_way_outlives_a_log_that_is_made_short() {
        let audit = Record::Audit { step: 3, actor: ActorId::Stage { lane: 0, stage: 0 }, made: vec![(NodeId(1), 7)] };
        let log = [epoch(Some(0)), Record::Doubt(0), epoch(None), epoch(Some(0)), audit.clone(), epoch(Some(0))];
        for log in [log.to_vec(), Record::compacted(&log)] {
            assert_eq!((unsettled(&log), pending(&log)), (Some(&Record::Doubt(0)), None), "{log:?}");
            assert_eq!(unfinished(&log), Some(&audit));
            let back: Vec<Record> = log.into_iter().chain([epoch(None)]).collect();
            assert_eq!(unfinished(&back), None);
        }
        let log = [epoch(None), epoch(Some(0)), audit, Record::Doubt(0)];
        for log in [log.to_vec(), Record::compacted(&log)] {
            assert!(pending(&log).is_some(), "{log:?}");
            assert_eq!(unfinished(&log), None);
        }
    }

    /// SU-9: epochs that go nowhere settle neither a doubt nor a wish to go back.
    #[test]
    fn a_job_is_to_go_back_until_it_does() {
        let back = Record::Back("copies differ".to_owned());
        for record in [Record::Doubt(0), back.clone()] {
            let log = [epoch(None), epoch(Some(0)), record, epoch(Some(1)), epoch(Some(0))];
            for log in [log.to_vec(), Record::compacted(&log)] {
                assert!(pending(&log).is_some(), "{log:?}");
                let gone: Vec<Record> = log.into_iter().chain([epoch(None), epoch(Some(0))]).collect();
                assert_eq!([pending(&gone), pending(&Record::compacted(&gone))], [None, None], "{gone:?}");
            }
        }
        assert_eq!(pending(&[epoch(Some(0)), back]).as_deref(), Some("copies differ"));
    }

    #[test]
    fn a_log_says_how_far_its_job_has_come() {
        let back = Record::Epoch { table: Table { primaries: vec![None], base: 2, ..Table::default() }, next_node: 1 };
        let log = [
            epoch(None),
            epoch(Some(0)),
            committed(3),
            committed(4),
            back,
            epoch(Some(0)),
            committed(3),
            Record::Doubt(1),
        ];
        let reached = [None, Some(0), Some(0), Some(3), Some(4), Some(2), Some(0), Some(3), Some(1)];
        for (n, reached) in reached.into_iter().enumerate() {
            assert_eq!(Record::reached(&log[..n]), reached, "{n} records");
            assert_eq!(Record::reached(&Record::compacted(&log[..n])), reached, "{n} records, made short");
        }
    }

    /// The supervisor and all nodes may end before the line of a step that is stored is written: its commit is not forgotten.
    #[test]
    fn the_commit_of_the_checkpoint_to_which_a_job_goes_back_is_its_last() {
        let back =
            |base| Record::Epoch { table: Table { primaries: vec![None], base, ..Table::default() }, next_node: 1 };
        let log = [committed(3), committed(4), back(4), epoch(Some(0)), back(4), committed(5), back(4)];
        for (n, last) in [None, Some(3), Some(4), Some(4), Some(4), Some(4), Some(5), None].into_iter().enumerate() {
            for log in [log[..n].to_vec(), Record::compacted(&log[..n])] {
                assert_eq!(last_commit(&log), last.map(committed).as_ref(), "{n} records");
            }
        }
    }

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
