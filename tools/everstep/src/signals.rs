//! Signals that end the launcher, as they come.

use anyhow::Result;
use std::time::Duration;

/// See the module.
#[derive(Debug)]
pub(crate) struct Signals {
    runtime: tokio::runtime::Runtime,
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    pub(crate) fn new() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let guard = runtime.enter();
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        let hang_up = signal(SignalKind::hangup())?;
        drop(guard);
        Ok(Self { runtime, interrupt, terminate, hang_up })
    }

    /// The number of a signal that has come.
    pub(crate) fn received(&mut self) -> Option<u8> {
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                _ = self.interrupt.recv() => Some(2),
                _ = self.terminate.recv() => Some(15),
                _ = self.hang_up.recv() => Some(1),
                () = tokio::time::sleep(Duration::from_millis(1)) => None,
            }
        })
    }
}
