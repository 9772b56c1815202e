//! The catalogue: which checkpoint names which chunks, in sled.
//!
//! sled is beta and known to lose its files at abrupt stops, so nothing depends on it: it is an index
//! over manifests, and is made from them again whenever it does not open or does not agree. A catalogue without
//! a folder is forgotten with its process.

use crate::chunk::ChunkHash;
use crate::error::StoreError;
use crate::manifest::Manifest;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const CACHE_BYTES: u64 = 16 << 20;

/// Step (big-endian), then the chunk's hash.
type Key = [u8; 40];

/// See the module.
#[derive(Debug)]
pub(crate) enum Catalogue {
    Disk { db: sled::Db, path: PathBuf },
    Memory(Mutex<BTreeSet<Key>>),
}

fn key(step: u64, hash: &[u8; 32]) -> Key {
    let mut key = [0; 40];
    key[..8].copy_from_slice(&step.to_be_bytes());
    key[8..].copy_from_slice(hash);
    key
}

impl Catalogue {
    /// Opens the catalogue and brings it in line with the manifests of `steps`. Manifests that cannot be
    /// read are left out: whoever wants such a checkpoint is told by its manifest.
    pub(crate) fn open(
        path: Option<&Path>,
        steps: &[u64],
        read: impl Fn(&u64) -> Result<Manifest, StoreError>,
    ) -> Result<Self, StoreError> {
        let catalogue = match path {
            Some(path) => Self::Disk { db: open_or_begin(path)?, path: path.to_owned() },
            None => Self::Memory(Mutex::default()),
        };
        let known = catalogue.steps().unwrap_or_default();
        if let Self::Disk { path, .. } = &catalogue
            && steps.is_empty()
            && !known.is_empty()
        {
            // Beginning anew would lose what is where the store should be.
            let reason =
                format!("it names checkpoints of steps {known:?}, and none is there: is checkpoint.store another?");
            return Err(StoreError::Invalid { path: path.to_owned(), what: "catalogue of this store", reason });
        }
        if known != steps {
            catalogue.clear()?;
            for manifest in steps.iter().filter_map(|s| read(s).ok()) {
                catalogue.add(&manifest)?;
            }
        }
        Ok(catalogue)
    }

    fn clear(&self) -> Result<(), StoreError> {
        match self {
            Self::Disk { db, path } => db.clear().map_err(failed(path)),
            Self::Memory(keys) => {
                locked(keys).clear();
                Ok(())
            }
        }
    }

    fn keys(&self) -> Result<BTreeSet<Key>, StoreError> {
        let (db, path) = match self {
            Self::Disk { db, path } => (db, path),
            Self::Memory(keys) => return Ok(locked(keys).clone()),
        };
        let key = |key: sled::Result<sled::IVec>| {
            let key = key.map_err(failed(path))?;
            Key::try_from(&key[..]).map_err(|_| StoreError::Invalid {
                path: path.clone(),
                what: "catalogue",
                reason: format!("a key of {} bytes, expected 40", key.len()),
            })
        };
        db.iter().keys().map(key).collect()
    }

    fn steps(&self) -> Result<Vec<u64>, StoreError> {
        let step = |key: &Key| u64::from_be_bytes(*key.first_chunk().expect("a key is longer"));
        let steps: BTreeSet<u64> = self.keys()?.iter().map(step).collect();
        Ok(steps.into_iter().collect())
    }

    /// Hashes of all chunks that a checkpoint names.
    pub(crate) fn chunks(&self) -> Result<BTreeSet<String>, StoreError> {
        let hash = |key: &Key| ChunkHash(*key.last_chunk().expect("a key is longer")).to_string();
        Ok(self.keys()?.iter().map(hash).collect())
    }

    pub(crate) fn add(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let keys = manifest.chunks().map(|hash| key(manifest.step, hash));
        match self {
            Self::Disk { db, path } => {
                let mut batch = sled::Batch::default();
                keys.for_each(|key| batch.insert(&key[..], &[]));
                db.apply_batch(batch).and_then(|()| db.flush()).map(|_| ()).map_err(failed(path))
            }
            Self::Memory(all) => {
                locked(all).extend(keys);
                Ok(())
            }
        }
    }

    pub(crate) fn remove(&self, step: u64) -> Result<(), StoreError> {
        match self {
            Self::Disk { db, path } => {
                let mut batch = sled::Batch::default();
                for key in db.scan_prefix(step.to_be_bytes()).keys() {
                    batch.remove(key.map_err(failed(path))?);
                }
                db.apply_batch(batch).and_then(|()| db.flush()).map(|_| ()).map_err(failed(path))
            }
            Self::Memory(all) => {
                locked(all).retain(|key| key[..8] != step.to_be_bytes());
                Ok(())
            }
        }
    }
}

fn failed(path: &Path) -> impl Fn(sled::Error) -> StoreError {
    move |source| StoreError::Catalogue { path: path.to_owned(), source }
}

fn locked(keys: &Mutex<BTreeSet<Key>>) -> MutexGuard<'_, BTreeSet<Key>> {
    keys.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_or_begin(path: &Path) -> Result<sled::Db, StoreError> {
    let open = || sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None).open();
    open().or_else(|error| {
        tracing::warn!(%error, path = %path.display(), "the catalogue does not open: it is made anew");
        let _ = fs::remove_dir_all(path);
        open().map_err(failed(path))
    })
}
