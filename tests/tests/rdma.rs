//! RDMA on devices in software, in a small machine of its own (`src/vm.rs`). Without a device these tests fail.

use anyhow::{Context, Result, ensure};
use everstep_tests::{Vm, program};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(240);
const TRAIN: &str = "train configs/tiny.toml --set job.nodes=2 --set train.steps=40 --set 'data.paths=[\"actors/src\"]' --set run.folder=/tmp/run";

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn in_machine(line: &str) -> Result<String> {
    let ran = Vm::set_up()?.run(&format!("cd {}\n{line}", root().display()), LIMIT)?;
    ensure!(ran.status == 0, "status {}:\n{}", ran.status, ran.output);
    Ok(ran.output)
}

/// The fingerprints of a job in the machine, and the ways that its nodes' sessions took after QUIC. (That machine's processor has not
/// the instructions of this one: what is compared was computed there.)
fn job(before: &str) -> Result<(Vec<String>, Vec<String>)> {
    let program = program();
    let output = in_machine(&format!(
        "{before}\n{} {TRAIN} >/dev/null 2>/tmp/err || {{ cat /tmp/err /tmp/run/logs/*; exit 1; }}\n\
         cat /tmp/run/events.jsonl /tmp/run/metrics.jsonl",
        program.display()
    ))?;
    let lines: Vec<Value> = output.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let text = |line: &Value, name: &str| line[name].as_str().map(ToOwned::to_owned);
    let ways = lines.iter().filter(|line| line["event"] == "way_changed").filter_map(|line| text(line, "way"));
    let prints = lines.iter().filter_map(|line| text(line, "fingerprint"));
    Ok((prints.collect(), ways.collect()))
}

/// Over RoCE, over iWARP, and over QUIC, where there is no device: the same bits.
#[test]
fn a_job_over_rdma_has_the_bits_that_it_has_over_quic() -> Result<()> {
    let (want, ways) = job("rdma link delete rxe0; rdma link delete siw0")?;
    ensure!(want.len() == 40 && ways.is_empty(), "{} steps over QUIC; {ways:?}", want.len());
    for (before, device) in [("", "rxe0"), ("rdma link delete rxe0", "siw0")] {
        let (prints, ways) = job(before)?;
        let rdma = format!("rdma ({device})");
        // Two nodes with each other, each with the supervisor: four ends are nodes', which say so once they are members.
        ensure!(ways.len() >= 3 && ways.iter().all(|way| *way == rdma), "{ways:?}");
        ensure!(prints == want, "{} fingerprints over {device}, and they differ from those over QUIC", prints.len());
    }
    Ok(())
}

/// Queue pairs fail in the middle of tensors.
#[test]
fn a_session_whose_queue_pair_fails_goes_on_and_comes_back() -> Result<()> {
    disturbed(4, "fail", "true")
}

/// The device is removed in the middle of tensors; the session goes on, and then over the other one. With devices in software the
/// removal itself ends only when the process does: it is not waited for.
#[test]
fn a_session_whose_device_is_removed_goes_on_and_takes_another() -> Result<()> {
    disturbed(1, "rdma link delete $DEVICE & sleep 1", "true")
}

fn disturbed(rounds: u32, disturb: &str, restore: &str) -> Result<()> {
    let check = program().with_file_name("examples").join("rdma_check");
    ensure!(check.is_file(), "{} is not built: see `make test`", check.display());
    let output = in_machine(&format!("{} {rounds} '{disturb}' '{restore}'", check.display()))?;
    let last = output.lines().last().context("it says nothing")?;
    ensure!(last == format!("{} messages, each once and in order", 120 * rounds), "{output}");
    Ok(())
}
