//! The files of a run, and the forms of those that others read.

use super::tail::{PART, last_lines};
use crate::config::Config;
use crate::ids::Step;
use crate::supervisor::Report;
use crate::tokens::{SourceInfo, Tokens};
use everstep_checkpoint::{Mapped, Place, StoreError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Paths inside a run folder.
#[derive(Debug, Clone)]
pub struct RunFolder(pub PathBuf);

impl RunFolder {
    /// The effective configuration.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.toml")
    }
    /// Which job this is.
    pub fn identity(&self) -> PathBuf {
        self.0.join("job.json")
    }
    /// The snapshot of the text: tokens, and the tokenizer if there is one.
    pub fn data(&self) -> PathBuf {
        self.0.join("data")
    }
    /// The tokens of a source.
    pub fn tokens(&self, source: usize) -> PathBuf {
        self.data().join(format!("source-{source}.tokens"))
    }
    /// The tokenizer, if the text is not read as bytes.
    pub fn tokenizer(&self) -> PathBuf {
        self.data().join("tokenizer.json")
    }
    /// Perplexities of the held-out text.
    pub fn evals(&self) -> PathBuf {
        self.0.join("eval.jsonl")
    }
    /// The supervisor's decisions.
    pub fn control_log(&self) -> PathBuf {
        self.0.join("control.log")
    }
    /// One line for each committed step.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }
    /// One line for each happening.
    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }
    /// One line for each fault that chaos made.
    pub fn faults(&self) -> PathBuf {
        self.0.join("faults.jsonl")
    }
    /// The store of checkpoints: its catalogue and, if they are in no object store, all of it.
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }
    /// Where the checkpoints of `job` are. An object store may hold those of other jobs too.
    pub fn store(&self, config: &Config, job: &str) -> Result<Place, StoreError> {
        match &config.store {
            Some(url) => Place::bucket(&format!("{}/{job}", url.trim_end_matches('/'))),
            None => Ok(Place::folder(&self.checkpoints())),
        }
    }
    /// The catalogue of a supervisor that is the only one.
    pub fn catalogue(&self) -> PathBuf {
        self.checkpoints().join("catalogue")
    }
    /// What proves membership.
    pub fn credentials(&self) -> PathBuf {
        self.0.join("credentials")
    }
    /// Where the supervisor listens, or all supervisors do: with commas between.
    pub fn address(&self) -> PathBuf {
        self.0.join("address")
    }
    /// What that file says.
    pub fn addresses(&self) -> std::io::Result<Vec<SocketAddr>> {
        let path = self.address();
        let words = |e: &dyn std::fmt::Display| std::io::Error::other(format!("{}: {e}", path.display()));
        let text = std::fs::read_to_string(&path).map_err(|e| words(&e))?;
        text.trim().split(',').map(|address| address.parse().map_err(|e| words(&e))).collect()
    }
    /// What the processes say.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }
    /// The folder of one of several supervisors: its log, and its copies of metrics and events.
    pub fn seat(&self, number: u64) -> PathBuf {
        self.0.join("supervisors").join(number.to_string())
    }
    /// Takes the run for the one process that writes into it; it is given back when the file closes.
    pub fn lock(&self) -> std::io::Result<std::fs::File> {
        self.locked(&self.0, std::fs::File::try_lock)
    }
    /// Takes the folder of one of several supervisors, and the run together with the others.
    pub(super) fn lock_seat(&self, number: u64) -> std::io::Result<[std::fs::File; 2]> {
        Ok([
            self.locked(&self.0, std::fs::File::try_lock_shared)?,
            self.locked(&self.seat(number), std::fs::File::try_lock)?,
        ])
    }
    fn locked(
        &self,
        folder: &Path,
        lock: fn(&std::fs::File) -> Result<(), std::fs::TryLockError>,
    ) -> std::io::Result<std::fs::File> {
        let path = folder.join("lock");
        let words = |e: &dyn std::fmt::Display| std::io::Error::other(format!("{}: {e}", path.display()));
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path).map_err(|e| words(&e))?;
        match lock(&file) {
            Ok(()) => Ok(file),
            Err(std::fs::TryLockError::WouldBlock) => {
                Err(std::io::Error::other(format!("run {} is in use by another process", self.0.display())))
            }
            Err(std::fs::TryLockError::Error(e)) => Err(words(&e)),
        }
    }
    /// The report for people.
    pub fn report(&self) -> PathBuf {
        self.0.join("report.html")
    }
}

/// Which job a run folder belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// The job's random name; checkpoints carry it.
    pub job: String,
    /// The device class whose bits the run has.
    pub class: String,
    /// The sources of text, in order.
    pub sources: Vec<SourceInfo>,
}

impl RunIdentity {
    /// Reads that of a run.
    pub fn read(run: &RunFolder) -> std::io::Result<Self> {
        let path = run.identity();
        let words = |e: &dyn std::fmt::Display| std::io::Error::other(format!("cannot read {}: {e}", path.display()));
        let text = std::fs::read_to_string(&path).map_err(|e| words(&e))?;
        serde_json::from_str(&text).map_err(|e| words(&e))
    }
}

/// A line of metrics.jsonl.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsLine {
    /// The committed step.
    pub step: Step,
    /// Mean loss of the step's targets, in nats. JSON has no numbers that are none: those are `null`.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Mean loss of multi-token prediction's targets, in nats, if there is any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtp_loss: Option<f64>,
    /// Targets of the step.
    pub tokens: u64,
    /// Norm of the gradients before clipping; `null` if it was not finite and the step was skipped.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f32,
    /// Since the line before; 0 in the first line of a supervisor's life.
    pub tokens_per_s: f64,
    /// Milliseconds since 1970.
    pub time: u64,
    /// The epoch.
    pub epoch: u64,
    /// Living nodes.
    pub nodes: usize,
    /// The fewest domains in which a shard was safe.
    pub copies: u32,
    /// Samples that every copy of every shard counted.
    #[serde(default)]
    pub samples: u64,
    /// Multiply-adds by node since the line before.
    pub operations: BTreeMap<String, u64>,
    /// Those among them that a surviving actor had done before: recoveries leave survivors their work.
    #[serde(default)]
    pub redone: u64,
    /// Multiply-adds, counted apart, that made again what new lives lacked.
    #[serde(default)]
    pub recipes: u64,
    /// Root of the fingerprint.
    pub fingerprint: String,
}

fn null_is_nan<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

impl MetricsLine {
    pub(super) fn new(report: Report, tokens: u64, time: u64, since: Option<u64>) -> Self {
        let per_s = |s: u64| tokens as f64 * 1000.0 / time.saturating_sub(s).max(1) as f64;
        Self {
            step: report.commit.commit.step,
            loss: report.commit.loss,
            mtp_loss: report.commit.mtp_loss,
            tokens,
            grad_norm: report.commit.grad_norm,
            lr: report.commit.commit.lr,
            tokens_per_s: since.map_or(0.0, per_s),
            time,
            epoch: report.epoch,
            nodes: report.operations.len(),
            copies: report.commit.copies,
            samples: report.commit.samples,
            operations: report.operations.into_iter().map(|(node, n)| (node.0.to_string(), n)).collect(),
            redone: report.redone,
            recipes: report.recipes,
            fingerprint: report.fingerprint,
        }
    }

    /// Lines that were written, those too whose steps were reported again.
    pub fn written(path: &Path) -> std::io::Result<usize> {
        Ok(std::fs::read_to_string(path)?.lines().count())
    }

    /// Reads metrics.jsonl; a missing file has no lines. A torn last line (the process died while it was written) is left out. A step
    /// that is reported again, for a node had computed wrongly, takes the place of what was reported from it on.
    pub fn read_all(path: &Path) -> std::io::Result<Vec<Self>> {
        Self::parse(path, &last_lines(path, u64::MAX)?)
    }

    /// The lines of these steps on, as [`MetricsLine::read_all`] gives them.
    pub(super) fn read_from(path: &Path, step: Step) -> std::io::Result<Vec<Self>> {
        let mut lines = Self::read_until(path, |first| first.step < step)?;
        lines.drain(..lines.partition_point(|line| line.step < step));
        Ok(lines)
    }

    /// The newest line, if there is one.
    pub fn newest(path: &Path) -> std::io::Result<Option<Self>> {
        Ok(Self::read_until(path, |_| true)?.pop())
    }

    /// The last lines, from one on that is early enough: of a file of any length about as much is read as has them.
    fn read_until(path: &Path, is_enough: impl Fn(&Self) -> bool) -> std::io::Result<Vec<Self>> {
        let mut bytes = PART;
        loop {
            let last = last_lines(path, bytes)?;
            let lines = Self::parse(path, &last)?;
            if last.1 == 0 || lines.first().is_some_and(&is_enough) {
                return Ok(lines);
            }
            bytes *= 2;
        }
    }

    fn parse(path: &Path, (text, from): &(String, u64)) -> std::io::Result<Vec<Self>> {
        let (mut lines, mut at): (Vec<Self>, u64) = (Vec::new(), *from);
        for line in text.split_inclusive('\n') {
            let parsed: Self = serde_json::from_str(line).map_err(|e| {
                let words = format!("{}, the line at byte {at}: {e}", path.display());
                std::io::Error::new(std::io::ErrorKind::InvalidData, words)
            })?;
            at += line.len() as u64;
            lines.truncate(lines.partition_point(|before| before.step < parsed.step));
            lines.push(parsed);
        }
        Ok(lines)
    }
}

/// Maps the tokens of a run's sources. Their hashes are not looked at: see [`verify_tokens`].
pub(super) fn open_tokens(run: &RunFolder, sources: &[SourceInfo]) -> std::io::Result<Vec<Tokens>> {
    let open = |(n, info): (usize, &SourceInfo)| {
        let path = run.tokens(n);
        let words = |e: &dyn std::fmt::Display| std::io::Error::other(format!("{}: {e}", path.display()));
        let mapped = Mapped::open(&path).map_err(|e| words(&e))?;
        let got = mapped.as_ref().len() as u64;
        if got != info.bytes() {
            return Err(words(&format!("it has {got} bytes, expected {}", info.bytes())));
        }
        Ok(Tokens::new(Arc::new(mapped), info.width))
    };
    sources.iter().enumerate().map(open).collect()
}

/// Reads all tokens of a run and compares their hashes: for the start of a run, not for a recovery.
pub fn verify_tokens(run: &RunFolder, sources: &[SourceInfo]) -> std::io::Result<()> {
    for (n, (tokens, info)) in open_tokens(run, sources)?.iter().zip(sources).enumerate() {
        let hash = blake3::hash(tokens.as_bytes()).to_hex().to_string();
        if hash != info.hash {
            let words = format!("{} has hash {hash}, expected {}", run.tokens(n).display(), info.hash);
            return Err(std::io::Error::other(words));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    fn line(step: Step) -> String {
        let line = MetricsLine {
            step,
            loss: f64::NAN,
            mtp_loss: None,
            tokens: 1,
            grad_norm: 1.0,
            lr: 0.1,
            tokens_per_s: 1.0,
            time: 0,
            epoch: 1,
            nodes: 1,
            copies: 2,
            samples: 1,
            operations: BTreeMap::new(),
            redone: 0,
            recipes: 0,
            fingerprint: format!("{step:064x}"),
        };
        serde_json::to_string(&line).unwrap()
    }

    /// Whatever part of the file has them: steps, some of which were reported again, and a torn end.
    #[test]
    fn the_lines_from_a_step_on_are_those_of_the_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        assert_eq!(
            (MetricsLine::newest(&path).unwrap(), MetricsLine::read_from(&path, 1).unwrap()),
            (None, Vec::new())
        );
        let mut text = String::new();
        for step in (1..=900).chain(300..=600).chain(590..=1000) {
            writeln!(text, "{}", line(step)).unwrap();
        }
        assert!(text.len() as u64 > 4 * PART);
        std::fs::write(&path, text + &line(1001)[..40]).unwrap();
        let steps = |lines: Vec<MetricsLine>| lines.into_iter().map(|l| l.step).collect::<Vec<_>>();
        assert_eq!(steps(MetricsLine::read_all(&path).unwrap()), (1..=1000).collect::<Vec<_>>());
        assert_eq!(MetricsLine::newest(&path).unwrap().map(|l| l.step), Some(1000));
        for from in [0, 1, 2, 299, 300, 301, 590, 601, 899, 901, 1000, 1001] {
            assert_eq!(steps(MetricsLine::read_from(&path, from).unwrap()), (from.max(1)..=1000).collect::<Vec<_>>());
        }
        // What is far before is not looked at.
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, "?\n".to_owned() + &whole).unwrap();
        assert_eq!(steps(MetricsLine::read_from(&path, 990).unwrap()), (990..=1000).collect::<Vec<_>>());
        assert_eq!(MetricsLine::newest(&path).unwrap().map(|l| l.step), Some(1000));
        assert!(MetricsLine::read_all(&path).is_err() && MetricsLine::read_from(&path, 1).is_err());
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let first = line(1);
        std::fs::write(&path, format!("{first}\n{{\n")).unwrap();
        let error = MetricsLine::read_all(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("metrics.jsonl, the line at byte {}", first.len() + 1)), "{error}");
    }
}
