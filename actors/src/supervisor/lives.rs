//! Who lives where: new lives for what failed, primaries for shards, the way back to a checkpoint.

use super::copies::{self, Home};
use super::placement::{About, How, place_all};
use super::timeline::Timeline;
use super::{Happening, RESTART_WINDOW, RESTARTS_MAX, Supervisor, SupervisorEffect, count_within};
use crate::holding::{Holding, by_node};
use crate::ids::{ActorId, Address, Incarnation, NodeId, SUPERVISOR_NODE};
use crate::plant::{Bug, planted};
use crate::table::{Domain, Entry, NodeInfo, Table};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// After so long without the nodes that a job begins with, operators are told.
const NODES_WAIT: Duration = Duration::from_secs(5);

/// So long an actor stays away from a node on which it failed again and again.
const AWAY: Duration = Duration::from_secs(600);

/// What a job waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// It is to go back, and its store is not read yet.
    Store,
    /// Nodes have no room for these actors, which a step needs.
    Room { actors: u64, bytes: u64 },
    /// Nodes are to leave, and others have no room for these copies of shards.
    Leaving { copies: usize, bytes: u64 },
    /// Only so many nodes have come.
    Nodes { come: usize },
    /// Some shard is in so many domains only (`recovery.when_thin`).
    Thin { domains: u32 },
}

impl Supervisor {
    /// Places what has no place. With `level`, evens out what may be moved too (at first there is nothing else).
    /// Gives the actors that were moved.
    pub(super) fn place(&mut self, level: bool) -> Vec<ActorId> {
        let started = self.table.entries.len() > 2;
        let level = level || !started;
        if self.admitted.is_empty() || (!started && self.admitted.len() < self.nodes_wanted) {
            return Vec::new();
        }
        let working = self.working();
        let copies = self.plan_copies(&working);
        let stays = |actor: &ActorId, node: &NodeId| match actor {
            ActorId::Supervisor | ActorId::Keeper => false,
            ActorId::Reducer { .. } => self.table.nodes.contains_key(node),
            ActorId::Stage { .. } | ActorId::Expert { .. } | ActorId::Host { .. } => {
                working.contains(node) || (!level && self.table.nodes.contains_key(node))
            }
        };
        let present = self.table.entries.iter().filter(|(actor, e)| stays(actor, &e.node));
        let present: BTreeMap<ActorId, NodeId> = present.map(|(a, e)| (*a, e.node)).collect();
        let slow = if self.relieve { self.speeds.slow() } else { BTreeMap::new() };
        let away = self.away();
        let about = About { infos: &self.table.nodes, slow: &slow, away: &away, all_copies: self.spec.thin_waits };
        let how = if level { How::Level } else { How::Stay };
        let (wanted, no_room) = place_all(&self.costs, &working, about, how, (&present, &copies));
        let mut homeless: Vec<ActorId> = copies.iter().filter(|copy| !wanted.contains_key(copy)).copied().collect();
        let mut moved = Vec::new();
        for (actor, node) in wanted {
            let life = self.table.entries.get(&actor).copied();
            if life.is_none_or(|e| e.node != node) {
                let incarnation = life.map_or(Incarnation(1), |e| e.incarnation.next());
                self.table.entries.insert(actor, Entry { node, incarnation });
                self.commit.out_of_sync(actor);
                moved.push(actor);
            }
        }
        if self.is_thin(&working) {
            homeless.extend(self.reducers().filter(|c| self.table.leaving.contains(&self.table.entries[c].node)));
        }
        let bytes = homeless.iter().map(|copy| self.costs.bytes(*copy)).sum();
        let leaving = Wait::Leaving { copies: homeless.len(), bytes };
        let leaving = (!homeless.is_empty() && !self.table.leaving.is_empty()).then_some(leaving);
        self.no_room = no_room.map(|(actors, bytes)| Wait::Room { actors, bytes }).or(leaving);
        moved
    }

    /// Tells operators once what the job waits for. Words are made only then: this is looked at with every event.
    pub(super) fn tell_wait(&mut self) -> Option<SupervisorEffect> {
        let wait = self.waits();
        if std::mem::replace(&mut self.told_wait, wait) == wait {
            return None;
        }
        Some(SupervisorEffect::Note(Happening::Waiting { why: self.words_of(wait?) }))
    }

    /// What the job waits for: its store, room, nodes that have not come for a while, or copies.
    pub(super) fn waits(&self) -> Option<Wait> {
        if self.back.is_some() {
            return Some(Wait::Store);
        }
        let begins = self.table.entries.len() > 2 || self.now.saturating_sub(self.began) < NODES_WAIT;
        let nodes = || (!begins).then_some(Wait::Nodes { come: self.admitted.len() });
        // A copy that is on its way needs no words.
        let thin = || {
            let nodes: Vec<NodeId> = self.table.nodes.keys().copied().collect();
            self.thin.filter(|_| self.is_thin(&nodes)).map(|domains| Wait::Thin { domains })
        };
        self.no_room.or_else(nodes).or_else(thin)
    }

    /// The same for people.
    pub(super) fn words_of(&self, wait: Wait) -> String {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        match wait {
            Wait::Store => {
                let why = self.back.as_ref().map_or(String::new(), |(back, _)| back.to_string());
                format!("{why}: the job goes back to its newest checkpoint when its store can be read")
            }
            Wait::Leaving { copies, bytes } => format!(
                "{copies} copies of shards need {} MiB for which no other node has room: nodes that are to leave stay until one with \
                 room comes",
                mib(bytes)
            ),
            Wait::Nodes { come } => {
                format!("{come} of {} nodes have come: the job begins when all have", self.nodes_wanted)
            }
            Wait::Thin { domains } => format!(
                "the state of a step would be safe in {domains} failure domains, {} are to have it (recovery.when_thin): the job goes on \
                 when a node of another one comes",
                self.spec.mirrors + 1
            ),
            Wait::Room { actors, bytes } => {
                let limit = |(node, info): (&NodeId, &NodeInfo)| format!("{node} {} MiB", mib(info.memory));
                let limits: Vec<String> = self.table.nodes.iter().map(limit).collect();
                format!(
                    "{actors} actors need {} MiB for which no node has room (limits: {}): the job goes on when a node with room \
                     comes",
                    mib(bytes),
                    limits.join(", ")
                )
            }
        }
    }

    /// Where the copies of a shard are.
    pub(super) fn homes(&self, shard: u32, working: &[NodeId]) -> Vec<(u32, Home)> {
        let home = |actor: ActorId| {
            let ActorId::Reducer { replica, .. } = actor else { unreachable!("copies are reducers") };
            let node = self.table.entries[&actor].node;
            let home = if working.contains(&node) {
                Home::Working { in_sync: self.commit.in_sync(shard, replica) }
            } else if self.table.nodes.contains_key(&node) {
                Home::Leaving
            } else {
                Home::Gone
            };
            (replica, home, self.table.domain_of(node))
        };
        let mut homes: Vec<(u32, Home, Domain<'_>)> = self.table.replicas(shard).map(home).collect();
        // Of those in one domain the one that is in sync comes first, then the older one.
        homes.sort_by_key(|(replica, home, _)| (*home != Home::Working { in_sync: true }, *replica));
        let works = |home: &Home| matches!(home, Home::Working { .. });
        let mut taken: BTreeSet<Domain<'_>> = homes.iter().filter(|(_, home, _)| works(home)).map(|h| h.2).collect();
        if taken.len() < homes.len() {
            let domains = taken.len() + self.free_domains(shard, working, &taken);
            // So many have to share a domain.
            let mut sharing = (self.spec.mirrors as usize + 1).saturating_sub(domains);
            for (_, home, domain) in &mut homes {
                if works(home) && !taken.remove(domain) {
                    match sharing.checked_sub(1) {
                        Some(left) => sharing = left,
                        None => *home = Home::Leaving,
                    }
                }
            }
        }
        homes.sort_by_key(|(replica, _, _)| *replica);
        homes.into_iter().map(|(replica, home, _)| (replica, home)).collect()
    }

    /// Where actors failed again and again, not long ago.
    pub(super) fn away(&self) -> BTreeMap<ActorId, NodeId> {
        let recent = self.moved_away.iter().filter(|(_, (_, at))| self.now.saturating_sub(*at) < AWAY);
        recent.map(|(actor, (node, _))| (*actor, *node)).collect()
    }

    /// What the actors of each node hold, and bytes that it has left.
    pub(super) fn holdings(&self) -> BTreeMap<NodeId, (Holding, u64)> {
        let mut held = by_node(&self.costs, self.table.entries.iter().map(|(actor, entry)| (*actor, entry.node)));
        let of_node = |(node, info): (&NodeId, &NodeInfo)| {
            let held = held.remove(node).unwrap_or_default();
            let room = info.room(held.bytes);
            (*node, (held, room))
        };
        self.table.nodes.iter().map(of_node).collect()
    }

    /// Domains of nodes that work, beside those that are taken, with room for a copy of a shard.
    fn free_domains(&self, shard: u32, working: &[NodeId], taken: &BTreeSet<Domain<'_>>) -> usize {
        let bytes = self.costs.bytes(ActorId::Reducer { shard, replica: 0 });
        let holdings = self.holdings();
        let roomy = working.iter().filter(|node| bytes <= holdings[node].1);
        self.table.domains(roomy.copied()).difference(taken).count()
    }

    /// Retires copies of which there are more than are wanted, and gives those that are to be placed.
    fn plan_copies(&mut self, working: &[NodeId]) -> Vec<ActorId> {
        let mut placed = Vec::new();
        for shard in 0..self.spec.shards {
            let present = self.homes(shard, working);
            // What a step would then wait for does not leave.
            let may_retire = !self.spec.thin_waits || self.spread(shard, working, true) > self.spec.mirrors as usize;
            let given = &mut self.table.copies[shard as usize];
            let plan = copies::of_shard(&present, working.len(), self.spec.mirrors, *given, may_retire);
            *given = plan.placed.iter().map(|n| n + 1).fold(*given, u32::max);
            for replica in plan.retired {
                let actor = ActorId::Reducer { shard, replica };
                self.table.entries.remove(&actor);
                self.commit.out_of_sync(actor);
            }
            let of_shard = |actor: &ActorId| matches!(actor, ActorId::Reducer { shard: s, .. } if *s == shard);
            let avoided = self.moved_away.iter().find(|(actor, _)| of_shard(actor)).map(|(_, avoided)| *avoided);
            for replica in plan.placed {
                let actor = ActorId::Reducer { shard, replica };
                // Under whatever number it comes.
                if let Some(avoided) = avoided {
                    self.moved_away.entry(actor).or_insert(avoided);
                }
                placed.push(actor);
            }
        }
        placed
    }

    /// In how many domains copies of a shard are, of those on these nodes; all, or those in sync.
    fn spread(&self, shard: u32, nodes: &[NodeId], in_sync: bool) -> usize {
        let counts = |copy: &ActorId| {
            let ActorId::Reducer { replica, .. } = *copy else { return false };
            !in_sync || self.commit.in_sync(shard, replica)
        };
        let places = self.table.replicas(shard).filter(counts).filter_map(|copy| self.table.node_of(copy));
        self.table.domains(places.filter(|node| nodes.contains(node))).len()
    }

    /// Whether the copies of a shard that have a place on these nodes are in fewer domains than a step waits for (CO-6).
    fn is_thin(&self, nodes: &[NodeId]) -> bool {
        let few = |shard| self.spread(shard, nodes, false) <= self.spec.mirrors as usize;
        self.spec.thin_waits && (0..self.spec.shards).any(few)
    }

    pub(super) fn dead(&mut self, lost: &[(NodeId, String, Duration)]) -> Vec<SupervisorEffect> {
        let mut effects = Vec::new();
        let mut any = false;
        for (node, why, silence) in lost {
            if !self.forget(*node) {
                continue;
            }
            any = true;
            self.failed(format!("{node}: {why}"), *silence);
            let note = Happening::NodeDead { node: node.0, why: why.clone(), epoch: self.table.epoch + 1 };
            effects.push(SupervisorEffect::Note(note));
        }
        if !any {
            return effects;
        }
        effects.extend(self.replace_homeless());
        effects
    }

    /// Gives every actor whose node is gone a new life, and every shard a primary that is in sync.
    fn replace_homeless(&mut self) -> Vec<SupervisorEffect> {
        let homeless = |t: &Table, e: &Entry| e.node != SUPERVISOR_NODE && !t.nodes.contains_key(&e.node);
        let lost: Vec<ActorId> =
            self.table.entries.iter().filter(|(_, e)| homeless(&self.table, e)).map(|(a, _)| *a).collect();
        for actor in &lost {
            self.commit.out_of_sync(*actor);
        }
        // Without a node they keep their last entry, and get a new life with the first one that joins.
        let moved = self.place(false);
        let mut effects = self.settle(Vec::new());
        let note = if self.admitted.is_empty() {
            Happening::Waiting { why: "no node is left".to_owned() }
        } else {
            let actors = moved.iter().map(ToString::to_string).collect();
            Happening::Moved { epoch: self.table.epoch, actors }
        };
        effects.push(SupervisorEffect::Note(note));
        effects
    }

    /// Copies for which a thin step waits (CO-6) do not wait for its commit to get a place, when a link is there again.
    pub(super) fn thicken(&mut self) -> Vec<SupervisorEffect> {
        let may = self.thin.is_some() && self.healed && self.links.all_up(&self.working());
        if !may {
            return Vec::new();
        }
        self.healed = false;
        let before = self.table.entries.len();
        let moved = self.place(false);
        if moved.is_empty() && self.table.entries.len() == before { Vec::new() } else { self.settle(Vec::new()) }
    }

    /// Whether a shard's primary has no state, and a copy is known that has. At the start of a job, and
    /// after a way back, all shards get their first primaries together.
    pub(super) fn can_elect(&self) -> bool {
        if self.back.is_some() {
            return false;
        }
        let all_in_sync = self.table.goes_back() && self.commit.all_in_sync();
        let unfit = |(shard, primary): (usize, &Option<u32>)| match primary {
            Some(replica) => !self.commit.in_sync(shard as u32, *replica) && self.commit.has_copy(shard as u32),
            None => all_in_sync,
        };
        self.table.primaries.iter().enumerate().any(unfit)
    }

    /// Publishes the changed table, with primaries that are in sync or everybody back at the checkpoint.
    pub(super) fn settle(&mut self, first: Vec<SupervisorEffect>) -> Vec<SupervisorEffect> {
        let note = self.elect();
        let gone = self.depart();
        let first = first.into_iter().chain(gone).collect();
        let mut effects = self.publish(first);
        effects.extend(note.map(SupervisorEffect::Note));
        effects
    }

    /// Gives each shard a primary that is in sync. A shard that lost all its copies sends the job back.
    pub(super) fn elect(&mut self) -> Option<Happening> {
        let all_in_sync = self.commit.all_in_sync();
        for shard in 0..self.spec.shards {
            let at = shard as usize;
            let in_sync = |r: u32| self.commit.in_sync(shard, r);
            let present = self.table.primaries[at];
            if present.is_some_and(in_sync) {
                continue;
            }
            let placed = || self.table.replicas(shard).next();
            let stateless = placed().and_then(|actor| match actor {
                ActorId::Reducer { replica, .. } if planted(Bug::StatelessElected) => Some(replica),
                _ => None,
            });
            let overlooked = present.is_some() && planted(Bug::MirrorOverlooked);
            let heir = stateless.or_else(|| self.commit.copies(shard).next().filter(|_| !overlooked));
            if present.is_some() && heir.is_none() && !self.commit.unheard(shard) {
                return self.roll_back(format!("shard {shard} lost all its copies"));
            }
            // First primaries come together, so that "none" always means: nobody has trained on this state.
            if heir.is_some() && (present.is_some() || all_in_sync) {
                self.table.primaries[at] = heir;
            }
        }
        None
    }

    pub(super) fn actor_failed(&mut self, address: Address, reason: String) -> Vec<SupervisorEffect> {
        let lives = self.table.node_of(address.actor).is_some_and(|node| self.table.nodes.contains_key(&node));
        let present = self.table.address(address.actor) == Some(address) && lives;
        if !present || planted(Bug::FailureOverlooked) {
            return Vec::new();
        }
        let times = count_within(self.restarts.entry(address.actor).or_default(), self.now, RESTART_WINDOW);
        let mut node = self.table.entries[&address.actor].node;
        if times > RESTARTS_MAX {
            let (actor, window) = (address.actor, RESTART_WINDOW.as_secs());
            let Some(other) = self.last_resort(address.actor, node) else {
                let why = format!("{actor} failed {times} times within {window} s; last: {reason}");
                return self.finish(Err(why));
            };
            node = other;
        }
        self.failed(format!("{}: {reason}", address.actor), Duration::ZERO);
        if planted(Bug::NodeRestarted) {
            let all = self.table.entries.values_mut().filter(|entry| entry.node == node);
            all.for_each(|entry| entry.incarnation = entry.incarnation.next());
        } else if let Some(entry) = self.table.entries.get_mut(&address.actor) {
            *entry = Entry { node, incarnation: entry.incarnation.next() };
        }
        self.commit.out_of_sync(address.actor);
        let mut effects = self.settle(Vec::new());
        effects.push(SupervisorEffect::Note(Happening::ActorFailed {
            actor: address.actor.to_string(),
            incarnation: address.incarnation.0,
            reason,
            epoch: self.table.epoch,
        }));
        effects
    }

    /// Another node for an actor that fails again and again where it is: that may be for its node. Once for each actor within
    /// [`AWAY`]; a copy of a shard goes to a domain that has none.
    fn last_resort(&mut self, actor: ActorId, node: NodeId) -> Option<NodeId> {
        let table = &self.table;
        let copies = match actor {
            ActorId::Reducer { shard, .. } => table.replicas(shard).filter(|copy| *copy != actor).collect(),
            _ => Vec::new(),
        };
        let taken = table.domains(copies.into_iter().filter_map(|copy| table.node_of(copy)));
        let free = self.working().into_iter().filter(|other| !taken.contains(&table.domain_of(*other)));
        let other = self.elsewhere(actor, &[node], &free.collect::<Vec<_>>())?;
        if self.away().contains_key(&actor) {
            return None;
        }
        self.moved_away.insert(actor, (node, self.now));
        self.restarts.remove(&actor);
        Some(other)
    }

    /// A failure is noticed.
    pub(super) fn failed(&mut self, why: String, silence: Duration) {
        let table = &self.table;
        self.recovery.get_or_insert_with(|| Timeline::new(self.now, table)).cause(why, silence);
    }
}
