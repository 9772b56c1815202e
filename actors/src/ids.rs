//! Who is who: steps, nodes, actors and their incarnations.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A committed step; 0 is the state before the first.
pub type Step = u64;

/// One life of a node process, numbered by the supervisor in order of joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u64);

/// The process of the supervisor. Its lives are told apart by the supervisor's incarnation.
pub const SUPERVISOR_NODE: NodeId = NodeId(0);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// The count of an actor's lives: the fence against messages of earlier ones (contract C4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Incarnation(pub u32);

impl Incarnation {
    /// The next life.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A logical actor of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ActorId {
    /// The root: membership, placement, commits.
    Supervisor,
    /// The keeper of checkpoints, in the supervisor's process.
    Keeper,
    /// A group of layers of one lane.
    Stage {
        /// The data-parallel rank.
        lane: u32,
        /// The place in the pipeline.
        stage: u32,
    },
    /// A routed expert.
    Expert {
        /// Its layer.
        layer: u32,
        /// Its index in the layer.
        expert: u32,
    },
    /// A copy of a shard of the parameters. Copies of one shard are each other's mirrors.
    Reducer {
        /// The shard.
        shard: u32,
        /// Which copy.
        replica: u32,
    },
    /// The batcher for a layer's experts on one node: every node that has such experts has one.
    Host {
        /// The layer.
        layer: u32,
    },
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Supervisor => f.write_str("supervisor"),
            Self::Keeper => f.write_str("keeper"),
            Self::Stage { lane, stage } => write!(f, "stage.{lane}.{stage}"),
            Self::Expert { layer, expert } => write!(f, "expert.{layer}.{expert}"),
            Self::Reducer { shard, replica } => write!(f, "reducer.{shard}.{replica}"),
            Self::Host { layer } => write!(f, "host.{layer}"),
        }
    }
}

/// A text is not the name of an actor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no actor: expected supervisor, keeper, stage.LANE.STAGE, expert.LAYER.EXPERT, reducer.SHARD.REPLICA or host.LAYER"
)]
pub struct UnknownActor(pub String);

impl FromStr for ActorId {
    type Err = UnknownActor;

    fn from_str(text: &str) -> Result<Self, UnknownActor> {
        let unknown = || UnknownActor(text.to_owned());
        let mut parts = text.split('.');
        let kind = parts.next().unwrap_or_default();
        let numbers: Vec<u32> = parts.map(|p| p.parse().map_err(|_| unknown())).collect::<Result<_, _>>()?;
        match (kind, numbers.as_slice()) {
            ("supervisor", []) => Ok(Self::Supervisor),
            ("keeper", []) => Ok(Self::Keeper),
            ("stage", [lane, stage]) => Ok(Self::Stage { lane: *lane, stage: *stage }),
            ("expert", [layer, expert]) => Ok(Self::Expert { layer: *layer, expert: *expert }),
            ("reducer", [shard, replica]) => Ok(Self::Reducer { shard: *shard, replica: *replica }),
            ("host", [layer]) => Ok(Self::Host { layer: *layer }),
            _ => Err(unknown()),
        }
    }
}

/// One life of an actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Address {
    /// The actor.
    pub actor: ActorId,
    /// Its life.
    pub incarnation: Incarnation,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.actor, self.incarnation.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for actor in [
            ActorId::Supervisor,
            ActorId::Keeper,
            ActorId::Stage { lane: 1, stage: 2 },
            ActorId::Expert { layer: 3, expert: 4 },
            ActorId::Reducer { shard: 5, replica: 6 },
            ActorId::Host { layer: 7 },
        ] {
            assert_eq!(actor.to_string().parse(), Ok(actor));
        }
        for text in ["", "stage", "stage.1", "stage.1.x", "expert.1.2.3", "stage.-1.0"] {
            assert!(text.parse::<ActorId>().is_err(), "{text}");
        }
    }
}
