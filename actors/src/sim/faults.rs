//! Faults of the simulated world: processes that start, die, stop and panic, links that break.

use super::checks::Broken;
use super::network::Life;
use super::plan::Fault;
use super::process::{SimNode, SimRoot};
use super::world::{ForRoot, SimEvent, TICK, World};
use crate::control::Control;
use crate::effect::Event;
use crate::ids::{ActorId, Address, Step};
use crate::keeper::KeeperCore;
use crate::root::Root;
use crate::router::{Action, Router};
use crate::supervisor::{Nodes, Supervisor};
use crate::tally::{Operations, Tally};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

impl World {
    pub(super) fn new_life(&mut self) -> Life {
        self.next_life += 1;
        self.next_life
    }

    pub(super) fn start_node(&mut self, slot: usize) {
        let life = self.new_life();
        self.note(format!("slot {slot} starts as life {life}"));
        self.nodes[slot] = Some(SimNode {
            life,
            router: Router::new(),
            actors: BTreeMap::new(),
            paused: 0,
            slow: (1, 0),
            operations: Operations::default(),
            tally: Tally::default(),
            supervisor: None,
            leaving: false,
        });
        self.after(1, SimEvent::Heartbeat(life));
    }

    pub(super) fn start_root(&mut self) -> Result<(), Broken> {
        let life = self.new_life();
        let reported = self.fingerprints.iter().enumerate().map(|(i, f)| (i as Step + 1, f.clone())).collect();
        let now = Duration::from_micros(self.now);
        let spec = Arc::clone(&self.materials.spec);
        let nodes = Nodes { wanted: self.slots - self.spares, spares: self.spares, relieve: false };
        let (supervisor, first) = Supervisor::new(spec, nodes, &self.disk, self.published, reported, now);
        self.note(format!("the supervisor starts as life {life} with step {} committed", supervisor.committed()));
        if supervisor.committed() < self.announced {
            let what =
                format!("step {} was announced, the next supervisor knows {}", self.announced, supervisor.committed());
            return Err(("C2", what));
        }
        let (spec, layout) = (Arc::clone(&self.materials.spec), Arc::clone(&self.materials.layout));
        let keeper = KeeperCore::new(spec, layout, self.published);
        let (root, effects) = Root::new(supervisor, first, keeper);
        self.root = Some(SimRoot { life, root, lives: BTreeMap::new(), joining: BTreeMap::new() });
        self.after_root(TICK, ForRoot::Tick);
        self.perform_root(effects)
    }

    pub(super) fn kill_node(&mut self, slot: usize, seen: bool) {
        let Some(node) = self.nodes[slot].take() else { return };
        self.network.end(node.life);
        self.stopped.remove(&node.life);
        if let (true, Some(number)) = (seen, node.router.node()) {
            let delay = 500 + self.draw(2000);
            self.after(delay, SimEvent::Lost(number));
        }
        let delay = 5_000 + self.draw(200_000);
        self.after(delay, SimEvent::Start(slot));
    }

    pub(super) fn kill_root(&mut self) {
        let Some(root) = self.root.take() else { return };
        self.network.end(root.life);
        // A crash keeps some of what was not synced, in order.
        let kept = self.draw(self.unsynced.len() as u64 + 1) as usize;
        self.disk.extend(self.unsynced.drain(..).take(kept).collect::<Vec<_>>());
        let delay = 20_000 + self.draw(300_000);
        self.after(delay, SimEvent::StartRoot);
    }

    pub(super) fn fault(&mut self, fault: Fault) -> Result<(), Broken> {
        self.coverage.fault(fault);
        self.note(format!("fault: {fault:?}"));
        match fault {
            Fault::Kill { slot, seen } => self.kill_node(slot, seen),
            Fault::KillTwo { first, second } => {
                self.kill_node(first, true);
                self.kill_node(second, true);
            }
            Fault::KillSupervisor => self.kill_root(),
            Fault::KillAll => {
                self.kill_root();
                (0..self.slots).for_each(|slot| self.kill_node(slot, false));
            }
            Fault::Pause { slot, micros } => {
                let until = self.now + micros;
                if let Some(node) = &mut self.nodes[slot] {
                    node.paused = until;
                    let life = node.life;
                    self.after(micros, SimEvent::Resume(life));
                }
            }
            Fault::Slow { slot, times, micros } => {
                let until = self.now + micros;
                if let Some(node) = &mut self.nodes[slot] {
                    node.slow = (times, until);
                }
            }
            Fault::FlipStored => self.flip_stored = true,
            Fault::StoreFails { micros } => self.store_fails = self.now + micros,
            Fault::BreakLinks { slot } => {
                if let Some(life) = self.nodes[slot].as_ref().map(|n| n.life) {
                    self.break_links(life);
                }
            }
            Fault::Leave { slot } => {
                let Some(node) = self.nodes[slot].as_mut().filter(|n| n.router.node().is_some()) else { return Ok(()) };
                node.leaving = true;
                let (life, number) = (node.life, node.router.node());
                if let Some(node) = number {
                    self.send_to_root(life, Control::Leave { node })?;
                }
            }
            Fault::Cut { slot, other, micros } => {
                let life = |slot: usize| self.nodes[slot].as_ref().map(|n| n.life);
                if let (Some(a), Some(b)) = (life(slot), life(other))
                    && a != b
                {
                    self.break_link(a.min(b), a.max(b), micros);
                }
            }
            Fault::Panic { slot, choice } => self.panic(slot, choice)?,
            Fault::Flip { choice } => self.flip(choice),
        }
        Ok(())
    }

    fn flip(&mut self, choice: u32) {
        let all = self.nodes.iter_mut().flatten().flat_map(|n| n.actors.iter_mut());
        let mut reducers: Vec<_> = all.filter(|(actor, _)| matches!(actor, ActorId::Reducer { .. })).collect();
        let count = reducers.len().max(1);
        let Some((actor, holder)) = reducers.get_mut(choice as usize % count) else { return };
        holder.core.flip();
        self.flips += 1;
        let note = format!("a bit of {actor} flips");
        self.note(note);
    }

    pub(super) fn panic(&mut self, slot: usize, choice: u32) -> Result<(), Broken> {
        let Some(node) = &mut self.nodes[slot] else { return Ok(()) };
        let placed: Vec<ActorId> = node.actors.keys().copied().collect();
        let Some(actor) = placed.get(choice as usize % placed.len().max(1)).copied() else { return Ok(()) };
        let life = node.life;
        self.fail_actor(life, actor, "injected".to_owned())
    }

    /// An actor fails, and its node reports it. A host begins again, and its experts are reported.
    pub(super) fn fail_actor(&mut self, life: Life, actor: ActorId, reason: String) -> Result<(), Broken> {
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let Some(failed) = node.actors.remove(&actor) else { return Ok(()) };
        let address = Address { actor, incarnation: failed.incarnation };
        self.note(format!("{address} panics: {reason}"));
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let ActorId::Host { layer } = actor else {
            node.router.fail(address, reason.clone());
            return self.send_to_root(life, Control::ActorFailed { address, reason });
        };
        let of_host = |a: &&ActorId| matches!(a, ActorId::Expert { layer: l, .. } if *l == layer);
        let experts: Vec<ActorId> = node.actors.keys().filter(of_host).copied().collect();
        let table = Event::Table(Arc::clone(node.router.table()));
        for expert in experts {
            self.fail_actor(life, expert, format!("its host failed: {reason}"))?;
        }
        self.perform_node(life, vec![Action::Spawn(address), Action::Deliver(actor, table)])
    }
}
