//! The simulated disk under the supervisor's lines: the control log's bytes and metrics.jsonl, written one after another by the
//! code of the real log. A crash loses what waits, and tears what is being written.

use super::draws::Draws;
use crate::ids::Step;
use crate::supervisor::Record;
use everstep_checkpoint::log::{frame, parse};
use std::collections::{BTreeMap, VecDeque};

/// Bytes of a page: a crash keeps any of those that are being written. Small, so that records have several.
const PAGE: usize = 64;

/// Records of the log after which it is made short: few, so that this happens at every point of a job.
const RECORDS_MAX: usize = 10;

/// Something to write.
#[derive(Debug)]
pub(super) enum Line {
    Record(Record),
    /// A line of metrics.jsonl.
    Metrics(Step, String),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Disk {
    log: Vec<u8>,
    /// What the log says.
    records: Vec<Record>,
    metrics: BTreeMap<Step, String>,
    waiting: VecDeque<Line>,
}

impl Disk {
    /// Gives how many wait. The only one: somebody must say when it is written.
    pub(super) fn write(&mut self, line: Line) -> usize {
        self.waiting.push_back(line);
        self.waiting.len()
    }

    /// The first that waits is on disk. Gives it, and whether others wait.
    pub(super) fn written(&mut self) -> (bool, bool) {
        let line = self.waiting.pop_front().expect("something is being written");
        let record = matches!(line, Line::Record(_));
        self.keep(line);
        (record, !self.waiting.is_empty())
    }

    fn keep(&mut self, line: Line) {
        match line {
            Line::Record(record) => {
                self.log.extend(frame(&record.encode()));
                self.records.push(record);
                if self.records.len() > RECORDS_MAX {
                    self.shorten();
                }
            }
            // A step that comes again takes the place of all since, as whoever reads the lines does it.
            Line::Metrics(step, fingerprint) => {
                self.metrics.split_off(&step);
                self.metrics.insert(step, fingerprint);
            }
        }
    }

    /// Some of what waited was written, and nobody heard of it; of the next any pages.
    pub(super) fn crash(&mut self, draws: &mut Draws) {
        let whole = draws.below(self.waiting.len() as u64 + 1);
        for _ in 0..whole {
            let line = self.waiting.pop_front().expect("so many wait");
            self.keep(line);
        }
        if let Some(Line::Record(record)) = self.waiting.front() {
            let mut torn = frame(&record.encode());
            torn.chunks_mut(PAGE).for_each(|page| {
                if draws.below(2) == 0 {
                    page.fill(0);
                }
            });
            torn.truncate(draws.below(torn.len() as u64 + 1) as usize);
            self.log.extend(torn);
        }
        self.waiting.clear();
    }

    /// What the next life reads: records that were synced or happen to be there. `compact` makes the log short first.
    pub(super) fn open(&mut self, compact: bool) -> Result<&[Record], String> {
        let (records, good) = parse(&self.log)?;
        self.log.truncate(good);
        self.records = records.iter().map(|bytes| Record::decode(bytes)).collect::<Result<_, _>>()?;
        if compact {
            self.shorten();
        }
        Ok(&self.records)
    }

    fn shorten(&mut self) {
        self.records = Record::compacted(&self.records);
        self.log = self.records.iter().flat_map(|record| frame(&record.encode())).collect();
    }

    /// What is synced.
    pub(super) fn records(&self) -> &[Record] {
        &self.records
    }

    /// Fingerprints in metrics.jsonl, of these steps on.
    pub(super) fn reported_from(&self, step: Step) -> BTreeMap<Step, String> {
        self.metrics.range(step..).map(|(step, fingerprint)| (*step, fingerprint.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: Step) -> Line {
        Line::Record(Record::Doubt(step))
    }

    #[test]
    fn whatever_a_crash_tears_what_was_written_is_read() {
        for seed in 0..200 {
            let mut disk = Disk::default();
            assert_eq!(disk.write(record(1)), 1);
            assert_eq!(disk.write(Line::Metrics(1, "f".to_owned())), 2);
            assert_eq!(disk.written(), (true, true));
            disk.write(record(2));
            disk.write(record(3));
            disk.crash(&mut Draws::new(seed, 1));
            let steps = |disk: &mut Disk| -> Vec<Step> {
                let step = |r: &Record| if let Record::Doubt(step) = r { *step } else { unreachable!("doubts alone") };
                disk.open(false).unwrap().iter().map(step).collect()
            };
            let found = steps(&mut disk);
            assert_eq!(found[..], [1, 2, 3][..found.len()]);
            assert!(!found.is_empty());
            // It goes on where it was torn.
            disk.write(record(9));
            disk.written();
            assert_eq!(steps(&mut disk).last(), Some(&9));
        }
    }
}
