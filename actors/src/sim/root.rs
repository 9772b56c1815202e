//! What the simulated world does for the supervisor's process: its disk, its clock, its words.

use super::checks::{self, Broken};
use super::network::Life;
use super::world::{ForRoot, SimEvent, TICK, World};
use crate::control::Control;
use crate::ids::{NodeId, Step};
use crate::keeper::KeeperEvent;
use crate::message::{Body, Envelope};
use crate::root::{RootEffect, RootEvent};
use crate::supervisor::{Happening, SupervisorEvent};
use crate::wire::Unit;
use everstep_kernels::state_sum;
use std::time::Duration;

impl World {
    pub(super) fn root_step(&mut self, event: ForRoot) -> Result<(), Broken> {
        match event {
            ForRoot::Tick => {
                self.after_root(TICK, ForRoot::Tick);
                self.tell_root(RootEvent::Supervisor(SupervisorEvent::Tick))
            }
            ForRoot::Synced => {
                let record = self.unsynced.remove(0);
                self.disk.push(record);
                self.tell_root(RootEvent::Supervisor(SupervisorEvent::Synced))
            }
            ForRoot::Stored(step, shard, parameters) => {
                let sums = parameters.iter().map(|state| state_sum(state)).collect();
                self.chunks.insert((step, shard), parameters);
                self.tell_root(RootEvent::Keeper(KeeperEvent::Stored { step, shard, sums }))
            }
            ForRoot::Published(step) => {
                self.published = step;
                self.tell_root(RootEvent::Keeper(KeeperEvent::Published(step)))
            }
            ForRoot::Loaded(step, shard, to) => {
                let parameters = self.chunks[&(step, shard)].clone();
                self.tell_root(RootEvent::Keeper(KeeperEvent::Loaded { step, to, parameters }))
            }
        }
    }

    /// Something for the present life of the supervisor's process.
    pub(super) fn after_root(&mut self, micros: u64, event: ForRoot) {
        if let Some(life) = self.root.as_ref().map(|r| r.life) {
            self.after(micros, SimEvent::Root(life, event));
        }
    }

    pub(super) fn root_hears(&mut self, from: Life, control: Control) -> Result<(), Broken> {
        let Some(root) = &mut self.root else { return Ok(()) };
        let event = match control {
            Control::Join { info, .. } => {
                root.joining.insert(info.peer, from);
                SupervisorEvent::Join(info)
            }
            Control::Return { node, .. } => {
                root.lives.insert(node, from);
                SupervisorEvent::Return(node)
            }
            Control::Heartbeat { node, operations, rates, down } => {
                root.lives.insert(node, from);
                SupervisorEvent::Heartbeat { node, operations, rates, down }
            }
            Control::Leave { node } => SupervisorEvent::Leave(node),
            Control::ActorFailed { address, reason } => SupervisorEvent::ActorFailed { address, reason },
            _ => return Ok(()),
        };
        self.tell_root(RootEvent::Supervisor(event))
    }

    pub(super) fn tell_root(&mut self, event: RootEvent) -> Result<(), Broken> {
        let now = Duration::from_micros(self.now);
        let Some(root) = &mut self.root else { return Ok(()) };
        let effects = root.root.on(now, event);
        self.perform_root(effects)
    }

    pub(super) fn life_of_node(&mut self, node: NodeId) -> Option<Life> {
        let root = self.root.as_mut()?;
        if let Some(life) = root.lives.get(&node) {
            return Some(*life);
        }
        let peer = root.root.supervisor.table().nodes.get(&node)?.peer;
        let life = root.joining.remove(&peer).unwrap_or(peer);
        root.lives.insert(node, life);
        Some(life)
    }

    pub(super) fn perform_root(&mut self, effects: Vec<RootEffect>) -> Result<(), Broken> {
        for effect in effects {
            let Some(life) = self.root.as_ref().map(|r| r.life) else { return Ok(()) };
            match effect {
                RootEffect::Append(record) => {
                    self.unsynced.push(record);
                    let delay = 200 + self.draw(3000) + self.unsynced.len() as u64 * 4000;
                    self.after_root(delay, ForRoot::Synced);
                }
                RootEffect::Tell(node, control) => {
                    if let Some(peer) = self.life_of_node(node) {
                        self.transmit(life, peer, Unit::Control(control))?;
                    }
                }
                RootEffect::Transmit(node, bundle) => {
                    self.check_announced(&bundle)?;
                    if let Some(peer) = self.life_of_node(node) {
                        self.transmit(life, peer, Unit::Bundle(bundle))?;
                    }
                }
                RootEffect::Forget(nodes) => {
                    if let Some(root) = &mut self.root {
                        root.lives.retain(|node, _| !nodes.contains(node));
                    }
                }
                RootEffect::Report(report) => {
                    checks::in_order(&report, self.fingerprints.len() as Step)?;
                    if let Some(reference) = self.reference {
                        checks::same_bits(&report, reference)?;
                    }
                    self.note(format!("step {} {}", report.commit.commit.step, report.fingerprint));
                    self.fingerprints.push(report.fingerprint);
                }
                RootEffect::Note(happening) => {
                    if let Happening::RolledBack { to_step, .. } = happening {
                        self.announced = to_step;
                        self.rollbacks += 1;
                    }
                    self.note(format!("{happening:?}"));
                }
                RootEffect::Store { step, shard, mut parameters } => {
                    if std::mem::take(&mut self.flip_stored) {
                        self.flips += 1;
                        parameters[0][0] = crate::audit::wrong(&parameters[0][0]);
                    }
                    let delay = self.until_store() + 1000 + self.draw(20_000);
                    self.after_root(delay, ForRoot::Stored(step, shard, parameters));
                }
                RootEffect::Publish(step) => {
                    let stored = |shard: &u32| self.chunks.contains_key(&(step, *shard));
                    checks::complete(step, (0..self.materials.spec.shards).find(|shard| !stored(shard)))?;
                    let delay = self.until_store() + 500 + self.draw(5000);
                    self.after_root(delay, ForRoot::Published(step));
                }
                RootEffect::Load { step, shard, to } => {
                    let delay = self.until_store() + 500 + self.draw(10_000);
                    self.after_root(delay, ForRoot::Loaded(step, shard, to));
                }
                RootEffect::Finish(result) => self.finished = Some(result),
            }
        }
        Ok(())
    }

    /// Until the store works: what it fails to do is tried again.
    fn until_store(&self) -> u64 {
        self.store_fails.saturating_sub(self.now)
    }

    /// C2 at the moment when a commit leaves the supervisor.
    pub(super) fn check_announced(&mut self, bundle: &[Envelope]) -> Result<(), Broken> {
        for envelope in bundle {
            if let Body::Commit(commit) = &envelope.body {
                checks::durable(commit.step, &self.disk)?;
                self.announced = self.announced.max(commit.step);
            }
        }
        Ok(())
    }
}
