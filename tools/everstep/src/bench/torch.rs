//! PyTorch as a peer: a process of its own on the same GPU, which times one product when it is asked, so that ours and its own
//! take turns.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

const SCRIPT: &str = include_str!("../../../../tests/peers/hopper/scaled_grouped.py");

/// For an answer, at most: loading PyTorch from a cold disk takes the longest.
const ANSWER: Duration = Duration::from_secs(180);
/// For its end, once it is asked nothing more; then it is killed.
const END: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Torch {
    child: Child,
    // Closed before the process is waited for: that ends it.
    questions: Option<ChildStdin>,
    answers: Receiver<std::io::Result<String>>,
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
        let answers = lines(child.stdout.take().expect("its output is a pipe"));
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
        match self.answers.recv_timeout(ANSWER) {
            Ok(line) => Ok(line.context("PyTorch's answer")?.trim().to_owned()),
            Err(RecvTimeoutError::Disconnected) => bail!("PyTorch has ended: its message is above"),
            Err(RecvTimeoutError::Timeout) => bail!("PyTorch did not answer within {} s", ANSWER.as_secs()),
        }
    }
}

/// The lines of its output, read by a thread of their own: a pipe cannot be waited for with a limit.
fn lines(output: ChildStdout) -> Receiver<std::io::Result<String>> {
    let (sender, lines) = sync_channel(1);
    // It ends with the output, or when nobody asks any more.
    std::thread::spawn(move || BufReader::new(output).lines().try_for_each(|line| sender.send(line)));
    lines
}

/// Waits for a process, which is killed when it takes longer.
fn end(child: &mut Child, limit: Duration) {
    let begin = Instant::now();
    while let Ok(None) = child.try_wait() {
        if begin.elapsed() >= limit {
            // It has nothing to lose, and how it ended changes no figure.
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        self.questions = None;
        end(&mut self.child, END);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_does_not_end_is_killed() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("a process");
        let begin = Instant::now();
        end(&mut child, Duration::from_millis(100));
        assert!(begin.elapsed() < Duration::from_secs(60) && child.try_wait().is_ok_and(|status| status.is_some()));
    }

    #[test]
    fn lines_come_until_the_output_ends() {
        let mut child = Command::new("printf").arg("a\\nb\\n").stdout(Stdio::piped()).spawn().expect("a process");
        let lines = lines(child.stdout.take().expect("a pipe"));
        let all: Vec<String> = lines.iter().map(|line| line.expect("a line")).collect();
        assert_eq!(all, ["a", "b"]);
        end(&mut child, END);
    }
}
