//! The core of a stage: runs its program of operations as its inputs arrive.
//!
//! Owns a lane's layers, their activations and the lane's sums of the step.
//! - ST-1: an operation starts only when its inputs are there, and operations start in program order.
//! - ST-2: a message is used once; a second copy of the same key changes nothing.
//! - ST-3: a new life started with the same weights sends the same messages.
//! - ST-4: sums leave once the program is done; the step ends with the weights of its commit.
//! - ST-5: while the first stage waits for experts in a backward function, it makes weight products: nobody waits for
//!   its gradient, and their operands are still in the caches. They are added in the same order.

use crate::audit::{self, Question};
use crate::compute::{Job, Outcome, StageOperation};
use crate::costs::StageCosts;
use crate::data::Corpus;
use crate::effect::{Core, Effect, Event};
use crate::ids::{ActorId, Address, Step};
use crate::message::{Body, Pass, Turn};
use crate::outbox::Outbox;
use crate::plant::{Bug, planted};
use crate::schedule::{Operation, one_forward_one_backward};
use crate::spec::{JobSpec, Layout};
use crate::table::Table;
use everstep_kernels::{Group, ParameterMap, Progress, StageInput, StageModel, Tensor, second_use};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a stage waits for, by micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Input {
    Hidden(u32),
    Gradient(u32),
    Answer { micro_batch: u32, pass: Pass, layer: u32, expert: u32 },
}

/// Where the program is.
#[derive(Debug)]
enum Phase {
    /// Waits for the weights of all groups.
    Weights,
    /// Between operations.
    Idle(Box<StageModel>),
    /// An operation waits for a layer's experts.
    Experts { model: Box<StageModel>, micro_batch: u32, pass: Pass, layer: u32 },
    /// A job has the model.
    Computing { micro_batch: u32 },
    /// The sums are out; waits for the commit.
    Finished,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct StageCore {
    spec: Arc<JobSpec>,
    layout: Arc<Layout>,
    corpus: Corpus,
    lane: u32,
    stage: u32,
    groups: Vec<Group>,
    costs: StageCosts,
    /// Planned cost of the weight products that were made while the first stage waits.
    made: u64,
    table: Arc<Table>,
    /// The step that is run; 0 before the first weights.
    step: Step,
    phase: Phase,
    program: Vec<Operation>,
    next: usize,
    /// What came; of what was used only that it came (ST-2).
    inbox: BTreeMap<(Step, Input), Option<Tensor>>,
    /// Weights that came, by the step they are the result of.
    weights: BTreeMap<Step, BTreeMap<Group, Vec<Tensor>>>,
    outbox: Outbox,
    audit: Question,
    /// Chaos: this life computes wrongly.
    wrong: bool,
}

impl StageCore {
    /// A new life of a stage.
    pub(crate) fn new(spec: Arc<JobSpec>, layout: Arc<Layout>, corpus: Corpus, lane: u32, stage: u32) -> Self {
        let groups = spec.groups_of_stage(stage);
        let costs = StageCosts::new(&spec, stage);
        let audit = Question::new(Arc::clone(&spec), ActorId::Stage { lane, stage });
        Self {
            spec,
            layout,
            corpus,
            lane,
            stage,
            groups,
            costs,
            made: 0,
            table: Arc::default(),
            step: 0,
            phase: Phase::Weights,
            program: Vec::new(),
            next: 0,
            inbox: BTreeMap::new(),
            weights: BTreeMap::new(),
            outbox: Outbox::default(),
            audit,
            wrong: false,
        }
    }

    fn turn(&self, micro_batch: u32) -> Turn {
        Turn { step: self.step, lane: self.lane, micro_batch }
    }

    fn is_last(&self) -> bool {
        self.stage + 1 == self.spec.stages
    }

    fn message(&mut self, from: Address, body: Body<Tensor>) -> Vec<Effect> {
        let (turn, input, rows) = match body {
            Body::Weights { step, group, tensors } => return self.take_weights(step, group, tensors),
            Body::Audit { step } => {
                self.audit.ask(step);
                return self.audited().into_iter().collect();
            }
            Body::Hidden { turn, rows } => (turn, Input::Hidden(turn.micro_batch), rows),
            Body::Gradient { turn, rows } => (turn, Input::Gradient(turn.micro_batch), rows),
            Body::Answer { turn, pass, rows } => {
                let ActorId::Expert { layer, expert } = from.actor else { return Vec::new() };
                (turn, Input::Answer { micro_batch: turn.micro_batch, pass, layer, expert }, rows)
            }
            Body::Rows { .. }
            | Body::Sums { .. }
            | Body::Fetch { .. }
            | Body::State { .. }
            | Body::Prepared { .. }
            | Body::Applied { .. }
            | Body::Stateless
            | Body::Corrupt(_)
            | Body::Ready
            | Body::Audited { .. }
            | Body::Commit(_)
            | Body::Snapshot { .. }
            | Body::SnapshotKept { .. } => return Vec::new(),
        };
        if turn.step >= self.step && turn.lane == self.lane {
            self.inbox.entry((turn.step, input)).or_insert(Some(rows));
        }
        self.advance()
    }

    fn take_weights(&mut self, step: Step, group: u32, tensors: Vec<Tensor>) -> Vec<Effect> {
        let Some(group) = self.groups.iter().find(|g| self.layout.number_of[*g] == group).copied() else {
            return Vec::new();
        };
        // Weights of the step before the one that runs are what it runs with.
        let again = planted(Bug::BegunAgain) && step + 1 == self.step;
        if (step < self.step && !again) || step >= self.spec.steps {
            return Vec::new();
        }
        self.weights.entry(step).or_default().insert(group, tensors);
        let complete = |of: &BTreeMap<Group, Vec<Tensor>>| of.len() == self.groups.len();
        let mut effects = Vec::new();
        if self.weights.get(&step).is_some_and(complete) && (step + 1 > self.step || again) {
            if self.step == 0 {
                effects.push(Effect::send(ActorId::Supervisor, Body::Ready));
            }
            self.begin(step);
        }
        effects.extend(self.advance());
        effects
    }

    /// Starts the step after `committed`. Whatever ran before belongs to a committed step.
    fn begin(&mut self, committed: Step) {
        let groups = self.weights.remove(&committed).expect("complete weights");
        self.weights.retain(|step, _| *step > committed);
        let mut map = ParameterMap::new();
        for (group, tensors) in groups {
            for (number, tensor) in self.layout.of_group[&group].iter().zip(tensors) {
                map.insert(self.layout.parameters[*number as usize].name.clone(), tensor);
            }
        }
        let config = Arc::new(self.spec.model.clone());
        self.step = committed + 1;
        (self.next, self.made) = (0, 0);
        self.program = one_forward_one_backward(self.stage, self.spec.stages, self.spec.micro_batches.at(self.step));
        let (layers, scales) = (self.spec.layers_of(self.stage), self.spec.scales(self.step));
        self.phase = Phase::Idle(Box::new(StageModel::new(config, layers, &map, scales)));
        self.outbox.forget_until(committed);
        self.audit.forget_until(committed);
        self.inbox = self.inbox.split_off(&(self.step, Input::Hidden(0)));
    }

    /// Starts what can be started.
    fn advance(&mut self) -> Vec<Effect> {
        match std::mem::replace(&mut self.phase, Phase::Finished) {
            Phase::Idle(model) => self.next_operation(model),
            Phase::Experts { model, micro_batch, pass, layer } => {
                let experts = 0..self.spec.model.experts as u32;
                let answers = experts.map(|expert| Input::Answer { micro_batch, pass, layer, expert });
                match self.take(&answers.collect::<Vec<_>>()) {
                    Some(rows) => {
                        let cost = self.costs.part(pass, Some(layer));
                        self.compute(
                            model,
                            micro_batch,
                            StageOperation::Resume { micro_batch, pass, layer, rows },
                            cost,
                        )
                    }
                    None => {
                        self.phase = Phase::Experts { model, micro_batch, pass, layer };
                        Vec::new()
                    }
                }
            }
            other @ (Phase::Weights | Phase::Computing { .. } | Phase::Finished) => {
                self.phase = other;
                Vec::new()
            }
        }
    }

    fn next_operation(&mut self, model: Box<StageModel>) -> Vec<Effect> {
        let Some(operation) = self.program.get(self.next).copied() else { return self.finish(model) };
        let ready = match operation {
            Operation::Forward(micro_batch) => self.forward(micro_batch),
            Operation::BackwardInput(micro_batch) => self.backward(micro_batch),
            Operation::BackwardWeight(micro_batch) => Some(StageOperation::Weight { micro_batch }),
        };
        let Some(ready) = ready else {
            self.phase = Phase::Idle(model);
            return Vec::new();
        };
        self.next += 1;
        let micro_batch = match operation {
            Operation::Forward(m) | Operation::BackwardInput(m) | Operation::BackwardWeight(m) => m,
        };
        let cost = match operation {
            Operation::Forward(_) => self.costs.part(Pass::Forward, None),
            Operation::BackwardInput(_) => self.costs.part(Pass::Backward, None),
            Operation::BackwardWeight(_) => self.costs.whole() - std::mem::take(&mut self.made),
        };
        self.compute(model, micro_batch, ready, cost)
    }

    /// Inputs of the step, if all have come. They are used up.
    fn take(&mut self, inputs: &[Input]) -> Option<Vec<Tensor>> {
        let came = |input: &Input| self.inbox.get(&(self.step, *input)).is_some_and(Option::is_some);
        let all = inputs.iter().all(came);
        all.then(|| inputs.iter().filter_map(|input| self.inbox.get_mut(&(self.step, *input))?.take()).collect())
    }

    fn forward(&mut self, micro_batch: u32) -> Option<StageOperation> {
        let needs_text = self.stage == 0 || self.is_last();
        let text = needs_text.then(|| self.corpus.micro_batch(&self.spec, self.step, self.lane, micro_batch));
        let (tokens, targets) = text.unwrap_or_default();
        let input = if self.stage == 0 {
            StageInput::Tokens(tokens)
        } else {
            StageInput::Hidden(self.take(&[Input::Hidden(micro_batch)])?.pop()?)
        };
        let targets = self.is_last().then_some(targets);
        Some(StageOperation::Forward { micro_batch, input, targets })
    }

    fn backward(&mut self, micro_batch: u32) -> Option<StageOperation> {
        let gradient = if self.is_last() { None } else { Some(self.take(&[Input::Gradient(micro_batch)])?.pop()?) };
        Some(StageOperation::BackwardInput { micro_batch, gradient })
    }

    fn compute(
        &mut self,
        model: Box<StageModel>,
        micro_batch: u32,
        operation: StageOperation,
        cost: u64,
    ) -> Vec<Effect> {
        self.phase = Phase::Computing { micro_batch };
        vec![Effect::Compute { job: Job::Stage { step: self.step, model, operation }, cost }]
    }

    fn computed(&mut self, step: Step, model: Box<StageModel>, pass: Pass, progress: Progress) -> Vec<Effect> {
        let Phase::Computing { micro_batch } = self.phase else { return Vec::new() };
        if step != self.step {
            return Vec::new();
        }
        let turn = self.turn(micro_batch);
        let mut effects = Vec::new();
        match if self.wrong { wrongly(progress) } else { progress } {
            Progress::Experts { layer, rows, recipe } => {
                for (expert, rows) in rows.into_iter().enumerate() {
                    let (to, body) =
                        (ActorId::Expert { layer, expert: expert as u32 }, Body::Rows { turn, pass, rows });
                    self.audit.keep_for_either(&mut self.outbox, self.step, to, &body);
                    effects.push(Effect::send(to, body));
                }
                self.outbox.keep_recipe(layer, turn, pass, recipe);
                if pass == Pass::Backward && self.weight_comes_next(micro_batch) {
                    let made = self.costs.weights_above(layer);
                    let cost = made - std::mem::replace(&mut self.made, made);
                    let so_far = StageOperation::WeightSoFar { micro_batch, layer };
                    effects.extend(self.compute(model, micro_batch, so_far, cost));
                } else {
                    self.phase = Phase::Experts { model, micro_batch, pass, layer };
                }
            }
            Progress::Waits { layer } => self.phase = Phase::Experts { model, micro_batch, pass, layer },
            Progress::Hidden(rows) => {
                let (stage, body) = match pass {
                    Pass::Forward => (self.stage + 1, Body::Hidden { turn, rows }),
                    Pass::Backward => (self.stage - 1, Body::Gradient { turn, rows }),
                };
                effects.push(self.outbox.send(self.step, ActorId::Stage { lane: self.lane, stage }, body));
                self.phase = Phase::Idle(model);
            }
            Progress::Finished => self.phase = Phase::Idle(model),
        }
        effects.extend(self.advance());
        effects
    }

    /// Whether weight products of a micro-batch may be made while it waits for experts: nobody waits for the first
    /// stage's gradient, and no other micro-batch's products come before.
    fn weight_comes_next(&self, micro_batch: u32) -> bool {
        self.stage == 0 && self.program.get(self.next) == Some(&Operation::BackwardWeight(micro_batch))
    }

    /// Sends the lane's sums to every copy of their shards.
    fn finish(&mut self, mut model: Box<StageModel>) -> Vec<Effect> {
        let mut sums = model.take_sums();
        self.phase = Phase::Finished;
        let mut effects = Vec::new();
        let me = ActorId::Stage { lane: self.lane, stage: self.stage };
        for group in &self.groups {
            let mut gradients = Vec::new();
            for n in self.layout.of_group[group].iter().filter(|n| self.layout.has_gradient(**n)) {
                let parameter = &self.layout.parameters[*n as usize];
                for n in self.spec.uses(parameter, me) {
                    let name = if *n == 0 { parameter.name.clone() } else { second_use(&parameter.name) };
                    let sum = sums.gradients.remove(&name);
                    gradients.push(sum.unwrap_or_else(|| panic!("no gradient of {name}")));
                }
            }
            let loads = match group {
                Group::Layer(layer) => sums.loads.remove(layer).unwrap_or_default(),
                Group::Embedding | Group::Head | Group::Expert { .. } => Vec::new(),
            };
            let body = Body::Sums {
                step: self.step,
                group: self.layout.number_of[group],
                micro_batches: self.spec.micro_batches.at(self.step),
                samples: self.spec.sequences_of_lane(self.step),
                gradients,
                loads,
                losses: if *group == Group::Head { sums.losses } else { [0.0; 2] },
            };
            let shard = self.layout.shard_of[group];
            effects.extend(self.outbox.send_to_shard(self.step, shard, body, &self.table));
        }
        effects.extend(self.audited());
        effects
    }

    /// What was made in the step, if the supervisor wants to know and all is made.
    fn audited(&mut self) -> Option<Effect> {
        let made = matches!(self.phase, Phase::Finished).then_some(self.step);
        self.audit.answer(made, &self.outbox)
    }
}

/// What an operation gives in a unit that computes wrongly.
fn wrongly(progress: Progress) -> Progress {
    match progress {
        Progress::Experts { layer, rows, recipe } => {
            Progress::Experts { layer, rows: rows.iter().map(audit::wrong).collect(), recipe }
        }
        Progress::Hidden(rows) => Progress::Hidden(audit::wrong(&rows)),
        Progress::Waits { .. } | Progress::Finished => progress,
    }
}

impl Core for StageCore {
    fn on(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Table(table) => {
                let kept = |to: ActorId, step: Step| self.audit.is_due(to, step);
                let effects = self.outbox.resend(&self.table, &table, kept);
                self.table = table;
                effects
            }
            Event::Message { from, body } => self.message(from, body),
            Event::Computed(Outcome::Stage { step, model, pass, progress }) => {
                self.computed(step, model, pass, progress)
            }
            Event::Computed(Outcome::Rows(rows)) => rows.into_iter().map(|(to, body)| Effect::send(to, body)).collect(),
            Event::Computed(Outcome::Digest { step, digest }) => audit::tell(step, digest),
            Event::Computed(_) | Event::Local { .. } => Vec::new(),
        }
    }

    fn flip(&mut self) {
        self.wrong = true;
    }

    fn kept(&self) -> usize {
        self.outbox.len()[0]
    }

    fn describe(&self) -> String {
        let doing = match &self.phase {
            Phase::Weights => "waits for weights".to_owned(),
            Phase::Idle(_) => format!("waits for the input of {:?}", self.program.get(self.next)),
            Phase::Experts { micro_batch, pass, layer, .. } => {
                format!("waits for the experts of layer {layer}, micro-batch {micro_batch}, {pass:?}")
            }
            Phase::Computing { micro_batch } => format!("computes micro-batch {micro_batch}"),
            Phase::Finished => "waits for the commit".to_owned(),
        };
        let [kept, recipes] = self.outbox.len();
        format!(
            "step {}, operation {} of {}: {doing}; {} messages in, {} kept, {} recipes",
            self.step,
            self.next,
            self.program.len(),
            self.inbox.len(),
            kept,
            recipes
        )
    }
}

#[cfg(test)]
mod tests;
