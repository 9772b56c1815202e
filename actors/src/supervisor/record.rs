//! What the control log holds. Records are read by the next life of the supervisor.

use crate::ids::Step;
use crate::message::Commit;
use crate::table::Table;
use serde::{Deserialize, Serialize};

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
