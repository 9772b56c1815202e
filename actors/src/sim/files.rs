//! A simulated disk as a place for the store of checkpoints: what has a name is whole (PC-1), and what was put is durable (PC-2).
//! Removals and renames are not synced: a power cut may undo each of them.

use super::draws::Draws;
use everstep_checkpoint::{Medium, NamedError, Trouble};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A change of a folder that is not synced.
#[derive(Debug)]
struct Unsynced {
    folder: String,
    /// What was there before, by name; none: the name was free.
    before: Vec<(String, Option<Vec<u8>>)>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    unsynced: Vec<Unsynced>,
    trouble: Option<Trouble>,
    /// Changes that the process makes before it dies in the next one.
    changes_left: Option<u64>,
    died: bool,
}

/// See the module. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Files(Arc<Mutex<State>>);

fn folder(name: &str) -> String {
    name.split('/').next().unwrap_or_default().to_owned()
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{name} is not there"))
}

impl State {
    fn may_read(&self) -> io::Result<()> {
        if self.died {
            return Err(io::Error::other("the process has ended"));
        }
        self.trouble.map_or(Ok(()), Trouble::of_reading)
    }

    fn may_change(&mut self, grows: bool) -> io::Result<()> {
        self.died |= self.changes_left == Some(0);
        self.changes_left = self.changes_left.and_then(|left| left.checked_sub(1));
        if self.died {
            return self.may_read();
        }
        self.trouble.map_or(Ok(()), |trouble| trouble.of_change(grows))
    }

    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let may = self.may_change(true);
        if may.is_err() && self.died {
            // What was written until then has another name.
            let (folder, file) = name.split_once('/').expect("FOLDER/NAME");
            self.files.insert(format!("{folder}/.{file}.1.new"), bytes[..bytes.len() / 2].to_vec());
        }
        may?;
        self.files.insert(name.to_owned(), bytes.to_vec());
        // Its folder was synced.
        self.unsynced.retain(|change| change.folder != folder(name));
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.may_change(false)?;
        let bytes = self.files.remove(name).ok_or_else(|| missing(name))?;
        self.unsynced.push(Unsynced { folder: folder(name), before: vec![(name.to_owned(), Some(bytes))] });
        Ok(())
    }
}

impl Files {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, or no more. Gives what there was before.
    pub(super) fn set(&self, trouble: Option<Trouble>) -> Option<Trouble> {
        std::mem::replace(&mut self.state().trouble, trouble)
    }

    /// The process makes so many changes more.
    pub(super) fn die_after(&self, changes: u64) {
        self.state().changes_left = Some(changes);
    }

    /// Whether it died of it. The next process is not asked.
    pub(super) fn died(&self) -> bool {
        let mut state = self.state();
        let died = std::mem::take(&mut state.died);
        if died {
            state.changes_left = None;
        }
        died
    }

    /// The power is cut: each change that was not synced is kept or undone.
    pub(super) fn cut_power(&self, draws: &mut Draws) {
        let mut state = self.state();
        for Unsynced { before, .. } in std::mem::take(&mut state.unsynced).into_iter().rev() {
            if draws.below(2) == 0 {
                for (name, bytes) in before {
                    match bytes {
                        Some(bytes) => drop(state.files.insert(name, bytes)),
                        None => drop(state.files.remove(&name)),
                    }
                }
            }
        }
    }

    /// A bit of a file flips. Gives its name.
    pub(super) fn flip(&self, draws: &mut Draws) -> Option<String> {
        let mut state = self.state();
        let count = state.files.len() as u64;
        let at = draws.below(count.max(1)) as usize;
        let (name, bytes) = state.files.iter_mut().nth(at)?;
        let bit = draws.below(8 * bytes.len() as u64) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        Some(name.clone())
    }
}

impl Medium for Files {
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }

    fn make(&self, _: &str) -> io::Result<()> {
        self.state().may_read()
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.state().put(name, bytes)
    }

    fn put_new(&self, all: &[(String, &[u8])]) -> Result<(), NamedError> {
        let mut state = self.state();
        all.iter().try_for_each(|(name, bytes)| {
            let there = state.files.get(name).is_some_and(|there| there == bytes);
            if there { Ok(()) } else { state.put(name, bytes).map_err(|error| (name.clone(), error)) }
        })
    }

    fn get(&self, name: &str) -> io::Result<Vec<u8>> {
        let state = self.state();
        state.may_read()?;
        state.files.get(name).cloned().ok_or_else(|| missing(name))
    }

    fn names(&self, folder: &str) -> io::Result<Vec<String>> {
        let state = self.state();
        state.may_read()?;
        let name = |name: &String| name.strip_prefix(folder)?.strip_prefix('/').map(str::to_owned);
        Ok(state.files.keys().filter_map(name).collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.state().remove(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        state.may_change(false)?;
        let bytes = state.files.remove(from).ok_or_else(|| missing(from))?;
        let there = state.files.insert(to.to_owned(), bytes.clone());
        let before = vec![(from.to_owned(), Some(bytes)), (to.to_owned(), there)];
        state.unsynced.push(Unsynced { folder: folder(from), before });
        Ok(())
    }

    /// Nobody waits for memory; and the order of what is read must be the same every time.
    fn waits(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_cut_undoes_only_what_was_not_synced() {
        let mut undone = [0, 0];
        for seed in 0..20 {
            let files = Files::default();
            for name in ["a/1", "a/2", "b/1"] {
                files.put(name, b"x").unwrap();
            }
            files.remove("a/1").unwrap();
            files.put("a/3", b"y").unwrap();
            files.remove("a/2").unwrap();
            files.rename("b/1", "b/2").unwrap();
            files.cut_power(&mut Draws::new(seed, 1));
            assert!(files.get("a/1").is_err() && files.get("a/3").is_ok(), "the folder was synced");
            assert_ne!(files.get("b/1").is_ok(), files.get("b/2").is_ok());
            undone[0] += usize::from(files.get("a/2").is_ok());
            undone[1] += usize::from(files.get("b/1").is_ok());
        }
        assert!(undone.iter().all(|n| (1..20).contains(n)), "{undone:?}");
    }

    #[test]
    fn whoever_dies_in_a_write_leaves_nothing_under_its_name() {
        let files = Files::default();
        files.die_after(1);
        files.put("a/1", b"whole").unwrap();
        files.put("a/2", b"torn").unwrap_err();
        files.get("a/1").unwrap_err();
        assert!(files.died() && !files.died());
        assert_eq!(files.names("a").unwrap(), [".2.1.new", "1"]);
        files.put("a/2", b"again").unwrap();
    }
}
