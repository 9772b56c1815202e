//! The faults of a seed: what goes wrong, and when. They are drawn apart from all else, so that some of them happen as they did
//! among all.

use super::draws::Draws;

/// Microseconds within which faults begin.
const UNTIL: u64 = 2_500_000;
const PURPOSE: u32 = 79;
/// Of one seed.
pub(super) const FAULTS_MAX: usize = 5;

/// What can go wrong.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    /// A node's process is killed; whether the supervisor is told at once.
    Kill {
        slot: usize,
        seen: bool,
    },
    /// Two at once.
    KillTwo {
        first: usize,
        second: usize,
    },
    KillSupervisor,
    KillAll,
    /// A node stops for so long.
    Pause {
        slot: usize,
        micros: u64,
    },
    /// What a node computes takes so many times as long, for so long.
    Slow {
        slot: usize,
        times: u64,
        micros: u64,
    },
    /// All links of a node break; they come back.
    BreakLinks {
        slot: usize,
    },
    /// A node is told to end.
    Leave {
        slot: usize,
    },
    /// The link of two nodes is cut for so long: dialling is of no use.
    Cut {
        slot: usize,
        other: usize,
        micros: u64,
    },
    /// An actor of a node panics.
    Panic {
        slot: usize,
        choice: u32,
    },
    /// A bit of a reducer's state flips.
    Flip {
        choice: u32,
    },
    /// A bit of the next snapshot flips on its way to the store.
    FlipStored,
    /// The store of checkpoints neither takes nor gives anything for so long.
    StoreFails {
        micros: u64,
    },
}

impl Fault {
    /// For people: every kind.
    pub(super) const KINDS: [&str; 13] = [
        "a node is killed",
        "two nodes are killed",
        "the supervisor is killed",
        "all are killed",
        "a node stops",
        "a node is slow",
        "a node's links break",
        "a node is to leave",
        "a link is cut",
        "an actor panics",
        "a bit flips",
        "the store fails",
        "a bit of a snapshot flips",
    ];

    /// Its kind.
    pub(super) fn kind(self) -> &'static str {
        let at = match self {
            Self::Kill { .. } => 0,
            Self::KillTwo { .. } => 1,
            Self::KillSupervisor => 2,
            Self::KillAll => 3,
            Self::Pause { .. } => 4,
            Self::Slow { .. } => 5,
            Self::BreakLinks { .. } => 6,
            Self::Leave { .. } => 7,
            Self::Cut { .. } => 8,
            Self::Panic { .. } => 9,
            Self::Flip { .. } => 10,
            Self::StoreFails { .. } => 11,
            Self::FlipStored => 12,
        };
        Self::KINDS[at]
    }
}

/// Microseconds and faults of a seed, on so many processes of nodes.
pub(super) fn plan(seed: u64, slots: usize) -> Vec<(u64, Fault)> {
    let mut draws = Draws::new(seed, PURPOSE);
    (0..1 + draws.below(FAULTS_MAX as u64)).map(|_| draw(&mut draws, slots as u64)).collect()
}

fn draw(draws: &mut Draws, slots: u64) -> (u64, Fault) {
    let at = draws.below(UNTIL / 10) * 10u64.pow(draws.below(2) as u32);
    let slot = draws.below(slots) as usize;
    let fault = match draws.below(30) {
        0..=2 => Fault::Kill { slot, seen: true },
        3 => Fault::Kill { slot, seen: false },
        4 => Fault::KillTwo { first: slot, second: draws.below(slots) as usize },
        5..=6 => Fault::KillSupervisor,
        7 => Fault::KillAll,
        8 => Fault::Pause { slot, micros: 10_000 + draws.below(4_000_000) },
        9..=12 => Fault::BreakLinks { slot },
        13..=15 => Fault::Leave { slot },
        16..=18 => Fault::Cut { slot, other: draws.below(slots) as usize, micros: 10_000 + draws.below(3_000_000) },
        19..=21 => Fault::Flip { choice: draws.below(1 << 20) as u32 },
        22..=24 => Fault::Panic { slot, choice: draws.below(1 << 20) as u32 },
        25 => Fault::Slow { slot, times: 2 + draws.below(20), micros: 10_000 + draws.below(2_000_000) },
        26..=27 => Fault::FlipStored,
        _ => Fault::StoreFails { micros: 10_000 + draws.below(1_000_000) },
    };
    (at, fault)
}
