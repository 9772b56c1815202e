//! Threads that open, write and read the store of checkpoints: the runtime's threads never touch a disk.
//!
//! A job that has begun does not wait for its store (SU-9): it is opened, and its checkpoints are verified, while the job goes on;
//! what is to be written or read waits for that.
//!
//! A store that is full or out of reach does not end a job either: it is tried again for as long as it may heal, and so is what it
//! did not take. What waits meanwhile is bounded by the keeper (KE-3).

use super::AnyError;
use super::restore::{Opened, Opening};
use super::scribe::QUEUE;
use super::supervisor::Msg;
use crate::keeper::KeeperEvent;
use crate::spec::{JobSpec, Layout};
use crate::storing::{Failure, NoCheckpoint, Read, Write};
use everstep_checkpoint::{Store, StoreError};
use ractor::ActorRef;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

/// A store that fails is tried again after the first of these, then after twice as long, up to the second.
const AGAIN: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(10)];

/// Two threads: what cannot be written is in the way of nothing that is to be read.
#[derive(Debug)]
pub(super) struct Checkpoints {
    writes: SyncSender<Write>,
    reads: SyncSender<Read>,
}

impl Checkpoints {
    /// What is found in the store is told first. Of a store that takes or gives nothing for long the keeper asks no more than has
    /// room here (KE-3): each shard's snapshots, and for each copy its state, again with each way back. The supervisor never waits
    /// for it.
    pub(super) fn start(
        opening: Opening,
        spec: &JobSpec,
        layout: Arc<Layout>,
        to: &ActorRef<Msg>,
    ) -> std::io::Result<Self> {
        let shards = spec.shards as usize;
        let (writes, reads) = (QUEUE + 8 * shards, QUEUE + 8 * shards * (spec.mirrors as usize + 1));
        let (opened, reader) = sync_channel(1);
        let of_reader = Arc::clone(&layout);
        let read = move || {
            let reader: everstep_checkpoint::Reader = reader.recv().ok()?;
            Some(move |wish: &Read| wish.perform(&reader, &of_reader))
        };
        let of_store = to.clone();
        let write = move || {
            let mut store = open(opening, &of_store)?;
            opened.send(store.reader().clone()).ok()?;
            Some(move |wish: &Write| wish.perform(&mut store, &layout))
        };
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

/// Tries until something is done. None: it cannot be, which is told, or nobody waits for it any more.
fn at_last<T, E: ToString>(
    to: &ActorRef<Msg>,
    means: impl Fn(&E) -> Failure,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Option<T> {
    let mut again = AGAIN[0];
    loop {
        let error = match attempt() {
            Ok(done) => return Some(done),
            Err(error) => error,
        };
        let why = error.to_string();
        let last = match means(&error) {
            Failure::Again => {
                to.cast(Msg::StoreFails(why)).ok()?;
                std::thread::sleep(again);
                again = (2 * again).min(AGAIN[1]);
                continue;
            }
            Failure::Damaged => Msg::StateDamaged(why),
            Failure::Lasting => Msg::DiskFailed(why),
        };
        let _ = to.cast(last);
        return None;
    }
}

/// Opens the store, and tells what is in it.
fn open(opening: Opening, to: &ActorRef<Msg>) -> Option<Store> {
    let means = |error: &AnyError| if may_heal(error) { Failure::Again } else { Failure::Lasting };
    let Opened { store, newest, reported } = match opening {
        Opening::Done(opened) => *opened,
        Opening::Later(open) => at_last(to, means, open)?,
    };
    to.cast(Msg::Opened(newest, reported)).ok()?;
    Some(store)
}

/// Whether a store may be there later, if only because somebody mends it: nodes hold the state meanwhile. What is somebody else's, or of
/// another form, stays so.
fn may_heal(error: &AnyError) -> bool {
    let opening = error.downcast_ref::<StoreError>();
    let reading = error.downcast_ref::<NoCheckpoint>().and_then(|error| match error {
        NoCheckpoint::Store(error) => Some(error),
        NoCheckpoint::OtherParts { .. } => None,
    });
    // Metrics that cannot be read.
    error.is::<std::io::Error>()
        || opening.or(reading).is_some_and(|error| match error {
            StoreError::File { .. }
            | StoreError::Catalogue { .. }
            | StoreError::Invalid { .. }
            | StoreError::Damaged { .. } => true,
            StoreError::OutOfTurn { .. }
            | StoreError::OtherVersion { .. }
            | StoreError::ForeignJob { .. }
            | StoreError::Tensor { .. }
            | StoreError::Place { .. } => false,
        })
}

/// A thread for wishes, one after another, once it has begun; one that fails is tried again for as long as it may heal.
fn serve<W: Send + 'static, S: FnMut(&W) -> Result<KeeperEvent, StoreError>>(
    name: &str,
    room: usize,
    to: ActorRef<Msg>,
    means: fn(&StoreError) -> Failure,
    begin: impl FnOnce() -> Option<S> + Send + 'static,
) -> std::io::Result<SyncSender<W>> {
    let (sender, wishes) = sync_channel::<W>(room);
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _word = LastWord(to.clone());
        let Some(mut serve) = begin() else { return };
        while let Ok(wish) = wishes.recv() {
            let Some(event) = at_last(&to, means, || serve(&wish)) else { return };
            if to.cast(Msg::Keeper(event)).is_err() {
                return;
            }
        }
    })?;
    Ok(sender)
}

/// Nobody else would notice that a thread panicked: the supervisor may wait for what it was to tell.
struct LastWord(ActorRef<Msg>);

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.cast(Msg::DiskFailed("a thread of the store panicked".to_owned()));
        }
    }
}
