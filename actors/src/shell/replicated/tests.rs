//! What is on disk, torn and whole, of a supervisor among several.

use super::*;
use crate::table::Table;
use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::testing::{StoreBuilder, Suite, log_id};
use openraft::{Entry, EntryPayload, RaftLogReader, RaftSnapshotBuilder, Vote};
use std::path::Path;
use tempfile::TempDir;
use tokio::sync::watch;

/// As if all were in snapshots.
fn all() -> watch::Receiver<u64> {
    watch::Sender::new(u64::MAX).subscribe()
}

struct Folders;

impl StoreBuilder<Types, Journal, Machine, TempDir> for Folders {
    async fn build(&self) -> Result<(TempDir, Journal, Machine), StorageError<u64>> {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("log"), all()).unwrap();
        let machine = Machine::open(folder.path()).unwrap();
        Ok((folder, journal, machine))
    }
}

/// JO-1, MA-2: openraft's own tests of what it stores things in.
#[test]
fn the_journal_and_the_machine_are_what_raft_expects() {
    Suite::test_all(Folders).unwrap();
}

fn entry(index: u64, word: Word) -> Entry<Types> {
    Entry { log_id: log_id(1, 1, index), payload: EntryPayload::Normal(word) }
}

async fn held(journal: &mut Journal) -> (Option<Vote<u64>>, Vec<u64>) {
    let entries = journal.try_get_log_entries(0..).await.unwrap();
    (journal.read_vote().await.unwrap(), entries.iter().map(|e| e.log_id.index).collect())
}

/// JO-2: whatever is left of the file is a state that was, in order.
#[tokio::test]
async fn a_torn_journal_is_one_that_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut journal = Journal::open(&path, all()).unwrap();
    let mut states = vec![held(&mut journal).await];
    journal.save_vote(&Vote::new(1, 2)).await.unwrap();
    states.push(held(&mut journal).await);
    for index in 0..4 {
        journal.blocking_append([entry(index, Word::Event("a".repeat(index as usize)))]).await.unwrap();
        states.push(held(&mut journal).await);
    }
    journal.truncate(log_id(1, 1, 2)).await.unwrap();
    states.push(held(&mut journal).await);
    journal.blocking_append([entry(2, Word::Event("b".to_owned()))]).await.unwrap();
    states.push(held(&mut journal).await);
    journal.purge(log_id(1, 1, 0)).await.unwrap();
    states.push(held(&mut journal).await);
    let whole = std::fs::read(&path).unwrap();
    let mut at = 0;
    for length in 0..=whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let found = held(&mut Journal::open(&path, all()).unwrap()).await;
        at += usize::from(found != states[at]);
        assert_eq!(found, states[at], "{length} bytes");
    }
    assert_eq!(at, states.len() - 1);
}

/// JO-4.
#[tokio::test]
async fn entries_stay_until_a_snapshot_has_them() {
    let folder = tempfile::tempdir().unwrap();
    let saved = watch::Sender::new(1);
    let mut journal = Journal::open(&folder.path().join("log"), saved.subscribe()).unwrap();
    journal.blocking_append(words(4)).await.unwrap();
    journal.purge(log_id(1, 1, 1)).await.unwrap();
    let mut purging = journal.clone();
    let purge = tokio::spawn(async move { purging.purge(log_id(1, 1, 2)).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(held(&mut journal).await.1, [2, 3]);
    saved.send_replace(2);
    purge.await.unwrap();
    assert_eq!(held(&mut journal).await.1, [3]);
}

/// JO-3.
#[tokio::test]
async fn a_journal_is_made_short_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut journal = Journal::open(&path, all()).unwrap();
    journal.save_vote(&Vote::new(3, 1)).await.unwrap();
    let mut longest = 0;
    for round in 0..8 {
        let entries = (0..1000).map(|n| entry(round * 1000 + n, Word::Event("x".repeat(100))));
        journal.blocking_append(entries).await.unwrap();
        longest = longest.max(std::fs::metadata(&path).unwrap().len());
        journal.purge(log_id(1, 1, round * 1000 + 989)).await.unwrap();
    }
    assert!(longest < 4 * 1000 * 140, "{longest} bytes");
    let state = journal.get_log_state().await.unwrap();
    let before = held(&mut journal).await;
    assert_eq!(before.1, (7990..8000).collect::<Vec<_>>());
    drop(journal);
    let mut again = Journal::open(&path, all()).unwrap();
    assert_eq!((held(&mut again).await, again.get_log_state().await.unwrap()), (before, state));
}

/// JO-2: of entries that were written together a disk may keep the end without the beginning.
#[tokio::test]
async fn what_is_written_together_is_there_together() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut journal = Journal::open(&path, all()).unwrap();
    journal.blocking_append(words(3)).await.unwrap();
    let before = (held(&mut journal).await, std::fs::read(&path).unwrap().len());
    journal.blocking_append(words(9).split_off(3)).await.unwrap();
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    for missing in [1, 40, whole.len() - before.1 - 1] {
        let mut bytes = whole.clone();
        bytes[before.1..][..missing].fill(0);
        std::fs::write(&path, bytes).unwrap();
        let mut again = Journal::open(&path, all()).unwrap();
        assert_eq!(held(&mut again).await, before.0, "without {missing} bytes");
    }
}

fn words(count: u64) -> Vec<Entry<Types>> {
    let word = |n: u64| match n % 3 {
        0 => Word::Record(Record::Epoch { table: Table { epoch: n, ..Table::default() }, next_node: n }),
        1 => Word::Metrics(format!("{{\"step\":{n}}}")),
        _ => Word::Event(format!("{{\"event\":\"{n}\"}}")),
    };
    (0..count).map(|n| entry(n, word(n))).collect()
}

fn files(folder: &Path) -> [String; 2] {
    ["metrics.jsonl", "events.jsonl"].map(|name| std::fs::read_to_string(folder.join(name)).unwrap())
}

/// MA-1, MA-2: a process that ends at any moment has the same lines again, each once, with a snapshot and without.
#[tokio::test]
async fn lines_are_written_once() {
    let (folder, all) = (tempfile::tempdir().unwrap(), words(30));
    let mut machine = Machine::open(folder.path()).unwrap();
    machine.apply(all.clone()).await.unwrap();
    let (expected, records) = (files(folder.path()), machine.records());
    for (snapshot, crash) in [(0, 7), (5, 5), (9, 30), (12, 20), (29, 30)] {
        let folder = tempfile::tempdir().unwrap();
        let mut machine = Machine::open(folder.path()).unwrap();
        machine.apply(all[..snapshot].to_vec()).await.unwrap();
        machine.build_snapshot().await.unwrap();
        machine.apply(all[snapshot..crash].to_vec()).await.unwrap();
        drop(machine);
        // A line was being written.
        let path = folder.path().join("metrics.jsonl");
        let torn = [std::fs::read(&path).unwrap(), b"{\"st".to_vec()].concat();
        std::fs::write(&path, torn).unwrap();
        let mut machine = Machine::open(folder.path()).unwrap();
        let from = machine.applied_state().await.unwrap().0.map_or(0, |last| last.index as usize + 1);
        assert_eq!(from, snapshot);
        machine.apply(all[from..].to_vec()).await.unwrap();
        assert_eq!(files(folder.path()), expected);
        assert_eq!(machine.records(), records);
    }
    // What a power cut left in the place of lines is not taken for them.
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("metrics.jsonl"), b"\0\0\0\0\n{}\n").unwrap();
    Machine::open(folder.path()).unwrap().apply(all.clone()).await.unwrap();
    assert_eq!(files(folder.path()), expected);
    // One that was away gets all of it at once, over what it had.
    let behind = tempfile::tempdir().unwrap();
    let mut other = Machine::open(behind.path()).unwrap();
    other.apply(all[..4].to_vec()).await.unwrap();
    let whole = machine.build_snapshot().await.unwrap();
    other.install_snapshot(&whole.meta, whole.snapshot).await.unwrap();
    assert_eq!((files(behind.path()), other.records()), (expected, records));
    // What other versions or other programs wrote is named.
    std::fs::write(behind.path().join("snapshot"), b"\x07garbage").unwrap();
    assert!(Machine::open(behind.path()).unwrap_err().to_string().contains("another version"));
}
