//! Manifests: a checkpoint exists when its manifest does.
//!
//! A manifest names every tensor of a step with the chunks of its state. It is bincode
//! behind a magic and in front of a CRC-32C, at most 256 MiB.

use crate::error::StoreError;
use serde::{Deserialize, Serialize};
use std::path::Path;

const NAME: usize = 7;
/// Bytes of a manifest.
const MANIFEST_MAX: usize = 256 << 20;

/// What the elements of a part are stored as, in words of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Element {
    /// An f32 in a word.
    F32,
    /// Two BF16 in a word; the last one may be alone.
    Bf16,
}

impl Element {
    /// Words of `elements`.
    pub(crate) fn words(self, elements: usize) -> usize {
        match self {
            Self::F32 => elements,
            Self::Bf16 => elements.div_ceil(2),
        }
    }
}

/// One part of a tensor's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartEntry {
    /// What its elements are.
    pub element: Element,
    /// Its chunks, in order.
    pub chunks: Vec<[u8; 32]>,
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Rows.
    pub rows: u64,
    /// Columns.
    pub columns: u64,
    /// The weight, both moments, and the average of the weight if the job keeps one.
    pub parts: Vec<PartEntry>,
}

impl TensorEntry {
    /// Hashes of its chunks.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &[u8; 32]> {
        self.parts.iter().flat_map(|part| &part.chunks)
    }
}

/// A checkpoint's table of contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The job.
    pub job: String,
    /// The committed step.
    pub step: u64,
    /// All tensors, in order of name.
    pub tensors: Vec<TensorEntry>,
}

impl Manifest {
    /// What a file of one begins with: the name of the format, and its version.
    pub const MAGIC: &[u8; 8] = b"EVERMAN3";

    /// A tensor by its name.
    pub(crate) fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok().map(|at| &self.tensors[at])
    }

    /// Hashes of all chunks that it names, some perhaps twice.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &[u8; 32]> {
        self.tensors.iter().flat_map(TensorEntry::chunks)
    }

    /// As bytes of a file.
    pub fn encode(&self) -> Vec<u8> {
        let config = bincode::config::standard().with_limit::<MANIFEST_MAX>();
        let body = bincode::serde::encode_to_vec(self, config).expect("a manifest can be encoded");
        let sum = crc32c::crc32c(&body).to_le_bytes();
        [Self::MAGIC.as_slice(), &body, &sum].concat()
    }

    /// Verifies the bytes of `path`, a manifest of `job`.
    pub(crate) fn read(bytes: &[u8], path: &Path, job: &str) -> Result<Self, StoreError> {
        // Of another version it is whole, and not for this program to put aside.
        if let Some(magic) = bytes.first_chunk::<8>()
            && magic[..NAME] == Self::MAGIC[..NAME]
            && magic[NAME].is_ascii_digit()
            && magic != Self::MAGIC
        {
            let [got, expected] = [magic, Self::MAGIC].map(|m| String::from_utf8_lossy(m).into_owned());
            return Err(StoreError::OtherVersion { path: path.to_owned(), got, expected });
        }
        let manifest = Self::decode(bytes).map_err(|reason| StoreError::Invalid {
            path: path.to_owned(),
            what: "manifest",
            reason,
        })?;
        if manifest.job != job {
            return Err(StoreError::ForeignJob { path: path.to_owned(), expected: job.to_owned(), got: manifest.job });
        }
        Ok(manifest)
    }

    /// From the bytes of a file. Any bytes give a manifest or an error.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let rest = bytes.strip_prefix(Self::MAGIC).ok_or("it does not start with the magic of a manifest")?;
        let (body, sum) = rest.split_last_chunk::<4>().ok_or("it is truncated")?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
            return Err("its checksum is wrong: it is truncated or changed".to_owned());
        }
        let config = bincode::config::standard().with_limit::<MANIFEST_MAX>();
        let (manifest, used) = bincode::serde::decode_from_slice(body, config).map_err(|e| e.to_string())?;
        if used == body.len() { Ok(manifest) } else { Err(format!("{} bytes follow it", body.len() - used)) }
    }
}
