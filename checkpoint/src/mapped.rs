//! Files mapped into memory for reading.

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::path::Path;

/// A mapped file. It must not be changed while it is mapped: ours are written under another name,
/// renamed when they are whole and never opened for writing again.
#[derive(Debug)]
pub struct Mapped(Mmap);

impl Mapped {
    /// Maps a file.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::of(&File::open(path)?)
    }

    /// Maps an open file, which may have no name any more.
    pub fn of(file: &File) -> io::Result<Self> {
        // SAFETY: the file is not written to after this; see the type.
        Ok(Self(unsafe { Mmap::map(file)? }))
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
