//! What goes wrong, and when: by a plan, from a seed.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What is killed, or made to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Target {
    /// A random stage: it panics.
    Stage,
    /// A random expert: it panics.
    Expert,
    /// A random copy of a shard: it panics.
    Reducer,
    /// A bit of a random copy of a shard flips.
    Flip,
    /// All stages on a random stage's node compute wrongly from now on: with recovery.audit the node is found and given up.
    Wrong,
    /// A random node.
    Node,
    /// Two random nodes at once.
    TwoNodes,
    /// The supervisor, or the one of several that leads.
    Supervisor,
    /// The same is stopped for a while.
    StopSupervisor,
    /// Everything; the run is resumed.
    Everything,
    /// A random node is stopped for a while.
    Stop,
    /// A random node gets a share of a core for a while.
    Cpu,
    /// A random node gets no more memory, and another is killed: it ends when it wants some for the actors that it is given.
    Memory,
    /// Another node comes.
    Join,
    /// A random node is told to leave, and does.
    Leave,
    /// Two random nodes do not reach each other for a while.
    Cut,
    /// What a random node sends to another is lost for a while.
    OneWay,
    /// A random node reaches nobody for a while.
    Isolate,
    /// A random node's wire loses datagrams for a while.
    Loss,
    /// What a random node sends takes longer for a while.
    Delay,
    /// A random node's links over RDMA fail; sessions over QUIC go on as they are.
    Rdma,
    /// The store of checkpoints is full for a while.
    Full,
    /// The store of checkpoints cannot be read for a while, and two nodes are killed: a job that goes back wants to read it.
    Unreadable,
    /// A bit of a random chunk on disk flips, and the supervisor is killed: its next life verifies them.
    FlipFile,
    /// The supervisor's wall clock is an hour late for a while.
    Clock,
}

impl Target {
    /// Whether it is done to a node's process.
    pub(super) fn needs_node(self) -> bool {
        use Target::{Cpu, Leave, Memory, Node, Stop, TwoNodes, Unreadable};
        matches!(self, Node | TwoNodes | Leave | Memory | Stop | Cpu | Unreadable)
    }

    /// How many nodes it takes out, or makes worse for a while; none if it is not about some of them.
    fn nodes(self) -> usize {
        use Target::{
            Clock, Cpu, Cut, Delay, Everything, Expert, Flip, FlipFile, Full, Isolate, Join, Leave, Loss, Memory, Node,
            OneWay, Rdma, Reducer, Stage, Stop, StopSupervisor, Supervisor, TwoNodes, Unreadable, Wrong,
        };
        match self {
            TwoNodes | Memory | Unreadable => 2,
            Node | Leave | Wrong | Stop | Cpu | Cut | OneWay | Isolate | Loss | Delay => 1,
            Stage | Expert | Reducer | Flip | Supervisor | StopSupervisor | Everything | Join | Rdma | Full
            | FlipFile | Clock => 0,
        }
    }

    /// Whether it needs the launcher that started the job.
    pub(super) fn needs_launcher(self) -> bool {
        matches!(self, Self::Everything | Self::Join)
    }
}

/// When and what.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    /// Names the moments and the victims.
    pub(super) seed: u64,
    /// Faults in all; without it they go on until the job ends.
    pub(crate) kills: Option<u64>,
    /// Mean milliseconds between two.
    pub(super) every_ms: u64,
    /// Milliseconds for which a process is stopped.
    #[serde(default = "stop_ms")]
    pub(super) stop_ms: u64,
    /// Milliseconds for which anything else lasts.
    #[serde(default = "fault_ms")]
    pub(super) fault_ms: u32,
    /// Datagrams that are lost, of a hundred.
    #[serde(default = "lost_percent")]
    pub(super) lost_percent: u8,
    /// Milliseconds that datagrams take longer.
    #[serde(default = "delay_ms")]
    pub(super) delay_ms: u32,
    /// The share of a core that is left to a node.
    #[serde(default = "cpu_percent")]
    pub(super) cpu_percent: u32,
    /// While something lasts on some nodes, a fault that would make them more than so many waits; one that is more by itself waits until
    /// nothing lasts.
    #[serde(default = "at_most")]
    pub(super) at_most: usize,
    /// A job that commits nothing for so many seconds hangs, and ends.
    #[serde(default = "hangs_s")]
    pub(super) hangs_s: u64,
    /// Taken in turn.
    pub(super) targets: Vec<Target>,
}

fn stop_ms() -> u64 {
    10_000
}

fn fault_ms() -> u32 {
    2000
}

fn lost_percent() -> u8 {
    20
}

fn delay_ms() -> u32 {
    30
}

fn cpu_percent() -> u32 {
    20
}

fn at_most() -> usize {
    1
}

fn hangs_s() -> u64 {
    120
}

impl Plan {
    /// Reads one.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let plan: Self = toml::from_str(&text).with_context(|| path.display().to_string())?;
        if plan.targets.is_empty() {
            bail!("{}: targets is empty", path.display());
        }
        for (name, value, least, most) in [
            ("lost_percent", u64::from(plan.lost_percent), 1, 100),
            ("cpu_percent", u64::from(plan.cpu_percent), 1, 99),
            ("at_most", plan.at_most as u64, 1, u64::MAX),
            ("hangs_s", plan.hangs_s, 1, u64::MAX),
        ] {
            if !(least..=most).contains(&value) {
                bail!("{}: {name} is {value}, expected {least} to {most}", path.display());
            }
        }
        Ok(plan)
    }

    /// Whether a fault must wait while something lasts on so many nodes.
    pub(super) fn is_too_much(&self, target: Target, lasting: usize) -> bool {
        lasting > 0 && target.nodes() > 0 && lasting + target.nodes() > self.at_most
    }

    /// Refuses what only the launcher of a job can do.
    pub(super) fn without_launcher(&self) -> Result<()> {
        match self.targets.iter().find(|target| target.needs_launcher()) {
            Some(target) => bail!("{target:?} needs the launcher that started the job: leave it out with --attach"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_read_and_what_is_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan.toml");
        let read = |more: &str| {
            std::fs::write(&path, format!("seed = 1\nevery_ms = 100\n{more}")).unwrap();
            Plan::read(&path).map_err(|error| format!("{error:#}"))
        };
        let plan = read("targets = [\"one-way\", \"flip-file\"]").unwrap();
        assert_eq!((plan.kills, &plan.targets[..]), (None, &[Target::OneWay, Target::FlipFile][..]));
        for (more, words) in [
            ("targets = []", "targets is empty"),
            ("targets = [\"moon\"]", "unknown variant `moon`"),
            ("targets = [\"loss\"]\nlost_percent = 101", "lost_percent is 101, expected 1 to 100"),
            ("targets = [\"cpu\"]\ncpu_percent = 0", "cpu_percent is 0"),
            ("targets = [\"node\"]\nkils = 3", "unknown field `kils`"),
        ] {
            let error = read(more).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        assert!(read("targets = [\"join\"]").unwrap().without_launcher().is_err());
    }

    #[test]
    fn what_lasts_bounds_what_may_come() {
        let plan = |at_most| -> Plan {
            toml::from_str(&format!("seed = 1\nevery_ms = 1\nat_most = {at_most}\ntargets = [\"node\"]")).unwrap()
        };
        for (at_most, lasting, target, waits) in [
            (1, 0, Target::TwoNodes, false),
            (1, 1, Target::Node, true),
            (1, 1, Target::Cut, true),
            (1, 1, Target::Stage, false),
            (2, 1, Target::Node, false),
            (2, 1, Target::TwoNodes, true),
            (2, 2, Target::Stop, true),
            (3, 1, Target::Unreadable, false),
        ] {
            assert_eq!(plan(at_most).is_too_much(target, lasting), waits, "{target:?} beside {lasting} of {at_most}");
        }
    }
}
