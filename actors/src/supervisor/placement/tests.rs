//! Places of many shapes of jobs.

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
    let about = About { infos: &infos, slow: &slow, away: &away, all_copies: false };
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

/// PL-8: nodes die and others come, one after another; the experts of a layer stay spread, and so do the lanes of a stage.
#[test]
fn what_runs_at_one_time_is_spread() {
    let text = include_str!("../../../../configs/quickstart.toml");
    let spec = crate::Config::parse(text, "quickstart.toml", &[]).unwrap().spec;
    let costs = Costs::new(&spec);
    let infos = (1..40).map(|n| (NodeId(n), crate::testing::info(n))).collect();
    let about = About { infos: &infos, slow: &BTreeMap::new(), away: &BTreeMap::new(), all_copies: false };
    let mut on = nodes(&[1, 2, 3, 4]);
    let mut places = Placement::new(&costs, &on, about, How::Level).place(&BTreeMap::new(), &[]);
    for newcomer in 5..40 {
        on.remove(newcomer as usize * 7 % 4);
        places.retain(|_, at| on.contains(at));
        places = Placement::new(&costs, &on, about, How::Stay).place(&places, &[]);
        on.push(NodeId(newcomer));
        places = Placement::new(&costs, &on, about, How::Level).place(&places, &[]);
        let most = |is: &dyn Fn(&ActorId) -> bool| {
            let at = |node| places.iter().filter(|(actor, at)| **at == node && is(actor)).count();
            on.iter().map(|node| at(*node)).max().unwrap()
        };
        for layer in 1..4 {
            let most = most(&|actor| matches!(actor, ActorId::Expert { layer: of, .. } if *of == layer));
            assert!(most <= 3, "{most} of 8 experts of layer {layer} are on one of four nodes: {places:?}");
        }
        for stage in 0..2 {
            assert_eq!(most(&|actor| matches!(actor, ActorId::Stage { stage: of, .. } if *of == stage)), 1);
        }
    }
}

/// PL-5: a node that takes four times as long has about a quarter of the others' work; state stays.
#[test]
fn a_slow_node_has_less_to_do() {
    let materials = crate::testing::of(JobSpec { lanes: 4, ..(*materials().spec).clone() });
    let costs = Costs::new(&materials.spec);
    let infos = [1, 2, 3].map(|n| (NodeId(n), crate::testing::info(n))).into();
    let nodes = nodes(&[1, 2, 3]);
    let on = |slow: BTreeMap<NodeId, u64>, present: &BTreeMap<ActorId, NodeId>| {
        let about = About { infos: &infos, slow: &slow, away: &BTreeMap::new(), all_copies: false };
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
        let about = About { infos: &infos, slow: &BTreeMap::new(), away: &BTreeMap::new(), all_copies: false };
        Placement::new(&costs, &nodes(&[1, 2, 3]), about, How::Stay).place(&rest, &[]).get(&lost).copied()
    };
    assert_eq!([with(enough), with(enough - 1)], [Some(NodeId(1)), None]);
    assert_eq!(place_in(&on, &rest, How::Stay)[&lost], NodeId(3));
    let (infos, slow, away) = Default::default();
    let about = About { infos: &infos, slow: &slow, away: &away, all_copies: false };
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
        let about = About { infos: &infos, slow: &BTreeMap::new(), away, all_copies: false };
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
