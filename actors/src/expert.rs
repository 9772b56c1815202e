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

use crate::audit::{self, Question};
use crate::compute::{Job, Outcome};
use crate::effect::{Core, Effect, Event};
use crate::ids::{ActorId, Address, Step};
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
    /// Messages for a step whose weights have not come, or for a pass whose forward is not done.
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
            early: Vec::new(),
            sums: None,
            turn: 0,
            computing: false,
            load: 0,
            outbox: Outbox::default(),
            audit: Question::default(),
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

    /// Work, if these rows can be computed now and have not been. Keeps them if they are early.
    fn admit(&mut self, envelope: Envelope) -> Option<WorkItem> {
        let Body::Rows { turn, pass, rows } = &envelope.body else { return None };
        let (turn, pass) = (*turn, *pass);
        if turn.step < self.step
            || turn.micro_batch >= self.spec.micro_batches.at(turn.step)
            || turn.lane >= self.spec.lanes
        {
            return None;
        }
        let key = (turn.micro_batch, turn.lane);
        let present = turn.step == self.step && self.weights.is_some();
        let work = match (present, pass, self.rows.get(&key)) {
            (true, Pass::Forward, None) => Work::Forward { x: rows.clone() },
            (true, Pass::Backward, Some(Rows::Saved(saved))) => {
                Work::Backward { saved: saved.clone(), dy: rows.clone() }
            }
            (true, Pass::Forward, Some(Rows::Saved(_))) if planted(Bug::ComputedTwice) => {
                Work::Forward { x: rows.clone() }
            }
            (true, Pass::Forward, Some(_))
            | (true, Pass::Backward, Some(Rows::Returning | Rows::Held(_) | Rows::Summed)) => return None,
            (false, _, _) | (true, Pass::Backward, None | Some(Rows::Going)) => {
                let same =
                    |e: &Envelope| matches!(&e.body, Body::Rows { turn: t, pass: p, .. } if (*t, *p) == (turn, pass));
                if !self.early.iter().any(same) && !planted(Bug::EarlyRowsForgotten) {
                    self.early.push(envelope);
                }
                return None;
            }
        };
        let going = match pass {
            Pass::Forward => {
                self.load += rows.rows() as u64;
                Rows::Going
            }
            Pass::Backward => Rows::Returning,
        };
        self.rows.insert(key, going);
        let weights = self.weights.clone().expect("present weights");
        Some(WorkItem { expert: self.address, stage: envelope.from.actor, turn, weights, work })
    }

    /// Gives early rows another chance.
    fn retry(&mut self) -> Vec<Effect> {
        let early = std::mem::take(&mut self.early);
        let ready: Vec<WorkItem> = early.into_iter().filter_map(|e| self.admit(e)).collect();
        let host = self.host();
        ready.into_iter().map(|item| Effect::Tell { to: host, local: Local::Ready(Box::new(item)) }).collect()
    }

    /// The host computed rows and has sent them to their stage; they are kept for its next life.
    fn done(&mut self, turn: Turn, result: WorkResult) -> Vec<Effect> {
        if turn.step != self.step {
            return Vec::new();
        }
        let body = Body::Answer { turn, pass: result.pass(), rows: result.rows().clone() };
        let stage = self.spec.stage_of_layer(self.layer);
        self.outbox.keep(self.step, ActorId::Stage { lane: turn.lane, stage }, body);
        let state = match result {
            WorkResult::Forward { saved, .. } => Rows::Saved(saved),
            WorkResult::Backward { held, .. } => Rows::Held(held),
        };
        self.rows.insert((turn.micro_batch, turn.lane), state);
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
            return self.advance();
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
        self.sums = None;
        self.turn = 0;
        self.load = 0;
        self.outbox.forget_until(committed);
        let ready = is_new.then(|| Effect::send(ActorId::Supervisor, Body::Ready));
        ready.into_iter().chain(self.retry()).collect()
    }
}

impl Core for ExpertCore {
    fn on(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Table(table) => {
                let effects = self.outbox.resend(&self.table, &table);
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

    fn describe(&self) -> String {
        format!(
            "step {}, {} rows, {} of {} micro-batches summed; {} early, {} kept",
            self.step,
            self.load,
            self.turn,
            self.micro_batches(),
            self.early.len(),
            self.outbox.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::run;
    use crate::testing::{address, bits, drive, materials, table, weights};
    use crate::worker::Materials;
    use everstep_kernels::CpuBackend;

    const ME: ActorId = ActorId::Expert { layer: 1, expert: 0 };

    fn expert(materials: &Materials) -> ExpertCore {
        let me = address(ME, 1);
        let mut core = ExpertCore::new(Arc::clone(&materials.spec), Arc::clone(&materials.layout), me);
        drive(&mut core, Event::Table(Arc::new(table(materials))));
        drive(&mut core, weights(materials, Group::Expert { layer: 1, expert: 0 }));
        core
    }

    fn rows(lane: u32, micro_batch: u32, pass: Pass) -> Event {
        let n = 1 + lane as usize + micro_batch as usize;
        let value = |i| (i as f32 + lane as f32) * 0.1;
        let body = Body::Rows {
            turn: Turn { step: 1, lane, micro_batch },
            pass,
            rows: Tensor::from_vec(n, 4, (0..4 * n).map(value).collect()),
        };
        let from = address(ActorId::Stage { lane, stage: 0 }, 1);
        Event::Local {
            from: ActorId::Host { layer: 1 },
            local: Local::Arrived(Envelope { from, to: address(ME, 1), body }),
        }
    }

    /// Does what a host does: runs the work that the expert gave out. Gives all that the expert sent.
    fn through_host(core: &mut ExpertCore, event: Event) -> (usize, Vec<(ActorId, Body<Tensor>)>) {
        let mut work = 0;
        let mut sent = Vec::new();
        let mut asked = drive(core, event);
        loop {
            sent.append(&mut asked.sent);
            let ready =
                asked.told.into_iter().find_map(|(_, l)| if let Local::Ready(item) = l { Some(item) } else { None });
            let Some(item) = ready else { return (work, sent) };
            work += 1;
            let Outcome::Experts(done) = run(Job::Experts(vec![*item]), &CpuBackend::FP32) else { unreachable!() };
            let (expert, _, turn, result) = done.into_iter().next().unwrap();
            let local = Local::Done { expert, turn, result: Box::new(result) };
            asked = drive(core, Event::Local { from: ActorId::Host { layer: 1 }, local });
        }
    }

    /// EX-1: a second copy of rows is no work.
    #[test]
    fn rows_are_computed_once() {
        let materials = materials();
        let mut core = expert(&materials);
        assert_eq!(through_host(&mut core, rows(0, 0, Pass::Forward)).0, 1);
        assert_eq!(through_host(&mut core, rows(0, 0, Pass::Forward)).0, 0);
        // Gradients before their forward pass wait for it.
        assert_eq!(through_host(&mut core, rows(1, 0, Pass::Backward)).0, 0);
        assert_eq!(through_host(&mut core, rows(1, 0, Pass::Forward)).0, 2);
    }

    /// EX-2, EX-3: whatever order rows come in, the sum is the same and leaves when all are in it.
    #[test]
    fn the_sum_does_not_depend_on_the_order_of_arrival() {
        let materials = materials();
        let sum = |order: &[(u32, u32)]| {
            let mut core = expert(&materials);
            let mut last = Vec::new();
            for pass in [Pass::Forward, Pass::Backward] {
                for (n, (lane, micro_batch)) in order.iter().enumerate() {
                    let sent = through_host(&mut core, rows(*lane, *micro_batch, pass)).1;
                    let complete = pass == Pass::Backward && n + 1 == order.len();
                    assert_eq!(sent.len(), if complete { 2 } else { 0 }, "sums for both copies, at the end");
                    last = bits(&sent);
                }
            }
            last
        };
        let ascending = sum(&[(0, 0), (1, 0), (0, 1), (1, 1)]);
        assert_eq!(ascending, sum(&[(1, 1), (0, 1), (1, 0), (0, 0)]));
        assert_eq!(ascending, sum(&[(1, 0), (1, 1), (0, 0), (0, 1)]));
        let Body::Sums { micro_batches, samples, .. } = &ascending[0].1 else { panic!("{ascending:?}") };
        assert_eq!((*micro_batches, *samples), (2, 4));
    }

    /// EX-4: the host had them when the job went back.
    #[test]
    fn rows_for_another_life_are_not_taken() {
        let materials = materials();
        let mut core = expert(&materials);
        let Event::Local { from, local: Local::Arrived(mut envelope) } = rows(0, 0, Pass::Forward) else {
            unreachable!()
        };
        envelope.to = address(ME, 7);
        let asked = drive(&mut core, Event::Local { from, local: Local::Arrived(envelope) });
        assert!(asked.told.is_empty() && core.rows.is_empty() && core.early.is_empty());
        assert_eq!(through_host(&mut core, rows(0, 0, Pass::Forward)).0, 1);
    }

    /// EX-4: a result of an earlier life's work is not this life's: what goes with it was refused.
    #[test]
    fn results_of_another_life_are_not_taken() {
        let materials = materials();
        let mut core = expert(&materials);
        let asked = drive(&mut core, rows(0, 0, Pass::Forward));
        let Some((_, Local::Ready(item))) = asked.told.into_iter().next() else { panic!("work") };
        let Outcome::Experts(done) = run(Job::Experts(vec![*item]), &CpuBackend::FP32) else { unreachable!() };
        let (_, _, turn, result) = done.into_iter().next().unwrap();
        let local = Local::Done { expert: address(ME, 7), turn, result: Box::new(result) };
        drive(&mut core, Event::Local { from: ActorId::Host { layer: 1 }, local });
        assert_eq!(core.outbox.len(), 0);
    }
}
