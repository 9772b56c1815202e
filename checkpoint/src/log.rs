//! An append-only log of records: each with its length and CRC-32C, synced before it counts.
//!
//! - LO-1: [`Log::append`] returns after the record is on disk.
//! - LO-2: opening gives every record that was appended; a torn last one (a crash while it was written,
//!   so nobody was told of it, whichever of its pages a disk kept) is cut off. Damage before the end is an error that says where.

use crate::error::{StoreError, at};
use crate::folder::write_whole;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes of a record.
pub const RECORD_MAX: usize = 64 << 20;

/// See the module.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    /// Opens or creates a log and gives its records.
    pub fn open(path: &Path) -> Result<(Self, Vec<Vec<u8>>), StoreError> {
        let new = !path.exists();
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(at(path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(at(path))?;
        let (records, good) = parse(&bytes).map_err(|reason| StoreError::Invalid {
            path: path.to_owned(),
            what: "control log",
            reason,
        })?;
        if good < bytes.len() {
            file.set_len(good as u64).and_then(|()| file.sync_all()).map_err(at(path))?;
        }
        file.seek(SeekFrom::End(0)).map_err(at(path))?;
        if new && let Some(folder) = path.parent() {
            File::open(folder).and_then(|f| f.sync_all()).map_err(at(folder))?;
        }
        Ok((Self { file, path: path.to_owned() }, records))
    }

    /// Appends a record and syncs it.
    pub fn append(&mut self, record: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(&frame(record)).and_then(|()| self.file.sync_data()).map_err(at(&self.path))
    }

    /// Replaces a log by a shorter one that says the same: whole, or not at all.
    pub fn rewrite(path: &Path, records: &[Vec<u8>]) -> Result<Self, StoreError> {
        let frames: Vec<u8> = records.iter().flat_map(|r| frame(r)).collect();
        write_whole(path, &frames)?;
        Ok(Self::open(path)?.0)
    }
}

/// A record with its length and checksum, as the file has it.
pub fn frame(record: &[u8]) -> Vec<u8> {
    assert!((1..=RECORD_MAX).contains(&record.len()), "a record of {} bytes", record.len());
    let length = (record.len() as u32).to_le_bytes();
    [&length, &checksum(&length, record).to_le_bytes()[..], record].concat()
}

/// Over the length too: a length that was changed must not pass for a torn end.
fn checksum(length: &[u8; 4], record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(length), record)
}

/// The record that starts here, if a whole one does.
fn whole_record(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let record = rest.get(..u32::from_le_bytes(*length) as usize).filter(|r| !r.is_empty())?;
    (checksum(length, record) == u32::from_le_bytes(*sum)).then_some(record)
}

/// Records of a file, and how many of its bytes they are. What follows the last whole record is torn if no
/// whole record follows it; else the log is damaged, and the error says where.
pub fn parse(bytes: &[u8]) -> Result<(Vec<Vec<u8>>, usize), String> {
    let mut records = Vec::new();
    let mut from = 0;
    while let Some(record) = whole_record(&bytes[from..]) {
        records.push(record.to_vec());
        from += 8 + record.len();
    }
    let later = (from + 1..bytes.len()).find(|at| whole_record(&bytes[*at..]).is_some());
    match later {
        None => Ok((records, from)),
        Some(at) => {
            Err(format!("record {} at byte {from} is damaged: a whole one follows at byte {at}", records.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LO-1, LO-2: what was appended is there, whatever a crash tore.
    #[test]
    fn records_are_read_back_and_a_torn_end_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let records: Vec<Vec<u8>> = vec![b"one".to_vec(), vec![0; 20], vec![7; 1000]];
        let (mut log, found) = Log::open(&path).unwrap();
        assert!(found.is_empty());
        records.iter().for_each(|r| log.append(r).unwrap());
        drop(log);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut log, found) = Log::open(&path).unwrap();
            assert_eq!(found[..], records[..found.len()]);
            log.append(b"next").unwrap();
            drop(log);
            assert_eq!(Log::open(&path).unwrap().1.last().unwrap(), b"next");
        }
    }

    /// LO-2: a disk may keep any pages of a record that it was writing, and none of those before them.
    #[test]
    fn a_record_of_which_some_pages_are_missing_is_torn() {
        let long: Vec<u8> = (0..600).map(|n| n as u8 | 1).collect();
        let (first, torn) = (frame(b"first"), frame(&long));
        for kept in 0..32u32 {
            let mut bytes = torn.clone();
            for (n, page) in bytes.chunks_mut(128).enumerate() {
                if kept >> n & 1 == 0 {
                    page.fill(0);
                }
            }
            let (records, good) = parse(&[&first[..], &bytes].concat()).unwrap();
            let whole = bytes == torn;
            assert_eq!(
                (records.len(), good),
                (1 + usize::from(whole), first.len() + if whole { torn.len() } else { 0 })
            );
        }
    }

    #[test]
    fn a_rewritten_log_holds_the_new_records_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut log, _) = Log::open(&path).unwrap();
        (0..100u8).for_each(|n| log.append(&[n; 50]).unwrap());
        drop(log);
        let mut log = Log::rewrite(&path, &[b"short".to_vec()]).unwrap();
        log.append(b"next").unwrap();
        drop(log);
        assert_eq!(Log::open(&path).unwrap().1, [b"short".to_vec(), b"next".to_vec()]);
    }

    #[test]
    fn damage_in_the_middle_is_an_error_that_says_where() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut log, _) = Log::open(&path).unwrap();
        log.append(b"first").unwrap();
        log.append(b"second").unwrap();
        let good = std::fs::read(&path).unwrap();
        // Any bit of the first record: its length, its checksum, its content.
        for bit in 0..8 * 13 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &bytes).unwrap();
            let error = Log::open(&path).unwrap_err().to_string();
            assert!(error.contains("record 0 at byte 0"), "bit {bit}: {error}");
        }
        // A power cut may leave zeros where the next record was to be.
        std::fs::write(&path, [&good[..], &[0; 100]].concat()).unwrap();
        assert_eq!(Log::open(&path).unwrap().1, [b"first".to_vec(), b"second".to_vec()]);
    }
}
