//! Chunks: pieces of tensors, addressed by the BLAKE3 hash of their bytes.
//!
//! - CH-1: a chunk that is there under its name is whole (PC-1).
//! - CH-2: a chunk that exists whole is not written again; a damaged one is (in a bucket: one of another length).
//! - CH-3: reading verifies the hash; a wrong chunk is an error that names it, never data.

use crate::error::StoreError;
use crate::place::Place;
use std::collections::BTreeMap;
use std::fmt;

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

/// The chunks of a place.
#[derive(Debug, Clone)]
pub(crate) struct Chunks {
    place: Place,
}

/// Of a place: `chunks/HASH`.
const FOLDER: &str = "chunks";

fn name(hash: &str) -> String {
    format!("{FOLDER}/{hash}")
}

impl Chunks {
    pub(crate) fn new(place: Place) -> Self {
        Self { place }
    }

    pub(crate) fn make(&self) -> Result<(), StoreError> {
        self.place.make(FOLDER)
    }

    /// Stores the bytes of several parts in chunks, those that are not there, and gives the names of each part's.
    pub(crate) fn put(&self, parts: &[&[f32]]) -> Result<Vec<Vec<[u8; 32]>>, StoreError> {
        let hashed = |words: &[f32]| -> Vec<ChunkHash> {
            words.chunks(CHUNK_WORDS).map(|chunk| ChunkHash::of(bytemuck::cast_slice(chunk))).collect()
        };
        let hashes: Vec<Vec<ChunkHash>> = parts.iter().map(|words| hashed(words)).collect();
        let chunks = parts.iter().flat_map(|words| words.chunks(CHUNK_WORDS)).map(bytemuck::cast_slice);
        // The same content may come more than once.
        let unique: BTreeMap<ChunkHash, &[u8]> = hashes.iter().flatten().copied().zip(chunks).collect();
        let named: Vec<(String, &[u8])> =
            unique.into_iter().map(|(hash, bytes)| (name(&hash.to_string()), bytes)).collect();
        self.place.put_new(&named)?;
        Ok(hashes.into_iter().map(|part| part.into_iter().map(|hash| hash.0).collect()).collect())
    }

    /// Reads a chunk and verifies it.
    pub(crate) fn get(&self, hash: ChunkHash) -> Result<Vec<u8>, StoreError> {
        let expected = hash.to_string();
        let bytes = self.place.get(&name(&expected))?;
        let got = ChunkHash::of(&bytes);
        if got == hash {
            return Ok(bytes);
        }
        let path = self.place.path(&name(&expected));
        Err(StoreError::Damaged { path, expected, got: got.to_string(), bytes: bytes.len() })
    }

    /// Removes one, by its hash.
    pub(crate) fn remove(&self, hash: &str) -> Result<(), StoreError> {
        self.place.remove(&name(hash))
    }

    /// Removes chunks that `keep` does not name, and what interrupted writes left behind. It is asked just before.
    pub(crate) fn sweep(&self, keep: impl Fn(&str) -> bool + Send + Sync) -> Result<(), StoreError> {
        let all = self.place.names(FOLDER)?;
        self.place.remove_all(all.iter().filter(|hash| !keep(hash)).map(|hash| name(hash)))
    }
}
