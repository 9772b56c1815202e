//! Audits in a real job: a stage that computes wrongly is found before its step is committed, and its node is named.

use anyhow::{Context, Result, ensure};
use everstep_tests::{Place, events};

/// AU-1, AU-2, AU-3, C1: with every actor audited in every step, whatever is wrong is found at once. A node of which all
/// stages had sent their last messages of a step makes nothing wrong if its stages move away with the commit.
#[test]
fn a_stage_that_computes_wrongly_is_found_and_named() -> Result<()> {
    let place = Place::new()?;
    let plan = "seed = 3\nkills = 4\nevery_ms = 1200\ntargets = [\"wrong\"]\n";
    let set = ["train.steps=150", "checkpoint.every=10", "job.nodes=4", "recovery.audit=1", "run.folder=audit"];
    let said = place.with_plan(&["chaos", "plan.toml", "tiny.toml"], plan, &set)?;
    assert!(said.contains(" equal, 0 different"), "{said}");
    let run = place.run("audit/chaos");
    let found = events(&run, "corrupted")?;
    assert!((1..=4).contains(&found.len()), "{found:?}");
    for event in &found {
        let why = event["why"].as_str().context("why")?;
        assert!(why.starts_with("what stage.") && why.ends_with("computes wrongly"), "{why}");
    }
    assert_eq!(events(&run, "node_dead")?.len(), found.len());
    let audited = events(&run, "audited")?;
    assert!(audited.len() > 100, "{}", audited.len());
    assert!(audited.iter().all(|e| e["nodes"][0] != e["nodes"][1]));
    // Undisturbed on one node there is nobody to compare with.
    assert!(events(&place.run("audit/undisturbed"), "audited")?.is_empty());
    Ok(())
}

/// AU-4: audited in some steps only, a wrong stage may have been wrong in steps before: all since the checkpoint come out as they
/// should, and are reported again.
#[test]
fn steps_between_audits_are_done_again() -> Result<()> {
    let place = Place::new()?;
    let plan = "seed = 5\nkills = 1\nevery_ms = 1500\ntargets = [\"wrong\"]\n";
    // Far more steps are left than it takes to be audited in one of 20.
    let set = ["train.steps=300", "checkpoint.every=300", "job.nodes=4", "recovery.audit=20", "run.folder=audit"];
    let said = place.with_plan(&["chaos", "plan.toml", "tiny.toml"], plan, &set)?;
    ensure!(said.contains("300 steps, 1 faults") && said.contains("fingerprints: 300 equal, 0 different"), "{said}");
    let run = place.run("audit/chaos");
    // Its stages may have moved away before any was audited, and nothing wrong come of it.
    let found = events(&run, "corrupted")?;
    assert!(found.len() <= 1, "{found:?}");
    let lines = std::fs::read_to_string(run.metrics())?.lines().count();
    for event in &found {
        let why = event["why"].as_str().unwrap_or_default();
        let step: usize =
            why.split(" in step ").nth(1).and_then(|rest| rest.split(' ').next()).context(why.to_owned())?.parse()?;
        // What was written of steps before its own was written again.
        assert_eq!(lines, 300 + step - 1, "{why}");
    }
    Ok(())
}
