//! `everstep bench recovery`: what failures cost, by what failed. A job runs under the kills of a plan, and undisturbed on
//! as many nodes; both must have the same fingerprints.

use super::median;
use crate::chaos::{Kill, Plan, Target, both, percentile};
use crate::recoveries::{self, Recovery};
use anyhow::{Result, bail};
use everstep_actors::MetricsLine;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Milliseconds between commits, each with when it ended.
fn intervals(lines: &[MetricsLine]) -> Vec<(u64, f64)> {
    lines.windows(2).map(|w| (w[1].time, (w[1].time - w[0].time.min(w[1].time)) as f64)).collect()
}

/// Milliseconds that the interval with each kill took longer than `usual`; with the intervals after it, up to the next kill,
/// what the kill cost in all. The last kill is left out: no other ends what it costs.
fn costs(intervals: &[(u64, f64)], kills: &[Kill], usual: f64) -> Vec<(Target, f64, f64)> {
    let of_kill = |(n, kill): (usize, &Kill)| {
        let next = kills.get(n + 1)?.time;
        let mut after = intervals.iter().filter(|(end, _)| (kill.time..next).contains(end)).map(|(_, ms)| ms - usual);
        let first = after.next()?;
        Some((kill.target, first, first + after.sum::<f64>()))
    };
    kills.iter().enumerate().filter_map(of_kill).collect()
}

fn spread(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let at = |part| percentile(&values, part);
    json!({ "median": at(50), "p90": at(90), "p99": at(99), "longest": values[values.len() - 1] })
}

/// Medians of the phases.
fn phases(all: &[Recovery]) -> Value {
    let mut by_phase: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    all.iter().flat_map(Recovery::phases).for_each(|(name, ms)| by_phase.entry(name).or_default().push(ms));
    json!(by_phase.into_iter().map(|(name, ms)| (name, median(ms))).collect::<BTreeMap<_, _>>())
}

pub(super) fn run(plan: &Path, config: &Path, set: &[String]) -> Result<()> {
    let both = both(Plan::read(plan)?, config, set, None)?;
    let [under, without] = both.equal()?.map_err(anyhow::Error::msg)?;
    if without.len() < 10 {
        bail!("{} steps are too few to know how long one takes: give the job more", without.len());
    }
    let quiet = intervals(&without);
    let usual = median(quiet.iter().map(|(_, ms)| *ms).collect());
    let all = costs(&intervals(&under), &both.kills, usual);
    let mut kinds: BTreeMap<Option<Target>, Vec<(f64, f64)>> = BTreeMap::new();
    for (target, first, whole) in all {
        kinds.entry(Some(target)).or_default().push((first, whole));
        kinds.entry(None).or_default().push((first, whole));
    }
    for (target, costs) in kinds {
        let line = json!({
            "bench": "recovery", "killed": target.map_or("all".to_owned(), |t| format!("{t:?}").to_lowercase()),
            "kills": costs.len(), "usual_interval_ms": usual,
            "longer_interval_ms": spread(costs.iter().map(|c| c.0).collect()),
            "cost_in_all_ms": spread(costs.iter().map(|c| c.1).collect()),
        });
        println!("{line}");
    }
    let length = |lines: &[MetricsLine]| (lines[lines.len() - 1].time - lines[0].time) as f64 / 1000.0;
    let recovered = recoveries::among(&recoveries::events(&both.disturbed)?)?;
    let line = json!({
        "bench": "goodput", "kills": both.kills.len(), "seconds": length(&under), "undisturbed_seconds": length(&without),
        "kill_every_s": length(&under) / both.kills.len().max(1) as f64, "goodput": length(&without) / length(&under),
        "steps": under.len(), "fingerprints_equal": under.len(),
        "redone_by_survivors": under.iter().map(|l| l.redone).sum::<u64>(),
        "recipe_operations": under.iter().map(|l| l.recipes).sum::<u64>(),
        "operations": under.iter().flat_map(|l| l.operations.values()).sum::<u64>(),
        "recoveries": recovered.len(), "phase_medians_ms": phases(&recovered),
    });
    println!("{line}");
    both.all_faults()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_costs_what_its_interval_and_those_after_it_take_longer() {
        let intervals: Vec<(u64, f64)> =
            [(1000, 100.0), (1100, 100.0), (1350, 250.0), (1470, 120.0), (1570, 100.0), (1900, 330.0)].to_vec();
        let kills = [(1150, Target::Node), (1600, Target::Stage), (2000, Target::Expert)].map(|(time, target)| Kill {
            time,
            target,
            step: 0,
        });
        let all = costs(&intervals, &kills, 100.0);
        assert_eq!(all, [(Target::Node, 150.0, 170.0), (Target::Stage, 230.0, 230.0)]);
        assert!(costs(&intervals, &kills[2..], 100.0).is_empty());
    }
}
