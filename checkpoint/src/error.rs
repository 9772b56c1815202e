//! What can go wrong where state is stored.

use std::io;
use std::path::{Path, PathBuf};

/// A store could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It was this process's turn to have the store, and is not any more.
    #[error("{}: another process may have this store now", path.display())]
    OutOfTurn {
        /// The store.
        path: PathBuf,
    },
    /// The file system or the object store said no.
    #[error("{path}: {source}")]
    File {
        /// The file, folder or object.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A chunk is not what its name says: truncated or changed.
    #[error("chunk {path} is damaged: its {bytes} bytes have hash {got}, expected {expected}")]
    Damaged {
        /// The chunk.
        path: PathBuf,
        /// Its name.
        expected: String,
        /// Its content's.
        got: String,
        /// Its length.
        bytes: usize,
    },
    /// A manifest or a log is not readable.
    #[error("{path} is not a valid {what}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A checkpoint in the format of another version of the program.
    #[error(
        "manifest {path} has format {got}, this program reads and writes {expected}: resume the run with the version that wrote it"
    )]
    OtherVersion {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        got: String,
        /// This program's.
        expected: String,
    },
    /// A checkpoint of another job.
    #[error("manifest {path} belongs to job {got}, not to job {expected}")]
    ForeignJob {
        /// The manifest.
        path: PathBuf,
        /// This job.
        expected: String,
        /// Whose it is.
        got: String,
    },
    /// A tensor is not in a checkpoint, or has another shape.
    #[error("checkpoint of step {step} in {path}: tensor {tensor} {reason}")]
    Tensor {
        /// The manifest.
        path: PathBuf,
        /// The step.
        step: u64,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// A store cannot be where it is said to be.
    #[error("{url}: {reason}")]
    Place {
        /// Where.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The catalogue failed.
    #[error("catalogue {path}: {source}")]
    Catalogue {
        /// Its folder.
        path: PathBuf,
        /// Why.
        source: sled::Error,
    },
}

impl StoreError {
    /// Whether what is there could not be read, and may be another time.
    pub fn is_out_of_reach(&self) -> bool {
        matches!(self, Self::File { .. }) && !self.is_damage()
    }

    /// Whether what is on disk is wrong, and not merely out of reach now.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Self::File { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Damaged { .. } | Self::Invalid { .. } | Self::ForeignJob { .. } | Self::Tensor { .. } => true,
            Self::Catalogue { .. } | Self::OtherVersion { .. } | Self::OutOfTurn { .. } | Self::Place { .. } => false,
        }
    }
}

/// Names the path in an error of the file system.
pub(crate) fn at(path: &Path) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::File { path: path.to_owned(), source }
}
