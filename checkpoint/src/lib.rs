//! State on disk, or in an object store: chunks addressed by content, manifests, a catalogue that can be made again, and the
//! append-only log of decisions. Knows no actor and no model.

mod bucket;
mod catalogue;
mod chunk;
mod error;
mod faulty;
mod folder;
pub mod log;
mod manifest;
mod mapped;
mod parallel;
mod place;
mod store;

pub use chunk::{CHUNK_WORDS, ChunkHash};
pub use error::StoreError;
pub use faulty::{Switch, Trouble};
pub use folder::write_whole;
pub use log::{Log, RECORD_MAX};
pub use manifest::{Element, Manifest, PartEntry, TensorEntry};
pub use mapped::Mapped;
pub use place::{Medium, NamedError, Place};
pub use store::{Part, Reader, Store, StoredPart, StoredTensor};
