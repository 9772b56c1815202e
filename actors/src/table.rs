//! The table: an epoch's membership and placement, as the supervisor announces it to every node.

use crate::ids::{ActorId, Address, Incarnation, NodeId, Step};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Where an actor lives, and which of its lives this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its node.
    pub node: NodeId,
    /// Its life.
    pub incarnation: Incarnation,
}

/// How a node is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// `host:port` of its endpoint.
    pub address: String,
    /// The random name of this life of the process, which sessions use.
    pub peer: u64,
    /// The process, for a supervisor on the same machine to watch.
    pub pid: u32,
    /// The machine's boot: equal for processes that can watch each other.
    pub machine: String,
    /// What fails with it (a host, a rack): copies of a shard are kept apart where they can be. Empty: the node alone.
    pub domain: String,
    /// Bytes that its actors may need, as planned; 0: no limit.
    pub memory: u64,
}

impl NodeInfo {
    /// Bytes that are left for actors when others need `used`.
    pub fn room(&self, used: u64) -> u64 {
        if self.memory == 0 { u64::MAX } else { self.memory.saturating_sub(used) }
    }
}

/// What fails together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Domain<'a> {
    /// A node that is in no domain with others.
    Node(NodeId),
    /// All nodes that say so.
    Named(&'a str),
}

/// An epoch. Only the supervisor makes one; nodes take the one with the highest number.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Table {
    /// Its number; grows by one with every change.
    pub epoch: u64,
    /// Living nodes.
    pub nodes: BTreeMap<NodeId, NodeInfo>,
    /// Those among them that are to leave.
    pub leaving: BTreeSet<NodeId>,
    /// Every actor that is placed.
    pub entries: BTreeMap<ActorId, Entry>,
    /// The copy of each shard that hands out weights and state; none until one has a state.
    pub primaries: Vec<Option<u32>>,
    /// Numbers that were given to copies of each shard so far: one that is not placed and has such a number was retired.
    pub copies: Vec<u32>,
    /// The checkpoint that reducers start from when no copy of their shard has a state; 0: the initial state.
    pub base: Step,
}

impl Table {
    /// An actor's present life.
    pub fn address(&self, actor: ActorId) -> Option<Address> {
        let entry = self.entries.get(&actor)?;
        Some(Address { actor, incarnation: entry.incarnation })
    }

    /// Where an actor lives.
    pub fn node_of(&self, actor: ActorId) -> Option<NodeId> {
        self.entries.get(&actor).map(|e| e.node)
    }

    /// In what a node of the table fails.
    pub fn domain_of(&self, node: NodeId) -> Domain<'_> {
        match self.nodes.get(&node).map(|info| info.domain.as_str()) {
            Some(name) if !name.is_empty() => Domain::Named(name),
            Some(_) | None => Domain::Node(node),
        }
    }

    /// In what these nodes fail.
    pub fn domains(&self, nodes: impl IntoIterator<Item = NodeId>) -> BTreeSet<Domain<'_>> {
        nodes.into_iter().map(|node| self.domain_of(node)).collect()
    }

    /// Whether an actor got another life between `before` and this epoch.
    pub fn replaced(&self, before: &Self, actor: ActorId) -> bool {
        self.entries.get(&actor).map(|e| e.incarnation) != before.entries.get(&actor).map(|e| e.incarnation)
    }

    /// Whether it has no primary at all: nobody has the job's state, which begins, or goes back to the checkpoint.
    pub fn goes_back(&self) -> bool {
        self.primaries.iter().all(Option::is_none)
    }

    /// The primary of a shard.
    pub fn primary(&self, shard: u32) -> Option<ActorId> {
        let replica = (*self.primaries.get(shard as usize)?)?;
        Some(ActorId::Reducer { shard, replica })
    }

    /// Whether an actor's last life is over and there will be no other.
    pub fn is_retired(&self, actor: ActorId) -> bool {
        let ActorId::Reducer { shard, replica } = actor else { return false };
        let given = self.copies.get(shard as usize).is_some_and(|given| replica < *given);
        given && !self.entries.contains_key(&actor)
    }

    /// Copies of a shard that are placed, ascending.
    pub fn replicas(&self, shard: u32) -> impl Iterator<Item = ActorId> {
        let range = ActorId::Reducer { shard, replica: 0 }..=ActorId::Reducer { shard, replica: u32::MAX };
        self.entries.range(range).map(|(actor, _)| *actor)
    }

    /// Experts of a layer that are placed, ascending.
    pub fn experts(&self, layer: u32) -> impl Iterator<Item = Address> {
        let range = ActorId::Expert { layer, expert: 0 }..=ActorId::Expert { layer, expert: u32::MAX };
        self.entries.range(range).map(|(actor, e)| Address { actor: *actor, incarnation: e.incarnation })
    }

    /// Actors of a node.
    pub fn actors_of(&self, node: NodeId) -> impl Iterator<Item = Address> {
        self.entries
            .iter()
            .filter(move |(_, e)| e.node == node)
            .map(|(actor, e)| Address { actor: *actor, incarnation: e.incarnation })
    }
}
