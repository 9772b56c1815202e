//! `everstep eval`: the loss on held-out text, and while a job trains, at every so many of its steps.

use crate::data;
use crate::tail::Tail;
use crate::weights::{Weights, Which};
use anyhow::{Context, Result, ensure};
use everstep_actors::{Config, RunFolder, Tokens};
use everstep_kernels::{Backend, Decoder, mean_loss};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// What is said of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Evaluation {
    pub(crate) step: u64,
    /// Mean loss of the targets, in nats.
    pub(crate) loss: f64,
    pub(crate) perplexity: f64,
    /// Targets.
    pub(crate) tokens: u64,
}

/// Evaluates weights on held-out text: that of the configuration, or `paths`.
pub(crate) fn of_step(run: &RunFolder, which: Which, paths: &[PathBuf], sequences: Option<u64>) -> Result<Evaluation> {
    let weights = Weights::load(run, which)?;
    let eval = weights.config.data.eval.as_ref();
    let paths = if paths.is_empty() { eval.map_or(&[][..], |e| &e.paths) } else { paths };
    ensure!(!paths.is_empty(), "there is no held-out text: give --data, or data.eval in the configuration");
    let tokens = data::held_out(run, &weights.config, paths)?;
    let wanted = sequences.or(eval.map(|e| e.sequences)).unwrap_or(64);
    let length = weights.config.spec.model.sequence;
    let all = tokens.len().saturating_sub(1) / length;
    ensure!(all > 0, "{paths:?}: {} tokens, but one sequence needs {}", tokens.len(), length + 1);
    let n = usize::try_from(wanted)?.clamp(1, all);
    let losses = losses(&weights, &tokens, n, all)?;
    let loss = losses.iter().sum::<f64>() / n as f64;
    Ok(Evaluation { step: weights.step, loss, perplexity: loss.exp(), tokens: (n * length) as u64 })
}

/// Mean losses of `n` of `all` sequences, evenly over the text: one thread's order is no other's.
fn losses(weights: &Weights, tokens: &Tokens, n: usize, all: usize) -> Result<Vec<f64>> {
    let (length, b) = (weights.config.spec.model.sequence, weights.backend());
    let of_sequence = |at: usize| -> Result<f64> {
        let from = at * all / n * length;
        let window = tokens.read(from..from + length + 1);
        let mut decoder = Decoder::new(weights.model(), &weights.map);
        let logits = decoder.feed(&b, &window[..length])?;
        Ok(mean_loss(&b.read(&logits)?, &window[1..]))
    };
    (0..n).into_par_iter().map(of_sequence).collect()
}

/// Evaluations of a run so far.
pub(crate) fn read_all(run: &RunFolder) -> Vec<Evaluation> {
    let text = std::fs::read_to_string(run.evals()).unwrap_or_default();
    text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
}

/// The newest step that was evaluated; 0: none.
pub(crate) fn newest(run: &RunFolder) -> u64 {
    read_all(run).iter().map(|e| e.step).max().unwrap_or(0)
}

/// Evaluates checkpoints beside a job, one process after another, so that the job does not wait. What is
/// not done when the job ends is done then.
#[derive(Debug)]
pub(crate) struct Evaluator {
    run: RunFolder,
    every: Option<u64>,
    events: Tail,
    /// Steps of the checkpoints that are kept, so far as events tell: the store itself may be far away.
    stored: BTreeSet<u64>,
    keep: usize,
    child: Option<Child>,
    /// The newest step that was given to a process.
    begun: u64,
}

impl Evaluator {
    pub(crate) fn new(run: &RunFolder, config: &Config) -> Self {
        Self {
            run: run.clone(),
            every: config.data.eval.as_ref().map(|e| e.every),
            events: Tail::new(run.events()),
            stored: BTreeSet::new(),
            keep: config.keep,
            child: None,
            begun: newest(run),
        }
    }

    fn listen(&mut self) -> Result<()> {
        for line in self.events.lines()?.iter().filter(|line| line.contains("\"checkpoint_stored\"")) {
            // A line that a crash tore is nobody's.
            let event = serde_json::from_str::<serde_json::Value>(line).unwrap_or_default();
            self.stored.extend(event["step"].as_u64());
        }
        while self.stored.len() > self.keep {
            self.stored.pop_first();
        }
        Ok(())
    }

    /// Starts an evaluation if one is due and none runs. Gives whether there is nothing more to do.
    pub(crate) fn look(&mut self) -> Result<bool> {
        let Some(every) = self.every else { return Ok(true) };
        if let Some(child) = &mut self.child {
            let Some(status) = child.try_wait()? else { return Ok(false) };
            if !status.success() {
                let log = self.run.logs().join("eval.log");
                eprintln!("the evaluation of step {} failed: see {}", self.begun, log.display());
                // If the checkpoint was put aside, another one of its step comes.
                self.stored.remove(&self.begun);
                self.begun = newest(&self.run);
            }
            self.child = None;
        }
        self.listen()?;
        let due = self.stored.iter().copied().find(|s| *s > self.begun && s.is_multiple_of(every));
        let Some(step) = due else { return Ok(true) };
        self.begun = step;
        let log = std::fs::File::options().create(true).append(true).open(self.run.logs().join("eval.log"))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("eval").arg(&self.run.0).args(["--step", &step.to_string(), "--keep"]);
        self.child = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?);
        Ok(false)
    }

    /// Waits for all that is due.
    pub(crate) fn finish_all(&mut self) -> Result<()> {
        while !self.look()? {
            if let Some(child) = &mut self.child {
                child.wait()?;
            }
        }
        Ok(())
    }
}

impl Drop for Evaluator {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Appends an evaluation to the run's.
pub(crate) fn keep(run: &RunFolder, evaluation: &Evaluation) -> Result<()> {
    use std::io::Write;
    let path = run.evals();
    let mut file = std::fs::File::options().create(true).append(true).open(&path)?;
    let line = serde_json::to_string(evaluation)? + "\n";
    file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}
