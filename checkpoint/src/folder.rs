//! A folder as a place for a store.

use crate::error::{StoreError, at};
use crate::place::{Medium, NamedError};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Bytes of a disk that checkpoints leave free, or a sixteenth of a small one.
const RESERVE: u64 = 64 << 20;

/// See the module.
#[derive(Debug)]
pub(crate) struct Folder(pub(crate) PathBuf);

/// Writes a file so that its name stands for all of it: elsewhere first, synced, then renamed.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    write(path, bytes).map_err(at(path))
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
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
    done
}

/// Refuses a file that would fill a disk to the last: what a job cannot go on without may be on it too.
fn leave_room(path: &Path, bytes: usize) -> io::Result<()> {
    let folder = path.parent().expect("files of a store lie in a folder");
    let disk = rustix::fs::statvfs(folder)?;
    let (free, all) = (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize);
    // Some file systems don't say.
    if all == 0 || free >= bytes as u64 + RESERVE.min(all / 16) { Ok(()) } else { Err(rustix::io::Errno::NOSPC.into()) }
}

impl Medium for Folder {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn make(&self, folder: &str) -> io::Result<()> {
        fs::create_dir_all(self.path(folder))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        write(&self.path(name), bytes)
    }

    fn put_new(&self, all: &[(String, &[u8])]) -> Result<(), NamedError> {
        all.iter().try_for_each(|(name, bytes)| {
            let path = self.path(name);
            let there = fs::metadata(&path).is_ok_and(|m| m.len() == bytes.len() as u64)
                && fs::read(&path).is_ok_and(|there| there == *bytes);
            let put = if there { Ok(()) } else { leave_room(&path, bytes.len()).and_then(|()| write(&path, bytes)) };
            put.map_err(|error| (name.clone(), error))
        })
    }

    fn get(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path(name))
    }

    fn names(&self, folder: &str) -> io::Result<Vec<String>> {
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        fs::read_dir(self.path(folder))?.map(name).collect()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }
}
