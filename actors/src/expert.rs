//! The core of a routed expert: owns its weights, its rows of the step, its load and its sum.
//!
//! Arithmetic is its host's (rows of many experts in one batch); whether rows may be computed, what is
//! kept of them and when the weight gradient's turn comes is decided here.
//! - EX-1: rows of one (lane, micro-batch) are computed once; a second copy changes nothing.
//! - EX-2: weight gradients are made one micro-batch after another, ascending, over the rows of all
//!   lanes in order of lane, and only then added.
//! - EX-3: the sum leaves once every lane's rows of every micro-batch are in it.
//! - EX-4: what was on its way to another life through the host is not taken: after a way back those rows may have been made
//!   from a corrupt state, and the first rows that come count.
//! - EX-5: no answer is kept, but for a stage that is audited (`audit.rs`): rows that a stage's new life sends again are its
//!   request for one, and are computed again for it if the answer went to an earlier life. Nothing of that goes into the sum.
//! - EX-6: a lane is never more than [`JobSpec::window`] micro-batches before the slowest (contract C5): its rows wait.

use crate::audit::{self, Question};
use crate::compute::{Job, Outcome};
use crate::effect::{Core, Effect, Event};
use crate::ids::{ActorId, Address, Incarnation, Step};
use crate::message::{Body, Envelope, Local, Pass, Turn, Work, WorkItem, WorkResult};
use crate::outbox::Outbox;
use crate::plant::{Bug, planted};
use crate::spec::{JobSpec, Layout};
use crate::table::Table;
use everstep_kernels::{ExpertHeld, ExpertSaved, ExpertWeights, Group, ParameterMap, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What an expert has of one lane's micro-batch.
#[derive(Debug)]
enum Rows {
    /// At the host, on their way forward.
    Going,
    /// Forward is done.
    Saved(ExpertSaved),
    /// At the host, on their way back.
    Returning,
    /// Backward is done; waits for the weight gradient's turn.
    Held(ExpertHeld),
    /// In the sum.
    Summed,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct ExpertCore {
    spec: Arc<JobSpec>,
    layout: Arc<Layout>,
    layer: u32,
    expert: u32,
    address: Address,
    group: u32,
    table: Arc<Table>,
    /// The step that is run; 0 before the first weights.
    step: Step,
    weights: Option<ExpertWeights>,
    /// By (micro-batch, lane): the order of the weight gradients.
    rows: BTreeMap<(u32, u32), Rows>,
    /// The newest life of the stage that asked for an answer, likewise and by pass.
    asked: BTreeMap<(u32, u32, Pass), Incarnation>,
    /// What a forward that was made again keeps for gradients that will come again.
    again: BTreeMap<(u32, u32), ExpertSaved>,
    /// Messages for a step whose weights have not come, for a pass whose forward is not done, or of a lane that is too fast.
    early: Vec<Envelope>,
    sums: Option<Vec<Tensor>>,
    /// The micro-batch whose weight gradient is next.
    turn: u32,
    computing: bool,
    /// Rows of this step, for operators.
    load: u64,
    outbox: Outbox,
    audit: Question,
}

impl ExpertCore {
    /// A new life of an expert.
    pub(crate) fn new(spec: Arc<JobSpec>, layout: Arc<Layout>, address: Address) -> Self {
        let ActorId::Expert { layer, expert } = address.actor else { unreachable!("an expert's address names one") };
        let group = layout.number_of[&Group::Expert { layer, expert }];
        let audit = Question::new(Arc::clone(&spec), address.actor);
        Self {
            spec,
            layout,
            layer,
            expert,
            address,
            group,
            table: Arc::default(),
            step: 0,
            weights: None,
            rows: BTreeMap::new(),
            asked: BTreeMap::new(),
            again: BTreeMap::new(),
            early: Vec::new(),
            sums: None,
            turn: 0,
            computing: false,
            load: 0,
            outbox: Outbox::default(),
            audit,
        }
    }

    fn host(&self) -> ActorId {
        ActorId::Host { layer: self.layer }
    }

    /// Rows arrived through the host: work for it, or nothing now.
    fn arrived(&mut self, envelope: Envelope) -> Effect {
        let local = self.admit(envelope).map_or(Local::Nothing, |item| Local::Ready(Box::new(item)));
        Effect::Tell { to: self.host(), local }
    }

    /// Work, if these rows can be computed now and have not been for the life that asks. Keeps them if they are early.
    fn admit(&mut self, envelope: Envelope) -> Option<WorkItem> {
        let Body::Rows { turn, pass, rows } = &envelope.body else { return None };
        let (turn, pass) = (*turn, *pass);
        if turn.step < self.step
            || turn.micro_batch >= self.spec.micro_batches.at(turn.step)
            || turn.lane >= self.spec.lanes
        {
            return None;
        }
        let Some(weights) = self.weights.clone().filter(|_| turn.step == self.step) else {
            self.hold(envelope);
            return None;
        };
        let (key, stage) = ((turn.micro_batch, turn.lane), envelope.from);
        let asked = self.asked.entry((key.0, key.1, pass)).or_default();
        let before = std::mem::replace(asked, stage.incarnation.max(*asked));
        let kept = self.audit.is_due(stage.actor, self.step) || planted(Bug::AnswerNotMadeAgain);
        let newer = stage.incarnation > before && !kept;
        let (work, again) = match (pass, self.rows.get(&key)) {
            (Pass::Forward, None) if turn.micro_batch >= self.turn + self.spec.window() => {
                self.hold(envelope);
                return None;
            }
            (Pass::Forward, None) => {
                self.load += rows.rows() as u64;
                self.rows.insert(key, Rows::Going);
                (Work::Forward { x: rows.clone() }, false)
            }
            (Pass::Forward, Some(Rows::Saved(_))) if planted(Bug::ComputedTwice) => {
                (Work::Forward { x: rows.clone() }, false)
            }
            // What is at the host goes to whoever lives when it comes from there (EX-5).
            (Pass::Forward, Some(Rows::Going)) | (Pass::Backward, Some(Rows::Returning)) => return None,
            (Pass::Forward, Some(_)) if newer => (Work::Forward { x: rows.clone() }, true),
            (Pass::Backward, Some(Rows::Saved(saved))) => {
                let saved = saved.clone();
                self.rows.insert(key, Rows::Returning);
                (Work::Backward { saved, dy: rows.clone() }, false)
            }
            (Pass::Backward, Some(Rows::Held(_) | Rows::Summed)) if newer => match self.again.remove(&key) {
                Some(saved) => (Work::Backward { saved, dy: rows.clone() }, true),
                None => {
                    self.asked.insert((key.0, key.1, pass), before);
                    self.hold(envelope);
                    return None;
                }
            },
            (Pass::Forward, Some(_)) | (Pass::Backward, Some(Rows::Held(_) | Rows::Summed)) => return None,
            (Pass::Backward, None | Some(Rows::Going)) => {
                self.hold(envelope);
                return None;
            }
        };
        Some(WorkItem { expert: self.address, stage, turn, weights, work, again })
    }

    /// Keeps rows that are early, once.
    fn hold(&mut self, envelope: Envelope) {
        let Body::Rows { turn, pass, .. } = &envelope.body else { return };
        let same = |e: &Envelope| matches!(&e.body, Body::Rows { turn: t, pass: p, .. } if (t, p) == (turn, pass));
        if !self.early.iter().any(same) && !planted(Bug::EarlyRowsForgotten) {
            self.early.push(envelope);
        }
    }

    /// Gives early rows another chance.
    fn retry(&mut self) -> Vec<Effect> {
        let early = std::mem::take(&mut self.early);
        let ready: Vec<WorkItem> = early.into_iter().filter_map(|e| self.admit(e)).collect();
        let host = self.host();
        ready.into_iter().map(|item| Effect::Tell { to: host, local: Local::Ready(Box::new(item)) }).collect()
    }

    /// The host computed rows and has sent them to their stage.
    fn done(&mut self, turn: Turn, result: WorkResult) -> Vec<Effect> {
        if turn.step != self.step {
            return Vec::new();
        }
        let key = (turn.micro_batch, turn.lane);
        match (&result, self.rows.get(&key)) {
            (WorkResult::Forward { .. }, Some(Rows::Going)) | (WorkResult::Backward { .. }, Some(Rows::Returning)) => {
                let stage = ActorId::Stage { lane: turn.lane, stage: self.spec.stage_of_layer(self.layer) };
                let body = Body::Answer { turn, pass: result.pass(), rows: result.rows().clone() };
                self.audit.keep_for_either(&mut self.outbox, self.step, stage, &body);
                let state = match result {
                    WorkResult::Forward { saved, .. } => Rows::Saved(saved),
                    WorkResult::Backward { held, .. } => Rows::Held(held),
                };
                self.rows.insert(key, state);
            }
            // What was saved first is there until gradients come.
            (_, None | Some(Rows::Going | Rows::Saved(_))) => {}
            (WorkResult::Forward { saved, .. }, Some(Rows::Returning | Rows::Held(_) | Rows::Summed)) => {
                self.again.insert(key, saved.clone());
            }
            (WorkResult::Backward { .. }, Some(Rows::Held(_) | Rows::Summed)) => {}
        }
        self.go_on()
    }

    /// Starts what rows that were computed or summed make possible.
    fn go_on(&mut self) -> Vec<Effect> {
        let mut effects = self.retry();
        effects.extend(self.advance());
        effects
    }

    fn micro_batches(&self) -> u32 {
        self.spec.micro_batches.at(self.step)
    }

    /// Starts the next weight gradient if all lanes' rows are held.
    fn advance(&mut self) -> Vec<Effect> {
        if self.computing || self.turn == self.micro_batches() {
            return Vec::new();
        }
        let keys = (0..self.spec.lanes).map(|lane| (self.turn, lane));
        let parts: Option<Vec<ExpertHeld>> = keys
            .clone()
            .map(|key| match self.rows.get(&key) {
                Some(Rows::Held(held)) => Some(held.clone()),
                Some(Rows::Going | Rows::Saved(_) | Rows::Returning | Rows::Summed) | None => None,
            })
            .collect();
        let (Some(parts), Some(weights)) = (parts, self.weights.clone()) else { return Vec::new() };
        keys.for_each(|key| {
            self.rows.insert(key, Rows::Summed);
        });
        self.computing = true;
        let cost = parts.iter().map(|p| p.rows() as u64).sum::<u64>() * self.size();
        let job = Job::ExpertWeight { step: self.step, micro_batch: self.turn, weights, parts, sums: self.sums.take() };
        vec![Effect::Compute { job, cost }]
    }

    fn size(&self) -> u64 {
        3 * self.spec.model.hidden as u64 * self.spec.model.expert_inner as u64
    }

    fn computed(&mut self, step: Step, sums: Vec<Tensor>) -> Vec<Effect> {
        self.computing = false;
        if step != self.step {
            return self.advance();
        }
        self.turn += 1;
        if self.turn < self.micro_batches() {
            self.sums = Some(sums);
            return self.go_on();
        }
        let lanes = u64::from(self.spec.lanes);
        let body = Body::Sums {
            step: self.step,
            group: self.group,
            micro_batches: self.micro_batches(),
            samples: lanes * self.spec.sequences_of_lane(self.step),
            gradients: sums,
            loads: Vec::new(),
            losses: [0.0; 2],
        };
        let shard = self.layout.shard_of[&Group::Expert { layer: self.layer, expert: self.expert }];
        let mut effects = self.outbox.send_to_shard(step, shard, body, &self.table);
        effects.extend(self.audited());
        effects
    }

    /// What was made in the step, if the supervisor wants to know and all is made.
    fn audited(&mut self) -> Option<Effect> {
        let made = self.weights.is_some() && self.turn == self.micro_batches();
        self.audit.answer(made.then_some(self.step), &self.outbox)
    }

    fn take_weights(&mut self, committed: Step, tensors: Vec<Tensor>) -> Vec<Effect> {
        if committed < self.step || committed >= self.spec.steps {
            return Vec::new();
        }
        let numbers = &self.layout.of_group[&Group::Expert { layer: self.layer, expert: self.expert }];
        let named = numbers.iter().zip(tensors).map(|(n, t)| (self.layout.parameters[*n as usize].name.clone(), t));
        let map: ParameterMap = named.collect();
        let is_new = self.step == 0;
        self.step = committed + 1;
        self.weights = Some(ExpertWeights::new(&map, self.layer, self.expert));
        self.rows.clear();
        self.asked.clear();
        self.again.clear();
        self.sums = None;
        self.turn = 0;
        self.load = 0;
        self.outbox.forget_until(committed);
        self.audit.forget_until(committed);
        let ready = is_new.then(|| Effect::send(ActorId::Supervisor, Body::Ready));
        ready.into_iter().chain(self.retry()).collect()
    }
}

impl Core for ExpertCore {
    fn on(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Table(table) => {
                // It has no recipes.
                let effects = self.outbox.resend(&self.table, &table, |_, _| false);
                self.table = table;
                effects
            }
            Event::Message { body: Body::Weights { step, tensors, .. }, .. } => self.take_weights(step, tensors),
            Event::Message { body: Body::Audit { step }, .. } => {
                self.audit.ask(step);
                self.audited().into_iter().collect()
            }
            Event::Computed(Outcome::Digest { step, digest }) => audit::tell(step, digest),
            // The host that asks for another life's answer has not heard yet that it is over.
            Event::Local { local: Local::Arrived(envelope), .. } if envelope.to == self.address => {
                vec![self.arrived(envelope)]
            }
            Event::Local { local: Local::Done { expert, turn, result }, .. } if expert == self.address => {
                self.done(turn, *result)
            }
            Event::Computed(Outcome::ExpertWeight { step, sums }) => self.computed(step, sums),
            Event::Message { .. } | Event::Local { .. } | Event::Computed(_) => Vec::new(),
        }
    }

    fn kept(&self) -> usize {
        self.outbox.len()[0]
    }

    fn describe(&self) -> String {
        format!(
            "step {}, {} rows, {} of {} micro-batches summed; {} early, {} made again, {} kept",
            self.step,
            self.load,
            self.turn,
            self.micro_batches(),
            self.early.len(),
            self.again.len(),
            self.kept()
        )
    }
}

#[cfg(test)]
mod tests;
