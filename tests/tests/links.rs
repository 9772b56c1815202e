//! A wire that is cut between two nodes, both of which reach the supervisor: real processes in network namespaces of their
//! own, with a router between them that begins to lose what one sends to the other. Needs the right to make namespaces.

use anyhow::{Context, Result, bail};
use everstep_actors::milliseconds;
use everstep_tests::{Place, Training, events, fingerprints, metrics, program, wait};
use std::process::{Child, Command, Stdio};

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().context("cannot run ip (iproute2)")?;
    if !output.status.success() {
        bail!("ip {arguments}: {}: this test needs the right to", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// A namespace that routes between two others. They are gone with it.
struct Wires(u32);

impl Wires {
    fn new() -> Result<Self> {
        let id = std::process::id();
        let wires = Self(id);
        ip(&format!("netns add ever{id}r"))?;
        ip(&format!("-n ever{id}r link set lo up"))?;
        for n in [1, 2] {
            ip(&format!("netns add ever{id}n{n}"))?;
            ip(&format!("-n ever{id}r link add wire{n} type veth peer name wire netns ever{id}n{n}"))?;
            ip(&format!("-n ever{id}r addr add 10.213.{n}.1/24 dev wire{n}"))?;
            ip(&format!("-n ever{id}r link set wire{n} up"))?;
            ip(&format!("-n ever{id}n{n} addr add 10.213.{n}.2/24 dev wire"))?;
            ip(&format!("-n ever{id}n{n} link set wire up"))?;
            ip(&format!("-n ever{id}n{n} route add default via 10.213.{n}.1"))?;
        }
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        let status = wires.within("r", "sh").args(["-c", forward]).status()?;
        assert!(status.success(), "the router forwards");
        Ok(wires)
    }

    /// A program in one of them.
    fn within(&self, part: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("ever{}{part}", self.0), program]);
        command
    }

    /// What one sends to the other is lost without a word, or not any more.
    fn cut(&self, cut: bool) -> Result<()> {
        let change = if cut { "add" } else { "del" };
        for (from, to) in [(1, 2), (2, 1)] {
            ip(&format!("-n ever{}r rule {change} from 10.213.{from}.2 to 10.213.{to}.2 blackhole", self.0))?;
        }
        Ok(())
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        for part in ["n1", "n2", "r"] {
            let _ = ip(&format!("netns del ever{}{part}", self.0));
        }
    }
}

/// A node that ends with its test.
struct Node(Child);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// C1, LI-1, SU-7: the job goes on without one of the two, which comes back when the wire does.
#[test]
fn a_cut_wire_is_survived() -> Result<()> {
    let place = Place::new()?;
    let wires = Wires::new()?;
    let set = ["train.steps=1500", "checkpoint.every=500", "job.nodes=3", "run.listen=10.213.1.1:0", "run.folder=run"];
    let everstep = program().display().to_string();
    let mut command = wires.within("r", &everstep);
    command.current_dir(place.path()).args([
        "train",
        "tiny.toml",
        "--nodes",
        "0",
        "--set",
        "data.paths=[\"text.txt\"]",
    ]);
    set.iter().for_each(|s| {
        command.args(["--set", s]);
    });
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let training = Training { run: place.run("run"), child };
    wait("the supervisor's address", || Ok(training.run.address().exists()))?;
    let address = std::fs::read_to_string(training.run.address())?;
    let node = |part: &str| -> Result<Node> {
        let mut command = wires.within(part, &everstep);
        command.args(["node", "--threads", "1", "--join", address.trim(), "--credentials"]);
        command.arg(training.run.credentials()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Node(command.spawn()?))
    };
    let _nodes = [node("r")?, node("n1")?, node("n2")?];
    training.wait_for_step(50)?;
    assert_eq!(events(&training.run, "node_joined")?.len(), 3);
    let began = milliseconds();
    wires.cut(true)?;
    wait("the decision", || Ok(!events(&training.run, "node_dead")?.is_empty()))?;
    let dead = events(&training.run, "node_dead")?;
    assert!(dead[0]["why"].as_str().is_some_and(|why| why.starts_with("it has no link to node")), "{dead:?}");
    let took = dead[0]["time"].as_u64().context("a time")? - began;
    assert!(took < 1500, "{took} ms");
    let at = metrics(&training.run)?.last().map_or(0, |l| l.step);
    training.wait_for_step(at + 100)?;
    // It has come back, and waits for the wire.
    wait("its return", || Ok(events(&training.run, "node_joined")?.len() == 4))?;
    assert_eq!(events(&training.run, "node_dead")?.len(), 1);
    let moved = events(&training.run, "moved")?.len();
    wires.cut(false)?;
    wait("its share of the work", || Ok(events(&training.run, "moved")?.len() > moved))?;
    assert_eq!(events(&training.run, "node_dead")?.len(), 1);
    let run = training.finish()?;
    let alone = place.train("alone", &["train.steps=1500", "checkpoint.every=500", "job.nodes=1"])?;
    assert_eq!(fingerprints(&run)?, fingerprints(&alone)?);
    Ok(())
}
