//! Makes the core of a placed actor.

use crate::data::Corpus;
use crate::effect::Core;
use crate::expert::ExpertCore;
use crate::host::HostCore;
use crate::ids::{ActorId, Address};
use crate::reducer::ReducerCore;
use crate::spec::{JobSpec, Layout};
use crate::stage::StageCore;
use std::sync::Arc;

/// What every core of a job is made from.
#[derive(Debug, Clone)]
pub(crate) struct Materials {
    /// The job.
    pub spec: Arc<JobSpec>,
    /// Its parameters.
    pub layout: Arc<Layout>,
    /// Its text.
    pub corpus: Corpus,
}

impl Materials {
    /// A new life of an actor. The supervisor and the keeper are not placed on nodes.
    pub(crate) fn core(&self, address: Address) -> Option<Box<dyn Core>> {
        let (spec, layout) = (Arc::clone(&self.spec), Arc::clone(&self.layout));
        match address.actor {
            ActorId::Stage { lane, stage } => {
                Some(Box::new(StageCore::new(spec, layout, self.corpus.clone(), lane, stage)))
            }
            ActorId::Expert { .. } => Some(Box::new(ExpertCore::new(spec, layout, address))),
            ActorId::Host { .. } => Some(Box::new(HostCore::new(spec))),
            ActorId::Reducer { shard, replica } => Some(Box::new(ReducerCore::new(spec, layout, shard, replica))),
            ActorId::Supervisor | ActorId::Keeper => None,
        }
    }
}
