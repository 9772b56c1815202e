//! The core of a stage: runs its program of operations as its inputs arrive.
//!
//! Owns a lane's layers, their activations and the lane's sums of the step.
//! - ST-1: an operation starts only when its inputs are there, and operations start in program order.
//! - ST-2: a message is used once; a second copy of the same key changes nothing.
//! - ST-3: a new life started with the same weights sends the same messages.
//! - ST-4: sums leave once the program is done; the step ends with the weights of its commit.
//! - ST-5: while the first stage waits for experts in a backward function, it makes weight products: nobody waits for
//!   its gradient, and their operands are still in the caches. They are added in the same order.

use crate::compute::{Job, Outcome, StageOperation};
use crate::data::Corpus;
use crate::effect::{Core, Effect, Event};
use crate::ids::{ActorId, Address, Step};
use crate::message::{Body, Pass, Turn};
use crate::outbox::Outbox;
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
    table: Arc<Table>,
    /// The step that is run; 0 before the first weights.
    step: Step,
    phase: Phase,
    program: Vec<Operation>,
    next: usize,
    inbox: BTreeMap<(Step, Input), Tensor>,
    /// Weights that came, by the step they are the result of.
    weights: BTreeMap<Step, BTreeMap<Group, Vec<Tensor>>>,
    outbox: Outbox,
}

impl StageCore {
    /// A new life of a stage.
    pub(crate) fn new(spec: Arc<JobSpec>, layout: Arc<Layout>, corpus: Corpus, lane: u32, stage: u32) -> Self {
        let groups = spec.groups_of_stage(stage);
        Self {
            spec,
            layout,
            corpus,
            lane,
            stage,
            groups,
            table: Arc::default(),
            step: 0,
            phase: Phase::Weights,
            program: Vec::new(),
            next: 0,
            inbox: BTreeMap::new(),
            weights: BTreeMap::new(),
            outbox: Outbox::default(),
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
            | Body::Commit(_)
            | Body::Snapshot { .. }
            | Body::SnapshotKept { .. } => return Vec::new(),
        };
        if turn.step >= self.step && turn.lane == self.lane {
            self.inbox.entry((turn.step, input)).or_insert(rows);
        }
        self.advance()
    }

    fn take_weights(&mut self, step: Step, group: u32, tensors: Vec<Tensor>) -> Vec<Effect> {
        let Some(group) = self.groups.iter().find(|g| self.layout.number_of[*g] == group).copied() else {
            return Vec::new();
        };
        // Weights of the step before the one that runs are what it runs with.
        if step < self.step || step >= self.spec.steps {
            return Vec::new();
        }
        self.weights.entry(step).or_default().insert(group, tensors);
        let complete = |of: &BTreeMap<Group, Vec<Tensor>>| of.len() == self.groups.len();
        if self.weights.get(&step).is_some_and(complete) && step + 1 > self.step {
            self.begin(step);
        }
        self.advance()
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
        self.next = 0;
        self.program = one_forward_one_backward(self.stage, self.spec.stages, self.spec.micro_batches.at(self.step));
        let (layers, scales) = (self.spec.layers_of(self.stage), self.spec.scales(self.step));
        self.phase = Phase::Idle(Box::new(StageModel::new(config, layers, &map, scales)));
        self.outbox.forget_until(committed);
        self.inbox = self.inbox.split_off(&(self.step, Input::Hidden(0)));
    }

    /// Starts what can be started.
    fn advance(&mut self) -> Vec<Effect> {
        match std::mem::replace(&mut self.phase, Phase::Finished) {
            Phase::Idle(model) => self.next_operation(model),
            Phase::Experts { model, micro_batch, pass, layer } => {
                let experts = 0..self.spec.model.experts as u32;
                let keys = experts.map(|expert| (self.step, Input::Answer { micro_batch, pass, layer, expert }));
                let rows: Option<Vec<Tensor>> = keys.map(|key| self.inbox.get(&key).cloned()).collect();
                match rows {
                    Some(rows) => {
                        self.compute(model, micro_batch, StageOperation::Resume { micro_batch, pass, rows }, 0)
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
        let tokens = u64::from(self.spec.sequences) * self.spec.model.sequence as u64;
        let cost = tokens * self.layout_size();
        self.compute(model, micro_batch, ready, cost)
    }

    /// Parameters of the stage: the multiply-adds of one token's pass through it.
    fn layout_size(&self) -> u64 {
        let of = |g: &Group| {
            self.layout.of_group[g].iter().map(|n| self.layout.parameters[*n as usize].len() as u64).sum::<u64>()
        };
        self.groups.iter().map(of).sum()
    }

    fn forward(&self, micro_batch: u32) -> Option<StageOperation> {
        let needs_text = self.stage == 0 || self.is_last();
        let text = needs_text.then(|| self.corpus.micro_batch(&self.spec, self.step, self.lane, micro_batch));
        let (tokens, targets) = text.unwrap_or_default();
        let input = if self.stage == 0 {
            StageInput::Tokens(tokens)
        } else {
            StageInput::Hidden(self.inbox.get(&(self.step, Input::Hidden(micro_batch)))?.clone())
        };
        let targets = self.is_last().then_some(targets);
        Some(StageOperation::Forward { micro_batch, input, targets })
    }

    fn backward(&self, micro_batch: u32) -> Option<StageOperation> {
        let gradient = if self.is_last() {
            None
        } else {
            Some(self.inbox.get(&(self.step, Input::Gradient(micro_batch)))?.clone())
        };
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
        match progress {
            Progress::Experts { layer, rows } => {
                for (expert, rows) in rows.into_iter().enumerate() {
                    let to = ActorId::Expert { layer, expert: expert as u32 };
                    effects.push(self.outbox.send(self.step, to, Body::Rows { turn, pass, rows }));
                }
                if pass == Pass::Backward && self.weight_comes_next(micro_batch) {
                    effects.extend(self.compute(model, micro_batch, StageOperation::WeightSoFar { micro_batch }, 0));
                    return effects;
                }
                self.phase = Phase::Experts { model, micro_batch, pass, layer };
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
            for replica in 0..=self.spec.mirrors {
                effects.push(self.outbox.send(self.step, ActorId::Reducer { shard, replica }, body.clone()));
            }
        }
        effects
    }
}

impl Core for StageCore {
    fn on(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Table(table) => {
                let effects = self.outbox.resend(&self.table, &table);
                self.table = table;
                effects
            }
            Event::Message { from, body } => self.message(from, body),
            Event::Computed(Outcome::Stage { step, model, pass, progress }) => {
                self.computed(step, model, pass, progress)
            }
            Event::Computed(_) | Event::Local { .. } => Vec::new(),
        }
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
        format!(
            "step {}, operation {} of {}: {doing}; {} messages in, {} kept",
            self.step,
            self.next,
            self.program.len(),
            self.inbox.len(),
            self.outbox.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Asked, bits, drive, materials, message, replace, table, weights};
    use crate::worker::Materials;

    fn last_stage(materials: &Materials) -> StageCore {
        let corpus = materials.corpus.clone();
        let mut core = StageCore::new(Arc::clone(&materials.spec), Arc::clone(&materials.layout), corpus, 0, 1);
        drive(&mut core, Event::Table(Arc::new(table(materials))));
        core
    }

    fn begin(materials: &Materials, core: &mut StageCore) -> Asked {
        let mut all = Asked::default();
        for group in materials.spec.groups_of_stage(1) {
            let asked = drive(core, weights(materials, group));
            all.sent.extend(asked.sent);
            all.jobs += asked.jobs;
        }
        all
    }

    fn hidden(micro_batch: u32) -> Event {
        let turn = Turn { step: 1, lane: 0, micro_batch };
        let rows = Tensor::from_vec(4, 4, (0..16).map(|i| (i + micro_batch) as f32 * 0.1).collect());
        message(ActorId::Stage { lane: 0, stage: 0 }, Body::Hidden { turn, rows })
    }

    /// Answers every dispatch with its own rows, until the stage asks no more. Gives all that it sent.
    fn serve(core: &mut StageCore, first: Asked) -> Vec<(ActorId, Body<Tensor>)> {
        let mut all = Vec::new();
        let mut queue = std::collections::VecDeque::from(first.sent);
        while let Some((to, body)) = queue.pop_front() {
            if let Body::Rows { turn, pass, rows } = &body {
                let answer = Body::Answer { turn: *turn, pass: *pass, rows: rows.clone() };
                queue.extend(drive(core, message(to, answer)).sent);
            }
            all.push((to, body));
        }
        all
    }

    fn whole_step(materials: &Materials) -> Vec<(ActorId, Body<Tensor>)> {
        let mut core = last_stage(materials);
        begin(materials, &mut core);
        let mut sent = Vec::new();
        for micro_batch in 0..2 {
            let asked = drive(&mut core, hidden(micro_batch));
            sent.extend(serve(&mut core, asked));
        }
        assert!(core.describe().contains("waits for the commit"), "{}", core.describe());
        sent
    }

    /// ST-1: nothing starts before its input; operations start in program order.
    #[test]
    fn operations_wait_for_their_inputs_in_order() {
        let materials = materials();
        let mut core = last_stage(&materials);
        assert_eq!(begin(&materials, &mut core).jobs, 0);
        // The second micro-batch's input is there, but the first's forward comes first.
        assert_eq!(drive(&mut core, hidden(1)).jobs, 0);
        let asked = drive(&mut core, hidden(0));
        assert_eq!(asked.jobs, 1);
        assert!(asked.sent.iter().all(|(to, body)| {
            matches!(to, ActorId::Expert { layer: 2, .. })
                && matches!(body, Body::Rows { turn, .. } if turn.micro_batch == 0)
        }));
        assert_eq!(asked.sent.len(), 3, "every expert of the layer hears of the micro-batch");
    }

    /// ST-2: copies of messages change nothing, early or late.
    #[test]
    fn second_copies_change_nothing() {
        let materials = materials();
        let expected = bits(&whole_step(&materials));
        let mut core = last_stage(&materials);
        begin(&materials, &mut core);
        let mut sent = Vec::new();
        for micro_batch in 0..2 {
            let asked = drive(&mut core, hidden(micro_batch));
            assert_eq!(drive(&mut core, hidden(micro_batch)).sent.len(), 0);
            sent.extend(serve(&mut core, asked));
            assert_eq!(drive(&mut core, hidden(0)).sent.len(), 0);
        }
        assert_eq!(bits(&sent), expected);
    }

    /// ST-3: a new life sends the same bits; its receivers' new lives get all that is kept.
    #[test]
    fn a_new_life_sends_the_same_messages_and_kept_ones_go_again() {
        let materials = materials();
        assert_eq!(bits(&whole_step(&materials)), bits(&whole_step(&materials)));
        let mut core = last_stage(&materials);
        begin(&materials, &mut core);
        let asked = drive(&mut core, hidden(0));
        let expert = ActorId::Expert { layer: 2, expert: 1 };
        let mine: Vec<_> = asked.sent.iter().filter(|(to, _)| *to == expert).cloned().collect();
        let again = drive(&mut core, Event::Table(Arc::new(replace(&table(&materials), expert))));
        assert_eq!(bits(&again.sent), bits(&mine));
    }

    /// ST-5: one job more for each wait of a backward function, and sums of everything at the end.
    #[test]
    fn weight_products_fill_the_waits_of_the_first_stage() {
        let materials = materials();
        let corpus = materials.corpus.clone();
        let mut core = StageCore::new(Arc::clone(&materials.spec), Arc::clone(&materials.layout), corpus, 0, 0);
        drive(&mut core, Event::Table(Arc::new(table(&materials))));
        let groups = materials.spec.groups_of_stage(0);
        let mut queue = std::collections::VecDeque::new();
        let (mut jobs, mut waits, mut sums) = (0, std::collections::BTreeSet::new(), 0);
        let mut take = |asked: Asked, queue: &mut std::collections::VecDeque<_>| {
            jobs += asked.jobs;
            queue.extend(asked.sent);
        };
        for group in &groups {
            take(drive(&mut core, weights(&materials, *group)), &mut queue);
        }
        while let Some((to, body)) = queue.pop_front() {
            let next_stage = ActorId::Stage { lane: 0, stage: 1 };
            let event = match body {
                Body::Rows { turn, pass, rows } => {
                    let ActorId::Expert { layer, .. } = to else { unreachable!("rows go to experts") };
                    waits.insert((turn.micro_batch, pass == Pass::Backward, layer));
                    message(to, Body::Answer { turn, pass, rows })
                }
                Body::Hidden { turn, rows } => message(next_stage, Body::Gradient { turn, rows }),
                Body::Sums { .. } => {
                    sums += 1;
                    continue;
                }
                other => unreachable!("not a stage's message: {other:?}"),
            };
            take(drive(&mut core, event), &mut queue);
        }
        let backward = waits.iter().filter(|(_, backward, _)| *backward).count();
        assert!(backward > 0 && 2 * backward == waits.len(), "{waits:?}");
        // Two micro-batches of three operations, each resumed after its waits.
        assert_eq!(jobs, 2 * 3 + waits.len() + backward);
        assert_eq!(sums, groups.len() * 2, "both copies of each shard");
    }

    /// ST-4: sums go to every copy of their shards; the next weights end the step.
    #[test]
    fn sums_leave_at_the_end_and_weights_begin_the_next_step() {
        let materials = materials();
        let sent = whole_step(&materials);
        let sums: Vec<_> = sent.iter().filter(|(_, body)| matches!(body, Body::Sums { .. })).collect();
        assert_eq!(sums.len(), materials.spec.groups_of_stage(1).len() * 2);
        for (to, body) in sums {
            let Body::Sums { micro_batches, samples, losses, group, .. } = body else { unreachable!() };
            assert!(matches!(to, ActorId::Reducer { .. }));
            assert_eq!((*micro_batches, *samples), (2, 2));
            let head = *group as usize + 1 == materials.layout.all_groups.len();
            assert_eq!(losses[0] > 0.0, head);
        }
    }
}
