//! A wire that is cut between two nodes, both of which reach the supervisor: real processes in network namespaces of their
//! own, with a router between them that begins to lose what one sends to the other. Needs the right to make namespaces.

use anyhow::{Context, Result};
use everstep_actors::milliseconds;
use everstep_tests::{Place, Process, Training, Wires, events, fingerprints, metrics, program, wait};
use std::process::Stdio;

/// C1, LI-1, SU-7: the job goes on without one of the two, which comes back when the wire does.
#[test]
fn a_cut_wire_is_survived() -> Result<()> {
    let place = Place::new()?;
    let wires = Wires::new(2)?;
    let set = ["train.steps=1500", "checkpoint.every=500", "job.nodes=3", "run.listen=10.213.1.1:0", "run.folder=run"];
    let everstep = program().display().to_string();
    let mut command = wires.within("r", &everstep);
    command.current_dir(place.path()).args([
        "train",
        "tiny.toml",
        "--nodes",
        "0",
        "--set",
        "data.paths=[\"text.txt\"]",
    ]);
    set.iter().for_each(|s| {
        command.args(["--set", s]);
    });
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let training = Training { run: place.run("run"), child };
    wait("the supervisor's address", || Ok(training.run.address().exists()))?;
    let address = std::fs::read_to_string(training.run.address())?;
    let node = |part: &str| -> Result<Process> {
        let mut command = wires.within(part, &everstep);
        command.args(["node", "--threads", "1", "--join", address.trim(), "--credentials"]);
        command.arg(training.run.credentials()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Process(command.spawn()?))
    };
    let _nodes = [node("r")?, node("n1")?, node("n2")?];
    training.wait_for_step(50)?;
    assert_eq!(events(&training.run, "node_joined")?.len(), 3);
    let began = milliseconds();
    wires.cut(1, 2, true)?;
    wait("the decision", || Ok(!events(&training.run, "node_dead")?.is_empty()))?;
    let dead = events(&training.run, "node_dead")?;
    assert!(dead[0]["why"].as_str().is_some_and(|why| why.starts_with("it has no link to node")), "{dead:?}");
    let took = dead[0]["time"].as_u64().context("a time")? - began;
    assert!(took < 1500, "{took} ms");
    let at = metrics(&training.run)?.last().map_or(0, |l| l.step);
    training.wait_for_step(at + 100)?;
    // It has come back, and waits for the wire.
    wait("its return", || Ok(events(&training.run, "node_joined")?.len() == 4))?;
    assert_eq!(events(&training.run, "node_dead")?.len(), 1);
    let moved = events(&training.run, "moved")?.len();
    wires.cut(1, 2, false)?;
    wait("its share of the work", || Ok(events(&training.run, "moved")?.len() > moved))?;
    assert_eq!(events(&training.run, "node_dead")?.len(), 1);
    let run = training.finish()?;
    let alone = place.train("alone", &["train.steps=1500", "checkpoint.every=500", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}
