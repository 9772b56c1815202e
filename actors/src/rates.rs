//! How long multiply-adds take, by what they are for: what a node's heartbeats say of its speed.
//!
//! Kinds are kept apart because their products have other shapes: only the same kind on another node tells whether a node is
//! slow. Experts tell nothing: how long a product over few rows takes depends on how few they are.

use crate::compute::{Job, StageOperation};
use crate::message::Pass;
use serde::{Deserialize, Serialize};

/// See [`kind`].
pub(crate) const KINDS: usize = 3;

/// Multiply-adds and the microseconds that they took, by kind, since the node began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rates(pub(crate) [[u64; 2]; KINDS]);

impl Rates {
    /// What came since an earlier beat of the same node.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let mut since = *self;
        for (now, before) in since.0.iter_mut().flatten().zip(before.0.iter().flatten()) {
            *now = now.saturating_sub(*before);
        }
        since
    }
}

/// The kind of a stage's job: forward, backward for inputs or for weights. None: its cost says little of its time.
pub(crate) fn kind(job: &Job) -> Option<usize> {
    let by_pass = |pass: Pass| match pass {
        Pass::Forward => 0,
        Pass::Backward => 1,
    };
    match job {
        Job::Stage { operation, .. } => Some(match operation {
            StageOperation::Forward { .. } => 0,
            StageOperation::BackwardInput { .. } => 1,
            StageOperation::Resume { pass, .. } => by_pass(*pass),
            StageOperation::WeightSoFar { .. } | StageOperation::Weight { .. } => 2,
        }),
        Job::Rows(_)
        | Job::Experts(_)
        | Job::ExpertWeight { .. }
        | Job::Initial { .. }
        | Job::Adopt { .. }
        | Job::Check(_)
        | Job::Digest { .. }
        | Job::Reduce(_)
        | Job::Apply(_) => None,
    }
}
