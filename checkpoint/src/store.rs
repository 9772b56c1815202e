//! The store of a run's checkpoints.
//!
//! Layout of the folder: `chunks/HASH`, `manifests/STEP`, `catalogue/` (sled).
//! - DS-1: a checkpoint exists when its manifest is there; the manifest is written after all its chunks
//!   are synced.
//! - DS-2: the catalogue says nothing that manifests don't: it is made from them again when it is
//!   missing, damaged or behind.
//! - DS-3: the newest `keep` checkpoints are kept; chunks that neither a kept manifest nor a checkpoint
//!   that is being made names are removed.
//! - DS-4: a process whose turn is over publishes and removes nothing. It asks before each change: a stop between the
//!   question and the change is not seen.

use crate::catalogue::Catalogue;
use crate::chunk::{CHUNK_WORDS, ChunkHash, Chunks, write_whole};
use crate::error::{StoreError, at};
use crate::manifest::{Element, Manifest, PartEntry, TensorEntry};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tensor's state in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// Its name.
    pub name: String,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// By [`Part`]: weight, first and second moment, and the average of the weight if the job keeps one.
    pub parts: Vec<StoredPart>,
}

/// One part of a tensor's state in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredPart {
    /// What its elements are.
    pub element: Element,
    /// Words that hold them.
    pub words: Arc<Vec<f32>>,
}

/// A part of a tensor's state that is of use by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The weight.
    Weight = 0,
    /// The average of the weight over the steps (EMA).
    Average = 3,
}

/// Reads the checkpoints of a run. Any number of processes may, while another one writes.
#[derive(Debug, Clone)]
pub struct Reader {
    folder: PathBuf,
    job: String,
    chunks: Chunks,
}

impl Reader {
    /// Of `job` in `folder`.
    pub fn new(folder: &Path, job: &str) -> Self {
        Self { folder: folder.to_owned(), job: job.to_owned(), chunks: Chunks::new(folder.join("chunks")) }
    }

    fn manifests(&self) -> PathBuf {
        self.folder.join("manifests")
    }

    fn manifest_path(&self, step: u64) -> PathBuf {
        self.manifests().join(step.to_string())
    }

    /// Steps of the checkpoints that exist, ascending.
    pub fn steps(&self) -> Result<Vec<u64>, StoreError> {
        let manifests = self.manifests();
        let mut steps = Vec::new();
        for entry in fs::read_dir(&manifests).map_err(at(&manifests))? {
            let entry = entry.map_err(at(&manifests))?;
            // Anything else was refused, or is what an interrupted write left behind.
            steps.extend(entry.file_name().to_string_lossy().parse::<u64>());
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Reads a manifest.
    pub fn manifest(&self, step: u64) -> Result<Manifest, StoreError> {
        Manifest::read(&self.manifest_path(step), &self.job)
    }

    /// Reads tensors of a checkpoint, verifying every chunk. Names come with rows and columns.
    pub fn read(&self, step: u64, names: &[(String, usize, usize)]) -> Result<Vec<StoredTensor>, StoreError> {
        let manifest = self.manifest(step)?;
        let tensor = |(name, rows, columns): &(String, usize, usize)| {
            let parts = manifest.entry(name).map_or(0, |entry| entry.parts.len());
            // One that is not there is asked for, to say so.
            let part = |n| self.read_part(&manifest, name, *rows, *columns, n);
            let parts = (0..parts.max(1)).map(part).collect::<Result<_, _>>()?;
            Ok(StoredTensor { name: name.clone(), rows: *rows, columns: *columns, parts })
        };
        names.iter().map(tensor).collect()
    }

    /// What a tensor of a checkpoint should not be.
    fn wrong(&self, manifest: &Manifest, tensor: &str, reason: String) -> StoreError {
        let (path, step) = (self.manifest_path(manifest.step), manifest.step);
        StoreError::Tensor { path, step, tensor: tensor.to_owned(), reason }
    }

    /// Reads one part of a tensor's state.
    fn read_part(
        &self,
        manifest: &Manifest,
        name: &str,
        rows: usize,
        columns: usize,
        part: usize,
    ) -> Result<StoredPart, StoreError> {
        let wrong = |reason| self.wrong(manifest, name, reason);
        let entry = manifest.entry(name).ok_or_else(|| wrong("is missing".to_owned()))?;
        if (entry.rows, entry.columns) != (rows as u64, columns as u64) {
            return Err(wrong(format!("is {} x {}, expected {rows} x {columns}", entry.rows, entry.columns)));
        }
        let no_part = || {
            wrong(if part == Part::Average as usize {
                "has no average: the job keeps none (optimizer.ema)".to_owned()
            } else {
                format!("has {} parts, expected part {part}", entry.parts.len())
            })
        };
        let PartEntry { element, chunks } = entry.parts.get(part).ok_or_else(no_part)?;
        let expected = element.words(rows * columns);
        let mut words = Vec::with_capacity(expected);
        for hash in chunks {
            words.extend(bytemuck::pod_collect_to_vec::<u8, f32>(&self.chunks.get(ChunkHash(*hash))?));
        }
        if words.len() == expected {
            Ok(StoredPart { element: *element, words: Arc::new(words) })
        } else {
            Err(wrong(format!("has {} words, expected {expected}", words.len())))
        }
    }

    /// Reads one part of one tensor, whose elements are f32.
    pub fn part(
        &self,
        manifest: &Manifest,
        name: &str,
        rows: usize,
        columns: usize,
        part: Part,
    ) -> Result<Arc<Vec<f32>>, StoreError> {
        let read = self.read_part(manifest, name, rows, columns, part as usize)?;
        if read.element == Element::F32 {
            return Ok(read.words);
        }
        let reason = format!("has part {} in {:?}, expected F32", part as usize, read.element);
        Err(self.wrong(manifest, name, reason))
    }

    /// Reads every chunk of a checkpoint.
    pub fn verify(&self, step: u64) -> Result<(), StoreError> {
        let manifest = self.manifest(step)?;
        let unique: BTreeSet<&[u8; 32]> = manifest.chunks().collect();
        unique.into_iter().try_for_each(|hash| self.chunks.get(ChunkHash(*hash)).map(|_| ()))
    }
}

/// See the module. One process at a time has it.
#[derive(Debug)]
pub struct Store {
    reader: Reader,
    keep: usize,
    catalogue: Catalogue,
    /// Tensors that are stored of checkpoints that are being made, by step and name.
    pending: BTreeMap<u64, BTreeMap<String, TensorEntry>>,
    mine: Mine,
}

/// Whether it is this process's turn.
struct Mine(Arc<dyn Fn() -> bool + Send + Sync>);

impl std::fmt::Debug for Mine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mine({})", (self.0)())
    }
}

impl Store {
    /// Opens or creates the store of `job` in `folder`. `keep` is at least 1. The caller sees to it that
    /// nobody else has it open.
    pub fn open(folder: &Path, job: &str, keep: usize) -> Result<Self, StoreError> {
        Self::in_turn(folder, &folder.join("catalogue"), job, keep, Arc::new(|| true))
    }

    /// The same for one of several processes that have the store in turn, each with a catalogue of its own (DS-4). `mine`
    /// says whether it is this one's turn.
    pub fn in_turn(
        folder: &Path,
        catalogue: &Path,
        job: &str,
        keep: usize,
        mine: Arc<dyn Fn() -> bool + Send + Sync>,
    ) -> Result<Self, StoreError> {
        let reader = Reader::new(folder, job);
        for needed in [reader.manifests(), folder.join("chunks")] {
            fs::create_dir_all(&needed).map_err(at(&needed))?;
        }
        let read = |step: &u64| reader.manifest(*step);
        let catalogue = Catalogue::open(catalogue, &reader.steps()?, read)?;
        Ok(Self { keep: keep.max(1), catalogue, pending: BTreeMap::new(), reader, mine: Mine(mine) })
    }

    /// The reading half.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Writes and syncs the chunks of some tensors of the checkpoint of `step`, which is being made.
    pub fn put(&mut self, step: u64, tensors: &[StoredTensor]) -> Result<(), StoreError> {
        let chunks = &self.reader.chunks;
        let store = |part: &StoredPart| -> Result<PartEntry, StoreError> {
            let put = |c: &[f32]| Ok(chunks.put(bytemuck::cast_slice(c))?.0);
            let chunks = part.words.chunks(CHUNK_WORDS).map(put).collect::<Result<_, StoreError>>()?;
            Ok(PartEntry { element: part.element, chunks })
        };
        for t in tensors {
            let parts = t.parts.iter().map(store).collect::<Result<_, _>>()?;
            let entry = TensorEntry { name: t.name.clone(), rows: t.rows as u64, columns: t.columns as u64, parts };
            self.pending.entry(step).or_default().insert(t.name.clone(), entry);
        }
        Ok(())
    }

    /// Makes the checkpoint of `step` exist with all that was put, and removes those that are not kept
    /// any more. May be asked again after an error.
    pub fn publish(&mut self, step: u64) -> Result<(), StoreError> {
        self.turn()?;
        // Nothing is pending of one that exists and is published again because something after that failed.
        if let Some(tensors) = self.pending.get(&step) {
            let manifest =
                Manifest { job: self.reader.job.clone(), step, tensors: tensors.values().cloned().collect() };
            write_whole(&self.reader.manifest_path(step), &manifest.encode())?;
            self.catalogue.add(&manifest)?;
            // Older ones that were not completed never will be.
            self.pending.retain(|s, _| *s > step);
        }
        self.prune()
    }

    /// DS-4.
    fn turn(&self) -> Result<(), StoreError> {
        if (self.mine.0)() { Ok(()) } else { Err(StoreError::OutOfTurn { path: self.reader.folder.clone() }) }
    }

    fn prune(&self) -> Result<(), StoreError> {
        let steps = self.reader.steps()?;
        let (old, kept) = steps.split_at(steps.len().saturating_sub(self.keep));
        if old.is_empty() {
            return Ok(());
        }
        for step in old {
            self.turn()?;
            let path = self.reader.manifest_path(*step);
            fs::remove_file(&path).map_err(at(&path))?;
            self.catalogue.remove(*step)?;
        }
        // A chunk goes only if neither the catalogue nor a manifest names it.
        let mut named: BTreeSet<String> = self.catalogue.chunks()?;
        for step in kept {
            named.extend(self.reader.manifest(*step)?.chunks().map(|hash| ChunkHash(*hash).to_string()));
        }
        let pending = self.pending.values().flat_map(BTreeMap::values).flat_map(TensorEntry::chunks);
        named.extend(pending.map(|hash| ChunkHash(*hash).to_string()));
        // Asked again before each one.
        self.reader.chunks.sweep(|name| named.contains(name) || !(self.mine.0)())?;
        Ok(())
    }

    /// The newest checkpoint of which every chunk is good, and what is wrong with newer ones. These are
    /// put aside: a damaged chunk is removed, so that it is written again when its content comes again,
    /// and its manifest is renamed to `STEP.refused`. What merely could not be read now is an error.
    pub fn newest_good(&self) -> Result<(Option<u64>, Vec<StoreError>), StoreError> {
        let mut wrong = Vec::new();
        for step in self.reader.steps()?.into_iter().rev() {
            let Err(error) = self.reader.verify(step) else { return Ok((Some(step), wrong)) };
            if !error.is_damage() {
                return Err(error);
            }
            self.turn()?;
            if let StoreError::Damaged { path, .. } = &error {
                fs::remove_file(path).map_err(at(path))?;
            }
            wrong.push(error);
        }
        Ok((None, wrong))
    }

    /// Puts aside checkpoints after `step`, which turned out to be damaged.
    pub fn refuse_after(&self, step: u64) -> Result<(), StoreError> {
        for newer in self.reader.steps()?.into_iter().filter(|s| *s > step) {
            self.turn()?;
            let path = self.reader.manifest_path(newer);
            fs::rename(&path, path.with_extension("refused")).map_err(at(&path))?;
            self.catalogue.remove(newer)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(seed: f32) -> Vec<StoredTensor> {
        let part = |n: usize, plus: f32| StoredPart {
            element: Element::F32,
            words: Arc::new((0..n).map(|i| i as f32 * 0.5 + plus).collect()),
        };
        // Moments in BF16: five of them take three words.
        let low = |n: usize, plus: f32| StoredPart { element: Element::Bf16, ..part(n.div_ceil(2), plus) };
        let long = CHUNK_WORDS + 5;
        vec![
            StoredTensor {
                name: "b".into(),
                rows: 1,
                columns: 5,
                parts: vec![part(5, seed), low(5, 1.0), low(5, 2.0)],
            },
            StoredTensor {
                name: "a".into(),
                rows: 1,
                columns: long,
                parts: vec![part(long, seed), part(long, 0.0), part(long, 0.0)],
            },
        ]
    }

    fn names() -> Vec<(String, usize, usize)> {
        vec![("a".into(), 1, CHUNK_WORDS + 5), ("b".into(), 1, 5)]
    }

    fn save(store: &mut Store, step: u64, seed: f32) {
        store.put(step, &tensors(seed)).unwrap();
        store.publish(step).unwrap();
    }

    #[test]
    fn a_checkpoint_that_is_being_made_keeps_its_chunks_when_an_older_one_is_published() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "job", 1).unwrap();
        save(&mut store, 1, 1.0);
        store.put(3, &tensors(3.0)).unwrap();
        save(&mut store, 2, 2.0);
        store.publish(3).unwrap();
        assert_eq!(store.newest_good().unwrap().0, Some(3));
    }

    /// DS-1, DS-3, CH-2.
    #[test]
    fn what_is_stored_is_read_and_old_ones_go_with_their_chunks() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "job", 2).unwrap();
        for step in 1..=4 {
            save(&mut store, step, step as f32);
        }
        assert_eq!(store.reader().steps().unwrap(), [3, 4]);
        let read = store.reader().read(4, &names()).unwrap();
        assert_eq!(read[1], tensors(4.0)[0]);
        assert_eq!(read[0], tensors(4.0)[1]);
        let count = fs::read_dir(folder.path().join("chunks")).unwrap().count();
        // Per step: three chunks of weights (a: 2, b: 1); common: b's moments (2) and a's (2, shared by both).
        assert_eq!(count, 2 * 3 + 4);
    }

    /// What another version of the program wrote is neither read nor put aside.
    #[test]
    fn another_version_is_named_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "job", 3).unwrap();
        save(&mut store, 1, 1.0);
        let path = store.reader().manifest_path(2);
        let mut bytes = fs::read(store.reader().manifest_path(1)).unwrap();
        bytes[7] = b'1';
        fs::write(&path, &bytes).unwrap();
        let error = store.newest_good().unwrap_err().to_string();
        assert!(error.contains("EVERMAN1") && error.contains(&path.display().to_string()), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    /// DS-4: one that wakes when another has the store removes neither a checkpoint nor a chunk of it.
    #[test]
    fn a_process_whose_turn_is_over_removes_nothing() {
        use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str, mine: Arc<dyn Fn() -> bool + Send + Sync>| {
            Store::in_turn(folder.path(), &folder.path().join(name), "job", 1, mine).unwrap()
        };
        let turn = Arc::new(AtomicBool::new(true));
        let mine = Arc::clone(&turn);
        let mut first = open("first", Arc::new(move || mine.load(Relaxed)));
        save(&mut first, 1, 1.0);
        first.put(2, &tensors(2.0)).unwrap();
        turn.store(false, Relaxed);
        let mut second = open("second", Arc::new(|| true));
        second.put(3, &tensors(3.0)).unwrap();
        let error = first.publish(2).unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        assert!(first.refuse_after(0).is_err() && first.prune().is_ok());
        assert_eq!(second.reader().steps().unwrap(), [1]);
        second.publish(3).unwrap();
        assert_eq!(second.reader().steps().unwrap(), [3]);
        assert_eq!(second.newest_good().unwrap().0, Some(3));
    }

    /// DS-2.
    #[test]
    fn the_catalogue_is_made_again_from_manifests() {
        let folder = tempfile::tempdir().unwrap();
        save(&mut Store::open(folder.path(), "job", 3).unwrap(), 1, 1.0);
        fs::remove_dir_all(folder.path().join("catalogue")).unwrap();
        save(&mut Store::open(folder.path(), "job", 3).unwrap(), 2, 2.0);
        for file in fs::read_dir(folder.path().join("catalogue")).unwrap() {
            let path = file.unwrap().path();
            if path.is_file() {
                fs::write(path, b"garbage").unwrap();
            }
        }
        let mut store = Store::open(folder.path(), "job", 1).unwrap();
        save(&mut store, 3, 3.0);
        assert_eq!(store.reader().steps().unwrap(), [3]);
        assert_eq!(store.reader().read(3, &names()).unwrap()[1], tensors(3.0)[0]);
    }

    /// CH-1, CH-3.
    #[test]
    fn damage_is_named_and_the_one_before_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "job", 3).unwrap();
        save(&mut store, 1, 11.0);
        save(&mut store, 2, 12.0);
        let hash = ChunkHash(store.reader().manifest(2).unwrap().tensors[1].parts[0].chunks[0]);
        let path = folder.path().join("chunks").join(hash.to_string());
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[3] ^= 1;
        for bad in [&good[..5], &flipped, &[]] {
            fs::write(&path, bad).unwrap();
            let error = store.reader().read(2, &names()).unwrap_err().to_string();
            assert!(error.contains(&hash.to_string()), "{error}");
            let (newest, wrong) = store.newest_good().unwrap();
            assert_eq!((newest, wrong.len()), (Some(1), 1));
            // The same content is stored again in its place.
            save(&mut store, 2, 12.0);
            assert_eq!(store.newest_good().unwrap().0, Some(2));
        }
        let manifest = folder.path().join("manifests/2");
        let mut bytes = fs::read(&manifest).unwrap();
        bytes[20] ^= 4;
        fs::write(&manifest, &bytes).unwrap();
        assert_eq!(store.newest_good().unwrap().0, Some(1));
    }

    #[test]
    fn a_foreign_manifest_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        save(&mut Store::open(folder.path(), "job", 3).unwrap(), 1, 1.0);
        let error = Store::open(folder.path(), "other", 3).unwrap().reader().manifest(1).unwrap_err();
        assert!(matches!(error, StoreError::ForeignJob { .. }), "{error}");
    }

    /// Every cut and every changed byte of a manifest is an error that is told, never a panic.
    #[test]
    fn damaged_manifests_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), "job", 2).unwrap();
        save(&mut store, 1, 1.0);
        let good = fs::read(folder.path().join("manifests/1")).unwrap();
        assert!(Manifest::decode(&good).is_ok());
        for at in 0..good.len() {
            assert!(Manifest::decode(&good[..at]).is_err());
            let mut changed = good.clone();
            changed[at] ^= 0x40;
            assert!(Manifest::decode(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn garbage_is_no_manifest() {
        for bytes in [&b""[..], b"EVERMAN3", b"EVERMAN3\0\0\0\0", b"EVERMAN3aaaaaaaaaaaaaaaaaaaaaa"] {
            assert!(Manifest::decode(bytes).is_err());
        }
    }
}
