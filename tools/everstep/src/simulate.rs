//! `everstep simulate`: seeds on every core; without a bug planted none may show a violation, with one of them one must.

use crate::range;
use anyhow::{Context, Result, bail};
use everstep_actors::{Bug, sim};
use rayon::prelude::*;
use serde_json::json;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// What to simulate.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// `A..B`: seeds from A to B - 1.
    #[arg(long)]
    seeds: String,
    /// Only these of each seed's faults, as a violation's replay names them.
    #[arg(long, num_args = 0.., value_delimiter = ',')]
    only: Option<Vec<usize>>,
    /// Plant a bug that a seed must find, or `all` one after another. Needs the feature `plant`.
    #[arg(long)]
    plant: Option<String>,
    /// One JSON object per line.
    #[arg(long)]
    json: bool,
}

/// What seeds showed.
struct Shown {
    /// Without a violation.
    seeds: u64,
    rollbacks: u64,
    coverage: sim::Coverage,
    /// Of the lowest seed that has one.
    violation: Option<sim::Violation>,
}

fn show(seeds: Range<u64>, plant: Option<Bug>, only: Option<&[usize]>) -> Shown {
    let [done, rollbacks] = [const { AtomicU64::new(0) }; 2];
    let coverage = Mutex::new(sim::Coverage::default());
    let violation = seeds.into_par_iter().find_map_first(|seed| {
        let summary = match sim::simulate(seed, plant, only) {
            Ok(summary) => summary,
            Err(violation) => return Some(violation),
        };
        done.fetch_add(1, Ordering::Relaxed);
        rollbacks.fetch_add(summary.rollbacks as u64, Ordering::Relaxed);
        coverage.lock().unwrap_or_else(PoisonError::into_inner).add(&summary.coverage);
        None
    });
    let [seeds, rollbacks] = [done, rollbacks].map(AtomicU64::into_inner);
    let coverage = coverage.into_inner().unwrap_or_else(PoisonError::into_inner);
    Shown { seeds, rollbacks, coverage, violation }
}

/// Runs the seeds, or looks for planted bugs with them: one, or `all`.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let seeds = range(&options.seeds).context("--seeds")?;
    let Some(plant) = &options.plant else { return clean(seeds, options) };
    if !cfg!(feature = "plant") {
        bail!("--plant: this program holds no bugs: build it with --features plant");
    }
    let bugs = match &plant[..] {
        "all" => Bug::ALL.iter().map(|(bug, _)| *bug).collect(),
        name => vec![name.parse::<Bug>().map_err(anyhow::Error::msg).context("--plant")?],
    };
    let mut all_found = true;
    for bug in bugs {
        let found = show(seeds.clone(), Some(bug), options.only.as_deref()).violation;
        all_found &= found.is_some();
        let (seed, contract) = (found.as_ref().map(|v| v.seed), found.as_ref().map(|v| v.contract));
        if options.json {
            println!("{}", json!({ "bug": bug.to_string(), "seed": seed, "contract": contract }));
        } else {
            let shown = seed.map_or("not found".to_owned(), |seed| format!("seed {seed}: {}", contract.unwrap_or("")));
            println!("{:30} {shown}", bug.to_string());
        }
    }
    Ok(if all_found { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn clean(seeds: Range<u64>, options: &Options) -> Result<ExitCode> {
    let began = Instant::now();
    let Shown { seeds, rollbacks, coverage, violation } = show(seeds, None, options.only.as_deref());
    let seconds = began.elapsed().as_secs_f64();
    let violation = violation.map(|violation| sim::shrink(violation, None));
    let faults: u64 = coverage.faults.values().sum();
    if options.json {
        let line = json!({
            "seeds": seeds, "faults": faults, "rollbacks": rollbacks, "seconds": seconds,
            "core_seconds_per_seed": seconds * rayon::current_num_threads() as f64 / seeds.max(1) as f64,
            "coverage": coverage.table(),
            "violation": violation.as_ref().map(|v| json!({
                "seed": v.seed, "only": v.only, "contract": v.contract, "what": v.what,
            })),
        });
        println!("{line}");
    } else {
        for (what, times) in coverage.table() {
            println!("{times:>12}  {what}");
        }
        println!(
            "{seeds} seeds without a violation, {faults} faults, {rollbacks} ways back to a checkpoint, {seconds:.1} s"
        );
        if let Some(violation) = &violation {
            println!("{violation}");
        }
    }
    Ok(if violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
