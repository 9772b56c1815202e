//! The thread that writes the control log with metrics and events: the runtime's threads never touch a disk.
//!
//! Order: lines and records reach the disk in the order in which the supervisor decided them, so a
//! commit's record is never there without the metrics of the step before it.

use super::control_log::ControlLog;
use super::supervisor::Msg;
use crate::supervisor::Record;
use everstep_checkpoint::StoreError;
use ractor::ActorRef;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use tokio::sync::mpsc;

/// Writes that may wait. The supervisor decides a few a step, each after the one before is on disk.
pub(super) const QUEUE: usize = 4096;

/// Something to write.
#[derive(Debug)]
pub(super) enum Line {
    /// A record of the control log; answered with `Synced`.
    Record(Box<Record>),
    /// A line of metrics.jsonl.
    Metrics(String),
    /// A line of events.jsonl.
    Event(String),
    /// The job is over; answered with `Flushed`, when all before is written.
    End(Result<(), String>),
}

/// The open files.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) log: ControlLog,
    pub(super) metrics: (PathBuf, File),
    pub(super) events: (PathBuf, File),
}

pub(super) fn start_scribe(files: Files, to: ActorRef<Msg>) -> std::io::Result<mpsc::Sender<Line>> {
    let (sender, lines) = mpsc::channel(QUEUE);
    std::thread::Builder::new().name("scribe".to_owned()).spawn(move || write_lines(files, lines, &to))?;
    Ok(sender)
}

fn write_lines(mut files: Files, mut lines: mpsc::Receiver<Line>, to: &ActorRef<Msg>) {
    fn append(file: &mut (PathBuf, File), line: &str) -> Result<(), StoreError> {
        // One write for each line: a crash leaves whole lines and perhaps one torn one.
        let error = |source| StoreError::File { path: file.0.clone(), source };
        file.1.write_all(format!("{line}\n").as_bytes()).map_err(error)
    }
    while let Some(line) = lines.blocking_recv() {
        let (result, answer) = match line {
            Line::Record(record) => (files.log.append(*record), Some(Msg::Synced)),
            Line::Metrics(line) => {
                let written = append(&mut files.metrics, &line);
                let (path, file) = &files.metrics;
                let sync = |()| file.sync_data().map_err(|source| StoreError::File { path: path.clone(), source });
                (written.and_then(sync), None)
            }
            Line::Event(line) => (append(&mut files.events, &line), None),
            Line::End(_) => (Ok(()), Some(Msg::Flushed)),
        };
        if let Err(error) = result {
            // What may be written in part must not be written behind. Whoever writes meanwhile hears of this, not of a queue that is closed.
            let _ = to.cast(Msg::DiskFailed(error.to_string()));
            while lines.blocking_recv().is_some() {}
            return;
        }
        if answer.is_some_and(|answer| to.cast(answer).is_err()) {
            return;
        }
    }
}
