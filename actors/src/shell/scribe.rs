//! Threads that write: the control log with metrics and events, and the store of checkpoints. The
//! runtime's threads never touch a disk.
//!
//! Order: lines and records reach the disk in the order in which the supervisor decided them, so a
//! commit's record is never there without the metrics of the step before it.
//!
//! A store of checkpoints that is full or out of reach does not end a job: what it did not take is given to it again. What
//! waits meanwhile is bounded by the keeper (KE-3).

use super::supervisor::Msg;
use crate::keeper::KeeperEvent;
use crate::spec::{JobSpec, Layout};
use crate::storing::{Failure, Read, Write};
use crate::supervisor::Record;
use everstep_checkpoint::{Log, Store, StoreError};
use ractor::ActorRef;
use std::fs::File;
use std::io::Write as _;
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
            Line::Record(record) => (files.log.append(&record.encode()), Some(Msg::Synced)),
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

/// Two threads: what cannot be written is in the way of nothing that is to be read.
#[derive(Debug)]
pub(super) struct Checkpoints {
    writes: SyncSender<Write>,
    reads: SyncSender<Read>,
}

impl Checkpoints {
    /// Of a store that takes or gives nothing for long the keeper asks no more than has room here (KE-3): each shard's snapshots,
    /// and for each copy its state, again with each way back. The supervisor never waits for it.
    pub(super) fn start(
        mut store: Store,
        spec: &JobSpec,
        layout: Arc<Layout>,
        to: &ActorRef<Msg>,
    ) -> std::io::Result<Self> {
        let shards = spec.shards as usize;
        let (writes, reads) = (QUEUE + 8 * shards, QUEUE + 8 * shards * (spec.mirrors as usize + 1));
        let (reader, of_reader) = (store.reader().clone(), Arc::clone(&layout));
        let read = move |wish: &Read| wish.perform(&reader, &of_reader);
        let write = move |wish: &Write| wish.perform(&mut store, &layout);
        Ok(Self {
            reads: serve("states", reads, to.clone(), Read::failure, read)?,
            writes: serve("checkpoints", writes, to.clone(), Write::failure, write)?,
        })
    }

    /// Gives whether there is a thread that takes it.
    pub(super) fn write(&self, wish: Write) -> bool {
        self.writes.send(wish).is_ok()
    }

    /// The same.
    pub(super) fn read(&self, wish: Read) -> bool {
        self.reads.send(wish).is_ok()
    }
}

/// A thread for wishes, one after another; one that fails is tried again for as long as it may heal.
fn serve<W: Send + 'static>(
    name: &str,
    room: usize,
    to: ActorRef<Msg>,
    means: fn(&StoreError) -> Failure,
    mut serve: impl FnMut(&W) -> Result<KeeperEvent, StoreError> + Send + 'static,
) -> std::io::Result<SyncSender<W>> {
    let (sender, wishes) = sync_channel::<W>(room);
    // None: nobody waits for it any more.
    let mut at_last = move |wish: &W, to: &ActorRef<Msg>| {
        let mut again = AGAIN[0];
        loop {
            let error = match serve(wish) {
                Ok(event) => return Some(Msg::Keeper(event)),
                Err(error) => error,
            };
            match means(&error) {
                Failure::Again => to.cast(Msg::StoreFails(error.to_string())).ok()?,
                Failure::Damaged => return Some(Msg::StateDamaged(error.to_string())),
                Failure::Lasting => return Some(Msg::DiskFailed(error.to_string())),
            }
            std::thread::sleep(again);
            again = (2 * again).min(AGAIN[1]);
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        while let Ok(wish) = wishes.recv() {
            if at_last(&wish, &to).is_none_or(|message| to.cast(message).is_err()) {
                return;
            }
        }
    })?;
    Ok(sender)
}
