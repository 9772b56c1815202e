//! What a supervisor begins from: the control log, the newest good checkpoint, the metrics so far.

use super::AnyError;
use super::run_folder::{MetricsLine, RunFolder, RunIdentity};
use super::scribe::Files;
use crate::config::Config;
use crate::ids::Step;
use crate::stored;
use crate::supervisor::{Record, Supervisor};
use everstep_checkpoint::{Element, Log, RECORD_MAX, Store, TensorEntry};
use std::collections::BTreeMap;
use std::fs::OpenOptions;

/// Records with which a supervisor may begin; with more, it begins with a shorter log that says the same.
const RECORDS_MAX: usize = 1000;

pub(super) fn encode(record: &Record) -> Vec<u8> {
    let limit = bincode::config::standard().with_limit::<RECORD_MAX>();
    bincode::serde::encode_to_vec(record, limit).expect("a record can be encoded")
}

/// What a supervisor starts from: files of the run folder.
pub(super) struct Restored {
    pub(super) records: Vec<Record>,
    pub(super) checkpoint: Step,
    pub(super) reported: BTreeMap<Step, String>,
    pub(super) files: Files,
    pub(super) store: Store,
    pub(super) notes: Vec<String>,
    /// Held as long as this supervisor lives: nobody else writes into the run folder.
    pub(super) lock: std::fs::File,
}

pub(super) fn restore(run: &RunFolder, config: &Config, identity: &RunIdentity) -> Result<Restored, AnyError> {
    let lock = run.lock()?;
    let (log, raw) = Log::open(&run.control_log())?;
    let limit = bincode::config::standard().with_limit::<RECORD_MAX>();
    let decode = |(n, bytes): (usize, Vec<u8>)| -> Result<Record, AnyError> {
        let decoded = bincode::serde::decode_from_slice(&bytes, limit);
        Ok(decoded.map_err(|e| format!("{}: record {n} cannot be decoded: {e}", run.control_log().display()))?.0)
    };
    let mut records: Vec<Record> = raw.into_iter().enumerate().map(decode).collect::<Result<_, _>>()?;
    let mut log = log;
    if records.len() > RECORDS_MAX {
        records = Supervisor::compacted(&records);
        let encoded: Vec<Vec<u8>> = records.iter().map(encode).collect();
        log = Log::rewrite(&run.control_log(), &encoded)?;
    }
    let store = Store::open(&run.checkpoints(), &identity.job, config.keep)?;
    let (good, wrong) = store.newest_good()?;
    if good.is_none() && !wrong.is_empty() {
        let words: Vec<String> = wrong.iter().map(ToString::to_string).collect();
        return Err(format!("no checkpoint can be read: {}", words.join("; ")).into());
    }
    let checkpoint = good.unwrap_or(0);
    if let Some(step) = good {
        let expected: Vec<Element> = config.spec.parts().into_iter().map(stored::element).collect();
        let manifest = store.reader().manifest(step)?;
        let elements = |t: &TensorEntry| t.parts.iter().map(|part| part.element).collect::<Vec<_>>();
        if let Some(other) = manifest.tensors.iter().find(|t| elements(t) != expected) {
            return Err(format!(
                "the checkpoint of step {step} has the state of {} in {:?}, the configuration in {expected:?} (weight, moments, \
                 average): a run keeps its train.precision, and its average or none (optimizer.ema), from its beginning on",
                other.name,
                elements(other)
            )
            .into());
        }
    }
    store.refuse_after(checkpoint)?;
    let (lines, whole) = MetricsLine::read_all(&run.metrics())?;
    let open = |path: std::path::PathBuf| -> Result<(std::path::PathBuf, std::fs::File), AnyError> {
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok((path, file))
    };
    let metrics = open(run.metrics())?;
    metrics.1.set_len(whole as u64)?;
    let reported = lines.into_iter().map(|l| (l.step, l.fingerprint)).collect();
    let notes = wrong.iter().map(ToString::to_string).collect();
    let files = Files { log, metrics, events: open(run.events())? };
    Ok(Restored { records, checkpoint, reported, files, store, notes, lock })
}
