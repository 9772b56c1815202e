//! The simulator as a program: whatever runs beside a seed, its log is the same.

use anyhow::Result;
use everstep_tests::Place;
use serde_json::Value;

fn logs(place: &Place, seeds: &str, jobs: &str) -> Result<Value> {
    let output = place.everstep(&["simulate", "--seeds", seeds, "--jobs", jobs, "--json"])?;
    assert!(output.status.success(), "{output:?}");
    let line: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(line["violation"], Value::Null);
    Ok(line["logs"].clone())
}

#[test]
fn logs_do_not_depend_on_what_runs_beside_them() -> Result<()> {
    let place = Place::new()?;
    let alone = logs(&place, "0..60", "1")?;
    assert_eq!(alone, logs(&place, "0..60", "3")?);
    assert_ne!(alone, logs(&place, "1..61", "1")?);
    Ok(())
}
