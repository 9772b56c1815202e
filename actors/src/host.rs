//! The core of an expert host: batches the rows of one layer's experts on one node.
//!
//! Holds nothing that a new life would miss: rows belong to experts, which keep them.
//! - HO-1: messages that came together are computed together, once every expert among them has said
//!   whether its rows need work: one batch for each micro-batch, so that lanes keep their threads busy and
//!   rows that lie together stay together. What is made again for a stage's new life is a batch of its own.
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
    /// Batches in work.
    computing: u64,
    batches: u64,
}

impl HostCore {
    /// A new host.
    pub(crate) fn new(spec: Arc<JobSpec>) -> Self {
        Self { spec, table: Arc::default(), asked: BTreeMap::new(), ready: Vec::new(), computing: 0, batches: 0 }
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
        if !self.asked.is_empty() || self.ready.is_empty() {
            return Vec::new();
        }
        let mut batches: BTreeMap<_, Vec<WorkItem>> = BTreeMap::new();
        for item in self.ready.drain(..) {
            batches.entry((item.stage, item.turn, item.again)).or_default().push(item);
        }
        self.computing += batches.len() as u64;
        self.batches += batches.len() as u64;
        let compute = |mut items: Vec<WorkItem>| {
            // Experts answer in any order. The rows that a stage gave out lie in order of expert, and so do those
            // that were made of them: in one piece nothing is copied.
            items.sort_by_key(|item| item.expert.actor);
            let rows: u64 = items.iter().map(|i| i.work.rows() as u64).sum();
            let cost = rows * 3 * self.spec.model.hidden as u64 * self.spec.model.expert_inner as u64;
            Effect::Compute { job: Job::Experts(items), cost }
        };
        batches.into_values().map(compute).collect()
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
                self.computing -= 1;
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
            "{} batches, {} of them in work, {} rows waiting, {} experts asked",
            self.batches,
            self.computing,
            self.ready.len(),
            self.asked.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Envelope, Pass, Turn, Work};
    use crate::testing::{address, drive, materials, replace, table, weights};
    use crate::worker::Materials;
    use everstep_kernels::{Group, Tensor};

    fn expert(n: u32) -> ActorId {
        ActorId::Expert { layer: 1, expert: n }
    }

    fn batch(experts: &[u32]) -> Event {
        let turn = Turn { step: 1, lane: 0, micro_batch: 0 };
        let rows = || Tensor::from_vec(1, 4, vec![1.0; 4]);
        let from = address(ActorId::Stage { lane: 0, stage: 0 }, 1);
        let envelope = |n: &u32| Envelope {
            from,
            to: address(expert(*n), 1),
            body: Body::Rows { turn, pass: Pass::Forward, rows: rows() },
        };
        Event::Local { from: ActorId::Host { layer: 1 }, local: Local::Batch(experts.iter().map(envelope).collect()) }
    }

    fn ready(materials: &Materials, n: u32) -> Event {
        let Event::Message { body: Body::Weights { tensors, .. }, .. } =
            weights(materials, Group::Expert { layer: 1, expert: n })
        else {
            unreachable!()
        };
        let names = &materials.layout.of_group[&Group::Expert { layer: 1, expert: n }];
        let map = names
            .iter()
            .zip(tensors)
            .map(|(p, t)| (materials.layout.parameters[*p as usize].name.clone(), t))
            .collect();
        let item = WorkItem {
            expert: address(expert(n), 1),
            stage: address(ActorId::Stage { lane: 0, stage: 0 }, 1),
            turn: Turn { step: 1, lane: 0, micro_batch: 0 },
            weights: everstep_kernels::ExpertWeights::new(&map, 1, n),
            work: Work::Forward { x: Tensor::from_vec(1, 4, vec![1.0; 4]) },
            again: false,
        };
        Event::Local { from: expert(n), local: Local::Ready(Box::new(item)) }
    }

    fn host(materials: &Materials) -> HostCore {
        let mut core = HostCore::new(Arc::clone(&materials.spec));
        drive(&mut core, Event::Table(Arc::new(table(materials))));
        core
    }

    /// HO-1: one batch once every expert has spoken, with work or without.
    #[test]
    fn a_batch_waits_for_every_expert_that_was_asked() {
        let materials = materials();
        let mut core = host(&materials);
        assert_eq!(drive(&mut core, batch(&[0, 1, 2])).told.len(), 3);
        assert_eq!(drive(&mut core, ready(&materials, 0)).jobs, 0);
        assert_eq!(drive(&mut core, ready(&materials, 2)).jobs, 0);
        let asked = drive(&mut core, Event::Local { from: expert(1), local: Local::Nothing });
        assert_eq!((asked.jobs, asked.sent.len(), asked.told.len()), (1, 2, 2));
    }

    /// HO-1: rows of two micro-batches that came together are two batches, and so is what is made again.
    #[test]
    fn micro_batches_are_computed_apart() {
        let materials = materials();
        let mut core = host(&materials);
        drive(&mut core, batch(&[0, 1, 0]));
        drive(&mut core, ready(&materials, 0));
        let of_lane = |n: u32, lane: u32| {
            let Event::Local { from, local: Local::Ready(mut item) } = ready(&materials, n) else { unreachable!() };
            (item.stage, item.turn.lane) = (address(ActorId::Stage { lane, stage: 0 }, 1), lane);
            Event::Local { from, local: Local::Ready(item) }
        };
        assert_eq!(drive(&mut core, of_lane(0, 1)).jobs, 0, "expert 1 has not spoken");
        let asked = drive(&mut core, ready(&materials, 1));
        assert_eq!((asked.jobs, asked.sent.len()), (2, 3));
        let again = |core: &mut HostCore, n: u32, again: bool| {
            let Event::Local { from, local: Local::Ready(mut item) } = ready(&materials, n) else { unreachable!() };
            (item.stage.incarnation, item.again) = (Incarnation(2), again);
            drive(core, Event::Local { from, local: Local::Ready(item) })
        };
        drive(&mut core, batch(&[0, 1]));
        assert_eq!(again(&mut core, 0, true).jobs, 0);
        let asked = again(&mut core, 1, false);
        assert_eq!((asked.jobs, asked.sent.len()), (2, 2), "a batch is made again or it is not");
    }

    /// HO-2: an expert that died is not waited for, and its work is dropped.
    #[test]
    fn a_dead_expert_is_not_waited_for() {
        let materials = materials();
        let mut core = host(&materials);
        drive(&mut core, batch(&[0, 1]));
        drive(&mut core, ready(&materials, 0));
        let asked = drive(&mut core, Event::Table(Arc::new(replace(&table(&materials), expert(1)))));
        assert_eq!((asked.jobs, asked.sent.len()), (1, 1));
    }
}
