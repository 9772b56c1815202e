//! What a trained model is used for: text, perplexity, pictures.

use anyhow::{Result, ensure};
use everstep_tests::{Place, fingerprints, program, text};
use serde_json::Value;
use std::process::Command;

fn said(place: &Place, arguments: &[&str]) -> Result<String> {
    let output = place.everstep(arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Evaluations while a job trains change nothing about it, and are those of its checkpoints.
#[test]
fn held_out_text_is_evaluated_beside_the_job() -> Result<()> {
    let mut place = Place::new()?;
    std::fs::write(place.path().join("held.txt"), text(50_000).split_off(41_000))?;
    let plain = place.train("plain", &[])?;
    let eval = "data.eval={paths=[\"held.txt\"],every=8,sequences=10}";
    let run = place.train("run", &[eval])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&plain)?);
    let lines = std::fs::read_to_string(run.evals())?;
    let lines: Vec<Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let steps: Vec<u64> = lines.iter().filter_map(|l| l["step"].as_u64()).collect();
    assert_eq!(steps, [8, 16, 24]);
    let path = run.0.display().to_string();
    let last: Value = serde_json::from_str(&said(&place, &["eval", &path, "--json"])?)?;
    assert_eq!(last, lines[2]);
    assert_eq!(last["tokens"], 320);
    let loss = |n: usize| lines[n]["loss"].as_f64().unwrap_or(f64::NAN);
    assert!(loss(2) < loss(0), "{lines:?}");
    // Other text, named on the command line.
    let other = said(&place, &["eval", &path, "--data", "text.txt", "--step", "16"])?;
    assert!(other.starts_with("step 16: loss ") && other.contains("perplexity"), "{other}");
    let missing = place.everstep(&["eval", &plain.0.display().to_string()])?;
    assert!(String::from_utf8_lossy(&missing.stderr).contains("no held-out text"));
    place.set_data("data.paths=[\"text.txt\"]");
    Ok(())
}

/// The same seed gives the same text; TensorBoard's file has every step once, also over a resume.
#[test]
fn text_is_written_and_steps_are_drawn() -> Result<()> {
    let place = Place::new()?;
    let run = place.train("run", &[])?;
    let path = run.0.display().to_string();
    let write =
        |more: &[&str]| said(&place, &[&["generate", &path, "--prompt", "expert ", "--tokens", "40"], more].concat());
    let one = write(&["--seed", "3"])?;
    assert!(one.starts_with("expert ") && one.len() > 20, "{one}");
    assert_eq!(one, write(&["--seed", "3"])?);
    assert_ne!(one, write(&["--seed", "4"])?);
    assert_eq!(write(&["--temperature", "0"])?, write(&["--temperature", "0", "--seed", "9"])?);
    let refused = place.everstep(&["generate", &path, "--top-p", "0"])?;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--top-p 0: expected above 0"));
    let files: Vec<_> = std::fs::read_dir(run.0.join("tensorboard"))?.flatten().map(|e| e.path()).collect();
    assert_eq!(files.len(), 1);
    let bytes = std::fs::read(&files[0])?;
    let tag = b"gradient norm";
    assert_eq!(bytes.windows(tag.len()).filter(|w| w == tag).count(), 24);
    // The run is over: nothing more is drawn.
    said(&place, &["resume", &path])?;
    assert_eq!(std::fs::read_dir(run.0.join("tensorboard"))?.count(), 1);
    Ok(())
}

/// Each precision trains whole jobs with equal bits for any number of nodes.
#[test]
fn every_precision_has_the_same_bits_on_any_number_of_nodes() -> Result<()> {
    let place = Place::new()?;
    for precision in ["bf16", "fp8"] {
        let set = format!("train.precision={precision}");
        let alone = place.train(&format!("{precision}-alone"), &[&set, "model.mtp=1", "job.nodes=1"])?;
        let many = place.train(&format!("{precision}-many"), &[&set, "model.mtp=1", "job.nodes=3"])?;
        assert_eq!(fingerprints(&many)?, fingerprints(&alone)?, "{precision}");
    }
    Ok(())
}

/// The average of the weights is state like any other, and changes nothing about the weights.
#[test]
fn an_average_of_the_weights_is_kept_and_used() -> Result<()> {
    let place = Place::new()?;
    let plain = place.train("plain", &[])?;
    let alone = place.train("alone", &["optimizer.ema=0.9", "job.nodes=1"])?;
    let many = place.train("many", &["optimizer.ema=0.9", "job.nodes=3"])?;
    assert_eq!(fingerprints(&many)?, fingerprints(&alone)?);
    let losses = |run| Ok::<_, anyhow::Error>(everstep_tests::metrics(run)?.iter().map(|l| l.loss).collect::<Vec<_>>());
    assert_eq!(losses(&many)?, losses(&plain)?, "the weights are trained as without it");
    let [plain, many] = [&plain, &many].map(|run| run.0.display().to_string());
    let stored = said(&place, &["fingerprint", &many])?;
    assert_eq!(Some(stored.trim()), fingerprints(&alone)?.last().map(String::as_str));
    let loss = |run: &str, more: &[&str]| -> Result<f64> {
        let found = said(&place, &[&["eval", run, "--data", "text.txt", "--json"], more].concat())?;
        serde_json::from_str::<Value>(&found)?["loss"].as_f64().ok_or_else(|| anyhow::anyhow!("{found}"))
    };
    assert_eq!(loss(&many, &[])?, loss(&plain, &[])?);
    let averaged = loss(&many, &["--ema"])?;
    assert!(averaged != loss(&many, &[])? && averaged.is_finite(), "{averaged}");
    // Exported, it is what another run begins with.
    let (folder, again) = (place.path().join("averaged"), place.path().join("again").display().to_string());
    let folder = folder.display().to_string();
    said(&place, &["export", &many, &folder, "--ema", "--precision", "f32"])?;
    let config = place.config().display().to_string();
    said(&place, &["import", &folder, &config, "--set", &format!("run.folder={again}")])?;
    assert_eq!(loss(&again, &[])?, averaged);
    let refused = place.everstep(&["eval", &plain, "--data", "text.txt", "--ema"])?;
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(words.contains("has no average: the job keeps none (optimizer.ema)"), "{words}");
    Ok(())
}

/// The published model is planned, and its export listed, in an address space of a gigabyte.
#[test]
fn the_published_model_is_planned_in_little_memory() -> Result<()> {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/deepseek-v3.toml");
    let plan = |more: &str| -> Result<String> {
        let script = format!("ulimit -v {}; exec \"$0\" plan \"$1\" {more}", 1_000_000_000 / 1024);
        let output = Command::new("sh").args(["-c", &script]).arg(program()).arg(config).output()?;
        ensure!(output.status.success(), "{more}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    // 671 billion parameters, and a module of multi-token prediction.
    assert!(plan("")?.contains("682636487424  in all"));
    let list = plan("--inventory fp8")?;
    assert!(list.ends_with("91991 tensors, 688574839360 bytes\n"));
    assert!(list.contains("model.layers.60.mlp.experts.255.down_proj.weight [7168, 2048] F8_E4M3 14680064\n"));
    assert!(list.contains("model.layers.60.mlp.experts.255.down_proj.weight_scale_inv [56, 16] F32 3584\n"));
    Ok(())
}
