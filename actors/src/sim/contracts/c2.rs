//! C2, nothing committed is lost: a commit is announced only when its record is on disk, a supervisor's next life knows it, a job
//! goes back only when a shard lost all its copies, a step is in as many domains as its record says, and a checkpoint that exists
//! has all of its step's state. Checked at every announcement, every start, every record, and every manifest.

use super::Broken;
use crate::ids::{Address, Step};
use crate::message::Body;
use crate::spec::JobSpec;
use crate::supervisor::Record;
use crate::table::{Domain, Table};
use everstep_kernels::Tensor;
use std::collections::{BTreeMap, BTreeSet};

/// What was announced as committed is on disk.
pub(in crate::sim) fn durable(announced: Step, disk: &[Record]) -> Result<(), Broken> {
    // A record from before a way back stands for nothing any more.
    let went_back = |r: &Record| matches!(r, Record::Epoch { table, .. } if table.goes_back());
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

/// A job ends because no checkpoint can be read: only if somebody must begin from one, and none of those that were there when its
/// supervisor looked was whole.
pub(in crate::sim) fn nothing_left(table: &Table, whole: Option<Step>) -> Result<(), Broken> {
    if !table.primaries.contains(&None) {
        return Err(("C2", "the job ended for want of a checkpoint, and every shard has a primary".to_owned()));
    }
    let what = |step| format!("the job ended for want of a checkpoint, and that of step {step} is whole");
    whole.map_or(Ok(()), |step| Err(("C2", what(step))))
}

/// With `recovery.when_thin = "wait"` no step is committed in fewer domains than are wanted.
pub(in crate::sim) fn thick(step: Step, copies: u32, spec: &JobSpec) -> Result<(), Broken> {
    let what = || format!("step {step} was committed in {copies} domains, {} are waited for", spec.mirrors + 1);
    if spec.thin_waits && copies <= spec.mirrors { Err(("C2", what())) } else { Ok(()) }
}

/// Which copies of shards are in sync, by what they tell the supervisor: whoever says that it has the state of the newest committed
/// step is, for as long as it lives, since commits wait for it.
#[derive(Debug, Default)]
pub(in crate::sim) struct Copies {
    committed: Step,
    in_sync: BTreeSet<Address>,
    /// The newest step of which each has said that its sums are complete.
    prepared: BTreeMap<Address, Step>,
}

impl Copies {
    /// A new life of the supervisor has heard nobody yet.
    pub(in crate::sim) fn new(committed: Step) -> Self {
        Self { committed, ..Self::default() }
    }

    /// The supervisor is told something.
    pub(in crate::sim) fn heard(&mut self, from: Address, body: &Body<Tensor>) {
        match body {
            Body::Applied { step, .. } if *step == self.committed => {
                self.in_sync.insert(from);
            }
            Body::Prepared { step, .. } => {
                self.prepared.insert(from, *step);
            }
            Body::Stateless => {
                self.in_sync.remove(&from);
            }
            _ => {}
        }
    }

    fn of_shard<'a>(&'a self, shard: u32, table: &'a Table) -> impl Iterator<Item = Address> + 'a {
        let known = table.replicas(shard).filter_map(move |copy| table.address(copy));
        known.filter(move |copy| self.in_sync.contains(copy))
    }

    /// A step is committed in an epoch, with copies of every shard in so many domains, it is said.
    pub(in crate::sim) fn committed(&mut self, step: Step, copies: u32, table: &Table) -> Result<(), Broken> {
        for shard in 0..table.primaries.len() as u32 {
            let prepared = |copy: &Address| self.prepared.get(copy) == Some(&step);
            let nodes = self.of_shard(shard, table).filter(prepared).filter_map(|copy| table.node_of(copy.actor));
            let domains = nodes.map(|node| table.domain_of(node)).collect::<BTreeSet<Domain<'_>>>().len();
            if domains < copies as usize {
                let what = format!("step {step} is said to be in {copies} domains, shard {shard} was in {domains}");
                return Err(("C2", what));
            }
        }
        self.committed = step;
        Ok(())
    }

    /// The job goes back from an epoch in which every shard had a primary. `lives`: whether a copy does, and goes on to.
    pub(in crate::sim) fn lost(&self, before: &Table, lives: impl Fn(Address) -> bool) -> Result<(), Broken> {
        let held = |shard| self.of_shard(shard, before).any(&lives);
        if !before.goes_back() && (0..before.primaries.len() as u32).all(held) {
            let what =
                format!("the job goes back, and every shard has a copy with the state of step {}", self.committed);
            return Err(("C2", what));
        }
        Ok(())
    }

    /// It has gone back to the state of that step.
    pub(in crate::sim) fn went_back(&mut self, base: Step) {
        self.committed = base;
    }
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
    use crate::ids::ActorId;
    use crate::message::Commit;
    use crate::supervisor::CommitRecord;
    use crate::testing;

    fn commit(step: Step) -> Record {
        let commit = Commit { step, clip: 1.0, lr: 0.1, skipped: false };
        Record::Commit(CommitRecord { commit, loss: 0.0, mtp_loss: None, grad_norm: 0.0, copies: 2, samples: 1 })
    }

    fn epoch(primary: Option<u32>) -> Record {
        Record::Epoch { table: Table { primaries: vec![primary], ..Table::default() }, next_node: 1 }
    }

    #[test]
    fn a_way_back_without_need_and_copies_that_are_none_are_seen() {
        let table = testing::table(&testing::materials());
        let of = |shard, replica| table.address(ActorId::Reducer { shard, replica }).unwrap();
        let mut copies = Copies::new(3);
        let told = |copies: &mut Copies, from, body: Body<Tensor>| copies.heard(from, &body);
        let applied = |step| Body::Applied { step, sums: Vec::new() };
        let prepared = Body::Prepared { step: 4, norm: Vec::new(), losses: None, samples: 1, digest: None };
        for shard in 0..table.primaries.len() as u32 {
            told(&mut copies, of(shard, 0), applied(2));
            told(&mut copies, of(shard, 0), prepared.clone());
        }
        assert!(copies.committed(4, 1, &table).is_err(), "theirs is the state of an older step");
        assert!(copies.lost(&table, |_| true).is_ok());
        for shard in 0..table.primaries.len() as u32 {
            told(&mut copies, of(shard, 0), applied(3));
        }
        assert!(copies.lost(&table, |_| true).is_err());
        assert!(copies.lost(&table, |copy| copy != of(1, 0)).is_ok());
        assert!(copies.committed(4, 9, &table).is_err());
        assert!(copies.committed(4, 1, &table).is_ok());
        told(&mut copies, of(0, 0), Body::Stateless);
        assert!(copies.lost(&table, |_| true).is_ok());
    }

    #[test]
    fn what_is_not_on_disk_is_seen() {
        assert!(durable(2, &[epoch(Some(0)), commit(1), commit(2), epoch(Some(0))]).is_ok());
        assert!(durable(2, &[commit(1)]).is_err());
        assert!(durable(2, &[commit(2), epoch(None), commit(1)]).is_err(), "it was done before the job went back");
        assert!(remembered(3, 3).is_ok() && remembered(3, 2).is_err());
        assert!(newest(3, 3).is_ok() && newest(0, 3).is_err());
        let waits = |thin_waits| JobSpec { mirrors: 1, thin_waits, ..crate::sim::spec(0) };
        assert!(thick(1, 1, &waits(false)).is_ok() && thick(1, 2, &waits(true)).is_ok());
        assert!(thick(1, 1, &waits(true)).is_err());
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
