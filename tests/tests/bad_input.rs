//! Bad input of any kind: one clear message that names what and where, an exit code that is not 0, and
//! nothing lost or half-written.

use anyhow::Result;
use everstep_tests::Place;
use std::net::UdpSocket;
use std::process::Output;

#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it should fail: {said}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "'{word}' is missing in: {said}");
    }
}

#[test]
fn a_wrong_configuration_is_named_with_its_line() -> Result<()> {
    let place = Place::new()?;
    let good = std::fs::read_to_string(place.config())?;
    let line_of = |key: &str| good.lines().position(|l| l.starts_with(key)).unwrap() + 1;
    for (from, to, line, words) in [
        ("seed = 1", "seed = 1\nstepz = 4", line_of("seed") + 1, vec!["stepz", "unknown field"]),
        ("steps = 24", "steps = \"many\"", line_of("steps"), vec!["steps", "expected u64"]),
        ("groups = 2", "groups = 3", line_of("groups = "), vec!["model.groups = 3", "does not divide"]),
        ("groups = 2", "groups = 8", line_of("groups = "), vec!["model.groups = 8", "more groups than"]),
        ("rope = 8", "rope = 7", line_of("rope"), vec!["model.rope = 7", "pairs"]),
        ("stages = 2", "stages = 9", line_of("stages"), vec!["job.stages = 9", "model.layers = 3"]),
    ] {
        assert!(good.contains(from), "{from}");
        std::fs::write(place.config(), good.replacen(from, to, 1))?;
        let output = place.try_train("run", &[])?;
        refused(&output, &["tiny.toml", &format!("line {line}")]);
        refused(&output, &words);
        assert!(!place.run("run").0.exists());
    }
    refused(&place.everstep(&["train", "missing.toml"])?, &["missing.toml", "No such file"]);
    Ok(())
}

#[test]
fn text_that_is_missing_or_empty_is_named() -> Result<()> {
    let place = Place::new()?;
    refused(&place.try_train("run", &["data.paths=[\"nowhere.txt\"]"])?, &["nowhere.txt", "No such file"]);
    std::fs::write(place.path().join("empty.txt"), "")?;
    refused(&place.try_train("run", &["data.paths=[\"empty.txt\"]"])?, &["empty.txt", "no text"]);
    std::fs::write(place.path().join("short.txt"), "short")?;
    refused(&place.try_train("run", &["data.paths=[\"short.txt\"]"])?, &["short.txt", "6 tokens", "33"]);
    std::fs::write(place.path().join("tokens.bin"), [1, 0, 2, 0])?;
    refused(&place.try_train("run", &["data.paths=[\"tokens.bin\"]"])?, &["tokens.bin", "tokens.idx", "missing"]);
    assert!(!place.run("run").0.exists());
    Ok(())
}

/// Without a GPU, or where none is visible.
#[test]
fn a_bench_of_the_gpu_says_what_is_missing() -> Result<()> {
    let place = Place::new()?;
    for what in ["gemm", "attention"] {
        let mut command = std::process::Command::new(everstep_tests::program());
        let output =
            command.args(["bench", what]).env("CUDA_VISIBLE_DEVICES", "").current_dir(place.path()).output()?;
        refused(&output, &["error: cuda:0: "]);
    }
    Ok(())
}

#[test]
fn a_port_in_use_and_a_folder_that_exists_are_named() -> Result<()> {
    let place = Place::new()?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let address = socket.local_addr()?.to_string();
    refused(&place.try_train("run", &[&format!("run.listen={address}")])?, &[&address, "in use"]);
    assert!(!place.run("run").0.exists());
    // A run folder that exists is not touched.
    place.train("run", &["job.nodes=1"])?;
    let before = std::fs::read(place.run("run").tokens(0))?;
    refused(&place.try_train("run", &[])?, &["run", "exists", "resume"]);
    assert_eq!(std::fs::read(place.run("run").tokens(0))?, before);
    refused(&place.everstep(&["resume", "nothing-here"])?, &["nothing-here", "no run folder"]);
    Ok(())
}

/// A truncated or flipped chunk is named, and the checkpoint before it is used.
#[test]
fn damaged_checkpoints_are_named_and_older_ones_used() -> Result<()> {
    let place = Place::new()?;
    let run = place.train("run", &["job.nodes=2"])?;
    let expected = everstep_tests::fingerprints(&run)?;
    let path = run.0.display().to_string();
    // One step back: the control log of a run that is not over, without its last commits.
    let manifest = run.checkpoints().join("manifests/24");
    let bytes = std::fs::read(&manifest)?;
    std::fs::write(&manifest, &bytes[..bytes.len() / 2])?;
    refused(&place.everstep(&["fingerprint", &path, "--step", "24"])?, &["manifests/24", "not a valid manifest"]);
    let output = place.everstep(&["resume", &path])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let refused_events = everstep_tests::events(&run, "checkpoint_refused")?;
    assert!(refused_events[0]["why"].as_str().unwrap().contains("manifests/24"), "{refused_events:?}");
    assert_eq!(everstep_tests::fingerprints(&run)?, expected, "steps done again are not written again");

    for (n, chunk) in std::fs::read_dir(run.checkpoints().join("chunks"))?.enumerate() {
        let chunk = chunk?.path();
        let mut bytes = std::fs::read(&chunk)?;
        if n % 2 == 0 {
            bytes.truncate(bytes.len() / 2);
        } else {
            bytes[0] ^= 1;
        }
        std::fs::write(chunk, bytes)?;
    }
    refused(&place.everstep(&["fingerprint", &path])?, &["chunk", "damaged", "expected"]);
    refused(&place.everstep(&["resume", &path])?, &["no checkpoint can be read", "damaged"]);
    Ok(())
}

/// A run that began without an average of its weights cannot get one later, nor lose it: said at once.
#[test]
fn a_state_of_other_parts_is_refused() -> Result<()> {
    let place = Place::new()?;
    for (name, began, goes_on) in [("without", "", "ema = 0.9"), ("with", "ema = 0.9", "")] {
        let set: Vec<String> = began.split_once(" = ").map(|(k, v)| format!("optimizer.{k}={v}")).into_iter().collect();
        let run = place.train(name, &set.iter().map(String::as_str).collect::<Vec<_>>())?;
        let config = std::fs::read_to_string(run.config())?;
        let lines = config.lines().filter(|l| began.is_empty() || !l.starts_with("ema"));
        let changed: Vec<&str> =
            lines.flat_map(|l| if l == "[optimizer]" { vec![l, goes_on] } else { vec![l] }).collect();
        std::fs::write(run.config(), changed.join("\n") + "\n")?;
        let path = run.0.display().to_string();
        refused(&place.everstep(&["resume", &path])?, &["checkpoint of step 24", "has the state of", "optimizer.ema"]);
    }
    Ok(())
}

/// One flipped bit in a chunk of the newest checkpoint: named, the one before is used, and what is done
/// again is stored whole.
#[test]
fn a_flipped_chunk_heals() -> Result<()> {
    let place = Place::new()?;
    let run = place.train("run", &["job.nodes=2"])?;
    let path = run.0.display().to_string();
    let expected = everstep_tests::fingerprints(&run)?;
    let newest = |p: &std::path::Path| p.metadata().and_then(|m| m.modified()).unwrap();
    let chunks: Vec<_> = std::fs::read_dir(run.checkpoints().join("chunks"))?.map(|c| c.unwrap().path()).collect();
    // The newest file belongs to the last checkpoint.
    let chunk = chunks.iter().max_by_key(|p| newest(p)).unwrap();
    let mut bytes = std::fs::read(chunk)?;
    bytes[1] ^= 4;
    std::fs::write(chunk, &bytes)?;
    let name = chunk.file_name().unwrap().to_string_lossy().into_owned();
    refused(&place.everstep(&["fingerprint", &path, "--step", "24"])?, &[&name, "damaged"]);
    let output = place.everstep(&["resume", &path])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let refusals = everstep_tests::events(&run, "checkpoint_refused")?;
    assert!(refusals[0]["why"].as_str().unwrap().contains(&name), "{refusals:?}");
    let output = place.everstep(&["fingerprint", &path, "--step", "24"])?;
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected[23]);
    Ok(())
}

/// A second process on a running run is refused, and the first is not disturbed.
#[test]
fn a_run_in_use_is_not_taken_by_another_process() -> Result<()> {
    let place = Place::new()?;
    let training = place.start("run", &["train.steps=300"])?;
    training.wait_for_step(20)?;
    let path = training.run.0.display().to_string();
    refused(&place.everstep(&["resume", &path])?, &[&path, "in use by another process"]);
    let output = place.everstep(&["fingerprint", &path, "--step", "16"])?;
    assert!(output.status.success() || String::from_utf8_lossy(&output.stderr).contains("not stored"), "{output:?}");
    let run = training.finish()?;
    assert_eq!(everstep_tests::fingerprints(&run)?.len(), 300);
    Ok(())
}

/// Numbers that are none: such a step changes only the step number, on any number of nodes, and the run
/// can be read and resumed.
#[test]
fn steps_that_are_not_finite_are_skipped() -> Result<()> {
    let place = Place::new()?;
    let wild = ["optimizer.lr=1000.0", "optimizer.lr_end=1000.0", "optimizer.warmup=0", "model.initial_std=1e30"];
    let with = |nodes: &'static str| [&wild[..], &[nodes]].concat();
    let run = place.train("run", &with("job.nodes=3"))?;
    assert!(!everstep_tests::events(&run, "skipped")?.is_empty(), "the numbers are wild enough");
    let lines = everstep_tests::metrics(&run)?;
    assert!(lines.iter().any(|l| !l.grad_norm.is_finite()));
    let skipped = lines.windows(2).filter(|w| w[0].fingerprint == w[1].fingerprint).count();
    assert!(skipped > 0, "a skipped step leaves the state as it was");
    assert_eq!(
        everstep_tests::fingerprints(&place.train("alone", &with("job.nodes=1"))?)?,
        everstep_tests::fingerprints(&run)?
    );
    let output = place.everstep(&["resume", &run.0.display().to_string()])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn a_manifest_of_another_job_is_refused() -> Result<()> {
    let place = Place::new()?;
    let ours = place.train("ours", &["job.nodes=1"])?;
    let theirs = place.train("theirs", &["job.nodes=1", "train.seed=9"])?;
    std::fs::copy(theirs.checkpoints().join("manifests/24"), ours.checkpoints().join("manifests/24"))?;
    let output = place.everstep(&["fingerprint", &ours.0.display().to_string(), "--step", "24"])?;
    refused(&output, &["manifests/24", "belongs to job"]);
    Ok(())
}

/// A node of another job is refused on both sides, garbage on the port changes nothing.
#[test]
fn strangers_and_garbage_do_not_disturb_a_job() -> Result<()> {
    let place = Place::new()?;
    place.train("other", &["job.nodes=1"])?;
    let training = place.start("run", &["train.steps=600", "checkpoint.every=300"])?;
    training.wait_for_step(10)?;
    let address = std::fs::read_to_string(training.run.address())?;
    let foreign = place.run("other").credentials().display().to_string();
    let output = place.everstep(&["node", "--join", &address, "--credentials", &foreign])?;
    refused(&output, &[&address, "another job"]);
    let missing = place.everstep(&["node", "--join", &address, "--credentials", "nowhere"])?;
    refused(&missing, &["nowhere", "No such file"]);
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    for n in 0..500u32 {
        let garbage: Vec<u8> = (0..1200u32).map(|i| (i.wrapping_mul(n.wrapping_add(7)) >> 3) as u8).collect();
        socket.send_to(&garbage[..(n as usize * 37) % 1200], &address)?;
    }
    let run = training.finish()?;
    assert!(!everstep_tests::events(&run, "stranger_refused")?.is_empty());
    assert!(everstep_tests::events(&run, "node_dead")?.is_empty());
    let alone = place.train("alone", &["train.steps=600", "checkpoint.every=300", "job.nodes=1"])?;
    assert_eq!(everstep_tests::fingerprints(&run)?, everstep_tests::fingerprints(&alone)?);
    Ok(())
}

/// No space: /dev/full cannot be used for a folder, so the store's folder is a file system with a limit.
#[test]
fn a_full_disk_ends_the_job_with_a_message_and_keeps_what_was_stored() -> Result<()> {
    let place = Place::new()?;
    let mount = place.path().join("small");
    std::fs::create_dir(&mount)?;
    let small = everstep_tests::SmallDisk::mount(&mount, "3m")?;
    let output = place.try_train("small/run", &["train.steps=2000", "checkpoint.every=4", "checkpoint.keep=50"])?;
    refused(&output, &["small/run", "No space left"]);
    let steps: Vec<_> = std::fs::read_dir(mount.join("run/checkpoints/manifests"))?.collect();
    assert!(!steps.is_empty(), "what was stored is there");
    drop(small);
    Ok(())
}
