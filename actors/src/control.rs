//! What nodes and the supervisor's process say to each other about the job itself.

use crate::ids::{ActorId, Address, NodeId};
use crate::rates::Rates;
use crate::table::{NodeInfo, Table};
use crate::tally::Operations;
use crate::tokens::SourceInfo;
use everstep_checkpoint::Trouble;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A message between a node and the supervisor's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// A process asks what the job is. Answered with `Job`.
    Enquire,
    /// A process asks to become a node. Answered with `Welcome`.
    Join {
        /// How it is reached.
        info: NodeInfo,
        /// Whose bits it makes; a job does not mix classes.
        device_class: String,
    },
    /// A node that is a member comes back to a new life of the supervisor.
    Return {
        /// Which.
        node: NodeId,
    },
    /// The supervisor takes the process into the job.
    Welcome {
        /// The number of this life.
        node: NodeId,
    },
    /// The supervisor does not take it, or ends the job: the process ends.
    Dismiss {
        /// Why.
        why: String,
    },
    /// A new epoch.
    Table(Arc<Table>),
    /// A node wants to leave; the supervisor says the same once nothing lives on it any more: the process ends.
    Leave {
        /// Which.
        node: NodeId,
    },
    /// The node was declared dead: it gives up all it has and joins as new.
    Fence,
    /// The node lives.
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
    /// An actor panicked or failed.
    ActorFailed {
        /// Which life.
        address: Address,
        /// Its last words.
        reason: String,
    },
    /// Asks a node to make an actor panic (chaos), or to describe one.
    Actor {
        /// Which.
        address: Address,
        /// What to do.
        request: ActorRequest,
        /// For the answer.
        ticket: u64,
    },
    /// Asks a node for the ways of its sessions.
    Links {
        /// For the answer.
        ticket: u64,
    },
    /// The way of one of a node's sessions has changed.
    Way {
        /// Which node says so.
        node: NodeId,
        /// Who is at the other end; none: the supervisor.
        with: Option<NodeId>,
        /// Which way, and why.
        way: String,
    },
    /// A node's wire is to be bad for so many milliseconds (chaos).
    Disturb(BadWire, u32),
    /// The answer.
    Described {
        /// Of the request.
        ticket: u64,
        /// One line.
        text: String,
    },
    /// An operator asks. Answered with `Described`.
    Admin {
        /// For the answer.
        ticket: u64,
        /// What.
        request: AdminRequest,
    },
    /// A node that cannot open a source's file asks for a part of it.
    TokensWanted {
        /// Which source.
        source: u32,
        /// The first byte.
        from: u64,
    },
    /// The answer; empty at the end.
    TokensPart {
        /// Which source.
        source: u32,
        /// The first byte.
        from: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// What a new node needs to know of the job.
    Job {
        /// The effective configuration.
        config: String,
        /// The sources of text, in order.
        sources: Vec<SourceInfo>,
        /// The supervisor's run folder, and the machine that has it.
        folder: String,
        /// See [`NodeInfo::machine`].
        machine: String,
    },
}

/// What an operator asks of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminRequest {
    /// Nodes and their actors.
    Tree,
    /// One actor's state.
    Inspect(ActorId),
    /// The ways of a node's sessions: over QUIC, and why not over RDMA, or over which device.
    Links(NodeId),
    /// Make an actor panic (chaos).
    Kill(ActorId),
    /// Flip a bit of an actor's state; of a stage: from then on its node's stages compute wrongly (chaos).
    Flip(ActorId),
    /// Move everything away from a node and let it end.
    Drain(NodeId),
    /// Something goes wrong for so many milliseconds (chaos).
    Disturb(Disturbed, u32),
}

/// What goes wrong for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Disturbed {
    /// A node's wire.
    Wire(NodeId, BadWire),
    /// The store of checkpoints.
    Store(Trouble),
    /// The supervisor's wall clock, by so many milliseconds.
    Clock(i64),
}

/// What is wrong with a node's wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadWire {
    /// With which other node; none: with all, and with the supervisor.
    pub with: Option<NodeId>,
    /// Of a hundred datagrams that it sends so many are lost.
    pub lost_percent: u8,
    /// Those that come are lost in the same way.
    pub both_ways: bool,
    /// Milliseconds that those that it sends take longer.
    pub delay_ms: u32,
    /// Its links over RDMA fail, once.
    pub rdma_fails: bool,
}

/// What an operator asks of an actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActorRequest {
    /// Describe itself.
    Describe,
    /// Panic.
    Panic,
    /// Flip a bit of its state, or, to a stage, compute wrongly.
    Flip,
}
