//! The faults of a seed: what goes wrong, and when. They are drawn apart from all else, so that some of them happen as they did
//! among all.

use super::coverage::kinds;
use super::draws::Draws;
use everstep_checkpoint::Trouble;

/// Microseconds within which faults begin.
const UNTIL: u64 = 2_500_000;
/// One that comes soon after another: while that is being recovered from.
const SOON: u64 = 30_000;
const PURPOSE: u32 = 79;
/// Of one seed.
pub(super) const FAULTS_MAX: usize = 5;

/// One end of a link: a node's process, or the supervisor's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Slot(usize),
    Root,
}

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
    /// A node's process dies when it has carried out so many effects more.
    KillAtEffect {
        slot: usize,
        effects: u64,
    },
    KillSupervisor,
    /// The same for the supervisor.
    KillSupervisorAtEffect {
        effects: u64,
    },
    /// The supervisor dies in the store's change after so many more.
    KillInWrite {
        changes: u64,
    },
    /// All processes, as when the power is cut: what was not synced may be undone.
    KillAll,
    /// The same as soon as the next checkpoint exists, before anybody hears of it. Until then decisions take long to be written.
    KillAllAtCheckpoint,
    /// A process stops for so long.
    Pause {
        end: End,
        micros: u64,
    },
    /// The supervisor's clock jumps ahead.
    Jump {
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
    /// Another node comes.
    Join,
    /// The link of two processes is cut for so long: dialling is of no use.
    Cut {
        slot: usize,
        other: End,
        micros: u64,
    },
    /// What one sends to the other, or what that sends back, is lost for so long. The link breaks once the other has heard nothing for too long.
    OneWay {
        slot: usize,
        other: End,
        back: bool,
        micros: u64,
    },
    /// Nothing passes between those processes of nodes whose bits are in the mask and all others, new lives of theirs too, for so long.
    Part {
        mask: u64,
        micros: u64,
    },
    /// Frames from and to a node take so much longer, for so long.
    SlowLinks {
        slot: usize,
        more: u64,
        micros: u64,
    },
    /// One of some frames from and to a node is lost and sent again, for so long; those behind it wait.
    Lossy {
        slot: usize,
        of: u64,
        micros: u64,
    },
    /// One of some frames from and to a node comes twice, perhaps late, for so long.
    Doubling {
        slot: usize,
        of: u64,
        micros: u64,
    },
    /// One of some frames from and to a node is overtaken by those behind it, for so long: a link that does not keep the order ends.
    Mixing {
        slot: usize,
        of: u64,
        micros: u64,
    },
    /// When a message of a kind is next on its way, its link breaks, or its receiver is killed.
    Ambush {
        kind: &'static str,
        kill: bool,
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
    /// A node's stages compute wrongly, until it is given up.
    Wrong {
        slot: usize,
    },
    /// A bit of the next snapshot flips on its way to the store.
    FlipStored,
    /// A bit of a file of the store flips when the next checkpoint exists, and soon one that sends the job back to it.
    FlipFile,
    /// The store says no for so long.
    StoreFails {
        trouble: Trouble,
        micros: u64,
    },
    /// The disk takes so many times as long, for so long.
    SlowDisk {
        times: u64,
        micros: u64,
    },
}

impl Fault {
    /// For people: every kind.
    pub(super) const KINDS: [&str; 34] = [
        "a node is killed",
        "two nodes are killed",
        "a node dies between two effects",
        "the supervisor is killed",
        "the supervisor dies between two effects",
        "the supervisor dies in a write",
        "all are killed, with the power",
        "a node stops",
        "the supervisor stops",
        "the supervisor's clock jumps",
        "a node is slow",
        "a node's links break",
        "a node is to leave",
        "a node comes",
        "a link is cut",
        "a link to the supervisor is cut",
        "a link works one way",
        "links are slow",
        "links lose frames",
        "an actor panics",
        "a bit flips",
        "a node computes wrongly",
        "a bit of a snapshot flips",
        "a bit of a file flips",
        "the store fails",
        "the store is full or unreadable",
        "the disk is slow",
        "a link breaks under a message",
        "a message's receiver is killed",
        "frames come twice",
        "frames overtake others",
        "all are killed, with the power, as a checkpoint is made",
        "a node is cut off",
        "the job is cut in two",
    ];

    /// Its kind.
    pub(super) fn kind(self) -> &'static str {
        let at = match self {
            Self::Kill { .. } => 0,
            Self::KillTwo { .. } => 1,
            Self::KillAtEffect { .. } => 2,
            Self::KillSupervisor => 3,
            Self::KillSupervisorAtEffect { .. } => 4,
            Self::KillInWrite { .. } => 5,
            Self::KillAll => 6,
            Self::Pause { end: End::Slot(_), .. } => 7,
            Self::Pause { end: End::Root, .. } => 8,
            Self::Jump { .. } => 9,
            Self::Slow { .. } => 10,
            Self::BreakLinks { .. } => 11,
            Self::Leave { .. } => 12,
            Self::Join => 13,
            Self::Cut { other: End::Slot(_), .. } => 14,
            Self::Cut { other: End::Root, .. } => 15,
            Self::OneWay { .. } => 16,
            Self::SlowLinks { .. } => 17,
            Self::Lossy { .. } => 18,
            Self::Panic { .. } => 19,
            Self::Flip { .. } => 20,
            Self::Wrong { .. } => 21,
            Self::FlipStored => 22,
            Self::FlipFile => 23,
            Self::StoreFails { trouble: Trouble::Fails, .. } => 24,
            Self::StoreFails { .. } => 25,
            Self::SlowDisk { .. } => 26,
            Self::Ambush { kill: false, .. } => 27,
            Self::Ambush { kill: true, .. } => 28,
            Self::Doubling { .. } => 29,
            Self::Mixing { .. } => 30,
            Self::KillAllAtCheckpoint => 31,
            Self::Part { mask, .. } if mask.is_power_of_two() => 32,
            Self::Part { .. } => 33,
        };
        Self::KINDS[at]
    }
}

/// Microseconds and faults of a seed, on so many processes of nodes.
pub(super) fn plan(seed: u64, slots: usize) -> Vec<(u64, Fault)> {
    let mut draws = Draws::new(seed, PURPOSE);
    if slots >= 3 && draws.below(16) == 0 {
        // Of what else goes wrong only the supervisor's death: who ends before it has told what it made is not audited (AU-2).
        let at = draws.below(UNTIL / 10);
        let wrong = (at, Fault::Wrong { slot: draws.below(slots as u64) as usize });
        let later = at + draws.below(UNTIL / 5);
        return match draws.below(3) {
            0 => vec![wrong],
            1 => vec![wrong, (later, Fault::KillSupervisor)],
            _ => vec![wrong, (later, Fault::KillSupervisorAtEffect { effects: draws.below(40) })],
        };
    }
    let mut faults: Vec<(u64, Fault)> = Vec::new();
    for _ in 0..1 + draws.below(FAULTS_MAX as u64) {
        let alone = draws.below(UNTIL / 10) * 10u64.pow(draws.below(2) as u32);
        let soon = draws.below(SOON);
        let at = match faults.last() {
            Some((before, _)) if draws.below(3) == 0 => before + soon,
            _ => alone,
        };
        faults.push((at, draw(&mut draws, slots as u64)));
    }
    faults
}

fn draw(draws: &mut Draws, slots: u64) -> Fault {
    let slot = draws.below(slots) as usize;
    let other = match draws.below(slots + 1) as usize {
        other if other < slots as usize => End::Slot(other),
        _ => End::Root,
    };
    let while_ = |draws: &mut Draws, most: u64| 10_000 + draws.below(most);
    let choice = draws.below(1 << 20) as u32;
    match draws.below(68) {
        0..=3 => Fault::Kill { slot, seen: true },
        4 => Fault::Kill { slot, seen: false },
        5 => Fault::KillTwo { first: slot, second: draws.below(slots) as usize },
        6..=9 => Fault::KillAtEffect { slot, effects: draws.below(40) },
        10 => Fault::KillSupervisor,
        11..=13 => Fault::KillSupervisorAtEffect { effects: draws.below(12) },
        14..=16 => Fault::KillInWrite { changes: draws.below(30) },
        17 => Fault::KillAll,
        18 => Fault::Pause { end: End::Slot(slot), micros: while_(draws, 4_000_000) },
        19 => Fault::Pause { end: End::Root, micros: while_(draws, 2_000_000) },
        20 => Fault::Jump { micros: while_(draws, 3_000_000) },
        21..=26 => Fault::BreakLinks { slot },
        27..=29 => Fault::Leave { slot },
        30 => Fault::Join,
        31..=34 => Fault::Cut { slot, other, micros: while_(draws, 3_000_000) },
        35..=36 => Fault::OneWay { slot, other, back: draws.below(2) == 0, micros: while_(draws, 2_000_000) },
        37 => Fault::SlowLinks { slot, more: draws.below(50_000), micros: while_(draws, 1_000_000) },
        38 => Fault::Lossy { slot, of: 2 + draws.below(20), micros: while_(draws, 1_000_000) },
        39..=41 => Fault::Flip { choice },
        42..=45 => Fault::Panic { slot, choice },
        46 => Fault::Slow { slot, times: 2 + draws.below(20), micros: while_(draws, 2_000_000) },
        47 => Fault::FlipStored,
        48..=49 => Fault::FlipFile,
        50 => Fault::StoreFails { trouble: Trouble::Fails, micros: while_(draws, 1_000_000) },
        51 => Fault::StoreFails { trouble: Trouble::Full, micros: while_(draws, 1_000_000) },
        52 => Fault::StoreFails { trouble: Trouble::Unreadable, micros: while_(draws, 1_000_000) },
        53..=60 => {
            let kinds: Vec<_> = kinds().collect();
            let kind = kinds[draws.below(kinds.len() as u64) as usize];
            Fault::Ambush { kind, kill: draws.below(2) == 0 }
        }
        61 => Fault::Doubling { slot, of: 1 + draws.below(20), micros: while_(draws, 1_000_000) },
        62 => Fault::Mixing { slot, of: 2 + draws.below(200), micros: while_(draws, 1_000_000) },
        63 => Fault::KillAllAtCheckpoint,
        64 => Fault::Part { mask: 1 << slot, micros: while_(draws, 3_000_000) },
        65 => Fault::Part { mask: 1 + draws.below((1 << slots) - 1), micros: while_(draws, 3_000_000) },
        _ => Fault::SlowDisk { times: 2 + draws.below(50), micros: while_(draws, 1_000_000) },
    }
}
