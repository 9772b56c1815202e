//! Raft's log and vote on disk: one append-only file of notes, and the same in memory to read from.
//!
//! - JO-1: what Raft is told to be saved is synced. A thread writes; the runtime's threads touch no disk.
//! - JO-2: reading the notes again gives the log and the vote as they were, whatever a crash tore: every prefix of
//!   the notes is a state that was, and nothing after it had been promised. What is synced at one time is one record: a disk may
//!   keep the end of it without its beginning.
//! - JO-3: the file is made short again when more than half of it is about entries that are gone.
//! - JO-4: entries go only when a snapshot on disk has what they say.

use super::{Types, decode, encode, failed};
use everstep_checkpoint::{Log, StoreError};
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{Entry, LogId, LogState, RaftLogReader, StorageError, StorageIOError, Vote};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::RangeBounds;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Wishes that may wait for the disk. Raft waits for most of them.
const QUEUE: usize = 256;
/// A snapshot is saved by then, or never.
const SAVED: Duration = Duration::from_secs(60);
/// Notes of a record at most: with the tables of the largest job it stays far from what a record may have.
const TOGETHER: usize = 16;
/// Notes that the file may have beyond twice the entries that are left.
const SLACK: usize = 1000;

/// A change of the log or the vote.
#[derive(Debug, Serialize, Deserialize)]
enum Note {
    Vote(Vote<u64>),
    Entry(Entry<Types>),
    /// Entries from this index on are gone.
    Truncated(u64),
    /// Entries up to this one are gone.
    Purged(LogId<u64>),
}

/// The log in memory.
#[derive(Debug, Default)]
struct Image {
    vote: Option<Vote<u64>>,
    entries: BTreeMap<u64, Entry<Types>>,
    purged: Option<LogId<u64>>,
}

impl Image {
    fn take(&mut self, note: Note) {
        match note {
            Note::Vote(vote) => self.vote = Some(vote),
            Note::Entry(entry) => {
                self.entries.insert(entry.log_id.index, entry);
            }
            Note::Truncated(from) => {
                self.entries.split_off(&from);
            }
            Note::Purged(upto) => {
                self.entries = self.entries.split_off(&(upto.index + 1));
                self.purged = Some(upto);
            }
        }
    }

    /// The fewest notes that say the same.
    fn notes(&self) -> Vec<Note> {
        let vote = self.vote.map(Note::Vote);
        let purged = self.purged.map(Note::Purged);
        let entries = self.entries.values().cloned().map(Note::Entry);
        vote.into_iter().chain(purged).chain(entries).collect()
    }
}

/// Who waits for notes to be on disk.
enum Waits {
    Log(LogFlushed<Types>),
    Call(oneshot::Sender<Result<(), StoreError>>),
}

/// See the module. Clones are the same journal.
#[derive(Debug, Clone)]
pub(super) struct Journal {
    image: Arc<Mutex<Image>>,
    /// Up to which index the machine's snapshot on disk says what the log does.
    saved: watch::Receiver<u64>,
    writer: mpsc::Sender<(Batch, Waits)>,
}

/// Notes as records.
struct Batch {
    notes: usize,
    records: Vec<Vec<u8>>,
}

impl Batch {
    fn of(notes: &[Note]) -> Self {
        Self { notes: notes.len(), records: notes.chunks(TOGETHER).map(encode).collect() }
    }
}

impl Journal {
    /// Opens or creates it.
    pub(super) fn open(path: &Path, saved: watch::Receiver<u64>) -> Result<Self, StoreError> {
        let (log, records) = Log::open(path)?;
        let (mut image, mut count) = (Image::default(), 0);
        for (n, bytes) in records.iter().enumerate() {
            let notes: Vec<Note> = decode(bytes).map_err(|why| StoreError::Invalid {
                path: path.to_owned(),
                what: "log of the supervisors",
                reason: format!("record {n}: {why}"),
            })?;
            count += notes.len();
            notes.into_iter().for_each(|note| image.take(note));
        }
        let image = Arc::new(Mutex::new(image));
        let (writer, wishes) = mpsc::channel(QUEUE);
        let file = File { path: path.to_owned(), log, notes: count, image: Arc::clone(&image) };
        let thread = std::thread::Builder::new().name("journal".to_owned());
        thread
            .spawn(move || file.serve(wishes))
            .map_err(|source| StoreError::File { path: path.to_owned(), source })?;
        Ok(Self { image, saved, writer })
    }

    fn image(&self) -> MutexGuard<'_, Image> {
        locked(&self.image)
    }

    /// Changes the log in memory, and then on disk.
    async fn note(&self, notes: Vec<Note>, waits: Waits) -> std::io::Result<()> {
        let batch = Batch::of(&notes);
        {
            let mut image = self.image();
            notes.into_iter().for_each(|note| image.take(note));
        }
        self.writer.send((batch, waits)).await.map_err(|_| std::io::Error::other("the thread that writes has ended"))
    }

    async fn saved(&self, note: Note) -> std::io::Result<()> {
        let (done, saved) = oneshot::channel();
        self.note(vec![note], Waits::Call(done)).await?;
        match saved.await {
            Ok(result) => result.map_err(std::io::Error::other),
            Err(_) => Err(std::io::Error::other("the thread that writes has ended")),
        }
    }
}

fn locked(image: &Mutex<Image>) -> MutexGuard<'_, Image> {
    image.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread's half.
struct File {
    path: PathBuf,
    log: Log,
    /// Notes in the file.
    notes: usize,
    image: Arc<Mutex<Image>>,
}

impl File {
    fn serve(mut self, mut wishes: mpsc::Receiver<(Batch, Waits)>) {
        while let Some((batch, waits)) = wishes.blocking_recv() {
            let result = self.write(&batch);
            let ended = result.is_err();
            match waits {
                Waits::Log(flushed) => flushed.log_io_completed(result.map_err(std::io::Error::other)),
                // Raft may have ended meanwhile.
                Waits::Call(done) => drop(done.send(result)),
            }
            if ended {
                return;
            }
        }
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        batch.records.iter().try_for_each(|record| self.log.append(record))?;
        self.notes += batch.notes;
        // What the image has beyond the file is in the queue: to take those notes twice changes nothing.
        let short = {
            let image = locked(&self.image);
            (self.notes > 2 * image.entries.len() + SLACK).then(|| image.notes())
        };
        if let Some(short) = short {
            let short = Batch::of(&short);
            self.log = Log::rewrite(&self.path, &short.records)?;
            self.notes = short.notes;
        }
        Ok(())
    }
}

impl RaftLogReader<Types> for Journal {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry<Types>>, StorageError<u64>> {
        Ok(self.image().entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }
}

impl RaftLogStorage<Types> for Journal {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, StorageError<u64>> {
        let image = self.image();
        let last = image.entries.values().next_back().map(|entry| entry.log_id);
        Ok(LogState { last_purged_log_id: image.purged, last_log_id: last.or(image.purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        self.saved(Note::Vote(*vote)).await.map_err(failed(StorageIOError::write_vote))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        Ok(self.image().vote)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<Types>> + Send,
        I::IntoIter: Send,
    {
        let notes = entries.into_iter().map(Note::Entry).collect();
        self.note(notes, Waits::Log(callback)).await.map_err(failed(StorageIOError::write_logs))
    }

    async fn truncate(&mut self, from: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.saved(Note::Truncated(from.index)).await.map_err(failed(StorageIOError::write_logs))
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<(), StorageError<u64>> {
        // JO-4. The machine has a task of its own, and saves meanwhile. If it cannot, Raft is to hear of it.
        let saved = self.saved.wait_for(|saved| *saved >= upto.index);
        let saved = tokio::time::timeout(SAVED, saved).await.is_ok_and(|saved| saved.is_ok());
        if !saved {
            let why = format!("no snapshot up to entry {} was saved within {} s", upto.index, SAVED.as_secs());
            return Err(failed(StorageIOError::write_logs)(std::io::Error::other(why)));
        }
        self.saved(Note::Purged(upto)).await.map_err(failed(StorageIOError::write_logs))
    }
}
