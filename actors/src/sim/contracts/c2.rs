//! C2, nothing committed is lost: a commit is announced only when its record is on disk, a supervisor's next life knows it, and
//! a checkpoint that exists has all of its step's state. Checked at every announcement, every start, and every manifest.

use super::Broken;
use crate::ids::Step;
use crate::supervisor::Record;
use crate::table::Table;

/// Whether an epoch takes everybody back to the checkpoint: then no shard has a primary.
pub(in crate::sim) fn goes_back(table: &Table) -> bool {
    table.primaries.iter().all(Option::is_none)
}

/// What was announced as committed is on disk.
pub(in crate::sim) fn durable(announced: Step, disk: &[Record]) -> Result<(), Broken> {
    // A record from before a way back stands for nothing any more.
    let went_back = |r: &Record| matches!(r, Record::Epoch { table, .. } if goes_back(table));
    let since = disk.iter().rposition(went_back).map_or(0, |at| at + 1);
    let on_disk = disk[since..].iter().any(|r| matches!(r, Record::Commit(c) if c.commit.step == announced));
    if on_disk { Ok(()) } else { Err(("C2", format!("step {announced} was announced, but its record is not on disk"))) }
}

/// A new life of the supervisor knows what the last one announced.
pub(in crate::sim) fn remembered(announced: Step, committed: Step) -> Result<(), Broken> {
    let what = || format!("step {announced} was announced, the next supervisor knows {committed}");
    if committed >= announced { Ok(()) } else { Err(("C2", what())) }
}

/// A job goes back to the newest checkpoint that it was told of.
pub(in crate::sim) fn newest(base: Step, told: Step) -> Result<(), Broken> {
    let what = || format!("the job goes back to step {base}, and there is a checkpoint of step {told}");
    if base >= told { Ok(()) } else { Err(("C2", what())) }
}

/// A job ends because no checkpoint can be read: only if somebody must begin from one, and none of those that are there is whole.
pub(in crate::sim) fn nothing_left(table: &Table, whole: Option<Step>) -> Result<(), Broken> {
    if !table.primaries.contains(&None) {
        return Err(("C2", "the job ended for want of a checkpoint, and every shard has a primary".to_owned()));
    }
    let what = |step| format!("the job ended for want of a checkpoint, and that of step {step} is whole");
    whole.map_or(Ok(()), |step| Err(("C2", what(step))))
}

/// A checkpoint is made known only once all of it is stored, with the bits of its step: `read` is what somebody else reads.
pub(in crate::sim) fn stored(step: Step, read: Result<String, String>, reference: &[String]) -> Result<(), Broken> {
    let expected = reference.get(step as usize - 1);
    match read {
        Ok(fingerprint) if Some(&fingerprint) == expected => Ok(()),
        got => Err(("C2", format!("the checkpoint of step {step} was published with {got:?}, expected {expected:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Commit;
    use crate::supervisor::CommitRecord;

    fn commit(step: Step) -> Record {
        let commit = Commit { step, clip: 1.0, lr: 0.1, skipped: false };
        Record::Commit(CommitRecord { commit, loss: 0.0, mtp_loss: None, grad_norm: 0.0, copies: 2, samples: 1 })
    }

    fn epoch(primary: Option<u32>) -> Record {
        Record::Epoch { table: Table { primaries: vec![primary], ..Table::default() }, next_node: 1 }
    }

    #[test]
    fn what_is_not_on_disk_is_seen() {
        assert!(durable(2, &[epoch(Some(0)), commit(1), commit(2), epoch(Some(0))]).is_ok());
        assert!(durable(2, &[commit(1)]).is_err());
        assert!(durable(2, &[commit(2), epoch(None), commit(1)]).is_err(), "it was done before the job went back");
        assert!(remembered(3, 3).is_ok() && remembered(3, 2).is_err());
        assert!(newest(3, 3).is_ok() && newest(0, 3).is_err());
        let table = |primary| Table { primaries: vec![primary], ..Table::default() };
        assert!(nothing_left(&table(None), None).is_ok());
        assert!(nothing_left(&table(Some(0)), None).is_err() && nothing_left(&table(None), Some(2)).is_err());
        let reference = ["a".to_owned()];
        assert!(stored(1, Ok("a".to_owned()), &reference).is_ok());
        assert!(
            stored(1, Ok("b".to_owned()), &reference).is_err() && stored(1, Err("x".to_owned()), &reference).is_err()
        );
    }
}
