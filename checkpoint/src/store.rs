//! The store of a run's checkpoints.
//!
//! Layout of its place: `chunks/HASH`, `manifests/STEP`. The catalogue (sled) is in a folder of this machine.
//! - DS-1: a checkpoint exists when its manifest is there; the manifest is written after all its chunks
//!   are synced.
//! - DS-2: the catalogue says nothing that manifests don't: it is made from them again when it is
//!   missing, damaged or behind.
//! - DS-3: the newest `keep` checkpoints are kept; chunks that neither a kept manifest nor a checkpoint
//!   that is being made names are removed.
//! - DS-4: a process whose turn is over publishes and removes nothing. It asks before each change: a stop between the
//!   question and the change is not seen.

use crate::catalogue::Catalogue;
use crate::chunk::{CHUNK_WORDS, ChunkHash, Chunks};
use crate::error::StoreError;
use crate::manifest::{Element, Manifest, PartEntry, TensorEntry};
use crate::parallel::each;
use crate::place::Place;
use std::collections::{BTreeMap, BTreeSet};
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
    place: Place,
    job: String,
    chunks: Chunks,
}

/// Of a place: `manifests/STEP`.
const MANIFESTS: &str = "manifests";

fn name_of(step: u64) -> String {
    format!("{MANIFESTS}/{step}")
}

/// Steps among names of manifests, ascending. Anything else was refused, or is what an interrupted write left behind.
fn steps_of(names: &[String]) -> Vec<u64> {
    let mut steps: Vec<u64> = names.iter().filter_map(|name| name.parse().ok()).collect();
    steps.sort_unstable();
    steps
}

impl Reader {
    /// Of `job` in a place.
    pub fn new(place: Place, job: &str) -> Self {
        Self { job: job.to_owned(), chunks: Chunks::new(place.clone()), place }
    }

    fn manifest_path(&self, step: u64) -> PathBuf {
        self.place.path(&name_of(step))
    }

    /// Where it is, for people.
    pub fn path(&self) -> PathBuf {
        self.place.path(MANIFESTS)
    }

    /// Steps of the checkpoints that exist, ascending.
    pub fn steps(&self) -> Result<Vec<u64>, StoreError> {
        Ok(steps_of(&self.place.names(MANIFESTS)?))
    }

    /// Reads a manifest.
    pub fn manifest(&self, step: u64) -> Result<Manifest, StoreError> {
        Manifest::read(&self.place.get(&name_of(step))?, &self.manifest_path(step), &self.job)
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
        each(self.place.waits(), names.iter().collect(), tensor).into_iter().collect()
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
        if chunks.len() != expected.div_ceil(CHUNK_WORDS) {
            return Err(wrong(format!("has {} chunks, expected those of {expected} words", chunks.len())));
        }
        let mut words = vec![0.0; expected];
        let read = |(out, hash): (&mut [f32], &[u8; 32])| {
            let (bytes, out) = (self.chunks.get(ChunkHash(*hash))?, bytemuck::cast_slice_mut::<f32, u8>(out));
            if bytes.len() != out.len() {
                return Err(wrong(format!("has a chunk of {} bytes, expected {}", bytes.len(), out.len())));
            }
            out.copy_from_slice(&bytes);
            Ok(())
        };
        let parts = words.chunks_mut(CHUNK_WORDS).zip(chunks).collect();
        each(self.place.waits(), parts, read).into_iter().collect::<Result<(), _>>()?;
        Ok(StoredPart { element: *element, words: Arc::new(words) })
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

    /// Reads every chunk of a checkpoint, and gives what is wrong with those that are damaged.
    fn damaged(&self, step: u64) -> Result<Vec<StoreError>, StoreError> {
        let manifest = self.manifest(step)?;
        let unique: BTreeSet<&[u8; 32]> = manifest.chunks().collect();
        let wrong = |hash: &[u8; 32]| self.chunks.get(ChunkHash(*hash)).err();
        let wrong = each(self.place.waits(), unique.into_iter().collect(), wrong).into_iter().flatten();
        let (damaged, other): (Vec<_>, Vec<_>) = wrong.partition(StoreError::is_damage);
        other.into_iter().next().map_or(Ok(damaged), Err)
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
    /// Opens or creates the store of `job` in a place, with its catalogue in a folder, or in memory. `keep` is at least 1. The
    /// caller sees to it that nobody else has it open.
    pub fn open(place: Place, catalogue: Option<&Path>, job: &str, keep: usize) -> Result<Self, StoreError> {
        Self::in_turn(place, catalogue, job, keep, Arc::new(|| true))
    }

    /// The same for one of several processes that have the store in turn, each with a catalogue of its own (DS-4). `mine`
    /// says whether it is this one's turn.
    pub fn in_turn(
        place: Place,
        catalogue: Option<&Path>,
        job: &str,
        keep: usize,
        mine: Arc<dyn Fn() -> bool + Send + Sync>,
    ) -> Result<Self, StoreError> {
        let reader = Reader::new(place, job);
        reader.place.make(MANIFESTS)?;
        reader.chunks.make()?;
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
        let parts: Vec<&[f32]> = tensors.iter().flat_map(|t| &t.parts).map(|part| &part.words[..]).collect();
        let mut stored = self.reader.chunks.put(&parts)?.into_iter();
        for t in tensors {
            let of_part = |(part, chunks): (&StoredPart, _)| PartEntry { element: part.element, chunks };
            let parts = t.parts.iter().zip(&mut stored).map(of_part).collect();
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
            self.reader.place.put(&name_of(step), &manifest.encode())?;
            self.catalogue.add(&manifest)?;
            // Older ones that were not completed never will be.
            self.pending.retain(|s, _| *s > step);
        }
        self.prune()
    }

    /// DS-4.
    fn turn(&self) -> Result<(), StoreError> {
        if (self.mine.0)() { Ok(()) } else { Err(StoreError::OutOfTurn { path: self.reader.path() }) }
    }

    fn prune(&self) -> Result<(), StoreError> {
        let names = self.reader.place.names(MANIFESTS)?;
        // Nobody else writes manifests in this process's turn: a name with a dot before it is of a write that was interrupted.
        for name in names.iter().filter(|name| name.starts_with('.')) {
            self.turn()?;
            self.reader.place.remove(&format!("{MANIFESTS}/{name}"))?;
        }
        let steps = steps_of(&names);
        let (old, kept) = steps.split_at(steps.len().saturating_sub(self.keep));
        if old.is_empty() {
            return Ok(());
        }
        for step in old {
            self.turn()?;
            self.reader.place.remove(&name_of(*step))?;
            self.catalogue.remove(*step)?;
        }
        // A chunk goes only if neither the catalogue nor a manifest names it.
        let mut named: BTreeSet<String> = self.catalogue.chunks()?;
        for step in kept {
            match self.reader.manifest(*step) {
                Ok(manifest) => named.extend(manifest.chunks().map(|hash| ChunkHash(*hash).to_string())),
                // It is of no use, and in the way of nothing: whoever begins next puts it aside, or says so.
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error),
            }
        }
        let pending = self.pending.values().flat_map(BTreeMap::values).flat_map(TensorEntry::chunks);
        named.extend(pending.map(|hash| ChunkHash(*hash).to_string()));
        // Asked again before each one.
        self.reader.chunks.sweep(|name| named.contains(name) || !(self.mine.0)())?;
        Ok(())
    }

    /// The newest checkpoint of which every chunk is good, and what is wrong with newer ones. These are
    /// put aside: damaged chunks are removed, so that they are written again when their content comes again,
    /// and its manifest is renamed to `STEP.refused`. What merely could not be read now is an error.
    pub fn newest_good(&self) -> Result<(Option<u64>, Vec<StoreError>), StoreError> {
        let mut wrong = Vec::new();
        for step in self.reader.steps()?.into_iter().rev() {
            let found = match self.reader.damaged(step) {
                Ok(found) if found.is_empty() => return Ok((Some(step), wrong)),
                Ok(found) => found,
                Err(error) if error.is_damage() => vec![error],
                Err(error) => return Err(error),
            };
            self.turn()?;
            for error in &found {
                if let StoreError::Damaged { expected, .. } = error {
                    self.reader.chunks.remove(expected)?;
                }
            }
            // One for each checkpoint says enough.
            wrong.extend(found.into_iter().next());
        }
        Ok((None, wrong))
    }

    /// Puts aside checkpoints after `step`, which turned out to be damaged.
    pub fn refuse_after(&self, step: u64) -> Result<(), StoreError> {
        for newer in self.reader.steps()?.into_iter().filter(|s| *s > step) {
            self.turn()?;
            self.reader.place.rename(&name_of(newer), &format!("{}.refused", name_of(newer)))?;
            self.catalogue.remove(newer)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
