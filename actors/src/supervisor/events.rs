//! What the supervisor is told, what it asks for, and what it tells people.

use super::record::{CommitRecord, Record};
use super::timeline::Phases;
use crate::ids::{ActorId, Address, NodeId, Step};
use crate::message::Body;
use crate::rates::Rates;
use crate::table::{NodeInfo, Table};
use crate::tally::Operations;
use everstep_kernels::Tensor;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the supervisor is told.
#[derive(Debug)]
pub enum SupervisorEvent {
    /// A process wants to be a node.
    Join(NodeInfo),
    /// A node that an earlier life of the supervisor knew has come back to this one.
    Return(NodeId),
    /// A node lives; it has done so much work so far.
    Heartbeat {
        /// Which.
        node: NodeId,
        /// Multiply-adds since it joined.
        operations: Operations,
        /// How long what was done took.
        rates: Rates,
        /// Nodes of the table to which it has no link.
        down: Vec<NodeId>,
    },
    /// A node wants to leave.
    Leave(NodeId),
    /// A node's process is known to have ended.
    Lost {
        /// Which.
        node: NodeId,
        /// How that is known.
        why: String,
    },
    /// An actor panicked or failed.
    ActorFailed {
        /// Which life.
        address: Address,
        /// Its last words.
        reason: String,
    },
    /// A report of a reducer.
    Message {
        /// Who sent it.
        from: Address,
        /// What it says.
        body: Body<Tensor>,
    },
    /// The store was read for the first time.
    Found {
        /// The step of the newest checkpoint (0: there is none), or why none of those that exist can be read.
        newest: Result<Step, String>,
        /// Fingerprints in metrics.jsonl from that step on.
        reported: BTreeMap<Step, String>,
    },
    /// The keeper has a whole checkpoint on disk.
    Checkpointed(Step),
    /// What was stored of a step is not its state: memory on its way to the disk is bad.
    SnapshotDamaged(String),
    /// The oldest record that was appended and not synced yet is synced.
    Synced,
    /// Time went by.
    Tick,
}

/// What the supervisor asks for.
#[derive(Debug)]
pub enum SupervisorEffect {
    /// Append to the control log and sync.
    Append(Record),
    /// Tell every node, and this process's own router.
    Announce(Arc<Table>),
    /// Tell a new node its number.
    Welcome(NodeId, NodeInfo),
    /// Tell a node that is to leave that it may.
    Release(NodeId),
    /// Tell a node that was declared dead.
    Fence(NodeId),
    /// Send to an actor.
    Send(ActorId, Body<Tensor>),
    /// All copies of this step's state are the same.
    Verified(Step, String),
    /// A committed step, reported once.
    Report(Report),
    /// Something that operators want to know.
    Note(Happening),
    /// The job is over.
    Finish(Result<(), String>),
}

/// A line of metrics.jsonl, without what the process adds.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Numbers of the commit.
    pub commit: CommitRecord,
    /// Root of the fingerprint, in hexadecimal.
    pub fingerprint: String,
    /// The epoch at the report.
    pub epoch: u64,
    /// Work of each living node since the report before.
    pub operations: BTreeMap<NodeId, u64>,
    /// Work since then that a life of an actor had done before in its step.
    pub redone: u64,
    /// Multiply-adds since then, not among the work, that made again what new lives lacked.
    pub recipes: u64,
}

/// A line of events.jsonl, without its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Happening {
    NodeJoined {
        node: u64,
        address: String,
    },
    NodeReturned {
        node: u64,
    },
    NodeDead {
        node: u64,
        why: String,
        epoch: u64,
    },
    NodeFenced {
        node: u64,
    },
    NodeLeaving {
        node: u64,
        actors: usize,
    },
    NodeLeft {
        node: u64,
    },
    NodeSlow {
        node: u64,
        percent: u64,
    },
    NodeKeepsUp {
        node: u64,
    },
    ActorFailed {
        actor: String,
        incarnation: u32,
        reason: String,
        epoch: u64,
    },
    Moved {
        epoch: u64,
        actors: Vec<String>,
    },
    Corrupted {
        why: String,
    },
    Audited {
        step: u64,
        actor: String,
        nodes: [u64; 2],
    },
    RolledBack {
        to_step: u64,
        epoch: u64,
        why: String,
    },
    CheckpointStored {
        step: u64,
    },
    StoreFails {
        why: String,
    },
    StoreWorks,
    SupervisorRestarted {
        incarnation: u32,
        committed: u64,
    },
    Recovered {
        step: u64,
        milliseconds: u64,
        causes: Vec<String>,
        lives: usize,
        microseconds: Phases,
    },
    Waiting {
        why: String,
    },
    Skipped {
        step: u64,
        why: String,
    },
    CheckpointRefused {
        why: String,
    },
    /// Of strangers, and members that sent garbage; how many this process has refused.
    StrangerRefused {
        why: String,
        refused: u64,
    },
    /// A session goes another way; without `with` it is that with the supervisor.
    WayChanged {
        node: u64,
        with: Option<u64>,
        way: String,
    },
}
