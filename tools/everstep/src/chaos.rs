//! `everstep chaos`: a real job of real processes under kills, and the same job undisturbed; every
//! committed step's fingerprint must be the same.

use crate::data::Data;
use crate::launcher::{self, End, Launcher, Targets};
use crate::{read_config, recoveries};
use anyhow::{Context, Result, bail};
use everstep_actors::{MetricsLine, RunFolder};
use everstep_kernels::Philox;
use rustix::process::Signal;
use serde::Deserialize;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const PURPOSE_CHAOS: u32 = 4;

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Target {
    /// A random node.
    Node,
    /// Two random nodes at once.
    TwoNodes,
    /// The supervisor.
    Supervisor,
    /// Everything; the run is resumed.
    Everything,
    /// A random node is stopped for a while.
    Stop,
}

/// When and what.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    /// Names the moments and the nodes.
    seed: u64,
    /// Kills in all.
    kills: u64,
    /// Mean milliseconds between two kills.
    every_ms: u64,
    /// Milliseconds for which a node is stopped.
    #[serde(default = "stop_ms")]
    stop_ms: u64,
    /// Taken in turn.
    targets: Vec<Target>,
}

fn stop_ms() -> u64 {
    10_000
}

struct Killer {
    plan: Plan,
    random: Philox,
    done: u64,
    next: Instant,
    stopped: Option<(u32, Instant)>,
    /// Milliseconds since 1970 of each kill, and of what.
    times: Vec<(u64, Target)>,
}

impl Killer {
    fn draw(&self, salt: u64) -> u64 {
        (self.random.uniform(self.done * 4 + salt) * 1e9) as u64
    }

    fn wait(&mut self) {
        // Between half and one and a half of the mean.
        let ms = self.plan.every_ms / 2 + self.draw(0) % self.plan.every_ms.max(1);
        self.next = Instant::now() + Duration::from_millis(ms);
    }

    fn act(&mut self, targets: &mut Targets) {
        if let Some((pid, until)) = self.stopped
            && Instant::now() > until
        {
            launcher::kill(pid, Signal::CONT);
            self.stopped = None;
            // It joins again before it may be stopped again.
            self.next = self.next.max(Instant::now() + Duration::from_secs(1));
        }
        // The first step shows that the job runs.
        if self.done == self.plan.kills || targets.steps == 0 || Instant::now() < self.next {
            return;
        }
        let target = self.plan.targets[self.done as usize % self.plan.targets.len()];
        if target == Target::Stop && self.stopped.is_some() {
            return;
        }
        let n = targets.nodes.len().max(1) as u64;
        let first = self.draw(1) % n;
        match target {
            Target::Node => launcher::kill(targets.nodes[first as usize], Signal::KILL),
            Target::TwoNodes => {
                launcher::kill(targets.nodes[first as usize], Signal::KILL);
                launcher::kill(targets.nodes[((first + 1) % n) as usize], Signal::KILL);
            }
            Target::Supervisor => launcher::kill(targets.supervisor, Signal::KILL),
            Target::Everything => targets.kill_all = true,
            Target::Stop => {
                let pid = targets.nodes[first as usize];
                launcher::kill(pid, Signal::STOP);
                self.stopped = Some((pid, Instant::now() + Duration::from_millis(self.plan.stop_ms)));
            }
        }
        eprintln!("kill {} of {}: {target:?} after step {}", self.done + 1, self.plan.kills, targets.steps);
        self.done += 1;
        self.times.push((SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64), target));
        self.wait();
    }
}

fn fingerprints(run: &RunFolder) -> Result<Vec<(u64, String)>> {
    Ok(MetricsLine::read_all(&run.metrics())?.0.into_iter().map(|l| (l.step, l.fingerprint)).collect())
}

pub(crate) fn run(plan: &Path, config: &Path, set: &[String]) -> Result<ExitCode> {
    let text = std::fs::read_to_string(plan).with_context(|| format!("cannot read {}", plan.display()))?;
    let plan_of: Plan = toml_from(&text).with_context(|| plan.display().to_string())?;
    if plan_of.targets.is_empty() {
        bail!("{}: targets is empty", plan.display());
    }
    let base = read_config(config, set)?;
    let folder = |part: &str| format!("run.folder={}", base.folder.join(part).display());
    // Both runs train on one snapshot: the text may change meanwhile.
    let data = Data::prepare(&base)?;
    let start = |part: &str, nodes: Option<usize>| -> Result<(RunFolder, Launcher)> {
        let mut set = set.to_vec();
        set.push(folder(part));
        set.extend(nodes.map(|n| format!("job.nodes={n}")));
        let config = read_config(config, &set)?;
        let run = launcher::create(&config, &data, |_, _| Ok(()))?;
        Ok((run.clone(), Launcher::start(run, config.nodes, true)?))
    };
    std::fs::create_dir_all(&base.folder)?;
    eprintln!("the job under kills");
    let (disturbed, launcher) = start("chaos", None)?;
    let random = Philox::new(plan_of.seed, PURPOSE_CHAOS, 0);
    let mut killer = Killer { plan: plan_of, random, done: 0, next: Instant::now(), stopped: None, times: Vec::new() };
    killer.wait();
    finished(launcher.wait(|targets| killer.act(targets))?)?;
    eprintln!("the same job undisturbed, on one node");
    let (reference, launcher) = start("undisturbed", Some(1))?;
    finished(launcher.wait(|_| {})?)?;
    let planned = killer.plan.kills;
    if killer.done < planned {
        bail!("the job ended after {} of {planned} kills: give it more steps", killer.done);
    }
    compare(&disturbed, &reference, &killer.times)
}

fn toml_from<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T> {
    Ok(toml::from_str(text)?)
}

fn finished(end: End) -> Result<()> {
    match end {
        End::Finished => Ok(()),
        End::Failed(why) => bail!("{why}"),
        End::Interrupted(signal) => bail!("stopped by signal {signal}"),
    }
}

/// Milliseconds from each kill to what came first after it, sorted, and how many kills nothing came of before the next
/// one: they met a process that was not in the job, or two of them had one recovery.
fn until(what: &[u64], kills: &[(u64, Target)], counts: impl Fn(Target) -> bool) -> (Vec<u64>, usize) {
    let (mut all, mut nothing) = (Vec::new(), 0);
    for (n, (kill, _)) in kills.iter().enumerate().filter(|(_, (_, target))| counts(*target)) {
        let next = kills.get(n + 1).map_or(u64::MAX, |(at, _)| *at);
        match what.iter().find(|at| (*kill..next).contains(at)) {
            Some(at) => all.push(at - kill),
            None => nothing += 1,
        }
    }
    all.sort_unstable();
    (all, nothing)
}

fn say(what: &str, (sorted, nothing): &(Vec<u64>, usize)) {
    let Some(longest) = sorted.last() else { return };
    let at = |part: usize| sorted[(sorted.len() * part / 100).min(sorted.len() - 1)];
    println!(
        "{what}: median {} ms, 90th percentile {} ms, 99th {} ms, longest {longest} ms ({} measured, nothing \
         came of {nothing})",
        at(50),
        at(90),
        at(99),
        sorted.len()
    );
}

fn compare(disturbed: &RunFolder, reference: &RunFolder, kills: &[(u64, Target)]) -> Result<ExitCode> {
    let (got, want) = (fingerprints(disturbed)?, fingerprints(reference)?);
    let wrong = got.iter().zip(&want).find(|(a, b)| a != b);
    if let Some((got, want)) = wrong {
        println!("step {}: fingerprint {} under kills, {} undisturbed", got.0, got.1, want.1);
        return Ok(ExitCode::FAILURE);
    }
    if got.len() != want.len() {
        println!("{} steps under kills, {} undisturbed", got.len(), want.len());
        return Ok(ExitCode::FAILURE);
    }
    println!("{} steps, {} kills: every fingerprint equals the undisturbed run's", got.len(), kills.len());
    let events = recoveries::events(disturbed)?;
    let dead = events.iter().filter(|e| e["event"] == "node_dead").filter_map(|e| e["time"].as_u64());
    let (dead, all) = (dead.collect::<Vec<_>>(), recoveries::among(&events)?);
    let recovered: Vec<u64> = all.iter().map(|r| r.time).collect();
    say("from a node's death to the supervisor's knowledge", &until(&dead, kills, |t| t == Target::Node));
    say("from a node's stop to the supervisor's knowledge", &until(&dead, kills, |t| t == Target::Stop));
    say("from a kill to the first commit after it", &until(&recovered, kills, |_| true));
    print!("{}", recoveries::table(&all));
    Ok(ExitCode::SUCCESS)
}
