//! The core of a reducer: one copy of a shard of the parameters.
//!
//! Owns master weights, moments and gate biases; it alone (with the other copies) knows the true state.
//! - RE-1: a sum is counted once; a step is prepared when the ledger balances: every group has every
//!   sender's sum, over all micro-batches (contract C3).
//! - RE-2: lanes are added as a fixed binary tree over the lane number, whatever order they came in.
//! - RE-3: a state changes only by a commit of the next step, or to a later state of another copy.
//! - RE-4: a copy without state, or that missed a step, asks until it has one; sums that arrive
//!   meanwhile are kept, those of the newest [`LEDGERS_MAX`] steps, so it need not miss the next step.
//! - RE-5: the primary hands its weights to every user of them, and again to a user's new life; not those of a state
//!   after which a commit is known, since the next ones are on their way.
//! - RE-6: sums and states whose tensors are not what the layout says are not taken.
//! - RE-7: a state that is not what it was when it was made is never stepped from, and nobody gets it or its weights: the
//!   supervisor is told. Its sum is made again by the optimizer step that reads it, and before somebody gets it later than
//!   when it was made.

mod arithmetic;
mod ledger;

pub use arithmetic::first_state;
pub(crate) use arithmetic::{Applied, Apply, ParameterData, Reduce, Reduced, State, initial, states};
pub(crate) use ledger::{Ledger, Receipt};

use crate::compute::{Job, Outcome};
use crate::effect::{Core, Effect, Event};
use crate::ids::{ActorId, Address, Step};
use crate::message::{Body, Commit, Corruption, ParameterState};
use crate::plant::{Bug, planted};
use crate::spec::{JobSpec, Layout};
use crate::table::Table;
use arithmetic::fits;
use everstep_kernels::{Group, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Steps whose sums a copy keeps at most: more than two only while its state is on the way.
const LEDGERS_MAX: usize = 6;

/// See the module.
#[derive(Debug)]
pub(crate) struct ReducerCore {
    spec: Arc<JobSpec>,
    layout: Arc<Layout>,
    shard: u32,
    replica: u32,
    numbers: Vec<u32>,
    groups: Vec<Group>,
    table: Arc<Table>,
    state: Option<State>,
    /// Sums by step: of the next step, and of the one after it while a commit is on its way.
    ledgers: BTreeMap<Step, Ledger>,
    /// The last sum that was not what the layout says: operators see why a step waits.
    refused: Option<(ActorId, Group)>,
    /// Sums over the lanes of the step after the state's.
    reduced: Option<Reduced>,
    commits: BTreeMap<Step, Commit>,
    computing: bool,
    /// Copies that wait for a state of at least a step.
    waiting: BTreeMap<ActorId, Step>,
    /// This copy has asked for a state that has not come yet.
    asked: bool,
    /// A state of another copy that came and is to be taken.
    coming: Option<(Step, Vec<ParameterData>)>,
    /// The step of this state, if it is to be stored and the keeper has not said that it is.
    snapshot: Option<Step>,
    /// The state is given to somebody later than when it was made, and is to be looked at again.
    unsure: bool,
    /// Users that wait for that.
    late: BTreeSet<ActorId>,
    /// The snapshot waits for it.
    snapshot_again: bool,
    /// It changed by itself: nothing is done any more.
    corrupt: Option<Corruption>,
}

impl ReducerCore {
    /// A new life of a copy.
    pub(crate) fn new(spec: Arc<JobSpec>, layout: Arc<Layout>, shard: u32, replica: u32) -> Self {
        let numbers = layout.of_shard(shard);
        let groups = layout.groups[shard as usize].clone();
        Self {
            spec,
            layout,
            shard,
            replica,
            numbers,
            groups,
            table: Arc::default(),
            state: None,
            refused: None,
            ledgers: BTreeMap::new(),
            reduced: None,
            commits: BTreeMap::new(),
            computing: false,
            waiting: BTreeMap::new(),
            asked: false,
            coming: None,
            snapshot: None,
            unsure: false,
            late: BTreeSet::new(),
            snapshot_again: false,
            corrupt: None,
        }
    }

    fn me(&self) -> ActorId {
        ActorId::Reducer { shard: self.shard, replica: self.replica }
    }

    fn is_primary(&self) -> bool {
        self.table.primary(self.shard) == Some(self.me())
    }

    fn on_table(&mut self, table: Arc<Table>) -> Vec<Effect> {
        let before = std::mem::replace(&mut self.table, table);
        let first = before.epoch == 0;
        let mut effects = Vec::new();
        let new_supervisor = self.table.replaced(&before, ActorId::Supervisor);
        if before.primary(self.shard) != self.table.primary(self.shard) || new_supervisor {
            // Whoever was asked (a primary, or the keeper beside the supervisor) may not answer any more.
            self.asked = false;
        }
        if self.state.is_none() && !self.computing {
            effects.extend(self.obtain());
        } else if !self.asked && !self.computing && self.behind() {
            effects.extend(self.ask());
        }
        if new_supervisor && !first {
            effects.extend(self.report());
        }
        if self.corrupt.is_some() {
            return effects;
        }
        let me = self.me();
        self.waiting.retain(|copy, _| *copy != me && !self.table.replaced(&before, *copy));
        if self.is_primary() {
            let was = before.primary(self.shard) == Some(self.me());
            // Who is committed to another state hands out that one.
            if self.step().is_some_and(|s| !self.commits.contains_key(&(s + 1))) {
                let all = self.groups.iter().flat_map(|group| self.spec.senders_of(*group));
                let late = all.filter(|user| !was || self.table.replaced(&before, *user)).collect::<Vec<_>>();
                self.late.extend(late);
                self.unsure |= !self.late.is_empty();
            }
            self.snapshot_again |= self.snapshot.is_some() && (!was || new_supervisor);
            self.unsure |= self.snapshot_again;
        }
        effects.extend(self.advance());
        effects
    }

    /// Gets a first state: from the primary, a checkpoint, or made from the seed.
    fn obtain(&mut self) -> Vec<Effect> {
        if self.table.primary(self.shard).is_none() && self.table.base == 0 && !self.spec.imported {
            self.computing = true;
            let parameters = self.numbers.iter().map(|n| self.layout.parameters[*n as usize].clone()).collect();
            let job = Job::Initial { spec: Arc::clone(&self.spec), parameters };
            return vec![Effect::Compute { job, cost: self.size() }];
        }
        // A supervisor that has just begun may count on this life, which an earlier one placed.
        let mut effects = vec![Effect::send(ActorId::Supervisor, Body::Stateless)];
        effects.extend(self.ask());
        effects
    }

    /// Asks for the state that the newest commit that came makes, or for any. One answer at a time: a state may take longer
    /// than a step, and with the sums that come meanwhile (RE-4) a copy follows from an older one.
    fn ask(&mut self) -> Vec<Effect> {
        if self.is_primary() || std::mem::replace(&mut self.asked, true) {
            return Vec::new();
        }
        let step = self.commits.keys().next_back().map_or(0, |s| *s);
        let to = self.table.primary(self.shard).unwrap_or(ActorId::Keeper);
        vec![Effect::send(to, Body::Fetch { step })]
    }

    /// A commit came that this copy cannot follow with the sums it has.
    fn behind(&self) -> bool {
        let Some(state) = &self.state else { return true };
        let Some((last, _)) = self.commits.last_key_value() else { return false };
        let complete = |step: Step| self.ledgers.get(&step).is_some_and(|l| l.balanced());
        *last > state.step && !(self.commits.contains_key(&(state.step + 1)) && complete(state.step + 1))
    }

    fn size(&self) -> u64 {
        self.numbers.iter().map(|n| self.layout.parameters[*n as usize].len() as u64).sum()
    }

    fn step(&self) -> Option<Step> {
        self.state.as_ref().map(|s| s.step)
    }

    fn take_sums(&mut self, from: Address, body: Body<Tensor>) -> Vec<Effect> {
        let Body::Sums { step, group, micro_batches, samples, gradients, loads, losses } = body else {
            return Vec::new();
        };
        if self.step().is_some_and(|done| step <= done) {
            return Vec::new();
        }
        let group = self.layout.all_groups.get(group as usize).copied();
        let Some(group) = group.filter(|g| self.groups.contains(g)) else { return Vec::new() };
        let receipt = Receipt { micro_batches, samples, gradients, loads, losses };
        if !fits(&receipt, from.actor, group, &self.spec, &self.layout) {
            self.refused = Some((from.actor, group));
            return Vec::new();
        }
        let ledger = self.ledgers.entry(step).or_insert_with(|| Ledger::new(&self.spec, step, &self.groups));
        ledger.credit(from.actor, group, receipt);
        if self.ledgers.len() > LEDGERS_MAX {
            self.ledgers.pop_first();
        }
        self.advance()
    }

    /// Adds the lanes once the step's ledger balances; applies once the step is committed.
    fn advance(&mut self) -> Vec<Effect> {
        if self.computing || self.corrupt.is_some() {
            return Vec::new();
        }
        if let Some((step, parameters)) = self.coming.take() {
            self.computing = true;
            return vec![Effect::Compute { job: Job::Adopt { step, parameters }, cost: self.size() }];
        }
        let Some(state) = &self.state else { return Vec::new() };
        if std::mem::take(&mut self.unsure) {
            if planted(Bug::LateStateUnchecked) {
                return self.on_checked(Ok(()));
            }
            self.computing = true;
            return vec![Effect::Compute { job: Job::Check(state.clone()), cost: self.size() }];
        }
        let next = state.step + 1;
        if self.reduced.is_none() {
            let Some(ledger) = self.ledgers.get_mut(&next).filter(|l| l.balanced()) else { return Vec::new() };
            self.computing = true;
            let reduce = Reduce::new(next, ledger, &self.spec, &self.layout, &self.groups);
            ledger.spend();
            return vec![Effect::Compute { job: Job::Reduce(reduce), cost: self.size() * u64::from(self.spec.lanes) }];
        }
        let Some(commit) = self.commits.get(&next).copied() else { return Vec::new() };
        let (Some(state), Some(reduced)) = (&self.state, self.reduced.take()) else { return Vec::new() };
        self.computing = true;
        let job = Job::Apply(Apply::new(&self.spec, &self.layout, state, reduced, commit));
        vec![Effect::Compute { job, cost: self.size() }]
    }

    fn on_reduced(&mut self, reduced: Reduced) -> Vec<Effect> {
        self.computing = false;
        if self.step().is_none_or(|s| s + 1 != reduced.step) {
            return self.advance();
        }
        self.reduced = Some(reduced);
        let mut effects: Vec<Effect> = self.prepared().into_iter().collect();
        effects.extend(self.advance());
        effects
    }

    fn prepared(&self) -> Option<Effect> {
        let r = self.reduced.as_ref()?;
        let (norm, digest) = (r.norm.clone(), r.digest);
        let body = Body::Prepared { step: r.step, norm, losses: r.losses, samples: r.samples, digest };
        Some(Effect::send(ActorId::Supervisor, body))
    }

    /// What a new supervisor must know.
    fn report(&self) -> Vec<Effect> {
        if let Some(corruption) = self.corrupt {
            return vec![Effect::send(ActorId::Supervisor, Body::Corrupt(corruption))];
        }
        let body = match &self.state {
            Some(s) if !self.behind() => Body::Applied { step: s.step, sums: s.sums.clone() },
            Some(_) | None => Body::Stateless,
        };
        std::iter::once(Effect::send(ActorId::Supervisor, body)).chain(self.prepared()).collect()
    }

    /// A state that was given late is what it was; now it can be stored too.
    fn on_checked(&mut self, checked: Result<(), Corruption>) -> Vec<Effect> {
        self.computing = false;
        match checked {
            Ok(()) => {
                let again = std::mem::take(&mut self.snapshot_again);
                let late = std::mem::take(&mut self.late);
                let mut effects = self.hand_out(|user| late.contains(&user));
                effects.extend(self.give_state());
                effects.extend(again.then(|| self.send_snapshot()).flatten());
                effects.extend(self.advance());
                effects
            }
            Err(corruption) => self.on_corruption(corruption),
        }
    }

    fn on_corruption(&mut self, corruption: Corruption) -> Vec<Effect> {
        self.corrupt = Some(corruption);
        self.report()
    }

    fn on_applied(&mut self, applied: Result<Applied, Corruption>) -> Vec<Effect> {
        self.computing = false;
        let applied = match applied {
            Ok(applied) => applied,
            Err(corruption) => return self.on_corruption(corruption),
        };
        if self.step().is_some_and(|s| s >= applied.step) {
            return self.advance();
        }
        if self.reduced.as_ref().is_some_and(|r| r.step <= applied.step) {
            self.reduced = None;
        }
        let sums = self.numbers.iter().copied().zip(applied.sums).collect();
        self.enter(State { step: applied.step, parameters: applied.parameters, sums })
    }

    /// Its fingerprint is made off the runtime's threads, as that of every state.
    fn on_state(&mut self, step: Step, parameters: &[ParameterState<Tensor>]) -> Vec<Effect> {
        self.asked = false;
        if self.step().is_some_and(|s| s >= step) {
            return if self.behind() { self.ask() } else { Vec::new() };
        }
        let Some(parameters) = states(parameters, &self.numbers, &self.spec, &self.layout) else { return Vec::new() };
        self.coming = Some((step, parameters));
        self.advance()
    }

    /// Takes a state and tells everybody who waits for it.
    fn enter(&mut self, state: State) -> Vec<Effect> {
        let step = state.step;
        let report = Body::Applied { step, sums: state.sums.clone() };
        self.snapshot = Some(step).filter(|s| self.spec.is_stored(*s));
        self.state = Some(state);
        (self.unsure, self.snapshot_again) = (false, false);
        self.late.clear();
        self.ledgers = self.ledgers.split_off(&(step + 1));
        self.commits = self.commits.split_off(&(step + 1));
        let mut effects = vec![Effect::send(ActorId::Supervisor, report)];
        if self.is_primary() {
            effects.extend(self.hand_out(|_| true));
            effects.extend(self.send_snapshot());
        }
        effects.extend(self.give_state());
        if self.behind() && self.coming.is_none() {
            effects.extend(self.ask());
        }
        effects.extend(self.advance());
        effects
    }

    /// The state to those who wait for one of its step or before.
    fn give_state(&mut self) -> Vec<Effect> {
        let Some(step) = self.step() else { return Vec::new() };
        let due: Vec<ActorId> = self.waiting.iter().filter(|(_, s)| **s <= step).map(|(copy, _)| *copy).collect();
        let give = |copy: ActorId| {
            self.waiting.remove(&copy);
            Effect::send(copy, Body::State { step, parameters: self.tensors() })
        };
        due.into_iter().map(give).collect()
    }

    /// The state to the keeper, if it is one to be stored and is not known to be.
    fn send_snapshot(&self) -> Option<Effect> {
        let step = self.snapshot?;
        Some(Effect::send(ActorId::Keeper, Body::Snapshot { step, parameters: self.tensors() }))
    }

    fn tensors(&self) -> Vec<ParameterState<Tensor>> {
        self.state.iter().flat_map(|s| s.parameters.iter().map(ParameterData::tensors)).collect()
    }

    fn on_fetch(&mut self, from: ActorId, wanted: Step) -> Vec<Effect> {
        let next = self.step().map(|s| s + 1).filter(|s| self.commits.contains_key(s));
        // If a next one is about to be: whoever got this one would ask again.
        let wanted = next.map_or(wanted, |next| next.max(wanted));
        self.waiting.insert(from, wanted);
        self.unsure |= self.step().is_some_and(|step| step >= wanted);
        self.advance()
    }

    fn on_commit(&mut self, commit: Commit) -> Vec<Effect> {
        if self.step().is_some_and(|s| commit.step <= s) {
            // A new supervisor repeats its last commit: it wants to hear what came of it.
            return self.report();
        }
        self.commits.insert(commit.step, commit);
        let mut effects = self.advance();
        if !self.computing && self.behind() {
            effects.extend(self.ask());
            // Nobody may count on this copy until it has caught up.
            effects.push(Effect::send(ActorId::Supervisor, Body::Stateless));
        }
        effects
    }

    /// Sends the weights of this state to those users of the shard's groups that `wanted` names.
    fn hand_out(&self, wanted: impl Fn(ActorId) -> bool) -> Vec<Effect> {
        let Some(state) = &self.state else { return Vec::new() };
        let mut effects = Vec::new();
        for group in &self.groups {
            let number = self.layout.number_of[group];
            for user in self.spec.senders_of(*group).into_iter().filter(|u| wanted(*u)) {
                let of_group = &self.layout.of_group[group];
                let tensors = self
                    .numbers
                    .iter()
                    .zip(&state.parameters)
                    .filter(|(n, _)| of_group.contains(n))
                    .map(|(_, p)| p.weight())
                    .collect();
                effects.push(Effect::send(user, Body::Weights { step: state.step, group: number, tensors }));
            }
        }
        effects
    }
}

impl Core for ReducerCore {
    fn on(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Table(table) => self.on_table(table),
            Event::Message { from, body } => match body {
                Body::Sums { .. } => self.take_sums(from, body),
                Body::Commit(commit) => self.on_commit(commit),
                Body::Fetch { step } => self.on_fetch(from.actor, step),
                Body::State { step, parameters } => self.on_state(step, &parameters),
                Body::SnapshotKept { step } => {
                    self.snapshot = self.snapshot.filter(|s| *s != step);
                    Vec::new()
                }
                Body::Hidden { .. }
                | Body::Gradient { .. }
                | Body::Rows { .. }
                | Body::Answer { .. }
                | Body::Weights { .. }
                | Body::Prepared { .. }
                | Body::Applied { .. }
                | Body::Stateless
                | Body::Corrupt(_)
                | Body::Ready
                | Body::Audit { .. }
                | Body::Audited { .. }
                | Body::Snapshot { .. } => Vec::new(),
            },
            Event::Computed(Outcome::Reduced(reduced)) => self.on_reduced(reduced),
            Event::Computed(Outcome::Applied(applied)) => self.on_applied(applied),
            Event::Computed(Outcome::Checked(checked)) => self.on_checked(checked),
            Event::Computed(_) | Event::Local { .. } => Vec::new(),
        }
    }

    fn flip(&mut self) {
        if let Some(parameter) = self.state.as_mut().and_then(|s| s.parameters.first_mut()) {
            parameter.flip();
        }
    }

    fn describe(&self) -> String {
        let state = self.step().map_or("no state yet".to_owned(), |s| format!("state of step {s}"));
        let role = if self.is_primary() { "primary" } else { "mirror" };
        let missing = self.step().and_then(|s| self.ledgers.get(&(s + 1))).map_or(0, Ledger::missing);
        let snapshot = self.snapshot.map_or(String::new(), |s| format!(", snapshot of step {s} on its way"));
        let corrupt = if self.corrupt.is_some() { ", corrupt" } else { "" };
        let refused = self.refused.map_or(String::new(), |(sender, group)| {
            format!(", refused {sender}'s sum of {group:?}: its shapes are not the layout's")
        });
        format!(
            "{role}, {state}{corrupt}, {} parameters; the next step lacks {missing} sums{snapshot}{refused}",
            self.size()
        )
    }
}

#[cfg(test)]
mod tests;
