//! What is killed, what comes and what leaves, and when: by a plan, from a seed.

use crate::admin;
use crate::launcher::{self, Targets};
use anyhow::{Context, Result, bail};
use everstep_actors::{ActorId, AdminRequest, RunFolder, milliseconds};
use everstep_kernels::Philox;
use rustix::process::Signal;
use serde::Deserialize;
use std::path::Path;
use std::time::{Duration, Instant};

const PURPOSE_CHAOS: u32 = 4;
/// What met nobody is tried again after so long.
const AGAIN: Duration = Duration::from_millis(200);

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Target {
    /// A random stage: it panics.
    Stage,
    /// A random expert: it panics.
    Expert,
    /// A random copy of a shard: it panics.
    Reducer,
    /// A bit of a random copy of a shard flips.
    Flip,
    /// All stages on a random stage's node compute wrongly from now on: with recovery.audit the node is found and given up.
    Wrong,
    /// A random node.
    Node,
    /// Two random nodes at once.
    TwoNodes,
    /// The supervisor, or the one of several that leads.
    Supervisor,
    /// The same is stopped for a while.
    StopSupervisor,
    /// Everything; the run is resumed.
    Everything,
    /// A random node is stopped for a while.
    Stop,
    /// Another node comes.
    Join,
    /// A random node is told to leave, and does.
    Leave,
}

/// When and what.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    /// Names the moments and the victims.
    seed: u64,
    /// Kills in all.
    pub(crate) kills: u64,
    /// Mean milliseconds between two kills.
    every_ms: u64,
    /// Milliseconds for which a process is stopped.
    #[serde(default = "stop_ms")]
    stop_ms: u64,
    /// Taken in turn.
    targets: Vec<Target>,
}

fn stop_ms() -> u64 {
    10_000
}

impl Plan {
    /// Reads one.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let plan: Self = toml::from_str(&text).with_context(|| path.display().to_string())?;
        if plan.targets.is_empty() {
            bail!("{}: targets is empty", path.display());
        }
        Ok(plan)
    }
}

/// Something was killed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kill {
    /// Milliseconds since 1970.
    pub(crate) time: u64,
    /// What.
    pub(crate) target: Target,
}

/// Carries a plan out.
pub(crate) struct Killer {
    pub(crate) plan: Plan,
    run: RunFolder,
    random: Philox,
    next: Instant,
    stopped: Option<(u32, Instant)>,
    /// What was killed so far.
    pub(crate) kills: Vec<Kill>,
}

impl Killer {
    /// For a run that has been started.
    pub(crate) fn new(plan: Plan, run: RunFolder) -> Self {
        let random = Philox::new(plan.seed, PURPOSE_CHAOS, 0);
        let mut killer = Self { plan, run, random, next: Instant::now(), stopped: None, kills: Vec::new() };
        killer.wait();
        killer
    }

    fn draw(&self, salt: u64) -> u64 {
        (self.random.uniform(self.kills.len() as u64 * 4 + salt) * 1e9) as u64
    }

    fn wait(&mut self) {
        // Between half and one and a half of the mean.
        let ms = self.plan.every_ms / 2 + self.draw(0) % self.plan.every_ms.max(1);
        self.next = Instant::now() + Duration::from_millis(ms);
    }

    /// Kills what is due.
    pub(crate) fn act(&mut self, targets: &mut Targets) {
        if let Some((pid, until)) = self.stopped
            && Instant::now() > until
        {
            launcher::kill(pid, Signal::CONT);
            self.stopped = None;
            // It joins again before it may be stopped again.
            self.next = self.next.max(Instant::now() + Duration::from_secs(1));
        }
        // The first step shows that the job runs.
        let done = self.kills.len() as u64;
        if done == self.plan.kills || targets.steps == 0 || targets.nodes.is_empty() || Instant::now() < self.next {
            return;
        }
        let target = self.plan.targets[done as usize % self.plan.targets.len()];
        if matches!(target, Target::Stop | Target::StopSupervisor) && self.stopped.is_some() {
            return;
        }
        let n = targets.nodes.len() as u64;
        let first = self.draw(1) % n;
        let met = match target {
            Target::Stage => self.ask(AdminRequest::Kill, |a| matches!(a, ActorId::Stage { .. })),
            Target::Expert => self.ask(AdminRequest::Kill, |a| matches!(a, ActorId::Expert { .. })),
            Target::Reducer => self.ask(AdminRequest::Kill, |a| matches!(a, ActorId::Reducer { .. })),
            Target::Flip => self.ask(AdminRequest::Flip, |a| matches!(a, ActorId::Reducer { .. })),
            Target::Wrong => self.ask(AdminRequest::Flip, |a| matches!(a, ActorId::Stage { .. })),
            Target::Node => signalled(&[targets.nodes[first as usize]], Signal::KILL),
            Target::TwoNodes => {
                let second = targets.nodes[((first + 1) % n) as usize];
                signalled(&[targets.nodes[first as usize], second], Signal::KILL)
            }
            Target::Supervisor => signalled(&[self.leader(targets)], Signal::KILL),
            Target::Everything => {
                targets.kill_all = true;
                true
            }
            Target::Join => {
                targets.join = true;
                true
            }
            Target::Leave => signalled(&[targets.nodes[first as usize]], Signal::TERM),
            Target::Stop => self.stop(targets.nodes[first as usize]),
            Target::StopSupervisor => self.stop(self.leader(targets)),
        };
        if !met {
            // Nobody was met: it counts only when somebody is.
            self.next = Instant::now() + AGAIN;
            return;
        }
        eprintln!("kill {} of {}: {target:?} after step {}", done + 1, self.plan.kills, targets.steps);
        self.kills.push(Kill { time: milliseconds(), target });
        self.wait();
    }

    fn stop(&mut self, pid: u32) -> bool {
        self.stopped = Some((pid, Instant::now() + Duration::from_millis(self.plan.stop_ms)));
        signalled(&[pid], Signal::STOP)
    }

    /// The supervisor that leads, or the only one: metrics.jsonl stands for that of the leader.
    fn leader(&self, targets: &Targets) -> u32 {
        let target = std::fs::read_link(self.run.metrics()).ok();
        let number = target.and_then(|t| t.parent()?.file_name()?.to_string_lossy().parse::<usize>().ok());
        targets.supervisors[number.map_or(0, |n| n - 1).min(targets.supervisors.len() - 1)]
    }

    /// Asks something of a random actor of a kind that has a place. Gives whether one was asked.
    fn ask(&self, request: fn(ActorId) -> AdminRequest, of_kind: impl Fn(&ActorId) -> bool) -> bool {
        let asked = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(anyhow::Error::from);
        let asked = asked.and_then(|runtime| {
            let tree = runtime.block_on(admin::ask(&self.run, AdminRequest::Tree))?;
            let mut kind: Vec<ActorId> = actors(&tree).filter(of_kind).collect();
            kind.sort_unstable();
            let actor = kind.get((self.draw(1) % kind.len().max(1) as u64) as usize).context("there is none")?;
            runtime.block_on(admin::ask(&self.run, request(*actor)))
        });
        match asked {
            Ok(said) => eprintln!("{said}"),
            // The supervisor may be the one that was killed a moment ago.
            Err(error) => {
                eprintln!("nobody was reached: {error:#}");
                return false;
            }
        }
        true
    }
}

/// Sends a signal to processes. They may have ended by themselves: then it met them too.
fn signalled(pids: &[u32], signal: Signal) -> bool {
    pids.iter().for_each(|pid| launcher::kill(*pid, signal));
    true
}

/// Actors that an operator's tree shows: a line each, with a life's number after the name.
fn actors(tree: &str) -> impl Iterator<Item = ActorId> {
    tree.lines().filter_map(|line| line.trim().split_once('#')?.0.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actors_are_read_from_a_tree() {
        let tree = "supervisor: epoch 3, 2 nodes\nnode 1 at 127.0.0.1:9\n  stage.0.1#4\n  reducer.2.5#1  primary\n";
        let found: Vec<String> = actors(tree).map(|a| a.to_string()).collect();
        assert_eq!(found, ["stage.0.1", "reducer.2.5"]);
    }
}
