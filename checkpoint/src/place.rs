//! Where a store's files are: a folder, or a bucket of an object store.
//!
//! - PC-1: what has a name is whole: a file was written elsewhere, synced and renamed; an object appears at once.
//! - PC-2: what was put is durable when `put` returns.

use crate::bucket::Bucket;
use crate::error::{StoreError, at};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

/// Bytes of a disk that checkpoints leave free, or a sixteenth of a small one.
const RESERVE: u64 = 64 << 20;

/// See the module. Names within it are `FOLDER/NAME`.
#[derive(Debug, Clone)]
pub struct Place(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Folder(PathBuf),
    Bucket(Arc<Bucket>),
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

/// Refuses a file that would fill a disk to the last: what a job cannot go on without may be on it too.
fn leave_room(path: &Path, bytes: usize) -> Result<(), StoreError> {
    let folder = path.parent().expect("files of a store lie in a folder");
    let disk = rustix::fs::statvfs(folder).map_err(|errno| at(path)(errno.into()))?;
    let (free, all) = (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize);
    // Some file systems don't say.
    if all == 0 || free >= bytes as u64 + RESERVE.min(all / 16) {
        Ok(())
    } else {
        Err(at(path)(rustix::io::Errno::NOSPC.into()))
    }
}

impl Place {
    /// A folder, which need not exist yet.
    pub fn folder(path: &Path) -> Self {
        Self(Kind::Folder(path.to_owned()))
    }

    /// A bucket: `s3://BUCKET/PREFIX`. Region, endpoint and credentials are those of the environment (`AWS_…`).
    pub fn bucket(url: &str) -> Result<Self, StoreError> {
        Ok(Self(Kind::Bucket(Arc::new(Bucket::open(url)?))))
    }

    /// Of something in it, for people.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match &self.0 {
            Kind::Folder(folder) => folder.join(name),
            Kind::Bucket(bucket) => Path::new(bucket.url()).join(name),
        }
    }

    /// Makes room for `FOLDER/…`.
    pub(crate) fn make(&self, folder: &str) -> Result<(), StoreError> {
        match &self.0 {
            Kind::Folder(_) => fs::create_dir_all(self.path(folder)).map_err(at(&self.path(folder))),
            Kind::Bucket(_) => Ok(()),
        }
    }

    /// Writes something, over what is there.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        match &self.0 {
            Kind::Folder(_) => write_whole(&self.path(name), bytes),
            Kind::Bucket(bucket) => bucket.put(name, bytes).map_err(at(&self.path(name))),
        }
    }

    /// Writes what is not there with its length. Bytes of a few at a time are copied.
    pub(crate) fn put_new(&self, all: &[(String, &[u8])]) -> Result<(), StoreError> {
        match &self.0 {
            Kind::Folder(_) => all.iter().try_for_each(|(name, bytes)| {
                let path = self.path(name);
                let there = fs::metadata(&path).is_ok_and(|m| m.len() == bytes.len() as u64);
                if there { Ok(()) } else { leave_room(&path, bytes.len()).and_then(|()| write_whole(&path, bytes)) }
            }),
            Kind::Bucket(bucket) => bucket.put_new(all).map_err(|(name, error)| at(&self.path(&name))(error)),
        }
    }

    /// Reads something; what is not there is an error of kind `NotFound`.
    pub(crate) fn get(&self, name: &str) -> Result<Vec<u8>, StoreError> {
        let read = match &self.0 {
            Kind::Folder(_) => fs::read(self.path(name)),
            Kind::Bucket(bucket) => bucket.get(name),
        };
        read.map_err(at(&self.path(name)))
    }

    /// Names in a folder, in no order.
    pub(crate) fn names(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let list = || -> io::Result<Vec<String>> {
            let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
            match &self.0 {
                Kind::Folder(_) => fs::read_dir(self.path(folder))?.map(name).collect(),
                Kind::Bucket(bucket) => bucket.names(folder),
            }
        };
        list().map_err(at(&self.path(folder)))
    }

    /// Removes something that is there.
    pub(crate) fn remove(&self, name: &str) -> Result<(), StoreError> {
        let removed = match &self.0 {
            Kind::Folder(_) => fs::remove_file(self.path(name)),
            Kind::Bucket(bucket) => bucket.remove(name),
        };
        removed.map_err(at(&self.path(name)))
    }

    /// Removes things that are there. Each name is asked for just before.
    pub(crate) fn remove_all(&self, mut names: impl Iterator<Item = String> + Send) -> Result<(), StoreError> {
        match &self.0 {
            Kind::Folder(_) => names.try_for_each(|name| self.remove(&name)),
            Kind::Bucket(bucket) => bucket.remove_all(names).map_err(|(name, error)| at(&self.path(&name))(error)),
        }
    }

    /// Gives something another name.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), StoreError> {
        let renamed = match &self.0 {
            Kind::Folder(_) => fs::rename(self.path(from), self.path(to)),
            Kind::Bucket(bucket) => bucket.rename(from, to),
        };
        renamed.map_err(at(&self.path(from)))
    }
}
