//! What a supervisor begins from: the control log, the metrics so far, and later the newest good checkpoint.

use super::AnyError;
use super::run_folder::{MetricsLine, RunFolder};
use super::scribe::Files;
use crate::ids::Step;
use crate::storing::Newest;
use crate::supervisor::{RECORDS_MAX, Record};
use everstep_checkpoint::{Log, Store};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// What a supervisor starts from.
pub(super) struct Restored {
    pub(super) records: Vec<Record>,
    pub(super) reported: BTreeMap<Step, String>,
    pub(super) opening: Opening,
}

/// The store of checkpoints, and what is in it.
pub(super) struct Opened {
    pub(super) store: Store,
    pub(super) newest: Newest,
}

/// The way to it.
pub(super) enum Opening {
    /// Of a job that begins: what is wrong with its store is told before anything is trained.
    Done(Box<Opened>),
    /// Of one that goes on: it does not wait for its store (SU-9).
    Later(Box<dyn FnMut() -> Result<Opened, AnyError> + Send>),
}

/// The control log of a supervisor that is the only one, and the files that it writes.
pub(super) fn restore_log(run: &RunFolder) -> Result<(Vec<Record>, Files), AnyError> {
    let (mut log, raw) = Log::open(&run.control_log())?;
    let decode = |(n, bytes): (usize, Vec<u8>)| {
        Record::decode(&bytes).map_err(|why| format!("{}: record {n}: {why}", run.control_log().display()))
    };
    let mut records: Vec<Record> = raw.into_iter().enumerate().map(decode).collect::<Result<_, _>>()?;
    if records.len() > RECORDS_MAX {
        records = Record::compacted(&records);
        let encoded: Vec<Vec<u8>> = records.iter().map(Record::encode).collect();
        log = Log::rewrite(&run.control_log(), &encoded)?;
    }
    let open = |path: PathBuf| -> Result<(PathBuf, std::fs::File), AnyError> {
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok((path, file))
    };
    let (metrics, events) = (open(run.metrics())?, open(run.events())?);
    // A line of metrics that was torn is written again; one of events must not run into the next.
    metrics.1.set_len(MetricsLine::read_all(&run.metrics())?.1 as u64)?;
    let written = std::fs::read(run.events())?;
    events.1.set_len(written.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at as u64 + 1))?;
    Ok((records, Files { log, metrics, events }))
}

/// The rest, once the control log is known. `metrics` has the lines of the steps so far.
pub(super) fn restore(
    records: Vec<Record>,
    metrics: &Path,
    mut open: impl FnMut() -> Result<Opened, AnyError> + Send + 'static,
) -> Result<Restored, AnyError> {
    let opening = if records.is_empty() { Opening::Done(Box::new(open()?)) } else { Opening::Later(Box::new(open)) };
    let reported = MetricsLine::read_all(metrics)?.0.into_iter().map(|l| (l.step, l.fingerprint)).collect();
    Ok(Restored { records, reported, opening })
}
