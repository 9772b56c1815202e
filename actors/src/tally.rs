//! What lives have begun to compute in their step, by name: shows that a survivor does nothing twice (contract C6). What it makes
//! again for another's new life has a name with that life in it, and is counted apart.
//!
//! Bound: the pieces of one step of each actor.

use crate::compute::{Job, RowsAgain, StageOperation};
use crate::ids::{ActorId, Address, Incarnation, Step};
use crate::message::{Pass, Work};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Multiply-adds of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Operations {
    /// Of steps.
    pub work: u64,
    /// Those among them that a life of an actor had done before in its step.
    pub redone: u64,
    /// Beside them those that made again what another's new life lacked.
    pub recipes: u64,
}

impl Operations {
    /// What came since.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            work: self.work - before.work,
            redone: self.redone - before.redone,
            recipes: self.recipes - before.recipes,
        }
    }
}

/// Whether a job makes again what another's new life lacks.
pub(crate) fn is_recipe(job: &Job) -> bool {
    match job {
        Job::Rows(_) => true,
        // A host's batch is of one kind.
        Job::Experts(items) => items.first().is_some_and(|item| item.again),
        Job::Stage { .. }
        | Job::ExpertWeight { .. }
        | Job::Initial { .. }
        | Job::Adopt { .. }
        | Job::Check(_)
        | Job::Digest { .. }
        | Job::Reduce(_)
        | Job::Apply(_) => false,
    }
}

/// A piece of work within a life's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Piece {
    Begin {
        pass: Pass,
        micro_batch: u32,
    },
    Resume {
        pass: Pass,
        micro_batch: u32,
        layer: u32,
    },
    WeightSoFar {
        micro_batch: u32,
        layer: u32,
    },
    Weight {
        micro_batch: u32,
    },
    Rows {
        pass: Pass,
        lane: u32,
        micro_batch: u32,
    },
    /// Rows of an expert, made again for the life of the stage that asked.
    RowsFor {
        pass: Pass,
        lane: u32,
        micro_batch: u32,
        stage: Incarnation,
    },
    /// Rows for the life of an expert, made again.
    RowsTo {
        pass: Pass,
        micro_batch: u32,
        expert: Address,
    },
    Reduce,
}

/// The pieces of a job, and whose they are: a host computes for its experts. A state is made once by nature.
fn pieces(job: &Job, me: Address) -> Vec<(Address, Step, Piece)> {
    match job {
        Job::Stage { step, operation, .. } => {
            let piece = match operation {
                StageOperation::Forward { micro_batch, .. } => {
                    Piece::Begin { pass: Pass::Forward, micro_batch: *micro_batch }
                }
                StageOperation::BackwardInput { micro_batch, .. } => {
                    Piece::Begin { pass: Pass::Backward, micro_batch: *micro_batch }
                }
                StageOperation::Resume { micro_batch, pass, layer, .. } => {
                    Piece::Resume { pass: *pass, micro_batch: *micro_batch, layer: *layer }
                }
                StageOperation::WeightSoFar { micro_batch, layer } => {
                    Piece::WeightSoFar { micro_batch: *micro_batch, layer: *layer }
                }
                StageOperation::Weight { micro_batch } => Piece::Weight { micro_batch: *micro_batch },
            };
            vec![(me, *step, piece)]
        }
        Job::Experts(items) => {
            let rows = items.iter().map(|item| {
                let pass = match item.work {
                    Work::Forward { .. } => Pass::Forward,
                    Work::Backward { .. } => Pass::Backward,
                };
                let (lane, micro_batch) = (item.turn.lane, item.turn.micro_batch);
                let piece = match item.again {
                    false => Piece::Rows { pass, lane, micro_batch },
                    true => Piece::RowsFor { pass, lane, micro_batch, stage: item.stage.incarnation },
                };
                (item.expert, item.turn.step, piece)
            });
            rows.collect()
        }
        Job::Rows(rows) => {
            let piece = |r: &RowsAgain| Piece::RowsTo { pass: r.pass, micro_batch: r.turn.micro_batch, expert: r.to };
            rows.iter().map(|r| (me, r.turn.step, piece(r))).collect()
        }
        Job::ExpertWeight { step, micro_batch, .. } => vec![(me, *step, Piece::Weight { micro_batch: *micro_batch })],
        Job::Reduce(reduce) => vec![(me, reduce.step(), Piece::Reduce)],
        Job::Initial { .. } | Job::Adopt { .. } | Job::Check(_) | Job::Digest { .. } | Job::Apply(_) => Vec::new(),
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    begun: BTreeMap<ActorId, (Incarnation, Step, BTreeSet<Piece>)>,
}

impl Tally {
    /// A job begins. Gives the first piece of it that the same life has begun before.
    pub(crate) fn begin(&mut self, job: &Job, me: Address) -> Option<String> {
        let mut again = None;
        for (life, step, piece) in pieces(job, me) {
            let entry = self.begun.entry(life.actor).or_insert((life.incarnation, step, BTreeSet::new()));
            if (entry.0, entry.1) != (life.incarnation, step) {
                *entry = (life.incarnation, step, BTreeSet::new());
            }
            if !entry.2.insert(piece) {
                again = again.or_else(|| Some(format!("{life} in step {step}: {piece:?}")));
            }
        }
        again
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Turn, WorkItem};
    use crate::testing::address;
    use everstep_kernels::{ExpertWeights, ParameterMap, Tensor};

    fn job(step: Step, micro_batch: u32) -> Job {
        let names = ["gate_proj", "up_proj", "down_proj"].map(|part| {
            let tensor = Tensor::from_vec(1, 1, vec![0.0]);
            (format!("model.layers.1.mlp.experts.0.{part}.weight").into(), tensor)
        });
        let weights = ExpertWeights::new(&ParameterMap::from(names), 1, 0);
        Job::ExpertWeight { step, micro_batch, weights, parts: Vec::new(), sums: None }
    }

    #[test]
    fn the_same_piece_of_one_life_is_seen_and_no_other() {
        let me = ActorId::Expert { layer: 1, expert: 0 };
        let mut tally = Tally::default();
        assert_eq!(tally.begin(&job(1, 0), address(me, 1)), None);
        assert_eq!(tally.begin(&job(1, 1), address(me, 1)), None);
        let again = tally.begin(&job(1, 1), address(me, 1)).unwrap();
        assert!(again.contains("step 1") && again.contains("micro_batch: 1"), "{again}");
        // What is made again is counted by who asks.
        let again = |life: u32, asked: u32| {
            let turn = Turn { step: 1, lane: 0, micro_batch: 1 };
            let Job::ExpertWeight { weights, .. } = job(1, 0) else { unreachable!("made so") };
            let item = WorkItem {
                expert: address(me, life),
                stage: address(ActorId::Stage { lane: 0, stage: 0 }, asked),
                turn,
                weights,
                work: Work::Forward { x: Tensor::from_vec(1, 1, vec![0.0]) },
                again: asked > 1,
            };
            Job::Experts(vec![item])
        };
        assert!(!is_recipe(&again(1, 1)) && is_recipe(&again(1, 2)));
        assert_eq!([1, 2, 3].map(|asked| tally.begin(&again(1, asked), address(me, 1))), [None, None, None]);
        assert!(tally.begin(&again(1, 2), address(me, 1)).is_some_and(|again| again.contains("RowsFor")));
        // Another life of it has all to do again, and so has the next step.
        assert_eq!(tally.begin(&job(1, 1), address(me, 2)), None);
        assert_eq!(tally.begin(&job(2, 1), address(me, 2)), None);
    }
}
