//! Chunks: pieces of tensors, addressed by the BLAKE3 hash of their bytes.
//!
//! - CH-1: a chunk that is there under its name is whole: it was written elsewhere, synced and renamed.
//! - CH-2: a chunk that exists is not written again.
//! - CH-3: reading verifies the hash; a wrong chunk is an error that names it, never data.

use crate::error::{StoreError, at};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Words of 32 bits of a chunk. A part's last chunk may be shorter.
pub const CHUNK_WORDS: usize = 1 << 20;

/// The name of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkHash(pub [u8; 32]);

impl ChunkHash {
    /// The name of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for ChunkHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from(self.0).to_hex())
    }
}

/// The folder of chunks.
#[derive(Debug, Clone)]
pub(crate) struct Chunks {
    folder: PathBuf,
}

/// Writes a file so that its name stands for all of it: elsewhere first, synced, then renamed.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    use std::io::Write;
    let folder = path.parent().expect("files of a store lie in a folder");
    let name = path.file_name().expect("files of a store have a name").to_string_lossy();
    let scratch = folder.join(format!(".{name}.{}.new", std::process::id()));
    let written = fs::File::create(&scratch).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let done = written.and_then(|()| fs::rename(&scratch, path)).and_then(|()| fs::File::open(folder)?.sync_all());
    if done.is_err() {
        // Nothing half-written stays behind; the first error is the one to tell.
        let _ = fs::remove_file(&scratch);
    }
    done.map_err(at(path))
}

impl Chunks {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    fn path(&self, hash: ChunkHash) -> PathBuf {
        self.folder.join(hash.to_string())
    }

    /// Stores bytes, unless they are there.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<ChunkHash, StoreError> {
        let hash = ChunkHash::of(bytes);
        let path = self.path(hash);
        let there = fs::metadata(&path).is_ok_and(|m| m.len() == bytes.len() as u64);
        if !there {
            write_whole(&path, bytes)?;
        }
        Ok(hash)
    }

    /// Reads a chunk and verifies it.
    pub(crate) fn get(&self, hash: ChunkHash) -> Result<Vec<u8>, StoreError> {
        let path = self.path(hash);
        let bytes = fs::read(&path).map_err(at(&path))?;
        let got = ChunkHash::of(&bytes);
        if got != hash {
            return Err(StoreError::Damaged {
                path,
                expected: hash.to_string(),
                got: got.to_string(),
                bytes: bytes.len(),
            });
        }
        Ok(bytes)
    }

    /// Removes chunks that `keep` does not name, and what interrupted writes left behind.
    pub(crate) fn sweep(&self, keep: impl Fn(&str) -> bool) -> Result<usize, StoreError> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.folder).map_err(at(&self.folder))? {
            let entry = entry.map_err(at(&self.folder))?;
            if !keep(&entry.file_name().to_string_lossy()) {
                fs::remove_file(entry.path()).map_err(at(&entry.path()))?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}
