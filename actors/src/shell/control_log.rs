//! The control log of a supervisor that is the only one.
//!
//! - CL-1: it never has many more records than [`RECORDS_MAX`], however long a life: then a shorter one that says the same takes its
//!   place, whole or not at all.

use super::AnyError;
use crate::supervisor::{RECORDS_MAX, Record};
use everstep_checkpoint::{Log, StoreError};
use std::path::{Path, PathBuf};

/// See the module.
#[derive(Debug)]
pub(super) struct ControlLog {
    path: PathBuf,
    log: Log,
    records: Vec<Record>,
}

impl ControlLog {
    /// Opens or creates it.
    pub(super) fn open(path: &Path) -> Result<Self, AnyError> {
        let (log, raw) = Log::open(path)?;
        let decode = |(n, bytes): (usize, Vec<u8>)| {
            Record::decode(&bytes).map_err(|why| format!("{}: record {n}: {why}", path.display()))
        };
        let records = raw.into_iter().enumerate().map(decode).collect::<Result<_, _>>()?;
        let mut opened = Self { path: path.to_owned(), log, records };
        opened.shorten()?;
        Ok(opened)
    }

    /// What it says.
    pub(super) fn records(&self) -> &[Record] {
        &self.records
    }

    /// Appends a record and syncs it.
    pub(super) fn append(&mut self, record: Record) -> Result<(), StoreError> {
        self.log.append(&record.encode())?;
        self.records.push(record);
        self.shorten()
    }

    fn shorten(&mut self) -> Result<(), StoreError> {
        if self.records.len() > RECORDS_MAX {
            self.records = Record::compacted(&self.records);
            let encoded: Vec<Vec<u8>> = self.records.iter().map(Record::encode).collect();
            self.log = Log::rewrite(&self.path, &encoded)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;
    use crate::testing::committed;

    /// CL-1.
    #[test]
    fn the_log_of_a_long_life_stays_short_and_says_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.log");
        let epoch = Record::Epoch { table: Table { primaries: vec![Some(0)], ..Table::default() }, next_node: 3 };
        let mut log = ControlLog::open(&path).unwrap();
        log.append(epoch.clone()).unwrap();
        let mut most = 0;
        for step in 1..=2500 {
            log.append(committed(step)).unwrap();
            most = most.max(log.records().len());
        }
        assert_eq!(most, RECORDS_MAX);
        let again = ControlLog::open(&path).unwrap();
        assert_eq!(again.records(), log.records());
        assert_eq!(Record::compacted(again.records()), [epoch, committed(2500)]);
    }
}
