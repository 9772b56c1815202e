//! What is not there: memory for a stage, and bits that stay as they are.

use anyhow::Result;
use everstep_tests::{Place, events, fingerprints, metrics, program, wait};
use std::process::{Command, Stdio};

/// Survivors without room for what was lost: the job waits, says what it needs, and goes on when a node with room comes.
#[test]
fn a_job_waits_for_memory() -> Result<()> {
    let place = Place::new()?;
    let training = place.start("run", &["train.steps=60", "job.nodes=1", "job.memory=1"])?;
    wait("the wish for memory", || Ok(!events(&training.run, "waiting")?.is_empty()))?;
    let why = events(&training.run, "waiting")?[0]["why"].as_str().unwrap_or_default().to_owned();
    assert!(why.contains("MiB for which no node has room") && why.contains("node 1 1 MiB"), "{why}");
    assert!(metrics(&training.run)?.is_empty());
    let address = std::fs::read_to_string(training.run.address())?;
    let mut node = Command::new(program())
        .args(["node", "--threads", "1", "--memory", "1000", "--join", address.trim(), "--credentials"])
        .arg(training.run.credentials())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let run = training.finish();
    let _ = node.kill();
    let _ = node.wait();
    let alone = place.train("alone", &["train.steps=60", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run?)?, fingerprints(&alone)?);
    Ok(())
}

/// RE-7: a bit that flips in a copy of the state is found before anything that was made of it is reported, the copy is named,
/// and the job goes back to its checkpoint.
#[test]
fn flipped_bits_are_found_and_undone() -> Result<()> {
    let place = Place::new()?;
    let plan = "seed = 3\nkills = 3\nevery_ms = 1500\ntargets = [\"flip\"]\n";
    let set = ["train.steps=600", "checkpoint.every=30", "run.folder=flips"];
    let said = place.with_plan(&["chaos", "plan.toml", "tiny.toml"], plan, &set)?;
    assert!(
        said.contains("600 steps, 3 faults: 3 Flip") && said.contains("fingerprints: 600 equal, 0 different"),
        "{said}"
    );
    let run = place.run("flips/chaos");
    let corrupted = events(&run, "corrupted")?;
    // A flip of a state whose successor is being made changes nothing.
    assert!((1..=3).contains(&corrupted.len()), "{corrupted:?}");
    for event in &corrupted {
        let why = event["why"].as_str().unwrap_or_default();
        let named = ["copy ", "of shard ", "is corrupt", "not what it was when it was made (hashes"];
        assert!(named.iter().all(|words| why.contains(words)), "{why}");
    }
    assert_eq!(events(&run, "rolled_back")?.len(), corrupted.len());
    Ok(())
}
