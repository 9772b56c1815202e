//! What the nodes of a job hold, and which losses it gets over without waiting: the placement's answers before there is a job.

use super::placement::{About, How, has_copy, place_all};
use crate::costs::Costs;
use crate::holding::by_node;
use crate::ids::{ActorId, NodeId};
use crate::spec::JobSpec;
use crate::table::NodeInfo;
use everstep_transport::LINK_BYTES;
use std::collections::{BTreeMap, BTreeSet};

/// Of a node's process without actors.
const PROGRAM_BYTES: u64 = 24 << 20;
/// Cases that are tried, and with more actors than that none.
const CASES_MAX: usize = 500;
const ACTORS_MAX: usize = 1000;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outlook {
    /// Bytes that the actors of the fullest node hold at most, as planned; none: there is not room for all.
    pub fullest: Option<u64>,
    /// Bytes that its process needs beside them at most: the program, and what links to all others hold.
    pub process: u64,
    /// Bytes among those of all nodes that outboxes keep until the commit: copies of messages, and what others are made again
    /// of.
    pub outboxes: [u64; 2],
    /// So many of them, whichever, may be lost at one time, and the rest goes on at once with all state.
    pub losses: usize,
    /// Why not one more.
    pub limit: Limit,
}

/// What ends a job's going on at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// A shard would have no copy left, or fewer than a step may be committed with.
    Copies,
    /// What lived there has no room elsewhere.
    Room,
    /// No node would be left.
    Nodes,
    /// There are too many cases to try.
    Cases,
}

impl Outlook {
    /// Of a job on so many nodes, each with so much memory (0: no limit), each a domain of its own.
    pub fn new(spec: &JobSpec, nodes: usize, memory: u64) -> Self {
        let costs = Costs::new(spec);
        let all: Vec<NodeId> = (1..=nodes as u64).map(NodeId).collect();
        let first = place(spec, &costs, &all, memory, &BTreeMap::new());
        let kept = costs.workers().map(|actor| costs.kept(actor));
        let outboxes = kept.fold([0; 2], |[copies, recipes], k| [copies + k.copies, recipes + k.recipes]);
        // To each other node one, and one to the supervisor.
        let process = PROGRAM_BYTES + nodes as u64 * LINK_BYTES;
        let mut outlook = Self { fullest: None, process, outboxes, losses: 0, limit: Limit::Room };
        let Some(first) = first else { return outlook };
        let held = by_node(&costs, first.iter().map(|(actor, node)| (*actor, *node)));
        outlook.fullest = held.into_values().map(|held| held.bytes).max();
        for lost in 1..=nodes {
            if first.len() > ACTORS_MAX || subsets(&all, lost).nth(CASES_MAX).is_some() {
                outlook.limit = Limit::Cases;
                break;
            }
            let limit = subsets(&all, lost).find_map(|gone| after(spec, &costs, (&all, &gone), memory, &first));
            if let Some(limit) = limit {
                outlook.limit = limit;
                break;
            }
            outlook.losses = lost;
        }
        outlook
    }
}

/// Why a job does not go on at once without these nodes.
fn after(
    spec: &JobSpec,
    costs: &Costs,
    (all, gone): (&[NodeId], &BTreeSet<NodeId>),
    memory: u64,
    first: &BTreeMap<ActorId, NodeId>,
) -> Option<Limit> {
    let left: Vec<NodeId> = all.iter().filter(|node| !gone.contains(node)).copied().collect();
    if left.is_empty() {
        return Some(Limit::Nodes);
    }
    let present: BTreeMap<ActorId, NodeId> =
        first.iter().filter(|(_, node)| !gone.contains(node)).map(|(a, n)| (*a, *n)).collect();
    let thin = spec.thin_waits && left.len() <= spec.mirrors as usize;
    if thin || !(0..spec.shards).all(|shard| has_copy(&present, shard)) {
        return Some(Limit::Copies);
    }
    place(spec, costs, &left, memory, &present).is_none().then_some(Limit::Room)
}

/// Where everything lives that a step needs, and further copies where there is room; none if there is no room.
fn place(
    spec: &JobSpec,
    costs: &Costs,
    nodes: &[NodeId],
    memory: u64,
    present: &BTreeMap<ActorId, NodeId>,
) -> Option<BTreeMap<ActorId, NodeId>> {
    let info = |node: &NodeId| {
        let info = NodeInfo {
            address: String::new(),
            peer: node.0,
            pid: 0,
            machine: String::new(),
            domain: String::new(),
            memory,
        };
        (*node, info)
    };
    let (infos, slow, away) = (nodes.iter().map(info).collect(), BTreeMap::new(), BTreeMap::new());
    let copies = (0..spec.shards).flat_map(|shard| {
        (0..=spec.mirrors.min(nodes.len() as u32 - 1)).map(move |replica| ActorId::Reducer { shard, replica })
    });
    let copies: Vec<ActorId> = copies.collect();
    let how = if present.is_empty() { How::Level } else { How::Stay };
    let (places, homeless) = place_all(
        costs,
        nodes,
        About { infos: &infos, slow: &slow, away: &away, all_copies: false },
        how,
        (present, &copies),
    );
    homeless.is_none().then_some(places)
}

/// All subsets of so many nodes.
fn subsets(all: &[NodeId], count: usize) -> impl Iterator<Item = BTreeSet<NodeId>> {
    let mut at: Option<Vec<usize>> = (count <= all.len()).then(|| (0..count).collect());
    std::iter::from_fn(move || {
        let chosen = at.clone()?;
        at = (0..count).rev().find(|i| chosen[*i] < all.len() - count + i).map(|i| {
            let next = chosen[i] + 1;
            chosen[..i].iter().copied().chain((0..count - i).map(|n| next + n)).collect()
        });
        Some(chosen.into_iter().map(|n| all[n]).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::materials;

    #[test]
    fn copies_room_and_nodes_end_it() {
        let spec = |mirrors| JobSpec { mirrors, ..(*materials().spec).clone() };
        let of = |mirrors, nodes, memory| {
            let outlook = Outlook::new(&spec(mirrors), nodes, memory);
            (outlook.losses, outlook.limit, outlook.fullest.is_some())
        };
        assert_eq!(of(0, 4, 0), (0, Limit::Copies, true));
        assert_eq!(of(1, 4, 0), (1, Limit::Copies, true));
        assert_eq!(of(2, 4, 0), (2, Limit::Copies, true));
        assert_eq!(of(2, 3, 0), (2, Limit::Nodes, true));
        let waits = JobSpec { thin_waits: true, ..spec(1) };
        assert_eq!([2, 3].map(|nodes| Outlook::new(&waits, nodes, 0).losses), [0, 1]);
        let fullest = Outlook::new(&spec(1), 2, 0).fullest.expect("no limit");
        assert_eq!(of(1, 2, fullest), (0, Limit::Room, true));
        assert_eq!(of(1, 2, fullest / 4), (0, Limit::Room, false));
    }

    #[test]
    fn every_subset_comes_once() {
        let all: Vec<NodeId> = (1..=5).map(NodeId).collect();
        for (count, expected) in [1, 5, 10, 10, 5, 1].into_iter().enumerate() {
            let found: BTreeSet<BTreeSet<NodeId>> = subsets(&all, count).collect();
            assert_eq!((found.len(), subsets(&all, count).count()), (expected, expected));
            assert!(found.iter().all(|subset| subset.len() == count));
        }
    }
}
