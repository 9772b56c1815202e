//! What a job is: a checked value from which every pure function of the job follows.

use crate::ids::{ActorId, Step};
use everstep_kernels::{Group, ModelConfig, Parameter, StageModel, Update};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Learning rate and optimizer.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerSpec {
    /// Learning rate at its highest.
    pub lr: f64,
    /// Learning rate at the last step.
    pub lr_end: f64,
    /// Steps from zero to the highest.
    pub warmup: Step,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of matrices.
    pub weight_decay: f64,
    /// Gradients with a greater norm are scaled down to it.
    pub clip: f64,
    /// How far a step moves a gate's bias (gamma of the technical report, 2.1.2).
    pub bias_step: f32,
}

/// One training job. Everything that a result may depend on is in here, and the corpus.
#[derive(Debug, Clone, PartialEq)]
pub struct JobSpec {
    /// The model.
    pub model: ModelConfig,
    /// Names the initial weights and the order of the data.
    pub seed: u64,
    /// Steps to train.
    pub steps: Step,
    /// The optimizer.
    pub optimizer: OptimizerSpec,
    /// Copies of the pipeline.
    pub lanes: u32,
    /// Stages of a pipeline.
    pub stages: u32,
    /// Micro-batches of a lane and step.
    pub micro_batches: u32,
    /// Sequences of a micro-batch.
    pub sequences: u32,
    /// Parts into which the parameters are cut for their reducers.
    pub shards: u32,
    /// Further copies of each shard.
    pub mirrors: u32,
    /// Steps between checkpoints.
    pub checkpoint_every: Step,
}

impl JobSpec {
    /// Layers of a stage. The first stages get one more where they don't divide.
    pub fn layers_of(&self, stage: u32) -> Range<usize> {
        let (layers, stages, s) = (self.model.layers, self.stages as usize, stage as usize);
        let (each, more) = (layers / stages, layers % stages);
        let start = s * each + s.min(more);
        start..start + each + usize::from(s < more)
    }

    /// Groups of parameters of a stage.
    pub fn groups_of_stage(&self, stage: u32) -> Vec<Group> {
        StageModel::groups(&self.model, self.layers_of(stage))
    }

    /// The shard of each group: the biggest first, each to the lightest shard so far.
    pub fn shard_of_groups(&self) -> BTreeMap<Group, u32> {
        let size = |g: Group| self.model.parameters_of(g).iter().map(Parameter::len).sum::<usize>();
        let mut groups: Vec<(usize, Group)> = self.model.groups_of_model().into_iter().map(|g| (size(g), g)).collect();
        groups.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut weights = vec![0usize; self.shards as usize];
        let mut shards = BTreeMap::new();
        for (size, group) in groups {
            let lightest = (0..weights.len()).min_by_key(|s| weights[*s]).expect("a job has a shard");
            weights[lightest] += size;
            shards.insert(group, lightest as u32);
        }
        shards
    }

    /// Who sends gradient sums of a group.
    pub fn senders_of(&self, group: Group) -> Vec<ActorId> {
        match group {
            Group::Expert { layer, expert } => vec![ActorId::Expert { layer, expert }],
            Group::Embedding | Group::Layer(_) | Group::Head => {
                let stage = (0..self.stages)
                    .find(|s| self.groups_of_stage(*s).contains(&group))
                    .expect("every group that no expert has belongs to a stage");
                (0..self.lanes).map(|lane| ActorId::Stage { lane, stage }).collect()
            }
        }
    }

    /// Targets of a step: what the loss is divided by.
    pub fn targets_of_step(&self) -> u64 {
        u64::from(self.lanes) * u64::from(self.micro_batches) * u64::from(self.sequences) * self.model.sequence as u64
    }

    /// The learning rate of a step: linear up, then half a cosine down. A pure function of the step.
    pub fn lr(&self, step: Step) -> f64 {
        let o = &self.optimizer;
        if step <= o.warmup {
            return o.lr * step as f64 / o.warmup.max(1) as f64;
        }
        let rest = (self.steps - o.warmup).max(1) as f64;
        let done = ((step - o.warmup) as f64 / rest).min(1.0);
        // The portable cosine: a system's own may differ in the last bit.
        o.lr_end + (o.lr - o.lr_end) * 0.5 * (1.0 + everstep_kernels::cosine(std::f64::consts::PI * done))
    }

    /// Whether the state after a step is stored.
    pub fn is_stored(&self, step: Step) -> bool {
        step > 0 && (step.is_multiple_of(self.checkpoint_every) || step == self.steps)
    }

    /// Every actor that is placed on nodes, mirrors aside.
    pub fn workers(&self) -> Vec<ActorId> {
        let stages = (0..self.lanes).flat_map(|lane| (0..self.stages).map(move |stage| ActorId::Stage { lane, stage }));
        let experts = self.model.groups_of_model().into_iter().filter_map(|g| match g {
            Group::Expert { layer, expert } => Some(ActorId::Expert { layer, expert }),
            Group::Embedding | Group::Layer(_) | Group::Head => None,
        });
        stages.chain(experts).collect()
    }
}

/// The parameters of a job in order of name, with their shards: one look-up for all that number them.
#[derive(Debug, Clone)]
pub struct Layout {
    /// All parameters by name; an index here is a parameter's number.
    pub parameters: Vec<Parameter>,
    /// All groups in order of the model; an index here is a group's number in messages.
    pub all_groups: Vec<Group>,
    /// The number of each group.
    pub number_of: BTreeMap<Group, u32>,
    /// Groups of each shard, ascending.
    pub groups: Vec<Vec<Group>>,
    /// The shard of each group.
    pub shard_of: BTreeMap<Group, u32>,
    /// Numbers of the parameters of each group.
    pub of_group: BTreeMap<Group, Vec<u32>>,
}

impl Layout {
    /// The layout of a job.
    pub fn new(spec: &JobSpec) -> Arc<Self> {
        let mut parameters = spec.model.parameters();
        parameters.sort_by(|a, b| a.name.cmp(&b.name));
        let shard_of = spec.shard_of_groups();
        let mut groups = vec![Vec::new(); spec.shards as usize];
        for (group, shard) in &shard_of {
            groups[*shard as usize].push(*group);
        }
        let mut of_group: BTreeMap<Group, Vec<u32>> = BTreeMap::new();
        for (number, p) in parameters.iter().enumerate() {
            of_group.entry(p.group).or_default().push(number as u32);
        }
        let all_groups = spec.model.groups_of_model();
        let number_of = all_groups.iter().enumerate().map(|(number, g)| (*g, number as u32)).collect();
        Arc::new(Self { parameters, all_groups, number_of, groups, shard_of, of_group })
    }

    /// Numbers of a shard's parameters, by group.
    pub fn of_shard(&self, shard: u32) -> Vec<u32> {
        self.groups[shard as usize].iter().flat_map(|g| self.of_group[g].iter().copied()).collect()
    }

    /// Whether a parameter has a gradient.
    pub fn has_gradient(&self, number: u32) -> bool {
        self.parameters[number as usize].update != Update::Balance
    }
}
