//! The simulated world: a queue of events in order of time, and what each does.

use super::checks::{self, Broken};
use super::network::{Flight, Life, Network};
use super::process::{SimActor, SimNode, SimRoot};
use super::{Summary, Violation};
use crate::compute::{Job, Outcome, run};
use crate::control::Control;
use crate::data::Corpus;
use crate::effect::{Effect, Event};
use crate::ids::{ActorId, Address, Incarnation, NodeId, Step};
use crate::keeper::{KeeperCore, KeeperEvent};
use crate::message::{Local, ParameterState};
use crate::plant::Bug;
use crate::root::{Root, RootEffect, RootEvent};
use crate::router::{Action, Router};
use crate::spec::{JobSpec, Layout};
use crate::supervisor::{Happening, Record, Supervisor, SupervisorEvent};
use crate::table::NodeInfo;
use crate::wire::Unit;
use crate::worker::Materials;
use everstep_kernels::{CpuBackend, Philox, Tensor};
use everstep_transport::{Frame, Session, SessionEffect};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

/// Microseconds after which a job that has not finished is stuck. Faults end long before.
const HORIZON: u64 = 60_000_000;
/// Faults happen until then.
const FAULTS_UNTIL: u64 = 2_500_000;
const HEARTBEAT: u64 = 100_000;
const TICK: u64 = 50_000;
const TRAIL: usize = 60;

/// Which faults a world has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Faults {
    None,
    Random,
}

/// What can go wrong.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// A node's process is killed; whether the supervisor is told at once.
    Kill {
        slot: usize,
        seen: bool,
    },
    /// Two at once.
    KillTwo {
        first: usize,
        second: usize,
    },
    KillSupervisor,
    KillAll,
    /// A node stops for so long.
    Pause {
        slot: usize,
        micros: u64,
    },
    /// All links of a node break; they come back.
    BreakLinks {
        slot: usize,
    },
    /// An actor of a node panics.
    Panic {
        slot: usize,
        choice: u32,
    },
}

#[derive(Debug)]
enum SimEvent {
    Arrive(Flight),
    LinkUp(Life, Life),
    Wake(Life, ActorId, Incarnation),
    Computed(Life, ActorId, Incarnation, Box<Outcome>),
    Heartbeat(Life),
    Tick(Life),
    Synced(Life),
    Stored(Life, Step, u32, Vec<ParameterState<Tensor>>),
    Published(Life, Step),
    Loaded(Life, Step, u32, ActorId),
    Lost(NodeId),
    Start(usize),
    StartRoot,
    Resume(Life),
    Fault(Fault),
}

/// See the module.
pub(super) struct World {
    seed: u64,
    random: Philox,
    drawn: u64,
    now: u64,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, SimEvent>,
    materials: Materials,
    wanted: usize,
    nodes: Vec<Option<SimNode>>,
    root: Option<SimRoot>,
    network: Network,
    next_life: Life,
    /// Records that are synced, and those that a crash may take.
    disk: Vec<Record>,
    unsynced: Vec<Record>,
    chunks: BTreeMap<(Step, u32), Vec<ParameterState<Tensor>>>,
    published: Step,
    reference: Option<&'static [String]>,
    fingerprints: Vec<String>,
    announced: Step,
    faults: usize,
    rollbacks: usize,
    finished: Option<Result<(), String>>,
    trail: VecDeque<String>,
    hasher: blake3::Hasher,
    count: u64,
    /// Events for processes that are stopped.
    stopped: BTreeMap<Life, Vec<SimEvent>>,
}

impl World {
    pub(super) fn new(
        seed: u64,
        spec: JobSpec,
        wanted: usize,
        faults: Faults,
        plant: Option<Bug>,
        reference: Option<&'static [String]>,
    ) -> Self {
        let text = Philox::new(4, 77, 0);
        let bytes = (0..400u64).map(|i| (text.words(i)[0] % 4 + if i % 3 == 0 { 0 } else { 4 }) as u8).collect();
        let corpus = Corpus::new(Arc::new(bytes), &spec).expect("the text is long enough");
        let spec = Arc::new(spec);
        let materials = Materials { layout: Layout::new(&spec), spec, corpus, plant };
        let mut world = Self {
            seed,
            random: Philox::new(seed, 78, 0),
            drawn: 0,
            now: 0,
            order: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            materials,
            wanted,
            nodes: (0..wanted).map(|_| None).collect(),
            root: None,
            network: Network::default(),
            next_life: 1,
            disk: Vec::new(),
            unsynced: Vec::new(),
            chunks: BTreeMap::new(),
            published: 0,
            reference,
            fingerprints: Vec::new(),
            announced: 0,
            faults: 0,
            rollbacks: 0,
            finished: None,
            trail: VecDeque::new(),
            hasher: blake3::Hasher::new(),
            count: 0,
            stopped: BTreeMap::new(),
        };
        world.after(0, SimEvent::StartRoot);
        for slot in 0..wanted {
            world.after(1000 + slot as u64, SimEvent::Start(slot));
        }
        if faults == Faults::Random {
            world.plan_faults();
        }
        world
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.drawn += 1;
        let words = self.random.words(self.drawn);
        (u64::from(words[0]) << 32 | u64::from(words[1])) % below
    }

    fn plan_faults(&mut self) {
        for _ in 0..1 + self.draw(5) {
            let at = self.draw(FAULTS_UNTIL / 10) * 10u64.pow(self.draw(2) as u32);
            let slot = self.draw(self.wanted as u64) as usize;
            let fault = match self.draw(16) {
                0..=2 => Fault::Kill { slot, seen: true },
                3 => Fault::Kill { slot, seen: false },
                4 => Fault::KillTwo { first: slot, second: self.draw(self.wanted as u64) as usize },
                5..=6 => Fault::KillSupervisor,
                7 => Fault::KillAll,
                8 => Fault::Pause { slot, micros: 10_000 + self.draw(4_000_000) },
                9..=12 => Fault::BreakLinks { slot },
                _ => Fault::Panic { slot, choice: self.draw(1 << 20) as u32 },
            };
            self.after(at, SimEvent::Fault(fault));
        }
    }

    fn after(&mut self, micros: u64, event: SimEvent) {
        self.order += 1;
        self.queue.push(Reverse((self.now + micros, self.order)));
        self.events.insert(self.order, event);
    }

    fn note(&mut self, text: String) {
        self.hasher.update(text.as_bytes());
        if self.trail.len() == TRAIL {
            self.trail.pop_front();
        }
        self.trail.push_back(format!("{:>10} us  {text}", self.now));
    }

    fn violation(&self, broken: Broken) -> Violation {
        Violation { seed: self.seed, contract: broken.0, what: broken.1, trail: self.trail.iter().cloned().collect() }
    }

    /// Runs until the job is over.
    pub(super) fn run(&mut self) -> Result<Summary, Violation> {
        while let Some(Reverse((at, number))) = self.queue.pop() {
            self.now = at;
            self.count += 1;
            if self.now > HORIZON {
                break;
            }
            let event = self.events.remove(&number).expect("a queued event");
            self.step(event).map_err(|broken| self.violation(broken))?;
            match self.finished.take() {
                None => {}
                Some(Ok(())) => return self.summary(),
                Some(Err(why)) => return Err(self.violation(("C3", format!("the job ended: {why}")))),
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

    fn summary(&self) -> Result<Summary, Violation> {
        let steps = self.materials.spec.steps as usize;
        if self.fingerprints.len() != steps {
            let what = format!("{} of {steps} steps were reported", self.fingerprints.len());
            return Err(self.violation(("C3", what)));
        }
        Ok(Summary {
            log: self.hasher.finalize().to_hex().to_string(),
            faults: self.faults,
            events: self.count,
            milliseconds: self.now / 1000,
            rollbacks: self.rollbacks,
        })
    }

    pub(super) fn fingerprints(&self) -> Vec<String> {
        self.fingerprints.clone()
    }

    fn node_of_life(&mut self, life: Life) -> Option<&mut SimNode> {
        self.nodes.iter_mut().flatten().find(|n| n.life == life)
    }

    fn alive(&self, life: Life) -> bool {
        self.nodes.iter().flatten().any(|n| n.life == life) || self.root.as_ref().is_some_and(|r| r.life == life)
    }

    /// A stopped process sees nothing until it goes on.
    fn hold_if_stopped(&mut self, life: Life, event: SimEvent) -> Option<SimEvent> {
        let now = self.now;
        if self.node_of_life(life).is_some_and(|n| n.paused > now) {
            self.stopped.entry(life).or_default().push(event);
            return None;
        }
        Some(event)
    }

    fn step(&mut self, event: SimEvent) -> Result<(), Broken> {
        let whose = match &event {
            SimEvent::Arrive(f) => Some(f.to),
            SimEvent::Wake(life, ..) | SimEvent::Computed(life, ..) | SimEvent::Heartbeat(life) => Some(*life),
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
            SimEvent::Wake(life, actor, incarnation) => self.wake(life, actor, incarnation),
            SimEvent::Computed(life, actor, incarnation, outcome) => {
                self.deliver(life, actor, Some(incarnation), Event::Computed(*outcome));
                Ok(())
            }
            SimEvent::Heartbeat(life) => self.heartbeat(life),
            SimEvent::Tick(life) => {
                if self.root.as_ref().is_some_and(|r| r.life == life) {
                    self.after(TICK, SimEvent::Tick(life));
                    self.tell_root(RootEvent::Supervisor(SupervisorEvent::Tick))?;
                }
                Ok(())
            }
            SimEvent::Synced(life) => {
                if self.root.as_ref().is_some_and(|r| r.life == life) {
                    let record = self.unsynced.remove(0);
                    self.disk.push(record);
                    self.tell_root(RootEvent::Supervisor(SupervisorEvent::Synced))?;
                }
                Ok(())
            }
            SimEvent::Stored(life, step, shard, parameters) => {
                if self.root.as_ref().is_some_and(|r| r.life == life) {
                    self.chunks.insert((step, shard), parameters);
                    self.tell_root(RootEvent::Keeper(KeeperEvent::Stored { step, shard }))?;
                }
                Ok(())
            }
            SimEvent::Published(life, step) => {
                if self.root.as_ref().is_some_and(|r| r.life == life) {
                    self.published = step;
                    self.tell_root(RootEvent::Keeper(KeeperEvent::Published(step)))?;
                }
                Ok(())
            }
            SimEvent::Loaded(life, step, shard, to) => {
                if self.root.as_ref().is_some_and(|r| r.life == life) {
                    let parameters = self.chunks[&(step, shard)].clone();
                    self.tell_root(RootEvent::Keeper(KeeperEvent::Loaded { step, to, parameters }))?;
                }
                Ok(())
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
                for event in self.stopped.remove(&life).unwrap_or_default() {
                    self.after(1, event);
                }
                Ok(())
            }
            SimEvent::Fault(fault) => self.fault(fault),
        }
    }

    // ---- processes ----

    fn new_life(&mut self) -> Life {
        self.next_life += 1;
        self.next_life
    }

    fn start_node(&mut self, slot: usize) {
        let life = self.new_life();
        self.note(format!("slot {slot} starts as life {life}"));
        self.nodes[slot] = Some(SimNode {
            life,
            router: Router::new(self.materials.plant),
            actors: BTreeMap::new(),
            paused: 0,
            work: 0,
            supervisor: None,
        });
        self.after(1, SimEvent::Heartbeat(life));
    }

    fn start_root(&mut self) -> Result<(), Broken> {
        let life = self.new_life();
        let reported = self.fingerprints.iter().enumerate().map(|(i, f)| (i as Step + 1, f.clone())).collect();
        let now = Duration::from_micros(self.now);
        let spec = Arc::clone(&self.materials.spec);
        let plant = self.materials.plant;
        let (supervisor, first) = Supervisor::new(spec, self.wanted, &self.disk, self.published, reported, now, plant);
        self.note(format!("the supervisor starts as life {life} with step {} committed", supervisor.committed()));
        if supervisor.committed() < self.announced {
            let what =
                format!("step {} was announced, the next supervisor knows {}", self.announced, supervisor.committed());
            return Err(("C2", what));
        }
        let keeper = KeeperCore::new(self.materials.spec.shards, self.published);
        let (root, effects) = Root::new(supervisor, first, keeper, plant);
        self.root = Some(SimRoot { life, root, lives: BTreeMap::new(), joining: BTreeMap::new(), paused: 0 });
        self.after(TICK, SimEvent::Tick(life));
        self.perform_root(effects)
    }

    fn kill_node(&mut self, slot: usize, seen: bool) {
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

    fn kill_root(&mut self) {
        let Some(root) = self.root.take() else { return };
        self.network.end(root.life);
        // A crash keeps some of what was not synced, in order.
        let kept = self.draw(self.unsynced.len() as u64 + 1) as usize;
        self.disk.extend(self.unsynced.drain(..).take(kept).collect::<Vec<_>>());
        let delay = 20_000 + self.draw(300_000);
        self.after(delay, SimEvent::StartRoot);
    }

    fn fault(&mut self, fault: Fault) -> Result<(), Broken> {
        self.faults += 1;
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
                (0..self.wanted).for_each(|slot| self.kill_node(slot, false));
            }
            Fault::Pause { slot, micros } => {
                let until = self.now + micros;
                if let Some(node) = &mut self.nodes[slot] {
                    node.paused = until;
                    let life = node.life;
                    self.after(micros, SimEvent::Resume(life));
                }
            }
            Fault::BreakLinks { slot } => {
                if let Some(life) = self.nodes[slot].as_ref().map(|n| n.life) {
                    self.break_links(life);
                }
            }
            Fault::Panic { slot, choice } => self.panic(slot, choice)?,
        }
        Ok(())
    }

    fn panic(&mut self, slot: usize, choice: u32) -> Result<(), Broken> {
        let Some(node) = &mut self.nodes[slot] else { return Ok(()) };
        let placed: Vec<ActorId> = node.actors.keys().filter(|a| !matches!(a, ActorId::Host { .. })).copied().collect();
        let Some(actor) = placed.get(choice as usize % placed.len().max(1)).copied() else { return Ok(()) };
        let incarnation = node.actors.remove(&actor).expect("listed").incarnation;
        let life = node.life;
        self.note(format!("{actor}#{} panics", incarnation.0));
        let address = Address { actor, incarnation };
        if let Some(node) = self.node_of_life(life) {
            node.router.fail(address, "injected".to_owned());
        }
        self.send_to_root(life, Control::ActorFailed { address, reason: "injected".to_owned() })
    }

    // ---- network ----

    fn session(&mut self, owner: Life, peer: Life) -> &mut Session<Unit> {
        let forgetful = self.materials.plant == Some(Bug::LostAtReconnect);
        let new = || if forgetful { Session::forgetful() } else { Session::new() };
        self.network.sessions.entry((owner, peer)).or_insert_with(new)
    }

    /// Makes sure that two lives are being connected.
    fn connect(&mut self, a: Life, b: Life) {
        let pair = Network::pair(a, b);
        if !self.network.links.contains_key(&pair) && self.alive(a) && self.alive(b) {
            self.network.links.insert(pair, super::network::Link::default());
            let delay = 100 + self.draw(3000);
            self.after(delay, SimEvent::LinkUp(pair.0, pair.1));
        }
    }

    fn link_up(&mut self, a: Life, b: Life) -> Result<(), Broken> {
        if !self.alive(a) || !self.alive(b) {
            return Ok(());
        }
        let Some(link) = self.network.links.get_mut(&(a, b)) else { return Ok(()) };
        link.number += 1;
        link.up = true;
        link.last.clear();
        let resumes = [self.session(a, b).resume(), self.session(b, a).resume()];
        for (owner, peer, theirs) in [(a, b, resumes[1]), (b, a, resumes[0])] {
            let effects = self.session(owner, peer).link_up(theirs).map_err(|e| ("session", e.to_string()))?;
            self.sessioned(owner, peer, effects)?;
        }
        Ok(())
    }

    fn break_links(&mut self, life: Life) {
        let pairs: Vec<(Life, Life)> =
            self.network.links.keys().filter(|(a, b)| *a == life || *b == life).copied().collect();
        for (a, b) in pairs {
            if let Some(link) = self.network.links.get_mut(&(a, b)).filter(|l| l.up) {
                link.up = false;
                link.number += 1;
                self.session(a, b).link_down();
                self.session(b, a).link_down();
                let delay = 1000 + self.draw(100_000);
                self.after(delay, SimEvent::LinkUp(a, b));
            }
        }
    }

    fn transmit(&mut self, from: Life, to: Life, unit: Unit) -> Result<(), Broken> {
        self.connect(from, to);
        let lane = unit.lane();
        let effects = self.session(from, to).send(lane, unit);
        let kept = self.session(from, to).kept();
        checks::bounded(|| format!("the session {from} to {to}"), kept, 4096 + 1024)?;
        self.sessioned(from, to, effects)
    }

    /// Carries out what the session that `owner` has with `peer` asks for.
    fn sessioned(&mut self, owner: Life, peer: Life, effects: Vec<SessionEffect<Unit>>) -> Result<(), Broken> {
        for effect in effects {
            match effect {
                SessionEffect::Transmit(frame) => self.fly(owner, peer, frame),
                SessionEffect::Deliver(lane, unit) => {
                    self.receive(owner, peer, unit)?;
                    if self.alive(owner) {
                        let effects = self.session(owner, peer).consumed(lane);
                        self.sessioned(owner, peer, effects)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn fly(&mut self, from: Life, to: Life, frame: Frame<Unit>) {
        let delay = 50 + self.draw(900);
        let (now, pair) = (self.now, Network::pair(from, to));
        let Some(link) = self.network.links.get_mut(&pair).filter(|l| l.up) else { return };
        let last = link.last.entry(from).or_default();
        *last = (now + delay).max(*last + 1);
        let (at, number) = (*last - now, link.number);
        self.after(at, SimEvent::Arrive(Flight { from, to, link: number, frame }));
    }

    fn arrive(&mut self, flight: Flight) -> Result<(), Broken> {
        let pair = Network::pair(flight.from, flight.to);
        let present = self.network.links.get(&pair).is_some_and(|l| l.up && l.number == flight.link);
        if !present || !self.alive(flight.to) {
            return Ok(());
        }
        let effects =
            self.session(flight.to, flight.from).on_frame(flight.frame).map_err(|e| ("session", e.to_string()))?;
        self.sessioned(flight.to, flight.from, effects)
    }

    fn receive(&mut self, to: Life, from: Life, unit: Unit) -> Result<(), Broken> {
        if self.root.as_ref().is_some_and(|r| r.life == to) {
            return match unit {
                Unit::Control(control) => self.root_hears(from, control),
                Unit::Bundle(bundle) => self.tell_root(RootEvent::Arrived(bundle)),
            };
        }
        match unit {
            Unit::Control(control) => self.node_hears(to, control),
            Unit::Bundle(bundle) => {
                let Some(node) = self.node_of_life(to) else { return Ok(()) };
                let actions = node.router.arrive(bundle);
                self.perform_node(to, actions)
            }
        }
    }

    // ---- nodes ----

    fn heartbeat(&mut self, life: Life) -> Result<(), Broken> {
        let root = self.root.as_ref().map(|r| r.life);
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let (number, work) = (node.router.node(), node.work);
        let new_root = root.is_some() && node.supervisor != root;
        node.supervisor = root.or(node.supervisor);
        let control = match number {
            Some(node) if new_root => Control::Return { node },
            Some(node) => Control::Heartbeat { node, work },
            None if new_root => {
                let info = NodeInfo { address: format!("life {life}"), peer: life, pid: 0, machine: String::new() };
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
        let failures: Vec<(Address, String)> = node.router.failures().map(|(a, r)| (*a, r.clone())).collect();
        failures
            .into_iter()
            .try_for_each(|(address, reason)| self.send_to_root(life, Control::ActorFailed { address, reason }))
    }

    fn send_to_root(&mut self, life: Life, control: Control) -> Result<(), Broken> {
        let Some(root) = self.root.as_ref().map(|r| r.life) else { return Ok(()) };
        self.transmit(life, root, Unit::Control(control))
    }

    fn node_hears(&mut self, life: Life, control: Control) -> Result<(), Broken> {
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
            Control::Fence => {
                // It gives up all it has and comes as new.
                let slot = self.nodes.iter().position(|n| n.as_ref().is_some_and(|n| n.life == life)).expect("alive");
                self.note(format!("life {life} is fenced"));
                self.network.end(life);
                self.start_node(slot);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn perform_node(&mut self, life: Life, actions: Vec<Action>) -> Result<(), Broken> {
        for action in actions {
            match action {
                Action::Spawn(address) => {
                    let core = self.materials.core(address).expect("placed actors are workers");
                    let actor =
                        SimActor { incarnation: address.incarnation, core, mailbox: VecDeque::new(), awake: false };
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
    fn peer_of(&mut self, life: Life, node: NodeId) -> Option<Life> {
        if node == crate::ids::SUPERVISOR_NODE {
            return self.root.as_ref().map(|r| r.life);
        }
        let router = &self.node_of_life(life)?.router;
        router.table().nodes.get(&node).map(|info| info.peer)
    }

    fn check_delivery(&mut self, life: Life, actor: ActorId, event: &Event) -> Result<(), Broken> {
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let table = node.router.table();
        match event {
            Event::Message { from, .. } => checks::fenced((actor, from), table),
            Event::Local { local: Local::Batch(batch), .. } => checks::fenced_batch(batch, table),
            _ => Ok(()),
        }
    }

    /// Puts an event into an actor's mailbox, of that life if one is named.
    fn deliver(&mut self, life: Life, actor: ActorId, incarnation: Option<Incarnation>, event: Event) {
        let delay = 1 + self.draw(30);
        let Some(node) = self.node_of_life(life) else { return };
        let Some(target) = node.actors.get_mut(&actor) else { return };
        if incarnation.is_some_and(|i| i != target.incarnation) {
            return;
        }
        target.mailbox.push_back(event);
        if !target.awake {
            target.awake = true;
            let incarnation = target.incarnation;
            self.after(delay, SimEvent::Wake(life, actor, incarnation));
        }
    }

    fn wake(&mut self, life: Life, actor: ActorId, incarnation: Incarnation) -> Result<(), Broken> {
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let Some(target) = node.actors.get_mut(&actor).filter(|a| a.incarnation == incarnation) else { return Ok(()) };
        let Some(event) = target.mailbox.pop_front() else {
            target.awake = false;
            return Ok(());
        };
        checks::bounded(|| format!("the mailbox of {actor}"), target.mailbox.len(), 2000)?;
        let effects = target.core.on(event);
        self.perform(life, Address { actor, incarnation }, effects)?;
        let delay = 1 + self.draw(30);
        self.after(delay, SimEvent::Wake(life, actor, incarnation));
        Ok(())
    }

    fn perform(&mut self, life: Life, me: Address, effects: Vec<Effect>) -> Result<(), Broken> {
        let mut messages = Vec::new();
        for effect in effects {
            match effect {
                Effect::Send { from, to, body } => messages.push((from.unwrap_or(me), to, body)),
                Effect::Tell { to, local } => self.deliver(life, to, None, Event::Local { from: me.actor, local }),
                Effect::Compute { job, cost } => self.compute(life, me, job, cost),
            }
        }
        let Some(node) = self.node_of_life(life) else { return Ok(()) };
        let actions = node.router.send(messages);
        self.perform_node(life, actions)
    }

    fn compute(&mut self, life: Life, me: Address, job: Job, cost: u64) {
        if let Some(node) = self.node_of_life(life) {
            node.work += cost;
        }
        let outcome = Box::new(run(job, &CpuBackend));
        let micros = 100 + self.draw(3000);
        self.after(micros, SimEvent::Computed(life, me.actor, me.incarnation, outcome));
    }

    // ---- the supervisor's process ----

    fn root_hears(&mut self, from: Life, control: Control) -> Result<(), Broken> {
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
            Control::Heartbeat { node, work } => {
                root.lives.insert(node, from);
                SupervisorEvent::Heartbeat { node, work }
            }
            Control::ActorFailed { address, reason } => SupervisorEvent::ActorFailed { address, reason },
            _ => return Ok(()),
        };
        self.tell_root(RootEvent::Supervisor(event))
    }

    fn tell_root(&mut self, event: RootEvent) -> Result<(), Broken> {
        let now = Duration::from_micros(self.now);
        let Some(root) = &mut self.root else { return Ok(()) };
        let effects = root.root.on(now, event);
        self.perform_root(effects)
    }

    fn life_of_node(&mut self, node: NodeId) -> Option<Life> {
        let root = self.root.as_mut()?;
        if let Some(life) = root.lives.get(&node) {
            return Some(*life);
        }
        let peer = root.root.supervisor.table().nodes.get(&node)?.peer;
        let life = root.joining.remove(&peer).unwrap_or(peer);
        root.lives.insert(node, life);
        Some(life)
    }

    fn perform_root(&mut self, effects: Vec<RootEffect>) -> Result<(), Broken> {
        for effect in effects {
            let Some(life) = self.root.as_ref().map(|r| r.life) else { return Ok(()) };
            match effect {
                RootEffect::Append(record) => {
                    self.unsynced.push(record);
                    let delay = 200 + self.draw(3000) + self.unsynced.len() as u64 * 4000;
                    self.after(delay, SimEvent::Synced(life));
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
                RootEffect::Store { step, shard, parameters } => {
                    let delay = 1000 + self.draw(20_000);
                    self.after(delay, SimEvent::Stored(life, step, shard, parameters));
                }
                RootEffect::Publish(step) => {
                    let delay = 500 + self.draw(5000);
                    self.after(delay, SimEvent::Published(life, step));
                }
                RootEffect::Load { step, shard, to } => {
                    let delay = 500 + self.draw(10_000);
                    self.after(delay, SimEvent::Loaded(life, step, shard, to));
                }
                RootEffect::Finish(result) => self.finished = Some(result),
            }
        }
        Ok(())
    }

    /// C2 at the moment when a commit leaves the supervisor.
    fn check_announced(&mut self, bundle: &[crate::message::Envelope]) -> Result<(), Broken> {
        for envelope in bundle {
            if let crate::message::Body::Commit(commit) = &envelope.body {
                checks::durable(commit.step, &self.disk)?;
                self.announced = self.announced.max(commit.step);
            }
        }
        Ok(())
    }
}
