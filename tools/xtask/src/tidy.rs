//! House rules that no lint knows: the arrows between crates, lengths of files, numbered invariants,
//! what cores must not use, and where unsafe code may be.

use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const LINES_MAX: usize = 500;

/// Who may depend on whom, within the workspace.
const ARROWS: &[(&str, &[&str])] = &[
    ("everstep-kernels", &[]),
    ("everstep-transport", &[]),
    ("everstep-checkpoint", &[]),
    ("everstep-actors", &["everstep-checkpoint", "everstep-kernels", "everstep-transport"]),
    ("everstep", &["everstep-actors", "everstep-checkpoint", "everstep-kernels", "everstep-transport"]),
    ("everstep-tests", &["everstep-actors", "everstep-checkpoint", "everstep-kernels", "everstep-transport"]),
    ("xtask", &[]),
];

/// Files under `actors/src` that may use a runtime, a clock or a file: the shells.
const SHELLS: &str = "actors/src/shell/";
/// What a core may not name.
const NOT_IN_CORES: &[&str] =
    &["tokio::", "ractor::", "std::fs", "UdpSocket", "SystemTime", "Instant::now", "std::thread"];
/// Where `unsafe` may be.
const UNSAFE: &[&str] = &["kernels/src/", "transport/src/rdma", "checkpoint/src/mapped.rs"];

pub(crate) fn check() -> Result<()> {
    let mut wrong = arrows()?;
    let files = sources()?;
    for path in &files {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        wrong.extend(check_file(&path.to_string_lossy(), &text));
    }
    wrong.extend(invariants(&files)?);
    if wrong.is_empty() {
        return Ok(());
    }
    for line in &wrong {
        eprintln!("tidy: {line}");
    }
    bail!("{} rules are broken", wrong.len())
}

/// Rust files that git knows.
fn sources() -> Result<Vec<PathBuf>> {
    let output = Command::new("git").args(["ls-files", "*.rs"]).output().context("cannot run git")?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(PathBuf::from).filter(|p| p.exists()).collect())
}

fn arrows() -> Result<Vec<String>> {
    let output = Command::new("cargo").args(["metadata", "--no-deps", "--format-version", "1"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().context("packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ARROWS.iter().find(|(n, _)| *n == name) else {
            wrong.push(format!("package {name} is not in the list of arrows"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            let ours = ARROWS.iter().any(|(n, _)| *n == on);
            if ours && !allowed.contains(&on) {
                wrong.push(format!("{name} depends on {on}: no arrow goes that way"));
            }
            if on == "ractor" && name != "everstep-actors" {
                wrong.push(format!("{name} depends on ractor: only everstep-actors knows it"));
            }
        }
    }
    Ok(wrong)
}

fn check_file(path: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        wrong.push(format!("{path} has {lines} lines, more than {LINES_MAX}: split it by role"));
    }
    if !text.starts_with("//!") {
        wrong.push(format!("{path} does not start with a header that says what it owns"));
    }
    let tidy_itself = path.ends_with("xtask/src/tidy.rs");
    if !tidy_itself {
        for mark in ["TODO", "FIXME", "XXX", "unimplemented!", "todo!("] {
            if text.contains(mark) {
                wrong.push(format!("{path} holds {mark}"));
            }
        }
        if text.contains("unbounded_channel") {
            wrong.push(format!("{path} has an unbounded channel"));
        }
        if text.contains("unsafe {") && !UNSAFE.iter().any(|p| path.starts_with(p)) {
            wrong.push(format!("{path} has unsafe code outside {UNSAFE:?}"));
        }
    }
    let core = path.starts_with("actors/src/") && !path.starts_with(SHELLS);
    for word in NOT_IN_CORES.iter().filter(|w| core && text.contains(**w)) {
        wrong.push(format!("{path} is a core and names {word}"));
    }
    wrong
}

/// Names like `ST-1` in `text`.
fn names(text: &str) -> BTreeSet<String> {
    let is_name = |word: &&str| {
        word.split_once('-').is_some_and(|(letters, digits)| {
            letters.len() == 2
                && letters.bytes().all(|b| b.is_ascii_uppercase())
                && !digits.is_empty()
                && digits.bytes().all(|b| b.is_ascii_digit())
        })
    };
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').filter(is_name).map(str::to_owned).collect()
}

/// Every invariant of a header is cited by a test, in its own file or in `tests/`.
fn invariants(files: &[PathBuf]) -> Result<Vec<String>> {
    let (mut stated, mut cited) = (Vec::new(), BTreeSet::new());
    for path in files {
        let text = std::fs::read_to_string(path)?;
        let header: String = text.lines().take_while(|l| l.starts_with("//!")).map(|l| format!("{l}\n")).collect();
        let shown = path.to_string_lossy();
        stated.extend(
            names(&header).into_iter().filter(|n| header.contains(&format!("- {n}:"))).map(|n| (shown.to_string(), n)),
        );
        let tests = if is_test(path) { text.as_str() } else { text.split_once("#[cfg(test)]").map_or("", |(_, t)| t) };
        cited.extend(names(tests));
    }
    let wrong = stated.into_iter().filter(|(_, n)| !cited.contains(n));
    Ok(wrong.map(|(path, name)| format!("{path}: invariant {name} is cited by no test")).collect())
}

fn is_test(path: &Path) -> bool {
    path.starts_with("tests")
        || path.starts_with("actors/src/sim")
        || path.ends_with("tests.rs")
        || path.iter().any(|part| part == "tests")
}
