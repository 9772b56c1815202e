//! Processes that are stopped for a while, or now and then, by a thread of their own: whatever else chaos waits for, they go on
//! in time.

use crate::launcher;
use anyhow::{Context, Result};
use rustix::process::Signal;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A process with a share of a core runs for that part of this time, and is stopped for the rest.
const TURN: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct Held {
    pid: u32,
    /// When the process began, in the kernel's ticks: another one may get its number.
    born: u64,
    began: Instant,
    until: Instant,
    /// Of each turn it runs so long.
    runs: Duration,
    stopped: bool,
}

#[derive(Debug, Default)]
struct State {
    all: Vec<Held>,
    /// Let go for good since that was last asked for.
    let_go: usize,
    over: bool,
}

/// See the module. All go on when it is dropped.
#[derive(Debug)]
pub(super) struct HeldProcesses {
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

/// When a process began, if it is there.
fn born(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything; the 22nd field is the 20th after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

impl Held {
    fn turn(&mut self, stop: bool) {
        if stop != self.stopped {
            if born(self.pid) == Some(self.born) {
                launcher::kill(self.pid, if stop { Signal::STOP } else { Signal::CONT });
            }
            self.stopped = stop;
        }
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Stops and continues what is due. Gives whether there will be more to do.
fn look(state: &Mutex<State>) -> bool {
    let mut state = locked(state);
    let (now, over, before) = (Instant::now(), state.over, state.all.len());
    state.all.retain_mut(|held| {
        let ends = over || now > held.until;
        let at = Duration::from_nanos(((now - held.began).as_nanos() % TURN.as_nanos()) as u64);
        held.turn(!ends && at >= held.runs);
        !ends
    });
    state.let_go += before - state.all.len();
    !over
}

impl HeldProcesses {
    pub(super) fn new() -> std::io::Result<Self> {
        let state: Arc<Mutex<State>> = Arc::default();
        let of_thread = Arc::clone(&state);
        let turns = move || {
            while look(&of_thread) {
                std::thread::sleep(LOOK);
            }
        };
        let thread = std::thread::Builder::new().name("held".to_owned()).spawn(turns)?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Stops a process for so long, or leaves it this many per cent of the time. An error: there is none.
    pub(super) fn hold(&self, pid: u32, lasts: Duration, percent: u32) -> Result<()> {
        let now = Instant::now();
        let runs = TURN * percent / 100;
        let born = born(pid).with_context(|| format!("process {pid} has ended"))?;
        locked(&self.state).all.push(Held { pid, born, began: now, until: now + lasts, runs, stopped: false });
        look(&self.state);
        Ok(())
    }

    /// Whether one has been let go for good since this was last asked.
    pub(super) fn has_let_go(&self) -> bool {
        std::mem::take(&mut locked(&self.state).let_go) > 0
    }

    pub(super) fn is_empty(&self) -> bool {
        locked(&self.state).all.is_empty()
    }
}

impl Drop for HeldProcesses {
    fn drop(&mut self) {
        locked(&self.state).over = true;
        look(&self.state);
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn is_stopped(pid: u32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().rsplit_once(')').unwrap().1.trim().starts_with('T')
    }

    fn wait(what: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !what() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(LOOK);
        }
    }

    #[test]
    fn what_is_held_goes_on_in_time_or_when_nobody_holds_it() {
        let mut child = Command::new("sleep").arg("60").stdout(Stdio::null()).spawn().unwrap();
        let held = HeldProcesses::new().unwrap();
        held.hold(child.id(), Duration::from_millis(300), 0).unwrap();
        wait(|| is_stopped(child.id()));
        wait(|| held.has_let_go());
        wait(|| !is_stopped(child.id()));
        held.hold(child.id(), Duration::from_secs(60), 0).unwrap();
        wait(|| is_stopped(child.id()));
        drop(held);
        wait(|| !is_stopped(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
