//! Faults for a job that runs already: it is looked at as operators do, and restarted by whoever started it.

use super::asks::Tree;
use super::killer::Killer;
use super::plan::Plan;
use super::{equal, say_equal, told};
use crate::launcher::Targets;
use anyhow::{Context, Result, bail};
use everstep_actors::{MetricsLine, RunFolder};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_millis(20);
/// How often processes and steps are asked for.
const ASK: Duration = Duration::from_millis(500);
/// A job whose supervisor says nothing for so long has ended.
const SILENT: Duration = Duration::from_secs(30);

/// Disturbs the job of a run folder until all faults are done or it ends, and compares it with another run of the same job,
/// if there is one.
pub(crate) fn attach(plan: &Path, run: RunFolder, against: Option<RunFolder>) -> Result<ExitCode> {
    let plan = Plan::read(plan)?;
    plan.without_launcher()?;
    let planned = plan.kills;
    let first = steps(&run);
    let mut killer = Killer::new(plan, run.clone())?;
    let (mut heard, mut asked) = (Instant::now(), None::<Instant>);
    let mut targets =
        Targets { supervisors: Vec::new(), nodes: Vec::new(), steps: 0, kill_all: false, join: false, give_up: None };
    while planned.is_none_or(|kills| (killer.kills.len() as u64) < kills) {
        std::thread::sleep(LOOK);
        if asked.is_none_or(|at| at.elapsed() > ASK) {
            asked = Some(Instant::now());
            match Tree::of(&run) {
                Ok(tree) => {
                    heard = Instant::now();
                    targets.supervisors = tree.supervisor.into_iter().collect();
                    targets.nodes = tree.nodes.iter().filter_map(|(_, process)| *process).collect();
                    targets.steps = steps(&run);
                }
                Err(error) if heard.elapsed() > SILENT && targets.steps == 0 => return Err(error),
                Err(_) if heard.elapsed() > SILENT => break,
                Err(_) => continue,
            }
        }
        if targets.supervisors.is_empty() {
            continue;
        }
        killer.act(&mut targets);
        if let Some(why) = targets.give_up.take() {
            bail!("{why}");
        }
    }
    let all = MetricsLine::read_all(&run.metrics())?.0;
    let since: Vec<MetricsLine> = all.into_iter().filter(|line| line.step > first).collect();
    told::tell(&run, &since, &killer.kills)?;
    let Some(against) = against else { return Ok(ExitCode::SUCCESS) };
    Ok(if compare(&run, &against)? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn steps(run: &RunFolder) -> u64 {
    MetricsLine::read_all(&run.metrics()).map_or(0, |(lines, _)| lines.last().map_or(0, |line| line.step))
}

/// The job may go on: steps that only one of the two has are not compared.
fn compare(run: &RunFolder, against: &RunFolder) -> Result<bool> {
    let both = [run, against].map(|run| MetricsLine::read_all(&run.metrics()));
    let [got, want] = both;
    let common = got?.0.len().min(want.context("--against")?.0.len());
    if let Err((same, _)) = equal(run, against)?
        && same == common
    {
        println!("fingerprints: {same} equal, 0 different");
        return Ok(true);
    }
    Ok(say_equal(equal(run, against)?, common))
}
