//! Checkpoints in an object store: a real server that speaks S3's protocol, which fails in every way there is.

use anyhow::{Context, Result};
use everstep_tests::{Bucket, Door, Place, events, fingerprints, metrics, signal, wait};
use rustix::process::Signal;

const STORE: &str = "checkpoint.store=s3://bucket/jobs";

fn place(bucket: &Bucket) -> Result<Place> {
    let mut place = Place::new()?;
    place.set_environment(bucket.environment());
    Ok(place)
}

/// A job whose machine is lost goes on from the bucket, with the same bits; what did not change is not written again.
#[test]
fn a_job_goes_on_from_an_object_store() -> Result<()> {
    let bucket = Bucket::start()?;
    let place = place(&bucket)?;
    let training = place.start("run", &["train.steps=60", "checkpoint.every=10", STORE])?;
    wait("two checkpoints", || Ok(events(&training.run, "checkpoint_stored")?.len() >= 2))?;
    for (pid, _) in training.children()? {
        signal(pid, Signal::KILL)?;
    }
    signal(training.child.id(), Signal::KILL)?;
    let run = training.run.clone();
    training.child.wait_with_output()?;
    assert!(!run.checkpoints().join("chunks").exists(), "chunks are in the bucket alone");
    let run_again = place.resume("run", 2)?.finish()?;
    assert_eq!(metrics(&run_again)?.len(), 60);
    // What other programs read, and what is written of a state that is there already: nothing.
    let path = run.0.display().to_string();
    let said = place.everstep(&["fingerprint", &path])?;
    let last = fingerprints(&run)?.pop().unwrap_or_default();
    assert!(String::from_utf8_lossy(&said.stdout).contains(&last), "{said:?}");
    let written = bucket.chunks();
    place.resume("run", 2)?.finish()?;
    assert!(written > 0 && bucket.chunks() == written);
    let alone = place.train("alone", &["train.steps=60", "checkpoint.every=10", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}

/// DESIGN 8: a store that is slow, full or out of reach does not stop training; what it missed comes when it is well.
#[test]
fn a_store_that_fails_does_not_stop_training() -> Result<()> {
    let bucket = Bucket::start()?;
    let place = place(&bucket)?;
    let training = place.start("run", &["train.steps=400", "checkpoint.every=10", "job.pace=2e9", STORE])?;
    training.wait_for_step(20)?;
    for (door, words) in [(Door::Full, "507"), (Door::Shut, "error sending request")] {
        let fails = events(&training.run, "store_fails")?.len();
        let step = metrics(&training.run)?.len() as u64;
        bucket.door(door);
        training.wait_for_step(step + 40)?;
        let told = |times| {
            let run = &training.run;
            move || Ok(events(run, "store_fails")?.len() > fails + times)
        };
        wait("words about the store", told(0))?;
        let why = events(&training.run, "store_fails")?[fails]["why"].to_string();
        assert!(why.contains("s3://bucket/jobs/") && why.contains(words), "{why}");
        if door == Door::Shut {
            // SU-9: nor does a new supervisor wait for it.
            let supervisor = training.children()?.into_iter().find(|(_, line)| line.contains("\0supervisor\0"));
            signal(supervisor.context("a supervisor")?.0, Signal::KILL)?;
            let step = metrics(&training.run)?.len() as u64;
            training.wait_for_step(step + 40)?;
            assert_eq!(events(&training.run, "supervisor_restarted")?.len(), 1);
            wait("its words about the store", told(1))?;
        }
        bucket.door(Door::Open);
        wait("the store to work again", || Ok(events(&training.run, "store_works")?.len() > fails))?;
    }
    bucket.door(Door::Slow);
    let step = metrics(&training.run)?.len() as u64;
    training.wait_for_step(step + 40)?;
    bucket.door(Door::Open);
    let run = training.finish()?;
    let stored = events(&run, "checkpoint_stored")?;
    assert_eq!(stored.last().map(|e| e["step"].as_u64()), Some(Some(400)));
    let alone = place.train("alone", &["train.steps=400", "checkpoint.every=10", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}

/// A bucket that is not there is named before anything is trained.
#[test]
fn a_bucket_that_is_not_there_is_named() -> Result<()> {
    let bucket = Bucket::start()?;
    let place = place(&bucket)?;
    let output = place.try_train("run", &["train.steps=5", "checkpoint.store=s3://other/jobs"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("s3://other/jobs/") && said.contains("NoSuchBucket"), "{said}");
    Ok(())
}
