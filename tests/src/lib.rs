//! Runs real jobs for the whole-system tests: the `everstep` program, its processes, its files.

mod bucket;
mod vm;
mod wires;

pub use bucket::{Bucket, Door};
pub use vm::{Ran, Vm};
pub use wires::{Process, Wires};

use anyhow::{Context, Result, bail};
use everstep_actors::{MetricsLine, RunFolder};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Nothing in these tests takes longer.
const PATIENCE: Duration = Duration::from_secs(90);

/// The program under test, built beside these tests.
pub fn program() -> PathBuf {
    let mut folder = std::env::current_exe().expect("a test has a path");
    while folder.pop() {
        let path = folder.join("everstep");
        if path.is_file() {
            return path;
        }
    }
    panic!("the everstep program is not built: run `make test`, or `cargo build` first");
}

/// A folder with a text and a configuration, removed at the end.
#[derive(Debug)]
pub struct Place {
    folder: tempfile::TempDir,
    config: PathBuf,
    data: String,
    environment: Vec<(String, String)>,
}

impl Place {
    /// The tiny configuration on a generated text.
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.toml");
        let config = folder.path().join("tiny.toml");
        std::fs::write(&config, std::fs::read_to_string(source)?)?;
        std::fs::write(folder.path().join("text.txt"), text(40_000))?;
        Ok(Self { folder, config, data: "data.paths=[\"text.txt\"]".to_owned(), environment: Vec::new() })
    }

    /// Names other text, as an override of the configuration.
    pub fn set_data(&mut self, data: &str) {
        data.clone_into(&mut self.data);
    }

    /// Gives the program more of an environment.
    pub fn set_environment(&mut self, environment: Vec<(String, String)>) {
        self.environment = environment;
    }

    /// The program, to be run here.
    fn program(&self) -> Command {
        let mut command = Command::new(program());
        command.current_dir(self.path()).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Goes on with a run on so many nodes.
    pub fn resume(&self, name: &str, nodes: usize) -> Result<Training> {
        let run = self.run(name);
        let mut command = self.program();
        command.arg("resume").arg(&run.0).args(["--nodes", &nodes.to_string()]);
        Ok(Training { run, child: command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()? })
    }

    /// Where its files are.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Its configuration.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// A run of that name.
    pub fn run(&self, name: &str) -> RunFolder {
        RunFolder(self.folder.path().join(name))
    }

    fn command(&self, name: &str, set: &[&str]) -> Command {
        let mut command = self.program();
        command.args(["train", "tiny.toml", "--set", &self.data]);
        command.args(["--set", &format!("run.folder={}", self.run(name).0.display())]);
        set.iter().for_each(|s| {
            command.args(["--set", s]);
        });
        command
    }

    /// Trains to the end; fails if the program does.
    pub fn train(&self, name: &str, set: &[&str]) -> Result<RunFolder> {
        let output = self.command(name, set).output()?;
        if !output.status.success() {
            bail!("train {set:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(self.run(name))
    }

    /// Trains and gives what the program said.
    pub fn try_train(&self, name: &str, set: &[&str]) -> Result<Output> {
        Ok(self.command(name, set).output()?)
    }

    /// Starts to train.
    pub fn start(&self, name: &str, set: &[&str]) -> Result<Training> {
        let child = self.command(name, set).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        Ok(Training { run: self.run(name), child })
    }

    /// Runs the program with other arguments and a plan of kills, for the tiny configuration; gives what it said. Fails if
    /// the program does.
    pub fn with_plan(&self, arguments: &[&str], plan: &str, set: &[&str]) -> Result<String> {
        std::fs::write(self.path().join("plan.toml"), plan)?;
        let set: Vec<&str> = [self.data.as_str()].iter().chain(set).flat_map(|s| ["--set", s]).collect();
        let output = self.everstep(&[arguments, &set].concat())?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("{arguments:?}: {}\n{said}{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(said)
    }

    /// Runs the program with other arguments.
    pub fn everstep(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.program().args(arguments).output()?)
    }
}

/// A reproducible text with some structure.
pub fn text(bytes: usize) -> String {
    let words = ["expert", "stage", "reducer", "token", "gradient", "layer", "commit", "epoch"];
    let mut out = String::new();
    let mut state = 1u64;
    while out.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.push_str(words[(state >> 60) as usize % words.len()]);
        out.push(if state >> 40 & 7 == 0 { '\n' } else { ' ' });
    }
    out
}

/// A job that runs.
#[derive(Debug)]
pub struct Training {
    /// Its files.
    pub run: RunFolder,
    /// Its launcher.
    pub child: Child,
}

impl Training {
    /// Waits until so many steps are reported.
    pub fn wait_for_step(&self, step: u64) -> Result<()> {
        wait(&format!("step {step}"), || {
            let done = metrics(&self.run)?.last().is_some_and(|l| l.step >= step);
            if !done && !lives(self.child.id()) {
                bail!("the launcher ended before step {step}");
            }
            Ok(done)
        })
    }

    /// Waits for the end.
    pub fn finish(self) -> Result<RunFolder> {
        let run = self.run.clone();
        let output = self.child.wait_with_output()?;
        if !output.status.success() {
            bail!("training ended with {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(run)
    }

    /// Starts a node of one thread that joins, and that the launcher knows nothing of.
    pub fn join(&self) -> Result<Process> {
        self.join_with(&[])
    }

    /// The same, with these arguments too.
    pub fn join_with(&self, arguments: &[&str]) -> Result<Process> {
        let address = std::fs::read_to_string(self.run.address())?;
        let mut command = Command::new(program());
        command.args(["node", "--threads", "1", "--join", address.trim(), "--credentials"]);
        command.arg(self.run.credentials()).args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Process(command.spawn()?))
    }

    /// Processes of the job: the launcher's children.
    pub fn children(&self) -> Result<Vec<(u32, String)>> {
        children_of(self.child.id())
    }

    /// Processes of the nodes.
    pub fn nodes(&self) -> Result<Vec<u32>> {
        Ok(self.children()?.into_iter().filter(|(_, line)| line.contains("\0node\0")).map(|(pid, _)| pid).collect())
    }
}

/// Process numbers and command lines of a process's children.
fn children_of(parent: u32) -> Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some(rest) = stat.rsplit(')').next() else { continue };
        let fields: Vec<&str> = rest.split_whitespace().collect();
        if fields.first() != Some(&"Z") && fields.get(1).and_then(|p| p.parse().ok()) == Some(parent) {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push((pid, String::from_utf8_lossy(&line).into_owned()));
        }
    }
    Ok(found)
}

/// Whether a process lives (a zombie does not).
pub fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

/// Sends a signal to one process that a test started.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process number")?;
    Ok(kill_process(pid, signal)?)
}

/// Waits until something holds.
pub fn wait(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("waited {} s for {what}", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Lines of metrics.jsonl.
pub fn metrics(run: &RunFolder) -> Result<Vec<MetricsLine>> {
    Ok(MetricsLine::read_all(&run.metrics())?)
}

/// Fingerprints by step; fails if a step is missing, or comes twice though no audit found anything.
pub fn fingerprints(run: &RunFolder) -> Result<Vec<String>> {
    let lines = metrics(run)?;
    let written = MetricsLine::written(&run.metrics())?;
    if written != lines.len() && events(run, "corrupted")?.is_empty() {
        bail!("{} has {written} lines of {} steps", run.metrics().display(), lines.len());
    }
    for (n, line) in lines.iter().enumerate() {
        if line.step != n as u64 + 1 {
            bail!("line {} of {} is of step {}", n + 1, run.metrics().display(), line.step);
        }
    }
    Ok(lines.into_iter().map(|l| l.fingerprint).collect())
}

/// Lines of events.jsonl of one kind.
pub fn events(run: &RunFolder, kind: &str) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(run.events()).unwrap_or_default();
    let lines = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    Ok(lines.filter(|e| e["event"] == kind).collect())
}

/// A file system in memory with a limit, for tests of full disks. Needs the right to mount.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts it.
    pub fn mount(at: &Path, size: &str) -> Result<Self> {
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at).status()?;
        if !status.success() {
            bail!("cannot mount a small file system at {}: this test needs the right to", at.display());
        }
        Ok(Self(at.to_owned()))
    }

    /// Gives it another limit.
    pub fn resize(&self, size: &str) -> Result<()> {
        let options = format!("remount,size={size}");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.0).status()?;
        if !status.success() {
            bail!("cannot change the size of {}", self.0.display());
        }
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
