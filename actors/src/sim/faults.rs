//! Faults of the simulated world: processes that start, die, stop and panic, links that break.

use super::contracts::Broken;
use super::network::{Ill, Impaired, Life, Network};
use super::plan::{End, Fault};
use super::process::SimNode;
use super::world::{SimEvent, World};
use crate::control::Control;
use crate::effect::Event;
use crate::ids::{ActorId, Address};
use crate::router::{Action, Router};
use crate::tally::{Operations, Tally};
use std::collections::BTreeMap;
use std::sync::Arc;

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
            wrong: false,
            effects_left: None,
        });
        self.after(1, SimEvent::Heartbeat(life));
    }

    /// Gives whether there was one.
    pub(super) fn kill_node(&mut self, slot: usize, seen: bool) -> bool {
        let Some(node) = self.nodes[slot].take() else { return false };
        self.network.end(node.life);
        self.stopped.remove(&node.life);
        if let (true, Some(number)) = (seen, node.router.node()) {
            let delay = 500 + self.draw(2000);
            self.after(delay, SimEvent::Lost(number));
        }
        let delay = 5_000 + self.draw(200_000);
        self.after(delay, SimEvent::Start(slot));
        true
    }

    pub(super) fn kill_all(&mut self) {
        self.kill_root();
        self.files.cut_power(&mut self.draws);
        for slot in 0..self.slots {
            self.kill_node(slot, false);
        }
    }

    /// A fault happens, or lies in wait for something: then it counts when that comes.
    pub(super) fn fault(&mut self, fault: Fault) -> Result<(), Broken> {
        self.note(format!("fault: {fault:?}"));
        let met = match fault {
            Fault::KillAtEffect { .. }
            | Fault::KillSupervisorAtEffect { .. }
            | Fault::KillInWrite { .. }
            | Fault::KillAllAtCheckpoint
            | Fault::FlipStored
            | Fault::FlipFile
            | Fault::Ambush { .. } => {
                self.lie_in_wait(fault);
                return Ok(());
            }
            Fault::Kill { slot, seen } => self.kill_node(slot, seen),
            Fault::KillTwo { first, second } => {
                let met = [first, second].map(|slot| self.kill_node(slot, true));
                met == [true; 2]
            }
            Fault::KillSupervisor => self.kill_root(),
            Fault::KillAll => {
                self.kill_all();
                true
            }
            Fault::Pause { end, micros } => self.pause(end, micros),
            Fault::Jump { micros } => {
                self.ahead += micros;
                true
            }
            Fault::Slow { slot, times, micros } => {
                let until = self.now + micros;
                let node = self.nodes[slot].as_mut();
                node.map(|node| node.slow = (times, until)).is_some()
            }
            Fault::Leave { slot } => self.leave(slot)?,
            Fault::Join => {
                self.nodes.push(None);
                self.slots += 1;
                self.start_node(self.slots - 1);
                true
            }
            Fault::Panic { slot, choice } => self.panic(slot, choice)?,
            Fault::Flip { choice } => self.flip(choice),
            Fault::Wrong { slot } => self.go_wrong(slot),
            Fault::BreakLinks { .. }
            | Fault::Cut { .. }
            | Fault::OneWay { .. }
            | Fault::Part { .. }
            | Fault::SlowLinks { .. }
            | Fault::Lossy { .. }
            | Fault::Doubling { .. }
            | Fault::Mixing { .. } => self.fault_of_links(fault),
            Fault::StoreFails { trouble, micros } => {
                self.files.set(Some(trouble));
                self.after(micros, SimEvent::StoreHeals);
                true
            }
            Fault::SlowDisk { times, micros } => {
                self.slow_disk = (times, self.now + micros);
                true
            }
        };
        // Until it has met something it has met nothing.
        self.coverage.missed += 1;
        self.met(fault, met);
        Ok(())
    }

    /// Whether a fault that has happened, or what lay in wait, met something.
    pub(super) fn met(&mut self, fault: Fault, met: bool) {
        if met {
            self.coverage.fault(fault);
            self.coverage.missed -= 1;
        }
    }

    fn lie_in_wait(&mut self, fault: Fault) {
        self.coverage.missed += 1;
        match fault {
            Fault::KillAtEffect { slot, effects } => {
                if let Some(node) = &mut self.nodes[slot] {
                    node.effects_left = Some(effects);
                }
            }
            Fault::KillSupervisorAtEffect { effects } => {
                if let Some(root) = &mut self.root {
                    root.effects_left = Some(effects);
                }
            }
            Fault::KillInWrite { changes } => self.files.die_after(changes),
            Fault::KillAllAtCheckpoint => self.kill_all_stored = true,
            Fault::FlipStored => self.flip_stored = true,
            Fault::FlipFile => self.flip_file = true,
            Fault::Ambush { kind, kill } => self.ambush = Some((kind, kill)),
            _ => unreachable!("{fault:?} does not wait"),
        }
    }

    fn fault_of_links(&mut self, fault: Fault) -> bool {
        match fault {
            Fault::BreakLinks { slot } => {
                let life = self.nodes[slot].as_ref().map(|n| n.life);
                life.is_some_and(|life| self.break_links(life))
            }
            Fault::Cut { slot, other, micros } => {
                self.ends(slot, other).is_some_and(|(a, b)| self.break_link(a.min(b), a.max(b), micros))
            }
            Fault::OneWay { slot, other, back, micros } => {
                let way = self.ends(slot, other).map(|(a, b)| if back { (b, a) } else { (a, b) });
                way.is_some_and(|(from, to)| self.lose_one_way(from, to, micros))
            }
            Fault::Part { mask, micros } => self.part(mask, micros),
            Fault::SlowLinks { slot, more, micros } => self.impair(slot, Ill::Slow(more), micros),
            Fault::Lossy { slot, of, micros } => self.impair(slot, Ill::Loses(of), micros),
            Fault::Doubling { slot, of, micros } => self.impair(slot, Ill::Doubles(of), micros),
            Fault::Mixing { slot, of, micros } => self.impair(slot, Ill::Mixes(of), micros),
            _ => unreachable!("{fault:?} is none of links"),
        }
    }

    fn leave(&mut self, slot: usize) -> Result<bool, Broken> {
        let Some(node) = self.nodes[slot].as_mut() else { return Ok(false) };
        let (life, number) = (node.life, node.router.node());
        node.leaving |= number.is_some();
        let Some(node) = number else { return Ok(false) };
        self.send_to_root(life, Control::Leave { node })?;
        Ok(true)
    }

    /// Two processes that are there, and are two.
    fn ends(&self, slot: usize, other: End) -> Option<(Life, Life)> {
        let life = |slot: usize| self.nodes[slot].as_ref().map(|n| n.life);
        let other = match other {
            End::Slot(other) => life(other),
            End::Root => self.root.as_ref().map(|r| r.life),
        };
        Some((life(slot)?, other?)).filter(|(a, b)| a != b)
    }

    /// What lies in wait for a message happens.
    pub(super) fn spring(&mut self, from: Life, to: Life, kind: &'static str, kill: bool) {
        let slot = self.nodes.iter().position(|n| n.as_ref().is_some_and(|n| n.life == to));
        let met = match slot {
            Some(slot) if kill => self.kill_node(slot, true),
            None if kill && self.alive(to) => self.kill_root(),
            _ => {
                let (a, b) = Network::pair(from, to);
                let delay = 1000 + self.draw(100_000);
                self.break_link(a, b, delay)
            }
        };
        self.met(Fault::Ambush { kind, kill }, met);
    }

    fn impair(&mut self, slot: usize, how: Ill, micros: u64) -> bool {
        let Some(node) = &self.nodes[slot] else { return false };
        self.network.impaired.insert(node.life, Impaired { how, until: self.now + micros });
        true
    }

    fn pause(&mut self, end: End, micros: u64) -> bool {
        let until = self.now + micros;
        let stopped = match end {
            End::Slot(slot) => self.nodes[slot].as_mut().map(|n| (&mut n.paused, n.life)),
            End::Root => self.root.as_mut().map(|r| (&mut r.paused, r.life)),
        };
        let Some((paused, life)) = stopped else { return false };
        *paused = until;
        self.after(micros, SimEvent::Resume(life));
        true
    }

    fn go_wrong(&mut self, slot: usize) -> bool {
        let Some(node) = &mut self.nodes[slot] else { return false };
        node.wrong = true;
        let stages = node.actors.iter_mut().filter(|(actor, _)| matches!(actor, ActorId::Stage { .. }));
        stages.for_each(|(_, stage)| stage.core.flip());
        self.flips += 1;
        true
    }

    fn flip(&mut self, choice: u32) -> bool {
        let all = self.nodes.iter_mut().flatten().flat_map(|n| n.actors.iter_mut());
        let mut reducers: Vec<_> = all.filter(|(actor, _)| matches!(actor, ActorId::Reducer { .. })).collect();
        let count = reducers.len().max(1);
        let Some((actor, holder)) = reducers.get_mut(choice as usize % count) else { return false };
        holder.core.flip();
        self.flips += 1;
        let note = format!("a bit of {actor} flips");
        self.note(note);
        true
    }

    fn panic(&mut self, slot: usize, choice: u32) -> Result<bool, Broken> {
        let Some(node) = &mut self.nodes[slot] else { return Ok(false) };
        let placed: Vec<ActorId> = node.actors.keys().copied().collect();
        let Some(actor) = placed.get(choice as usize % placed.len().max(1)).copied() else { return Ok(false) };
        let life = node.life;
        self.fail_actor(life, actor, "injected".to_owned())?;
        Ok(true)
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
