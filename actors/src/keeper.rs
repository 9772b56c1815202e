//! The core of the keeper: makes checkpoints of the shards' snapshots and gives states back.
//!
//! It lives beside the supervisor, since the catalogue has one owner; the heavy half (hashing, writing,
//! syncing) is done elsewhere and reported back.
//! - KE-1: a checkpoint exists once every shard of one step is stored and its manifest is published.
//! - KE-5: a manifest is published only when all copies of the step's state were compared, and what was stored has the same
//!   fingerprint: a corrupt one is no checkpoint.
//! - KE-3: snapshots of [`WAITING_MAX`] steps at most wait for the disk, and those of the job's last.
//! - KE-4: a snapshot that is not its shard's state, as the layout has it, is not stored.
//! - KE-2: a snapshot is acknowledged when the checkpoint that it is part of exists.
//! - KE-6: a job that goes back begins from no checkpoint of what it goes back from: one that was on its way is put aside.

use crate::ids::{ActorId, Address, Step};
use crate::message::{Body, ParameterState};
use crate::plant::{Bug, planted};
use crate::reducer::states;
use crate::spec::{JobSpec, Layout};
use crate::storing::{Read, Write};
use crate::table::Table;
use everstep_kernels::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Steps whose snapshots may wait for the disk; further ones are left out.
const WAITING_MAX: usize = 4;

/// What the keeper is told.
#[derive(Debug)]
pub(crate) enum KeeperEvent {
    /// A new epoch.
    Table(Arc<Table>),
    /// A snapshot, or the wish for a state.
    Message {
        /// Who sent it.
        from: Address,
        /// What it says.
        body: Body<Tensor>,
    },
    /// The store was read for the first time, and this is its newest checkpoint (0: there is none), or why none can be read.
    Found(Result<Step, String>),
    /// All copies of a step's state are the same, with this fingerprint.
    Verified(Step, String),
    /// A shard's chunks are on disk.
    Stored {
        /// Of which attempt: times that the job had gone back before.
        attempt: u64,
        /// The step.
        step: Step,
        /// The shard.
        shard: u32,
        /// Fingerprint sums of what was stored, in order of number.
        sums: Vec<u128>,
    },
    /// A manifest is on disk.
    Published(Step),
    /// Manifests were put aside.
    Refused,
    /// A shard's state was read.
    Loaded {
        /// The step.
        step: Step,
        /// For whom.
        to: ActorId,
        /// In order of number.
        parameters: Vec<ParameterState<Tensor>>,
    },
}

/// What the keeper asks for.
#[derive(Debug)]
pub(crate) enum KeeperEffect {
    /// Write to the store.
    Write(Write),
    /// Read from it.
    Read(Read),
    /// Send to an actor.
    Send(ActorId, Body<Tensor>),
    /// Tell the supervisor of a checkpoint.
    Checkpointed(Step),
    /// Tell it that what was stored of a step is not its state, and why that is known.
    Damaged(String),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct KeeperCore {
    spec: Arc<JobSpec>,
    layout: Arc<Layout>,
    table: Arc<Table>,
    published: Step,
    /// Times that the job went back.
    attempt: u64,
    /// Fingerprints of steps whose copies were compared, of those that have no manifest yet.
    verified: BTreeMap<Step, String>,
    /// The newest step whose manifest was asked for.
    asked: Step,
    /// Who wants the table's checkpoint; nobody waits once the store is read.
    waiting: Option<BTreeSet<(u32, ActorId)>>,
    /// Shards of each step that are being stored; with their sums, if they are.
    storing: BTreeMap<Step, BTreeMap<u32, Option<Vec<u128>>>>,
}

impl KeeperCore {
    /// A keeper that is to be told what was [found](KeeperEvent::Found).
    pub(crate) fn new(spec: Arc<JobSpec>, layout: Arc<Layout>) -> Self {
        Self {
            spec,
            layout,
            table: Arc::default(),
            published: 0,
            attempt: 0,
            verified: BTreeMap::new(),
            asked: 0,
            waiting: Some(BTreeSet::new()),
            storing: BTreeMap::new(),
        }
    }

    /// Takes an event and gives what is to be done.
    pub(crate) fn on(&mut self, event: KeeperEvent) -> Vec<KeeperEffect> {
        match event {
            KeeperEvent::Table(table) => {
                let (base, goes_back) = (table.base, table.goes_back());
                self.table = table;
                let mut refused = None;
                if goes_back {
                    // The job went back: what was being stored is made again, and must not push out
                    // the checkpoint that reducers start from.
                    self.attempt += 1;
                    self.storing.clear();
                    self.verified.clear();
                    refused = (self.asked > base).then_some(KeeperEffect::Write(Write::Refuse(base)));
                    (self.asked, self.published) = (base, self.published.min(base));
                }
                refused.into_iter().collect()
            }
            KeeperEvent::Message { from, body } => self.message(from, body),
            KeeperEvent::Found(found) => {
                let newest = *found.as_ref().unwrap_or(&0);
                self.asked = self.asked.max(newest);
                let kept = if newest > 0 { self.exists(newest) } else { Vec::new() };
                // If theirs is not there the job goes back further: they are not served, and ask anew.
                let step = self.table.base;
                let waiting = self.waiting.take().filter(|_| found.is_ok() && step <= newest).unwrap_or_default();
                let reads = waiting.into_iter().map(|(shard, to)| KeeperEffect::Read(Read { step, shard, to }));
                kept.into_iter().chain(reads).collect()
            }
            KeeperEvent::Verified(step, fingerprint) => {
                if step > self.published && self.spec.is_stored(step) {
                    self.verified.insert(step, fingerprint);
                }
                self.publish(step).into_iter().collect()
            }
            // What is stored for an attempt before a way back says nothing of what is being stored now.
            KeeperEvent::Stored { attempt, .. } if attempt != self.attempt => Vec::new(),
            KeeperEvent::Stored { step, shard, sums, .. } => {
                if let Some(stored) = self.storing.get_mut(&step).and_then(|of_step| of_step.get_mut(&shard)) {
                    *stored = Some(sums);
                }
                self.publish(step).into_iter().collect()
            }
            // The job went back while it was written: it is made again.
            KeeperEvent::Published(step) if step > self.asked => Vec::new(),
            KeeperEvent::Refused => Vec::new(),
            KeeperEvent::Published(step) => {
                self.exists(step).into_iter().chain([KeeperEffect::Checkpointed(step)]).collect()
            }
            KeeperEvent::Loaded { step, to, parameters } => {
                vec![KeeperEffect::Send(to, Body::State { step, parameters })]
            }
        }
    }

    /// A checkpoint is there: nothing of older steps is wanted (KE-2).
    fn exists(&mut self, step: Step) -> Vec<KeeperEffect> {
        self.published = self.published.max(step);
        self.storing.retain(|s, _| *s > step);
        self.verified.retain(|s, _| *s > step);
        let primaries = (0..self.spec.shards).filter_map(|shard| self.table.primary(shard));
        primaries.map(|to| KeeperEffect::Send(to, Body::SnapshotKept { step })).collect()
    }

    fn message(&mut self, from: Address, body: Body<Tensor>) -> Vec<KeeperEffect> {
        let ActorId::Reducer { shard, .. } = from.actor else { return Vec::new() };
        match body {
            Body::Snapshot { step, .. } if step <= self.published => {
                vec![KeeperEffect::Send(from.actor, Body::SnapshotKept { step })]
            }
            Body::Snapshot { step, parameters } => {
                if states(&parameters, &self.layout.of_shard(shard), &self.spec, &self.layout).is_none() {
                    return Vec::new();
                }
                let writing = self.storing.iter().filter(|(s, of)| **s != step && of.values().any(Option::is_none));
                if writing.count() >= WAITING_MAX && step != self.spec.steps {
                    // The disk does not keep up: this checkpoint is left out, memory stays bounded (KE-3).
                    return Vec::new();
                }
                let of_step = self.storing.entry(step).or_default();
                if of_step.contains_key(&shard) {
                    return Vec::new();
                }
                of_step.insert(shard, None);
                vec![KeeperEffect::Write(Write::Store { attempt: self.attempt, step, shard, parameters })]
            }
            // Whoever asks the keeper has no primary to ask, so it starts from the table's checkpoint.
            Body::Fetch { .. } if self.table.base > 0 || self.spec.imported => {
                if let Some(waiting) = &mut self.waiting {
                    waiting.insert((shard, from.actor));
                    return Vec::new();
                }
                vec![KeeperEffect::Read(Read { step: self.table.base, shard, to: from.actor })]
            }
            Body::Fetch { .. }
            | Body::Hidden { .. }
            | Body::Gradient { .. }
            | Body::Rows { .. }
            | Body::Answer { .. }
            | Body::Sums { .. }
            | Body::Weights { .. }
            | Body::State { .. }
            | Body::Prepared { .. }
            | Body::Applied { .. }
            | Body::Stateless
            | Body::Corrupt(_)
            | Body::Ready
            | Body::Audit { .. }
            | Body::Audited { .. }
            | Body::Commit(_)
            | Body::SnapshotKept { .. } => Vec::new(),
        }
    }

    /// Asks for a step's manifest once, if it can be (KE-1, KE-5).
    fn publish(&mut self, step: Step) -> Option<KeeperEffect> {
        let verified = self.verified.get(&step).filter(|_| self.asked < step)?;
        let of_step = self.storing.get(&step)?;
        let all = of_step.len() == self.spec.shards as usize || planted(Bug::PublishedIncomplete);
        if !all || of_step.values().any(Option::is_none) {
            return None;
        }
        let sums_of = |(shard, sums): (&u32, &Option<Vec<u128>>)| {
            self.layout.of_shard(*shard).into_iter().zip(sums.clone().unwrap_or_default())
        };
        let stored = crate::fingerprint::root(&self.layout, &of_step.iter().flat_map(sums_of).collect());
        if stored != *verified && !planted(Bug::SnapshotNotCompared) {
            let why = format!("what was stored of step {step} has fingerprint {stored}, not {verified}");
            self.storing.remove(&step);
            return Some(KeeperEffect::Damaged(why));
        }
        self.asked = step;
        Some(KeeperEffect::Write(Write::Publish(step)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{address, materials, table};

    fn of_shards(shards: u32, published: Step) -> KeeperCore {
        let mut spec = crate::sim::spec(0);
        (spec.shards, spec.steps) = (shards, 9);
        let layout = Layout::new(&spec);
        let mut keeper = KeeperCore::new(Arc::new(spec), layout);
        keeper.on(KeeperEvent::Found(Ok(published)));
        keeper
    }

    /// An imported state is the checkpoint of step 0; without one there is nothing to give.
    #[test]
    fn the_imported_state_is_given_to_those_who_ask() {
        let ask = || KeeperEvent::Message {
            from: address(ActorId::Reducer { shard: 1, replica: 0 }, 1),
            body: Body::Fetch { step: 0 },
        };
        let mut keeper = of_shards(2, 0);
        assert!(keeper.on(ask()).is_empty());
        Arc::make_mut(&mut keeper.spec).imported = true;
        assert!(matches!(keeper.on(ask())[..], [KeeperEffect::Read(Read { step: 0, shard: 1, .. })]));
    }

    /// Who asks before the store is read is served then, unless the job goes back further.
    #[test]
    fn whoever_asks_waits_until_the_store_is_read() {
        for (found, served) in [(Ok(3), 1), (Ok(2), 0), (Err("damaged".to_owned()), 0)] {
            let mut spec = crate::sim::spec(0);
            (spec.shards, spec.steps) = (2, 9);
            let layout = Layout::new(&spec);
            let mut keeper = KeeperCore::new(Arc::new(spec), layout);
            let back = Table { base: 3, primaries: vec![None; 2], ..table(&materials()) };
            keeper.on(KeeperEvent::Table(Arc::new(back)));
            let from = address(ActorId::Reducer { shard: 1, replica: 0 }, 1);
            assert!(keeper.on(KeeperEvent::Message { from, body: Body::Fetch { step: 3 } }).is_empty());
            let effects = keeper.on(KeeperEvent::Found(found));
            let reads = |e: &&KeeperEffect| matches!(e, KeeperEffect::Read(Read { step: 3, shard: 1, .. }));
            assert_eq!(effects.iter().filter(reads).count(), served, "{effects:?}");
        }
    }

    fn snapshot(keeper: &KeeperCore, step: Step, shard: u32) -> KeeperEvent {
        let from = address(ActorId::Reducer { shard, replica: 0 }, 1);
        let state = |n: u32| {
            let p = &keeper.layout.parameters[n as usize];
            crate::reducer::first_state(&keeper.spec, p, vec![0.5; p.len()])
        };
        let parameters = keeper.layout.of_shard(shard).into_iter().map(state).collect();
        KeeperEvent::Message { from, body: Body::Snapshot { step, parameters } }
    }

    fn sums(keeper: &KeeperCore, shard: u32) -> Vec<u128> {
        let KeeperEvent::Message { body: Body::Snapshot { parameters, .. }, .. } = snapshot(keeper, 3, shard) else {
            unreachable!("a snapshot")
        };
        parameters.iter().map(|state| everstep_kernels::state_sum(state)).collect()
    }

    fn stored(keeper: &KeeperCore, step: Step, shard: u32) -> KeeperEvent {
        KeeperEvent::Stored { attempt: keeper.attempt, step, shard, sums: sums(keeper, shard) }
    }

    /// The fingerprint of all snapshots.
    fn of_all(keeper: &KeeperCore) -> String {
        let of = |shard: u32| keeper.layout.of_shard(shard).into_iter().zip(sums(keeper, shard));
        crate::fingerprint::root(&keeper.layout, &(0..keeper.spec.shards).flat_map(of).collect())
    }

    /// KE-5: what changed on its way to the disk is no checkpoint, and is told.
    #[test]
    fn what_is_not_the_state_that_was_compared_is_no_checkpoint() {
        let mut keeper = of_shards(2, 0);
        keeper.on(KeeperEvent::Table(Arc::new(table(&materials()))));
        keeper.on(KeeperEvent::Verified(3, of_all(&keeper)));
        (0..2).for_each(|shard| drop(give(&mut keeper, 3, shard)));
        keeper.on(stored(&keeper, 3, 0));
        let KeeperEvent::Stored { mut sums, .. } = stored(&keeper, 3, 1) else { unreachable!("stored") };
        sums[0] ^= 1;
        let effects = keeper.on(KeeperEvent::Stored { attempt: 0, step: 3, shard: 1, sums });
        assert!(matches!(&effects[..], [KeeperEffect::Damaged(why)] if why.contains("step 3")), "{effects:?}");
        assert!(keeper.on(stored(&keeper, 3, 1)).is_empty(), "nothing of it is left");
    }

    fn give(keeper: &mut KeeperCore, step: Step, shard: u32) -> Vec<KeeperEffect> {
        keeper.on(snapshot(keeper, step, shard))
    }

    /// KE-4.
    #[test]
    fn what_is_not_the_shards_state_is_not_stored() {
        let mut keeper = of_shards(2, 0);
        keeper.on(KeeperEvent::Table(Arc::new(table(&materials()))));
        let whole = || {
            let KeeperEvent::Message { from, body: Body::Snapshot { parameters, .. } } = snapshot(&keeper, 3, 0) else {
                unreachable!()
            };
            (from, parameters)
        };
        let spoilt: [fn(&mut Vec<ParameterState<Tensor>>); 4] = [
            |p| drop(p.pop()),
            |p| drop(p[0].pop()),
            |p| p[0] = Vec::new(),
            |p| p[0][1] = Tensor::from_vec(1, 1, vec![0.0]),
        ];
        let all: Vec<_> = spoilt
            .iter()
            .map(|spoil| {
                let (from, mut parameters) = whole();
                spoil(&mut parameters);
                KeeperEvent::Message { from, body: Body::Snapshot { step: 3, parameters } }
            })
            .collect();
        all.into_iter().for_each(|event| assert!(keeper.on(event).is_empty()));
        let good = snapshot(&keeper, 3, 0);
        assert_eq!(keeper.on(good).len(), 1);
    }

    /// KE-6.
    #[test]
    fn a_checkpoint_that_is_on_its_way_when_the_job_goes_back_is_put_aside() {
        let mut keeper = of_shards(2, 0);
        let table = table(&materials());
        keeper.on(KeeperEvent::Table(Arc::new(table.clone())));
        keeper.on(KeeperEvent::Verified(3, of_all(&keeper)));
        (0..2).for_each(|shard| drop(give(&mut keeper, 3, shard)));
        keeper.on(stored(&keeper, 3, 0));
        let effects = keeper.on(stored(&keeper, 3, 1));
        assert!(matches!(effects[..], [KeeperEffect::Write(Write::Publish(3))]), "{effects:?}");
        let back = Table { epoch: table.epoch + 1, primaries: vec![None; 2], ..table };
        let effects = keeper.on(KeeperEvent::Table(Arc::new(back)));
        assert!(matches!(effects[..], [KeeperEffect::Write(Write::Refuse(0))]), "{effects:?}");
        assert!(keeper.on(KeeperEvent::Published(3)).is_empty() && keeper.on(KeeperEvent::Refused).is_empty());
    }

    /// KE-1, KE-2: published when all shards are stored, acknowledged when it is published.
    #[test]
    fn a_checkpoint_exists_when_every_shard_is_stored_and_the_manifest_is() {
        let mut keeper = of_shards(2, 0);
        keeper.on(KeeperEvent::Table(Arc::new(table(&materials()))));
        assert!(matches!(give(&mut keeper, 3, 0)[..], [KeeperEffect::Write(Write::Store { step: 3, shard: 0, .. })]));
        assert!(give(&mut keeper, 3, 0).is_empty(), "a second copy is not stored again");
        assert!(keeper.on(stored(&keeper, 3, 0)).is_empty());
        give(&mut keeper, 3, 1);
        assert!(keeper.on(KeeperEvent::Verified(2, of_all(&keeper))).is_empty());
        assert!(keeper.on(stored(&keeper, 3, 1)).is_empty(), "its copies are not compared yet (KE-5)");
        let effects = keeper.on(KeeperEvent::Verified(3, of_all(&keeper)));
        assert!(matches!(effects[..], [KeeperEffect::Write(Write::Publish(3))]));
        assert!(keeper.on(KeeperEvent::Verified(4, of_all(&keeper))).is_empty(), "it is asked for once");
        let effects = keeper.on(KeeperEvent::Published(3));
        assert!(matches!(
            effects[..],
            [
                KeeperEffect::Send(_, Body::SnapshotKept { step: 3 }),
                KeeperEffect::Send(_, Body::SnapshotKept { step: 3 }),
                KeeperEffect::Checkpointed(3)
            ]
        ));
        assert!(matches!(give(&mut keeper, 3, 0)[..], [KeeperEffect::Send(_, Body::SnapshotKept { step: 3 })]));
    }

    /// KE-3: a slow disk costs checkpoints, not memory; the last one is taken all the same.
    #[test]
    fn a_slow_disk_leaves_checkpoints_out() {
        let mut keeper = of_shards(2, 0);
        keeper.on(KeeperEvent::Table(Arc::new(table(&materials()))));
        for step in 1..=WAITING_MAX as Step {
            assert_eq!(give(&mut keeper, step, 0).len(), 1);
        }
        assert!(give(&mut keeper, 6, 0).is_empty());
        assert_eq!(give(&mut keeper, 9, 0).len(), 1);
        keeper.on(stored(&keeper, 1, 0));
        keeper.on(stored(&keeper, 9, 0));
        // The other shard of step 1 never came: later steps need not wait for it.
        assert_eq!(give(&mut keeper, 6, 1).len(), 1);
    }

    /// A way back in the middle of a checkpoint: it is not published, and made again later.
    #[test]
    fn a_checkpoint_that_is_being_made_is_dropped_when_the_job_goes_back() {
        let mut keeper = of_shards(1, 0);
        let mut table = table(&materials());
        keeper.on(KeeperEvent::Table(Arc::new(table.clone())));
        give(&mut keeper, 3, 0);
        (table.primaries, table.epoch) = (vec![None, None], 2);
        keeper.on(KeeperEvent::Table(Arc::new(table)));
        keeper.on(KeeperEvent::Verified(3, of_all(&keeper)));
        assert!(keeper.on(stored(&keeper, 3, 0)).is_empty());
        assert!(matches!(give(&mut keeper, 3, 0)[..], [KeeperEffect::Write(Write::Store { .. })]));
    }

    /// Whoever asks is given the table's checkpoint, and nothing when the job began from none.
    #[test]
    fn states_are_loaded_from_the_tables_checkpoint() {
        let mut keeper = of_shards(2, 3);
        let mut table = table(&materials());
        let from = address(ActorId::Reducer { shard: 1, replica: 0 }, 1);
        keeper.on(KeeperEvent::Table(Arc::new(table.clone())));
        assert!(keeper.on(KeeperEvent::Message { from, body: Body::Fetch { step: 0 } }).is_empty());
        (table.base, table.epoch) = (3, 2);
        keeper.on(KeeperEvent::Table(Arc::new(table)));
        let effects = keeper.on(KeeperEvent::Message { from, body: Body::Fetch { step: 0 } });
        assert!(matches!(effects[..], [KeeperEffect::Read(Read { step: 3, shard: 1, .. })]));
    }
}
