//! The catalogue: which checkpoint names which chunks, in sled.
//!
//! sled is beta and known to lose its files at abrupt stops, so nothing depends on it: it is an index
//! over manifests, and is made from them again whenever it does not open or does not agree.

use crate::chunk::ChunkHash;
use crate::error::StoreError;
use crate::manifest::Manifest;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const CACHE_BYTES: u64 = 16 << 20;

/// See the module. Keys: step (big-endian), then the chunk's hash.
#[derive(Debug)]
pub(crate) struct Catalogue {
    db: sled::Db,
    path: PathBuf,
}

impl Catalogue {
    /// Opens the catalogue and brings it in line with the manifests of `steps`. Manifests that cannot be
    /// read are left out: whoever wants such a checkpoint is told by its manifest.
    pub(crate) fn open(
        path: &Path,
        steps: &[u64],
        read: impl Fn(&u64) -> Result<Manifest, StoreError>,
    ) -> Result<Self, StoreError> {
        let open = || sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None).open();
        let db = match open() {
            Ok(db) => db,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the catalogue does not open: it is made anew");
                let _ = fs::remove_dir_all(path);
                open().map_err(|source| StoreError::Catalogue { path: path.to_owned(), source })?
            }
        };
        let catalogue = Self { db, path: path.to_owned() };
        let known = catalogue.steps().unwrap_or_default();
        if steps.is_empty() && !known.is_empty() {
            // Beginning anew would lose what is where the store should be.
            let reason =
                format!("it names checkpoints of steps {known:?}, and none is there: is checkpoint.store another?");
            return Err(StoreError::Invalid { path: path.to_owned(), what: "catalogue of this store", reason });
        }
        if known != steps {
            catalogue.db.clear().map_err(|e| catalogue.failed(e))?;
            for manifest in steps.iter().filter_map(|s| read(s).ok()) {
                catalogue.add(&manifest)?;
            }
        }
        Ok(catalogue)
    }

    fn failed(&self, source: sled::Error) -> StoreError {
        StoreError::Catalogue { path: self.path.clone(), source }
    }

    fn keys(&self) -> impl Iterator<Item = Result<(u64, ChunkHash), StoreError>> {
        self.db.iter().keys().map(|key| {
            let key = key.map_err(|e| self.failed(e))?;
            let invalid = || StoreError::Invalid {
                path: self.path.clone(),
                what: "catalogue",
                reason: "a key of wrong length".to_owned(),
            };
            let (step, hash) = key.split_first_chunk::<8>().ok_or_else(invalid)?;
            let hash = hash.first_chunk::<32>().ok_or_else(invalid)?;
            Ok((u64::from_be_bytes(*step), ChunkHash(*hash)))
        })
    }

    fn steps(&self) -> Result<Vec<u64>, StoreError> {
        let steps: BTreeSet<u64> = self.keys().map(|k| k.map(|(step, _)| step)).collect::<Result<_, _>>()?;
        Ok(steps.into_iter().collect())
    }

    /// Hashes of all chunks that a checkpoint names.
    pub(crate) fn chunks(&self) -> Result<BTreeSet<String>, StoreError> {
        self.keys().map(|k| k.map(|(_, hash)| hash.to_string())).collect()
    }

    pub(crate) fn add(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        for hash in manifest.chunks() {
            batch.insert([&manifest.step.to_be_bytes()[..], hash].concat(), &[]);
        }
        self.db.apply_batch(batch).map_err(|e| self.failed(e))?;
        self.db.flush().map_err(|e| self.failed(e)).map(|_| ())
    }

    pub(crate) fn remove(&self, step: u64) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        for key in self.db.scan_prefix(step.to_be_bytes()).keys() {
            batch.remove(key.map_err(|e| self.failed(e))?);
        }
        self.db.apply_batch(batch).map_err(|e| self.failed(e))?;
        self.db.flush().map_err(|e| self.failed(e)).map(|_| ())
    }
}
