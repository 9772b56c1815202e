//! Carries a plan out against a running job.

use super::asks::{self, Tree};
use super::held::HeldProcesses;
use super::plan::{Plan, Target};
use crate::launcher::{self, Targets};
use anyhow::{Context, Result, bail};
use everstep_actors::{ActorId, AdminRequest, BadWire, Disturbed, NodeId, RunFolder, Trouble, milliseconds};
use everstep_kernels::Philox;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

const PURPOSE_CHAOS: u32 = 4;
/// What met nobody is tried again after so long.
const AGAIN: Duration = Duration::from_millis(200);
/// Tries before a target is left to the next turn.
const TRIES_MAX: u64 = 25;
/// A process that was stopped joins again before the next fault.
const REST: Duration = Duration::from_secs(1);
/// Bytes that a node without memory may still get.
const LAST_BYTES: u64 = 1 << 20;
/// Milliseconds by which a clock is late.
const LATE: i64 = -3_600_000;

/// Something went wrong: a line of faults.jsonl.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Kill {
    /// Milliseconds since 1970.
    pub(crate) time: u64,
    /// What.
    pub(crate) target: Target,
    /// The last step that was committed before it.
    pub(crate) step: u64,
}

impl Kill {
    /// Those of a run, if there were any.
    pub(crate) fn read_all(run: &RunFolder) -> Vec<Self> {
        let text = fs::read_to_string(run.faults()).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// See the module.
pub(crate) struct Killer {
    pub(crate) plan: Plan,
    run: RunFolder,
    random: Philox,
    /// Targets of the plan that had their turn, and tries of the present one.
    turn: u64,
    tries: u64,
    next: Instant,
    held: HeldProcesses,
    /// When what lasts on nodes is over.
    lasting: Vec<Instant>,
    /// The newest step, and when it was committed.
    moved: (u64, Instant),
    log: File,
    /// What was done so far.
    pub(crate) kills: Vec<Kill>,
}

impl Killer {
    /// For a run that has been started.
    pub(crate) fn new(plan: Plan, run: RunFolder) -> Result<Self> {
        let random = Philox::new(plan.seed, PURPOSE_CHAOS, 0);
        let path = run.faults();
        let log = OpenOptions::new().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("cannot write {}", path.display()))?;
        let now = Instant::now();
        let (held, lasting, kills) = (HeldProcesses::new()?, Vec::new(), Vec::new());
        let (turn, tries) = (0, 0);
        let mut killer = Self { plan, run, random, turn, tries, next: now, held, lasting, moved: (0, now), log, kills };
        killer.wait();
        Ok(killer)
    }

    fn draw(&self, salt: u64) -> u64 {
        (self.random.uniform((self.turn * TRIES_MAX + self.tries) * 4 + salt) * 1e9) as u64
    }

    fn wait(&mut self) {
        // Between half and one and a half of the mean.
        let ms = self.plan.every_ms / 2 + self.draw(0) % self.plan.every_ms.max(1);
        self.next = Instant::now() + Duration::from_millis(ms);
    }

    /// Does what is due.
    pub(crate) fn act(&mut self, targets: &mut Targets) {
        if self.held.has_let_go() {
            self.next = self.next.max(Instant::now() + REST);
        }
        let now = Instant::now();
        if targets.steps != self.moved.0 {
            self.moved = (targets.steps, now);
        } else if now - self.moved.1 > Duration::from_secs(self.plan.hangs_s) {
            let (step, seconds) = (self.moved.0, self.plan.hangs_s);
            targets.give_up = Some(format!("the job hangs: nothing was committed for {seconds} s after step {step}"));
            return;
        }
        self.lasting.retain(|until| *until > now);
        // The first step shows that the job runs.
        let done = self.kills.len() as u64;
        let over = self.plan.kills.is_some_and(|kills| done == kills);
        if over || targets.steps == 0 || now < self.next {
            return;
        }
        let target = self.plan.targets[self.turn as usize % self.plan.targets.len()];
        // A supervisor that is stopped is none of the nodes, and yet enough.
        let holds = matches!(target, Target::Stop | Target::Cpu | Target::StopSupervisor);
        let held = holds && !self.held.is_empty() && self.plan.at_most == 1;
        if held || self.plan.is_too_much(target, self.lasting.len()) {
            return;
        }
        // What is done counts from before it.
        let time = milliseconds();
        match self.inflict(target, targets) {
            Ok(()) => (self.turn, self.tries) = (self.turn + 1, 0),
            Err(error) => {
                // Nobody was met: it counts only when somebody is.
                eprintln!("{target:?} met nobody: {error:#}");
                self.next = Instant::now() + AGAIN;
                self.tries += 1;
                if self.tries == TRIES_MAX {
                    eprintln!("{target:?} is given up this time");
                    (self.turn, self.tries) = (self.turn + 1, 0);
                }
                return;
            }
        }
        let of = self.plan.kills.map_or(String::new(), |kills| format!(" of {kills}"));
        eprintln!("fault {}{of}: {target:?} after step {}", done + 1, targets.steps);
        let kill = Kill { time, target, step: targets.steps };
        let line = serde_json::to_string(&kill).expect("a fault is an object");
        if let Err(error) = writeln!(self.log, "{line}") {
            eprintln!("cannot write {}: {error}", self.run.faults().display());
        }
        self.kills.push(kill);
        self.wait();
    }

    /// Whether something lasts still, or nothing was committed after the last fault.
    pub(crate) fn waits(&self, steps: u64) -> bool {
        !self.lasting.is_empty() || !self.held.is_empty() || self.kills.last().is_some_and(|last| steps <= last.step)
    }

    fn lasts(&mut self, duration: Duration) {
        self.lasting.push(Instant::now() + duration);
    }

    fn inflict(&mut self, target: Target, targets: &mut Targets) -> Result<()> {
        let n = targets.nodes.len() as u64;
        let first = self.draw(1) % n.max(1);
        // Zero is no process: where none of the nodes is on this machine, nothing is done to one.
        let [node, second] =
            [first, (first + 1) % n.max(1)].map(|at| targets.nodes.get(at as usize).copied().unwrap_or(0));
        if node == 0 && target.needs_node() {
            bail!("no node is on this machine");
        }
        let two = || [node, second].into_iter().try_for_each(|pid| send(pid, Signal::KILL));
        if matches!(target, Target::TwoNodes | Target::Unreadable | Target::Memory) && n < 2 {
            bail!("the job has {n} nodes on this machine");
        }
        let stop = Duration::from_millis(self.plan.stop_ms);
        let lasts = Duration::from_millis(self.plan.fault_ms.into());
        match target {
            Target::Stage => self.ask_actor(AdminRequest::Kill, |a| matches!(a, ActorId::Stage { .. }))?,
            Target::Expert => self.ask_actor(AdminRequest::Kill, |a| matches!(a, ActorId::Expert { .. }))?,
            Target::Reducer => self.ask_actor(AdminRequest::Kill, |a| matches!(a, ActorId::Reducer { .. }))?,
            Target::Flip => self.ask_actor(AdminRequest::Flip, |a| matches!(a, ActorId::Reducer { .. }))?,
            Target::Wrong => self.ask_actor(AdminRequest::Flip, |a| matches!(a, ActorId::Stage { .. }))?,
            Target::Node => send(node, Signal::KILL)?,
            Target::TwoNodes => two()?,
            Target::Supervisor => send(self.leader(targets)?, Signal::KILL)?,
            Target::Everything => targets.kill_all = true,
            Target::Join => targets.join = true,
            Target::Leave => send(node, Signal::TERM)?,
            Target::Memory => {
                limit_memory(node)?;
                send(second, Signal::KILL)?;
            }
            Target::Stop => {
                self.held.hold(node, stop, 0)?;
                self.lasts(stop);
            }
            Target::Cpu => {
                self.held.hold(node, lasts, self.plan.cpu_percent)?;
                self.lasts(lasts);
            }
            Target::StopSupervisor => self.held.hold(self.leader(targets)?, stop, 0)?,
            Target::Cut | Target::OneWay | Target::Isolate | Target::Loss | Target::Delay => {
                self.spoil_wire(target)?;
                self.lasts(lasts);
            }
            Target::Rdma => self.fail_rdma()?,
            Target::Full => self.disturb(Disturbed::Store(Trouble::Full))?,
            Target::Unreadable => {
                self.disturb(Disturbed::Store(Trouble::Unreadable))?;
                two()?;
            }
            Target::FlipFile => {
                flip_file(&self.run, self.draw(2))?;
                send(self.leader(targets)?, Signal::KILL)?;
            }
            Target::Clock => self.disturb(Disturbed::Clock(LATE))?,
        }
        Ok(())
    }

    /// The supervisor that leads, or the only one: metrics.jsonl stands for that of the leader.
    fn leader(&self, targets: &Targets) -> Result<u32> {
        if targets.supervisors.is_empty() {
            bail!("no supervisor is on this machine");
        }
        let target = fs::read_link(self.run.metrics()).ok();
        let number = target.and_then(|t| t.parent()?.file_name()?.to_string_lossy().parse::<usize>().ok());
        Ok(targets.supervisors[number.map_or(0, |n| n - 1).min(targets.supervisors.len() - 1)])
    }

    fn ask(&self, request: AdminRequest) -> Result<()> {
        let said = asks::ask(&self.run, request)?;
        eprintln!("{said}");
        if said.contains("is not in the job") || said.contains("has no place") {
            bail!("{said}");
        }
        Ok(())
    }

    /// Asks something of a random actor of a kind that has a place.
    fn ask_actor(&self, request: fn(ActorId) -> AdminRequest, of_kind: impl Fn(&ActorId) -> bool) -> Result<()> {
        let actor = Tree::of(&self.run)?.actor(self.draw(1), of_kind)?;
        self.ask(request(actor))
    }

    fn disturb(&self, what: Disturbed) -> Result<()> {
        self.ask(AdminRequest::Disturb(what, self.plan.fault_ms))
    }

    fn spoil_wire(&self, target: Target) -> Result<()> {
        let [node, other] = Tree::of(&self.run)?.pair(self.draw(1))?;
        let wire = |node: NodeId, bad: BadWire| self.disturb(Disturbed::Wire(node, bad));
        let lost = BadWire { lost_percent: 100, both_ways: true, ..GOOD_WIRE };
        let with = |with: NodeId| BadWire { with: Some(with), ..lost };
        match target {
            Target::Cut => wire(node, with(other)),
            Target::OneWay => wire(node, BadWire { both_ways: false, ..with(other) }),
            Target::Isolate => wire(node, lost),
            Target::Loss => wire(node, BadWire { lost_percent: self.plan.lost_percent, ..lost }),
            _ => wire(node, BadWire { delay_ms: self.plan.delay_ms, ..GOOD_WIRE }),
        }
    }

    fn fail_rdma(&self) -> Result<()> {
        let [node, _] = Tree::of(&self.run)?.pair(self.draw(1))?;
        if !asks::ask(&self.run, AdminRequest::Links(node))?.contains(": rdma (") {
            bail!("no session of {node} goes over RDMA now");
        }
        self.disturb(Disturbed::Wire(node, BadWire { rdma_fails: true, ..GOOD_WIRE }))
    }
}

/// A signal to a process that is there.
fn send(pid: u32, signal: Signal) -> Result<()> {
    if launcher::kill(pid, signal) { Ok(()) } else { bail!("process {pid} has ended") }
}

/// Nothing is wrong with it.
const GOOD_WIRE: BadWire = BadWire { with: None, lost_percent: 0, both_ways: false, delay_ms: 0, rdma_fails: false };

/// A process gets no more memory than it has, but a little. What its allocator reserved and does not use is not counted.
fn limit_memory(pid: u32) -> Result<()> {
    let has = memory_of(pid, "VmData:").with_context(|| format!("process {pid} has ended"))?;
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process has a number")?;
    let limit = Some(has + LAST_BYTES);
    prlimit(Some(process), Resource::Data, Rlimit { current: limit, maximum: getrlimit(Resource::Data).maximum })?;
    Ok(())
}

/// Bytes of memory of a process, by the name of a line in its status.
pub(crate) fn memory_of(pid: u32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Flips a bit of a chunk in a local store.
fn flip_file(run: &RunFolder, draw: u64) -> Result<()> {
    let folder = run.checkpoints().join("chunks");
    let entries = fs::read_dir(&folder).with_context(|| format!("{} holds no chunks", folder.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(|path| is_chunk(path)).collect();
    files.sort();
    let path = files.get((draw % files.len().max(1) as u64) as usize).context("there is no chunk yet")?;
    let mut bytes = fs::read(path)?;
    let bit = draw as usize % (8 * bytes.len().max(1));
    *bytes.get_mut(bit / 8).context("the chunk is empty")? ^= 1 << (bit % 8);
    fs::write(path, bytes)?;
    eprintln!("a bit of {} was flipped", path.display());
    Ok(())
}

/// Not one that is being written.
fn is_chunk(path: &Path) -> bool {
    path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.'))
}
