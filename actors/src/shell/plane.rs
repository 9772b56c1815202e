//! The supervisor's process without a wire and without a disk, for measurements: records are synced at once, and what would go
//! to nodes is encoded and dropped.

use crate::control::Control;
use crate::ids::{ActorId, Step};
use crate::keeper::KeeperCore;
use crate::message::Body;
use crate::root::{Root, RootEffect, RootEvent};
use crate::spec::{JobSpec, Layout};
use crate::supervisor::{Nodes, Supervisor, SupervisorEvent};
use crate::table::Table;
use crate::wire::Unit;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What an event took and caused.
#[derive(Debug, Clone, Copy, Default)]
pub struct Took {
    /// Until its consequences were encoded for nodes.
    pub whole: Duration,
    /// Of that since records were synced.
    pub since_synced: Duration,
    /// Units to nodes.
    pub messages: usize,
    /// Bytes of them.
    pub bytes: usize,
}

/// See the module.
#[derive(Debug)]
pub struct ControlPlane {
    root: Root,
    layout: Arc<Layout>,
    now: Duration,
    /// The newest epoch that was announced.
    table: Arc<Table>,
}

impl ControlPlane {
    /// Of a new job.
    pub fn new(spec: &Arc<JobSpec>, nodes: Nodes) -> Self {
        let layout = Layout::new(spec);
        let keeper = KeeperCore::new(Arc::clone(spec), Arc::clone(&layout));
        let now = Duration::ZERO;
        let (supervisor, first) = Supervisor::new(Arc::clone(spec), nodes, &[], BTreeMap::new(), now);
        let (root, effects) = Root::new(supervisor, first, keeper);
        let mut plane = Self { root, layout, now, table: Arc::default() };
        plane.carry_out(effects, &mut Took::default());
        plane.on(SupervisorEvent::Found { newest: Ok(0), reported: BTreeMap::new() });
        plane
    }

    /// The newest epoch.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Tells the supervisor something.
    pub fn on(&mut self, event: SupervisorEvent) -> Took {
        self.now += Duration::from_micros(10);
        let mut took = Took::default();
        let began = Instant::now();
        let effects = self.root.on(self.now, RootEvent::Supervisor(event));
        self.carry_out(effects, &mut took);
        took.whole = began.elapsed();
        took
    }

    /// All copies that have a place say that they have the state after a step.
    pub fn applied(&mut self, step: Step) {
        self.copies_say(|layout, shard| {
            let sums = layout.of_shard(shard).into_iter().map(|number| (number, 0)).collect();
            Body::Applied { step, sums }
        });
    }

    /// The same: that they have all sums of a step. Gives what the last one's report took, by which the step is committed.
    pub fn prepared(&mut self, step: Step, samples: u64) -> Took {
        self.copies_say(|layout, shard| {
            let norm = layout.of_shard(shard).into_iter().map(|number| (number, vec![1.0])).collect();
            let losses = (shard == 0).then_some([1.0, 0.0]);
            Body::Prepared { step, norm, losses, samples, digest: Some(u128::from(shard)) }
        })
    }

    fn copies_say(&mut self, body: impl Fn(&Layout, u32) -> Body<everstep_kernels::Tensor>) -> Took {
        let (table, layout) = (Arc::clone(&self.table), Arc::clone(&self.layout));
        let mut last = Took::default();
        for actor in table.entries.keys() {
            if let ActorId::Reducer { shard, .. } = *actor {
                let from = table.address(*actor).expect("what is placed has a life");
                last = self.on(SupervisorEvent::Message { from, body: body(&layout, shard) });
            }
        }
        last
    }

    fn carry_out(&mut self, effects: Vec<RootEffect>, took: &mut Took) {
        for effect in effects {
            match effect {
                RootEffect::Append(_) => {
                    let began = Instant::now();
                    let effects = self.root.on(self.now, RootEvent::Supervisor(SupervisorEvent::Synced));
                    self.carry_out(effects, took);
                    took.since_synced += began.elapsed();
                }
                RootEffect::TellAll(nodes, control) => {
                    if let Control::Table(table) = &control {
                        self.table = Arc::clone(table);
                    }
                    encode(Unit::Control(control), nodes.len(), took);
                }
                RootEffect::Tell(_, control) => encode(Unit::Control(control), 1, took),
                RootEffect::Transmit(_, bundle) => encode(Unit::Bundle(bundle), 1, took),
                _ => {}
            }
        }
    }
}

/// Once, for so many nodes.
fn encode(unit: Unit, nodes: usize, took: &mut Took) {
    took.messages += nodes;
    took.bytes += nodes * unit.encode().header.len();
}
