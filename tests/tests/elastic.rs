//! Contracts C1, C3 and C6 while nodes come and go: a fixed share of what `make chaos-scale` does in full.

use anyhow::Result;
use everstep_tests::{Place, events, fingerprints, lives, metrics, signal, wait};
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// From one node to three and back to one, with a kill on the way: every fingerprint, every sample.
#[test]
fn a_job_grows_and_shrinks() -> Result<()> {
    let place = Place::new()?;
    let targets = r#"["join", "join", "node", "leave", "leave"]"#;
    let plan = format!("seed = 5\nkills = 5\nevery_ms = 900\ntargets = {targets}\n");
    let set = ["train.steps=700", "checkpoint.every=200", "job.nodes=1", "run.folder=scale"];
    let said = place.with_plan(&["chaos", "plan.toml", "tiny.toml"], &plan, &set)?;
    assert!(said.contains(" equal, 0 different") && said.contains("\n0 multiply-adds were done again"), "{said}");
    assert!(said.contains("ledger: "), "{said}");
    let run = place.run("scale/chaos");
    assert_eq!(events(&run, "node_left")?.len(), 2);
    assert_eq!(events(&run, "node_dead")?.len(), 1);
    Ok(())
}

/// LV-1: a drained node's process ends by itself when nothing lives on it, and nothing is recovered; so does one that gets
/// SIGTERM. Both are left out from then on.
#[test]
fn drained_nodes_end_and_are_not_started_again() -> Result<()> {
    let place = Place::new()?;
    let training = place.start("run", &["train.steps=900", "checkpoint.every=300"])?;
    training.wait_for_step(20)?;
    let path = training.run.0.display().to_string();
    let ask = |request: &[&str]| -> Result<String> {
        let output = place.everstep(&[&["admin", "--run", &path][..], request].concat())?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert!(ask(&["drain", "77"])?.contains("there is no node 77"));
    let said = ask(&["drain", "2"])?;
    assert!(said.contains("node 2 leaves"), "{said}");
    wait("the drained node's departure", || Ok(events(&training.run, "node_left")?.len() == 1))?;
    wait("its process's end", || Ok(training.nodes()?.len() == 2))?;
    assert!(!ask(&["tree"])?.contains("node 2"));
    let told = training.nodes()?[0];
    signal(told, Signal::TERM)?;
    wait("the told node's departure", || Ok(events(&training.run, "node_left")?.len() == 2))?;
    wait("its process's end", || Ok(!lives(told)))?;
    let at = metrics(&training.run)?.last().map_or(0, |l| l.step);
    training.wait_for_step(at + 30)?;
    assert_eq!(training.nodes()?.len(), 1);
    assert_eq!(events(&training.run, "node_joined")?.len(), 3);
    for kind in ["node_dead", "recovered", "rolled_back"] {
        assert_eq!(events(&training.run, kind)?, Vec::<serde_json::Value>::new());
    }
    let run = training.finish()?;
    let alone = place.train("alone", &["train.steps=900", "checkpoint.every=300", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}

/// C2 with `recovery.when_thin = "wait"`: nothing is committed in one failure domain; and a notice of preemption, a file that
/// somebody makes, is heard like SIGTERM.
#[test]
fn a_job_waits_until_its_state_is_safe() -> Result<()> {
    let place = Place::new()?;
    let set = ["train.steps=2000", "checkpoint.every=200", "job.nodes=1", "recovery.when_thin=wait"];
    let training = place.start("run", &set)?;
    let waits = |times| {
        wait("the wish for a node", || Ok(events(&training.run, "waiting")?.len() >= times))?;
        Ok::<_, anyhow::Error>(events(&training.run, "waiting")?[times - 1]["why"].to_string())
    };
    let why = waits(1)?;
    assert!(why.contains("would be safe in 1 failure domains, 2 are to have it"), "{why}");
    assert!(metrics(&training.run)?.is_empty());
    let notice = place.path().join("notice");
    let mut warned = training.join_with(&["--notice", &notice.display().to_string()])?;
    training.wait_for_step(20)?;
    assert!(warned.0.try_wait()?.is_none());
    std::fs::write(&notice, "")?;
    let why = waits(2)?;
    assert!(why.contains("nodes that are to leave stay until one with room comes"), "{why}");
    let at = metrics(&training.run)?.last().map_or(0, |l| l.step);
    training.wait_for_step(at + 20)?;
    let _other = training.join()?;
    wait("its departure", || Ok(events(&training.run, "node_left")?.len() == 1))?;
    wait("its end", || Ok(warned.0.try_wait()?.is_some()))?;
    assert!(warned.0.wait()?.success());
    let run = training.finish()?;
    assert!(metrics(&run)?.iter().all(|line| line.copies >= 2));
    let alone = place.train("alone", &["train.steps=2000", "checkpoint.every=200", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}

/// A node without a supervisor ends when it is told to: at once if it has nothing of the job, else when it is told again.
#[test]
fn a_node_without_a_job_ends_when_told() -> Result<()> {
    let place = Place::new()?;
    let training = place.start("run", &["train.steps=100000"])?;
    training.wait_for_step(5)?;
    let mut member = training.join()?;
    wait("its share of a step", || Ok(metrics(&training.run)?.last().is_some_and(|l| l.nodes == 4)))?;
    signal(training.child.id(), Signal::KILL)?;
    wait("the end of the job", || Ok(training.nodes()?.is_empty()))?;
    let mut stranger = training.join()?;
    // Both look for the supervisor, for a minute.
    std::thread::sleep(Duration::from_secs(1));
    assert!(member.0.try_wait()?.is_none() && stranger.0.try_wait()?.is_none());
    let began = Instant::now();
    [&stranger, &member].iter().try_for_each(|n| signal(n.0.id(), Signal::TERM))?;
    wait("the end of the stranger", || Ok(stranger.0.try_wait()?.is_some()))?;
    // Whoever has a part of the state hopes for a supervisor that takes it over.
    assert!(member.0.try_wait()?.is_none());
    signal(member.0.id(), Signal::TERM)?;
    wait("the end of the member", || Ok(member.0.try_wait()?.is_some()))?;
    assert!(member.0.wait()?.success() && stranger.0.wait()?.success());
    assert!(began.elapsed() < Duration::from_secs(20), "they looked for a minute");
    Ok(())
}

/// What failures cost is measured by what failed.
#[test]
fn recoveries_are_measured() -> Result<()> {
    let place = Place::new()?;
    let targets = r#"["stage", "expert", "reducer", "node", "supervisor"]"#;
    let plan = format!("seed = 5\nkills = 6\nevery_ms = 600\ntargets = {targets}\n");
    let set = ["train.steps=200", "checkpoint.every=50", "job.nodes=2", "job.pace=1e9", "run.folder=bench"];
    let bench = ["bench", "recovery", "--json", "--plan", "plan.toml", "--config", "tiny.toml"];
    let said = place.with_plan(&bench, &plan, &set)?;
    let lines: Vec<serde_json::Value> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(lines[0]["killed"], "all", "{said}");
    let goodput = lines.last().expect("a last line");
    assert_eq!((&goodput["bench"], &goodput["redone_by_survivors"]), (&"goodput".into(), &0.into()), "{said}");
    assert_eq!(goodput["fingerprints_equal"], 200, "{said}");
    Ok(())
}
