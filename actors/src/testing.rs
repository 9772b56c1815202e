//! What the cores' tests share: a tiny job, and a driver that runs jobs at once.

use crate::compute::run;
use crate::data::Corpus;
use crate::effect::{Core, Effect, Event};
use crate::ids::{ActorId, Address, Incarnation, NodeId, SUPERVISOR_NODE, Step};
use crate::message::{Body, Commit, Local};
use crate::pieces::Pieces;
use crate::spec::{JobSpec, Layout};
use crate::supervisor::{CommitRecord, Record};
use crate::table::{Entry, NodeInfo, Table};
use crate::tokens::Tokens;
use crate::worker::Materials;
use everstep_kernels::{CpuBackend, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Two lanes, two stages, two micro-batches, two shards with a mirror each.
pub(crate) fn materials() -> Materials {
    let mut spec = crate::sim::spec(0);
    (spec.lanes, spec.stages, spec.micro_batches) = (2, 2, Pieces::Constant(2));
    of(spec)
}

pub(crate) fn of(spec: JobSpec) -> Materials {
    let bytes: Vec<u8> = (0..200u32).map(|i| (i * i % 7) as u8).collect();
    let corpus = Corpus::new(vec![Tokens::new(Arc::new(bytes), 1)], &spec).unwrap();
    let spec = Arc::new(spec);
    Materials { layout: Layout::new(&spec), spec, corpus }
}

pub(crate) fn address(actor: ActorId, incarnation: u32) -> Address {
    Address { actor, incarnation: Incarnation(incarnation) }
}

pub(crate) fn info(peer: u64) -> NodeInfo {
    NodeInfo {
        address: format!("127.0.0.1:{peer}"),
        peer,
        pid: 0,
        machine: String::new(),
        domain: String::new(),
        memory: 0,
    }
}

/// A table where every actor has life 1 on node 1, mirrors on node 2; `replica` 0 is primary.
pub(crate) fn table(materials: &Materials) -> Table {
    let spec = &materials.spec;
    let mut entries = BTreeMap::new();
    let mut put = |actor, node| entries.insert(actor, Entry { node, incarnation: Incarnation(1) });
    put(ActorId::Supervisor, SUPERVISOR_NODE);
    put(ActorId::Keeper, SUPERVISOR_NODE);
    spec.workers().into_iter().for_each(|a| {
        put(a, NodeId(1));
    });
    for shard in 0..spec.shards {
        for replica in 0..=spec.mirrors {
            put(ActorId::Reducer { shard, replica }, NodeId(1 + u64::from(replica)));
        }
    }
    let nodes = [(NodeId(1), info(1)), (NodeId(2), info(2))].into();
    let (primaries, copies) = (vec![Some(0); spec.shards as usize], vec![spec.mirrors + 1; spec.shards as usize]);
    Table { epoch: 1, nodes, entries, primaries, copies, ..Table::default() }
}

/// The same with a new life for one actor.
pub(crate) fn replace(table: &Table, actor: ActorId) -> Table {
    let mut next = table.clone();
    next.epoch += 1;
    let entry = next.entries.get_mut(&actor).unwrap();
    entry.incarnation = entry.incarnation.next();
    next
}

/// What a core asked for, its jobs done.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) sent: Vec<(ActorId, Body<Tensor>)>,
    pub(crate) told: Vec<(ActorId, Local)>,
    pub(crate) jobs: usize,
}

/// Gives a core an event, and runs its jobs until it has none.
pub(crate) fn drive(core: &mut dyn Core, event: Event) -> Asked {
    let mut asked = Asked::default();
    let mut events = std::collections::VecDeque::from([event]);
    while let Some(event) = events.pop_front() {
        for effect in core.on(event) {
            match effect {
                Effect::Send { to, body, .. } => asked.sent.push((to, body)),
                Effect::Tell { to, local } => asked.told.push((to, local)),
                Effect::Compute { job, .. } => {
                    asked.jobs += 1;
                    events.push_back(Event::Computed(run(job, &CpuBackend::FP32)));
                }
            }
        }
    }
    asked
}

/// A message of a first life.
pub(crate) fn message(from: ActorId, body: Body<Tensor>) -> Event {
    Event::Message { from: address(from, 1), body }
}

/// The weights of a group before the first step, as its reducer sends them.
pub(crate) fn weights(materials: &Materials, group: everstep_kernels::Group) -> Event {
    let spec = &materials.spec;
    let number = materials.layout.number_of[&group];
    let value = |n: &u32| {
        let p = &materials.layout.parameters[*n as usize];
        Tensor::from_vec(p.rows, p.columns, p.initial(spec.seed, spec.model.initial_std))
    };
    let tensors = materials.layout.of_group[&group].iter().map(value).collect();
    let from = ActorId::Reducer { shard: materials.layout.shard_of[&group], replica: 0 };
    message(from, Body::Weights { step: 0, group: number, tensors })
}

/// Messages with the bits of their tensors, to be compared.
pub(crate) fn bits(messages: &[(ActorId, Body<Tensor>)]) -> Vec<(ActorId, Body<Vec<u32>>)> {
    let mut of = |t: Tensor| t.to_words().1.iter().map(|x| x.to_bits()).collect();
    messages.iter().map(|(to, body)| (*to, body.clone().map(&mut of))).collect()
}

/// The record of a step's commit.
pub(crate) fn committed(step: Step) -> Record {
    let commit = Commit { step, clip: 1.0, lr: 0.1, skipped: false };
    Record::Commit(CommitRecord { commit, loss: 1.0, mtp_loss: None, grad_norm: 1.0, copies: 2, samples: 4 })
}
