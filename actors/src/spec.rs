//! What a job is: a checked value from which every pure function of the job follows.

use crate::ids::{ActorId, Step};
use crate::pieces::Pieces;
use everstep_kernels::{Group, ModelConfig, Parameter, Precision, Scales, StageModel, Update, Words};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Learning rate and optimizer.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerSpec {
    /// Learning rate at its highest.
    pub lr: f64,
    /// Learning rate after its decay.
    pub lr_end: f64,
    /// Steps from zero to the highest.
    pub warmup: Step,
    /// Steps at the highest.
    pub hold: Step,
    /// Steps of the decay; none: all that are left.
    pub decay_steps: Option<Step>,
    /// The last steps, with a learning rate of their own.
    pub tail: Option<(Step, f64)>,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of matrices.
    pub weight_decay: f64,
    /// What an average of the weights keeps of itself at each step (EMA); none: no average is kept.
    pub ema: Option<f64>,
    /// Gradients with a greater norm are scaled down to it.
    pub clip: f64,
    /// How far a step moves a gate's bias (gamma of the technical report, 2.1.2).
    pub bias_step: Pieces<f32>,
    /// Weight of the sequence-wise balance loss (alpha, 2.1.2).
    pub balance: f32,
    /// Weight of the loss of multi-token prediction (lambda, 2.2).
    pub mtp: Pieces<f32>,
}

impl OptimizerSpec {
    /// Where a parameter's state has the average, behind the weight and its moments.
    pub const AVERAGE: usize = 3;
}

/// One training job. Everything that a result may depend on is in here, and the corpus.
#[derive(Debug, Clone, PartialEq)]
pub struct JobSpec {
    /// The model.
    pub model: ModelConfig,
    /// How it is computed.
    pub precision: Precision,
    /// Names the initial weights and the order of the data.
    pub seed: u64,
    /// The weights of the sources of text, in their order.
    pub source_weights: Vec<f64>,
    /// Whether the first state was imported: it is the checkpoint of step 0, not made from the seed.
    pub imported: bool,
    /// Steps to train.
    pub steps: Step,
    /// The optimizer.
    pub optimizer: OptimizerSpec,
    /// Copies of the pipeline.
    pub lanes: u32,
    /// Stages of a pipeline.
    pub stages: u32,
    /// Micro-batches of a lane in a step.
    pub micro_batches: Pieces<u32>,
    /// Sequences of a micro-batch.
    pub sequences: u32,
    /// Parts into which the parameters are cut for their reducers.
    pub shards: u32,
    /// Further copies of each shard.
    pub mirrors: u32,
    /// No step is committed while a shard has fewer.
    pub thin_waits: bool,
    /// One in so many actors is audited in each step, on the average; 0: none.
    pub audit: u32,
    /// Steps between checkpoints.
    pub checkpoint_every: Step,
}

impl JobSpec {
    /// What the parts of a parameter's state are stored as: the weight, both moments (BF16 in low precision, technical report
    /// 3.3) and, if it is kept, the average of the weight.
    pub fn parts(&self) -> Vec<Words> {
        let moment = if self.precision.is_low() { Words::Bf16 } else { Words::F32 };
        let average = self.optimizer.ema.map(|_| Words::F32);
        [Words::F32, moment, moment].into_iter().chain(average).collect()
    }

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

    /// Who sends gradient sums of a group, and gets its weights.
    pub fn senders_of(&self, group: Group) -> Vec<ActorId> {
        match group {
            Group::Expert { layer, expert } => vec![ActorId::Expert { layer, expert }],
            Group::Embedding | Group::Layer(_) | Group::Head => {
                let stages: Vec<u32> = (0..self.stages).filter(|s| self.groups_of_stage(*s).contains(&group)).collect();
                let of_lane = |lane| stages.iter().map(move |stage| ActorId::Stage { lane, stage: *stage });
                (0..self.lanes).flat_map(of_lane).collect()
            }
        }
    }

    /// The stage that runs a layer.
    pub fn stage_of_layer(&self, layer: u32) -> u32 {
        let has = |s: &u32| self.groups_of_stage(*s).contains(&Group::Layer(layer));
        (0..self.stages).find(has).expect("every layer belongs to a stage")
    }

    /// The uses of a parameter whose gradients a sender adds up. Multi-token prediction uses the
    /// embedding and the head once more, in the last stage.
    pub fn uses(&self, parameter: &Parameter, sender: ActorId) -> &'static [usize] {
        let ActorId::Stage { stage, .. } = sender else { return &[0] };
        let (first, last) = (stage == 0, stage + 1 == self.stages && self.model.mtp > 0);
        match (parameter.group, parameter.update) {
            (Group::Embedding, _) => match (first, last) {
                (true, true) => &[0, 1],
                (true, false) => &[0],
                (false, _) => &[1],
            },
            (Group::Head, Update::Decayed) if last => &[0, 1],
            (Group::Head | Group::Layer(_) | Group::Expert { .. }, _) => &[0],
        }
    }

    /// Micro-batches whose rows an expert takes before the first of them is in its sum. A lane of one-forward-one-backward has
    /// at most as many on their way as there are stages, so the slowest never waits for itself.
    pub fn window(&self) -> u32 {
        self.stages + 1
    }

    /// Sequences of a lane in a step.
    pub fn sequences_of_lane(&self, step: Step) -> u64 {
        u64::from(self.micro_batches.at(step)) * u64::from(self.sequences)
    }

    /// Sequences of all lanes in a step.
    pub fn samples_of_step(&self, step: Step) -> u64 {
        u64::from(self.lanes) * self.sequences_of_lane(step)
    }

    /// Targets of a step: what the loss is divided by.
    pub fn targets_of_step(&self, step: Step) -> u64 {
        self.samples_of_step(step) * self.model.sequence as u64
    }

    /// Targets of multi-token prediction in a step: a sequence's last position has none.
    pub fn mtp_targets_of_step(&self, step: Step) -> u64 {
        self.samples_of_step(step) * (self.model.sequence as u64 - 1)
    }

    /// What the parts of a step's loss are multiplied with.
    pub fn scales(&self, step: Step) -> Scales {
        let loss = (1.0 / self.targets_of_step(step) as f64) as f32;
        Scales { loss, mtp: loss * self.optimizer.mtp.at(step), balance: loss * self.optimizer.balance }
    }

    /// The learning rate of a step: linear up, constant, half a cosine down, constant, and perhaps a tail
    /// of its own (technical report 4.2). A pure function of the step.
    pub fn lr(&self, step: Step) -> f64 {
        let o = &self.optimizer;
        if let Some((steps, lr)) = o.tail
            && step + steps > self.steps
        {
            return lr;
        }
        if step <= o.warmup {
            return o.lr * step as f64 / o.warmup.max(1) as f64;
        }
        let begin = o.warmup + o.hold;
        let end = self.steps - o.tail.map_or(0, |(steps, _)| steps).min(self.steps);
        let rest = o.decay_steps.unwrap_or(end.saturating_sub(begin)).max(1) as f64;
        let done = (step.saturating_sub(begin) as f64 / rest).min(1.0);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_follows_the_published_shape() {
        let mut spec = crate::sim::spec(0);
        spec.steps = 100;
        (spec.optimizer.lr, spec.optimizer.lr_end, spec.optimizer.warmup) = (1.0, 0.1, 10);
        (spec.optimizer.hold, spec.optimizer.decay_steps) = (20, Some(40));
        spec.optimizer.tail = Some((10, 0.05));
        assert_eq!([1, 5, 10, 11, 30].map(|s| spec.lr(s)), [0.1, 0.5, 1.0, 1.0, 1.0]);
        assert!((spec.lr(50) - 0.55).abs() < 1e-12 && (31..=70).all(|s| spec.lr(s) < spec.lr(s - 1)));
        assert!([70, 80, 90].iter().all(|s| (spec.lr(*s) - 0.1).abs() < 1e-12));
        assert_eq!([91, 100].map(|s| spec.lr(s)), [0.05, 0.05]);
        (spec.optimizer.decay_steps, spec.optimizer.tail) = (None, None);
        assert!((spec.lr(100) - 0.1).abs() < 1e-12 && spec.lr(99) > 0.1);
    }

    #[test]
    fn every_parameter_has_one_first_use_in_each_lane() {
        for shape in 0..4 {
            let spec = crate::sim::spec(shape);
            for p in spec.model.parameters().iter().filter(|p| p.update != Update::Balance) {
                let senders = spec.senders_of(p.group);
                for n in [0, 1] {
                    let count = senders.iter().filter(|s| spec.uses(p, **s).contains(&n)).count() as u32;
                    let shared = spec.model.mtp > 0
                        && p.columns > 1
                        && matches!(p.group, Group::Embedding | Group::Head)
                        && p.update == Update::Decayed;
                    let each = if matches!(p.group, Group::Expert { .. }) { 1 } else { spec.lanes };
                    assert_eq!(count, if n == 0 || shared { each } else { 0 }, "{} use {n}", p.name);
                }
            }
        }
    }
}
