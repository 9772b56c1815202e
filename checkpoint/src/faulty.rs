//! A place that says no when it is told to (chaos), as a full disk or a broken one does.

use crate::place::{Medium, NamedError};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a place says no to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trouble {
    /// Everything.
    Fails,
    /// Writing: it is full.
    Full,
    /// Reading.
    Unreadable,
}

impl Trouble {
    /// Of reading.
    pub fn of_reading(self) -> io::Result<()> {
        match self {
            Self::Fails | Self::Unreadable => Err(io::Error::other("input/output error (chaos)")),
            Self::Full => Ok(()),
        }
    }

    /// Of a change; one that makes more of what is there, or not.
    pub fn of_change(self, grows: bool) -> io::Result<()> {
        match self {
            Self::Fails => Err(io::Error::other("input/output error (chaos)")),
            Self::Full if grows => Err(io::ErrorKind::StorageFull.into()),
            Self::Full | Self::Unreadable => Ok(()),
        }
    }
}

/// Makes trouble. Clones are the same switch.
#[derive(Debug, Clone, Default)]
pub struct Switch(Arc<Mutex<Option<(Trouble, Instant)>>>);

impl Switch {
    /// For so long, from now on.
    pub fn set(&self, trouble: Trouble, lasts: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((trouble, Instant::now() + lasts));
    }

    fn now(&self) -> Option<Trouble> {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        set.take_if(|(_, until)| *until <= Instant::now());
        set.map(|(trouble, _)| trouble)
    }

    fn read(&self) -> io::Result<()> {
        self.now().map_or(Ok(()), Trouble::of_reading)
    }

    fn change(&self, grows: bool) -> io::Result<()> {
        self.now().map_or(Ok(()), |trouble| trouble.of_change(grows))
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Faulty {
    pub(crate) inner: Arc<dyn Medium>,
    pub(crate) switch: Switch,
}

impl Medium for Faulty {
    fn path(&self, name: &str) -> PathBuf {
        self.inner.path(name)
    }

    fn make(&self, folder: &str) -> io::Result<()> {
        self.switch.read()?;
        self.inner.make(folder)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.switch.change(true)?;
        self.inner.put(name, bytes)
    }

    fn put_new(&self, all: &[(String, &[u8])]) -> Result<(), NamedError> {
        let Some((first, _)) = all.first() else { return Ok(()) };
        self.switch.change(true).map_err(|error| (first.clone(), error))?;
        self.inner.put_new(all)
    }

    fn get(&self, name: &str) -> io::Result<Vec<u8>> {
        self.switch.read()?;
        self.inner.get(name)
    }

    fn names(&self, folder: &str) -> io::Result<Vec<String>> {
        self.switch.read()?;
        self.inner.names(folder)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.switch.change(false)?;
        self.inner.remove(name)
    }

    fn remove_all(&self, names: &mut (dyn Iterator<Item = String> + Send)) -> Result<(), NamedError> {
        self.switch.change(false).map_err(|error| (String::new(), error))?;
        self.inner.remove_all(names)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.switch.change(false)?;
        self.inner.rename(from, to)
    }

    fn waits(&self) -> bool {
        self.inner.waits()
    }
}
