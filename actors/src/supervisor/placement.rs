//! Where actors live: a pure function of the nodes, the costs and where they live now.
//!
//! - PL-1: an actor whose node lives stays there, unless evening out is asked for, or packing.
//! - PL-2: copies of one shard live on different nodes, and where they can in different domains; a copy that has no node of
//!   its own is not placed.
//! - PL-3: the same input gives the same places (ties go to the lower number).
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
}

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
        let key =
            |c: &Candidate| (failed(c), shared(c), apart(c), if self.how == How::Pack { c.room() } else { c.time() });
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
            // What the two would take, the longer of them first; of equals the largest moves.
            let after = |actor: ActorId| {
                let cost = costs.of(actor);
                let (without, with) =
                    (heavy.time_for(heavy.holding.load - cost), light.time_for(light.holding.load + cost));
                (without.max(with), without.min(with), Reverse(cost), actor)
            };
            let may = |actor: &ActorId| self.away.get(actor) != Some(&light.node) && self.fits(*actor, lightest);
            let movable = |actor: &ActorId| after(*actor).0 < heavy.time() && may(actor);
            let Some(actor) = on[heaviest].iter().copied().filter(movable).min_by_key(|a| after(*a)) else { return };
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
fn without_room(costs: &Costs, places: &BTreeMap<ActorId, NodeId>) -> Option<(u64, u64)> {
    let shards = (0..costs.shards()).filter(|shard| !has_copy(places, *shard));
    let shards = shards.map(|shard| ActorId::Reducer { shard, replica: 0 });
    let homeless = costs.workers().filter(|a| !places.contains_key(a)).chain(shards);
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
        let homeless = without_room(costs, &places);
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
mod tests {
    use super::*;
    use crate::spec::JobSpec;
    use crate::testing::materials;

    fn nodes(n: &[u64]) -> Vec<NodeId> {
        n.iter().map(|n| NodeId(*n)).collect()
    }

    fn place_in(on: &[(u64, &str)], present: &BTreeMap<ActorId, NodeId>, how: How) -> BTreeMap<ActorId, NodeId> {
        place_with(on, 0, present, how)
    }

    fn place_with(
        on: &[(u64, &str)],
        memory: u64,
        present: &BTreeMap<ActorId, NodeId>,
        how: How,
    ) -> BTreeMap<ActorId, NodeId> {
        let materials = materials();
        let costs = Costs::new(&materials.spec);
        let copies = (0..2).flat_map(|shard| (0..2).map(move |replica| ActorId::Reducer { shard, replica }));
        let copies: Vec<ActorId> = copies.collect();
        let info = |n: u64, domain: &str| NodeInfo { domain: domain.to_owned(), memory, ..crate::testing::info(n) };
        let infos = on.iter().map(|(n, domain)| (NodeId(*n), info(*n, domain))).collect();
        let nodes = nodes(&on.iter().map(|(n, _)| *n).collect::<Vec<_>>());
        let present = present.iter().filter(|(_, n)| nodes.contains(n)).map(|(a, n)| (*a, *n)).collect();
        let (slow, away) = Default::default();
        let about = About { infos: &infos, slow: &slow, away: &away };
        Placement::new(&costs, &nodes, about, how).place(&present, &copies)
    }

    fn place(on: &[u64], present: &BTreeMap<ActorId, NodeId>, how: How) -> BTreeMap<ActorId, NodeId> {
        place_in(&on.iter().map(|n| (*n, "")).collect::<Vec<_>>(), present, how)
    }

    fn spread(places: &BTreeMap<ActorId, NodeId>, on: &[u64]) -> (u64, u64) {
        let costs = Costs::new(&materials().spec);
        let load = |n: &u64| places.iter().filter(|(_, at)| at.0 == *n).map(|(a, _)| costs.of(*a)).sum::<u64>();
        let loads: Vec<u64> = on.iter().map(load).collect();
        (*loads.iter().min().unwrap(), *loads.iter().max().unwrap())
    }

    /// PL-1: who has a home stays, unless evening out is asked for; then loads come closer.
    #[test]
    fn only_the_homeless_move() {
        let before = place(&[1, 2], &BTreeMap::new(), How::Stay);
        let after = place(&[1, 2, 3], &before, How::Stay);
        assert_eq!(after, before);
        let lost = place(&[1, 3], &before, How::Stay);
        for (actor, node) in &before {
            assert!(lost[actor] == *node || *node == NodeId(2), "{actor}");
        }
        let level = place(&[1, 2, 3], &before, How::Level);
        assert!(spread(&level, &[1, 2, 3]).1 < spread(&before, &[1, 2, 3]).1);
        let state = |p: &BTreeMap<ActorId, NodeId>| -> Vec<(ActorId, NodeId)> {
            p.iter().filter(|(a, _)| matches!(a, ActorId::Reducer { .. })).map(|(a, n)| (*a, *n)).collect()
        };
        assert_eq!(state(&level), state(&before), "state is not moved for balance");
    }

    /// PL-5: a node that takes four times as long has about a quarter of the others' work; state stays.
    #[test]
    fn a_slow_node_has_less_to_do() {
        let materials = crate::testing::of(JobSpec { lanes: 4, ..(*materials().spec).clone() });
        let costs = Costs::new(&materials.spec);
        let infos = [1, 2, 3].map(|n| (NodeId(n), crate::testing::info(n))).into();
        let nodes = nodes(&[1, 2, 3]);
        let on = |slow: BTreeMap<NodeId, u64>, present: &BTreeMap<ActorId, NodeId>| {
            let about = About { infos: &infos, slow: &slow, away: &BTreeMap::new() };
            Placement::new(&costs, &nodes, about, How::Level).place(present, &[])
        };
        let even = on(BTreeMap::new(), &BTreeMap::new());
        let after = on([(NodeId(2), 400)].into(), &even);
        let load = |places: &BTreeMap<ActorId, NodeId>, node: u64| {
            places.iter().filter(|(_, at)| at.0 == node).map(|(actor, _)| costs.of(*actor)).sum::<u64>()
        };
        let most = load(&after, 1).max(load(&after, 3));
        assert!(load(&after, 2) > 0 && 3 * load(&after, 2) < most, "{} of {most}", load(&after, 2));
        assert_eq!(on(BTreeMap::new(), &after).len(), even.len());
    }

    /// PL-2: copies of a shard have nodes of their own, or no place.
    #[test]
    fn copies_live_apart() {
        for on in [&[1u64][..], &[1, 2], &[1, 2, 3]] {
            let places = place(on, &BTreeMap::new(), How::Level);
            for shard in 0..2 {
                let homes: Vec<NodeId> =
                    (0..2).filter_map(|replica| places.get(&ActorId::Reducer { shard, replica }).copied()).collect();
                assert_eq!(homes.len(), on.len().min(2));
                assert!(homes.len() < 2 || homes[0] != homes[1]);
            }
        }
    }

    /// PL-2: the copies of a shard are in two racks, though the lighter node is in the same one.
    #[test]
    fn copies_live_in_different_domains() {
        for on in [[(1, "a"), (2, "a"), (3, "b")], [(1, "a"), (2, "b"), (3, "b")]] {
            let places = place_in(&on, &BTreeMap::new(), How::Level);
            for shard in 0..2 {
                let domain = |replica| {
                    let node = places[&ActorId::Reducer { shard, replica }];
                    on.iter().find(|(n, _)| *n == node.0).unwrap().1
                };
                assert_ne!(domain(0), domain(1), "{places:?}");
            }
        }
        let crowded = place_in(&[(1, "a"), (2, "a")], &BTreeMap::new(), How::Level);
        assert_eq!(crowded.keys().filter(|a| matches!(a, ActorId::Reducer { .. })).count(), 4, "better than no copy");
    }

    /// PL-4: nothing is placed beyond a node's memory, and workers and first copies come first.
    #[test]
    fn what_does_not_fit_is_not_placed() {
        let costs = Costs::new(&materials().spec);
        let on = [(1, ""), (2, "")];
        let all = place_in(&on, &BTreeMap::new(), How::Level);
        let bytes = |places: &BTreeMap<ActorId, NodeId>, node: u64| {
            places.iter().filter(|(_, at)| at.0 == node).map(|(a, _)| costs.bytes(*a)).sum::<u64>()
        };
        let whole = bytes(&all, 1) + bytes(&all, 2);
        for part in 1..12 {
            let memory = whole * part / 12;
            let places = place_with(&on, memory, &BTreeMap::new(), How::Level);
            assert!([1, 2].iter().all(|n| bytes(&places, *n) <= memory), "{memory}");
            let is_copy = |a: &ActorId| matches!(a, ActorId::Reducer { .. });
            let (copies, workers): (Vec<_>, Vec<_>) = all.keys().partition(|a| is_copy(a));
            let placed = |of: &[&ActorId]| of.iter().filter(|a| places.contains_key(a)).count();
            if placed(&copies) > 2 {
                assert_eq!(placed(&workers), workers.len(), "mirrors come last: {places:?}");
            }
            assert!(part < 7 || places.len() == all.len(), "with {part} twelfths each");
            assert!(part >= 6 || places.len() < all.len(), "with {part} twelfths each");
        }
    }

    /// PL-4: what has places may be in the way of what has none; packed anew, all have one.
    #[test]
    fn little_memory_is_packed() {
        let costs = Costs::new(&materials().spec);
        let on = [(1, ""), (2, ""), (3, "")];
        let everywhere = place_in(&on, &BTreeMap::new(), How::Level);
        let largest = *everywhere.keys().max_by_key(|a| costs.bytes(**a)).unwrap();
        let all: u64 = everywhere.keys().map(|a| costs.bytes(*a)).sum();
        let spread: BTreeMap<ActorId, NodeId> = everywhere
            .keys()
            .filter(|a| **a != largest)
            .zip([1, 2, 3].into_iter().cycle())
            .map(|(a, n)| (*a, NodeId(n)))
            .collect();
        let used = |n: u64| spread.iter().filter(|(_, at)| at.0 == n).map(|(a, _)| costs.bytes(*a)).sum::<u64>();
        // Less than the largest is left on each, and more than it in all.
        let memory = (1..=3).map(used).max().unwrap().max(costs.bytes(largest) + all / 30);
        assert!((1..=3).all(|n| memory - used(n) < costs.bytes(largest)) && 3 * memory > all, "the test is one");
        assert!(!place_with(&on, memory, &spread, How::Level).contains_key(&largest));
        let packed = place_with(&on, memory, &BTreeMap::new(), How::Pack);
        assert!(costs.workers().all(|a| packed.contains_key(&a)), "{packed:?}");
    }

    /// PL-6: with room for the rest only, a lost stage goes where its weights are; with more, to who has the least to do.
    #[test]
    fn a_lost_stage_fits_where_its_weights_are() {
        let costs = Costs::new(&materials().spec);
        let lost = ActorId::Stage { lane: 0, stage: 1 };
        let on = [(1, ""), (2, ""), (3, "")];
        // Node 1 has the other lane and most of the work.
        let place_of = |actor: &ActorId| match actor {
            ActorId::Stage { lane: 1, stage: 1 } => NodeId(1),
            ActorId::Stage { .. } => NodeId(2),
            _ => NodeId(1),
        };
        let all = place_in(&on, &BTreeMap::new(), How::Level);
        let rest: BTreeMap<_, _> = all.keys().filter(|a| **a != lost).map(|a| (*a, place_of(a))).collect();
        let mut held = Holding::default();
        rest.iter().filter(|(_, at)| at.0 == 1).for_each(|(actor, _)| held.add(&costs, *actor));
        let enough = held.bytes + costs.bytes(lost) - costs.weights(lost);
        let with = |memory| {
            let infos: BTreeMap<_, _> = [(1, memory), (2, 1), (3, 1)]
                .map(|(n, memory)| (NodeId(n), NodeInfo { memory, ..crate::testing::info(n) }))
                .into();
            let about = About { infos: &infos, slow: &BTreeMap::new(), away: &BTreeMap::new() };
            Placement::new(&costs, &nodes(&[1, 2, 3]), about, How::Stay).place(&rest, &[]).get(&lost).copied()
        };
        assert_eq!([with(enough), with(enough - 1)], [Some(NodeId(1)), None]);
        assert_eq!(place_in(&on, &rest, How::Stay)[&lost], NodeId(3));
        let (infos, slow, away) = Default::default();
        let about = About { infos: &infos, slow: &slow, away: &away };
        let mut packed = Placement::new(&costs, &nodes(&[1, 2, 3]), about, How::Pack);
        packed.add(ActorId::Stage { lane: 1, stage: 1 }, 2);
        assert_eq!(packed.best(lost, &BTreeMap::new()), Some(2));
    }

    /// PL-7: it is levelled anywhere but there, and comes back if nothing else is left.
    #[test]
    fn who_failed_on_a_node_stays_away() {
        let (materials, stage) = (materials(), ActorId::Stage { lane: 0, stage: 0 });
        let costs = Costs::new(&materials.spec);
        let infos = [1, 2].map(|n| (NodeId(n), crate::testing::info(n))).into();
        let on = |away: &BTreeMap<ActorId, NodeId>, on: &[u64], present: &BTreeMap<ActorId, NodeId>| {
            let about = About { infos: &infos, slow: &BTreeMap::new(), away };
            Placement::new(&costs, &nodes(on), about, How::Level).place(present, &[])[&stage]
        };
        for node in [1, 2] {
            let away = [(stage, NodeId(node))].into();
            assert_eq!(on(&away, &[1, 2], &BTreeMap::new()), NodeId(3 - node));
            // Everything is on the other node.
            let crowded = costs.workers().map(|actor| (actor, NodeId(3 - node))).collect();
            assert_eq!(on(&away, &[1, 2], &crowded), NodeId(3 - node));
            assert_eq!(on(&away, &[node], &BTreeMap::new()), NodeId(node));
        }
    }

    /// PL-3: the same input, the same places.
    #[test]
    fn places_are_reproducible() {
        assert_eq!(place(&[3, 5, 9], &BTreeMap::new(), How::Level), place(&[3, 5, 9], &BTreeMap::new(), How::Level));
    }
}
