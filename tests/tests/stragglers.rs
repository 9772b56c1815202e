//! A node that is slow: nothing of it fails, and every step waits for it.

use anyhow::Result;
use everstep_tests::{Place, events, fingerprints, lives, metrics, signal, wait};
use rustix::process::Signal;
use std::time::Duration;

/// SP-2: it is named, and has less to do after that; the weights are the same bits.
#[test]
fn a_slow_node_is_named_and_relieved() -> Result<()> {
    let place = Place::new()?;
    let set = ["train.steps=100000", "checkpoint.every=1000", "job.nodes=2", "recovery.relieve=true", "job.pace=2e8"];
    // The learning rate of a step does not depend on how many there are.
    let set = [&set[..], &["optimizer.decay_steps=1000"]].concat();
    let training = place.start("run", &set)?;
    training.wait_for_step(5)?;
    let third = training.join()?;
    wait("its share of a step", || Ok(metrics(&training.run)?.last().is_some_and(|l| l.nodes == 3)))?;
    // It runs for a quarter of the time; it is never silent for long enough to be taken for dead.
    let pid = third.0.id();
    let slowed = std::thread::spawn(move || {
        while lives(pid) {
            for (what, milliseconds) in [(Signal::STOP, 60), (Signal::CONT, 20)] {
                if signal(pid, what).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(milliseconds));
            }
        }
    });
    wait("its name", || Ok(!events(&training.run, "node_slow")?.is_empty()))?;
    let named = &events(&training.run, "node_slow")?[0];
    assert_eq!(named["node"], 3, "{named}");
    assert!(named["percent"].as_u64() >= Some(200), "{named}");
    let moved =
        || Ok(events(&training.run, "moved")?.last().is_some_and(|e| e["time"].as_u64() >= named["time"].as_u64()));
    wait("what it is relieved of", moved)?;
    assert!(events(&training.run, "node_dead")?.is_empty());
    let steps = metrics(&training.run)?.len();
    training.wait_for_step(steps as u64 + 5)?;
    signal(training.child.id(), Signal::TERM)?;
    let run = training.run.clone();
    training.child.wait_with_output()?;
    drop(third);
    slowed.join().expect("it ends with the process");
    let ours = fingerprints(&run)?;
    let alone =
        place.train("alone", &[&format!("train.steps={}", ours.len()), "job.nodes=1", "optimizer.decay_steps=1000"])?;
    assert_eq!(ours, fingerprints(&alone)?);
    Ok(())
}
