//! `everstep bench control`: what the death of a node costs the supervisor of the largest job, and what it costs to tell all copies
//! of a commit. The real cores, without numbers, a disk or a wire: every node joins, every copy reports its state, then nodes die
//! one after another.

use super::median;
use crate::read_config;
use anyhow::{Result, ensure};
use everstep_actors::{ActorId, ControlPlane, NodeId, NodeInfo, Nodes, Operations, SupervisorEvent, Took};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Nodes that die, and steps that are committed.
const TIMES: u64 = 9;

fn join(plane: &mut ControlPlane, peer: u64) -> Took {
    let (address, machine, domain) = (format!("10.0.0.1:{peer}"), format!("machine {}", peer / 8), String::new());
    plane.on(SupervisorEvent::Join(NodeInfo { address, peer, pid: 1, machine, domain, memory: 0 }));
    plane.on(SupervisorEvent::Heartbeat {
        node: NodeId(peer),
        operations: Operations::default(),
        rates: Default::default(),
        down: Vec::new(),
    })
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn spread(all: &[Took], of: fn(&Took) -> Duration) -> serde_json::Value {
    let all: Vec<f64> = all.iter().map(|took| ms(of(took))).collect();
    json!({ "median": median(all.to_vec()), "longest": all.iter().copied().fold(0.0, f64::max) })
}

pub(super) fn run(config: &Path, set: &[String]) -> Result<()> {
    let config = read_config(config, set)?;
    let (spec, nodes) = (Arc::new(config.spec), config.nodes as u64);
    let mut plane = ControlPlane::new(&spec, Nodes { wanted: config.nodes, spares: 0, relieve: false });
    for node in 1..nodes {
        join(&mut plane, node);
    }
    // The last one to come is the one that all get their places with.
    let placed = join(&mut plane, nodes);
    plane.applied(0);
    let mut commits = Vec::new();
    for step in 1..=TIMES.min(spec.steps - 1) {
        let samples = spec.samples_of_step(step);
        commits.push(plane.prepared(step, samples));
        plane.applied(step);
    }
    let mut deaths = Vec::new();
    for death in 0..TIMES {
        let node = NodeId(1 + death * nodes / TIMES);
        deaths.push(plane.on(SupervisorEvent::Lost { node, why: "its process ended".to_owned() }));
        let homeless = plane.table().actors_of(node).count();
        ensure!(homeless == 0 && !plane.table().nodes.contains_key(&node), "{homeless} actors still live on {node}");
    }
    let copies = plane.table().entries.keys().filter(|actor| matches!(actor, ActorId::Reducer { .. })).count();
    let (commit, death) = (commits[commits.len() - 1], deaths[deaths.len() - 1]);
    let line = json!({
        "bench": "control", "nodes": nodes, "actors": plane.table().entries.len(), "first_placement_ms": ms(placed.whole),
        "death_to_placement_ms": spread(&deaths, |took| took.whole), "epoch_bytes": death.bytes / death.messages.max(1),
        "commit_to": copies, "commit_broadcast_ms": spread(&commits, |took| took.since_synced),
        "commit_ms": spread(&commits, |took| took.whole), "commit_messages": commit.messages, "commit_bytes": commit.bytes,
    });
    println!("{line}");
    Ok(())
}
