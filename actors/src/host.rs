//! The core of an expert host: batches the rows of one layer's experts on one node.
//!
//! Holds nothing that a new life would miss: rows belong to experts, which keep them.
//! - HO-1: messages that came together are computed together, once every expert among them has said
//!   whether its rows need work.
//! - HO-2: an expert that dies before it answers is not waited for.

use crate::compute::{Job, Outcome};
use crate::effect::{Core, Effect, Event};
use crate::ids::{ActorId, Incarnation};
use crate::message::{Body, Local, WorkItem};
use crate::spec::JobSpec;
use crate::table::Table;
use std::collections::BTreeMap;
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub(crate) struct HostCore {
    spec: Arc<JobSpec>,
    table: Arc<Table>,
    /// Answers that are missing, by the life of the expert that was asked.
    asked: BTreeMap<ActorId, (Incarnation, u32)>,
    ready: Vec<WorkItem>,
    computing: bool,
    batches: u64,
}

impl HostCore {
    /// A new host.
    pub(crate) fn new(spec: Arc<JobSpec>) -> Self {
        Self { spec, table: Arc::default(), asked: BTreeMap::new(), ready: Vec::new(), computing: false, batches: 0 }
    }

    fn answered(&mut self, from: ActorId) {
        if let Some((_, missing)) = self.asked.get_mut(&from) {
            *missing -= 1;
            if *missing == 0 {
                self.asked.remove(&from);
            }
        }
    }

    fn advance(&mut self) -> Vec<Effect> {
        if self.computing || !self.asked.is_empty() || self.ready.is_empty() {
            return Vec::new();
        }
        self.computing = true;
        self.batches += 1;
        let items = std::mem::take(&mut self.ready);
        let rows: u64 = items.iter().map(|i| i.work.rows() as u64).sum();
        let cost = rows * 3 * self.spec.model.hidden as u64 * self.spec.model.expert_inner as u64;
        vec![Effect::Compute { job: Job::Experts(items), cost }]
    }
}

impl Core for HostCore {
    fn on(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Table(table) => {
                let lives =
                    |actor: &ActorId, life: Incarnation| table.address(*actor).is_some_and(|a| a.incarnation == life);
                self.asked.retain(|expert, (life, _)| lives(expert, *life));
                self.ready.retain(|item| lives(&item.expert.actor, item.expert.incarnation));
                self.table = table;
            }
            Event::Local { local: Local::Batch(envelopes), .. } => {
                for envelope in envelopes {
                    let to = envelope.to;
                    let asked = self.asked.entry(to.actor).or_insert((to.incarnation, 0));
                    asked.1 += 1;
                    effects.push(Effect::Tell { to: to.actor, local: Local::Arrived(envelope) });
                }
            }
            Event::Local { from, local: Local::Ready(item) } => {
                self.answered(from);
                self.ready.push(*item);
            }
            Event::Local { from, local: Local::Nothing } => self.answered(from),
            Event::Computed(Outcome::Experts(done)) => {
                self.computing = false;
                for (expert, stage, turn, result) in done {
                    let body = Body::Answer { turn, pass: result.pass(), rows: result.rows().clone() };
                    effects.push(Effect::Tell {
                        to: expert.actor,
                        local: Local::Done { expert, turn, result: Box::new(result) },
                    });
                    effects.push(Effect::Send { from: Some(expert), to: stage, body });
                }
            }
            Event::Computed(_) | Event::Message { .. } | Event::Local { .. } => {}
        }
        effects.extend(self.advance());
        effects
    }

    fn describe(&self) -> String {
        format!(
            "{} batches, {} rows of work waiting, {} experts asked",
            self.batches,
            self.ready.len(),
            self.asked.len()
        )
    }
}
