//! Faults for a job that runs already: it is looked at as operators do, and restarted by whoever started it.

use super::asks::Tree;
use super::killer::Killer;
use super::plan::Plan;
use super::{all_faults, equal, say_equal, told};
use crate::launcher::Targets;
use crate::signals::Signals;
use anyhow::{Context, Result, bail};
use everstep_actors::{Config, MetricsLine, RunFolder, machine};
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
    let (planned, first) = (plan.kills, steps(&run));
    let text = std::fs::read_to_string(run.config()).context("--attach")?;
    let last = Config::parse(&text, &run.config().display().to_string(), &[])?.spec.steps;
    // A signal ends it like its last fault: what is held goes on.
    let mut signals = Signals::new()?;
    let mut killer = Killer::new(plan, run.clone())?;
    let (mut heard, mut asked) = (Instant::now(), None::<Instant>);
    let mut targets = Targets {
        supervisors: Vec::new(),
        nodes: Vec::new(),
        steps: first,
        kill_all: false,
        join: false,
        give_up: None,
    };
    // The job is to go on after the last fault too.
    while (planned.is_none_or(|kills| (killer.kills.len() as u64) < kills) || killer.waits(targets.steps))
        && signals.received().is_none()
    {
        std::thread::sleep(LOOK);
        if asked.is_none_or(|at| at.elapsed() > ASK) {
            asked = Some(Instant::now());
            targets.steps = steps(&run);
            match Tree::of(&run) {
                Ok(tree) => {
                    heard = Instant::now();
                    (targets.supervisors, targets.nodes) = processes(&tree);
                }
                Err(_) if targets.steps == last => break,
                Err(error) if heard.elapsed() > SILENT => return Err(error),
                Err(_) => continue,
            }
        }
        killer.act(&mut targets);
        if let Some(why) = targets.give_up.take() {
            bail!("{why}");
        }
    }
    let all = MetricsLine::read_all(&run.metrics())?;
    let since: Vec<MetricsLine> = all.into_iter().filter(|line| line.step > first).collect();
    told::tell(&run, &since, &killer.kills)?;
    let Some(against) = against else {
        all_faults(killer.kills.len(), planned)?;
        return Ok(ExitCode::SUCCESS);
    };
    let compared = equal(&run, &against, true)?;
    if compared.as_ref().is_ok_and(|[steps, _]| steps.last().is_none_or(|line| line.step <= first)) {
        bail!("--against: {} has no step that was disturbed", against.0.display());
    }
    let same = say_equal(compared);
    all_faults(killer.kills.len(), planned)?;
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Processes of this machine, of the supervisor and of nodes: numbers of others are those of strangers here.
fn processes(tree: &Tree) -> (Vec<u32>, Vec<u32>) {
    if tree.machine.is_empty() || tree.machine != machine() {
        return (Vec::new(), Vec::new());
    }
    let is_ours = |pid: &u32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).skip(1).any(|word| matches!(word, b"node" | b"supervisor"))
    };
    let nodes = tree.nodes.iter().filter_map(|(_, process)| *process).filter(is_ours).collect();
    (tree.supervisor.into_iter().filter(is_ours).collect(), nodes)
}

fn steps(run: &RunFolder) -> u64 {
    MetricsLine::newest(&run.metrics()).ok().flatten().map_or(0, |line| line.step)
}
