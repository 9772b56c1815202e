//! What an actor sent in the step that is not committed yet, or how it makes that again.
//!
//! Promise: a receiver that gets a new life gets every message again (DESIGN section 5), and so does every new copy of
//! a shard.
//! - OB-1: rows for experts are kept once for each token, not for each of its experts: an expert's are made again when it
//!   gets a new life, and no other's.
//! - Answers of experts are not kept at all: the rows that a stage's new life sends again make them (`expert.rs`).
//!
//! Bound: the messages of at most two steps, since a sender cannot start a step before the last but
//! one is committed.

use crate::compute::{Job, RowsAgain};
use crate::effect::Effect;
use crate::ids::{ActorId, Step};
use crate::message::{Body, Pass, Turn};
use crate::plant::{Bug, planted};
use crate::table::Table;
use everstep_kernels::{RowsRecipe, Tensor};
use std::collections::BTreeMap;

type Kept = Vec<(Step, Body<Tensor>)>;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    kept: BTreeMap<ActorId, Kept>,
    /// For every copy of a shard, whichever there are.
    shards: BTreeMap<u32, Kept>,
    /// Of rows for the experts of each layer.
    recipes: BTreeMap<u32, Vec<(Turn, Pass, RowsRecipe)>>,
}

impl Outbox {
    /// Keeps a message of `step` and gives the effect that sends it.
    pub(crate) fn send(&mut self, step: Step, to: ActorId, body: Body<Tensor>) -> Effect {
        self.keep(step, to, body.clone());
        Effect::send(to, body)
    }

    /// Keeps a message that somebody else sends in the actor's name.
    pub(crate) fn keep(&mut self, step: Step, to: ActorId, body: Body<Tensor>) {
        if !planted(Bug::OutboxForgottenEarly) {
            self.kept.entry(to).or_default().push((step, body));
        }
    }

    /// Keeps a message of `step` for every copy of a shard, and gives the effects that send it to those there are.
    pub(crate) fn send_to_shard(&mut self, step: Step, shard: u32, body: Body<Tensor>, table: &Table) -> Vec<Effect> {
        let effects = table.replicas(shard).map(|to| Effect::send(to, body.clone())).collect();
        self.shards.entry(shard).or_default().push((step, body));
        effects
    }

    /// Keeps how the rows are made again that go to a layer's experts (OB-1).
    pub(crate) fn keep_recipe(&mut self, layer: u32, turn: Turn, pass: Pass, recipe: RowsRecipe) {
        self.recipes.entry(layer).or_default().push((turn, pass, recipe));
    }

    /// Sends again what receivers with a new life have not got, and makes again what was not `kept` for them in a step.
    pub(crate) fn resend(&self, before: &Table, now: &Table, kept: impl Fn(ActorId, Step) -> bool) -> Vec<Effect> {
        let served = self.shards.iter().filter(|_| !planted(Bug::NewCopyNotServed));
        let copies = served.flat_map(|(shard, kept)| now.replicas(*shard).map(move |to| (to, kept)));
        let all = self.kept.iter().map(|(to, kept)| (*to, kept)).chain(copies);
        let replaced = all.filter(|(to, _)| now.replaced(before, *to));
        let again = |kept: &'_ Kept| kept.len() - usize::from(planted(Bug::OutboxEntryForgotten));
        let copies = replaced
            .flat_map(|(to, kept)| kept[..again(kept)].iter().map(move |(_, body)| Effect::send(to, body.clone())));
        copies.chain(self.make_again(before, now, &kept)).collect()
    }

    /// The jobs that make rows again for experts with a new life, one for each turn and pass: not all rows are there at once, and
    /// the first leave first.
    fn make_again(&self, before: &Table, now: &Table, kept: &impl Fn(ActorId, Step) -> bool) -> Vec<Effect> {
        let mut jobs: BTreeMap<(Turn, Pass), Vec<RowsAgain>> = BTreeMap::new();
        for (layer, recipes) in &self.recipes {
            let replaced = now.experts(*layer).filter(|to| now.replaced(before, to.actor));
            let last = usize::from(planted(Bug::RecipeForgotten));
            let rows = replaced.flat_map(|to| {
                let of = move |(turn, pass, recipe): &(Turn, Pass, RowsRecipe)| RowsAgain {
                    to,
                    turn: *turn,
                    pass: *pass,
                    recipe: recipe.clone(),
                };
                let lacks = move |(turn, ..): &&(Turn, Pass, RowsRecipe)| !kept(to.actor, turn.step);
                recipes[..recipes.len() - last].iter().filter(lacks).map(of)
            });
            rows.for_each(|rows| jobs.entry((rows.turn, rows.pass)).or_default().push(rows));
        }
        let job = |rows: Vec<RowsAgain>| {
            let cost = rows.iter().map(RowsAgain::cost).sum();
            Effect::Compute { job: Job::Rows(rows), cost }
        };
        jobs.into_values().map(job).collect()
    }

    /// Forgets messages of committed steps.
    pub(crate) fn forget_until(&mut self, committed: Step) {
        if planted(Bug::OutboxNeverFreed) {
            return;
        }
        let forget = |kept: &mut Kept| {
            kept.retain(|(step, _)| *step > committed);
            !kept.is_empty()
        };
        self.kept.retain(|_, kept| forget(kept));
        self.shards.retain(|_, kept| forget(kept));
        self.recipes.retain(|_, recipes| {
            recipes.retain(|(turn, ..)| turn.step > committed);
            !recipes.is_empty()
        });
    }

    /// Copies of a step, with whom they are for; those for every copy of a shard with its first one.
    pub(crate) fn of(&self, step: Step) -> Vec<(ActorId, Body<Tensor>)> {
        let first = |shard: &u32| ActorId::Reducer { shard: *shard, replica: 0 };
        let shards = self.shards.iter().map(|(shard, kept)| (first(shard), kept));
        let all = self.kept.iter().map(|(to, kept)| (*to, kept)).chain(shards);
        let of_step = |(to, kept): (ActorId, &Kept)| -> Vec<_> {
            kept.iter().filter(|(s, _)| *s == step).map(|(_, body)| (to, body.clone())).collect()
        };
        all.flat_map(of_step).collect()
    }

    /// Copies and recipes.
    pub(crate) fn len(&self) -> [usize; 2] {
        let copies = self.kept.values().chain(self.shards.values()).map(Vec::len).sum();
        [copies, self.recipes.values().map(Vec::len).sum()]
    }
}
