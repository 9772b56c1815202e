//! What the actors of a node have to do and hold together, as planned.
//!
//! - HG-1: lanes of one stage on a node hold its weights once (`shared.rs`), whatever order they come and go in.
//! - HG-2: what runs at one time is counted together: the experts of a layer, and the lanes of a stage.

use crate::costs::Costs;
use crate::ids::{ActorId, NodeId};
use std::collections::BTreeMap;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Holding {
    /// Multiply-adds of a step.
    pub(crate) load: u64,
    /// Bytes at most.
    pub(crate) bytes: u64,
    /// Lanes of each stage.
    lanes: BTreeMap<u32, u32>,
    /// Of the load: of actors that run at one time.
    at_once: BTreeMap<Phase, u64>,
}

/// Actors of one phase run at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Stage(u32),
    Experts(u32),
}

impl Phase {
    fn of(actor: ActorId) -> Option<Self> {
        match actor {
            ActorId::Stage { stage, .. } => Some(Self::Stage(stage)),
            ActorId::Expert { layer, .. } => Some(Self::Experts(layer)),
            ActorId::Supervisor | ActorId::Keeper | ActorId::Reducer { .. } | ActorId::Host { .. } => None,
        }
    }
}

/// What each node holds that has one of these actors.
pub(crate) fn by_node(costs: &Costs, places: impl Iterator<Item = (ActorId, NodeId)>) -> BTreeMap<NodeId, Holding> {
    let mut held: BTreeMap<NodeId, Holding> = BTreeMap::new();
    places.for_each(|(actor, node)| held.entry(node).or_default().add(costs, actor));
    held
}

impl Holding {
    /// Whether a lane of the actor's stage is here.
    pub(crate) fn has_stage_of(&self, actor: ActorId) -> bool {
        matches!(actor, ActorId::Stage { stage, .. } if self.lanes.contains_key(&stage))
    }

    /// Multiply-adds of what is here and runs at the same time as the actor, itself included if it is here (HG-2).
    pub(crate) fn with(&self, actor: ActorId) -> u64 {
        Phase::of(actor).and_then(|phase| self.at_once.get(&phase)).copied().unwrap_or(0)
    }

    /// Bytes that an actor would need here.
    pub(crate) fn more(&self, costs: &Costs, actor: ActorId) -> u64 {
        let shared = if self.has_stage_of(actor) { costs.weights(actor) } else { 0 };
        costs.bytes(actor) - shared
    }

    /// An actor comes.
    pub(crate) fn add(&mut self, costs: &Costs, actor: ActorId) {
        self.load += costs.of(actor);
        if let Some(phase) = Phase::of(actor) {
            *self.at_once.entry(phase).or_default() += costs.of(actor);
        }
        self.bytes += self.more(costs, actor);
        if let ActorId::Stage { stage, .. } = actor {
            *self.lanes.entry(stage).or_default() += 1;
        }
    }

    /// An actor that is here goes.
    pub(crate) fn remove(&mut self, costs: &Costs, actor: ActorId) {
        self.load -= costs.of(actor);
        if let Some(phase) = Phase::of(actor)
            && let Some(load) = self.at_once.get_mut(&phase)
        {
            *load -= costs.of(actor);
            if *load == 0 {
                self.at_once.remove(&phase);
            }
        }
        if let ActorId::Stage { stage, .. } = actor
            && let Some(lanes) = self.lanes.get_mut(&stage)
        {
            *lanes -= 1;
            if *lanes == 0 {
                self.lanes.remove(&stage);
            }
        }
        self.bytes -= self.more(costs, actor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::materials;

    fn of(costs: &Costs, actors: &[ActorId]) -> Holding {
        let mut holding = Holding::default();
        actors.iter().for_each(|actor| holding.add(costs, *actor));
        holding
    }

    /// HG-1.
    #[test]
    fn weights_of_a_stage_are_held_once() {
        let costs = Costs::new(&materials().spec);
        let lane = |lane, stage| ActorId::Stage { lane, stage };
        let expert = ActorId::Expert { layer: 1, expert: 0 };
        let alone: u64 = [lane(0, 0), lane(1, 0), lane(0, 1), expert].map(|a| costs.bytes(a)).iter().sum();
        let all = of(&costs, &[lane(0, 0), lane(1, 0), lane(0, 1), expert]);
        assert!(costs.weights(lane(0, 0)) > 0 && costs.weights(expert) == 0);
        assert_eq!(all.bytes, alone - costs.weights(lane(1, 0)));
        let mut less = all.clone();
        less.remove(&costs, lane(0, 0));
        assert_eq!(less, of(&costs, &[expert, lane(0, 1), lane(1, 0)]));
        assert!(less.has_stage_of(lane(0, 0)) && !less.has_stage_of(expert));
        less.remove(&costs, lane(1, 0));
        assert_eq!(less, of(&costs, &[expert, lane(0, 1)]));
        assert!(!less.has_stage_of(lane(0, 0)));
    }

    /// HG-2.
    #[test]
    fn what_runs_at_one_time_is_counted_together() {
        let costs = Costs::new(&materials().spec);
        let (expert, lane) =
            (|expert| ActorId::Expert { layer: 1, expert }, |lane, stage| ActorId::Stage { lane, stage });
        let here = of(&costs, &[expert(0), expert(2), lane(1, 0), ActorId::Reducer { shard: 0, replica: 0 }]);
        assert_eq!(here.with(expert(1)), costs.of(expert(0)) + costs.of(expert(2)));
        assert_eq!(here.with(lane(0, 0)), costs.of(lane(1, 0)));
        assert_eq!(here.with(lane(0, 1)), 0);
        assert_eq!(here.with(ActorId::Reducer { shard: 1, replica: 0 }), 0);
    }
}
