//! The simulated world: a queue of events in order of time, and what each does.

use super::contracts::c2::{self, Copies};
use super::contracts::{Broken, c3, c5};
use super::coverage::{Coverage, State};
use super::disk::Disk;
use super::draws::Draws;
use super::files::Files;
use super::log::Log;
use super::network::{Flight, Life, Network};
use super::plan::Fault;
use super::process::{Cell, SimNode, SimRoot};
use super::{Summary, Violation};
use crate::compute::{Outcome, words_of_panic};
use crate::data::Corpus;
use crate::effect::Event;
use crate::ids::{ActorId, Address, NodeId, Step};
use crate::root::RootEvent;
use crate::spec::{JobSpec, Layout};
use crate::storing::Read;
use crate::supervisor::{Nodes, SupervisorEvent};
use crate::table::Table;
use crate::tokens::Tokens;
use crate::worker::Materials;
use everstep_kernels::Philox;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Microseconds after which a job that has not finished is stuck. Faults end long before.
const HORIZON: u64 = 60_000_000;
pub(super) const HEARTBEAT: u64 = 50_000;
pub(super) const TICK: u64 = 50_000;

#[derive(Debug)]
pub(super) enum SimEvent {
    Arrive(Flight),
    LinkUp(Life, Life),
    /// What one sent to the other did not come for a while, on that link.
    Silent {
        from: Life,
        to: Life,
        link: u64,
    },
    /// Something waited for a message from one to the other: whether it kills.
    Ambush {
        from: Life,
        to: Life,
        kind: &'static str,
        kill: bool,
    },
    Wake(Life, ActorId, Cell),
    Computed(Life, ActorId, Cell, Box<Outcome>),
    Heartbeat(Life),
    Root(Life, ForRoot),
    Lost(NodeId),
    Start(usize),
    StartRoot,
    Resume(Life),
    /// The store works again.
    StoreHeals,
    Fault(Fault),
}

/// What reaches the supervisor's process from its own clock and disk.
#[derive(Debug)]
pub(super) enum ForRoot {
    Tick,
    /// The store is opened.
    Open,
    /// A line is on disk.
    Written,
    /// It is the turn of the first that the store is to be given.
    Write,
    Read(Read),
}

/// See the module.
pub(super) struct World {
    pub(super) seed: u64,
    pub(super) draws: Draws,
    pub(super) now: u64,
    pub(super) order: u64,
    pub(super) queue: BinaryHeap<Reverse<(u64, u64)>>,
    pub(super) events: BTreeMap<u64, SimEvent>,
    pub(super) materials: Materials,
    /// Processes of nodes: those that the job wants, spares, and those that came later.
    pub(super) slots: usize,
    /// Every other node is in the same rack.
    pub(super) racks: bool,
    pub(super) wanted: usize,
    pub(super) spares: usize,
    pub(super) nodes: Vec<Option<SimNode>>,
    pub(super) root: Option<SimRoot>,
    pub(super) network: Network,
    pub(super) next_life: Life,
    /// Actors that were spawned.
    pub(super) spawned: Cell,
    pub(super) disk: Disk,
    pub(super) files: Files,
    /// The disk takes so many times as long until then.
    pub(super) slow_disk: (u64, u64),
    /// All are to die as soon as the next checkpoint exists.
    pub(super) kill_all_stored: bool,
    /// A bit of a file is to flip when the next checkpoint exists.
    pub(super) flip_file: bool,
    /// Steps of which something had been stored when a bit of a file flipped: it may be in them.
    pub(super) spoilt: BTreeSet<Step>,
    /// Steps of which something has been stored.
    pub(super) put: BTreeSet<Step>,
    /// The newest checkpoint that the job was told of.
    pub(super) told: Step,
    /// The newest checkpoint that was whole when the store was opened and none was found. One that becomes whole again, as its chunks are written
    /// again, is found by whoever resumes the job.
    pub(super) whole: Option<Step>,
    /// A bit of a file flipped: perhaps no checkpoint can be read.
    pub(super) file_flipped: bool,
    /// Microseconds by which the supervisor's clock is ahead.
    pub(super) ahead: u64,
    pub(super) reference: Option<&'static [String]>,
    pub(super) fingerprints: Vec<String>,
    pub(super) announced: Step,
    /// The newest epoch that the supervisor decided on, and whether a step was committed since.
    pub(super) table: Table,
    pub(super) stepped: bool,
    pub(super) copies: Copies,
    /// Lives that the supervisor was told have failed.
    pub(super) failed: BTreeSet<Address>,
    /// The newest record is that of a commit.
    pub(super) commits: bool,
    pub(super) coverage: Coverage,
    /// The kind of message that something waits for: its link is to break, or its receiver is to be killed.
    pub(super) ambush: Option<(&'static str, bool)>,
    /// The next snapshot is to be stored with another bit.
    pub(super) flip_stored: bool,
    pub(super) rollbacks: usize,
    pub(super) recipes: u64,
    /// Bits that flipped.
    pub(super) flips: usize,
    pub(super) finished: Option<Result<(), String>>,
    pub(super) log: Log,
    pub(super) count: u64,
    /// Events for processes that are stopped.
    pub(super) stopped: BTreeMap<Life, Vec<SimEvent>>,
}

impl World {
    pub(super) fn new(
        seed: u64,
        spec: JobSpec,
        nodes: Nodes,
        faults: Vec<(u64, Fault)>,
        reference: Option<&'static [String]>,
    ) -> Self {
        let text = Philox::new(4, 77, 0);
        let bytes: Vec<u8> =
            (0..400u64).map(|i| (text.words(i)[0] % 4 + if i % 3 == 0 { 0 } else { 4 }) as u8).collect();
        let corpus = Corpus::new(vec![Tokens::new(Arc::new(bytes), 1)], &spec).expect("the text is long enough");
        let spec = Arc::new(spec);
        let materials = Materials { layout: Layout::new(&spec), spec, corpus };
        let slots = nodes.wanted + nodes.spares;
        let mut world = Self {
            seed,
            draws: Draws::new(seed, 78),
            now: 0,
            order: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            materials,
            slots,
            racks: super::is_racked(seed),
            wanted: nodes.wanted,
            spares: nodes.spares,
            nodes: (0..slots).map(|_| None).collect(),
            root: None,
            network: Network::default(),
            next_life: 1,
            spawned: 0,
            disk: Disk::default(),
            files: Files::default(),
            slow_disk: (1, 0),
            spoilt: BTreeSet::new(),
            put: BTreeSet::new(),
            told: 0,
            kill_all_stored: false,
            flip_file: false,
            whole: None,
            file_flipped: false,
            ahead: 0,
            reference,
            fingerprints: Vec::new(),
            announced: 0,
            table: Table::default(),
            stepped: false,
            copies: Copies::default(),
            failed: BTreeSet::new(),
            commits: false,
            coverage: Coverage::default(),
            ambush: None,
            flip_stored: false,
            rollbacks: 0,
            recipes: 0,
            flips: 0,
            finished: None,
            log: Log::default(),
            count: 0,
            stopped: BTreeMap::new(),
        };
        world.after(0, SimEvent::StartRoot);
        for slot in 0..slots {
            world.after(1000 + slot as u64, SimEvent::Start(slot));
        }
        for (at, fault) in faults {
            world.after(at, SimEvent::Fault(fault));
        }
        world
    }

    pub(super) fn draw(&mut self, below: u64) -> u64 {
        self.draws.below(below)
    }

    pub(super) fn after(&mut self, micros: u64, event: SimEvent) {
        self.order += 1;
        self.queue.push(Reverse((self.now + micros, self.order)));
        self.events.insert(self.order, event);
    }

    pub(super) fn note(&mut self, text: String) {
        self.log.note(self.now, &text);
    }

    /// A queue has become so long.
    pub(super) fn bounded(&mut self, what: &'static str, length: usize, bound: usize) -> Result<(), Broken> {
        self.coverage.length(what, length);
        c5::bounded(what, length, bound)
    }

    /// What the job is doing.
    pub(super) fn state(&self) -> State {
        match (&self.root, self.table.goes_back(), self.stepped) {
            (None, ..) => State::Headless,
            (Some(_), true, _) => State::Stateless,
            (Some(_), false, false) => State::Recovering,
            (Some(_), false, true) => State::Stepping,
        }
    }

    pub(super) fn violation(&self, broken: Broken) -> Violation {
        Violation {
            seed: self.seed,
            plant: None,
            only: None,
            faults: Box::default(),
            contract: broken.0,
            what: broken.1,
            trail: self.log.trail(),
        }
    }

    /// Runs until the job is over. A panic of a core or a kernel is a violation too.
    pub(super) fn run(&mut self) -> Result<Summary, Violation> {
        let run = AssertUnwindSafe(|| self.run_events());
        match catch_unwind(run) {
            Ok(result) => result,
            Err(panic) => Err(self.violation(("no panic", words_of_panic(&*panic)))),
        }
    }

    fn run_events(&mut self) -> Result<Summary, Violation> {
        while let Some(Reverse((at, number))) = self.queue.pop() {
            self.now = at;
            self.count += 1;
            if self.now > HORIZON {
                break;
            }
            let event = self.events.remove(&number).expect("a queued event");
            self.log.event(at, number, &event);
            self.step(event).map_err(|broken| self.violation(broken))?;
            match self.finished.take() {
                None => {}
                Some(Ok(())) => {
                    let (reported, steps) = (self.fingerprints.len() as Step, self.materials.spec.steps);
                    c3::all_reported(reported, steps).map_err(|broken| self.violation(broken))?;
                    return Ok(self.summary());
                }
                // Nobody holds the state, and no checkpoint is whole: nothing is left that could go on (SU-8).
                Some(Err(why)) if self.file_flipped && why.starts_with("no checkpoint can be read") => {
                    let table = self.root.as_ref().map(|r| r.root.supervisor.table().clone()).unwrap_or_default();
                    c2::nothing_left(&table, self.whole).map_err(|broken| self.violation(broken))?;
                    self.coverage.nothing_left += 1;
                    return Ok(self.summary());
                }
                Some(Err(why)) => return Err(self.violation(("progress", format!("the job ended: {why}")))),
            }
        }
        let mut state = self.root.as_ref().map_or("no supervisor".to_owned(), |r| r.root.supervisor.describe());
        for node in self.nodes.iter().flatten() {
            let _ = write!(state, "\n    {:?}, {} held:", node.router.node(), node.router.held());
            for (actor, a) in &node.actors {
                let _ = write!(state, "\n      {actor}#{}: {}", a.incarnation.0, a.core.describe());
            }
        }
        Err(self.violation(("progress", format!("the job is stuck: {state}"))))
    }

    fn summary(&self) -> Summary {
        let mut coverage = self.coverage.clone();
        coverage.late += self.events.values().filter(|event| matches!(event, SimEvent::Fault(_))).count() as u64;
        Summary {
            log: self.log.hash(),
            coverage,
            events: self.count,
            milliseconds: self.now / 1000,
            rollbacks: self.rollbacks,
            recipes: self.recipes,
        }
    }

    pub(super) fn fingerprints(&self) -> Vec<String> {
        self.fingerprints.clone()
    }

    pub(super) fn node_of_life(&mut self, life: Life) -> Option<&mut SimNode> {
        self.nodes.iter_mut().flatten().find(|n| n.life == life)
    }

    pub(super) fn alive(&self, life: Life) -> bool {
        self.nodes.iter().flatten().any(|n| n.life == life) || self.root.as_ref().is_some_and(|r| r.life == life)
    }

    /// A stopped process sees nothing until it goes on, and then first what came meanwhile.
    pub(super) fn hold_if_stopped(&mut self, life: Life, event: SimEvent) -> Option<SimEvent> {
        let now = self.now;
        let root = self.root.as_ref().is_some_and(|r| r.life == life && r.paused > now);
        let waits = self.stopped.contains_key(&life);
        if waits || root || self.node_of_life(life).is_some_and(|n| n.paused > now) {
            self.stopped.entry(life).or_default().push(event);
            return None;
        }
        Some(event)
    }

    pub(super) fn step(&mut self, event: SimEvent) -> Result<(), Broken> {
        let whose = match &event {
            SimEvent::Arrive(f) => Some(f.to),
            SimEvent::Wake(life, ..)
            | SimEvent::Computed(life, ..)
            | SimEvent::Heartbeat(life)
            | SimEvent::Root(life, _) => Some(*life),
            _ => None,
        };
        let event = match whose {
            Some(life) => match self.hold_if_stopped(life, event) {
                Some(event) => event,
                None => return Ok(()),
            },
            None => event,
        };
        match event {
            SimEvent::Arrive(flight) => self.arrive(flight),
            SimEvent::LinkUp(a, b) => self.link_up(a, b),
            SimEvent::Ambush { from, to, kind, kill } => {
                self.spring(from, to, kind, kill);
                Ok(())
            }
            SimEvent::Silent { from, to, link } => {
                self.silent(from, to, link);
                Ok(())
            }
            SimEvent::Wake(life, actor, cell) => self.wake(life, actor, cell),
            SimEvent::Computed(life, actor, cell, outcome) => {
                self.deliver(life, actor, Some(cell), Event::Computed(*outcome));
                Ok(())
            }
            SimEvent::Heartbeat(life) => self.heartbeat(life),
            SimEvent::Root(life, event) => {
                // What another life asked for is not reported to this one.
                if self.root.as_ref().is_some_and(|r| r.life == life) { self.root_step(event) } else { Ok(()) }
            }
            SimEvent::Lost(node) => {
                if self.root.is_some() {
                    let why = "its process ended".to_owned();
                    self.tell_root(RootEvent::Supervisor(SupervisorEvent::Lost { node, why }))?;
                }
                Ok(())
            }
            SimEvent::Start(slot) => {
                self.start_node(slot);
                Ok(())
            }
            SimEvent::StartRoot => self.start_root(),
            SimEvent::Resume(life) => {
                let held = self.stopped.remove(&life).unwrap_or_default();
                held.into_iter().try_for_each(|event| self.step(event))
            }
            SimEvent::StoreHeals => {
                self.files.set(None);
                Ok(())
            }
            SimEvent::Fault(fault) => self.fault(fault),
        }
    }
}
