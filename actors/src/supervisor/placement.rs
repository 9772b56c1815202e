//! Where actors live: a pure function of the nodes, the costs and where they live now.
//!
//! - PL-1: an actor whose node lives stays there, unless evening out is asked for.
//! - PL-2: copies of one shard live on different nodes, and where they can in different domains; a copy that has no node of
//!   its own is not placed.
//! - PL-3: the same input gives the same places (ties go to the lower number).

use crate::costs::Costs;
use crate::ids::{ActorId, NodeId};
use std::collections::BTreeMap;

/// See the module.
#[derive(Debug)]
pub(crate) struct Placement<'a> {
    costs: &'a Costs,
    nodes: &'a [NodeId],
    /// What fails with a node; empty: it alone.
    domains: BTreeMap<NodeId, &'a str>,
    load: BTreeMap<NodeId, u64>,
}

impl<'a> Placement<'a> {
    /// On these nodes; there is at least one.
    pub(crate) fn new(costs: &'a Costs, nodes: &'a [NodeId], domains: BTreeMap<NodeId, &'a str>) -> Self {
        Self { costs, nodes, domains, load: nodes.iter().map(|n| (*n, 0)).collect() }
    }

    /// Places stages, experts and these copies of shards; what is `present` has a place and keeps it, unless evening out
    /// (`level`) moves it.
    pub(crate) fn place(
        mut self,
        present: &BTreeMap<ActorId, NodeId>,
        copies: Vec<ActorId>,
        level: bool,
    ) -> BTreeMap<ActorId, NodeId> {
        let mut places = present.clone();
        for (actor, node) in present {
            *self.load.entry(*node).or_default() += self.costs.of(*actor);
        }
        let costs = self.costs;
        let mut homeless: Vec<ActorId> = costs.workers().chain(copies).filter(|a| !present.contains_key(a)).collect();
        homeless.sort_by(|a, b| costs.of(*b).cmp(&costs.of(*a)).then(a.cmp(b)));
        for actor in homeless {
            if let Some(node) = self.lightest(actor, &places) {
                places.insert(actor, node);
                *self.load.entry(node).or_default() += costs.of(actor);
            }
        }
        if level {
            self.level(&mut places);
        }
        places
    }

    /// The lightest node that may have the actor.
    fn lightest(&self, actor: ActorId, places: &BTreeMap<ActorId, NodeId>) -> Option<NodeId> {
        let taken: Vec<NodeId> = match actor {
            ActorId::Reducer { shard, .. } => places
                .iter()
                .filter(|(a, _)| matches!(a, ActorId::Reducer { shard: s, .. } if *s == shard))
                .map(|(_, node)| *node)
                .collect(),
            _ => Vec::new(),
        };
        let domain = |node: &NodeId| self.domains.get(node).copied().filter(|d| !d.is_empty());
        let shared = |node: &NodeId| domain(node).is_some_and(|d| taken.iter().any(|t| domain(t) == Some(d)));
        self.nodes.iter().filter(|n| !taken.contains(n)).min_by_key(|n| (shared(n), self.load[n])).copied()
    }

    /// Moves stages and experts (never state) from the heaviest node to the lightest while that helps.
    fn level(&mut self, places: &mut BTreeMap<ActorId, NodeId>) {
        let costs = self.costs;
        let mut actors: Vec<ActorId> = costs.workers().collect();
        actors.sort_by(|a, b| costs.of(*b).cmp(&costs.of(*a)).then(a.cmp(b)));
        for _ in 0..actors.len() {
            let heaviest = *self.nodes.iter().max_by_key(|n| (self.load[n], std::cmp::Reverse(**n))).expect("a node");
            let lightest = *self.nodes.iter().min_by_key(|n| (self.load[n], **n)).expect("a node");
            let gap = self.load[&heaviest] - self.load[&lightest];
            let movable = |a: &&ActorId| places.get(a) == Some(&heaviest) && costs.of(**a) > 0 && costs.of(**a) < gap;
            // The one that brings the two closest together.
            let Some(actor) = actors.iter().filter(movable).min_by_key(|a| gap.abs_diff(2 * costs.of(**a))) else {
                return;
            };
            let cost = costs.of(*actor);
            places.insert(*actor, lightest);
            *self.load.entry(heaviest).or_default() -= cost;
            *self.load.entry(lightest).or_default() += cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::materials;

    fn nodes(n: &[u64]) -> Vec<NodeId> {
        n.iter().map(|n| NodeId(*n)).collect()
    }

    fn place_in(on: &[(u64, &str)], present: &BTreeMap<ActorId, NodeId>, level: bool) -> BTreeMap<ActorId, NodeId> {
        let materials = materials();
        let costs = Costs::new(&materials.spec);
        let copies = (0..2).flat_map(|shard| (0..2).map(move |replica| ActorId::Reducer { shard, replica }));
        let domains = on.iter().map(|(n, domain)| (NodeId(*n), *domain)).collect();
        let nodes = nodes(&on.iter().map(|(n, _)| *n).collect::<Vec<_>>());
        let present = present.iter().filter(|(_, n)| nodes.contains(n)).map(|(a, n)| (*a, *n)).collect();
        Placement::new(&costs, &nodes, domains).place(&present, copies.collect(), level)
    }

    fn place(on: &[u64], present: &BTreeMap<ActorId, NodeId>, level: bool) -> BTreeMap<ActorId, NodeId> {
        place_in(&on.iter().map(|n| (*n, "")).collect::<Vec<_>>(), present, level)
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
        let before = place(&[1, 2], &BTreeMap::new(), false);
        let after = place(&[1, 2, 3], &before, false);
        assert_eq!(after, before);
        let lost = place(&[1, 3], &before, false);
        for (actor, node) in &before {
            assert!(lost[actor] == *node || *node == NodeId(2), "{actor}");
        }
        let level = place(&[1, 2, 3], &before, true);
        assert!(spread(&level, &[1, 2, 3]).1 < spread(&before, &[1, 2, 3]).1);
        let state = |p: &BTreeMap<ActorId, NodeId>| -> Vec<(ActorId, NodeId)> {
            p.iter().filter(|(a, _)| matches!(a, ActorId::Reducer { .. })).map(|(a, n)| (*a, *n)).collect()
        };
        assert_eq!(state(&level), state(&before), "state is not moved for balance");
    }

    /// PL-2: copies of a shard have nodes of their own, or no place.
    #[test]
    fn copies_live_apart() {
        for on in [&[1u64][..], &[1, 2], &[1, 2, 3]] {
            let places = place(on, &BTreeMap::new(), true);
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
            let places = place_in(&on, &BTreeMap::new(), true);
            for shard in 0..2 {
                let domain = |replica| {
                    let node = places[&ActorId::Reducer { shard, replica }];
                    on.iter().find(|(n, _)| *n == node.0).unwrap().1
                };
                assert_ne!(domain(0), domain(1), "{places:?}");
            }
        }
        let crowded = place_in(&[(1, "a"), (2, "a")], &BTreeMap::new(), true);
        assert_eq!(crowded.keys().filter(|a| matches!(a, ActorId::Reducer { .. })).count(), 4, "better than no copy");
    }

    /// PL-3: the same input, the same places.
    #[test]
    fn places_are_reproducible() {
        assert_eq!(place(&[3, 5, 9], &BTreeMap::new(), true), place(&[3, 5, 9], &BTreeMap::new(), true));
    }
}
