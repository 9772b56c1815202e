//! What the supervisors agree on, as each of them has it: the records of the control log, and its own copies of
//! metrics.jsonl and events.jsonl.
//!
//! - MA-1: every supervisor's files hold the same lines in the same order: those that are committed, and no others.
//!   A line that a file has already (it was written before the process ended) is not written again.
//! - MA-2: a snapshot is on disk, with the lines that it counts, before it says that it is saved.

use super::super::tail::{between, whole_bytes};
use super::{Types, Word, decode, encode, failed};
use crate::supervisor::{RECORDS_MAX, Record};
use openraft::storage::RaftStateMachine;
use openraft::{
    Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError,
    StorageIOError, StoredMembership,
};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{Cursor, Error, Read, Result, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

type Meta = SnapshotMeta<u64, openraft::BasicNode>;

/// What a snapshot says beside the text of the two files.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Decided {
    records: Vec<Record>,
    /// With the index of the word that says so.
    end: Option<(u64, std::result::Result<(), String>)>,
    last: Option<LogId<u64>>,
    members: StoredMembership<u64, openraft::BasicNode>,
    /// Bytes of metrics and events.
    written: [u64; 2],
}

/// A file of lines, of which the first `written` bytes are agreed on.
#[derive(Debug)]
struct Lines {
    path: PathBuf,
    file: std::fs::File,
    written: u64,
    /// What the file has beyond: lines that were agreed on before the process ended, and come again.
    ahead: VecDeque<u8>,
}

impl Lines {
    fn open(path: PathBuf, written: u64) -> Result<Self> {
        let named = |e: Error| Error::other(format!("{}: {e}", path.display()));
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(named)?;
        let whole = whole_bytes(&mut file).map_err(named)?;
        if whole < written {
            return Err(named(Error::other(format!("it has {whole} bytes of whole lines, expected {written}"))));
        }
        file.set_len(whole).map_err(named)?;
        let ahead = between(&mut file, written, whole).map_err(named)?.into();
        Ok(Self { file, written, ahead, path })
    }

    fn append(&mut self, line: &str) -> Result<()> {
        let named = |e: Error| Error::other(format!("{}: {e}", self.path.display()));
        let line = format!("{line}\n").into_bytes();
        let there = self.ahead.len().min(line.len());
        if there > 0 && !self.ahead.drain(..there).eq(line.iter().copied()) {
            // A power cut may leave other bytes than were written.
            self.ahead.clear();
            self.file.set_len(self.written).map_err(named)?;
            self.file.write_all(&line).map_err(named)?;
        } else if there == 0 {
            self.file.write_all(&line).map_err(named)?;
        }
        self.written += line.len() as u64;
        Ok(())
    }

    fn text(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        std::fs::File::open(&self.path)?.take(self.written).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[derive(Debug)]
struct State {
    decided: Decided,
    lines: [Lines; 2],
    snapshot: PathBuf,
    /// The last index that the snapshot on disk has.
    saved: watch::Sender<u64>,
}

impl State {
    fn open(folder: &Path) -> Result<Self> {
        let snapshot = folder.join("snapshot");
        let decided: Decided = match std::fs::read(&snapshot) {
            Ok(bytes) => decode(&bytes).map_err(|why| Error::other(format!("{}: {why}", snapshot.display())))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Decided::default(),
            Err(e) => return Err(Error::other(format!("{}: {e}", snapshot.display()))),
        };
        let [metrics, events] = decided.written;
        let open = |name: &str, written| Lines::open(folder.join(name), written);
        let saved = watch::Sender::new(decided.last.map_or(0, |last| last.index));
        Ok(Self { lines: [open("metrics.jsonl", metrics)?, open("events.jsonl", events)?], decided, snapshot, saved })
    }

    fn apply(&mut self, entry: Entry<Types>) -> Result<()> {
        self.decided.last = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => {}
            // A run that had ended is gone on with.
            EntryPayload::Normal(Word::Begin) => self.decided.end = None,
            EntryPayload::Membership(members) => {
                self.decided.members = StoredMembership::new(Some(entry.log_id), members);
            }
            EntryPayload::Normal(Word::Record(record)) => {
                self.decided.records.push(record);
                if self.decided.records.len() > RECORDS_MAX {
                    self.decided.records = Record::compacted(&self.decided.records);
                }
            }
            EntryPayload::Normal(Word::Metrics(line)) => self.lines[0].append(&line)?,
            EntryPayload::Normal(Word::Event(line)) => self.lines[1].append(&line)?,
            EntryPayload::Normal(Word::End(end)) => self.decided.end = Some((entry.log_id.index, end)),
        }
        Ok(())
    }

    fn meta(&self) -> Meta {
        let last = self.decided.last;
        let id = last.map_or_else(String::new, |last| last.to_string());
        SnapshotMeta { last_log_id: last, last_membership: self.decided.members.clone(), snapshot_id: id }
    }

    /// Saves what is decided so far; the log's entries up to here may go.
    fn save(&mut self) -> Result<()> {
        self.decided.written = [0, 1].map(|n| self.lines[n].written);
        for lines in &self.lines {
            lines.file.sync_data()?;
        }
        everstep_checkpoint::write_whole(&self.snapshot, &encode(&self.decided)).map_err(Error::other)?;
        self.saved.send_replace(self.decided.last.map_or(0, |last| last.index));
        Ok(())
    }

    /// All of it for another supervisor.
    fn whole(&self) -> Result<Snapshot<Types>> {
        let mut decided = self.decided.clone();
        decided.written = [0, 1].map(|n| self.lines[n].written);
        let [metrics, events] = [self.lines[0].text()?, self.lines[1].text()?];
        let bytes = encode(&(decided, metrics, events));
        Ok(Snapshot { meta: self.meta(), snapshot: Box::new(Cursor::new(bytes)) })
    }

    /// Takes all of another supervisor's.
    fn install(&mut self, bytes: &[u8]) -> Result<()> {
        let (decided, metrics, events): (Decided, Vec<u8>, Vec<u8>) =
            decode(bytes).map_err(|why| Error::other(format!("a snapshot of another supervisor: {why}")))?;
        for (n, text) in [metrics, events].into_iter().enumerate() {
            let path = &self.lines[n].path;
            everstep_checkpoint::write_whole(path, &text).map_err(Error::other)?;
            self.lines[n] = Lines::open(path.clone(), text.len() as u64)?;
        }
        self.decided = decided;
        self.save()
    }
}

/// See the module. Clones are the same machine.
#[derive(Debug, Clone)]
pub(super) struct Machine(Arc<Mutex<State>>);

impl Machine {
    /// Opens what a supervisor's folder has.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        Ok(Self(Arc::new(Mutex::new(State::open(folder)?))))
    }

    /// The records that are agreed on.
    pub(super) fn records(&self) -> Vec<Record> {
        self.with(|state| state.decided.records.clone())
    }

    /// Up to which index what was decided is on disk without the log.
    pub(super) fn saved(&self) -> watch::Receiver<u64> {
        self.with(|state| state.saved.subscribe())
    }

    /// How the job ended, if it ever has, and the index of the word that says so.
    pub(super) fn end(&self) -> Option<(u64, std::result::Result<(), String>)> {
        self.with(|state| state.decided.end.clone())
    }

    fn with<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        what(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What touches a disk, on a thread that may wait.
    async fn on_disk<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut State) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let machine = self.clone();
        tokio::task::spawn_blocking(move || machine.with(what)).await.map_err(Error::other)?
    }
}

impl RaftSnapshotBuilder<Types> for Machine {
    /// MA-2.
    async fn build_snapshot(&mut self) -> std::result::Result<Snapshot<Types>, StorageError<u64>> {
        let built = self.on_disk(|state| state.save().and_then(|()| state.whole())).await;
        built.map_err(failed(|e| StorageIOError::write_snapshot(None, e)))
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotBuilder = Self;

    async fn applied_state(
        &mut self,
    ) -> std::result::Result<(Option<LogId<u64>>, StoredMembership<u64, openraft::BasicNode>), StorageError<u64>> {
        Ok(self.with(|state| (state.decided.last, state.decided.members.clone())))
    }

    async fn apply<I>(&mut self, entries: I) -> std::result::Result<Vec<()>, StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry<Types>> = entries.into_iter().collect();
        let applied = self.on_disk(|state| entries.into_iter().map(|entry| state.apply(entry)).collect()).await;
        applied.map_err(failed(StorageIOError::write_state_machine))
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> std::result::Result<Box<Cursor<Vec<u8>>>, StorageError<u64>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        _meta: &Meta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> std::result::Result<(), StorageError<u64>> {
        let installed = self.on_disk(move |state| state.install(snapshot.get_ref())).await;
        installed.map_err(failed(|e| StorageIOError::write_snapshot(None, e)))
    }

    async fn get_current_snapshot(&mut self) -> std::result::Result<Option<Snapshot<Types>>, StorageError<u64>> {
        let whole = self.on_disk(|state| state.decided.last.map(|_| state.whole()).transpose()).await;
        whole.map_err(failed(StorageIOError::read_state_machine))
    }
}
