//! A worker: the ractor actor around the core of a stage, an expert, a host or a reducer.
//!
//! It gives the core events and its node the core's effects; jobs go to the node's threads. It restarts
//! nothing and is restarted by nobody here: its node reports its failure, and the supervisor places a
//! new life.

use super::node;
use super::pool::Pool;
use crate::effect::{Core, Effect, Event};
use crate::ids::Address;
use crate::tally::Tally;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Msg {
    /// From the node, or the worker's own job.
    Event(Event),
    /// A job panicked: so does the worker.
    JobFailed(String),
    /// From an operator.
    Describe {
        /// For the answer.
        reply: RpcReplyPort<String>,
    },
    /// From chaos.
    Panic,
    /// From chaos.
    Flip,
}

/// What a worker is made from.
#[derive(Debug)]
pub(super) struct Args {
    pub(super) address: Address,
    pub(super) core: Box<dyn Core>,
    pub(super) node: ActorRef<node::Msg>,
    pub(super) pool: Pool,
    pub(super) tally: Tally,
}

/// A worker's failure.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("its job panicked: {0}")]
    Job(String),
}

#[derive(Debug)]
pub(super) struct Worker;

impl Actor for Worker {
    type Msg = Msg;
    type State = Args;
    type Arguments = Args;

    async fn pre_start(&self, _: ActorRef<Msg>, args: Args) -> Result<Args, ActorProcessingErr> {
        Ok(args)
    }

    async fn handle(&self, myself: ActorRef<Msg>, message: Msg, state: &mut Args) -> Result<(), ActorProcessingErr> {
        match message {
            Msg::Event(event) => {
                let effects = state.core.on(event);
                state.perform(&myself, effects);
                Ok(())
            }
            Msg::JobFailed(words) => Err(Error::Job(words).into()),
            Msg::Describe { reply } => {
                // An operator that stopped waiting is not our failure.
                let _ = reply.send(state.core.describe());
                Ok(())
            }
            Msg::Flip => {
                state.core.flip();
                Ok(())
            }
            Msg::Panic => panic!("asked to panic"),
        }
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Msg>,
        event: SupervisionEvent,
        _: &mut Args,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            // A worker has no children.
            SupervisionEvent::ActorStarted(_)
            | SupervisionEvent::ActorFailed(..)
            | SupervisionEvent::ActorTerminated(..)
            | SupervisionEvent::ProcessGroupChanged(_) => Ok(()),
        }
    }
}

impl Args {
    fn perform(&mut self, myself: &ActorRef<Msg>, effects: Vec<Effect>) {
        let mut out = Vec::new();
        for effect in effects {
            match effect {
                Effect::Compute { job, cost } => {
                    if let Some(what) = self.tally.begin(&job, self.address) {
                        tracing::warn!(what, "work is done again");
                        self.pool.again(cost);
                    }
                    let myself = myself.clone();
                    self.pool.submit(job, cost, move |result| {
                        let message = match result {
                            Ok(outcome) => Msg::Event(Event::Computed(outcome)),
                            Err(words) => Msg::JobFailed(words),
                        };
                        // The worker may have been stopped meanwhile; then nobody wants the outcome.
                        let _ = myself.cast(message);
                    });
                }
                Effect::Send { .. } | Effect::Tell { .. } => out.push(effect),
            }
        }
        if !out.is_empty() {
            // The node outlives its workers; if it is ending, so is this worker.
            let _ = self.node.cast(node::Msg::Effects { from: self.address, effects: out });
        }
    }
}
