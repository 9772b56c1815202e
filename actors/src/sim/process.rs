//! Simulated processes: nodes with their actors, and the supervisor's.

use super::network::Life;
use crate::effect::{Core, Event};
use crate::ids::{ActorId, Incarnation, NodeId};
use crate::root::Root;
use crate::router::Router;
use crate::storing::Write;
use crate::supervisor::Record;
use crate::tally::{Operations, Tally};
use everstep_checkpoint::Store;
use std::collections::{BTreeMap, VecDeque};

/// Which spawned actor, of all that a world spawns: what was meant for one never reaches the next of the same name.
pub(super) type Cell = u64;

/// An actor and its mailbox.
#[derive(Debug)]
pub(super) struct SimActor {
    pub(super) cell: Cell,
    pub(super) incarnation: Incarnation,
    pub(super) core: Box<dyn Core>,
    pub(super) mailbox: VecDeque<Event>,
    pub(super) awake: bool,
}

/// A node's process.
#[derive(Debug)]
pub(super) struct SimNode {
    pub(super) life: Life,
    pub(super) router: Router,
    pub(super) actors: BTreeMap<ActorId, SimActor>,
    /// Stopped until then.
    pub(super) paused: u64,
    /// Jobs take so many times as long until then.
    pub(super) slow: (u64, u64),
    pub(super) operations: Operations,
    pub(super) tally: Tally,
    /// It was told to end.
    pub(super) leaving: bool,
    /// Its stages compute wrongly.
    pub(super) wrong: bool,
    /// Effects that it carries out before it dies.
    pub(super) effects_left: Option<u64>,
    /// The life of the supervisor that it talks to.
    pub(super) supervisor: Option<Life>,
}

/// The supervisor's process.
#[derive(Debug)]
pub(super) struct SimRoot {
    pub(super) life: Life,
    pub(super) root: Root,
    /// Once it is open.
    pub(super) store: Option<Store>,
    /// The log that it began with, until the store is open.
    pub(super) began_with: Vec<Record>,
    /// What the store is to be given, one after another.
    pub(super) writes: VecDeque<Write>,
    /// Stopped until then.
    pub(super) paused: u64,
    /// Effects that it carries out before it dies.
    pub(super) effects_left: Option<u64>,
    /// The time, by its own clock, when it began.
    pub(super) began: u64,
    /// Lives of nodes by number.
    pub(super) lives: BTreeMap<NodeId, Life>,
    /// The life of the process whose join is being handled.
    pub(super) joining: BTreeMap<u64, Life>,
}

/// Counts down. Gives whether it is over: something that was to happen after so many more happens now.
pub(super) fn is_over(left: &mut Option<u64>) -> bool {
    let over = *left == Some(0);
    *left = left.and_then(|left| left.checked_sub(1));
    over
}
