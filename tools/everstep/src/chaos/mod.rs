//! `everstep chaos`: a real job of real processes under kills, and the same job undisturbed; every
//! committed step's fingerprint must be the same.

mod killer;

pub(crate) use killer::{Kill, Plan, Target};

use crate::data::Data;
use crate::launcher::{self, Launcher};
use crate::{read_config, recoveries};
use anyhow::{Result, bail};
use everstep_actors::{MetricsLine, RunFolder};
use killer::Killer;
use std::path::Path;
use std::process::ExitCode;

/// A job under kills, and without.
pub(crate) struct Both {
    pub(crate) disturbed: RunFolder,
    pub(crate) undisturbed: RunFolder,
    pub(crate) kills: Vec<Kill>,
}

/// Trains one job twice: under the kills of a plan, and undisturbed on `alone` nodes, or as many as the configuration says.
pub(crate) fn both(plan: Plan, config: &Path, set: &[String], alone: Option<usize>) -> Result<Both> {
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
    let mut killer = Killer::new(plan, disturbed.clone());
    launcher.wait(|targets| killer.act(targets))?.finished()?;
    eprintln!("the same job undisturbed");
    let (undisturbed, launcher) = start("undisturbed", alone)?;
    launcher.wait(|_| {})?.finished()?;
    let (done, planned) = (killer.kills.len() as u64, killer.plan.kills);
    if done < planned {
        bail!("the job ended after {done} of {planned} kills: give it more steps");
    }
    Ok(Both { disturbed, undisturbed, kills: killer.kills })
}

impl Both {
    /// The steps of both runs, under kills first, if every fingerprint is the same; else what differs.
    pub(crate) fn equal(&self) -> Result<Result<[Vec<MetricsLine>; 2], String>> {
        let got = MetricsLine::read_all(&self.disturbed.metrics())?.0;
        let want = MetricsLine::read_all(&self.undisturbed.metrics())?.0;
        for (run, lines) in [(&self.disturbed, &got), (&self.undisturbed, &want)] {
            let written = MetricsLine::written(&run.metrics())?;
            // Only steps that an audit doubts are reported again.
            let doubted = recoveries::events(run)?.iter().any(|event| event["event"] == "corrupted");
            if written != lines.len() && !doubted {
                return Ok(Err(format!("{}: {written} lines of {} steps", run.metrics().display(), lines.len())));
            }
        }
        let wrong = got.iter().zip(&want).find(|(a, b)| (a.step, &a.fingerprint) != (b.step, &b.fingerprint));
        if let Some((got, want)) = wrong {
            let (step, got, want) = (got.step, &got.fingerprint, &want.fingerprint);
            return Ok(Err(format!("step {step}: fingerprint {got} under kills, {want} undisturbed")));
        }
        if got.len() != want.len() {
            return Ok(Err(format!("{} steps under kills, {} undisturbed", got.len(), want.len())));
        }
        Ok(Ok([got, want]))
    }
}

pub(crate) fn run(plan: &Path, config: &Path, set: &[String]) -> Result<ExitCode> {
    let both = both(Plan::read(plan)?, config, set, Some(1))?;
    let steps = match both.equal()? {
        Ok([steps, _]) => steps,
        Err(why) => {
            println!("{why}");
            return Ok(ExitCode::FAILURE);
        }
    };
    let kills = &both.kills;
    println!("{} steps, {} kills: every fingerprint equals the undisturbed run's", steps.len(), kills.len());
    let samples = steps.iter().map(|l| l.samples).sum::<u64>();
    let spec = read_config(config, set)?.spec;
    let expected: u64 = (1..=spec.steps).map(|step| u64::from(spec.lanes) * spec.sequences_of_lane(step)).sum();
    println!("ledger: {samples} samples were counted by every copy of every shard, {expected} are in the steps");
    if samples != expected {
        return Ok(ExitCode::FAILURE);
    }
    let sum = |of: fn(&MetricsLine) -> u64| steps.iter().map(of).sum::<u64>();
    println!("{} multiply-adds were done again by survivors", sum(|l| l.redone));
    println!("{} multiply-adds made again what new lives lacked", sum(|l| l.recipes));
    let events = recoveries::events(&both.disturbed)?;
    let dead = events.iter().filter(|e| e["event"] == "node_dead").filter_map(|e| e["time"].as_u64());
    let (dead, all) = (dead.collect::<Vec<_>>(), recoveries::among(&events)?);
    let recovered: Vec<u64> = all.iter().map(|r| r.time).collect();
    say("from a node's death to the supervisor's knowledge", &until(&dead, kills, |t| t == Target::Node));
    say("from a node's stop to the supervisor's knowledge", &until(&dead, kills, |t| t == Target::Stop));
    say("from a kill to the first commit after it", &until(&recovered, kills, |_| true));
    say("from a leader's stop to another's first commit", &until(&recovered, kills, |t| t == Target::StopSupervisor));
    print!("{}", recoveries::table(&all));
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds from each kill to what came first after it, sorted, and how many kills nothing came of before the next
/// one: they met a process that was not in the job, or two of them had one recovery.
fn until(what: &[u64], kills: &[Kill], counts: impl Fn(Target) -> bool) -> (Vec<u64>, usize) {
    let (mut all, mut nothing) = (Vec::new(), 0);
    for (n, kill) in kills.iter().enumerate().filter(|(_, kill)| counts(kill.target)) {
        let next = kills.get(n + 1).map_or(u64::MAX, |next| next.time);
        match what.iter().find(|at| (kill.time..next).contains(*at)) {
            Some(at) => all.push(at - kill.time),
            None => nothing += 1,
        }
    }
    all.sort_unstable();
    (all, nothing)
}

/// A part of a sorted list, in per cent.
pub(crate) fn percentile<T: Copy>(sorted: &[T], part: usize) -> T {
    sorted[(sorted.len() * part / 100).min(sorted.len() - 1)]
}

fn say(what: &str, (sorted, nothing): &(Vec<u64>, usize)) {
    let Some(longest) = sorted.last() else { return };
    let at = |part| percentile(sorted, part);
    println!(
        "{what}: median {} ms, 90th percentile {} ms, 99th {} ms, longest {longest} ms ({} measured, nothing came of \
         {nothing})",
        at(50),
        at(90),
        at(99),
        sorted.len()
    );
}
