//! Text of many kinds, mixed, resumed elsewhere; and what is wrong with it, said clearly.

use anyhow::{Result, ensure};
use everstep_tests::{Place, fingerprints, signal, text};
use rustix::process::Signal;
use std::path::Path;
use std::process::Output;

/// Three sources with shares of 3 : 2 : 1 whose epochs end at different steps.
fn sources(place: &Place) -> Result<String> {
    let lines: String = text(9_000).lines().map(|l| serde_json::json!({ "text": l }).to_string() + "\n").collect();
    std::fs::write(place.path().join("second.jsonl"), lines)?;
    std::fs::write(place.path().join("third.txt"), text(2_000).to_uppercase())?;
    Ok("data.sources=[{paths=[\"text.txt\"],weight=3},{paths=[\"second.jsonl\"],weight=2},{paths=[\"third.txt\"]}]"
        .to_owned())
}

fn samples(place: &Place, run: &Path) -> Result<Vec<u8>> {
    let output = place.everstep(&["samples", &run.display().to_string(), "--steps", "1..61"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// The same samples and the same fingerprints: killed in the middle of an epoch of every source, resumed
/// on more nodes, killed again, resumed on one.
#[test]
fn a_mix_of_three_sources_goes_on_anywhere() -> Result<()> {
    let mut place = Place::new()?;
    place.set_data(&sources(&place)?);
    let steps = "train.steps=60";
    let alone = place.train("alone", &[steps, "job.nodes=1"])?;
    let mut training = place.start("run", &[steps, "job.nodes=2"])?;
    training.wait_for_step(11)?;
    signal(training.child.id(), Signal::KILL)?;
    training.child.wait()?;
    let mut more = place.resume("run", 4)?;
    more.wait_for_step(30)?;
    signal(more.child.id(), Signal::KILL)?;
    more.child.wait()?;
    let run = place.resume("run", 1)?.finish()?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    let all = samples(&place, &run.0)?;
    assert_eq!(all, samples(&place, &alone.0)?);
    // 60 steps of 12 sequences of 32: more than 8 epochs of the third source, 3 of the second, 1 of the first.
    let upper = String::from_utf8(all)?.lines().filter(|l| l.contains("[69,88,80") || l.contains(",69,88,80,")).count();
    assert!(upper > 0, "the third source is among the samples");
    Ok(())
}

fn refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(words.iter().all(|w| said.contains(w)), "expected {words:?} in: {said}");
    assert!(!said.contains("panicked"), "{said}");
}

/// Each broken text is named with its file and line, and leaves nothing behind.
#[test]
fn broken_text_is_named_by_file_and_line() -> Result<()> {
    let mut place = Place::new()?;
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/tokenizer.json").display().to_string();
    let utf8 = b"fine\nalso fine\nnot \xff fine\n";
    std::fs::write(place.path().join("latin.txt"), utf8)?;
    std::fs::write(place.path().join("gap.jsonl"), "{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n")?;
    std::fs::write(place.path().join("column.parquet"), "no Parquet at all")?;
    // A gigabyte without a line's end, which takes no room on the disk.
    std::fs::File::create(place.path().join("long.jsonl"))?.set_len(1 << 30)?;
    std::fs::write(place.path().join("packed.jsonl.gz"), "not packed")?;
    let token = [format!("data.tokenizer=\"{tokenizer}\""), "model.vocabulary=300".to_owned()];
    let small = [format!("data.tokenizer=\"{tokenizer}\""), "model.vocabulary=256".to_owned()];
    for (file, set, words) in [
        ("latin.txt", &token[..], vec!["latin.txt", "line 3 is not UTF-8"]),
        ("gap.jsonl", &[], vec!["gap.jsonl", "line 2 is empty"]),
        ("long.jsonl", &[], vec!["long.jsonl", "line 1 has more than 67108864 bytes"]),
        ("column.parquet", &[], vec!["column.parquet", "not a Parquet file"]),
        ("packed.jsonl.gz", &[], vec!["packed.jsonl.gz", "line 1"]),
        ("text.txt", &small[..], vec!["tokenizer.json", "model.vocabulary is 256", "expected at least 260"]),
        ("text.txt", &token[..1], vec!["data.tokenizer", "model.vocabulary"]),
    ] {
        place.set_data(&format!("data.paths=[\"{file}\"]"));
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        refused(&place.try_train("run", &set)?, &words);
        assert!(!place.run("run").0.exists());
        let left: Vec<_> = std::fs::read_dir(place.path())?.flatten().map(|e| e.file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().contains(".new")), "{left:?}");
        let cache = place.path().join("cache");
        let cached =
            std::fs::read_dir(cache).map_or(0, |d| d.flatten().filter(|e| e.file_name() != "CACHEDIR.TAG").count());
        assert_eq!(cached, 0, "{file}");
    }
    // With a tokenizer that fits, the same model trains.
    place.set_data("data.paths=[\"text.txt\"]");
    let set: Vec<&str> = token.iter().map(String::as_str).collect();
    let run = place.train("good", &set)?;
    imports_take_the_folders_tokenizer(&place, &run.0.display().to_string())
}

/// What was exported is imported with its own tokenizer, named or not, and with what is said of it; with no other.
fn imports_take_the_folders_tokenizer(place: &Place, run: &str) -> Result<()> {
    let at = |name: &str| place.path().join(name).display().to_string();
    let said = |arguments: &[&str]| -> Result<String> {
        let output = place.everstep(arguments)?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    said(&["export", run, &at("out")])?;
    let words = r#"{ "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}" }"#;
    std::fs::write(at("out/tokenizer_config.json"), words)?;
    let config = place.config().display().to_string();
    let text = "data.paths=[\"text.txt\"]".to_owned();
    let sets = [text, "model.vocabulary=300".to_owned(), format!("run.folder={}", at("again"))];
    let out = at("out");
    let import = |more: &[&str]| {
        let sets = sets.iter().map(String::as_str).chain(more.iter().copied()).flat_map(|set| ["--set", set]);
        place.everstep(&["import", &out, &config].into_iter().chain(sets).collect::<Vec<_>>())
    };
    let other = std::fs::read_to_string(at("out/tokenizer.json"))?.replacen("\"version\":", "\"version \":", 1);
    std::fs::write(at("other.json"), other)?;
    let refused = import(&[&format!("data.tokenizer={:?}", at("other.json"))])?;
    let words_of = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && words_of.contains("the model's own is"), "{words_of}");
    let output = import(&[])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said(&["samples", &at("again"), "--steps", "1..3"])?, said(&["samples", run, "--steps", "1..3"])?);
    said(&["export", &at("again"), &at("out-again"), "--step", "0"])?;
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(
            std::fs::read_to_string(at("out-again").clone() + "/" + file)?,
            std::fs::read_to_string(at("out") + "/" + file)?
        );
    }
    Ok(())
}

/// Each broken checkpoint is named with its file and tensor, and no run folder is made.
#[test]
fn broken_checkpoints_are_named_by_file_and_tensor() -> Result<()> {
    let place = Place::new()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/fixtures/plain");
    let read = |name: &str| std::fs::read(source.join(name));
    let (good, config) = (read("model.safetensors")?, String::from_utf8(read("config.json")?)?);
    let renamed = |from: &str, to: &str| {
        let header = u64::from_le_bytes(good[..8].try_into().expect("8 bytes")) as usize;
        let text = String::from_utf8_lossy(&good[8..8 + header]).replacen(from, to, 1);
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &good[8 + header..]].concat()
    };
    let cases: Vec<(&str, Vec<u8>, String, Vec<&str>)> = vec![
        ("short", good[..good.len() - 100].to_vec(), config.clone(), vec!["model.safetensors is truncated"]),
        ("header", good[..40].to_vec(), config.clone(), vec!["model.safetensors", "header"]),
        ("nothing", Vec::new(), config.clone(), vec!["model.safetensors", "too short"]),
        (
            "shape",
            renamed("[24,32]", "[32,24]"),
            config.clone(),
            vec!["model.safetensors", "has shape [32, 24], expected 24 x 32"],
        ),
        (
            "missing",
            renamed("model.norm.weight", "model.other.weight"),
            config.clone(),
            vec!["1 tensors are missing: model.norm.weight"],
        ),
        (
            "size",
            good.clone(),
            config.replace("\"hidden_size\": 32", "\"hidden_size\": 64"),
            vec!["config.json", "hidden_size is 64, the configuration has 32"],
        ),
        ("json", good.clone(), "{".to_owned(), vec!["config.json", "not JSON"]),
        ("kind", good.clone(), config.replace("\"silu\"", "\"gelu\""), vec!["hidden_act is \"gelu\", only \"silu\""]),
    ];
    for (name, weights, config, words) in cases {
        let folder = place.path().join(name);
        std::fs::create_dir(&folder)?;
        std::fs::write(folder.join("model.safetensors"), weights)?;
        std::fs::write(folder.join("config.json"), config)?;
        std::fs::write(folder.join("run.toml"), read("run.toml")?)?;
        std::fs::write(folder.join("text.txt"), read("text.txt")?)?;
        let toml = folder.join("run.toml").display().to_string();
        let data = format!("data.paths=[\"{}\"]", folder.join("text.txt").display());
        let run = format!("run.folder={}", place.run("run").0.display());
        let output =
            place.everstep(&["import", &folder.display().to_string(), &toml, "--set", &data, "--set", &run])?;
        refused(&output, &words);
        assert!(!place.run("run").0.exists(), "{name}");
    }
    Ok(())
}

/// A node that cannot open the run's files gets the text over the wire.
#[test]
fn text_travels_to_nodes_that_do_not_have_it() -> Result<()> {
    let place = Place::new()?;
    let expected = place.train("alone", &["job.nodes=1"])?;
    let training = place.start("run", &["job.nodes=1"])?;
    // The supervisor has it mapped; the node that starts after it finds another name.
    everstep_tests::wait("the supervisor", || Ok(training.run.address().exists()))?;
    let hidden = training.run.0.join("hidden");
    std::fs::rename(training.run.data(), &hidden)?;
    let run = training.finish()?;
    assert_eq!(fingerprints(&run)?, fingerprints(&expected)?);
    Ok(())
}
