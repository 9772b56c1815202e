//! Faults that are no kills, on real processes: each costs time and no bit. A fixed share of what `make chaos-long` does in full.

use anyhow::Result;
use everstep_tests::{Place, events, metrics};

fn under(targets: &str, more: &str, steps: u32) -> Result<(Place, String)> {
    let place = Place::new()?;
    let plan = format!("seed = 11\nevery_ms = 700\nfault_ms = 900\nstop_ms = 900\n{more}\ntargets = {targets}\n");
    let steps = format!("train.steps={steps}");
    let set = [&steps[..], "checkpoint.every=5", "run.folder=faults"];
    let said = place.with_plan(&["chaos", "plan.toml", "tiny.toml"], &plan, &set)?;
    assert!(said.contains(" equal, 0 different") && said.contains("left behind: 0 processes, 0 "), "{said}");
    Ok((place, said))
}

/// Wires that are cut, work one way, lose and delay; a node that reaches nobody.
#[test]
fn bad_wires_change_no_bit() -> Result<()> {
    let targets = r#"["loss", "delay", "cut", "one-way", "isolate"]"#;
    let (place, said) = under(targets, "kills = 5", 500)?;
    assert!(said.contains("500 steps, 5 faults: 1 Cut, 1 OneWay, 1 Isolate, 1 Loss, 1 Delay"), "{said}");
    // Longer alone than a silent node is waited for.
    assert!(!events(&place.run("faults/chaos"), "node_dead")?.is_empty(), "the isolated node was given up");
    Ok(())
}

/// A node with a fifth of a core, one without memory, one that is stopped, a clock that is late.
#[test]
fn starved_nodes_change_no_bit() -> Result<()> {
    let (place, said) = under(r#"["cpu", "memory", "stop", "clock"]"#, "kills = 4", 400)?;
    assert!(said.contains("400 steps, 4 faults: 1 Stop, 1 Cpu, 1 Memory, 1 Clock"), "{said}");
    let late = metrics(&place.run("faults/chaos"))?.windows(2).any(|w| w[1].time + 3_000_000 < w[0].time);
    assert!(late, "the supervisor's clock went back by an hour");
    Ok(())
}

/// A store that is full, one that cannot be read while the job may want to go back, bits that flip in its files.
#[test]
fn a_bad_store_changes_no_bit() -> Result<()> {
    // Flips last: a chunk that all checkpoints share may be the one, and two nodes that end before the next checkpoint would be
    // the end of the job.
    let (place, said) = under(r#"["full", "unreadable", "flip-file", "flip-file"]"#, "kills = 4", 500)?;
    assert!(said.contains("500 steps, 4 faults: 1 Full, 1 Unreadable, 2 FlipFile"), "{said}");
    let run = place.run("faults/chaos");
    let fails = events(&run, "store_fails")?;
    assert!(
        fails.iter().any(|e| e["why"].to_string().contains("no storage space")),
        "the full store was told of: {fails:?}"
    );
    Ok(())
}

/// Faults for a job that runs already, compared with another run of it.
#[test]
fn chaos_attaches_to_a_running_job() -> Result<()> {
    let place = Place::new()?;
    let alone = place.train("alone", &["train.steps=900", "checkpoint.every=300", "job.nodes=1"])?;
    let training = place.start("run", &["train.steps=900", "checkpoint.every=300"])?;
    training.wait_for_step(20)?;
    let plan = |name: &str, targets: &str| {
        let text = format!("seed = 2\nkills = 3\nevery_ms = 900\nfault_ms = 700\ntargets = {targets}\n");
        std::fs::write(place.path().join(name), text)
    };
    plan("plan.toml", r#"["node", "one-way", "supervisor"]"#)?;
    plan("joins.toml", r#"["node", "join"]"#)?;
    let path = training.run.0.display().to_string();
    let refused = place.everstep(&["chaos", "joins.toml", "--attach", &path])?;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Join needs the launcher"), "{refused:?}");
    let done =
        place.everstep(&["chaos", "plan.toml", "--attach", &path, "--against", &alone.0.display().to_string()])?;
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{done:?}");
    assert!(
        said.contains("3 faults: 1 Node, 1 Supervisor, 1 OneWay") && said.contains(" equal, 0 different"),
        "{said}"
    );
    let run = training.finish()?;
    assert_eq!(everstep_tests::fingerprints(&run)?, everstep_tests::fingerprints(&alone)?);
    assert_eq!(std::fs::read_to_string(run.0.join("faults.jsonl"))?.lines().count(), 3);
    Ok(())
}

/// A job that commits nothing any more is ended, and what it hangs at is told.
#[test]
fn a_job_that_hangs_is_ended() -> Result<()> {
    let place = Place::new()?;
    // One node that is stopped for longer than the plan's patience: nobody takes over.
    let plan = "seed = 1\nkills = 2\nevery_ms = 500\nstop_ms = 60000\nhangs_s = 4\ntargets = [\"stop\"]\n";
    std::fs::write(place.path().join("plan.toml"), plan)?;
    let config = place.config().display().to_string();
    let set =
        ["train.steps=5000", "job.nodes=1", "recovery.mirrors=0", "run.folder=hangs", "data.paths=[\"text.txt\"]"];
    let set: Vec<&str> = set.iter().flat_map(|s| ["--set", s]).collect();
    let output = place.everstep(&[&["chaos", "plan.toml", &config][..], &set].concat())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("the job hangs: nothing was committed for 4 s"), "{said}");
    Ok(())
}
