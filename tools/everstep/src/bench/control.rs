//! `everstep bench control`: what the death of a node costs the supervisor of the largest job. The real core, without numbers
//! and without a wire: every node joins, every copy reports its state, then nodes die one after another.

use super::median;
use crate::read_config;
use anyhow::{Result, ensure};
use everstep_actors::{
    Body, Layout, NodeId, NodeInfo, Nodes, Operations, Supervisor, SupervisorEffect, SupervisorEvent, Table,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Nodes that die.
const DEATHS: usize = 9;

/// A supervisor whose records are synced at once.
struct Job {
    supervisor: Supervisor,
    now: Duration,
    /// The newest epoch that was announced.
    table: Arc<Table>,
}

impl Job {
    fn on(&mut self, event: SupervisorEvent) {
        self.now += Duration::from_micros(10);
        let effects = self.supervisor.on(self.now, event);
        self.carry_out(effects);
    }

    fn carry_out(&mut self, effects: Vec<SupervisorEffect>) {
        for effect in effects {
            match effect {
                SupervisorEffect::Append(_) => {
                    let effects = self.supervisor.on(self.now, SupervisorEvent::Synced);
                    self.carry_out(effects);
                }
                SupervisorEffect::Announce(table) => self.table = table,
                _ => {}
            }
        }
    }

    fn join(&mut self, peer: u64) {
        let (address, machine, domain) = (format!("10.0.0.1:{peer}"), format!("machine {}", peer / 8), String::new());
        self.on(SupervisorEvent::Join(NodeInfo { address, peer, pid: 1, machine, domain, memory: 0 }));
        self.on(SupervisorEvent::Heartbeat {
            node: NodeId(peer),
            operations: Operations::default(),
            rates: Default::default(),
            down: Vec::new(),
        });
    }
}

pub(super) fn run(config: &Path, set: &[String]) -> Result<()> {
    let config = read_config(config, set)?;
    let (spec, nodes) = (Arc::new(config.spec), config.nodes as u64);
    let of_job = Nodes { wanted: config.nodes, spares: 0, relieve: false };
    let (supervisor, first) = Supervisor::new(Arc::clone(&spec), of_job, &[], Ok(0), BTreeMap::new(), Duration::ZERO);
    let mut job = Job { supervisor, now: Duration::ZERO, table: Arc::default() };
    job.carry_out(first);
    (1..nodes).for_each(|node| job.join(node));
    // The last one to come is the one that all get their places with.
    let began = Instant::now();
    job.join(nodes);
    let placed = began.elapsed().as_secs_f64();
    let layout = Layout::new(&spec);
    for shard in 0..spec.shards {
        let sums: Vec<(u32, u128)> = layout.of_shard(shard).into_iter().map(|number| (number, 0)).collect();
        for copy in job.table.replicas(shard).collect::<Vec<_>>() {
            let from = job.table.address(copy).expect("a copy that is placed has a life");
            job.on(SupervisorEvent::Message { from, body: Body::Applied { step: 0, sums: sums.clone() } });
        }
    }
    let mut seconds = Vec::new();
    for death in 0..DEATHS as u64 {
        let node = NodeId(1 + death * nodes / DEATHS as u64);
        let began = Instant::now();
        job.on(SupervisorEvent::Lost { node, why: "its process ended".to_owned() });
        seconds.push(began.elapsed().as_secs_f64());
        let homeless = job.table.actors_of(node).count();
        ensure!(homeless == 0 && !job.table.nodes.contains_key(&node), "{homeless} actors still live on {node}");
    }
    let longest = seconds.iter().copied().fold(0.0, f64::max);
    let line = json!({
        "bench": "control", "nodes": nodes, "actors": job.table.entries.len(), "first_placement_s": placed,
        "death_to_placement_s": { "median": median(seconds), "longest": longest },
    });
    println!("{line}");
    Ok(())
}
