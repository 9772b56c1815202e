//! `everstep simulate`: seeds, one after another on each core.

use crate::range;
use anyhow::{Context, Result};
use everstep_actors::{Bug, sim};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Runs the seeds. Without a planted bug a violation is a failure; with one, none is.
pub(crate) fn run(seeds: &str, plant: Option<Bug>, json: bool) -> Result<ExitCode> {
    let seeds = range(seeds).context("--seeds")?;
    let began = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let first = std::sync::Mutex::new(None::<sim::Violation>);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (faults, rollbacks, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let found = first.lock().is_ok_and(|f| f.as_ref().is_some_and(|v| v.seed < seed));
                    if seed >= seeds.end || found {
                        return;
                    }
                    match sim::simulate(seed, plant) {
                        Ok(summary) => {
                            done.fetch_add(1, Ordering::Relaxed);
                            faults.fetch_add(summary.faults as u64, Ordering::Relaxed);
                            rollbacks.fetch_add(summary.rollbacks as u64, Ordering::Relaxed);
                        }
                        Err(violation) => {
                            // The lowest seed is the one to tell, whichever thread was faster.
                            let mut first = first.lock().expect("no thread panics with it");
                            if first.as_ref().is_none_or(|v| v.seed > violation.seed) {
                                *first = Some(violation);
                            }
                        }
                    }
                }
            });
        }
    });
    let seconds = began.elapsed().as_secs_f64();
    let done = done.into_inner();
    let violation = first.into_inner().expect("no thread panics with it");
    if json {
        let line = serde_json::json!({
            "seeds": done, "faults": faults.into_inner(), "rollbacks": rollbacks.into_inner(),
            "seconds": seconds, "core_seconds_per_seed": seconds * threads as f64 / done.max(1) as f64,
            "violation": violation.as_ref().map(|v| serde_json::json!({
                "seed": v.seed, "contract": v.contract, "what": v.what,
            })),
        });
        println!("{line}");
    } else {
        println!(
            "{done} seeds without a violation, {} faults, {} ways back to a checkpoint, {seconds:.1} s",
            faults.into_inner(),
            rollbacks.into_inner()
        );
        if let Some(violation) = &violation {
            println!("{violation}");
        }
    }
    let expected = plant.is_some();
    Ok(if violation.is_some() == expected { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
