//! Threads that write: the control log with metrics and events, and the store of checkpoints. The
//! runtime's threads never touch a disk.
//!
//! Order: lines and records reach the disk in the order in which the supervisor decided them, so a
//! commit's record is never there without the metrics of the step before it.
//!
//! A store of checkpoints that is full or out of reach does not end a job: what it did not take is given to it again. What
//! waits meanwhile is bounded by the keeper (KE-3).

use super::restore::encode;
use super::supervisor::Msg;
use crate::ids::{ActorId, Step};
use crate::message::ParameterState;
use crate::spec::Layout;
use crate::stored::{state_of, stored};
use crate::supervisor::Record;
use everstep_checkpoint::{Log, Reader, Store, StoreError};
use everstep_kernels::Tensor;
use ractor::ActorRef;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;
use tokio::sync::mpsc;

/// Writes that may wait. The supervisor decides a few a step, each after the one before is on disk.
pub(super) const QUEUE: usize = 4096;

/// Something to write.
#[derive(Debug)]
pub(super) enum Line {
    /// A record of the control log; answered with `Synced`.
    Record(Box<Record>),
    /// A line of metrics.jsonl.
    Metrics(String),
    /// A line of events.jsonl.
    Event(String),
    /// The job is over; answered with `Flushed`, when all before is written.
    End(Result<(), String>),
}

/// The open files.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) log: Log,
    pub(super) metrics: (PathBuf, File),
    pub(super) events: (PathBuf, File),
}

pub(super) fn start_scribe(files: Files, to: ActorRef<Msg>) -> std::io::Result<mpsc::Sender<Line>> {
    let (sender, lines) = mpsc::channel(QUEUE);
    std::thread::Builder::new().name("scribe".to_owned()).spawn(move || write_lines(files, lines, &to))?;
    Ok(sender)
}

fn write_lines(mut files: Files, mut lines: mpsc::Receiver<Line>, to: &ActorRef<Msg>) {
    fn append(file: &mut (PathBuf, File), line: &str) -> Result<(), StoreError> {
        // One write for each line: a crash leaves whole lines and perhaps one torn one.
        let error = |source| StoreError::File { path: file.0.clone(), source };
        file.1.write_all(format!("{line}\n").as_bytes()).map_err(error)
    }
    while let Some(line) = lines.blocking_recv() {
        let (result, answer) = match line {
            Line::Record(record) => (files.log.append(&encode(&record)), Some(Msg::Synced)),
            Line::Metrics(line) => {
                let written = append(&mut files.metrics, &line);
                let (path, file) = &files.metrics;
                let sync = |()| file.sync_data().map_err(|source| StoreError::File { path: path.clone(), source });
                (written.and_then(sync), None)
            }
            Line::Event(line) => (append(&mut files.events, &line), None),
            Line::End(_) => (Ok(()), Some(Msg::Flushed)),
        };
        let message = match result {
            Ok(()) => answer,
            Err(error) => Some(Msg::DiskFailed(error.to_string())),
        };
        if message.is_some_and(|m| to.cast(m).is_err()) {
            return;
        }
    }
}

/// A store that fails is tried again after the first of these, then after twice as long, up to the second.
const AGAIN: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(10)];

/// Something to do with checkpoints.
#[derive(Debug)]
pub(super) enum Checkpointing {
    Store { step: Step, shard: u32, parameters: Vec<ParameterState<Tensor>> },
    Publish(Step),
    Load { step: Step, shard: u32, to: ActorId },
}

/// Two threads: what cannot be written is in the way of nothing that is to be read.
#[derive(Debug)]
pub(super) struct Checkpoints {
    writes: SyncSender<Checkpointing>,
    reads: SyncSender<Checkpointing>,
}

impl Checkpoints {
    pub(super) fn start(store: Store, layout: Arc<Layout>, to: &ActorRef<Msg>) -> std::io::Result<Self> {
        let reader = StoreThread { reader: store.reader().clone(), store: None, layout: Arc::clone(&layout) };
        let writer = StoreThread { reader: store.reader().clone(), store: Some(store), layout };
        Ok(Self { writes: writer.start("checkpoints", to.clone())?, reads: reader.start("states", to.clone())? })
    }

    /// Gives whether there is a thread that takes it.
    pub(super) fn send(&self, wish: Checkpointing) -> bool {
        let thread = if matches!(wish, Checkpointing::Load { .. }) { &self.reads } else { &self.writes };
        thread.send(wish).is_ok()
    }
}

struct StoreThread {
    reader: Reader,
    /// Of the one that writes.
    store: Option<Store>,
    layout: Arc<Layout>,
}

impl StoreThread {
    fn start(mut self, name: &str, to: ActorRef<Msg>) -> std::io::Result<SyncSender<Checkpointing>> {
        let (sender, wishes) = sync_channel(QUEUE);
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Ok(wish) = wishes.recv() {
                if self.serve_at_last(&wish, &to).is_none_or(|message| to.cast(message).is_err()) {
                    return;
                }
            }
        })?;
        Ok(sender)
    }

    fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("writes come to the thread that writes")
    }

    /// None: nobody waits for it any more.
    fn serve_at_last(&mut self, wish: &Checkpointing, to: &ActorRef<Msg>) -> Option<Msg> {
        let mut again = AGAIN[0];
        loop {
            let error = match self.serve(wish) {
                Ok(message) => return Some(message),
                Err(error) => error,
            };
            let may_heal = match wish {
                Checkpointing::Store { .. } | Checkpointing::Publish(_) => {
                    matches!(error, StoreError::File { .. } | StoreError::Catalogue { .. })
                }
                // What is not there will not come.
                Checkpointing::Load { .. } => matches!(error, StoreError::File { .. }) && !error.is_damage(),
            };
            if !may_heal {
                return Some(Msg::DiskFailed(error.to_string()));
            }
            to.cast(Msg::StoreFails(error.to_string())).ok()?;
            std::thread::sleep(again);
            again = (2 * again).min(AGAIN[1]);
        }
    }

    fn serve(&mut self, wish: &Checkpointing) -> Result<Msg, StoreError> {
        match *wish {
            Checkpointing::Store { step, shard, ref parameters } => {
                let numbers = self.layout.of_shard(shard);
                let name = |n: &u32| &self.layout.parameters[*n as usize].name;
                let named = numbers.iter().zip(parameters).map(|(n, state)| stored(name(n), state));
                let tensors: Vec<_> = named.collect();
                self.store().put(step, &tensors)?;
                Ok(Msg::Stored { step, shard })
            }
            Checkpointing::Publish(step) => {
                self.store().publish(step)?;
                Ok(Msg::Published(step))
            }
            Checkpointing::Load { step, shard, to } => {
                let numbers = self.layout.of_shard(shard);
                let name = |n: &u32| {
                    let p = &self.layout.parameters[*n as usize];
                    (p.name.to_string(), p.rows, p.columns)
                };
                let tensors = self.reader.read(step, &numbers.iter().map(name).collect::<Vec<_>>())?;
                Ok(Msg::Loaded { step, to, parameters: tensors.into_iter().map(state_of).collect() })
            }
        }
    }
}
