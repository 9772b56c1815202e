//! Follows a file of lines that another process appends to.

use anyhow::Result;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

/// See the module.
#[derive(Debug)]
pub(crate) struct Tail {
    path: PathBuf,
    /// Bytes of whole lines so far: a torn one may be cut off.
    at: u64,
}

impl Tail {
    /// From the beginning of a file, which need not be there yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, at: 0 }
    }

    /// Whole lines that are new.
    pub(crate) fn lines(&mut self) -> Result<Vec<String>> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(Vec::new()) };
        file.seek(SeekFrom::Start(self.at))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        bytes.truncate(bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1));
        self.at += bytes.len() as u64;
        Ok(String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_line_is_read_once_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let mut tail = Tail::new(path.clone());
        assert!(tail.lines().unwrap().is_empty());
        let mut file = File::create(&path).unwrap();
        let mut write = |text: &str| file.write_all(text.as_bytes()).unwrap();
        write("one\ntw");
        assert_eq!(tail.lines().unwrap(), ["one"]);
        write("o\n");
        assert_eq!(tail.lines().unwrap(), ["two"]);
        write("to");
        assert!(tail.lines().unwrap().is_empty());
        // What was torn is cut off, and another line comes.
        drop(file);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(8).unwrap();
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"three\n").unwrap();
        assert_eq!(tail.lines().unwrap(), ["three"]);
    }
}
