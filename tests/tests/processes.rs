//! `everstep train` leaves no process behind, however it ends.

use anyhow::Result;
use everstep_tests::{Place, lives, signal, wait};
use rustix::process::Signal;

fn nothing_is_left_after(how: Signal) -> Result<()> {
    let place = Place::new()?;
    let mut training = place.start("run", &["train.steps=100000"])?;
    training.wait_for_step(5)?;
    let children: Vec<u32> = training.children()?.into_iter().map(|(pid, _)| pid).collect();
    assert_eq!(children.len(), 4, "a supervisor and three nodes");
    // A stopped process must not be left either.
    signal(children[1], Signal::STOP)?;
    signal(training.child.id(), how)?;
    let status = training.child.wait()?;
    assert!(!status.success());
    wait("the end of all processes", || Ok(!children.iter().any(|pid| lives(*pid))))
}

#[test]
fn nothing_is_left_after_terminate() -> Result<()> {
    nothing_is_left_after(Signal::TERM)
}

#[test]
fn nothing_is_left_after_interrupt() -> Result<()> {
    nothing_is_left_after(Signal::INT)
}

#[test]
fn nothing_is_left_after_a_kill_of_the_launcher() -> Result<()> {
    nothing_is_left_after(Signal::KILL)
}

#[test]
fn an_interrupted_run_goes_on_with_resume() -> Result<()> {
    let place = Place::new()?;
    let mut training = place.start("run", &["train.steps=300"])?;
    training.wait_for_step(30)?;
    signal(training.child.id(), Signal::TERM)?;
    training.child.wait()?;
    let output = place.everstep(&["resume", &training.run.0.display().to_string()])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let alone = place.train("alone", &["train.steps=300", "job.nodes=1"])?;
    assert_eq!(everstep_tests::fingerprints(&training.run)?, everstep_tests::fingerprints(&alone)?);
    Ok(())
}
