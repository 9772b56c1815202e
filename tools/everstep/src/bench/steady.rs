//! `everstep bench steady`: what protection costs a job in which nothing fails. The same job is trained in turns without
//! mirrors and checkpoints, with a mirror of every shard, and with a checkpoint every ten steps. Beside it what the nodes'
//! processes needed at most, and what was planned for them.

use super::median;
use crate::chaos::memory_of;
use crate::data::Data;
use crate::launcher::{self, Launcher, Targets};
use crate::read_config;
use anyhow::{Result, bail};
use everstep_actors::{MetricsLine, Outlook};
use serde_json::json;
use std::path::Path;

/// Turns of each variant: the machine's speed drifts.
const TURNS: usize = 3;
/// The first steps of a run are left out.
const WARM: usize = 5;

pub(super) fn run(config: &Path, set: &[String]) -> Result<()> {
    let base = read_config(config, set)?;
    let (steps, folder) = (base.spec.steps, &base.folder);
    let never = format!("checkpoint.every={steps}");
    let variants = [
        ("neither", ["recovery.mirrors=0".to_owned(), never.clone()]),
        ("a mirror of every shard", ["recovery.mirrors=1".to_owned(), never]),
        ("a checkpoint every ten steps", ["recovery.mirrors=0".to_owned(), "checkpoint.every=10".to_owned()]),
    ];
    let data = Data::prepare(&base)?;
    std::fs::create_dir_all(folder)?;
    let mut seconds = vec![Vec::new(); variants.len()];
    let mut bytes = vec![[0, 0]; variants.len()];
    for turn in 0..TURNS {
        for (n, (_, more)) in variants.iter().enumerate() {
            let run = format!("run.folder={}", folder.join(format!("{turn}-{n}")).display());
            let set: Vec<String> = set.iter().chain(more).cloned().chain([run]).collect();
            let config = read_config(config, &set)?;
            let run = launcher::create(&config, &data, |_, _| Ok(()))?;
            let [peak, planned] = &mut bytes[n];
            let look = |targets: &mut Targets| {
                *peak = targets.nodes.iter().filter_map(|pid| memory_of(*pid, "VmHWM:")).fold(*peak, u64::max)
            };
            Launcher::start(run.clone(), config.nodes, false)?.wait(look)?.finished()?;
            let outlook = Outlook::new(&config.spec, config.nodes, 0);
            *planned = outlook.fullest.map_or(0, |bytes| bytes + outlook.process);
            let lines = MetricsLine::read_all(&run.metrics())?;
            if lines.len() < 2 * WARM {
                bail!("{} steps are too few: give the job at least {}", lines.len(), 2 * WARM);
            }
            // All steps count, those with a checkpoint too: the mean of the run.
            let (first, last) = (&lines[WARM], &lines[lines.len() - 1]);
            seconds[n].push((last.time - first.time) as f64 / 1000.0 / (lines.len() - 1 - WARM) as f64);
        }
    }
    let plain = median(seconds[0].clone());
    for (((name, _), seconds), [peak, planned]) in variants.iter().zip(&seconds).zip(&bytes) {
        let step = median(seconds.clone());
        let line = json!({
            "bench": "steady", "with": name, "step_s": step, "turns_s": seconds, "costs": step / plain - 1.0,
            "node_peak_bytes": peak, "node_planned_bytes": planned,
        });
        println!("{line}");
    }
    Ok(())
}
