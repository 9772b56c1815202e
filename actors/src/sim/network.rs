//! Simulated sessions between processes: the real session core over links that break.

use crate::wire::Unit;
use everstep_transport::{Frame, Session};
use std::collections::BTreeMap;

/// One life of a process.
pub(super) type Life = u64;

/// A frame on its way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) from: Life,
    pub(super) to: Life,
    /// The link that carries it; it is lost with it.
    pub(super) link: u64,
    pub(super) frame: Frame<Unit>,
}

/// The link between two lives.
#[derive(Debug, Default)]
pub(super) struct Link {
    /// Counts the links that there were.
    pub(super) number: u64,
    pub(super) up: bool,
    /// When the last frame in each direction arrives: a link keeps the order.
    pub(super) last: BTreeMap<Life, u64>,
    /// It did not keep it.
    pub(super) mixed: bool,
}

/// What is wrong with the links of a process.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ill {
    /// Frames take so many microseconds more.
    Slow(u64),
    /// One of so many is lost and sent again.
    Loses(u64),
    /// One of so many comes twice.
    Doubles(u64),
    /// One of so many is overtaken by those behind it.
    Mixes(u64),
}

/// The same, and until when.
#[derive(Debug, Clone, Copy)]
pub(super) struct Impaired {
    pub(super) how: Ill,
    pub(super) until: u64,
}

/// All sessions and links.
#[derive(Debug, Default)]
pub(super) struct Network {
    /// By (owner, peer).
    pub(super) sessions: BTreeMap<(Life, Life), Session<Unit>>,
    /// By (lower, higher).
    pub(super) links: BTreeMap<(Life, Life), Link>,
    pub(super) impaired: BTreeMap<Life, Impaired>,
    /// Units that were delivered to the first by its session with the second, by lane.
    pub(super) delivered: BTreeMap<(Life, Life), [u64; 2]>,
    /// What the first sends to the second is lost until then.
    pub(super) one_way: BTreeMap<(Life, Life), u64>,
    /// Nothing passes between slots of the mask and all else until then.
    pub(super) parts: Vec<(u64, u64)>,
}

impl Network {
    pub(super) fn pair(a: Life, b: Life) -> (Life, Life) {
        (a.min(b), a.max(b))
    }

    /// A life has ended: its links and sessions are gone, and its peers see broken links.
    pub(super) fn end(&mut self, life: Life) {
        self.links.retain(|(a, b), _| *a != life && *b != life);
        self.sessions.retain(|(owner, _), _| *owner != life);
        self.delivered.retain(|(owner, _), _| *owner != life);
        self.impaired.remove(&life);
        self.one_way.retain(|(a, b), _| *a != life && *b != life);
        for ((_, peer), session) in &mut self.sessions {
            if *peer == life {
                session.link_down();
            }
        }
    }
}
