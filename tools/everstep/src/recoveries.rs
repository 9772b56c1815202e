//! The recoveries of a run, from its events: also of one that runs no more.

use anyhow::{Context, Result};
use everstep_actors::{Phases, RunFolder};
use serde::Deserialize;
use serde_json::Value;
use std::fmt::Write;

/// A recovery: the fields of its event.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Recovery {
    /// Milliseconds since 1970 at its end.
    pub(crate) time: u64,
    /// The first step that was committed after it.
    pub(crate) step: u64,
    /// What failed.
    pub(crate) causes: Vec<String>,
    /// Actors that got a new life.
    pub(crate) lives: usize,
    /// Of each phase.
    pub(crate) microseconds: Phases,
}

impl Recovery {
    /// Milliseconds of each phase, in order, with its name.
    pub(crate) fn phases(&self) -> [(&'static str, f64); 6] {
        let Phases { detect, decide, fence, fetch, replay, commit } = self.microseconds;
        let phases = [
            ("detect", detect),
            ("decide", decide),
            ("fence", fence),
            ("fetch", fetch),
            ("replay", replay),
            ("commit", commit),
        ];
        phases.map(|(name, microseconds)| (name, microseconds as f64 / 1e3))
    }

    /// Milliseconds of the whole.
    pub(crate) fn whole(&self) -> f64 {
        self.phases().iter().map(|(_, ms)| ms).sum()
    }
}

/// The events of a run, in order.
pub(crate) fn events(run: &RunFolder) -> Result<Vec<Value>> {
    let path = run.events();
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // The last line may be half written.
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// The recoveries among events.
pub(crate) fn among(events: &[Value]) -> Result<Vec<Recovery>> {
    let recovered = events.iter().filter(|event| event["event"] == "recovered");
    recovered
        .map(|event| Recovery::deserialize(event).with_context(|| format!("an event that is none: {event}")))
        .collect()
}

/// As a table for people.
pub(crate) fn table(all: &[Recovery]) -> String {
    let mut text =
        "  step  lives     whole    detect    decide     fence     fetch    replay    commit  (ms)\n".to_owned();
    for recovery in all {
        let _ = write!(text, "{:>6} {:>6} {:>9.1}", recovery.step, recovery.lives, recovery.whole());
        for (_, ms) in recovery.phases() {
            let _ = write!(text, " {ms:>9.1}");
        }
        let _ = writeln!(text, "  {}", recovery.causes.join("; "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_what_is_half_written_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder(folder.path().to_owned());
        let phases = r#"{"detect":1500,"decide":0,"fence":2000,"fetch":3000,"replay":40000,"commit":500}"#;
        let good = format!(
            r#"{{"time":7,"event":"recovered","step":9,"milliseconds":47,"causes":["a","b"],"lives":3,"microseconds":{phases}}}"#
        );
        std::fs::write(run.events(), format!("{{\"time\":1,\"event\":\"moved\"}}\n{good}\n{}", &good[..40])).unwrap();
        let read = || among(&events(&run)?);
        let all = read().unwrap();
        assert_eq!((all.len(), all[0].step, all[0].lives, all[0].whole()), (1, 9, 3, 47.0));
        assert!(table(&all).ends_with("       1.5       0.0       2.0       3.0      40.0       0.5  a; b\n"));
        std::fs::write(run.events(), good.replace("\"lives\":3,", "")).unwrap();
        assert!(read().unwrap_err().to_string().contains("recovered"));
    }
}
