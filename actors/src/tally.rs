//! What lives have begun to compute in their step, by name: shows that a survivor does nothing twice (contract C6).
//!
//! Bound: the pieces of one step of each actor.

use crate::compute::{Job, StageOperation};
use crate::ids::{ActorId, Address, Incarnation, Step};
use crate::message::{Pass, Work};
use std::collections::{BTreeMap, BTreeSet};

/// A piece of work within a life's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Piece {
    Begin { pass: Pass, micro_batch: u32 },
    Resume { pass: Pass, micro_batch: u32, layer: u32 },
    WeightSoFar { micro_batch: u32, layer: u32 },
    Weight { micro_batch: u32 },
    Rows { pass: Pass, lane: u32, micro_batch: u32 },
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
                let piece = Piece::Rows { pass, lane: item.turn.lane, micro_batch: item.turn.micro_batch };
                (item.expert, item.turn.step, piece)
            });
            rows.collect()
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
    use crate::testing::address;
    use everstep_kernels::{ExpertWeights, ParameterMap};

    fn job(step: Step, micro_batch: u32) -> Job {
        let names = ["gate_proj", "up_proj", "down_proj"].map(|part| {
            let tensor = everstep_kernels::Tensor::from_vec(1, 1, vec![0.0]);
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
        // Another life of it has all to do again, and so has the next step.
        assert_eq!(tally.begin(&job(1, 1), address(me, 2)), None);
        assert_eq!(tally.begin(&job(2, 1), address(me, 2)), None);
    }
}
