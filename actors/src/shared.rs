//! Weights that several lanes of a stage on one node hold: one copy, whenever and however often they came.
//!
//! - SH-1: two messages are taken for the same only if one life of a reducer sent both for one step: a life never goes back, so
//!   it has one state for each step.
//! - SH-2: only what a lane of this node uses is kept, of each group the newest step's that came; a step that another life sends
//!   again, as a new primary does, is not kept beside it.

use crate::ids::{ActorId, Address, Step};
use crate::message::Body;
use everstep_kernels::Tensor;
use std::collections::{BTreeMap, BTreeSet};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Shared(BTreeMap<u32, Weights>);

#[derive(Debug)]
struct Weights {
    from: Address,
    step: Step,
    tensors: Vec<Tensor>,
    /// The stages that they are for: an embedding may be for two.
    stages: BTreeSet<u32>,
}

impl Shared {
    /// Weights for a stage as another lane of it has them, if one does.
    pub(crate) fn take(&mut self, from: Address, to: ActorId, body: Body<Tensor>) -> Body<Tensor> {
        let (ActorId::Stage { stage, .. }, Body::Weights { step, group, tensors }) = (to, &body) else { return body };
        match self.0.get_mut(group) {
            Some(known) if (known.from, known.step) == (from, *step) => {
                known.stages.insert(stage);
                Body::Weights { step: *step, group: *group, tensors: known.tensors.clone() }
            }
            Some(known) if known.step >= *step => body,
            Some(_) | None => {
                self.0.insert(*group, Weights { from, step: *step, tensors: tensors.clone(), stages: [stage].into() });
                body
            }
        }
    }

    /// These stages live here, and no others.
    pub(crate) fn keep(&mut self, lives: impl Fn(u32) -> bool) {
        self.0.retain(|_, weights| weights.stages.iter().any(|stage| lives(*stage)));
    }

    /// The job goes back: steps begin again.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::address;

    fn weights(step: Step, value: f32) -> Body<Tensor> {
        Body::Weights { step, group: 3, tensors: vec![Tensor::from_vec(1, 1, vec![value])] }
    }

    fn value(body: &Body<Tensor>) -> f32 {
        let Body::Weights { tensors, .. } = body else { panic!("{body:?}") };
        tensors[0].as_host().expect("in host memory")[0]
    }

    /// SH-1, SH-2.
    #[test]
    fn one_copy_of_what_one_life_sent() {
        let lane = |lane| ActorId::Stage { lane, stage: 1 };
        let from = |life| address(ActorId::Reducer { shard: 0, replica: 0 }, life);
        let mut shared = Shared::default();
        let took = |shared: &mut Shared, life, to, step, sent| value(&shared.take(from(life), to, weights(step, sent)));
        assert_eq!(took(&mut shared, 1, lane(0), 4, 1.0), 1.0);
        // Values differ here to be told apart.
        assert_eq!(took(&mut shared, 1, lane(1), 4, 2.0), 1.0, "the same");
        assert_eq!(took(&mut shared, 2, lane(1), 4, 3.0), 3.0, "of another life");
        assert_eq!(took(&mut shared, 1, lane(1), 4, 3.5), 1.0, "which is not kept beside it");
        assert_eq!(took(&mut shared, 2, lane(0), 5, 4.0), 4.0, "of another step");
        assert_eq!(took(&mut shared, 2, lane(1), 4, 5.0), 5.0, "late");
        assert_eq!(took(&mut shared, 2, lane(1), 5, 6.0), 4.0, "the newest is still there");
        assert_eq!(took(&mut shared, 2, ActorId::Expert { layer: 1, expert: 0 }, 5, 7.0), 7.0, "nobody else's");
        shared.keep(|stage| stage != 1);
        assert!(shared.0.is_empty());
    }
}
