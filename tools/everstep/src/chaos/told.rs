//! What a run under faults showed, in words: goodput, how long recoveries took by kind and by phase, what was left behind.

use super::killer::{Kill, memory_of};
use super::plan::Target;
use crate::bench::median;
use crate::launcher::Targets;
use crate::recoveries::{self, Recovery};
use anyhow::Result;
use everstep_actors::{MetricsLine, RunFolder};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A part of a sorted list, in per cent.
pub(crate) fn percentile<T: Copy>(sorted: &[T], part: usize) -> T {
    sorted[(sorted.len() * part / 100).min(sorted.len() - 1)]
}

/// Sorted values as "median …, 90th percentile …".
fn spread(sorted: &[f64]) -> String {
    let at = |part| percentile(sorted, part);
    let longest = sorted[sorted.len() - 1];
    format!("median {:.0}, 90% {:.0}, 99% {:.0}, longest {longest:.0} ms", at(50), at(90), at(99))
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// Milliseconds from each fault to what came first after it, sorted, and how many faults nothing came of before the next
/// one: they met a process that was not in the job, or two of them had one recovery.
fn until(what: &[u64], kills: &[Kill], counts: impl Fn(Target) -> bool) -> (Vec<f64>, usize) {
    let (mut all, mut nothing) = (Vec::new(), 0);
    for (n, kill) in kills.iter().enumerate().filter(|(_, kill)| counts(kill.target)) {
        let next = kills.get(n + 1).map_or(u64::MAX, |next| next.time);
        match what.iter().find(|at| (kill.time..next).contains(*at)) {
            Some(at) => all.push((at - kill.time) as f64),
            None => nothing += 1,
        }
    }
    (sorted(all), nothing)
}

fn say(what: &str, (sorted, nothing): &(Vec<f64>, usize)) {
    if !sorted.is_empty() {
        println!("{what}: {} ({} measured, nothing came of {nothing})", spread(sorted), sorted.len());
    }
}

/// The share of the time that steps at their median pace would have taken.
fn goodput(steps: &[MetricsLine]) -> Option<f64> {
    let intervals: Vec<f64> = steps.windows(2).map(|w| w[1].time.saturating_sub(w[0].time) as f64).collect();
    let whole = steps.last()?.time.checked_sub(steps.first()?.time).filter(|whole| *whole > 0)?;
    Some(intervals.len() as f64 * median(intervals) / whole as f64)
}

/// How many faults of each kind there were.
pub(crate) fn counted(kills: &[Kill]) -> String {
    let mut kinds: BTreeMap<Target, usize> = BTreeMap::new();
    kills.iter().for_each(|kill| *kinds.entry(kill.target).or_default() += 1);
    let counted: Vec<String> = kinds.iter().map(|(target, n)| format!("{n} {target:?}")).collect();
    counted.join(", ")
}

/// Prints what a run under faults showed.
pub(super) fn tell(run: &RunFolder, steps: &[MetricsLine], kills: &[Kill]) -> Result<()> {
    println!("{} steps, {} faults: {}", steps.len(), kills.len(), counted(kills));
    if let Some(goodput) = goodput(steps) {
        println!("goodput: {goodput:.3} of the time went into steps at their median pace");
    }
    let sum = |of: fn(&MetricsLine) -> u64| steps.iter().map(of).sum::<u64>();
    println!("{} multiply-adds were done again by survivors", sum(|l| l.redone));
    println!("{} multiply-adds made again what new lives lacked", sum(|l| l.recipes));
    let events = recoveries::events(run)?;
    let dead = events.iter().filter(|e| e["event"] == "node_dead").filter_map(|e| e["time"].as_u64());
    let (dead, all) = (dead.collect::<Vec<_>>(), recoveries::among(&events)?);
    let recovered: Vec<u64> = all.iter().map(|r| r.time).collect();
    say("from a node's death to the supervisor's knowledge", &until(&dead, kills, |t| t == Target::Node));
    say("from a node's stop to the supervisor's knowledge", &until(&dead, kills, |t| t == Target::Stop));
    say("from a cut link to the supervisor's knowledge", &until(&dead, kills, |t| t == Target::Cut));
    println!("from a fault to the first commit after the recovery that it caused, by kind:");
    for target in kills.iter().map(|kill| kill.target).collect::<BTreeSet<_>>() {
        say(&format!("  {target:?}"), &until(&recovered, kills, |t| t == target));
    }
    say("  all", &until(&recovered, kills, |_| true));
    phases(&all);
    Ok(())
}

fn phases(all: &[Recovery]) {
    println!("{} recoveries, by phase:", all.len());
    let mut by_phase: BTreeMap<usize, (&str, Vec<f64>)> = BTreeMap::new();
    for recovery in all {
        for (n, (name, ms)) in recovery.phases().into_iter().enumerate() {
            by_phase.entry(n).or_insert((name, Vec::new())).1.push(ms);
        }
    }
    for (name, ms) in by_phase.into_values() {
        println!("  {name}: {}", spread(&sorted(ms)));
    }
}

/// A job that ran for so long holds as much as it ever will after its first third.
const LONG: Duration = Duration::from_secs(600);

/// Whether the last third held about as much as the first at most: a fifth more is noise of the allocator.
fn is_flat([first, _, last]: [u64; 3]) -> bool {
    last <= first + first / 5
}

/// What processes hold at most, by the third of the run: a leak grows.
#[derive(Debug)]
pub(super) struct Memory {
    began: Instant,
    looked: Instant,
    /// Steps of the run.
    steps: u64,
    /// Bytes of the supervisor that holds most, and of the node that does, in each third.
    most: [[u64; 2]; 3],
}

impl Memory {
    pub(super) fn of(steps: u64) -> Self {
        let now = Instant::now();
        Self { began: now, looked: now, steps, most: [[0; 2]; 3] }
    }

    /// To be called often.
    pub(super) fn look(&mut self, targets: &Targets) {
        if self.looked.elapsed() < Duration::from_millis(500) {
            return;
        }
        self.looked = Instant::now();
        let third = (3 * targets.steps / self.steps.max(1)).min(2) as usize;
        for (most, pids) in self.most[third].iter_mut().zip([&targets.supervisors, &targets.nodes]) {
            *most = pids.iter().filter_map(|pid| memory_of(*pid, "VmRSS:")).fold(*most, u64::max);
        }
    }

    /// Gives whether it stays as it is: of a job that runs for long enough to show.
    pub(super) fn tell(&self) -> bool {
        for (who, at) in [("a supervisor", 0), ("a node", 1)] {
            let thirds = self.most.map(|most| format!("{:.1}", most[at] as f64 / 1e6));
            println!("memory of {who} at most, in each third of the run: {} MB", thirds.join(", "));
        }
        let flat =
            self.looked.duration_since(self.began) < LONG || (0..2).all(|who| is_flat(self.most.map(|most| most[who])));
        if !flat {
            println!("memory grows");
        }
        flat
    }
}

/// Prints what a run that is over left behind. Gives whether that is nothing.
pub(super) fn left_behind(run: &RunFolder) -> bool {
    let folder = run.0.to_string_lossy().into_owned();
    let me = std::process::id().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().filter(|entry| {
        let name = entry.file_name();
        let number = name.to_string_lossy().bytes().all(|b| b.is_ascii_digit()) && name.to_string_lossy() != me;
        let command = || fs::read(entry.path().join("cmdline")).unwrap_or_default();
        number && String::from_utf8_lossy(&command()).contains(&folder)
    });
    let (processes, files) = (processes.count(), unfinished(&run.0));
    println!("left behind: {processes} processes, {} unfinished files", files.len());
    files.iter().for_each(|file| println!("  {file}"));
    processes == 0 && files.is_empty()
}

/// Files of writes that were interrupted.
fn unfinished(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(unfinished(&path));
        } else if path.extension().is_some_and(|extension| extension == "new") {
            found.push(path.display().to_string());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_belongs_to_the_fault_before_it() {
        let kill = |time, target| Kill { time, target, step: 0 };
        let kills = [kill(100, Target::Node), kill(200, Target::Cut), kill(300, Target::Node)];
        assert_eq!(until(&[150, 360, 380], &kills, |_| true), (vec![50.0, 60.0], 1));
        assert_eq!(until(&[150, 360], &kills, |t| t == Target::Cut), (vec![], 1));
    }

    #[test]
    fn a_leak_is_seen() {
        assert!(is_flat([100, 500, 119]) && is_flat([100, 100, 50]) && !is_flat([100, 110, 121]));
    }

    #[test]
    fn what_was_interrupted_is_found() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("chunks")).unwrap();
        for name in ["a", "chunks/b", "chunks/.c.7.new"] {
            fs::write(folder.path().join(name), b"x").unwrap();
        }
        let found = unfinished(folder.path());
        assert!(matches!(&found[..], [one] if one.ends_with(".c.7.new")), "{found:?}");
        assert!(!left_behind(&RunFolder(folder.path().to_owned())));
    }
}
