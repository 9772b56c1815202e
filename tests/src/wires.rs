//! Machines that are network namespaces, with wires between them that can be cut.

use anyhow::{Context, Result, bail};
use std::process::{Child, Command};

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().context("cannot run ip (iproute2)")?;
    if !output.status.success() {
        bail!("ip {arguments}: {}: this test needs the right to", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// A namespace, `r`, that routes between others, `n1` and so on. They are gone with it. Needs the right to make them.
#[derive(Debug)]
pub struct Wires {
    /// Part of their names: a machine may have others.
    id: u32,
    ends: u32,
}

impl Wires {
    /// With so many others.
    pub fn new(ends: u32) -> Result<Self> {
        let id = std::process::id();
        let wires = Self { id, ends };
        ip(&format!("netns add ever{id}r"))?;
        ip(&format!("-n ever{id}r link set lo up"))?;
        for n in 1..=ends {
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
        if !status.success() {
            bail!("the router does not forward");
        }
        Ok(wires)
    }

    /// The address of one of them, by number; 0: of the router, as the first one has it.
    pub fn address(end: u32) -> String {
        if end == 0 { "10.213.1.1".to_owned() } else { format!("10.213.{end}.2") }
    }

    /// A program in one of them.
    pub fn within(&self, part: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("ever{}{part}", self.id), program]);
        command
    }

    /// What these two send each other is lost without a word, or not any more.
    pub fn cut(&self, one: u32, other: u32, cut: bool) -> Result<()> {
        let change = if cut { "add" } else { "del" };
        for (from, to) in [(one, other), (other, one)] {
            let (from, to) = (Self::address(from), Self::address(to));
            ip(&format!("-n ever{}r rule {change} from {from} to {to} blackhole", self.id))?;
        }
        Ok(())
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        for part in (1..=self.ends).map(|n| format!("n{n}")).chain(["r".to_owned()]) {
            let _ = ip(&format!("netns del ever{}{part}", self.id));
        }
    }
}

/// A process that ends with its test.
#[derive(Debug)]
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
