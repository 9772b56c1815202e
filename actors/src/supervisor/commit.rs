//! When a step is committed: a pure function of what the reducers report.
//!
//! A copy is *in sync* when it has the state after the newest committed step; it stays so until it dies,
//! since a commit waits for every copy in sync.
//! - CO-1: steps are committed one after another; the next not before the last is reported.
//! - CO-2: every shard has a copy in sync, and all copies in sync are prepared.
//! - CO-3: every group of every shard counted every sample of the step once.
//! - CO-4: copies of a shard report the same sums, by their hash, and the same norm; after the commit the same state. All are
//!   compared before anything is told of the step; a difference sends the job back.
//! - CO-5: the norm adds f64 parts by parameter name and chunk, never by shard.
//! - CO-6: with `recovery.when_thin = "wait"` a step is committed only in as many domains as are configured: see `steps.rs`.

use super::record::CommitRecord;
use crate::ids::{ActorId, Step};
use crate::message::{Commit, Corruption};
use crate::plant::{Bug, planted};
use crate::spec::{JobSpec, Layout};
use crate::table::Table;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;

/// A reducer's report that a step's sums are complete.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Prepared {
    /// The step.
    pub step: Step,
    /// Squared sums of chunks by number of the parameter.
    pub norm: Vec<(u32, Vec<f64>)>,
    /// Sums of the losses, if the shard has the head.
    pub losses: Option<[f64; 2]>,
    /// Samples that each of its groups counted.
    pub samples: u64,
    /// Hash of the sums, if the shard has another copy.
    pub digest: Option<u128>,
}

impl Prepared {
    /// Whether two copies report the same bits. A sum that is not a number equals itself here.
    fn same(&self, other: &Self) -> bool {
        let norm = |x: &Self| -> Vec<(u32, Vec<u64>)> {
            x.norm.iter().map(|(n, parts)| (*n, parts.iter().map(|p| p.to_bits()).collect())).collect()
        };
        let losses = |x: &Self| x.losses.map(|l| l.map(f64::to_bits));
        (self.step, self.samples, losses(self), self.digest) == (other.step, other.samples, losses(other), other.digest)
            && norm(self) == norm(other)
    }
}

/// The reports contradict each other or the data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CommitError {
    /// Copies of a shard differ.
    #[error(
        "copies {first} and {second} of shard {shard} differ in {what} of step {step} (hashes {:032x} and {:032x}): one of \
         them is corrupt", hashes[0], hashes[1]
    )]
    CopiesDiffer {
        /// The shard.
        shard: u32,
        /// A copy.
        first: u32,
        /// Another.
        second: u32,
        /// The step.
        step: Step,
        /// What differs.
        what: &'static str,
        /// Of the sums, or of the first parameter whose state differs.
        hashes: [u128; 2],
    },
    /// A copy's state changed by itself.
    #[error(
        "copy {replica} of shard {shard} is corrupt: its {name} after step {} is not what it was when it was made (hashes \
         {:032x} and {:032x})", found.step, found.hashes[0], found.hashes[1]
    )]
    Changed {
        /// The shard.
        shard: u32,
        /// The copy.
        replica: u32,
        /// The parameter.
        name: String,
        /// What the copy found.
        found: Corruption,
    },
    /// A copy knows of a commit that the control log does not.
    #[error(
        "copy {replica} of shard {shard} has the state after step {step}, the control log ends with step {committed}"
    )]
    Ahead {
        /// The shard.
        shard: u32,
        /// The copy.
        replica: u32,
        /// Its step.
        step: Step,
        /// The newest step of the log.
        committed: Step,
    },
    /// A sample is missing or was counted twice.
    #[error("shard {shard} counted {got} samples in step {step}, expected {expected}")]
    Unbalanced {
        /// The shard.
        shard: u32,
        /// The step.
        step: Step,
        /// Samples it counted.
        got: u64,
        /// Samples of a step.
        expected: u64,
    },
}

/// A copy of a shard.
type Copy = (u32, u32);
/// Fingerprint sums by number of the parameter.
type Sums = Vec<(u32, u128)>;

/// See the module.
#[derive(Debug)]
pub(crate) struct CommitCore {
    spec: Arc<JobSpec>,
    layout: Arc<Layout>,
    committed: Step,
    in_sync: BTreeSet<Copy>,
    prepared: BTreeMap<Copy, Prepared>,
    /// By shard: the first copy that has the state of the newest committed step, and the state's sums.
    applied: BTreeMap<u32, (u32, Sums)>,
    /// All copies that have it.
    applied_by: BTreeSet<Copy>,
    /// Copies that lived before this supervisor and have not reported to it yet.
    unheard: BTreeSet<Copy>,
    reported: bool,
}

impl CommitCore {
    /// At the start of a job.
    pub(crate) fn new(spec: Arc<JobSpec>, layout: Arc<Layout>) -> Self {
        Self {
            spec,
            layout,
            committed: 0,
            in_sync: BTreeSet::new(),
            prepared: BTreeMap::new(),
            applied: BTreeMap::new(),
            applied_by: BTreeSet::new(),
            unheard: BTreeSet::new(),
            reported: false,
        }
    }

    /// Nothing is known but that `committed` steps are, and which copies may still have their state.
    pub(crate) fn restore(&mut self, committed: Step, unheard: BTreeSet<(u32, u32)>) {
        self.committed = committed;
        self.in_sync.clear();
        self.prepared.clear();
        self.applied.clear();
        self.applied_by.clear();
        self.unheard = unheard;
        self.reported = false;
    }

    /// The newest committed step.
    pub(crate) fn committed(&self) -> Step {
        self.committed
    }

    /// Whether a copy has the newest committed state.
    pub(crate) fn in_sync(&self, shard: u32, replica: u32) -> bool {
        self.in_sync.contains(&(shard, replica))
    }

    /// Whether a copy of a shard may still report a state that it has from before this supervisor.
    pub(crate) fn unheard(&self, shard: u32) -> bool {
        self.unheard.range((shard, 0)..=(shard, u32::MAX)).next().is_some()
    }

    /// Whether every shard has a copy in sync.
    pub(crate) fn all_in_sync(&self) -> bool {
        (0..self.spec.shards).all(|s| self.has_copy(s))
    }

    /// Whether a shard has a copy in sync.
    pub(crate) fn has_copy(&self, shard: u32) -> bool {
        self.copies(shard).next().is_some()
    }

    /// Copies of a shard that have the newest committed state, ascending.
    pub(crate) fn copies(&self, shard: u32) -> impl Iterator<Item = u32> {
        self.in_sync.range((shard, 0)..=(shard, u32::MAX)).map(|copy| copy.1)
    }

    /// A copy died, or has no state.
    pub(crate) fn out_of_sync(&mut self, actor: ActorId) {
        if let ActorId::Reducer { shard, replica } = actor {
            self.in_sync.remove(&(shard, replica));
            self.prepared.remove(&(shard, replica));
            self.unheard.remove(&(shard, replica));
        }
    }

    /// A copy's sums of a step are complete.
    pub(crate) fn prepared(&mut self, shard: u32, replica: u32, report: Prepared) {
        if report.step == self.committed + 1 {
            self.prepared.insert((shard, replica), report);
        }
    }

    /// A copy has the state after `step`.
    pub(crate) fn applied(&mut self, shard: u32, replica: u32, step: Step, sums: Sums) -> Result<(), CommitError> {
        if step > self.committed {
            return Err(CommitError::Ahead { shard, replica, step, committed: self.committed });
        }
        if step < self.committed {
            // The commit is on its way to it.
            return Ok(());
        }
        self.unheard.remove(&(shard, replica));
        if let Some((first, known)) = self.applied.get(&shard) {
            if *known != sums {
                let differ = known.iter().zip(&sums).find(|(known, new)| known != new);
                let hashes = differ.map_or([0; 2], |(known, new)| [known.1, new.1]);
                return Err(CommitError::CopiesDiffer {
                    shard,
                    first: *first,
                    second: replica,
                    step,
                    what: "state",
                    hashes,
                });
            }
        } else {
            self.applied.insert(shard, (replica, sums));
        }
        self.in_sync.insert((shard, replica));
        self.applied_by.insert((shard, replica));
        Ok(())
    }

    /// A copy found that its state had changed by itself.
    pub(crate) fn changed(&self, shard: u32, replica: u32, found: Corruption) -> CommitError {
        let parameter = self.layout.parameters.get(found.parameter as usize);
        let name = parameter.map_or_else(|| "state".to_owned(), |p| p.name.to_string());
        CommitError::Changed { shard, replica, name, found }
    }

    /// The fingerprint of the newest committed step, once, when every copy in sync of every shard has the state (CO-4).
    pub(crate) fn take_fingerprint(&mut self) -> Option<String> {
        let complete = self.applied.len() == self.spec.shards as usize && self.unheard.is_empty();
        if self.reported || !complete || !self.in_sync.is_subset(&self.applied_by) {
            return None;
        }
        self.reported = true;
        let sums = self.applied.values().flat_map(|(_, sums)| sums.iter().copied());
        Some(crate::fingerprint::root(&self.layout, &sums.collect()))
    }

    /// The fewest domains in which copies of a shard are in sync.
    pub(crate) fn domains(&self, table: &Table) -> u32 {
        let of_shard = |shard| {
            let node = |replica| table.node_of(ActorId::Reducer { shard, replica });
            table.domains(self.copies(shard).filter_map(node)).len() as u32
        };
        (0..self.spec.shards).map(of_shard).min().unwrap_or(0)
    }

    /// Whether the next step could be committed now, if its reports agree.
    pub(crate) fn is_ready(&self) -> bool {
        // Copies that a new supervisor has not heard yet may be in sync: it waits for them or their death.
        let ready = self.unheard.is_empty() && self.in_sync.iter().all(|copy| self.prepared.contains_key(copy));
        self.reported && self.all_in_sync() && ready && self.committed < self.spec.steps
    }

    /// The next step, if it can be committed. The table says in how many domains it is safe.
    pub(crate) fn decide(&mut self, table: &Table) -> Result<Option<CommitRecord>, CommitError> {
        if !self.is_ready() {
            return Ok(None);
        }
        let step = self.committed + 1;
        let expected = self.spec.samples_of_step(step);
        let mut norm: BTreeMap<u32, &Vec<f64>> = BTreeMap::new();
        let (mut losses, mut samples) = ([0.0; 2], 0);
        for shard in 0..self.spec.shards {
            let mut reports = self.copies(shard).map(|replica| (replica, &self.prepared[&(shard, replica)]));
            let (first, report) = reports.next().expect("every shard has a copy in sync");
            for (second, other) in reports {
                if !other.same(report) {
                    let hashes = [report, other].map(|r| r.digest.unwrap_or_default());
                    return Err(CommitError::CopiesDiffer { shard, first, second, step, what: "sums", hashes });
                }
            }
            if report.samples != expected {
                return Err(CommitError::Unbalanced { shard, step, got: report.samples, expected });
            }
            norm.extend(report.norm.iter().map(|(n, parts)| (*n, parts)));
            losses = report.losses.unwrap_or(losses);
            samples = report.samples;
        }
        let copies = if planted(Bug::CopiesOverstated) { self.spec.mirrors + 1 } else { self.domains(table) };
        let record =
            self.record(step, norm.values().flat_map(|p| p.iter()).sum(), losses, [u64::from(copies), samples]);
        self.committed = step;
        self.prepared.clear();
        self.applied.clear();
        self.applied_by.clear();
        self.reported = false;
        Ok(Some(record))
    }

    fn record(&self, step: Step, squares: f64, losses: [f64; 2], [copies, samples]: [u64; 2]) -> CommitRecord {
        let grad_norm = squares.sqrt();
        let clip = self.spec.optimizer.clip;
        let scale = if grad_norm > clip { clip / grad_norm } else { 1.0 };
        let commit =
            Commit { step, clip: scale as f32, lr: self.spec.lr(step) as f32, skipped: !grad_norm.is_finite() };
        let targets = self.spec.targets_of_step(step) as f64;
        let mtp = (self.spec.model.mtp > 0).then(|| losses[1] / self.spec.mtp_targets_of_step(step) as f64);
        CommitRecord { commit, loss: losses[0] / targets, mtp_loss: mtp, grad_norm, copies: copies as u32, samples }
    }

    /// What the next commit waits for.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!("step {} prepared by", self.committed + 1);
        for (shard, replica) in &self.in_sync {
            let mark = if self.prepared.contains_key(&(*shard, *replica)) { "yes" } else { "no" };
            let _ = write!(text, " {shard}.{replica}:{mark}");
        }
        text
    }
}
