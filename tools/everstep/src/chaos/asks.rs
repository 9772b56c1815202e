//! What chaos asks of a running job, as an operator.

use crate::admin;
use anyhow::{Context, Result};
use everstep_actors::{ActorId, AdminRequest, NodeId, RunFolder};

/// Asks something. The supervisor may be the one that was killed a moment ago: then it is an error.
pub(super) fn ask(run: &RunFolder, request: AdminRequest) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(admin::ask(run, request))
}

/// A job as an operator's tree shows it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tree {
    /// The machine of the supervisor that answers: that of all processes here.
    pub(super) machine: String,
    /// Its process.
    pub(super) supervisor: Option<u32>,
    /// Nodes with their processes, if they are of that machine.
    pub(super) nodes: Vec<(NodeId, Option<u32>)>,
    /// Actors that have a place.
    pub(super) actors: Vec<ActorId>,
}

impl Tree {
    /// Of a running job.
    pub(super) fn of(run: &RunFolder) -> Result<Self> {
        Ok(Self::parse(&ask(run, AdminRequest::Tree)?))
    }

    fn parse(text: &str) -> Self {
        let mut tree = Self::default();
        let process = |line: &str| line.split_once(", process ")?.1.split([',', ':']).next()?.trim().parse().ok();
        for line in text.lines() {
            let node = || line.strip_prefix("node ")?.split_once(' ')?.0.parse().ok();
            if let Some((_, rest)) = line.split_once("supervisor on machine '") {
                tree.machine = rest.split_once('\'').map_or(String::new(), |(machine, _)| machine.to_owned());
                tree.supervisor = process(line);
            } else if let Some(number) = node() {
                tree.nodes.push((NodeId(number), process(line)));
            } else if let Some(actor) = line.trim().split_once('#').and_then(|(name, _)| name.parse().ok()) {
                tree.actors.push(actor);
            }
        }
        tree.actors.sort_unstable();
        tree
    }

    /// One of the actors of a kind.
    pub(super) fn actor(&self, draw: u64, of_kind: impl Fn(&ActorId) -> bool) -> Result<ActorId> {
        let kind: Vec<ActorId> = self.actors.iter().copied().filter(of_kind).collect();
        kind.get((draw % kind.len().max(1) as u64) as usize).copied().context("no such actor has a place")
    }

    /// A node and another one.
    pub(super) fn pair(&self, draw: u64) -> Result<[NodeId; 2]> {
        let n = self.nodes.len() as u64;
        if n < 2 {
            anyhow::bail!("the job has {n} nodes");
        }
        let first = draw % n;
        let second = (first + 1 + draw / n % (n - 1)) % n;
        Ok([first, second].map(|at| self.nodes[at as usize].0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_read() {
        let text = "supervisor on machine 'm 1', process 7: epoch 3, 2 nodes\nnode 1 at 127.0.0.1:9, process 12, leaving\n  stage.0.1#4\n\
                    node 4 at 10.0.0.1:9\n  reducer.2.5#1  primary\n";
        let tree = Tree::parse(text);
        assert_eq!((&tree.machine[..], tree.supervisor), ("m 1", Some(7)));
        assert_eq!(tree.nodes, [(NodeId(1), Some(12)), (NodeId(4), None)]);
        let names: Vec<String> = tree.actors.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["stage.0.1", "reducer.2.5"]);
        for draw in 0..9 {
            let [one, other] = tree.pair(draw).unwrap();
            assert_ne!(one, other);
        }
        assert!(Tree::default().pair(3).is_err());
    }
}
