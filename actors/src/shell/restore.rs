//! What a supervisor begins from: the control log, the last of the metrics, and later the newest good checkpoint.
//!
//! It grows with the steps since that checkpoint, not with the job: a supervisor of a long one begins as fast as that of a short one,
//! and in as much memory.

use super::AnyError;
use super::control_log::ControlLog;
use super::run_folder::{MetricsLine, RunFolder};
use super::scribe::Files;
use super::tail::whole_bytes;
use crate::ids::Step;
use crate::spec::JobSpec;
use crate::storing::{Newest, newest};
use crate::supervisor::Record;
use everstep_checkpoint::{Store, StoreError};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// What a supervisor starts from.
pub(super) struct Restored {
    pub(super) records: Vec<Record>,
    /// Fingerprints of the steps that the job may do again before its store is read.
    pub(super) reported: BTreeMap<Step, String>,
    pub(super) opening: Opening,
}

/// The store of checkpoints, and what is in it.
pub(super) struct Opened {
    pub(super) store: Store,
    pub(super) newest: Newest,
    /// Fingerprints of the steps that the job may do again.
    pub(super) reported: BTreeMap<Step, String>,
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
    let log = ControlLog::open(&run.control_log())?;
    let open = |path: PathBuf| -> Result<(PathBuf, std::fs::File), AnyError> {
        let words = |e: std::io::Error| format!("{}: {e}", path.display());
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(words)?;
        // A line of metrics that was torn is written again; one of events must not run into the next.
        whole_bytes(&mut file).and_then(|whole| file.set_len(whole)).map_err(words)?;
        Ok((path, file))
    };
    let (metrics, events) = (open(run.metrics())?, open(run.events())?);
    Ok((log.records().to_vec(), Files { log, metrics, events }))
}

/// The rest, once the control log is known. `metrics` has the lines of the steps so far, `store` opens the store.
pub(super) fn restore(
    records: Vec<Record>,
    spec: JobSpec,
    metrics: &Path,
    mut store: impl FnMut() -> Result<Store, StoreError> + Send + 'static,
) -> Result<Restored, AnyError> {
    let reported = reported_from(metrics, Record::reached(&records).unwrap_or(0))?;
    let (log, metrics) = (records.clone(), metrics.to_owned());
    let mut open = move || -> Result<Opened, AnyError> {
        let store = store()?;
        let newest = newest(&store, &spec, &log)?;
        let reported = reported_from(&metrics, *newest.step.as_ref().unwrap_or(&0))?;
        Ok(Opened { store, newest, reported })
    };
    let opening = if records.is_empty() { Opening::Done(Box::new(open()?)) } else { Opening::Later(Box::new(open)) };
    Ok(Restored { records, reported, opening })
}

/// Fingerprints of these steps on.
fn reported_from(metrics: &Path, step: Step) -> std::io::Result<BTreeMap<Step, String>> {
    Ok(MetricsLine::read_from(metrics, step)?.into_iter().map(|line| (line.step, line.fingerprint)).collect())
}
