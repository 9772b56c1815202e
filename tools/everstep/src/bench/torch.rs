//! PyTorch as a peer: a process of its own on the same GPU, which times one product when it is asked, so that ours and its own
//! take turns.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const SCRIPT: &str = include_str!("../../../../tests/peers/hopper/scaled_grouped.py");

/// See the module.
#[derive(Debug)]
pub(super) struct Torch {
    child: Child,
    // Closed before the process is waited for: that ends it.
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// As it names itself.
    pub(super) version: String,
}

impl Torch {
    /// By a Python that has PyTorch.
    pub(super) fn start(python: &Path) -> Result<Self> {
        let mut child = Command::new(python)
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", python.display()))?;
        let questions = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("its output is a pipe"));
        let mut peer = Self { child, questions, answers, version: String::new() };
        peer.version = peer.answer()?;
        Ok(peer)
    }

    /// Median seconds of the product of `groups` of `rows` rows, with weights `[N, K]`.
    pub(super) fn grouped(&mut self, [groups, rows, n, k]: [usize; 4]) -> Result<f64> {
        let questions = self.questions.as_mut().expect("it is open until the end");
        writeln!(questions, "{groups} {rows} {n} {k}").context("PyTorch has ended")?;
        let answer = self.answer()?;
        answer.parse().with_context(|| format!("PyTorch answered {answer:?}, not seconds"))
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("PyTorch has ended: its message is above");
        }
        Ok(line.trim().to_owned())
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        self.questions = None;
        // It has nothing to lose, and how it ended changes no figure.
        let _ = self.child.wait();
    }
}
