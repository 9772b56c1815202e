//! Planned multiply-adds and bytes: of what an actor does in a step, and of every part of a stage's operations.
//!
//! Bytes are the most that an actor holds at once: weights and their sums, activations of the micro-batches that are on
//! their way, and what its outbox keeps until the commit: copies of what it sent, and recipes of what it makes again.
//!
//! An operation of a stage stops wherever it needs experts; its parts are counted apart.
//! - CS-1: the parts of a pass add up to the pass, wherever it stops.

use crate::ids::ActorId;
use crate::message::Pass;
use crate::spec::JobSpec;
use everstep_kernels::{Group, ModelConfig, Parameter, Update};
use std::collections::BTreeMap;

/// Of one token's way through a group, forward: the elements of its matrices, and for a layer its attention to half a
/// sequence. The embedding is looked up, not multiplied.
pub(crate) fn of_token(model: &ModelConfig, group: Group) -> u64 {
    let matrices = |update: Update| update == Update::Decayed;
    let products = || {
        let parameters = model.parameters_of(group);
        parameters.iter().filter(|p| matrices(p.update)).map(|p| Parameter::len(p) as u64).sum::<u64>()
    };
    match group {
        Group::Embedding => 0,
        Group::Head | Group::Expert { .. } => products(),
        Group::Layer(_) => {
            let scores = model.sequence * model.heads * (model.nope + model.rope + model.value) / 2;
            products() + scores as u64
        }
    }
}

/// A stretch of a stage's layers.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    cost: u64,
    /// The layer, if it waits for experts.
    mixture: Option<u32>,
}

/// Of a stage's operations on one micro-batch.
#[derive(Debug, Clone)]
pub(crate) struct StageCosts {
    /// In the order of the forward function.
    stretches: Vec<Stretch>,
}

impl StageCosts {
    /// Of a stage of a job.
    pub(crate) fn new(spec: &JobSpec, stage: u32) -> Self {
        let model = &spec.model;
        let tokens = u64::from(spec.sequences) * model.sequence as u64;
        let layer = |n: usize| Stretch {
            cost: tokens * of_token(model, Group::Layer(n as u32)),
            mixture: model.is_mixture(n).then_some(n as u32),
        };
        let head = Stretch { cost: tokens * of_token(model, Group::Head), mixture: None };
        let layers = spec.layers_of(stage);
        let last = layers.end == model.layers;
        let mut stretches: Vec<Stretch> = layers.map(layer).collect();
        if last {
            stretches.push(head);
            // A module of multi-token prediction has a block, and the head's weights once more.
            stretches.extend((model.layers..model.blocks()).flat_map(|n| [layer(n), head]));
        }
        Self { stretches }
    }

    /// Of one whole pass: forward, or the input part, or the weight part of backward.
    pub(crate) fn whole(&self) -> u64 {
        self.stretches.iter().map(|s| s.cost).sum()
    }

    fn at(&self, layer: u32) -> usize {
        self.stretches.iter().position(|s| s.mixture == Some(layer)).expect("a layer of the stage that has experts")
    }

    /// Of the part that goes on after the experts of `after` (none: that begins), up to the next experts or the end.
    pub(crate) fn part(&self, pass: Pass, after: Option<u32>) -> u64 {
        match pass {
            Pass::Forward => {
                let rest = &self.stretches[after.map_or(0, |layer| self.at(layer) + 1)..];
                let end = rest.iter().position(|s| s.mixture.is_some()).map_or(rest.len(), |n| n + 1);
                rest[..end].iter().map(|s| s.cost).sum()
            }
            // A layer's gradient goes through its experts first.
            Pass::Backward => {
                let end = after.map_or(self.stretches.len(), |layer| self.at(layer));
                let own = after.map_or(0, |_| self.stretches[end].cost);
                let below = self.stretches[..end].iter().rev().take_while(|s| s.mixture.is_none());
                own + below.map(|s| s.cost).sum::<u64>()
            }
        }
    }

    /// Of the weight products that can be made while the backward function waits for the experts of `layer`, with those that
    /// could be made before.
    pub(crate) fn weights_above(&self, layer: u32) -> u64 {
        self.stretches[self.at(layer) + 1..].iter().map(|s| s.cost).sum()
    }
}

/// What an outbox keeps of a step until its commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Kept {
    /// Bytes of copies: sums of gradients, and what goes from stage to stage.
    pub(crate) copies: u64,
    /// Bytes of which rows for experts are made again. Their answers are made of those rows, so nothing is kept of them.
    pub(crate) recipes: u64,
}

/// Bytes of an actor at most, what its outbox keeps among them.
#[derive(Debug, Clone, Copy, Default)]
struct Bytes {
    all: u64,
    kept: Kept,
}

/// Of a stage.
fn stage_bytes(spec: &JobSpec, stage: u32) -> Bytes {
    let m = &spec.model;
    let tokens = u64::from(spec.sequences) * m.sequence as u64;
    let micro_batches = u64::from(spec.micro_batches.at(spec.steps));
    let parameters = stage_elements(spec, stage);
    // Of a token in a layer: the residual stream and its norms, queries, keys, values, the result, and the inner rows.
    let attention = m.heads * (2 * (m.nope + m.rope) + 2 * m.value + m.nope) + m.query_rank.unwrap_or(0) + m.kv_rank;
    let last = stage + 1 == spec.stages;
    // What is kept of rows for experts in a step with audits.
    let (mut saved, mut recipes, mut rows) = (0, 0, 0);
    for layer in spec.layers_of(stage).chain(m.layers..if last { m.blocks() } else { m.layers }) {
        let inner = if m.is_mixture(layer) { m.shared_experts * m.expert_inner } else { m.dense_inner };
        saved += 6 * m.hidden + attention + 3 * inner;
        if m.is_mixture(layer) {
            // Rows to experts and back, of both passes.
            saved += 2 * m.top_k * m.hidden;
            rows += 2 * m.top_k * m.hidden;
            // What they are copies of, in both passes, and 16 bytes for each choice: its weight and its place among the rows.
            recipes += 2 * m.hidden + 16 / activation(spec) as usize * m.top_k;
        }
    }
    let logits = if last { 2 * m.vocabulary } else { 0 };
    let in_flight = micro_batches.min(u64::from(spec.stages - stage));
    let sent = (usize::from(stage > 0) + usize::from(!last)) * m.hidden;
    // They are stored as activations are.
    let of_step = |of_token: usize| activation(spec) * tokens * micro_batches * of_token as u64;
    let audited = if spec.audit > 0 { of_step(rows) } else { 0 };
    let kept = Kept { copies: WORD * parameters + of_step(sent) + audited, recipes: of_step(recipes) };
    let held = WORD * (parameters + tokens * in_flight * (saved + logits) as u64);
    Bytes { all: held + kept.copies + kept.recipes, kept }
}

/// Of an expert with an even load.
fn expert_bytes(spec: &JobSpec, group: Group) -> Bytes {
    let m = &spec.model;
    let micro_batches = spec.micro_batches.at(spec.steps);
    let rows_of = |micro_batches: u32, all: u32| {
        let tokens = spec.targets_of_step(spec.steps) / u64::from(all) * u64::from(micro_batches);
        (tokens * m.top_k as u64).div_ceil(m.experts as u64)
    };
    // Those that it takes, and one of each lane that waits; but a new life may be sent a whole step at once.
    let [computed, sent] = [micro_batches.min(spec.window() + 1), micro_batches].map(|n| rows_of(n, micro_batches));
    // Answers are kept in a step with audits.
    let answers = if spec.audit > 0 { activation(spec) * sent * 2 * m.hidden as u64 } else { 0 };
    let kept = Kept { copies: WORD * elements(m, group) + answers, recipes: 0 };
    // Rows and inner rows stay until the weight gradient.
    let inner = WORD * computed * 3 * m.expert_inner as u64;
    let held = WORD * elements(m, group) + activation(spec) * sent * 2 * m.hidden as u64 + inner;
    Bytes { all: held + kept.copies, kept }
}

/// Bytes of a word of f32: in low precision there is less.
const WORD: u64 = 4;

fn stage_elements(spec: &JobSpec, stage: u32) -> u64 {
    spec.groups_of_stage(stage).into_iter().map(|g| elements(&spec.model, g)).sum()
}

/// Bytes of an element of an activation.
fn activation(spec: &JobSpec) -> u64 {
    if spec.precision.is_low() { 2 } else { WORD }
}

fn elements(model: &ModelConfig, group: Group) -> u64 {
    model.parameters_of(group).iter().map(|p| Parameter::len(p) as u64).sum()
}

/// Of a step, by actor: what a place costs.
#[derive(Debug, Clone)]
pub(crate) struct Costs {
    /// Multiply-adds and bytes.
    workers: BTreeMap<ActorId, (u64, Bytes)>,
    /// Of each copy, by shard.
    shards: Vec<(u64, u64)>,
    /// Bytes of the weights of each stage.
    weights: Vec<u64>,
}

impl Costs {
    /// Expected costs, with even loads of the experts.
    pub(crate) fn new(spec: &JobSpec) -> Self {
        let tokens = spec.targets_of_step(spec.steps);
        let passes = 3 * u64::from(spec.micro_batches.at(spec.steps));
        let mut workers = BTreeMap::new();
        for actor in spec.workers() {
            let cost = match actor {
                ActorId::Stage { stage, .. } => {
                    (passes * StageCosts::new(spec, stage).whole(), stage_bytes(spec, stage))
                }
                ActorId::Expert { layer, expert } => {
                    let share = tokens * spec.model.top_k as u64 / spec.model.experts as u64;
                    let group = Group::Expert { layer, expert };
                    (3 * share * of_token(&spec.model, group), expert_bytes(spec, group))
                }
                ActorId::Supervisor | ActorId::Keeper | ActorId::Reducer { .. } | ActorId::Host { .. } => {
                    (0, Bytes::default())
                }
            };
            workers.insert(actor, cost);
        }
        let mut shards = vec![(0, 0); spec.shards as usize];
        for (group, shard) in spec.shard_of_groups() {
            let (elements, senders) = (elements(&spec.model, group), spec.senders_of(group).len() as u64);
            let of_shard = &mut shards[shard as usize];
            // An update costs about as much as a few passes of one row. Beside the state there are what senders gave and their
            // sum, then the sum and the next state; while a copy that is late makes it, what senders gave for the step after too.
            let parts = spec.parts().len() as u64;
            let beside = if spec.mirrors > 0 { senders + parts } else { senders.max(parts) };
            of_shard.0 += 8 * elements;
            of_shard.1 += WORD * elements * (parts + 1 + beside);
        }
        let weights = (0..spec.stages).map(|stage| WORD * stage_elements(spec, stage)).collect();
        Self { workers, shards, weights }
    }

    fn both(&self, actor: ActorId) -> (u64, u64) {
        match actor {
            ActorId::Reducer { shard, .. } => self.shards[shard as usize],
            other => self.workers.get(&other).map_or((0, 0), |(cost, bytes)| (*cost, bytes.all)),
        }
    }

    /// Multiply-adds of one actor.
    pub(crate) fn of(&self, actor: ActorId) -> u64 {
        self.both(actor).0
    }

    /// Bytes of one actor, if it is alone.
    pub(crate) fn bytes(&self, actor: ActorId) -> u64 {
        self.both(actor).1
    }

    /// Bytes among them that another lane of the same stage on the node holds too.
    pub(crate) fn weights(&self, actor: ActorId) -> u64 {
        match actor {
            ActorId::Stage { stage, .. } => self.weights[stage as usize],
            _ => 0,
        }
    }

    /// What its outbox keeps.
    pub(crate) fn kept(&self, actor: ActorId) -> Kept {
        self.workers.get(&actor).map_or(Kept::default(), |(_, bytes)| bytes.kept)
    }

    /// Shards.
    pub(crate) fn shards(&self) -> u32 {
        self.shards.len() as u32
    }

    /// Stages and experts.
    pub(crate) fn workers(&self) -> impl Iterator<Item = ActorId> {
        self.workers.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CS-1.
    #[test]
    fn the_parts_of_a_pass_add_up() {
        for shape in 0..4 {
            let spec = crate::sim::spec(shape);
            for stage in 0..spec.stages {
                let costs = StageCosts::new(&spec, stage);
                let mixtures: Vec<u32> = costs.stretches.iter().filter_map(|s| s.mixture).collect();
                let sum = |pass| {
                    let parts = std::iter::once(None).chain(mixtures.iter().copied().map(Some));
                    parts.map(|after| costs.part(pass, after)).sum::<u64>()
                };
                assert_eq!([sum(Pass::Forward), sum(Pass::Backward)], [costs.whole(); 2], "shape {shape}, {stage}");
                let above: Vec<u64> = mixtures.iter().map(|layer| costs.weights_above(*layer)).collect();
                assert!(above.is_sorted_by(|a, b| a > b) && above.iter().all(|a| *a < costs.whole()), "{above:?}");
            }
        }
    }
}
