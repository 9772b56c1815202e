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
use everstep_kernels::{Tensor, state_sum};
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

/// Something to write.
#[derive(Debug)]
pub(super) enum Write {
    Store { step: Step, shard: u32, parameters: Vec<ParameterState<Tensor>> },
    Publish(Step),
}

/// A shard's state to be read, and for whom.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) step: Step,
    pub(super) shard: u32,
    pub(super) to: ActorId,
}

/// Two threads: what cannot be written is in the way of nothing that is to be read.
#[derive(Debug)]
pub(super) struct Checkpoints {
    writes: SyncSender<Write>,
    reads: SyncSender<Read>,
}

impl Checkpoints {
    pub(super) fn start(mut store: Store, layout: Arc<Layout>, to: &ActorRef<Msg>) -> std::io::Result<Self> {
        let (reader, of_reader) = (store.reader().clone(), Arc::clone(&layout));
        // What is not there will not come.
        let read = move |wish: &Read| read(&reader, &of_reader, wish);
        let reads = serve("states", to.clone(), StoreError::is_out_of_reach, unreadable, read)?;
        let may_heal = |e: &StoreError| matches!(e, StoreError::File { .. } | StoreError::Catalogue { .. });
        let write = move |wish: &Write| write(&mut store, &layout, wish);
        Ok(Self {
            writes: serve("checkpoints", to.clone(), may_heal, |e| Msg::DiskFailed(e.to_string()), write)?,
            reads,
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

/// A thread for wishes, one after another; one that fails is tried again for as long as it may heal, then `fails`.
fn serve<W: Send + 'static>(
    name: &str,
    to: ActorRef<Msg>,
    may_heal: fn(&StoreError) -> bool,
    fails: fn(&StoreError) -> Msg,
    mut serve: impl FnMut(&W) -> Result<Msg, StoreError> + Send + 'static,
) -> std::io::Result<SyncSender<W>> {
    let (sender, wishes) = sync_channel::<W>(QUEUE);
    // None: nobody waits for it any more.
    let mut at_last = move |wish: &W, to: &ActorRef<Msg>| {
        let mut again = AGAIN[0];
        loop {
            match serve(wish) {
                Ok(message) => return Some(message),
                Err(error) if may_heal(&error) => to.cast(Msg::StoreFails(error.to_string())).ok()?,
                Err(error) => return Some(fails(&error)),
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

/// What is damaged the next life of the supervisor finds too, and puts aside; what merely is not what was expected it does not.
fn unreadable(error: &StoreError) -> Msg {
    match error {
        StoreError::Damaged { .. } | StoreError::Invalid { .. } | StoreError::File { .. } => {
            Msg::StateDamaged(error.to_string())
        }
        _ => Msg::DiskFailed(error.to_string()),
    }
}

fn write(store: &mut Store, layout: &Layout, wish: &Write) -> Result<Msg, StoreError> {
    match *wish {
        Write::Store { step, shard, ref parameters } => {
            let numbers = layout.of_shard(shard);
            let name = |n: &u32| &layout.parameters[*n as usize].name;
            let named = numbers.iter().zip(parameters).map(|(n, state)| stored(name(n), state));
            store.put(step, &named.collect::<Vec<_>>())?;
            // Of the memory that was read for it: bits that flipped before are in both.
            let sums = parameters.iter().map(|state| state_sum(state)).collect();
            Ok(Msg::Stored { step, shard, sums })
        }
        Write::Publish(step) => {
            store.publish(step)?;
            Ok(Msg::Published(step))
        }
    }
}

fn read(reader: &Reader, layout: &Layout, &Read { step, shard, to }: &Read) -> Result<Msg, StoreError> {
    let name = |n: &u32| {
        let p = &layout.parameters[*n as usize];
        (p.name.to_string(), p.rows, p.columns)
    };
    let tensors = reader.read(step, &layout.of_shard(shard).iter().map(name).collect::<Vec<_>>())?;
    Ok(Msg::Loaded { step, to, parameters: tensors.into_iter().map(state_of).collect() })
}
