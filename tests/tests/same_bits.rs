//! Contract C1: the same bits on any number of nodes; and what a fingerprint is sensitive to.

use anyhow::Result;
use everstep_tests::{Place, fingerprints, metrics};

#[test]
fn any_number_of_nodes_gives_the_same_fingerprints() -> Result<()> {
    let place = Place::new()?;
    let alone = fingerprints(&place.train("n1", &["job.nodes=1"])?)?;
    assert_eq!(alone.len(), 24);
    for nodes in [2, 3, 5] {
        let name = format!("n{nodes}");
        let run = place.train(&name, &[&format!("job.nodes={nodes}")])?;
        assert_eq!(fingerprints(&run)?, alone, "{nodes} nodes");
    }
    // Other shards, other number of mirrors: places of state, which must not show.
    let run = place.train("shards", &["job.shards=5", "recovery.mirrors=2", "job.nodes=3"])?;
    assert_eq!(fingerprints(&run)?, alone, "other shards");
    // Other stages move layers between actors.
    let run = place.train("stages", &["job.stages=3"])?;
    assert_eq!(fingerprints(&run)?, alone, "other stages");
    Ok(())
}

#[test]
fn a_stored_step_has_the_reported_fingerprint_and_one_bit_changes_it() -> Result<()> {
    let place = Place::new()?;
    let run = place.train("run", &["job.nodes=2"])?;
    let path = run.0.display().to_string();
    let reported = fingerprints(&run)?;
    for step in [8usize, 16, 24] {
        let output = place.everstep(&["fingerprint", &path, "--step", &step.to_string()])?;
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout)?.trim(), reported[step - 1], "step {step}");
    }
    let missing = place.everstep(&["fingerprint", &path, "--step", "7"])?;
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("step 7 is not stored"));

    let other_seed = fingerprints(&place.train("seed", &["train.seed=2"])?)?;
    assert!(reported.iter().zip(&other_seed).all(|(a, b)| a != b), "another seed");

    let mut text = std::fs::read_to_string(place.path().join("text.txt"))?;
    text.replace_range(0..1, "X");
    std::fs::write(place.path().join("text.txt"), text)?;
    // The changed byte is in one sample of an epoch, and three epochs are not yet over by then.
    let other_text = fingerprints(&place.train("text", &["train.steps=110"])?)?;
    let same_text_long = {
        std::fs::write(place.path().join("text.txt"), everstep_tests::text(40_000))?;
        fingerprints(&place.train("long", &["train.steps=110"])?)?
    };
    assert_ne!(other_text.last(), same_text_long.last(), "another sample");
    Ok(())
}

#[test]
fn work_is_spread_over_the_nodes() -> Result<()> {
    let place = Place::new()?;
    let run = place.train("run", &["job.nodes=3", "train.steps=100"])?;
    let lines = metrics(&run)?;
    let total = |node: &str| lines.iter().map(|l| l.operations.get(node).copied().unwrap_or(0)).sum::<u64>();
    let work: Vec<u64> = ["1", "2", "3"].iter().map(|n| total(n)).collect();
    let (least, most) = (work.iter().min().unwrap(), work.iter().max().unwrap());
    // A node without stages, experts or reducers would have done nothing.
    assert!(*least > 0 && most < &(2 * least), "multiply-adds by node: {work:?}");
    Ok(())
}
