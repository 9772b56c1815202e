//! The pure half of a node: the fence, the way of each message, and which actors live here.
//!
//! - RO-1: a message reaches an actor only if both ends' lives are the table's (contract C4), and the node of its sender lives.
//!   Messages between survivors pass in every epoch.
//! - RO-2: a message from a life that this node has not heard of yet is held until the table names it.
//! - RO-3: messages that one actor sends at once to actors of one node travel as one bundle; rows for
//!   experts of one layer reach their host as one batch.
//! - RO-4: an actor is spawned once for each life that the table places here.
//! - RO-5: a failed life is reported to every life of the supervisor until the table replaces it.

use crate::effect::Event;
use crate::ids::{ActorId, Address, NodeId, SUPERVISOR_NODE};
use crate::message::{Body, Envelope, Local};
use crate::plant::{Bug, planted};
use crate::shared::Shared;
use crate::table::{Entry, Table};
use everstep_kernels::Tensor;
use std::cmp::Ordering;
use std::collections::{BTreeMap, btree_map};
use std::sync::Arc;

/// Messages that may wait for their sender's life to be announced. A life sends at most the messages
/// of a step before it needs an answer, so a node that sees more is fed garbage.
pub(crate) const EARLY_MAX: usize = 65_536;

/// What the node is to do.
#[derive(Debug)]
pub(crate) enum Action {
    /// Start an actor.
    Spawn(Address),
    /// Stop one: it lives elsewhere or nowhere.
    Stop(Address),
    /// Give an event to an actor of this node.
    Deliver(ActorId, Event),
    /// Send messages to another node, together.
    Transmit(NodeId, Vec<Envelope>),
    /// Nodes that were in the table before and are not any more.
    Forget(Vec<NodeId>),
}

/// What the fence says about a message.
enum Verdict {
    Pass,
    Hold,
    Refuse,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Router {
    /// None until the supervisor has welcomed the process; messages may come before that.
    node: Option<NodeId>,
    table: Arc<Table>,
    early: Vec<Envelope>,
    refused: u64,
    shared: Shared,
    /// Lives that failed and are not replaced yet, with their last words.
    failed: BTreeMap<Address, String>,
}

impl Router {
    /// The router of a process that has not heard of any epoch.
    pub(crate) fn new() -> Self {
        Self {
            node: None,
            table: Arc::default(),
            early: Vec::new(),
            refused: 0,
            shared: Shared::default(),
            failed: BTreeMap::new(),
        }
    }

    /// The supervisor has given this process its number.
    pub(crate) fn welcome(&mut self, node: NodeId) {
        self.node = Some(node);
    }

    /// The number of this process.
    pub(crate) fn node(&self) -> Option<NodeId> {
        self.node
    }

    /// The epoch it knows.
    pub(crate) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Messages that the fence refused.
    pub(crate) fn refused(&self) -> u64 {
        self.refused
    }

    /// Messages that wait for a life to be announced.
    pub(crate) fn held(&self) -> usize {
        self.early.len()
    }

    /// An actor of this node failed.
    pub(crate) fn fail(&mut self, address: Address, reason: String) {
        self.failed.insert(address, reason);
    }

    /// Lives that failed and are not replaced yet, for a new life of the supervisor.
    pub(crate) fn failures(&self) -> impl Iterator<Item = (&Address, &String)> {
        self.failed.iter()
    }

    /// Hosts that a table wants on a node.
    fn hosts(&self, table: &Table) -> Vec<ActorId> {
        let mut layers: Vec<u32> = self
            .node
            .iter()
            .flat_map(|node| table.actors_of(*node))
            .filter_map(|a| match a.actor {
                ActorId::Expert { layer, .. } => Some(layer),
                _ => None,
            })
            .collect();
        layers.dedup();
        layers.into_iter().map(|layer| ActorId::Host { layer }).collect()
    }

    /// A new epoch. Older ones are ignored.
    pub(crate) fn on_table(&mut self, table: Arc<Table>) -> Vec<Action> {
        if table.epoch <= self.table.epoch {
            return Vec::new();
        }
        let before = std::mem::replace(&mut self.table, Arc::clone(&table));
        self.failed.retain(|address, _| table.address(address.actor) == Some(*address));
        let mut actions = Vec::new();
        let here = |table: &Table| self.node.iter().flat_map(|node| table.actors_of(*node)).collect();
        let (old, new): (Vec<Address>, Vec<Address>) = (here(&before), here(&table));
        actions.extend(old.iter().filter(|a| !new.contains(a)).map(|a| Action::Stop(*a)));
        let first = |actor| Address { actor, incarnation: crate::ids::Incarnation(0) };
        let (old_hosts, new_hosts) = (self.hosts(&before), self.hosts(&table));
        actions.extend(old_hosts.iter().filter(|h| !new_hosts.contains(h)).map(|h| Action::Stop(first(*h))));
        actions.extend(new_hosts.iter().filter(|h| !old_hosts.contains(h)).map(|h| Action::Spawn(first(*h))));
        actions.extend(new.iter().filter(|a| !old.contains(a)).map(|a| Action::Spawn(*a)));
        let inform = new_hosts.into_iter().chain(new.iter().map(|a| a.actor));
        actions.extend(inform.map(|actor| Action::Deliver(actor, Event::Table(Arc::clone(&table)))));
        if table.primaries.contains(&None) {
            self.shared.clear();
        }
        self.shared.keep(|of| new.iter().any(|a| matches!(a.actor, ActorId::Stage { stage, .. } if stage == of)));
        let gone: Vec<NodeId> = before.nodes.keys().filter(|n| !table.nodes.contains_key(n)).copied().collect();
        if !gone.is_empty() {
            actions.push(Action::Forget(gone));
        }
        let early = std::mem::take(&mut self.early);
        actions.extend(self.arrive(early));
        actions
    }

    fn verdict(&self, envelope: &Envelope) -> Verdict {
        if planted(Bug::FenceSkipped) {
            return Verdict::Pass;
        }
        if self.table.is_retired(envelope.from.actor) || self.table.is_retired(envelope.to.actor) {
            return Verdict::Refuse;
        }
        let compare = |a: &Address| self.table.address(a.actor).map(|now| a.incarnation.cmp(&now.incarnation));
        match (compare(&envelope.from), compare(&envelope.to)) {
            (Some(Ordering::Equal), Some(Ordering::Less)) if planted(Bug::ReceiverUnfenced) => Verdict::Pass,
            (Some(Ordering::Less), _) | (_, Some(Ordering::Less)) => Verdict::Refuse,
            (Some(Ordering::Equal), Some(Ordering::Equal)) => {
                // The same life may have been moved only by a new one, so it is here. Whoever's node is dead may have no new
                // life yet.
                let lives = |node| node == SUPERVISOR_NODE || self.table.nodes.contains_key(&node);
                let here = self.table.node_of(envelope.to.actor) == self.node;
                let lives = self.table.node_of(envelope.from.actor).is_some_and(lives);
                if here && lives { Verdict::Pass } else { Verdict::Refuse }
            }
            (None | Some(Ordering::Equal | Ordering::Greater), None | Some(Ordering::Equal | Ordering::Greater)) => {
                Verdict::Hold
            }
        }
    }

    /// A bundle came from a node, or from an actor of this one.
    pub(crate) fn arrive(&mut self, bundle: Vec<Envelope>) -> Vec<Action> {
        let mut batches: BTreeMap<u32, Vec<Envelope>> = BTreeMap::new();
        let mut actions = Vec::new();
        for envelope in bundle {
            match self.verdict(&envelope) {
                Verdict::Refuse => self.refused += 1,
                Verdict::Hold if self.early.len() < EARLY_MAX && !planted(Bug::EarlyMessageRefused) => {
                    self.early.push(envelope)
                }
                Verdict::Hold => self.refused += 1,
                Verdict::Pass => match (envelope.to.actor, &envelope.body) {
                    (ActorId::Expert { layer, .. }, Body::Rows { .. }) => {
                        batches.entry(layer).or_default().push(envelope)
                    }
                    (actor, _) => {
                        let Envelope { from, body, .. } = envelope;
                        let body = self.shared.take(from, actor, body);
                        actions.push(Action::Deliver(actor, Event::Message { from, body }));
                    }
                },
            }
        }
        for (layer, batch) in batches {
            let event = Event::Local { from: ActorId::Host { layer }, local: Local::Batch(batch) };
            actions.push(Action::Deliver(ActorId::Host { layer }, event));
        }
        actions
    }

    /// Messages that one actor sends at once: `(in whose name, to whom, what)`.
    pub(crate) fn send(&mut self, messages: Vec<(Address, ActorId, Body<Tensor>)>) -> Vec<Action> {
        let mut bundles: BTreeMap<NodeId, Vec<Envelope>> = BTreeMap::new();
        for (from, to, body) in messages {
            // An actor without a place gets it from the outbox once it has one.
            let Some(Entry { node, incarnation }) = self.table.entries.get(&to).copied() else { continue };
            let envelope = Envelope { from, to: Address { actor: to, incarnation }, body };
            // A commit goes to thousands: of each node it is asked once whether it is there.
            match bundles.entry(node) {
                btree_map::Entry::Occupied(bundle) => bundle.into_mut().push(envelope),
                btree_map::Entry::Vacant(place) => {
                    if node == SUPERVISOR_NODE || self.table.nodes.contains_key(&node) {
                        place.insert(vec![envelope]);
                    }
                }
            }
        }
        let mut actions = Vec::new();
        for (node, bundle) in bundles {
            if Some(node) == self.node {
                actions.extend(self.arrive(bundle));
            } else {
                actions.push(Action::Transmit(node, bundle));
            }
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Pass, Turn};
    use crate::testing::{address, materials, replace, table};

    const STAGE: ActorId = ActorId::Stage { lane: 0, stage: 0 };
    const OTHER: ActorId = ActorId::Stage { lane: 0, stage: 1 };

    fn rows() -> Tensor {
        Tensor::from_vec(1, 4, vec![0.0; 4])
    }

    fn hidden(from: u32, to: u32) -> Envelope {
        let turn = Turn { step: 1, lane: 0, micro_batch: 0 };
        Envelope { from: address(STAGE, from), to: address(OTHER, to), body: Body::Hidden { turn, rows: rows() } }
    }

    fn router(table: &Table) -> Router {
        let mut router = Router::new();
        router.welcome(NodeId(1));
        router.on_table(Arc::new(table.clone()));
        router
    }

    fn delivered(actions: &[Action]) -> usize {
        actions.iter().filter(|a| matches!(a, Action::Deliver(_, Event::Message { .. } | Event::Local { .. }))).count()
    }

    /// RO-1: lives of the past are refused at both ends; survivors pass in every epoch.
    #[test]
    fn replaced_lives_are_refused_and_survivors_pass() {
        let first = table(&materials());
        let mut router = router(&first);
        assert_eq!(delivered(&router.arrive(vec![hidden(1, 1)])), 1);
        let second = replace(&first, STAGE);
        router.on_table(Arc::new(second.clone()));
        assert_eq!(delivered(&router.arrive(vec![hidden(1, 1)])), 0);
        assert_eq!(delivered(&router.arrive(vec![hidden(2, 1)])), 1);
        router.on_table(Arc::new(replace(&second, OTHER)));
        assert_eq!(delivered(&router.arrive(vec![hidden(2, 1)])), 0);
        assert_eq!(router.refused(), 2);
    }

    /// RO-1: an actor whose node is dead may have no other place yet: nothing of it is heard all the same.
    #[test]
    fn the_dead_are_not_heard() {
        let mut table = table(&materials());
        table.entries.get_mut(&STAGE).unwrap().node = NodeId(2);
        assert_eq!(delivered(&router(&table).arrive(vec![hidden(1, 1)])), 1);
        table.nodes.remove(&NodeId(2));
        assert_eq!(delivered(&router(&table).arrive(vec![hidden(1, 1)])), 0);
    }

    /// RO-2: a life that is not announced yet is held, and let through when it is.
    #[test]
    fn lives_of_the_future_are_held() {
        let first = table(&materials());
        let mut router = router(&first);
        assert_eq!(delivered(&router.arrive(vec![hidden(2, 1), hidden(3, 1)])), 0);
        assert_eq!(router.held(), 2);
        let actions = router.on_table(Arc::new(replace(&first, STAGE)));
        assert_eq!((delivered(&actions), router.held()), (1, 1));
    }

    /// RO-3: rows for experts of one layer reach their host as one batch, and travel as one bundle.
    #[test]
    fn what_is_sent_at_once_travels_together() {
        let materials = materials();
        let mut table = table(&materials);
        table.entries.get_mut(&ActorId::Expert { layer: 1, expert: 2 }).unwrap().node = NodeId(2);
        let mut router = router(&table);
        let turn = Turn { step: 1, lane: 0, micro_batch: 0 };
        let to = |expert| {
            (
                address(STAGE, 1),
                ActorId::Expert { layer: 1, expert },
                Body::Rows { turn, pass: Pass::Forward, rows: rows() },
            )
        };
        let actions = router.send(vec![to(0), to(1), to(2)]);
        let mut batches = Vec::new();
        let mut bundles = Vec::new();
        for action in actions {
            match action {
                Action::Deliver(ActorId::Host { layer }, Event::Local { local: Local::Batch(batch), .. }) => {
                    batches.push((layer, batch.len()));
                }
                Action::Transmit(node, bundle) => bundles.push((node, bundle.len())),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((batches, bundles), (vec![(1, 2)], vec![(NodeId(2), 1)]));
    }

    /// RO-4: one spawn for each life, a stop for those that went, nothing for an old table.
    #[test]
    fn actors_are_spawned_once_for_each_life() {
        let first = table(&materials());
        let mut router = Router::new();
        router.welcome(NodeId(1));
        let spawned = |actions: &[Action]| -> Vec<Address> {
            actions.iter().filter_map(|a| if let Action::Spawn(address) = a { Some(*address) } else { None }).collect()
        };
        let all = spawned(&router.on_table(Arc::new(first.clone())));
        let placed: Vec<Address> = first.actors_of(NodeId(1)).collect();
        assert!(placed.iter().all(|a| all.contains(a)));
        // Two hosts beside them: both mixture layers have experts here.
        assert_eq!(all.len(), placed.len() + 2);
        let second = replace(&first, STAGE);
        let actions = router.on_table(Arc::new(second));
        assert_eq!(spawned(&actions), [address(STAGE, 2)]);
        assert!(actions.iter().any(|a| matches!(a, Action::Stop(old) if *old == address(STAGE, 1))));
        assert!(router.on_table(Arc::new(first)).is_empty());
    }

    /// RO-5: a failure is remembered until the table replaces that life.
    #[test]
    fn failures_are_remembered_until_they_are_replaced() {
        let first = table(&materials());
        let mut router = router(&first);
        router.fail(address(STAGE, 1), "panic".to_owned());
        router.on_table(Arc::new(replace(&first, OTHER)));
        assert_eq!(router.failures().count(), 1);
        let mut third = replace(&first, STAGE);
        third.epoch = 9;
        router.on_table(Arc::new(third));
        assert_eq!(router.failures().count(), 0);
    }
}
