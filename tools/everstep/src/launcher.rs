//! The launcher: makes a run folder, starts the supervisor (or several) and local nodes, restarts what dies, and
//! leaves no process behind.
//!
//! It decides nothing about the job: it watches processes and reads the run's files.

use crate::data::Data;
use crate::eval::Evaluator;
use crate::progress::Progress;
use crate::signals::Signals;
use crate::{STATUS_FAILED, STATUS_LEFT};
use anyhow::{Context, Result, bail};
use everstep_actors::{Config, RunFolder, RunIdentity, milliseconds};
use everstep_kernels::{Backend, CpuBackend};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_millis(20);
/// How often checkpoints are looked for that are to be evaluated.
const EVALUATE: Duration = Duration::from_millis(500);
/// A supervisor that does not listen for so long is told of: it may have a large checkpoint to verify.
const START: Duration = Duration::from_secs(30);
/// Restarts of supervisors before any of them leads, after which it is given up.
const STARTS_MAX: usize = 6;
/// Restarts of one process within [`RESTART_WINDOW`] after which the job is given up.
const RESTARTS_MAX: usize = 20;
const RESTART_WINDOW: Duration = Duration::from_secs(30);
/// Bytes of a process's last words.
const WORDS_MAX: u64 = 64 * 1024;
/// How long processes may take to end by themselves when the job is over.
const FAREWELL: Duration = Duration::from_secs(3);

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// All steps are committed and stored.
    Finished,
    /// It cannot go on.
    Failed(String),
    /// The launcher was told to stop by this signal.
    Interrupted(u8),
}

impl End {
    /// An error, unless all steps are committed and stored.
    pub(crate) fn finished(self) -> Result<()> {
        match self {
            Self::Finished => Ok(()),
            Self::Failed(why) => bail!("{why}"),
            Self::Interrupted(signal) => bail!("stopped by signal {signal}"),
        }
    }
}

/// Makes the folder of a new run: configuration, snapshot of the text, credentials. `more` adds to it, for
/// a job of this name, before it gets its own name.
pub(crate) fn create(
    config: &Config,
    data: &Data,
    more: impl FnOnce(&RunFolder, &str) -> Result<()>,
) -> Result<RunFolder> {
    let run = RunFolder(config.folder.clone());
    if run.0.exists() {
        bail!(
            "run folder {} exists: choose another run.folder, or go on with: everstep resume {}",
            run.0.display(),
            run.0.display()
        );
    }
    // A port in use is told before anything is written. The supervisor binds it again.
    UdpSocket::bind(&config.listen).with_context(|| format!("run.listen: cannot listen on {}", config.listen))?;
    let make = |scratch: &Path| {
        let scratch = RunFolder(scratch.to_owned());
        fill(&scratch, config, data).and_then(|job| more(&scratch, &job))
    };
    whole_folder(&run.0, make).context("run.folder")?;
    Ok(run)
}

/// Makes a folder under another name first, so that it is whole or not there.
pub(crate) fn whole_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = path.parent().map_or_else(PathBuf::new, PathBuf::from);
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?.to_string_lossy();
    let scratch = parent.join(format!(".{name}.{}.new", std::process::id()));
    let made = fs::create_dir_all(&scratch).map_err(anyhow::Error::from).and_then(|()| fill(&scratch));
    let made = made.and_then(|()| Ok(fs::rename(&scratch, path)?));
    if made.is_err() {
        let _ = fs::remove_dir_all(&scratch);
    }
    made.with_context(|| format!("cannot make folder {}", path.display()))
}

/// Gives the job's name.
fn fill(run: &RunFolder, config: &Config, data: &Data) -> Result<String> {
    fs::create_dir_all(run.logs())?;
    fs::write(run.config(), &config.text)?;
    for number in (1..=config.supervisors).filter(|_| config.supervisors > 1) {
        // A supervisor whose log is not there has forgotten how it voted, and takes no part.
        fs::create_dir_all(run.seat(number))?;
        fs::File::create_new(run.seat(number).join("log"))?;
    }
    let mut random = [0u8; 16];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut random)?;
    let job: String = random.iter().map(|b| format!("{b:02x}")).collect();
    let identity = RunIdentity {
        job: job.clone(),
        class: CpuBackend::new(config.spec.precision).class().0,
        sources: data.store(run)?,
    };
    fs::write(run.identity(), serde_json::to_string_pretty(&identity)?)?;
    everstep_transport::Credentials::create(&run.credentials())?;
    Ok(job)
}

/// Makes this process end with its parent, however that ends.
pub(crate) fn end_with(parent: Option<u32>) -> Result<()> {
    let Some(parent) = parent else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before the line above.
    if getppid().map(|p| p.as_raw_nonzero().get() as u32) != Some(parent) {
        bail!("the launcher has ended");
    }
    Ok(())
}

/// A process and its restarts.
#[derive(Debug)]
struct Slot {
    name: String,
    child: Child,
    restarts: Vec<Instant>,
    /// Of a supervisor: its last words before it was started again.
    words: String,
}

impl Slot {
    fn new(name: String, child: Child) -> Self {
        Self { name, child, restarts: Vec::new(), words: String::new() }
    }

    fn kill(&mut self) {
        // A process that has ended already needs no kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What chaos may do to a running job.
#[derive(Debug)]
pub(crate) struct Targets {
    pub(crate) supervisors: Vec<u32>,
    pub(crate) nodes: Vec<u32>,
    /// Lines of metrics.jsonl so far.
    pub(crate) steps: u64,
    /// Kill everything and resume, as if the machine had been switched off.
    pub(crate) kill_all: bool,
    /// Start another node.
    pub(crate) join: bool,
    /// End the job, and why.
    pub(crate) give_up: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Launcher {
    run: RunFolder,
    /// Where nodes find the supervisor, or all of them: with commas between.
    address: String,
    supervisors: Vec<Slot>,
    nodes: Vec<Slot>,
    /// Nodes that the job begins with, without spares.
    wanted: usize,
    started: usize,
    /// MiB of each node; 0: no limit.
    memory: u64,
    progress: Progress,
    evaluator: Evaluator,
    signals: Signals,
}

impl Launcher {
    /// Starts the processes of a run folder.
    pub(crate) fn start(run: RunFolder, nodes: usize, show: bool) -> Result<Self> {
        let mut signals = Signals::new()?;
        let text =
            fs::read_to_string(run.config()).with_context(|| format!("cannot read {}", run.config().display()))?;
        let config = Config::parse(&text, &run.config().display().to_string(), &[])?;
        wait_for_lock(&run)?;
        everstep_actors::verify_tokens(&run, &RunIdentity::read(&run)?.sources)?;
        fs::create_dir_all(run.logs())?;
        let _ = fs::remove_file(run.address());
        let listen = if config.supervisors > 1 { addresses(&config)? } else { config.listen.clone() };
        let mut supervisors = Vec::new();
        for number in 1..=config.supervisors {
            let child = spawn_supervisor(&run, &listen, number, nodes)?;
            supervisors.push(Slot::new(supervisor_name(number), child));
        }
        let address = match wait_for_address(&run, &listen, nodes, (&mut supervisors[..], &mut signals)) {
            Ok(address) => address,
            Err(error) => {
                supervisors.iter_mut().for_each(Slot::kill);
                return Err(error);
            }
        };
        let mut launcher = Self {
            progress: Progress::new(&run, &config, show)?,
            evaluator: Evaluator::new(&run, &config),
            run,
            address,
            supervisors,
            nodes: Vec::new(),
            wanted: nodes,
            started: 0,
            memory: config.memory.unwrap_or(0),
            signals,
        };
        let spares = if nodes > 0 { config.spares } else { 0 };
        for _ in 0..nodes + spares {
            launcher.add_node()?;
        }
        Ok(launcher)
    }

    fn add_node(&mut self) -> Result<()> {
        let name = format!("node-{}", self.started);
        self.started += 1;
        let child = self.spawn_node(&name)?;
        self.nodes.push(Slot::new(name, child));
        Ok(())
    }

    fn spawn_node(&self, name: &str) -> Result<Child> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / self.wanted.max(1)).max(1).to_string();
        let mut command = this_program(&self.run, name)?;
        command.args(["node", "--join", &self.address, "--threads", &threads, "--memory", &self.memory.to_string()]);
        command.arg("--credentials").arg(self.run.credentials()).args(["--parent", &std::process::id().to_string()]);
        Ok(command.spawn()?)
    }

    /// Waits for the end of the job. `act` is called every few milliseconds with what it may kill.
    pub(crate) fn wait(mut self, mut act: impl FnMut(&mut Targets)) -> Result<End> {
        let mut looked = Instant::now();
        let end = loop {
            std::thread::sleep(LOOK);
            if let Some(signal) = self.signals.received() {
                break End::Interrupted(signal);
            }
            let steps = self.progress.look()?;
            if looked.elapsed() > EVALUATE {
                looked = Instant::now();
                if let Err(error) = self.evaluator.look() {
                    eprintln!("evaluation: {error:#}");
                }
            }
            let mut targets = Targets {
                supervisors: self.supervisors.iter().map(|s| s.child.id()).collect(),
                nodes: self.nodes.iter().map(|n| n.child.id()).collect(),
                steps,
                kill_all: false,
                join: false,
                give_up: None,
            };
            act(&mut targets);
            if let Some(why) = targets.give_up {
                break End::Failed(why);
            }
            if targets.join {
                self.add_node()?;
            }
            if targets.kill_all {
                self.kill_all();
                return Self::start(self.run.clone(), self.wanted, false)?.wait(act);
            }
            if let Some(end) = look_at_supervisors(&self.run, &self.address, self.wanted, &mut self.supervisors)? {
                break end;
            }
            if let Some(end) = self.look_at_nodes()? {
                break end;
            }
        };
        self.progress.finish(&end)?;
        if end == End::Finished {
            self.let_nodes_end();
            self.kill_all();
            self.evaluator.finish_all()?;
            self.progress.evaluated(milliseconds())?;
        }
        self.kill_all();
        Ok(end)
    }

    fn look_at_nodes(&mut self) -> Result<Option<End>> {
        for at in (0..self.nodes.len()).rev() {
            let Some(status) = self.nodes[at].child.try_wait()? else { continue };
            if status.code() == Some(i32::from(STATUS_LEFT)) {
                self.nodes.remove(at);
                continue;
            }
            let name = self.nodes[at].name.clone();
            if !may_restart(&mut self.nodes[at]) {
                return Ok(Some(End::Failed(last_words(&self.run, &name, &mut self.nodes[at].child, status))));
            }
            // When the job is over nodes end before the supervisor does.
            if status.success() && self.supervisor_ends()? {
                return Ok(None);
            }
            self.nodes[at].child = self.spawn_node(&name)?;
        }
        Ok(None)
    }

    /// Waits a moment for the supervisor to end too.
    fn supervisor_ends(&mut self) -> Result<bool> {
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            for slot in &mut self.supervisors {
                if slot.child.try_wait()?.is_some() {
                    return Ok(true);
                }
            }
            std::thread::sleep(LOOK);
        }
        Ok(false)
    }

    fn let_nodes_end(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        while Instant::now() < deadline {
            if self.nodes.iter_mut().all(|n| matches!(n.child.try_wait(), Ok(Some(_)))) {
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn kill_all(&mut self) {
        self.supervisors.iter_mut().chain(&mut self.nodes).for_each(Slot::kill);
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.kill_all();
    }
}

/// The supervisor takes the lock for itself; here it only tells whether somebody has it. Processes of a
/// launcher that was killed a moment ago are about to end.
fn wait_for_lock(run: &RunFolder) -> Result<()> {
    let deadline = Instant::now() + FAREWELL;
    loop {
        match run.lock() {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

/// Whether a process has not died too often lately.
fn may_restart(slot: &mut Slot) -> bool {
    let now = Instant::now();
    slot.restarts.retain(|at| now - *at < RESTART_WINDOW);
    slot.restarts.push(now);
    slot.restarts.len() <= RESTARTS_MAX
}

fn this_program(run: &RunFolder, name: &str) -> Result<Command> {
    let path = run.logs().join(format!("{name}.log"));
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let mut command = Command::new(std::env::current_exe()?);
    // Its last words come by the pipe, which a full disk cannot close.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    Ok(command)
}

/// Addresses for several supervisors of this machine, with commas between: ports that follow the one that the
/// configuration names, or free ones.
fn addresses(config: &Config) -> Result<String> {
    let first: SocketAddr = config.listen.parse()?;
    // All are bound before any is given back, so that they differ. The supervisors bind them again.
    let sockets = (0..config.supervisors as u16).map(|n| {
        let port = if first.port() == 0 { 0 } else { first.port().saturating_add(n) };
        let address = SocketAddr::new(first.ip(), port);
        UdpSocket::bind(address).with_context(|| format!("run.listen: cannot listen on {address}"))
    });
    let sockets = sockets.collect::<Result<Vec<_>>>()?;
    let addresses = sockets.iter().map(|s| Ok(s.local_addr()?.to_string())).collect::<Result<Vec<_>>>()?;
    Ok(addresses.join(","))
}

fn supervisor_name(number: u64) -> String {
    if number == 1 { "supervisor".to_owned() } else { format!("supervisor-{number}") }
}

/// With local nodes, the job waits for as many as there are of them.
fn spawn_supervisor(run: &RunFolder, listen: &str, number: u64, nodes: usize) -> Result<Child> {
    let mut command = this_program(run, &supervisor_name(number))?;
    command.arg("supervisor").arg(&run.0).args(["--parent", &std::process::id().to_string()]);
    if listen.contains(',') {
        command.args(["--among", listen, "--number", &number.to_string()]);
    } else {
        command.args(["--listen", listen]);
    }
    if nodes > 0 {
        command.args(["--nodes", &nodes.to_string()]);
    }
    Ok(command.spawn()?)
}

fn wait_for_address(
    run: &RunFolder,
    listen: &str,
    nodes: usize,
    (supervisors, signals): (&mut [Slot], &mut Signals),
) -> Result<String> {
    let mut told = Instant::now();
    loop {
        if let Some(signal) = signals.received() {
            End::Interrupted(signal).finished()?;
        }
        if let Ok(address) = fs::read_to_string(run.address()) {
            return Ok(address);
        }
        if let Some(end) = look_at_supervisors(run, listen, nodes, supervisors)? {
            end.finished()?;
        }
        let again = supervisors.iter().map(|slot| slot.restarts.len()).sum::<usize>();
        if again > STARTS_MAX {
            let words = supervisors.iter().map(|slot| &slot.words[..]).find(|words| !words.is_empty());
            bail!("no supervisor begins; one of them said: {}", words.unwrap_or_default());
        }
        if told.elapsed() > START {
            told = Instant::now();
            eprintln!(
                "the supervisor does not listen yet: that of a new job opens its store first: see {}",
                run.logs().display()
            );
        }
        std::thread::sleep(LOOK);
    }
}

/// Starts supervisors again that have ended, unless one of them says how the job did.
fn look_at_supervisors(run: &RunFolder, listen: &str, nodes: usize, supervisors: &mut [Slot]) -> Result<Option<End>> {
    for (number, slot) in (1..).zip(supervisors) {
        let Some(status) = slot.child.try_wait()? else { continue };
        if status.success() {
            return Ok(Some(End::Finished));
        }
        if status.code() == Some(i32::from(STATUS_FAILED)) || !may_restart(slot) {
            return Ok(Some(End::Failed(last_words(run, &slot.name, &mut slot.child, status))));
        }
        slot.words = last_words(run, &slot.name, &mut slot.child, status);
        slot.child = spawn_supervisor(run, listen, number, nodes)?;
    }
    Ok(None)
}

/// The last words of a process that has ended: its own, or how it ended.
fn last_words(run: &RunFolder, name: &str, child: &mut Child, status: ExitStatus) -> String {
    let mut words = String::new();
    if let Some(pipe) = &mut child.stdout {
        // What cannot be read is not said; the status is.
        let _ = pipe.take(WORDS_MAX).read_to_string(&mut words);
    }
    match words.trim() {
        "" => format!("{name} ended with {status}: see {}", run.logs().join(format!("{name}.log")).display()),
        words => words.to_owned(),
    }
}

/// Sends a signal to a process of the job. Gives whether there was one: it may have ended by itself.
pub(crate) fn kill(pid: u32, signal: Signal) -> bool {
    i32::try_from(pid).ok().and_then(Pid::from_raw).is_some_and(|pid| kill_process(pid, signal).is_ok())
}
