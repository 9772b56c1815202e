//! The boundary between deciding and acting: what cores are told, and what they ask for.
//!
//! A core is a plain value. It sees no clock, socket, file or runtime; it gets an [`Event`] and gives
//! [`Effect`]s. The actors carry effects out with ractor, QUIC and devices, the simulator with
//! simulated ones.

use crate::compute::{Job, Outcome};
use crate::ids::{ActorId, Address};
use crate::message::{Body, Local};
use crate::table::Table;
use everstep_kernels::Tensor;
use std::sync::Arc;

/// What a worker's core is told.
#[derive(Debug)]
pub enum Event {
    /// A new epoch. The first event of every life.
    Table(Arc<Table>),
    /// A message that passed the fence.
    Message {
        /// Who sent it.
        from: Address,
        /// What it says.
        body: Body<Tensor>,
    },
    /// From an actor of the same node.
    Local {
        /// Who sent it.
        from: ActorId,
        /// What it says.
        local: Local,
    },
    /// The job that the core started is done.
    Computed(Outcome),
}

/// What a worker's core asks for.
#[derive(Debug)]
pub enum Effect {
    /// Send to an actor, wherever it lives now. Lost if it is being replaced: a sender keeps what must
    /// not be lost, and sends it again when the table names a new life.
    Send {
        /// In whose name, if not the core's own: a host speaks for its experts.
        from: Option<Address>,
        /// To whom.
        to: ActorId,
        /// What.
        body: Body<Tensor>,
    },
    /// Tell an actor of the same node.
    Tell {
        /// To whom.
        to: ActorId,
        /// What.
        local: Local,
    },
    /// Run a job off the runtime's threads; its outcome comes as an event. A core has one at a time, and
    /// one more when a commit overtakes the step that it replays: outcomes are told apart by step. Rows that are made
    /// again for an expert are beside that, and told apart by themselves.
    Compute {
        /// What to run.
        job: Job,
        /// Its multiply-adds, for the count of work.
        cost: u64,
    },
}

impl Effect {
    /// A message in the core's own name.
    pub fn send(to: ActorId, body: Body<Tensor>) -> Self {
        Self::Send { from: None, to, body }
    }
}

/// A protocol's pure half.
pub trait Core: Send + std::fmt::Debug {
    /// Takes an event and gives what is to be done.
    fn on(&mut self, event: Event) -> Vec<Effect>;

    /// Chaos: flips a bit of its state, if it has any, as bad memory would.
    fn flip(&mut self) {}

    /// Messages that it keeps for its receivers' next lives.
    fn kept(&self) -> usize {
        0
    }

    /// One line about its state, for operators.
    fn describe(&self) -> String;
}
