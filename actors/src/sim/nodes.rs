//! What the simulated world does for node processes: their routers, actors, mailboxes and jobs.

use super::contracts::{Broken, c4, c5, c6};
use super::network::{Life, Network};
use super::plan::Fault;
use super::process::{Cell, SimActor, is_over};
use super::world::{HEARTBEAT, SimEvent, World};
use crate::compute::{Job, attempt};
use crate::control::Control;
use crate::effect::{Effect, Event};
use crate::ids::{ActorId, Address, NodeId, SUPERVISOR_NODE};
use crate::message::Local;
use crate::rates::Rates;
use crate::router::Action;
use crate::table::NodeInfo;
use crate::tally::is_recipe;
use crate::wire::Unit;
use everstep_kernels::CpuBackend;
use std::collections::VecDeque;
use std::sync::Arc;

impl World {
    pub(super) fn heartbeat(&mut self, life: Life) -> Result<(), Broken> {
        let root = self.root.as_ref().map(|r| r.life);
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let (number, operations) = (node.router.node(), node.operations);
        let new_root = root.is_some() && node.supervisor != root;
        node.supervisor = root.or(node.supervisor);
        let control = match number {
            Some(node) if new_root => Control::Return { node },
            Some(node) => {
                let (rates, down) = (Rates::default(), self.unreached(life));
                Control::Heartbeat { node, operations, rates, down }
            }
            None if new_root => {
                let info = NodeInfo {
                    address: format!("life {life}"),
                    peer: life,
                    pid: 0,
                    machine: String::new(),
                    domain: if self.racks { format!("rack {}", self.slot_of(life) % 2) } else { String::new() },
                    memory: 0,
                };
                Control::Join { info, device_class: String::new() }
            }
            None => {
                self.after(HEARTBEAT, SimEvent::Heartbeat(life));
                return Ok(());
            }
        };
        self.after(HEARTBEAT, SimEvent::Heartbeat(life));
        let returns = matches!(control, Control::Return { .. });
        self.send_to_root(life, control)?;
        let Some(node) = self.node_of_life(life).filter(|_| returns) else { return Ok(()) };
        let leaving = node.router.node().filter(|_| node.leaving);
        if let Some(node) = leaving {
            self.send_to_root(life, Control::Leave { node })?;
        }
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let failures: Vec<(Address, String)> = node.router.failures().map(|(a, r)| (*a, r.clone())).collect();
        failures
            .into_iter()
            .try_for_each(|(address, reason)| self.send_to_root(life, Control::ActorFailed { address, reason }))
    }

    /// Nodes of a node's table to which its link is down.
    fn unreached(&mut self, life: Life) -> Vec<NodeId> {
        let Some(node) = self.node_of_life(life) else { return Vec::new() };
        let table = Arc::clone(node.router.table());
        let down = |peer: Life| self.network.links.get(&Network::pair(life, peer)).is_some_and(|l| !l.up);
        table.nodes.iter().filter(|(_, info)| down(info.peer)).map(|(node, _)| *node).collect()
    }

    pub(super) fn send_to_root(&mut self, life: Life, control: Control) -> Result<(), Broken> {
        let Some(root) = self.root.as_ref().map(|r| r.life) else { return Ok(()) };
        self.transmit(life, root, Unit::Control(control))
    }

    pub(super) fn node_hears(&mut self, life: Life, control: Control) -> Result<(), Broken> {
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        match control {
            Control::Welcome { node: number } => {
                node.router.welcome(number);
                Ok(())
            }
            Control::Table(table) => {
                let actions = node.router.on_table(table);
                self.perform_node(life, actions)
            }
            Control::Leave { .. } => {
                let number = node.router.node();
                if let Some(root) = &self.root {
                    c6::released(number, root.root.supervisor.table())?;
                }
                let slot = self.slot_of(life);
                self.note(format!("life {life} leaves"));
                self.kill_node(slot, false);
                Ok(())
            }
            Control::Fence => {
                // It gives up all it has and comes as new.
                let slot = self.slot_of(life);
                self.note(format!("life {life} is fenced"));
                self.network.end(life);
                self.start_node(slot);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn perform_node(&mut self, life: Life, actions: Vec<Action>) -> Result<(), Broken> {
        for action in actions {
            if self.dies_now(life) {
                return Ok(());
            }
            match action {
                Action::Spawn(address) => {
                    let mut core = self.materials.core(address).expect("placed actors are workers");
                    let wrong = self.node_of_life(life).is_some_and(|node| node.wrong);
                    if wrong && matches!(address.actor, ActorId::Stage { .. }) {
                        core.flip();
                    }
                    self.spawned += 1;
                    let (cell, incarnation) = (self.spawned, address.incarnation);
                    let actor = SimActor { cell, incarnation, core, mailbox: VecDeque::new(), awake: false };
                    if let Some(node) = self.node_of_life(life) {
                        node.actors.insert(address.actor, actor);
                    }
                }
                Action::Stop(address) => {
                    if let Some(node) = self.node_of_life(life)
                        && node.actors.get(&address.actor).is_some_and(|a| a.incarnation == address.incarnation)
                    {
                        node.actors.remove(&address.actor);
                    }
                }
                Action::Deliver(actor, event) => {
                    self.check_delivery(life, actor, &event)?;
                    self.deliver(life, actor, None, event);
                }
                Action::Transmit(node, bundle) => {
                    let target = self.peer_of(life, node);
                    if let Some(peer) = target {
                        self.transmit(life, peer, Unit::Bundle(bundle))?;
                    }
                }
                Action::Forget(_) => {}
            }
        }
        Ok(())
    }

    /// The life that a node's table names for another node.
    pub(super) fn peer_of(&mut self, life: Life, node: NodeId) -> Option<Life> {
        if node == SUPERVISOR_NODE {
            return self.root.as_ref().map(|r| r.life);
        }
        let router = &self.node_of_life(life)?.router;
        router.table().nodes.get(&node).map(|info| info.peer)
    }

    pub(super) fn check_delivery(&mut self, life: Life, actor: ActorId, event: &Event) -> Result<(), Broken> {
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let table = node.router.table();
        match event {
            Event::Message { from, .. } => c4::fenced(actor, from, table),
            Event::Local { local: Local::Batch(batch), .. } => c4::fenced_batch(batch, table),
            _ => Ok(()),
        }
    }

    /// Puts an event into an actor's mailbox, of that cell if one is named.
    pub(super) fn deliver(&mut self, life: Life, actor: ActorId, cell: Option<Cell>, event: Event) {
        let delay = self.until_run();
        let Some(node) = self.node_of_life(life) else { return };
        let Some(target) = node.actors.get_mut(&actor) else { return };
        if cell.is_some_and(|cell| cell != target.cell) {
            return;
        }
        target.mailbox.push_back(event);
        if !target.awake {
            target.awake = true;
            let cell = target.cell;
            self.after(delay, SimEvent::Wake(life, actor, cell));
        }
    }

    pub(super) fn wake(&mut self, life: Life, actor: ActorId, cell: Cell) -> Result<(), Broken> {
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let Some(target) = node.actors.get_mut(&actor).filter(|a| a.cell == cell) else { return Ok(()) };
        let Some(event) = target.mailbox.pop_front() else {
            target.awake = false;
            return Ok(());
        };
        let waiting = target.mailbox.len();
        let effects = target.core.on(event);
        let (kept, me) = (target.core.kept(), Address { actor, incarnation: target.incarnation });
        self.bounded("events in a mailbox", waiting, c5::MAILBOX)?;
        self.bounded("messages in an outbox", kept, c5::OUTBOX)?;
        self.perform(life, (me, cell), effects)?;
        let delay = self.until_run();
        self.after(delay, SimEvent::Wake(life, actor, cell));
        Ok(())
    }

    /// Whether a process of a node is gone, or dies before its next effect.
    fn dies_now(&mut self, life: Life) -> bool {
        let Some(node) = self.node_of_life(life) else { return true };
        let over = is_over(&mut node.effects_left);
        if over {
            let slot = self.slot_of(life);
            self.note(format!("life {life} dies between two effects"));
            let met = self.kill_node(slot, true);
            self.met(Fault::KillAtEffect { slot, effects: 0 }, met);
        }
        over
    }

    fn slot_of(&self, life: Life) -> usize {
        self.nodes.iter().position(|n| n.as_ref().is_some_and(|n| n.life == life)).expect("alive")
    }

    /// Until an actor with mail gets a thread: soon, or once a busy machine has one.
    fn until_run(&mut self) -> u64 {
        let most = if self.draw(64) == 0 { 5000 } else { 30 };
        1 + self.draw(most)
    }

    fn perform(&mut self, life: Life, (me, cell): (Address, Cell), effects: Vec<Effect>) -> Result<(), Broken> {
        let mut messages = Vec::new();
        for effect in effects {
            if self.dies_now(life) {
                return Ok(());
            }
            match effect {
                Effect::Send { from, to, body } => messages.push((from.unwrap_or(me), to, body)),
                Effect::Tell { to, local } => self.deliver(life, to, None, Event::Local { from: me.actor, local }),
                Effect::Compute { job, cost } => self.compute(life, (me, cell), job, cost)?,
            }
        }
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let actions = node.router.send(messages);
        self.perform_node(life, actions)
    }

    fn compute(&mut self, life: Life, (me, cell): (Address, Cell), job: Job, cost: u64) -> Result<(), Broken> {
        if let Some(node) = self.node_of_life(life) {
            let recipe = is_recipe(&job);
            let counter = if recipe { &mut node.operations.recipes } else { &mut node.operations.work };
            *counter += cost;
            c6::once(node.tally.begin(&job, me))?;
            self.recipes += if recipe { cost } else { 0 };
        }
        let outcome = match attempt(job, &CpuBackend::FP32) {
            Ok(outcome) => Box::new(outcome),
            // Lives that began with corrupt weights contradict those before them, until the corruption is told.
            Err(words) if self.flips > 0 => return self.fail_actor(life, me.actor, words),
            Err(words) => return Err(("no panic", words)),
        };
        let now = self.now;
        let times = self.node_of_life(life).map(|n| n.slow).filter(|slow| slow.1 > now).map_or(1, |slow| slow.0);
        let micros = times * (100 + self.draw(3000));
        self.after(micros, SimEvent::Computed(life, me.actor, cell, outcome));
        Ok(())
    }
}
