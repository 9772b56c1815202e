//! `everstep simulate`: seeds on every core; without a bug planted none may show a violation, with one of them one must.

use crate::{VERSION, range};
use anyhow::{Context, Result, bail, ensure};
use everstep_actors::{Bug, sim};
use rayon::prelude::*;
use serde_json::json;
use std::io::Write;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What to simulate.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// `A..B`: seeds from A to B - 1.
    #[arg(long)]
    seeds: String,
    /// Threads; as many as there are cores by default.
    #[arg(long)]
    jobs: Option<usize>,
    /// Only these of each seed's faults, as a violation's replay names them.
    #[arg(long, num_args = 0.., value_delimiter = ',')]
    only: Option<Vec<usize>>,
    /// Print each seed's whole log, and nothing else.
    #[arg(long, conflicts_with_all = ["plant", "json"])]
    log: bool,
    /// Plant a bug that a seed must find, or `all` one after another. Needs the feature `plant`.
    #[arg(long)]
    plant: Option<String>,
    /// One JSON object per line.
    #[arg(long)]
    json: bool,
}

/// Seeds between two signs of life.
const PROGRESS: u64 = 1000;

/// What seeds showed.
#[derive(Default)]
struct Shown {
    /// Without a violation.
    seeds: u64,
    rollbacks: u64,
    /// Milliseconds of simulated time.
    simulated: u64,
    /// The one that took longest, and how long.
    slowest: Option<(u64, Duration)>,
    /// Sum of the seeds' logs as numbers: equal if all are.
    logs: u128,
    coverage: sim::Coverage,
}

impl Shown {
    fn add(&mut self, seed: u64, took: Duration, summary: &sim::Summary) {
        if self.slowest.is_none_or(|(_, most)| took > most) {
            self.slowest = Some((seed, took));
        }
        self.seeds += 1;
        self.rollbacks += summary.rollbacks as u64;
        self.simulated += summary.milliseconds;
        self.logs =
            self.logs.wrapping_add(u128::from_str_radix(&summary.log[..32], 16).expect("a hash in hexadecimal"));
        self.coverage.add(&summary.coverage);
    }
}

/// Gives the violation of the lowest seed that has one too.
fn show(seeds: Range<u64>, plant: Option<Bug>, only: Option<&[usize]>) -> (Shown, Option<sim::Violation>) {
    let (shown, all) = (Mutex::new(Shown::default()), seeds.end - seeds.start);
    let violation = seeds.into_par_iter().find_map_first(|seed| {
        let began = Instant::now();
        let summary = match sim::simulate(seed, plant, only) {
            Ok(summary) => summary,
            Err(violation) => return Some(violation),
        };
        let took = began.elapsed();
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.add(seed, took, &summary);
        if shown.seeds.is_multiple_of(PROGRESS) && plant.is_none() {
            eprintln!("{} of {all} seeds", shown.seeds);
        }
        None
    });
    (shown.into_inner().unwrap_or_else(PoisonError::into_inner), violation)
}

/// Runs the seeds, or looks for planted bugs with them: one, or `all`.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let seeds = range(&options.seeds).context("--seeds")?;
    if let Some(jobs) = options.jobs {
        ensure!(jobs > 0, "--jobs: at least one");
        rayon::ThreadPoolBuilder::new().num_threads(jobs).build_global().context("--jobs")?;
    }
    if options.log {
        return logs(seeds, options.only.as_deref());
    }
    let Some(plant) = &options.plant else { return clean(seeds, options) };
    if !cfg!(feature = "plant") {
        bail!("--plant: this program holds no bugs: build it with --features plant");
    }
    let bugs = match &plant[..] {
        "all" => Bug::ALL.iter().map(|(bug, _)| *bug).collect(),
        name => vec![name.parse::<Bug>().map_err(anyhow::Error::msg).context("--plant")?],
    };
    let (mut all_found, is_one) = (true, bugs.len() == 1);
    for bug in bugs {
        let (_, found) = show(seeds.clone(), Some(bug), options.only.as_deref());
        all_found &= found.is_some();
        let (seed, contract) = (found.as_ref().map(|v| v.seed), found.as_ref().map(|v| v.contract));
        if options.json {
            println!("{}", json!({ "bug": bug.to_string(), "seed": seed, "contract": contract }));
        } else {
            let shown = seed.map_or("not found".to_owned(), |seed| format!("seed {seed}: {}", contract.unwrap_or("")));
            println!("{:30} {shown}", bug.to_string());
        }
        if let Some(violation) = found.filter(|_| is_one) {
            eprintln!("{}", sim::shrink(violation));
        }
    }
    Ok(if all_found { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn logs(seeds: Range<u64>, only: Option<&[usize]>) -> Result<ExitCode> {
    let mut all_clean = true;
    for seed in seeds {
        let (log, showed) = sim::log(seed, only);
        std::io::stdout().write_all(log.as_bytes()).context("--log")?;
        if let Err(violation) = showed {
            eprintln!("with {VERSION}:\n{violation}");
            all_clean = false;
        }
    }
    Ok(if all_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn clean(seeds: Range<u64>, options: &Options) -> Result<ExitCode> {
    let began = Instant::now();
    let (shown, violation) = show(seeds, None, options.only.as_deref());
    let Shown { seeds, rollbacks, simulated, slowest, logs, coverage } = shown;
    let (slowest, took) = slowest.unwrap_or_default();
    let seconds = began.elapsed().as_secs_f64();
    let cores = seconds * rayon::current_num_threads() as f64;
    let (faster, logs) = (simulated as f64 / 1000.0 / cores, format!("{logs:032x}"));
    let violation = violation.map(sim::shrink);
    let faults: u64 = coverage.faults.values().sum();
    if options.json {
        let line = json!({
            "program": VERSION, "asked": options.seeds,
            "seeds": seeds, "faults": faults, "rollbacks": rollbacks, "seconds": seconds,
            "core_seconds_per_seed": cores / seeds.max(1) as f64,
            "slowest_seed": slowest, "slowest_seconds": took.as_secs_f64(),
            "simulated_to_real": faster, "logs": logs,
            "coverage": coverage.table(),
            "violation": violation.as_ref().map(|v| json!({
                "seed": v.seed, "only": v.only, "faults": v.faults, "contract": v.contract, "what": v.what,
                "trail": v.trail, "replay": v.replay(),
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
        println!(
            "{:.3} s of a core each; the longest {:.3} s, seed {slowest}",
            cores / seeds.max(1) as f64,
            took.as_secs_f64()
        );
        println!("{faster:.0} times as fast as real time on a core; all logs: {logs}");
        if let Some(violation) = &violation {
            println!("with {VERSION}:\n{violation}");
        }
    }
    Ok(if violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
