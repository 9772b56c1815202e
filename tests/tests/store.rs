//! A store of checkpoints that is full: training goes on, and the checkpoints come when there is room.

use anyhow::{Result, bail};
use everstep_tests::{Place, SmallDisk, events, fingerprints, metrics, wait};

/// DESIGN 8: the store is on a disk of its own, which is too small, and grows while the job waits for its last checkpoint.
#[test]
fn a_full_store_does_not_stop_training() -> Result<()> {
    let place = Place::new()?;
    let set = ["train.steps=120", "checkpoint.every=10", "run.folder=run", "data.paths=[\"text.txt\"]"];
    let arguments = ["prepare", "tiny.toml"].into_iter().chain(set.iter().flat_map(|s| ["--set", s]));
    let output = place.everstep(&arguments.collect::<Vec<_>>())?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr));
    }
    let (run, store) = (place.run("run"), place.run("run").checkpoints());
    std::fs::create_dir(&store)?;
    let disk = SmallDisk::mount(&store, "600k")?;
    let training = place.resume("run", 2)?;
    training.wait_for_step(120)?;
    wait("words about the store", || Ok(!events(&run, "store_fails")?.is_empty()))?;
    let why = events(&run, "store_fails")?[0]["why"].to_string();
    assert!(why.contains("No space left") && why.contains("checkpoints"), "{why}");
    let path = run.0.display().to_string();
    let said = place.everstep(&["admin", "--run", &path, "inspect", "supervisor"])?;
    assert!(String::from_utf8_lossy(&said.stdout).contains("checkpoints wait: "), "{said:?}");
    assert!(training.nodes()?.len() == 2, "the job waits for its last checkpoint");
    disk.resize("64m")?;
    training.finish()?;
    assert!(!events(&run, "store_works")?.is_empty());
    assert_eq!(metrics(&run)?.len(), 120);
    assert!(store.join("manifests/120").exists());
    drop(disk);
    let alone = place.train("alone", &["train.steps=120", "checkpoint.every=10", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}
