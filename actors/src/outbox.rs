//! What an actor sent in the step that is not committed yet.
//!
//! Promise: a receiver that gets a new life gets every kept message again (DESIGN section 5).
//! Bound: the messages of at most two steps, since a sender cannot start a step before the last but
//! one is committed.

use crate::effect::Effect;
use crate::ids::{ActorId, Step};
use crate::message::Body;
use crate::table::Table;
use everstep_kernels::Tensor;
use std::collections::BTreeMap;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    kept: BTreeMap<ActorId, Vec<(Step, Body<Tensor>)>>,
}

impl Outbox {
    /// Keeps a message of `step` and gives the effect that sends it.
    pub(crate) fn send(&mut self, step: Step, to: ActorId, body: Body<Tensor>) -> Effect {
        self.kept.entry(to).or_default().push((step, body.clone()));
        Effect::send(to, body)
    }

    /// Keeps a message that somebody else sends in the actor's name.
    pub(crate) fn keep(&mut self, step: Step, to: ActorId, body: Body<Tensor>) {
        self.kept.entry(to).or_default().push((step, body));
    }

    /// Sends again what receivers with a new life have not got.
    pub(crate) fn resend(&self, before: &Table, now: &Table) -> Vec<Effect> {
        let replaced = self.kept.iter().filter(|(to, _)| now.replaced(before, **to));
        replaced.flat_map(|(to, kept)| kept.iter().map(|(_, body)| Effect::send(*to, body.clone()))).collect()
    }

    /// Forgets messages of committed steps.
    pub(crate) fn forget_until(&mut self, committed: Step) {
        for kept in self.kept.values_mut() {
            kept.retain(|(step, _)| *step > committed);
        }
        self.kept.retain(|_, kept| !kept.is_empty());
    }

    /// Messages kept.
    pub(crate) fn len(&self) -> usize {
        self.kept.values().map(Vec::len).sum()
    }
}
