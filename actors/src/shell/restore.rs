//! What a supervisor begins from: the control log, the newest good checkpoint, the metrics so far.

use super::run_folder::{MetricsLine, RunFolder};
use super::scribe::Files;
use super::{AnyError, coded};
use crate::config::Config;
use crate::ids::Step;
use crate::stored;
use crate::supervisor::{RECORDS_MAX, Record, Supervisor};
use everstep_checkpoint::{Element, Log, RECORD_MAX, Store, TensorEntry};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// The first byte of a record: of the form of what follows. Records of the first programs had none, and began with 0 or 1.
const VERSION: u8 = 2;

pub(super) fn encode(record: &Record) -> Vec<u8> {
    coded::encode(VERSION, record)
}

/// Reads a record as [`encode`] writes it.
fn decode(bytes: &[u8]) -> Result<Record, String> {
    coded::decode::<Record, RECORD_MAX>(VERSION, bytes)
}

/// What a supervisor starts from.
pub(super) struct Restored {
    pub(super) records: Vec<Record>,
    pub(super) checkpoint: Step,
    pub(super) reported: BTreeMap<Step, String>,
    pub(super) store: Store,
    pub(super) notes: Vec<String>,
}

/// The control log of a supervisor that is the only one, and the files that it writes.
pub(super) fn restore_log(run: &RunFolder) -> Result<(Vec<Record>, Files), AnyError> {
    let (mut log, raw) = Log::open(&run.control_log())?;
    let decode = |(n, bytes): (usize, Vec<u8>)| {
        decode(&bytes).map_err(|why| format!("{}: record {n}: {why}", run.control_log().display()))
    };
    let mut records: Vec<Record> = raw.into_iter().enumerate().map(decode).collect::<Result<_, _>>()?;
    if records.len() > RECORDS_MAX {
        records = Supervisor::compacted(&records);
        let encoded: Vec<Vec<u8>> = records.iter().map(encode).collect();
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
    let reported = MetricsLine::read_all(metrics)?.0.into_iter().map(|l| (l.step, l.fingerprint)).collect();
    let notes = wrong.iter().map(ToString::to_string).collect();
    Ok(Restored { records, checkpoint, reported, store, notes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    #[test]
    fn records_of_another_form_are_named_not_misread() {
        let record = Record::Epoch { table: Table::default(), next_node: 7 };
        let bytes = encode(&record);
        assert_eq!(decode(&bytes), Ok(record));
        for other in [&bytes[1..], &[], &[9, 9]] {
            assert!(decode(other).unwrap_err().contains("another version"), "{other:?}");
        }
        assert!(decode(&bytes[..bytes.len() - 1]).unwrap_err().contains("cannot be decoded"));
    }
}
