//! What a supervisor begins from: the control log, the newest good checkpoint, the metrics so far.

use super::AnyError;
use super::run_folder::{MetricsLine, RunFolder};
use super::scribe::Files;
use crate::config::Config;
use crate::ids::Step;
use crate::storing::{Newest, newest};
use crate::supervisor::{RECORDS_MAX, Record};
use everstep_checkpoint::{Log, Store};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// What a supervisor starts from.
pub(super) struct Restored {
    pub(super) records: Vec<Record>,
    pub(super) checkpoint: Result<Step, String>,
    pub(super) reported: BTreeMap<Step, String>,
    pub(super) store: Store,
    pub(super) notes: Vec<String>,
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
    store: Store,
    config: &Config,
    records: Vec<Record>,
    metrics: &Path,
) -> Result<Restored, AnyError> {
    let Newest { step: checkpoint, wrong: notes } = newest(&store, &config.spec, &records)?;
    let reported = MetricsLine::read_all(metrics)?.0.into_iter().map(|l| (l.step, l.fingerprint)).collect();
    Ok(Restored { records, checkpoint, reported, store, notes })
}
