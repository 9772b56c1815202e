//! Processes that are stopped for a while, or now and then.

use crate::launcher;
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// A process with a share of a core runs for that part of this time, and is stopped for the rest.
const TURN: Duration = Duration::from_millis(200);

#[derive(Debug)]
struct Held {
    pid: u32,
    began: Instant,
    until: Instant,
    /// Of each turn it runs so long.
    runs: Duration,
    stopped: bool,
}

/// See the module. All go on when it is dropped.
#[derive(Debug, Default)]
pub(super) struct HeldProcesses(Vec<Held>);

impl HeldProcesses {
    /// Stops a process for so long, or leaves it this many per cent of the time.
    pub(super) fn hold(&mut self, pid: u32, lasts: Duration, percent: u32) {
        let now = Instant::now();
        self.0.push(Held { pid, began: now, until: now + lasts, runs: TURN * percent / 100, stopped: false });
        self.look();
    }

    /// To be called every few milliseconds. Gives whether one has just been let go for good.
    pub(super) fn look(&mut self) -> bool {
        let now = Instant::now();
        let before = self.0.len();
        self.0.retain_mut(|held| {
            let over = now > held.until;
            let at = Duration::from_nanos(((now - held.began).as_nanos() % TURN.as_nanos()) as u64);
            let stop = !over && at >= held.runs;
            if stop != held.stopped {
                launcher::kill(held.pid, if stop { Signal::STOP } else { Signal::CONT });
                held.stopped = stop;
            }
            !over
        });
        self.0.len() < before
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Drop for HeldProcesses {
    fn drop(&mut self) {
        self.0.iter().for_each(|held| launcher::kill(held.pid, Signal::CONT));
    }
}
