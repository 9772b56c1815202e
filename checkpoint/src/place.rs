//! Where a store's files are: a folder, a bucket of an object store, or whatever else keeps bytes under names.
//!
//! - PC-1: what has a name is whole: a file was written elsewhere, synced and renamed; an object appears at once.
//! - PC-2: what was put is durable when `put` returns.

use crate::bucket::Bucket;
use crate::error::{StoreError, at};
use crate::faulty::{Faulty, Switch};
use crate::folder::Folder;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What went wrong with which name.
pub type NamedError = (String, io::Error);

/// Something that keeps bytes under names `FOLDER/NAME`, as PC-1 and PC-2 say.
pub trait Medium: Debug + Send + Sync {
    /// Of something in it, for people.
    fn path(&self, name: &str) -> PathBuf;
    /// Makes room for `FOLDER/…`.
    fn make(&self, folder: &str) -> io::Result<()>;
    /// Writes something, over what is there.
    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Writes what is not there. Bytes of a few at a time are copied.
    fn put_new(&self, all: &[(String, &[u8])]) -> Result<(), NamedError>;
    /// Reads something; what is not there is an error of kind `NotFound`.
    fn get(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Names in a folder, in no order.
    fn names(&self, folder: &str) -> io::Result<Vec<String>>;
    /// Removes something that is there.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Removes things that are there. Each name is asked for just before.
    fn remove_all(&self, names: &mut (dyn Iterator<Item = String> + Send)) -> Result<(), NamedError> {
        for name in names {
            self.remove(&name).map_err(|error| (name, error))?;
        }
        Ok(())
    }
    /// Gives something another name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Whether a thread waits for what it reads, so that others may read meanwhile.
    fn waits(&self) -> bool {
        true
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Place(Arc<dyn Medium>);

impl Place {
    /// A folder, which need not exist yet.
    pub fn folder(path: &Path) -> Self {
        Self::on(Folder(path.to_owned()))
    }

    /// A bucket: `s3://BUCKET/PREFIX`. Region, endpoint and credentials are those of the environment (`AWS_…`).
    pub fn bucket(url: &str) -> Result<Self, StoreError> {
        Bucket::open(url).map(Self::on)
    }

    /// Something else.
    pub fn on(medium: impl Medium + 'static) -> Self {
        Self(Arc::new(medium))
    }

    /// The same place, which says no whenever a switch says so.
    pub fn with_switch(self, switch: Switch) -> Self {
        Self::on(Faulty { inner: self.0, switch })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    pub(crate) fn waits(&self) -> bool {
        self.0.waits()
    }

    fn named<T>(&self, name: &str, done: io::Result<T>) -> Result<T, StoreError> {
        done.map_err(|error| at(&self.path(name))(error))
    }

    fn all<T>(&self, done: Result<T, NamedError>) -> Result<T, StoreError> {
        done.map_err(|(name, error)| at(&self.path(&name))(error))
    }

    pub(crate) fn make(&self, folder: &str) -> Result<(), StoreError> {
        self.named(folder, self.0.make(folder))
    }

    pub(crate) fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.named(name, self.0.put(name, bytes))
    }

    pub(crate) fn put_new(&self, all: &[(String, &[u8])]) -> Result<(), StoreError> {
        self.all(self.0.put_new(all))
    }

    pub(crate) fn get(&self, name: &str) -> Result<Vec<u8>, StoreError> {
        self.named(name, self.0.get(name))
    }

    pub(crate) fn names(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        self.named(folder, self.0.names(folder))
    }

    pub(crate) fn remove(&self, name: &str) -> Result<(), StoreError> {
        self.named(name, self.0.remove(name))
    }

    pub(crate) fn remove_all(&self, mut names: impl Iterator<Item = String> + Send) -> Result<(), StoreError> {
        self.all(self.0.remove_all(&mut names))
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), StoreError> {
        self.named(from, self.0.rename(from, to))
    }
}
