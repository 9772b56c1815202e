//! Threads that write: the control log with metrics and events, and the store of checkpoints. The
//! runtime's threads never touch a disk.
//!
//! Order: lines and records reach the disk in the order in which the supervisor decided them, so a
//! commit's record is never there without the metrics of the step before it.

use super::restore::encode;
use super::supervisor::Msg;
use crate::ids::{ActorId, Step};
use crate::message::ParameterState;
use crate::spec::Layout;
use crate::stored::{state_of, stored};
use crate::supervisor::Record;
use everstep_checkpoint::{Log, Store, StoreError};
use everstep_kernels::Tensor;
use ractor::ActorRef;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
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

/// Something to do with checkpoints.
#[derive(Debug)]
pub(super) enum Checkpointing {
    Store { step: Step, shard: u32, parameters: Vec<ParameterState<Tensor>> },
    Publish(Step),
    Load { step: Step, shard: u32, to: ActorId },
}

pub(super) fn start_store(
    store: Store,
    layout: Arc<Layout>,
    to: ActorRef<Msg>,
) -> std::io::Result<SyncSender<Checkpointing>> {
    let (sender, wishes) = sync_channel(QUEUE);
    let mut keeper = StoreThread { store, layout };
    std::thread::Builder::new().name("checkpoints".to_owned()).spawn(move || {
        while let Ok(wish) = wishes.recv() {
            let message = keeper.serve(wish).unwrap_or_else(|error| Msg::DiskFailed(error.to_string()));
            if to.cast(message).is_err() {
                return;
            }
        }
    })?;
    Ok(sender)
}

struct StoreThread {
    store: Store,
    layout: Arc<Layout>,
}

impl StoreThread {
    fn serve(&mut self, wish: Checkpointing) -> Result<Msg, StoreError> {
        match wish {
            Checkpointing::Store { step, shard, parameters } => {
                let numbers = self.layout.of_shard(shard);
                let name = |n: &u32| &self.layout.parameters[*n as usize].name;
                let named = numbers.iter().zip(parameters).map(|(n, state)| stored(name(n), &state));
                self.store.put(step, &named.collect::<Vec<_>>())?;
                Ok(Msg::Stored { step, shard })
            }
            Checkpointing::Publish(step) => {
                self.store.publish(step)?;
                Ok(Msg::Published(step))
            }
            Checkpointing::Load { step, shard, to } => {
                let numbers = self.layout.of_shard(shard);
                let name = |n: &u32| {
                    let p = &self.layout.parameters[*n as usize];
                    (p.name.to_string(), p.rows, p.columns)
                };
                let tensors = self.store.reader().read(step, &numbers.iter().map(name).collect::<Vec<_>>())?;
                Ok(Msg::Loaded { step, to, parameters: tensors.into_iter().map(state_of).collect() })
            }
        }
    }
}
