//! What the supervisor's process does with its store of checkpoints when the keeper asks: writes and reads, and what their
//! failures mean. Whoever calls waits for the disk.

use crate::ids::{ActorId, Step};
use crate::keeper::KeeperEvent;
use crate::message::ParameterState;
use crate::plant::{Bug, planted};
use crate::spec::{JobSpec, Layout};
use crate::stored::{element, state_of, stored};
use crate::supervisor::Record;
use everstep_checkpoint::{Element, Reader, Store, StoreError, TensorEntry};
use everstep_kernels::{Tensor, state_sum};

/// Something to write.
#[derive(Debug)]
pub(crate) enum Write {
    /// A shard's chunks.
    Store {
        /// See [`KeeperEvent::Stored`].
        attempt: u64,
        /// The step.
        step: Step,
        /// The shard.
        shard: u32,
        /// In order of number.
        parameters: Vec<ParameterState<Tensor>>,
    },
    /// The manifest of a step.
    Publish(Step),
    /// Puts manifests of steps after this one aside.
    Refuse(Step),
}

/// A shard's state to be read, and for whom.
#[derive(Debug)]
pub(crate) struct Read {
    /// Of which step.
    pub(crate) step: Step,
    /// Of which shard.
    pub(crate) shard: u32,
    /// Who asked.
    pub(crate) to: ActorId,
}

/// What a failure means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It may heal: try again.
    Again,
    /// A state that is wanted cannot be read any more. The next life of the supervisor finds the same, and puts it aside.
    Damaged,
    /// Another try would fail as well.
    Lasting,
}

impl Write {
    /// Carries it out.
    pub(crate) fn perform(&self, store: &mut Store, layout: &Layout) -> Result<KeeperEvent, StoreError> {
        match *self {
            Self::Store { attempt, step, shard, ref parameters } => {
                let numbers = layout.of_shard(shard);
                let name = |n: &u32| &layout.parameters[*n as usize].name;
                let named = numbers.iter().zip(parameters).map(|(n, state)| stored(name(n), state));
                store.put(step, &named.collect::<Vec<_>>())?;
                // Of the memory that was read for it: bits that flipped before are in both.
                let sums = parameters.iter().map(|state| state_sum(state)).collect();
                Ok(KeeperEvent::Stored { attempt, step, shard, sums })
            }
            Self::Publish(step) => store.publish(step).map(|()| KeeperEvent::Published(step)),
            Self::Refuse(step) => store.refuse_after(step).map(|()| KeeperEvent::Refused),
        }
    }

    pub(crate) fn failure(error: &StoreError) -> Failure {
        match error {
            StoreError::File { .. } | StoreError::Catalogue { .. } if !planted(Bug::FailureNotTriedAgain) => {
                Failure::Again
            }
            _ => Failure::Lasting,
        }
    }
}

impl Read {
    /// Carries it out.
    pub(crate) fn perform(&self, reader: &Reader, layout: &Layout) -> Result<KeeperEvent, StoreError> {
        let Self { step, shard, to } = *self;
        let name = |n: &u32| {
            let p = &layout.parameters[*n as usize];
            (p.name.to_string(), p.rows, p.columns)
        };
        let tensors = reader.read(step, &layout.of_shard(shard).iter().map(name).collect::<Vec<_>>())?;
        Ok(KeeperEvent::Loaded { step, to, parameters: tensors.into_iter().map(state_of).collect() })
    }

    /// What is not there will not come; what merely is not what was expected a next life would not put aside.
    pub(crate) fn failure(error: &StoreError) -> Failure {
        match error {
            error if error.is_out_of_reach() => Failure::Again,
            StoreError::Damaged { .. } | StoreError::Invalid { .. } | StoreError::File { .. } => Failure::Damaged,
            _ => Failure::Lasting,
        }
    }
}

/// Why there is no checkpoint to begin from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoCheckpoint {
    /// The store says no.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It has another form.
    #[error(
        "the checkpoint of step {step} has the state of {name} in {got:?}, the configuration in {expected:?} (weight, moments, \
         average): a run keeps its train.precision, and its average or none (optimizer.ema), from its beginning on"
    )]
    OtherParts {
        /// Of which step.
        step: Step,
        /// Of which tensor.
        name: String,
        /// What it has.
        got: Vec<Element>,
        /// What the job has.
        expected: Vec<Element>,
    },
}

impl NoCheckpoint {
    /// Whether it may be read another time.
    pub(crate) fn is_out_of_reach(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_out_of_reach())
    }
}

/// What a job's next life finds in its store.
#[derive(Debug)]
pub(crate) struct Newest {
    /// The newest good checkpoint (0: there is none), or why none of those that were there can be read.
    pub(crate) step: Result<Step, String>,
    /// What is wrong with newer ones. These are put aside, if there is a good one.
    pub(crate) wrong: Vec<String>,
}

/// Verifies checkpoints, the newest first; of a job with a log, those of steps that it has reached (KE-6).
pub(crate) fn newest(store: &Store, spec: &JobSpec, log: &[Record]) -> Result<Newest, NoCheckpoint> {
    if let Some(reached) = Record::reached(log) {
        store.refuse_after(reached)?;
    }
    let (good, wrong) = if planted(Bug::DamageOverlooked) {
        (store.reader().steps()?.pop(), Vec::new())
    } else {
        store.newest_good()?
    };
    let wrong: Vec<String> = wrong.iter().map(ToString::to_string).collect();
    let good = good.filter(|_| !planted(Bug::CheckpointForgotten));
    if good.is_none() && !wrong.is_empty() {
        // Their manifests stay where they are: whoever has the chunks elsewhere can bring them back.
        return Ok(Newest { step: Err(format!("no checkpoint can be read: {}", wrong.join("; "))), wrong });
    }
    if let Some(step) = good {
        let expected: Vec<Element> = spec.parts().into_iter().map(element).collect();
        let elements = |t: &TensorEntry| t.parts.iter().map(|part| part.element).collect::<Vec<_>>();
        let manifest = store.reader().manifest(step)?;
        if let Some(other) = manifest.tensors.iter().find(|t| elements(t) != expected) {
            return Err(NoCheckpoint::OtherParts { step, name: other.name.clone(), got: elements(other), expected });
        }
    }
    store.refuse_after(good.unwrap_or(0))?;
    Ok(Newest { step: Ok(good.unwrap_or(0)), wrong })
}
