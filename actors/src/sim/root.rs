//! What the simulated world does for the supervisor's process: its disk, its clock, its words.

use super::contracts::{Broken, c1, c2, c3, c4, c5, c6};
use super::disk::Line;
use super::network::Life;
use super::plan::Fault;
use super::process::{SimRoot, is_over};
use super::world::{ForRoot, SimEvent, TICK, World};
use crate::control::Control;
use crate::fingerprint;
use crate::ids::{Address, NodeId, Step};
use crate::keeper::{KeeperCore, KeeperEvent};
use crate::message::{Body, Envelope};
use crate::root::{Root, RootEffect, RootEvent};
use crate::stored::state_of;
use crate::storing::{Failure, Newest, NoCheckpoint, Read, Write, newest};
use crate::supervisor::{Happening, Nodes, Record, Report, Supervisor, SupervisorEvent};
use crate::table::Table;
use crate::wire::Unit;
use everstep_checkpoint::{Place, Reader, Store, StoreError};
use everstep_kernels::state_sum;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

const JOB: &str = "sim";
/// Checkpoints that the store keeps.
const KEEP: usize = 2;
/// Microseconds until a store that failed is tried again.
const AGAIN: u64 = 100_000;

impl World {
    pub(super) fn start_root(&mut self) -> Result<(), Broken> {
        let spec = Arc::clone(&self.materials.spec);
        let life = self.new_life();
        // Made short in every other life: that changes nothing.
        self.disk.open(life.is_multiple_of(2)).map_err(|why| ("C2", why))?;
        let nodes = Nodes { wanted: self.wanted, spares: self.spares, relieve: false };
        let began_with = self.disk.records().to_vec();
        let reported = self.disk.reported_from(Record::reached(&began_with).unwrap_or(0));
        let (supervisor, first) = Supervisor::new(Arc::clone(&spec), nodes, &began_with, reported, Duration::ZERO);
        self.note(format!("the supervisor starts as life {life} with step {} committed", supervisor.committed()));
        // What is doubted is reported again.
        let sure = Record::doubted(&began_with).unwrap_or(Step::MAX);
        self.fingerprints =
            self.disk.reported_from(0).into_iter().filter(|(s, _)| *s <= sure).map(|(_, f)| f).collect();
        (self.table, self.stepped, self.commits) = (supervisor.table().clone(), false, false);
        self.copies = c2::Copies::new(supervisor.committed());
        // Of a job that was going back nobody holds the state: if its checkpoint turns out to be damaged it goes back further,
        // or ends (SU-8).
        let back = |r: &Record| if let Record::Epoch { table, .. } = r { Some(table.goes_back()) } else { None };
        if self.disk.records().iter().rev().find_map(back) == Some(true) {
            self.announced = self.announced.min(supervisor.table().base);
        } else {
            c2::remembered(self.announced, supervisor.committed())?;
        }
        let keeper = KeeperCore::new(spec, Arc::clone(&self.materials.layout));
        let (root, effects) = Root::new(supervisor, first, keeper);
        self.root = Some(SimRoot {
            life,
            root,
            store: None,
            began_with,
            writes: VecDeque::new(),
            paused: 0,
            effects_left: None,
            began: self.now + self.ahead,
            lives: BTreeMap::new(),
            joining: BTreeMap::new(),
        });
        self.after_root(TICK, ForRoot::Tick);
        // Most are read at once, some long after nodes have come back.
        let most = if self.draw(4) == 0 { 800_000 } else { 20_000 };
        let delay = self.until_written(most);
        self.after_root(delay, ForRoot::Open);
        self.perform_root(effects)
    }

    /// The store is opened, and its checkpoints are verified.
    fn open_store(&mut self) -> Result<(), Broken> {
        let opened = Store::open(Place::on(self.files.clone()), None, JOB, KEEP);
        let found = opened.map_err(NoCheckpoint::from).and_then(|store| {
            let log = self.root.as_ref().map_or(&[][..], |root| &root.began_with);
            Ok((newest(&store, &self.materials.spec, log)?, store))
        });
        if self.dies_in_write() {
            return Ok(());
        }
        let (Newest { step, wrong }, store) = match found {
            Ok(found) => found,
            Err(error) if error.is_out_of_reach() => {
                self.after_root(AGAIN, ForRoot::Open);
                return Ok(());
            }
            Err(error) => return Err(("C2", error.to_string())),
        };
        wrong.into_iter().for_each(|why| self.note(why));
        self.whole = step.as_ref().err().and_then(|_| self.whole_checkpoint());
        if let Some(root) = &mut self.root {
            (root.store, root.began_with) = (Some(store), Vec::new());
        }
        let reported = self.disk.reported_from(*step.as_ref().unwrap_or(&0));
        self.tell_root(RootEvent::Found { newest: step, reported })
    }

    /// Whether the supervisor's process died in a write of the store.
    fn dies_in_write(&mut self) -> bool {
        let died = self.files.died();
        if died {
            self.note("the supervisor dies in a write".to_owned());
            let met = self.kill_root();
            self.met(Fault::KillInWrite { changes: 0 }, met);
        }
        died
    }

    /// Gives whether there was one.
    pub(super) fn kill_root(&mut self) -> bool {
        let Some(root) = self.root.take() else { return false };
        self.network.end(root.life);
        self.stopped.remove(&root.life);
        self.disk.crash(&mut self.draws);
        let delay = 20_000 + self.draw(300_000);
        self.after(delay, SimEvent::StartRoot);
        true
    }

    pub(super) fn root_step(&mut self, event: ForRoot) -> Result<(), Broken> {
        match event {
            ForRoot::Tick => {
                self.after_root(TICK, ForRoot::Tick);
                self.tell_root(RootEvent::Supervisor(SupervisorEvent::Tick))
            }
            ForRoot::Open => self.open_store(),
            ForRoot::Written => {
                let (record, more) = self.disk.written();
                if more {
                    let delay = self.until_line();
                    self.after_root(delay, ForRoot::Written);
                }
                if record { self.tell_root(RootEvent::Supervisor(SupervisorEvent::Synced)) } else { Ok(()) }
            }
            ForRoot::Write => {
                let layout = Arc::clone(&self.materials.layout);
                let Some(root) = &mut self.root else { return Ok(()) };
                let Some(write) = root.writes.front() else { return Ok(()) };
                let Some(store) = &mut root.store else {
                    self.after_root(AGAIN, ForRoot::Write);
                    return Ok(());
                };
                let done = write.perform(store, &layout);
                if let Write::Store { step, .. } = write {
                    self.put.insert(*step);
                }
                if done.is_ok() {
                    root.writes.pop_front();
                }
                self.stored(done, Write::failure, ForRoot::Write)
            }
            ForRoot::Read(read) => {
                let layout = Arc::clone(&self.materials.layout);
                let Some(root) = &self.root else { return Ok(()) };
                let Some(store) = &root.store else { return Ok(()) };
                let done = read.perform(store.reader(), &layout);
                self.stored(done, Read::failure, ForRoot::Read(read))
            }
        }
    }

    /// What the store's threads do with what it said.
    fn stored(
        &mut self,
        done: Result<KeeperEvent, StoreError>,
        means: fn(&StoreError) -> Failure,
        again: ForRoot,
    ) -> Result<(), Broken> {
        if self.dies_in_write() {
            return Ok(());
        }
        let error = match done {
            Ok(event) => {
                if let KeeperEvent::Published(step) = event {
                    self.check_published(step)?;
                    if std::mem::take(&mut self.kill_all_stored) {
                        self.note("all die as a checkpoint is made".to_owned());
                        self.kill_all();
                        self.met(Fault::KillAllAtCheckpoint, true);
                        return Ok(());
                    }
                }
                if matches!(again, ForRoot::Write) && self.root.as_ref().is_some_and(|r| !r.writes.is_empty()) {
                    let delay = self.until_written(20_000);
                    self.after_root(delay, ForRoot::Write);
                }
                return self.tell_root(RootEvent::Keeper(event));
            }
            Err(error) => error,
        };
        match means(&error) {
            Failure::Again => self.after_root(AGAIN, again),
            Failure::Damaged => {
                self.note(format!("the supervisor ends: {error}"));
                self.kill_root();
            }
            Failure::Lasting => return Err(("C2", error.to_string())),
        }
        Ok(())
    }

    /// A checkpoint exists: C2, read by somebody else. Then a bit of the store may flip.
    fn check_published(&mut self, step: Step) -> Result<(), Broken> {
        if let Some(reference) = self.reference.filter(|_| !self.spoilt.contains(&step)) {
            c2::stored(step, self.read_back(step), reference)?;
        }
        // One alone: of two that were damaged nothing might be left.
        let flips = std::mem::take(&mut self.flip_file) && !self.file_flipped;
        if let Some(name) = flips.then(|| self.files.flip(&mut self.draws)).flatten() {
            self.file_flipped = true;
            self.met(Fault::FlipFile, true);
            self.spoilt = self.put.clone();
            self.note(format!("a bit of {name} flips"));
            // Nobody would see it if the job did not go back.
            let (delay, choice) = (self.draw(300_000), self.draw(1 << 20) as u32);
            self.after(delay, SimEvent::Fault(Fault::Flip { choice }));
        }
        Ok(())
    }

    /// The fingerprint of a checkpoint, as somebody else reads it.
    fn read_back(&self, step: Step) -> Result<String, String> {
        let layout = &self.materials.layout;
        let trouble = self.files.set(None);
        let reader = Reader::new(Place::on(self.files.clone()), JOB);
        let names: Vec<_> = layout.parameters.iter().map(|p| (p.name.to_string(), p.rows, p.columns)).collect();
        let read = reader.read(step, &names).map_err(|error| error.to_string()).map(|tensors| {
            let sum = |(n, tensor)| (n as u32, state_sum(&state_of(tensor)));
            fingerprint::root(layout, &tensors.into_iter().enumerate().map(sum).collect())
        });
        self.files.set(trouble);
        read
    }

    /// The newest checkpoint that can be read, if there is one.
    pub(super) fn whole_checkpoint(&self) -> Option<Step> {
        let trouble = self.files.set(None);
        let steps = Reader::new(Place::on(self.files.clone()), JOB).steps().unwrap_or_default();
        self.files.set(trouble);
        steps.into_iter().rev().find(|step| self.read_back(*step).is_ok())
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
            Control::ActorFailed { address, reason } => {
                self.failed.insert(address);
                SupervisorEvent::ActorFailed { address, reason }
            }
            _ => return Ok(()),
        };
        self.tell_root(RootEvent::Supervisor(event))
    }

    pub(super) fn tell_root(&mut self, event: RootEvent) -> Result<(), Broken> {
        let Some(root) = &mut self.root else { return Ok(()) };
        // Its clock begins with it.
        let now = Duration::from_micros(self.now + self.ahead - root.began);
        let stale = match &event {
            RootEvent::Arrived(bundle) => c4::stale(bundle, root.root.router().table()),
            RootEvent::Supervisor(_) | RootEvent::Keeper(_) | RootEvent::Found { .. } => 0,
        };
        let before = root.root.router().refused();
        let effects = root.root.on(now, event);
        c4::refused(stale, root.root.router().refused() - before)?;
        let held = root.root.router().held();
        self.bounded("messages that wait for an epoch", held, c5::EARLY)?;
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
            let Some(root) = &mut self.root else { return Ok(()) };
            let life = root.life;
            if is_over(&mut root.effects_left) {
                self.note("the supervisor dies between two effects".to_owned());
                let met = self.kill_root();
                self.met(Fault::KillSupervisorAtEffect { effects: 0 }, met);
                return Ok(());
            }
            match effect {
                RootEffect::Append(record) => self.append(record)?,
                RootEffect::Tell(node, control) => {
                    if let Some(peer) = self.life_of_node(node) {
                        self.transmit(life, peer, Unit::Control(control))?;
                    }
                }
                RootEffect::TellAll(nodes, control) => {
                    for peer in nodes.into_iter().filter_map(|node| self.life_of_node(node)).collect::<Vec<_>>() {
                        self.transmit(life, peer, Unit::Control(control.clone()))?;
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
                RootEffect::Report(report) => self.reported(report)?,
                RootEffect::Note(happening) => {
                    self.rollbacks += usize::from(matches!(happening, Happening::RolledBack { .. }));
                    if let Happening::CheckpointStored { step } = happening {
                        self.told = self.told.max(step);
                    }
                    self.note(format!("{happening:?}"));
                }
                RootEffect::Write(mut write) => {
                    if let Write::Store { parameters, .. } = &mut write
                        && std::mem::take(&mut self.flip_stored)
                    {
                        self.flips += 1;
                        self.met(Fault::FlipStored, true);
                        parameters[0][0] = crate::audit::wrong(&parameters[0][0]);
                    }
                    let Some(root) = &mut self.root else { return Ok(()) };
                    root.writes.push_back(write);
                    let waiting = root.writes.len();
                    self.bounded("what waits for the store", waiting, c5::WRITES)?;
                    if waiting == 1 {
                        let delay = self.until_written(20_000);
                        self.after_root(delay, ForRoot::Write);
                    }
                }
                RootEffect::Read(read) => {
                    let delay = self.until_written(10_000);
                    self.after_root(delay, ForRoot::Read(read));
                }
                RootEffect::Finish(result) => self.finished = Some(result),
            }
        }
        Ok(())
    }

    fn reported(&mut self, report: Report) -> Result<(), Broken> {
        let step = report.commit.commit.step;
        c3::in_order(step, self.fingerprints.len() as Step)?;
        c3::all_samples(step, report.commit.samples, &self.materials.spec)?;
        if let Some(reference) = self.reference {
            c1::same_bits(step, &report.fingerprint, reference)?;
        }
        self.note(format!("step {step} {}", report.fingerprint));
        self.fingerprints.push(report.fingerprint.clone());
        self.write(Line::Metrics(step, report.fingerprint))
    }

    fn append(&mut self, record: Record) -> Result<(), Broken> {
        let with_commit = std::mem::replace(&mut self.commits, matches!(record, Record::Commit(_)));
        match &record {
            // They are reported again.
            Record::Doubt(after) => {
                self.fingerprints.truncate(*after as usize);
                self.announced = self.announced.min(*after);
            }
            Record::Audit { .. } | Record::Back(_) => {}
            Record::Epoch { table, .. } => self.epoch(table, with_commit)?,
            Record::Commit(record) => {
                self.copies.committed(record.commit.step, record.copies, &self.table)?;
                c2::thick(record.commit.step, record.copies, &self.materials.spec)?;
                self.stepped = true;
            }
        }
        self.write(Line::Record(record))
    }

    /// Whether its record follows that of a commit is told too.
    fn epoch(&mut self, table: &Table, with_commit: bool) -> Result<(), Broken> {
        let before = std::mem::replace(&mut self.table, table.clone());
        self.stepped = false;
        if table.goes_back() {
            // Bits that flipped send a job back whatever its copies hold.
            if self.flips == 0 {
                self.copies.lost(&before, |copy| self.lives_on(copy, &before))?;
            }
            if !self.file_flipped {
                c2::newest(table.base, self.told)?;
            }
            self.announced = self.announced.min(table.base);
            self.copies.went_back(table.base);
        } else if !before.goes_back() && self.materials.spec.audit == 0 {
            // An audit gives lives to those who have not failed.
            c6::local(&before, table, &self.failed, with_commit)?;
        }
        Ok(())
    }

    /// Whether a copy of the last epoch lives, on a node that is in the next one too.
    fn lives_on(&self, copy: Address, before: &Table) -> bool {
        let node = before.node_of(copy.actor).and_then(|node| self.table.nodes.get(&node));
        let process = node.and_then(|info| self.nodes.iter().flatten().find(|node| node.life == info.peer));
        process.and_then(|node| node.actors.get(&copy.actor)).is_some_and(|actor| actor.incarnation == copy.incarnation)
    }

    fn write(&mut self, line: Line) -> Result<(), Broken> {
        let waiting = self.disk.write(line);
        if waiting == 1 {
            let delay = self.until_line();
            self.after_root(delay, ForRoot::Written);
        }
        self.bounded("lines that wait for the disk", waiting, c5::LINES)
    }

    fn until_line(&mut self) -> u64 {
        let most = if self.kill_all_stored { 100_000 } else { 3000 };
        self.until_written(most)
    }

    /// Until the disk has done something.
    fn until_written(&mut self, most: u64) -> u64 {
        let times = if self.slow_disk.1 > self.now { self.slow_disk.0 } else { 1 };
        times * (200 + self.draw(most))
    }

    /// C2 at the moment when a commit leaves the supervisor.
    pub(super) fn check_announced(&mut self, bundle: &[Envelope]) -> Result<(), Broken> {
        for envelope in bundle {
            if let Body::Commit(commit) = &envelope.body {
                c2::durable(commit.step, self.disk.records())?;
                self.announced = self.announced.max(commit.step);
            }
        }
        Ok(())
    }
}
