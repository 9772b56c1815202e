//! What actors say to each other.
//!
//! A message's logical key is in its body: (step, lane, micro-batch, layer, kind). Two messages with the
//! same key carry the same bits, whoever made them and however often: every computation is a pure
//! function of keyed messages. That is why a lost actor can be run again from the start of the step, a
//! late message of an earlier epoch still counts, and a second copy can be dropped.
//!
//! `Body<T>` is generic in how a tensor is carried: a handle inside a process, a place in a list of
//! regions on the wire.

use crate::ids::{Address, Step};
use everstep_kernels::{ExpertHeld, ExpertSaved, ExpertWeights, Tensor};
use serde::{Deserialize, Serialize};

/// The micro-batch of a lane in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Turn {
    /// The step.
    pub step: Step,
    /// The lane.
    pub lane: u32,
    /// The micro-batch of that lane.
    pub micro_batch: u32,
}

/// Which way rows go through a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Pass {
    /// Activations.
    Forward,
    /// Gradients of activations.
    Backward,
}

/// The numbers of a committed step, equal for every shard.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// The step.
    pub step: Step,
    /// What gradients are multiplied with before the update.
    pub clip: f32,
    /// Learning rate.
    pub lr: f32,
    /// The norm was not finite: only the step number changes.
    pub skipped: bool,
}

/// A state is not what it was when it was made: the memory that holds it is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corruption {
    /// The committed step that the state is the result of.
    pub step: Step,
    /// Number of the first parameter that changed.
    pub parameter: u32,
    /// Its fingerprint sums: when it was made, and now.
    pub hashes: [u128; 2],
}

/// Weight, first and second moment of a parameter, and the average of the weight if the job keeps one.
pub(crate) type ParameterState<T> = Vec<T>;

/// A message between logical actors. Everything but `Fetch` and the reports to the supervisor is kept by
/// its sender, or made again from what it has or is asked with, until the step is committed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Body<T> {
    /// A stage to the next: activations of a micro-batch.
    Hidden {
        /// Whose.
        turn: Turn,
        /// `[tokens, hidden]`.
        rows: T,
    },
    /// A stage to the one before: gradients of those activations.
    Gradient {
        /// Whose.
        turn: Turn,
        /// `[tokens, hidden]`.
        rows: T,
    },
    /// A stage to an expert: its rows of a micro-batch, possibly none (dispatch).
    Rows {
        /// Whose.
        turn: Turn,
        /// Activations, or gradients of the expert's results.
        pass: Pass,
        /// `[rows, hidden]`.
        rows: T,
    },
    /// An expert to a stage: what it made of the rows (combine).
    Answer {
        /// Whose.
        turn: Turn,
        /// Results, or gradients of the activations.
        pass: Pass,
        /// `[rows, hidden]`, in the order of the request.
        rows: T,
    },
    /// A stage or an expert to every copy of a shard: its sum over a step's micro-batches.
    Sums {
        /// The step.
        step: Step,
        /// Number of the group in the model.
        group: u32,
        /// Micro-batches in the sum, all from 0 on.
        micro_batches: u32,
        /// Samples in the sum.
        samples: u64,
        /// One for each use of each parameter that has a gradient, in order of number and use.
        gradients: Vec<T>,
        /// Rows that the layer's gate sent to each of its experts.
        loads: Vec<u64>,
        /// Sums of the losses, from the last stage: of the main model, and of multi-token prediction.
        losses: [f64; 2],
    },
    /// A shard's primary to those who use a group: its weights after a step.
    Weights {
        /// The committed step they are the result of.
        step: Step,
        /// Number of the group in the model.
        group: u32,
        /// In order of number.
        tensors: Vec<T>,
    },
    /// A reducer without state to its shard's primary, or to the keeper if there is none.
    Fetch {
        /// The state must be of this step or a later one.
        step: Step,
    },
    /// The answer.
    State {
        /// The committed step it is the result of.
        step: Step,
        /// In order of number.
        parameters: Vec<ParameterState<T>>,
    },
    /// A reducer to the supervisor: the step's sums are complete.
    Prepared {
        /// The step.
        step: Step,
        /// Squared sums of chunks by number of the parameter.
        norm: Vec<(u32, Vec<f64>)>,
        /// Sums of the losses over the lanes, if the shard has the head.
        losses: Option<[f64; 2]>,
        /// Samples that each group of the shard counted, which must all be equal.
        samples: u64,
        /// Hash of the sums, bit for bit, if the shard has another copy.
        digest: Option<u128>,
    },
    /// A reducer to the supervisor: it has the state after a step.
    Applied {
        /// The step.
        step: Step,
        /// Fingerprint sums by number of the parameter.
        sums: Vec<(u32, u128)>,
    },
    /// A reducer to the supervisor: it has no state, or not the sums to follow the newest commit.
    Stateless,
    /// A reducer to the supervisor: its state changed by itself.
    Corrupt(Corruption),
    /// A new life of a stage or an expert to the supervisor: it has the weights with which it begins.
    Ready,
    /// The supervisor to an actor whose work of a step is compared.
    Audit {
        /// The step.
        step: Step,
    },
    /// The answer, once it has made all of it.
    Audited {
        /// The step.
        step: Step,
        /// Hash of all that it made.
        digest: u128,
    },
    /// The supervisor to every reducer.
    Commit(Commit),
    /// A primary to the keeper: a state to be stored.
    Snapshot {
        /// The committed step it is the result of.
        step: Step,
        /// In order of number.
        parameters: Vec<ParameterState<T>>,
    },
    /// The keeper to a primary: the checkpoint that its snapshot is part of exists.
    SnapshotKept {
        /// The step.
        step: Step,
    },
}

impl<T> Body<T> {
    /// For people: every kind.
    pub(crate) const KINDS: [&'static str; 18] = [
        "hidden",
        "gradient",
        "rows",
        "answer",
        "sums",
        "weights",
        "fetch",
        "state",
        "prepared",
        "applied",
        "stateless",
        "corrupt",
        "ready",
        "audit",
        "audited",
        "commit",
        "snapshot",
        "snapshot kept",
    ];

    /// Its kind.
    pub(crate) fn kind(&self) -> &'static str {
        let at = match self {
            Self::Hidden { .. } => 0,
            Self::Gradient { .. } => 1,
            Self::Rows { .. } => 2,
            Self::Answer { .. } => 3,
            Self::Sums { .. } => 4,
            Self::Weights { .. } => 5,
            Self::Fetch { .. } => 6,
            Self::State { .. } => 7,
            Self::Prepared { .. } => 8,
            Self::Applied { .. } => 9,
            Self::Stateless => 10,
            Self::Corrupt(_) => 11,
            Self::Ready => 12,
            Self::Audit { .. } => 13,
            Self::Audited { .. } => 14,
            Self::Commit(_) => 15,
            Self::Snapshot { .. } => 16,
            Self::SnapshotKept { .. } => 17,
        };
        Self::KINDS[at]
    }

    /// Whether it carries tensors, if perhaps empty ones.
    pub fn carries_tensors(&self) -> bool {
        match self {
            Self::Hidden { .. }
            | Self::Gradient { .. }
            | Self::Rows { .. }
            | Self::Answer { .. }
            | Self::Sums { .. }
            | Self::Weights { .. }
            | Self::State { .. }
            | Self::Snapshot { .. } => true,
            Self::Fetch { .. }
            | Self::Prepared { .. }
            | Self::Applied { .. }
            | Self::Stateless
            | Self::Corrupt(_)
            | Self::Ready
            | Self::Audit { .. }
            | Self::Audited { .. }
            | Self::Commit(_)
            | Self::SnapshotKept { .. } => false,
        }
    }

    /// The same message with its tensors carried otherwise.
    pub fn map<U>(self, f: &mut impl FnMut(T) -> U) -> Body<U> {
        let mut all =
            |list: Vec<ParameterState<T>>| list.into_iter().map(|p| p.into_iter().map(&mut *f).collect()).collect();
        match self {
            Self::State { step, parameters } => Body::State { step, parameters: all(parameters) },
            Self::Snapshot { step, parameters } => Body::Snapshot { step, parameters: all(parameters) },
            Self::Hidden { turn, rows } => Body::Hidden { turn, rows: f(rows) },
            Self::Gradient { turn, rows } => Body::Gradient { turn, rows: f(rows) },
            Self::Rows { turn, pass, rows } => Body::Rows { turn, pass, rows: f(rows) },
            Self::Answer { turn, pass, rows } => Body::Answer { turn, pass, rows: f(rows) },
            Self::Sums { step, group, micro_batches, samples, gradients, loads, losses } => {
                let gradients = gradients.into_iter().map(f).collect();
                Body::Sums { step, group, micro_batches, samples, gradients, loads, losses }
            }
            Self::Weights { step, group, tensors } => {
                Body::Weights { step, group, tensors: tensors.into_iter().map(f).collect() }
            }
            Self::Fetch { step } => Body::Fetch { step },
            Self::Prepared { step, norm, losses, samples, digest } => {
                Body::Prepared { step, norm, losses, samples, digest }
            }
            Self::Applied { step, sums } => Body::Applied { step, sums },
            Self::Stateless => Body::Stateless,
            Self::Corrupt(corruption) => Body::Corrupt(corruption),
            Self::Ready => Body::Ready,
            Self::Audit { step } => Body::Audit { step },
            Self::Audited { step, digest } => Body::Audited { step, digest },
            Self::Commit(commit) => Body::Commit(commit),
            Self::SnapshotKept { step } => Body::SnapshotKept { step },
        }
    }
}

/// A message with both ends' lives: refused if either has been replaced (contract C4).
#[derive(Debug, Clone)]
pub struct Envelope {
    /// Who says it.
    pub from: Address,
    /// To whom.
    pub to: Address,
    /// What.
    pub body: Body<Tensor>,
}

/// What an expert lets its host compute.
#[derive(Debug, Clone)]
pub enum Work {
    /// Rows to send through the expert.
    Forward {
        /// `[rows, hidden]`.
        x: Tensor,
    },
    /// Gradients to send back through it.
    Backward {
        /// Kept since the forward pass.
        saved: ExpertSaved,
        /// `[rows, hidden]`.
        dy: Tensor,
    },
}

impl Work {
    /// Rows of the work.
    pub fn rows(&self) -> usize {
        match self {
            Self::Forward { x } => x.rows(),
            Self::Backward { dy, .. } => dy.rows(),
        }
    }
}

/// The result of one piece of [`Work`].
#[derive(Debug, Clone)]
pub enum WorkResult {
    /// Rows and what the backward pass needs.
    Forward {
        /// `[rows, hidden]`.
        y: Tensor,
        /// For the expert to keep.
        saved: ExpertSaved,
    },
    /// Input gradients and what the weight gradient needs.
    Backward {
        /// `[rows, hidden]`.
        dx: Tensor,
        /// For the expert to keep.
        held: ExpertHeld,
    },
}

impl WorkResult {
    /// The rows that go back to the stage.
    pub fn rows(&self) -> &Tensor {
        match self {
            Self::Forward { y, .. } => y,
            Self::Backward { dx, .. } => dx,
        }
    }

    /// Which way they go.
    pub fn pass(&self) -> Pass {
        match self {
            Self::Forward { .. } => Pass::Forward,
            Self::Backward { .. } => Pass::Backward,
        }
    }
}

/// One piece of work of a host's batch.
#[derive(Debug, Clone)]
pub struct WorkItem {
    /// The life of the expert whose work it is.
    pub expert: Address,
    /// The life of the stage that asked; whichever lives gets the rows.
    pub stage: Address,
    /// The micro-batch.
    pub turn: Turn,
    /// The expert's weights.
    pub weights: ExpertWeights,
    /// What to do.
    pub work: Work,
    /// An earlier life of the stage had its answer: nothing but this one comes of it.
    pub again: bool,
}

/// Between the actors of one node: handles, never bytes.
#[derive(Debug, Clone)]
pub enum Local {
    /// The node's router to a host: messages with rows that arrived or were sent together.
    Batch(Vec<Envelope>),
    /// A host to an expert: rows that arrived for it. Answered with `Ready` or `Nothing`.
    Arrived(Envelope),
    /// An expert to its host: rows can be computed.
    Ready(Box<WorkItem>),
    /// An expert to its host: an arrived message needs no work now.
    Nothing,
    /// A host to an expert: its work is done.
    Done {
        /// The life whose work it was: another one has not sent what goes with it.
        expert: Address,
        /// The micro-batch.
        turn: Turn,
        /// For the expert to keep.
        result: Box<WorkResult>,
    },
}
