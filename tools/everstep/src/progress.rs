//! Shows how a run is going, from its own files: a bar on a terminal, a line now and then elsewhere.

use crate::eval::{self, Evaluation};
use crate::launcher::End;
use crate::tail::Tail;
use crate::tensorboard::Events;
use anyhow::Result;
use everstep_actors::{Config, MetricsLine, RunFolder};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Instant;

/// Lines that a run shows where there is no terminal.
const LINES: u64 = 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct Progress {
    metrics: Tail,
    events: Tail,
    evaluations: Tail,
    /// For TensorBoard: begun with the first step that is new.
    board: Option<Events>,
    board_folder: PathBuf,
    /// Steps and evaluations that an earlier part of the run has written.
    known: (u64, u64),
    bar: ProgressBar,
    plain: bool,
    steps: u64,
    done: u64,
    recoveries: u64,
    looked: Instant,
}

impl Progress {
    pub(crate) fn new(run: &RunFolder, config: &Config, show: bool) -> Result<Self> {
        let terminal = show && std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(config.spec.steps), target);
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  eta {eta}")?);
        let last = MetricsLine::newest(&run.metrics())?.map_or(0, |line| line.step);
        Ok(Self {
            metrics: Tail::new(run.metrics()),
            events: Tail::new(run.events()),
            evaluations: Tail::new(run.evals()),
            board: None,
            board_folder: run.0.join("tensorboard"),
            known: (last, eval::newest(run)),
            bar,
            plain: show && !terminal,
            steps: config.spec.steps,
            done: 0,
            recoveries: 0,
            looked: Instant::now(),
        })
    }

    /// Reads what is new; gives the steps that are done.
    pub(crate) fn look(&mut self) -> Result<u64> {
        if self.looked.elapsed().as_millis() < 100 {
            return Ok(self.done);
        }
        self.looked = Instant::now();
        self.recoveries += self.events.lines()?.iter().filter(|l| l.contains("\"recovered\"")).count() as u64;
        for line in self.metrics.lines()? {
            let Ok(line) = serde_json::from_str::<MetricsLine>(&line) else { continue };
            self.show(&line);
            self.done = line.step;
            self.bar.set_position(line.step);
            let text = format!(
                "loss {:.3}  {:.0} tokens/s  {} nodes  {} recoveries",
                line.loss, line.tokens_per_s, line.nodes, self.recoveries
            );
            let every = (self.steps / LINES).max(1);
            if self.plain && (line.step.is_multiple_of(every) || line.step == 1) {
                eprintln!("step {}/{}  {text}", line.step, self.steps);
            }
            self.bar.set_message(text);
        }
        Ok(self.done)
    }

    /// Adds a step, and evaluations that came meanwhile, to TensorBoard's file, which begins with it. A job does not end for it.
    fn show(&mut self, line: &MetricsLine) {
        if line.step <= self.known.0 {
            return;
        }
        if let Err(error) = self.add(line) {
            eprintln!("{}: {error:#}: no more steps are added", self.board_folder.display());
            (self.board, self.known.0) = (None, u64::MAX);
        }
    }

    fn add(&mut self, line: &MetricsLine) -> Result<()> {
        if self.board.is_none() {
            self.board = Some(Events::begin(&self.board_folder, line.time)?);
        }
        if let Some(board) = &mut self.board {
            board.step(line)?;
        }
        self.evaluated(line.time)
    }

    /// Adds evaluations that are new.
    pub(crate) fn evaluated(&mut self, milliseconds: u64) -> Result<()> {
        let Some(board) = &mut self.board else { return Ok(()) };
        for text in self.evaluations.lines()? {
            let Ok(evaluation) = serde_json::from_str::<Evaluation>(&text) else { continue };
            if evaluation.step > self.known.1 {
                board.evaluation(milliseconds, &evaluation)?;
            }
        }
        Ok(())
    }

    pub(crate) fn finish(&mut self, end: &End) -> Result<()> {
        self.looked = Instant::now() - std::time::Duration::from_secs(1);
        self.look()?;
        match end {
            End::Finished => self.bar.finish(),
            End::Failed(_) | End::Interrupted(_) => self.bar.abandon(),
        }
        Ok(())
    }
}
