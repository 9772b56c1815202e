//! A whole job in one thread under simulated time, network, disk and crashes.
//!
//! The cores are the real ones, with a tiny real model; what is simulated is what the shells do. A seed
//! names everything that happens, so a failing seed fails again, event for event.
//!
//! Checked at every commit and every delivery, one contract each: see `contracts/`. After the last fault
//! the job must finish.

mod contracts;
mod coverage;
mod disk;
mod draws;
mod faults;
mod files;
mod links;
mod log;
mod network;
mod nodes;
mod plan;
mod process;
mod root;
mod world;

use crate::pieces::Pieces;
use crate::plant::{self, Bug};
use crate::spec::{JobSpec, OptimizerSpec};
use crate::supervisor::Nodes;
use everstep_kernels::{ModelConfig, Precision};
use plan::{FAULTS_MAX, Fault};
use std::fmt;
use std::sync::OnceLock;
use world::World;

pub use coverage::Coverage;

/// What a seed showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// BLAKE3 of the whole log, in hexadecimal: equal for equal seeds.
    pub log: String,
    /// Faults that happened, and messages that they met.
    pub coverage: Coverage,
    /// Events that were simulated.
    pub events: u64,
    /// Simulated milliseconds.
    pub milliseconds: u64,
    /// Times that the job went back to a checkpoint.
    pub rollbacks: usize,
    /// Multiply-adds that made again what new lives lacked.
    pub recipes: u64,
}

/// A contract was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The seed that shows it.
    pub seed: u64,
    /// The bug that was planted.
    pub plant: Option<Bug>,
    /// Which of the seed's faults happened, if not all.
    pub only: Option<Vec<usize>>,
    /// The faults that happened, and when.
    pub faults: Box<[String]>,
    /// Which contract, or "progress".
    pub contract: &'static str,
    /// What happened.
    pub what: String,
    /// The last events before it.
    pub trail: Box<[String]>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {} broken: {}", self.seed, self.contract, self.what)?;
        for fault in &self.faults {
            writeln!(f, "  with {fault}")?;
        }
        for line in &self.trail {
            writeln!(f, "  {line}")?;
        }
        write!(f, "replay: {}", self.replay())
    }
}

impl Violation {
    /// The command that shows it again, with the same program.
    pub fn replay(&self) -> String {
        let mut command = format!("everstep simulate --seeds {}..{}", self.seed, self.seed + 1);
        if let Some(only) = &self.only {
            let only: Vec<String> = only.iter().map(ToString::to_string).collect();
            command += &format!(" --only {}", only.join(","));
        }
        if let Some(bug) = self.plant {
            command += &format!(" --plant {bug}");
        }
        command
    }
}

/// The jobs that are simulated: few, so that each undisturbed run is made once.
const SHAPES: [(u32, u32, u32); 4] = [(1, 2, 2), (3, 1, 3), (3, 2, 1), (2, 3, 2)];

/// Two shapes predict two tokens, one of them in a single stage; one has a batch that grows.
pub(crate) fn spec(shape: usize) -> JobSpec {
    let (lanes, stages, micro_batches) = SHAPES[shape];
    JobSpec {
        model: ModelConfig {
            vocabulary: 8,
            hidden: 4,
            layers: 3,
            dense_layers: 1,
            dense_inner: 6,
            heads: 1,
            query_rank: None,
            kv_rank: 4,
            nope: 2,
            rope: 2,
            value: 2,
            experts: 3,
            shared_experts: 0,
            expert_inner: 3,
            top_k: 2,
            groups: 1,
            groups_kept: 1,
            routed_scale: 1.0,
            sequence: 4,
            rope_theta: 10_000.0,
            yarn: None,
            mtp: usize::from(shape == 1 || shape == 3),
            initial_std: 0.3,
        },
        precision: Precision::Fp32,
        seed: 17 + shape as u64,
        source_weights: vec![1.0],
        imported: false,
        steps: 6,
        optimizer: OptimizerSpec {
            lr: 0.02,
            lr_end: 0.002,
            warmup: 2,
            hold: 0,
            decay_steps: None,
            tail: None,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            ema: (shape == 2).then_some(0.9),
            clip: 1.0,
            bias_step: Pieces::From(vec![(0, 0.01), (4, 0.0)]),
            balance: 1e-3,
            mtp: Pieces::Constant(0.3),
        },
        lanes,
        stages,
        micro_batches: match shape {
            0 => Pieces::From(vec![(0, 1), (3, micro_batches)]),
            _ => Pieces::Constant(micro_batches),
        },
        sequences: 1,
        shards: 2,
        mirrors: 1,
        thin_waits: false,
        audit: 0,
        checkpoint_every: 3,
    }
}

/// The undisturbed run's fingerprints by step, of one shape: the same protocol on one node without faults.
fn reference(shape: usize) -> &'static [String] {
    static RUNS: [OnceLock<Vec<String>>; SHAPES.len()] = [const { OnceLock::new() }; SHAPES.len()];
    RUNS[shape].get_or_init(|| {
        let nodes = Nodes { wanted: 1, spares: 0, relieve: false };
        plant::with(None, || {
            let mut world = World::new(0, spec(shape), nodes, Vec::new(), None);
            world.run().unwrap_or_else(|v| panic!("the undisturbed run failed: {v}"));
            world.fingerprints()
        })
    })
}

/// Whether every other node of a seed's job is in the same rack.
fn is_racked(seed: u64) -> bool {
    seed.is_multiple_of(5)
}

/// The faults of a seed, all or only these, and its world.
fn prepared(seed: u64, only: Option<&[usize]>) -> (Box<[String]>, World) {
    let shape = (seed % SHAPES.len() as u64) as usize;
    let wanted = 2 + (seed / 4 % 3) as usize;
    let nodes = Nodes { wanted, spares: usize::from((seed / 12).is_multiple_of(4)), relieve: false };
    let mut spec = spec(shape);
    spec.mirrors = [1, 1, 0, 2][(seed / 48 % 4) as usize];
    spec.audit = [0, 9, 0, 1][(seed / 7 % 4) as usize];
    spec.checkpoint_every = 2 + seed / 11 % 2;
    let all = plan::plan(seed, nodes.wanted + nodes.spares);
    if all.iter().any(|(_, fault)| matches!(fault, Fault::Wrong { .. })) {
        spec.audit = 1;
    }
    // Where as many domains as are wanted come back in the end.
    let domains = if is_racked(seed) { 2 } else { wanted };
    spec.thin_waits = seed % 13 < 4 && (spec.mirrors as usize) < domains;
    let all = all.into_iter().enumerate();
    let faults: Vec<_> =
        all.filter(|(n, _)| only.is_none_or(|only| only.contains(n))).map(|(_, fault)| fault).collect();
    let words = faults.iter().map(|(at, fault)| format!("{fault:?} at {at} us")).collect();
    (words, World::new(seed, spec, nodes, faults, Some(reference(shape))))
}

/// Runs one seed, with a planted bug if asked, and with all of its faults or only these.
pub fn simulate(seed: u64, plant: Option<Bug>, only: Option<&[usize]>) -> Result<Summary, Violation> {
    let (faults, mut world) = prepared(seed, only);
    let only = || only.map(<[usize]>::to_vec);
    plant::with(plant, || world.run()).map_err(|violation| Violation { plant, only: only(), faults, ..violation })
}

/// The whole log of a seed, and what it showed.
pub fn log(seed: u64, only: Option<&[usize]>) -> (String, Result<Summary, Violation>) {
    let (_, mut world) = prepared(seed, only);
    world.log.text = Some(String::new());
    let showed = world.run();
    (world.log.text.take().unwrap_or_default(), showed)
}

/// The same violation with as few of its faults as can be: each is left out that is not needed for it.
pub fn shrink(violation: Violation) -> Violation {
    let mut smallest = violation;
    let mut kept = smallest.only.clone().unwrap_or_else(|| (0..FAULTS_MAX).collect());
    loop {
        let before = kept.len();
        for fault in kept.clone() {
            let fewer: Vec<usize> = kept.iter().copied().filter(|n| *n != fault).collect();
            match simulate(smallest.seed, smallest.plant, Some(&fewer)) {
                Err(found) if found.contract == smallest.contract => (smallest, kept) = (found, fewer),
                Err(_) | Ok(_) => {}
            }
        }
        // One that was needed may not be without another.
        if kept.len() == before {
            return smallest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_log() {
        for seed in 0..8 {
            assert_eq!(simulate(seed, None, None), simulate(seed, None, None));
        }
        assert_ne!(simulate(1, None, None).unwrap().log, simulate(5, None, None).unwrap().log);
        let (log, showed) = log(1, None);
        assert_eq!(showed, simulate(1, None, None));
        assert_eq!(blake3::hash(log.as_bytes()).to_hex().to_string(), showed.unwrap().log);
    }

    #[test]
    fn nothing_is_made_again_unless_a_life_ends() {
        // Audits make lives again, and whoever waits for another domain moves to it when it comes.
        let steady = |seed: &u64| {
            let spec = prepared(*seed, Some(&[])).1.materials.spec;
            spec.audit == 0 && !spec.thin_waits
        };
        let seeds: Vec<u64> = (0..35).filter(steady).collect();
        let recipes = |only| seeds.iter().map(|seed| simulate(*seed, None, only).unwrap().recipes).sum::<u64>();
        assert_eq!(recipes(Some(&[])), 0);
        assert!(recipes(None) > 0);
    }

    #[test]
    fn a_thousand_seeds_break_no_contract() {
        let mut coverage = Coverage::default();
        for seed in 0..1000 {
            match simulate(seed, None, None) {
                Ok(summary) => coverage.add(&summary.coverage),
                Err(violation) => panic!("{}", shrink(violation)),
            }
        }
        let never: Vec<_> = Fault::KINDS.into_iter().filter(|kind| !coverage.faults.contains_key(kind)).collect();
        assert!(never.is_empty(), "faults that never met anything: {never:?}");
    }

    /// A checkpoint that is whole again when the job ends for want of one; frames that come just when a stopped process goes on: what
    /// these seeds were once.
    #[test]
    fn seeds_that_showed_something_once_show_nothing() {
        for seed in [6165, 29715] {
            simulate(seed, None, None).unwrap_or_else(|violation| panic!("{violation}"));
        }
    }

    #[test]
    fn every_planted_bug_is_found_within_two_thousand_seeds() {
        let mut hidden = Vec::new();
        for (bug, name) in Bug::ALL {
            match (0..2000).find_map(|seed| simulate(seed, Some(*bug), None).err()) {
                Some(found) => println!("{name}: seed {}: {} broken: {}", found.seed, found.contract, found.what),
                None => hidden.push(*name),
            }
        }
        assert!(hidden.is_empty(), "not found: {}", hidden.join(", "));
    }
}
