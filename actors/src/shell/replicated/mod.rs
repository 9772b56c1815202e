//! Several supervisors, of which one leads: Raft (by openraft) keeps the control log, metrics.jsonl and events.jsonl
//! the same at all of them. A majority that reach each other go on without the rest.
//!
//! - RP-1: what the leader decides counts when a majority has it on disk. What a supervisor decides that does not lead
//!   any more never counts, and nobody is told of it: its life ends.
//! - RP-2: one that leads and hears from no majority ends its life before another may lead ([`QUIET_MAX`] is the time for
//!   which voters keep to a leader).
//! - RP-3: only the one that leads takes sessions of nodes and operators.

mod journal;
mod machine;
mod network;

use super::AnyError;
use super::scribe::{Line, QUEUE};
use super::supervisor::Msg;
use crate::coded;
use crate::supervisor::Record;
use everstep_transport::Hub;
use journal::Journal;
use machine::Machine;
use openraft::storage::RaftLogStorage;
use openraft::{BasicNode, Config, ServerState, StorageError, StorageIOError};
use ractor::ActorRef;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Cursor;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

openraft::declare_raft_types!(
    /// What Raft keeps.
    pub(super) Types: D = Word, R = (), NodeId = u64, Node = BasicNode
);

type Raft = openraft::Raft<Types>;

/// Milliseconds between two signs of life of the leader.
const HEARTBEAT: u64 = 75;
/// Voters keep to a leader for so many milliseconds after its last sign of life, then wait for [`PATIENCE`] more.
const QUIET_MAX: u64 = 600;
/// The least and the most of it; random in between, so that two rarely stand for election at once.
const PATIENCE: [u64; 2] = [300, QUIET_MAX];
/// Milliseconds for a part of a snapshot; with the last one it is taken over.
const SNAPSHOT_MS: u64 = 20_000;
/// For so long the others are waited for at the end.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often a leader looks whether it leads.
const LOOK: Duration = Duration::from_millis(25);
/// Entries between two snapshots, and entries that are kept for supervisors that are behind.
const ENTRIES: [u64; 2] = [5000, 2000];
/// Which of several supervisors a process is.
#[derive(Debug, Clone)]
pub struct Seat {
    /// Its number, from 1.
    pub number: u64,
    /// The addresses of all, by number.
    pub addresses: Vec<SocketAddr>,
}

/// What supervisors agree on, in order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Word {
    /// A supervisor begins to lead: what comes before it is all that was agreed on.
    Begin,
    /// A decision.
    Record(Record),
    /// A line of metrics.jsonl.
    Metrics(String),
    /// A line of events.jsonl.
    Event(String),
    /// The job is over.
    End(Result<(), String>),
}

/// The form of what supervisors have on disk and send each other.
const VERSION: u8 = 3;
/// Bytes of a snapshot, the longest of it.
const CODED_MAX: usize = 1 << 30;

fn encode<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    coded::encode(VERSION, value)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    coded::decode::<T, CODED_MAX>(VERSION, bytes)
}

/// An error of the disk as Raft wants it.
fn failed<E: std::error::Error + 'static>(
    kind: impl FnOnce(openraft::AnyError) -> StorageIOError<u64>,
) -> impl FnOnce(E) -> StorageError<u64> {
    move |error| StorageError::from(kind(openraft::AnyError::new(&error)))
}

/// When a supervisor that leads last heard from a majority: whether it still may (RP-2), for threads that look for
/// themselves. Nothing: it does not lead any more.
#[derive(Debug, Clone)]
pub(super) struct Lease(Arc<Mutex<Option<Instant>>>);

impl Default for Lease {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(Instant::now()))))
    }
}

impl Lease {
    fn set(&self, heard: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = heard;
    }

    /// Whether no other supervisor can lead yet.
    pub(super) fn holds(&self) -> bool {
        let heard = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.is_some_and(|heard| heard.elapsed() < Duration::from_millis(QUIET_MAX))
    }
}

/// A supervisor among several.
#[derive(Clone)]
pub(super) struct Replicated {
    raft: Raft,
    machine: Machine,
    /// The last index of the log when this life began: how a run ended before that says nothing of this life.
    before: u64,
}

impl Replicated {
    /// Begins to vote and to follow.
    pub(super) async fn start(folder: &Path, seat: &Seat, hub: &Hub) -> Result<Self, AnyError> {
        let config = Config {
            cluster_name: "supervisors".to_owned(),
            heartbeat_interval: HEARTBEAT,
            election_timeout_min: PATIENCE[0],
            election_timeout_max: PATIENCE[1],
            install_snapshot_timeout: SNAPSHOT_MS,
            snapshot_policy: openraft::SnapshotPolicy::LogsSinceLast(ENTRIES[0]),
            max_in_snapshot_log_to_keep: ENTRIES[1],
            ..Config::default()
        };
        let machine = Machine::open(folder)?;
        let mut journal = Journal::open(&folder.join("log"), machine.saved())?;
        let before = journal.get_log_state().await?.last_log_id.map_or(0, |last| last.index);
        let network = network::Network { hub: hub.clone(), addresses: seat.addresses.clone() };
        let config = Arc::new(config.validate()?);
        let raft = Raft::new(seat.number, config, network, journal, machine.clone()).await?;
        tokio::spawn(network::answer(raft.clone(), hub.answer_calls()));
        // One begins; the others only if it does not come, so that they rarely stand for election against each other.
        let turn = Duration::from_millis(QUIET_MAX) * (seat.number as u32 - 1);
        let begun = raft.wait(Some(turn)).metrics(|m| m.last_log_index.is_some(), "a log").await.is_ok();
        if !begun && !raft.is_initialized().await? {
            let members = (1..).zip(&seat.addresses).map(|(n, address)| (n, BasicNode::new(address)));
            // All of them say the same; another may have been faster.
            match raft.initialize(members.collect::<BTreeMap<u64, BasicNode>>()).await {
                Ok(()) | Err(openraft::error::RaftError::APIError(openraft::error::InitializeError::NotAllowed(_))) => {
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self { raft, machine, before })
    }

    /// Waits until this supervisor leads and has all that is agreed on, and gives the term in which it does; or until
    /// the job is over, and gives how it ended.
    pub(super) async fn lead_or_end(&self) -> Result<Result<u64, Result<(), String>>, AnyError> {
        let mut metrics = self.raft.metrics();
        loop {
            if let Some(end) = self.end() {
                return Ok(Err(end));
            }
            let term = {
                let now = metrics.borrow_and_update();
                now.running_state.clone()?;
                (now.state == ServerState::Leader).then_some(now.current_term)
            };
            // One that led when its process ended leads again at once, before it has all that was agreed on: a word of its
            // own comes after that.
            if let Some(term) = term
                && self.raft.client_write(Word::Begin).await.is_ok()
            {
                return Ok(self.end().map_or(Ok(term), Err));
            }
            // A change of the machine alone is a change of the metrics too.
            tokio::time::timeout(LOOK, metrics.changed()).await.unwrap_or(Ok(()))?;
        }
    }

    /// How the job ended, if it did in this life: a run that ended may be gone on with.
    fn end(&self) -> Option<Result<(), String>> {
        self.machine.end().filter(|(index, _)| *index > self.before).map(|(_, end)| end)
    }

    /// The decisions so far.
    pub(super) fn records(&self) -> Vec<Record> {
        self.machine.records()
    }

    /// Returns when this supervisor does not lead in that term any more (RP-2), with why.
    pub(super) async fn deposed(&self, term: u64, lease: Lease) -> String {
        let why = self.leads_until(term, &lease).await;
        lease.set(None);
        why
    }

    async fn leads_until(&self, term: u64, lease: &Lease) -> String {
        let mut metrics = self.raft.metrics();
        let mut told = Instant::now();
        loop {
            // Raft tells of itself many times a second. What it told before it stood still, alone or with the process, says
            // nothing of now.
            match metrics.has_changed() {
                Ok(true) => told = Instant::now(),
                Ok(false) => {}
                Err(_) => return "Raft has ended".to_owned(),
            }
            {
                let now = metrics.borrow_and_update();
                if let Err(fatal) = &now.running_state {
                    return fatal.to_string();
                }
                if now.state != ServerState::Leader || now.current_term != term {
                    return "another supervisor may lead".to_owned();
                }
                let quiet = Duration::from_millis(now.millis_since_quorum_ack.unwrap_or(0));
                if told.elapsed() + quiet > Duration::from_millis(QUIET_MAX) {
                    let ms = (told.elapsed() + quiet).as_millis();
                    return format!("no majority of the supervisors has answered for {ms} ms");
                }
                if !lease.holds() {
                    return "this process stood still for too long".to_owned();
                }
                lease.set(told.checked_sub(quiet));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until all supervisors know how the job ended, or for a moment: one of them may be gone.
    pub(super) async fn told_all(&self) {
        let metrics = self.raft.metrics();
        let all = || {
            let now = metrics.borrow();
            let known = |id: &openraft::LogId<u64>| Some(id.index) >= now.last_log_index;
            now.replication.as_ref().is_none_or(|to| to.values().all(|id| id.as_ref().is_some_and(known)))
        };
        let began = Instant::now();
        while began.elapsed() < FAREWELL && !all() {
            tokio::time::sleep(LOOK).await;
        }
        // That it counts they hear with the next sign of life.
        tokio::time::sleep(Duration::from_millis(2 * HEARTBEAT)).await;
    }

    /// Agrees with the others on what the leader writes, in order, and tells it what is safe (RP-1).
    pub(super) fn writer(&self, to: ActorRef<Msg>) -> mpsc::Sender<Line> {
        let (sender, mut lines) = mpsc::channel(QUEUE);
        let (proposed, mut answers) = mpsc::channel(QUEUE);
        let raft = self.raft.clone();
        tokio::spawn(async move {
            while let Some(line) = lines.recv().await {
                let (word, answer) = match line {
                    Line::Record(record) => (Word::Record(*record), Some(Msg::Synced)),
                    Line::Metrics(line) => (Word::Metrics(line), None),
                    Line::Event(line) => (Word::Event(line), None),
                    Line::End(end) => (Word::End(end), Some(Msg::Flushed)),
                };
                let Ok(receiver) = raft.client_write_ff(word).await else { return };
                if proposed.send((receiver, answer)).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Some((receiver, answer)) = answers.recv().await {
                // One that fails is the end of this life: see `deposed`. What follows it must not count either.
                let Ok(Ok(_)) = receiver.await else { return };
                if answer.is_some_and(|message| to.cast(message).is_err()) {
                    return;
                }
            }
        });
        sender
    }

    /// Ends its part.
    pub(super) async fn shut_down(&self) {
        // It may have ended by itself.
        let _ = self.raft.shutdown().await;
    }
}

#[cfg(test)]
mod tests;
