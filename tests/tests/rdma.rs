//! RDMA on devices in software, in a small machine of its own (`src/vm.rs`). Without a device these tests fail.

use anyhow::{Context, Result, ensure};
use everstep_tests::{Vm, program};
use everstep_transport::Credentials;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(240);
const TRAIN: &str = "train configs/tiny.toml --set job.nodes=2 --set train.steps=40 --set 'data.paths=[\"actors/src\"]' --set run.folder=/tmp/run";

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// How often each is disturbed: a share, or as often as `make rdma RDMA_ROUNDS=...` says.
fn rounds() -> Result<u32> {
    Ok(std::env::var("RDMA_ROUNDS").map_or(Ok(5), |rounds| rounds.parse())?)
}

fn limit() -> Result<Duration> {
    Ok(LIMIT + rounds()? * Duration::from_secs(10))
}

fn in_machine(line: &str) -> Result<String> {
    let ran = Vm::set_up()?.run(&format!("cd {}\n{line}", root().display()), limit()?)?;
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
        // Two nodes with each other, each with the supervisor: four ends are nodes', which say so once they are members. (On a machine that
        // is busy they may go back to QUIC for a while.)
        ensure!(ways.iter().filter(|way| **way == rdma).count() >= 3, "{ways:?}");
        ensure!(prints == want, "{} fingerprints over {device}, and they differ from those over QUIC", prints.len());
    }
    Ok(())
}

/// C1: links fail, and nodes are killed: the undisturbed job's bits.
#[test]
fn a_job_over_rdma_with_faults_has_the_bits_of_one_without() -> Result<()> {
    let (kills, steps) = (rounds()?, 20 * rounds()?);
    let plan = format!(r#"seed = 3\nkills = {kills}\nevery_ms = 3000\ntargets = ["rdma", "node"]\n"#);
    let output = in_machine(&format!(
        "printf '{plan}' > /tmp/plan.toml\n\
         {} chaos /tmp/plan.toml configs/tiny.toml --set job.nodes=3 --set train.steps={steps} --set 'data.paths=[\"actors/src\"]' \
         --set run.folder=/tmp/run 2>&1",
        program().display()
    ))?;
    ensure!(output.contains(" equal, 0 different"), "{output}");
    Ok(())
}

/// Ends that break the rules (`transport/src/rdma/on_a_device.rs`).
#[test]
fn who_breaks_the_rules_is_refused() -> Result<()> {
    let tests =
        std::env::var("TRANSPORT_TESTS").context("TRANSPORT_TESTS names the transport's tests: see `make rdma`")?;
    let output = in_machine(&format!("{tests} on_a_device --test-threads 1 --nocapture 2>&1"))?;
    println!("{output}");
    ensure!(output.contains("test result: ok. 3 passed; 0 failed"), "{output}");
    Ok(())
}

/// Queue pairs fail in the middle of tensors.
#[test]
fn a_session_whose_queue_pair_fails_goes_on_and_comes_back() -> Result<()> {
    let rounds = rounds()?;
    all_came(rounds, 1, &in_machine(&format!("{} {rounds} leaves fail true", check()?))?)
}

/// The device is removed in the middle of tensors; the session goes on, and then over the other one. With devices in software the
/// removal itself ends only when the process does: it is not waited for, and each has a process of its own.
#[test]
fn a_session_whose_device_is_removed_goes_on_and_takes_another() -> Result<()> {
    let (rounds, check) = (rounds()?, check()?);
    let output = in_machine(&format!(
        "add() {{ case $1 in rxe0) rdma link add rxe0 type rxe netdev eth0;; siw0) rdma link add siw0 type siw netdev eth1;; esac; }}\n\
         for n in $(seq {rounds}); do\n\
         {check} 1 leaves 'echo $DEVICE > /tmp/removed; rdma link delete $DEVICE & sleep 1' true || exit 1\n\
         until add $(cat /tmp/removed); do sleep 0.1; done\ndone"
    ))?;
    all_came(1, rounds, &output)
}

fn check() -> Result<String> {
    let check = program().with_file_name("examples").join("rdma_check");
    ensure!(check.is_file(), "{} is not built: see `make rdma`", check.display());
    Ok(check.display().to_string())
}

/// So many times, of so many rounds each.
fn all_came(rounds: u32, times: u32, output: &str) -> Result<()> {
    let all = format!("{} messages, each once and in order", 120 * rounds);
    ensure!(output.lines().filter(|line| *line == all).count() == times as usize, "{output}");
    Ok(())
}

/// Disturbances of a wire for RDMA, beside one for QUIC. Whether packets that are lost are too many for RDMA is the device's matter.
const OF_WIRES: &str = "leaves fail true \
    leaves 'tc qdisc replace dev wire1 root netem loss 100%' 'tc qdisc del dev wire1 root' \
    may 'tc qdisc replace dev wire1 root netem loss 1%' 'tc qdisc del dev wire1 root' \
    may 'tc qdisc replace dev wire1 root netem loss 10%' 'tc qdisc del dev wire1 root'";
/// With `rdma_rxe` (Linux 6.1) what its connection manager says while the link is down leaves it in an error for good.
const OF_LINKS: &str = "leaves 'ip link set wire1 down' 'ip link set wire1 up'";

/// Between two machines: queue pairs fail, links go down, packets are lost.
#[test]
fn a_session_between_machines_goes_on_whatever_their_wire_does() -> Result<()> {
    let (rounds, check, folder) = (rounds()?, check()?, tempfile::tempdir()?);
    let credentials = folder.path().join("credentials");
    Credentials::create(&credentials)?;
    for (kind, faults) in [("rxe", OF_WIRES.to_owned()), ("siw", format!("{OF_LINKS} {OF_WIRES}"))] {
        let line = |end: &str, faults: &str| {
            format!(
                "cd {}; rdma link delete rxe0; rdma link delete siw0; rdma link add wired type {kind} netdev wire1 || exit 125\n\
                 {check} {end} 10.98.0.2:7000 {} {rounds} {faults}",
                root().display(),
                credentials.display(),
            )
        };
        let [given, taken] = Vm::set_up()?.run_two([&line("give", &faults), &line("take", "")], limit()?)?;
        println!("{kind}:\n{}", given.output);
        ensure!((given.status, taken.status) == (0, 0), "{kind}: {}\n{}", given.output, taken.output);
        all_came(rounds, 1, &given.output)?;
    }
    Ok(())
}
