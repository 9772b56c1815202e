//! Where actors live: a pure function of the nodes, the costs and where they live now.
//!
//! - PL-1: an actor whose node lives stays there, unless evening out is asked for, or packing.
//! - PL-2: copies of one shard live on different nodes, and where they can in different domains; a copy that has no node of
//!   its own is not placed.
//! - PL-3: the same input gives the same places (ties go to the lower number).
//! - PL-8: what runs at one time (the experts of a layer, the lanes of a stage) is spread: of places that are about as good, the one
//!   with the least of it. A node that has all experts of a layer makes everybody wait for them.
//! - PL-5: what is evened out is time: a node that takes 300 percent of the others' counts its work three times.
//! - PL-4: an actor gets a place only where there is room for it; what a step needs comes before further copies.
//! - PL-7: an actor that failed again and again on a node gets a place there only if no other has room, and never to even out.
//! - PL-6: a stage needs no room for its weights on a node with another lane of it, and is packed there first. Else it is not
//!   drawn to it: its lanes would run in turn, and a spare would stay without work.

use crate::costs::Costs;
use crate::holding::Holding;
use crate::ids::{ActorId, NodeId};
use crate::table::NodeInfo;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// How places are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// What has a place stays.
    Stay,
    /// Load is evened out.
    Level,
    /// For little memory: the largest first, each where the least room is left.
    Pack,
}

/// What is known of nodes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct About<'a> {
    /// How they are reached, and their memory.
    pub(crate) infos: &'a BTreeMap<NodeId, NodeInfo>,
    /// Percent of the others' time that slow ones take.
    pub(crate) slow: &'a BTreeMap<NodeId, u64>,
    /// Where actors failed again and again (PL-7).
    pub(crate) away: &'a BTreeMap<ActorId, NodeId>,
    /// A step needs all copies (CO-6), not one of each shard.
    pub(crate) all_copies: bool,
}

/// Times that differ by less than one part in so many are about the same.
const ABOUT: u64 = 16;

/// A node that may get actors, and what it has so far.
#[derive(Debug)]
struct Candidate<'a> {
    node: NodeId,
    info: Option<&'a NodeInfo>,
    /// Of the others' time that it takes.
    percent: u64,
    holding: Holding,
}

impl Candidate<'_> {
    /// What it takes for so much work, in work of the others.
    fn time_for(&self, work: u64) -> u64 {
        work.saturating_mul(self.percent) / 100
    }

    /// What it takes for all that it has.
    fn time(&self) -> u64 {
        self.time_for(self.holding.load)
    }

    /// Bytes that it has left.
    fn room(&self) -> u64 {
        self.info.map_or(u64::MAX, |info| info.room(self.holding.bytes))
    }

    fn domain(&self) -> Option<&str> {
        self.info.map(|info| &info.domain[..]).filter(|domain| !domain.is_empty())
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Placement<'a> {
    costs: &'a Costs,
    candidates: Vec<Candidate<'a>>,
    /// Where each node is among them.
    at: BTreeMap<NodeId, usize>,
    away: &'a BTreeMap<ActorId, NodeId>,
    how: How,
}

impl<'a> Placement<'a> {
    /// On these nodes; there is at least one.
    pub(crate) fn new(costs: &'a Costs, nodes: &[NodeId], about: About<'a>, how: How) -> Self {
        let candidate = |node: &NodeId| {
            let percent = about.slow.get(node).copied().unwrap_or(100);
            Candidate { node: *node, info: about.infos.get(node), percent, holding: Holding::default() }
        };
        let at = nodes.iter().enumerate().map(|(at, node)| (*node, at)).collect();
        Self { costs, candidates: nodes.iter().map(candidate).collect(), at, away: about.away, how }
    }

    fn add(&mut self, actor: ActorId, at: usize) {
        self.candidates[at].holding.add(self.costs, actor);
    }

    fn remove(&mut self, actor: ActorId, at: usize) {
        self.candidates[at].holding.remove(self.costs, actor);
    }

    fn fits(&self, actor: ActorId, at: usize) -> bool {
        let candidate = &self.candidates[at];
        candidate.holding.more(self.costs, actor) <= candidate.room()
    }

    /// Places stages, experts and these copies of shards; what is `present` has a place and keeps it, unless evening out
    /// moves it.
    pub(crate) fn place(
        mut self,
        present: &BTreeMap<ActorId, NodeId>,
        copies: &[ActorId],
    ) -> BTreeMap<ActorId, NodeId> {
        let mut places = present.clone();
        for (actor, node) in present {
            if let Some(at) = self.at.get(node).copied() {
                self.add(*actor, at);
            }
        }
        let costs = self.costs;
        let mut homeless: Vec<ActorId> =
            costs.workers().chain(copies.iter().copied()).filter(|a| !present.contains_key(a)).collect();
        let size = |a: &ActorId| if self.how == How::Pack { costs.bytes(*a) } else { costs.of(*a) };
        homeless.sort_by(|a, b| size(b).cmp(&size(a)).then(a.cmp(b)));
        let is_further = |places: &BTreeMap<ActorId, NodeId>, actor: ActorId| match actor {
            ActorId::Reducer { shard, .. } => has_copy(places, shard),
            _ => false,
        };
        for further in [false, true] {
            for actor in &homeless {
                if places.contains_key(actor) || is_further(&places, *actor) != further {
                    continue;
                }
                if let Some(at) = self.best(*actor, &places) {
                    places.insert(*actor, self.candidates[at].node);
                    self.add(*actor, at);
                }
            }
        }
        if self.how != How::Stay {
            self.level(&mut places);
        }
        places
    }

    /// The node that is best for the actor: the lightest that may have it, or the one with the least room that it fits in.
    fn best(&self, actor: ActorId, places: &BTreeMap<ActorId, NodeId>) -> Option<usize> {
        let taken: Vec<usize> = match actor {
            ActorId::Reducer { shard, .. } => {
                copies(places, shard).filter_map(|node| self.at.get(node).copied()).collect()
            }
            _ => Vec::new(),
        };
        let shared =
            |c: &Candidate| c.domain().is_some_and(|d| taken.iter().any(|at| self.candidates[*at].domain() == Some(d)));
        let may = |(at, _): &(usize, &Candidate)| !taken.contains(at) && self.fits(actor, *at);
        let apart = |c: &Candidate| self.how == How::Pack && !c.holding.has_stage_of(actor);
        let failed = |c: &Candidate| self.away.get(&actor) == Some(&c.node);
        // What runs at the same time counts twice (PL-8).
        let time = |c: &Candidate| c.time() + c.time_for(c.holding.with(actor));
        let key =
            |c: &Candidate| (failed(c), shared(c), apart(c), if self.how == How::Pack { c.room() } else { time(c) });
        self.candidates.iter().enumerate().filter(may).min_by_key(|(_, c)| key(c)).map(|(at, _)| at)
    }

    /// Moves stages and experts (never state) from the heaviest node to the lightest while that helps.
    fn level(&mut self, places: &mut BTreeMap<ActorId, NodeId>) {
        let costs = self.costs;
        let mut on: Vec<Vec<ActorId>> = vec![Vec::new(); self.candidates.len()];
        for actor in costs.workers().filter(|actor| costs.of(*actor) > 0) {
            if let Some(at) = places.get(&actor).and_then(|node| self.at.get(node)) {
                on[*at].push(actor);
            }
        }
        for _ in 0..costs.workers().count() {
            let all = || self.candidates.iter().enumerate();
            let (heaviest, heavy) = all().max_by_key(|(_, h)| (h.time(), Reverse(h.node))).expect("a node");
            let (lightest, light) = all().min_by_key(|(_, h)| (h.time(), h.node)).expect("a node");
            // What the two would take, the longer of them.
            let after = |actor: ActorId| {
                let cost = costs.of(actor);
                heavy.time_for(heavy.holding.load - cost).max(light.time_for(light.holding.load + cost))
            };
            // About the same time is as good; then it counts how much more of what runs at that time is on the one than on the
            // other (PL-8). Of equals the largest moves.
            let key = |actor: ActorId| {
                let more = heavy.holding.with(actor) as i64 - light.holding.with(actor) as i64;
                (
                    after(actor) / (heavy.time() / ABOUT).max(1),
                    Reverse(more),
                    after(actor),
                    Reverse(costs.of(actor)),
                    actor,
                )
            };
            let may = |actor: &ActorId| self.away.get(actor) != Some(&light.node) && self.fits(*actor, lightest);
            let movable = |actor: &ActorId| after(*actor) < heavy.time() && may(actor);
            let Some(actor) = on[heaviest].iter().copied().filter(movable).min_by_key(|a| key(*a)) else { return };
            places.insert(actor, light.node);
            on[heaviest].retain(|a| *a != actor);
            on[lightest].push(actor);
            self.remove(actor, heaviest);
            self.add(actor, lightest);
        }
    }
}

/// Nodes of the copies of a shard.
fn copies(places: &BTreeMap<ActorId, NodeId>, shard: u32) -> impl Iterator<Item = &NodeId> {
    let first = |shard: u32| ActorId::Reducer { shard, replica: 0 };
    places.range(first(shard)..first(shard + 1)).map(|(_, node)| node)
}

/// Whether a copy of a shard has a place.
pub(super) fn has_copy(places: &BTreeMap<ActorId, NodeId>, shard: u32) -> bool {
    copies(places, shard).next().is_some()
}

/// How many actors that a step needs have no place, and the bytes that they need.
fn without_room(costs: &Costs, places: &BTreeMap<ActorId, NodeId>, needed: &[ActorId]) -> Option<(u64, u64)> {
    let shards = (0..costs.shards()).filter(|shard| !has_copy(places, *shard));
    let shards = shards.map(|shard| ActorId::Reducer { shard, replica: 0 });
    let has_another = |copy: &ActorId| matches!(copy, ActorId::Reducer { shard, .. } if has_copy(places, *shard));
    let needed = needed.iter().copied().filter(has_another);
    let homeless = costs.workers().chain(needed).filter(|a| !places.contains_key(a)).chain(shards);
    let (count, bytes) = homeless.fold((0, 0), |(count, bytes), a| (count + 1, bytes + costs.bytes(a)));
    (count > 0).then_some((count, bytes))
}

/// Places all as `how` says; packed, with nothing but state where it is, if there is no room else. Gives what has no place all
/// the same, as [`without_room`] does.
pub(super) fn place_all(
    costs: &Costs,
    nodes: &[NodeId],
    about: About<'_>,
    how: How,
    (present, copies): (&BTreeMap<ActorId, NodeId>, &[ActorId]),
) -> (BTreeMap<ActorId, NodeId>, Option<(u64, u64)>) {
    let place = |present: &BTreeMap<ActorId, NodeId>, how: How| {
        let places = Placement::new(costs, nodes, about, how).place(present, copies);
        let homeless = without_room(costs, &places, if about.all_copies { copies } else { &[] });
        (places, homeless)
    };
    let wanted = place(present, how);
    if wanted.1.is_none() {
        return wanted;
    }
    // What can live elsewhere may be in the way. Only state stays: it would have to be sent.
    let is_state = |(actor, _): &(&ActorId, &NodeId)| matches!(actor, ActorId::Reducer { .. });
    let packed = place(&present.iter().filter(is_state).map(|(a, n)| (*a, *n)).collect(), How::Pack);
    if packed.1.is_none() { packed } else { wanted }
}

#[cfg(test)]
mod tests;
