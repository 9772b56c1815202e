//! Contracts C1, C2 and C6 under real kills: a fixed share of what `make chaos-full` does in full.

use anyhow::Result;
use everstep_tests::{Place, events, fingerprints, signal, wait};
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// Kills of every kind (ND-1: the next supervisor gets what the last one missed): a node, the supervisor, two nodes, everything.
#[test]
fn every_fingerprint_survives_kills_of_everything() -> Result<()> {
    let place = Place::new()?;
    let targets = r#"["node", "supervisor", "two-nodes", "everything", "node"]"#;
    let plan = format!("seed = 5\nkills = 5\nevery_ms = 1200\ntargets = {targets}\n");
    let set = ["train.steps=500", "checkpoint.every=40", "run.folder=chaos"];
    let said = place.with_plan(&["chaos", "plan.toml", "tiny.toml"], &plan, &set)?;
    assert!(said.contains("500 steps, 5 faults: 2 Node, 1 TwoNodes, 1 Supervisor, 1 Everything"), "{said}");
    assert!(
        said.contains("fingerprints: 500 equal, 0 different") && said.contains("left behind: 0 processes, 0 "),
        "{said}"
    );
    Ok(())
}

/// ND-2: a stopped node is declared dead, the job goes on, and when it wakes it changes nothing and joins as new.
#[test]
fn a_stopped_node_is_left_behind_and_rejoins_as_new() -> Result<()> {
    let place = Place::new()?;
    let long = ["train.steps=1200", "checkpoint.every=400"];
    let training = place.start("run", &long)?;
    training.wait_for_step(20)?;
    let stopped = training.nodes()?[0];
    signal(stopped, Signal::STOP)?;
    let since = Instant::now();
    wait("the stopped node's death", || Ok(!events(&training.run, "node_dead")?.is_empty()))?;
    wait("the recovery", || Ok(!events(&training.run, "recovered")?.is_empty()))?;
    let detect = events(&training.run, "recovered")?[0]["microseconds"]["detect"].as_u64().unwrap_or(0);
    assert!((500_000..1_000_000).contains(&detect), "silence of {detect} us was noticed");
    let at = everstep_tests::metrics(&training.run)?.last().map_or(0, |l| l.step);
    training.wait_for_step(at + 30)?;
    std::thread::sleep(Duration::from_secs(10).saturating_sub(since.elapsed()));
    signal(stopped, Signal::CONT)?;
    wait("the woken node's return as a new one", || Ok(events(&training.run, "node_joined")?.len() == 4))?;
    assert!(everstep_tests::lives(stopped), "the process goes on as another node");
    let run = training.finish()?;
    let alone = place.train("alone", &["train.steps=1200", "checkpoint.every=400", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}

/// C6: an actor's panic gives that actor a new life, and no other.
#[test]
fn a_panic_restarts_that_actor_alone() -> Result<()> {
    let mut place = Place::new()?;
    // PA-1: names take long to find, and the node sends its beats meanwhile.
    place.set_environment(vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())]);
    let training = place.start("run", &["train.steps=900", "checkpoint.every=300"])?;
    training.wait_for_step(20)?;
    let path = training.run.0.display().to_string();
    let tree = || -> Result<Vec<String>> {
        let output = place.everstep(&["admin", "--run", &path, "tree"])?;
        let text = String::from_utf8(output.stdout)?;
        let actors = text.lines().filter_map(|l| l.strip_prefix("  "));
        Ok(actors.map(|a| a.trim_end_matches("primary").trim().to_owned()).collect())
    };
    let mut before = tree()?;
    before.sort();
    for (n, actor) in ["expert.1.2", "stage.1.0", "reducer.0.0"].into_iter().enumerate() {
        let output = place.everstep(&["admin", "--run", &path, "kill", actor])?;
        assert!(String::from_utf8_lossy(&output.stdout).contains("made to panic"), "{output:?}");
        wait("the failure", || Ok(events(&training.run, "actor_failed")?.len() == n + 1))?;
        let at = everstep_tests::metrics(&training.run)?.last().map_or(0, |l| l.step);
        training.wait_for_step(at + 5)?;
        let mut after = tree()?;
        after.sort();
        let expected: Vec<String> =
            before.iter().map(|a| if *a == format!("{actor}#1") { format!("{actor}#2") } else { a.clone() }).collect();
        assert_eq!(after, expected, "after a panic of {actor}");
        before = after;
    }
    let recovered = events(&training.run, "recovered")?;
    assert_eq!(recovered.len(), 3, "{recovered:?}");
    for (recovery, actor) in recovered.iter().zip(["expert.1.2", "stage.1.0", "reducer.0.0"]) {
        assert!(recovery["causes"][0].as_str().is_some_and(|c| c.starts_with(actor)), "{recovery}");
        assert_eq!(recovery["lives"], 1, "{recovery}");
        let phases = recovery["microseconds"].as_object().expect("phases");
        let sum: u64 = phases.values().filter_map(serde_json::Value::as_u64).sum();
        assert!(sum > 0 && recovery["milliseconds"] == sum / 1000, "{recovery}");
    }
    let table = place.everstep(&["admin", "--run", &path, "recoveries"])?;
    assert_eq!(String::from_utf8_lossy(&table.stdout).lines().count(), 4, "{table:?}");
    let inspect = place.everstep(&["admin", "--run", &path, "inspect", "expert.1.2"])?;
    assert!(String::from_utf8_lossy(&inspect.stdout).contains("micro-batches summed"), "{inspect:?}");
    let run = training.finish()?;
    let alone = place.train("alone", &["train.steps=900", "checkpoint.every=300", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}
