//! What a process refuses: strangers, and what no correct member sends.

use super::HubEvent;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;

/// Counts them and tells the process. Clones count together.
#[derive(Debug, Clone)]
pub(crate) struct Refusals {
    count: Arc<AtomicU64>,
    events: mpsc::Sender<HubEvent>,
}

impl Refusals {
    pub(crate) fn new(events: mpsc::Sender<HubEvent>) -> Self {
        Self { count: Arc::default(), events }
    }

    /// Never waits: a process that does not keep up hears of some, and all count.
    pub(crate) fn add(&self, why: String) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let _ = self.events.try_send(HubEvent::Refused(why));
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
