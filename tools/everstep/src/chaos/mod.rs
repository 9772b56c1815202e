//! `everstep chaos`: a real job of real processes under faults, and the same job undisturbed; every
//! committed step's fingerprint must be the same. Or faults for a job that runs already.

mod asks;
mod attach;
mod held;
mod killer;
mod plan;
mod told;

pub(crate) use attach::attach;
pub(crate) use killer::{Kill, memory_of};
pub(crate) use plan::{Plan, Target};
pub(crate) use told::{counted, percentile};

use crate::data::Data;
use crate::launcher::{self, Launcher};
use crate::{read_config, recoveries};
use anyhow::{Result, bail};
use everstep_actors::{MetricsLine, RunFolder};
use killer::Killer;
use std::path::Path;
use std::process::ExitCode;
use told::Memory;

/// A job under faults, and without.
pub(crate) struct Both {
    pub(crate) disturbed: RunFolder,
    pub(crate) undisturbed: RunFolder,
    pub(crate) kills: Vec<Kill>,
    /// Faults that there should have been.
    planned: Option<u64>,
    memory: Memory,
}

/// Trains one job twice: under the faults of a plan, and undisturbed on `alone` nodes, or as many as the configuration says.
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
    eprintln!("the job under faults");
    let (disturbed, launcher) = start("chaos", None)?;
    let mut killer = Killer::new(plan, disturbed.clone())?;
    let mut memory = Memory::of(base.spec.steps);
    let ended = launcher.wait(|targets| {
        memory.look(targets);
        killer.act(targets);
    });
    if let Err(why) = ended.and_then(|end| end.finished()) {
        // What there is to tell is told, whatever it ended of.
        let told = MetricsLine::read_all(&disturbed.metrics()).map_err(anyhow::Error::from);
        if let Err(error) = told.and_then(|steps| told::tell(&disturbed, &steps, &killer.kills)) {
            eprintln!("{error:#}");
        }
        told::left_behind(&disturbed);
        return Err(why);
    }
    eprintln!("the same job undisturbed");
    let (undisturbed, launcher) = start("undisturbed", alone)?;
    launcher.wait(|_| {})?.finished()?;
    let (kills, planned) = (std::mem::take(&mut killer.kills), killer.plan.kills);
    Ok(Both { disturbed, undisturbed, kills, planned, memory })
}

/// What two runs of one job have not in common.
struct Difference {
    /// Steps with the same fingerprint.
    equal: usize,
    /// Others, in either.
    different: usize,
    /// The first of them, or what else is wrong.
    why: String,
}

/// The steps of two runs of one job, those of the first first, if every fingerprint is the same. `running`: one of the two may
/// have more steps, which are not compared.
fn equal(first: &RunFolder, second: &RunFolder, running: bool) -> Result<Result<[Vec<MetricsLine>; 2], Difference>> {
    let mut got = MetricsLine::read_all(&first.metrics())?;
    let mut want = MetricsLine::read_all(&second.metrics())?;
    let doubled = |run: &RunFolder, lines: &[MetricsLine]| -> Result<Option<String>> {
        let written = MetricsLine::written(&run.metrics())?;
        // Only steps that an audit doubts are reported again.
        let doubted = recoveries::events(run)?.iter().any(|event| event["event"] == "corrupted");
        let why = format!("{}: {written} lines of {} steps", run.metrics().display(), lines.len());
        // A job that runs has written more since.
        Ok((written != lines.len() && !doubted && !running).then_some(why))
    };
    let doubled = doubled(first, &got)?.or(doubled(second, &want)?);
    if running {
        let common = got.len().min(want.len());
        got.truncate(common);
        want.truncate(common);
    }
    let same = |(a, b): &(&MetricsLine, &MetricsLine)| (a.step, &a.fingerprint) == (b.step, &b.fingerprint);
    let equal = got.iter().zip(&want).filter(same).count();
    let different = got.len().max(want.len()) - equal;
    let first = got.iter().zip(&want).find(|pair| !same(pair)).map(|(got, want)| {
        let (step, got, want) = (got.step, &got.fingerprint, &want.fingerprint);
        format!("step {step}: fingerprint {got} under faults, {want} undisturbed")
    });
    let lengths = || format!("{} steps under faults, {} undisturbed", got.len(), want.len());
    match doubled.or(first).or_else(|| (different > 0).then(lengths)) {
        Some(why) => Ok(Err(Difference { equal, different: different.max(1), why })),
        None => Ok(Ok([got, want])),
    }
}

impl Both {
    /// The steps of both runs, under faults first, if every fingerprint is the same; else what differs.
    pub(crate) fn equal(&self) -> Result<Result<[Vec<MetricsLine>; 2], String>> {
        Ok(equal(&self.disturbed, &self.undisturbed, false)?.map_err(|difference| difference.why))
    }

    /// [`all_faults`] of these.
    pub(crate) fn all_faults(&self) -> Result<()> {
        all_faults(self.kills.len(), self.planned)
    }
}

/// An error if the job was over before all faults of the plan. To be asked last: what there is to tell is told before.
fn all_faults(done: usize, planned: Option<u64>) -> Result<()> {
    match planned {
        Some(planned) if (done as u64) < planned => {
            bail!("ended after {done} of {planned} faults: a job with more steps has time for all")
        }
        _ => Ok(()),
    }
}

pub(crate) fn run(plan: &Path, config: &Path, set: &[String]) -> Result<ExitCode> {
    let both = both(Plan::read(plan)?, config, set, Some(1))?;
    let compared = equal(&both.disturbed, &both.undisturbed, false)?;
    let steps = MetricsLine::read_all(&both.disturbed.metrics())?;
    told::tell(&both.disturbed, &steps, &both.kills)?;
    let flat = both.memory.tell();
    let samples = steps.iter().map(|l| l.samples).sum::<u64>();
    let spec = read_config(config, set)?.spec;
    let expected: u64 = (1..=spec.steps).map(|step| spec.samples_of_step(step)).sum();
    println!("ledger: {samples} samples were counted by every copy of every shard, {expected} are in the steps");
    let clean = told::left_behind(&both.disturbed);
    let same = say_equal(compared);
    both.all_faults()?;
    Ok(if same && samples == expected && clean && flat { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints how many fingerprints are equal, and what differs.
fn say_equal(compared: Result<[Vec<MetricsLine>; 2], Difference>) -> bool {
    match compared {
        Ok([steps, _]) => {
            println!("fingerprints: {} equal, 0 different", steps.len());
            true
        }
        Err(Difference { equal, different, why }) => {
            println!("{why}\nfingerprints: {equal} equal, {different} different");
            false
        }
    }
}
