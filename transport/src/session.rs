//! The pure half of a session between two processes: ordered, exactly-once and flow-controlled, on two
//! lanes of which the bulk one cannot delay the other, whatever becomes of the links beneath.
//!
//! A session counts units: a small message, or a fragment of a large one. `U` is what a unit is.
//! - SE-1: units of a lane are delivered in the order in which they were sent, each exactly once.
//! - SE-2: a unit is kept until the peer has it; after a reconnect all that the peer lacks go again.
//! - SE-3: no unit is sent beyond the peer's grant, so a slow receiver slows its sender; each lane has
//!   grants of its own.
//! - SE-4: a frame that no correct peer sends (a gap, a grant that shrinks) ends the link.

use smallvec::{SmallVec, smallvec};
use std::collections::VecDeque;

/// Which of a session's two streams of units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Small messages that must not wait behind tensors.
    Control,
    /// Tensors.
    Bulk,
}

impl Lane {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Control, Self::Bulk];

    /// Units that may be on their way, not taken by the peer's actors yet.
    pub fn window(self) -> u64 {
        match self {
            Self::Control => 4096,
            Self::Bulk => 64,
        }
    }

    fn at(self) -> usize {
        match self {
            Self::Control => 0,
            Self::Bulk => 1,
        }
    }
}

/// What goes over a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<U> {
    /// A unit.
    Data {
        /// Its lane.
        lane: Lane,
        /// Its number in the lane, from 0 on.
        sequence: u64,
        /// What it is.
        unit: U,
    },
    /// What the sender of this frame has of the other's units.
    Grant {
        /// The lane.
        lane: Lane,
        /// Units received: all below this number.
        received: u64,
        /// Units that may be sent: all below this number.
        limit: u64,
    },
}

/// What both sides tell each other first on a new link: units received, by lane.
pub type Resume = [u64; 2];

/// What comes of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEffect<U> {
    /// Send on the present link.
    Transmit(Frame<U>),
    /// Hand to the receiver, which calls [`Session::consumed`] when it has taken it.
    Deliver(Lane, U),
}

/// In order. Mostly there is one.
pub type Effects<U> = SmallVec<[SessionEffect<U>; 1]>;

/// The peer broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A unit is missing.
    #[error("{lane:?} unit {got} came where {expected} was expected")]
    Gap {
        /// The lane.
        lane: Lane,
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// It acknowledges or claims what was never sent.
    #[error("the peer says it has {lane:?} units up to {claimed}, but only {sent} were sent")]
    NeverSent {
        /// The lane.
        lane: Lane,
        /// What it says.
        claimed: u64,
        /// What there was.
        sent: u64,
    },
    /// It sends beyond its grant.
    #[error("{lane:?} unit {got} is beyond the grant of {limit}")]
    BeyondGrant {
        /// The lane.
        lane: Lane,
        /// The number that came.
        got: u64,
        /// What was granted.
        limit: u64,
    },
}

#[derive(Debug)]
struct LaneState<U> {
    /// Units that the peer may lack: numbers `first..first + kept.len()`.
    kept: VecDeque<U>,
    first: u64,
    /// The next number to go over the present link.
    next: u64,
    limit: u64,
    received: u64,
    consumed: u64,
    granted: u64,
}

impl<U> LaneState<U> {
    fn new(lane: Lane) -> Self {
        let window = lane.window();
        Self { kept: VecDeque::new(), first: 0, next: 0, limit: window, received: 0, consumed: 0, granted: window }
    }

    fn end(&self) -> u64 {
        self.first + self.kept.len() as u64
    }

    fn acknowledge(&mut self, lane: Lane, received: u64) -> Result<(), SessionError> {
        if received > self.end() {
            return Err(SessionError::NeverSent { lane, claimed: received, sent: self.end() });
        }
        while self.first < received {
            self.kept.pop_front();
            self.first += 1;
        }
        self.next = self.next.max(self.first);
        Ok(())
    }
}

/// A bug of a session, for the simulator to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionBug {
    /// It forgets units that were not acknowledged when it reconnects: SE-2 is broken.
    Forgets,
    /// It delivers a unit that comes again: SE-1 is.
    Repeats,
}

/// See the module.
#[derive(Debug)]
pub struct Session<U> {
    lanes: [LaneState<U>; 2],
    linked: bool,
    bug: Option<SessionBug>,
}

impl<U: Clone> Default for Session<U> {
    fn default() -> Self {
        Self::new()
    }
}

impl<U: Clone> Session<U> {
    /// A session on which nothing was sent.
    pub fn new() -> Self {
        Self { lanes: Lane::ALL.map(LaneState::new), linked: false, bug: None }
    }

    /// A session with a planted bug.
    pub fn with(bug: SessionBug) -> Self {
        Self { bug: Some(bug), ..Self::new() }
    }

    /// What to tell the peer first on a new link.
    pub fn resume(&self) -> Resume {
        [self.lanes[0].received, self.lanes[1].received]
    }

    /// Whether the session takes another unit of the lane without keeping more than a window.
    pub fn has_room(&self, lane: Lane) -> bool {
        (self.lanes[lane.at()].kept.len() as u64) < lane.window()
    }

    /// Units that the peer may lack.
    pub fn kept(&self) -> usize {
        self.lanes.iter().map(|l| l.kept.len()).sum()
    }

    /// Sends a unit.
    pub fn send(&mut self, lane: Lane, unit: U) -> Effects<U> {
        self.lanes[lane.at()].kept.push_back(unit);
        self.flush(lane)
    }

    fn flush(&mut self, lane: Lane) -> Effects<U> {
        let state = &mut self.lanes[lane.at()];
        let mut effects = Effects::new();
        while self.linked && state.next < state.end().min(state.limit) {
            let unit = state.kept[(state.next - state.first) as usize].clone();
            effects.push(SessionEffect::Transmit(Frame::Data { lane, sequence: state.next, unit }));
            state.next += 1;
        }
        effects
    }

    fn grant(&mut self, lane: Lane) -> Frame<U> {
        let state = &mut self.lanes[lane.at()];
        state.granted = state.consumed + lane.window();
        Frame::Grant { lane, received: state.received, limit: state.granted }
    }

    /// A link is there and the peer has told what it has.
    pub fn link_up(&mut self, peer: Resume) -> Result<Effects<U>, SessionError> {
        self.linked = true;
        let mut effects = Effects::new();
        for lane in Lane::ALL {
            let received = peer[lane.at()];
            if self.bug == Some(SessionBug::Forgets) {
                let state = &mut self.lanes[lane.at()];
                state.kept.clear();
                state.first = received;
            }
            let state = &mut self.lanes[lane.at()];
            state.acknowledge(lane, received)?;
            if received < state.first {
                // The peer lost units that it had acknowledged: it is not the peer that it was.
                return Err(SessionError::Gap { lane, expected: state.first, got: received });
            }
            state.next = received;
            effects.push(SessionEffect::Transmit(self.grant(lane)));
            effects.extend(self.flush(lane));
        }
        Ok(effects)
    }

    /// The link is gone.
    pub fn link_down(&mut self) {
        self.linked = false;
    }

    /// A frame came over the present link.
    pub fn on_frame(&mut self, frame: Frame<U>) -> Result<Effects<U>, SessionError> {
        match frame {
            Frame::Grant { lane, received, limit } => {
                let state = &mut self.lanes[lane.at()];
                state.acknowledge(lane, received)?;
                state.limit = state.limit.max(limit);
                Ok(self.flush(lane))
            }
            Frame::Data { lane, sequence, unit } => {
                let state = &mut self.lanes[lane.at()];
                if sequence >= state.granted {
                    return Err(SessionError::BeyondGrant { lane, got: sequence, limit: state.granted });
                }
                if sequence > state.received {
                    return Err(SessionError::Gap { lane, expected: state.received, got: sequence });
                }
                if sequence < state.received {
                    let again = self.bug == Some(SessionBug::Repeats);
                    return Ok(again.then_some(SessionEffect::Deliver(lane, unit)).into_iter().collect());
                }
                state.received += 1;
                Ok(smallvec![SessionEffect::Deliver(lane, unit)])
            }
        }
    }

    /// The receiver took a unit. Grants more, with a frame to send, once a quarter of the window is taken.
    pub fn consumed(&mut self, lane: Lane) -> Option<Frame<U>> {
        let state = &mut self.lanes[lane.at()];
        state.consumed += 1;
        let due = state.consumed + lane.window() - state.granted >= lane.window() / 4;
        (due && self.linked).then(|| self.grant(lane))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two ends and the frames between them.
    struct Pair {
        ends: [Session<u32>; 2],
        wires: [VecDeque<Frame<u32>>; 2],
        /// Delivered and not consumed yet, by receiver.
        waiting: [VecDeque<(Lane, u32)>; 2],
        got: [Vec<(Lane, u32)>; 2],
    }

    impl Pair {
        fn new() -> Self {
            let mut pair = Self {
                ends: Default::default(),
                wires: Default::default(),
                waiting: Default::default(),
                got: Default::default(),
            };
            pair.reconnect();
            pair
        }

        fn take(&mut self, end: usize, effects: Effects<u32>) {
            for effect in effects {
                match effect {
                    SessionEffect::Transmit(frame) => self.wires[end].push_back(frame),
                    SessionEffect::Deliver(lane, unit) => self.waiting[end].push_back((lane, unit)),
                }
            }
        }

        fn reconnect(&mut self) {
            let resumes = [self.ends[0].resume(), self.ends[1].resume()];
            for end in 0..2 {
                self.ends[end].link_down();
                self.wires[end].clear();
            }
            for end in 0..2 {
                let effects = self.ends[end].link_up(resumes[1 - end]).unwrap();
                self.take(end, effects);
            }
        }

        fn pass(&mut self, to: usize) -> bool {
            let Some(frame) = self.wires[1 - to].pop_front() else { return false };
            let effects = self.ends[to].on_frame(frame).unwrap();
            self.take(to, effects);
            true
        }

        fn consume(&mut self, end: usize) -> bool {
            let Some((lane, unit)) = self.waiting[end].pop_front() else { return false };
            self.got[end].push((lane, unit));
            let frame = self.ends[end].consumed(lane);
            self.wires[end].extend(frame);
            true
        }

        fn settle(&mut self) {
            while (0..2).fold(false, |any, end| self.pass(end) | self.consume(end) | any) {}
        }
    }

    proptest! {
        /// SE-1, SE-2, SE-3: whatever happens to the link, all arrive once and in order.
        #[test]
        fn everything_arrives_once_and_in_order(script in prop::collection::vec((0u8..6, 0usize..2), 1..400)) {
            let mut pair = Pair::new();
            let mut sent: [Vec<(Lane, u32)>; 2] = Default::default();
            for (n, (action, end)) in script.into_iter().enumerate() {
                match action {
                    0 | 1 => {
                        let lane = Lane::ALL[usize::from(action)];
                        if pair.ends[end].has_room(lane) {
                            sent[end].push((lane, n as u32));
                            let effects = pair.ends[end].send(lane, n as u32);
                            pair.take(end, effects);
                        }
                    }
                    2 | 3 => { pair.pass(end); }
                    4 => { pair.consume(end); }
                    _ => pair.reconnect(),
                }
            }
            pair.reconnect();
            pair.settle();
            for (end, sent) in sent.iter().enumerate() {
                for lane in Lane::ALL {
                    let of_lane = |all: &[(Lane, u32)]| all.iter().filter(|(l, _)| *l == lane).map(|(_, u)| *u).collect::<Vec<_>>();
                    prop_assert_eq!(of_lane(sent), of_lane(&pair.got[1 - end]));
                }
                prop_assert!(pair.ends[end].kept() <= 64 + 4096);
            }
        }
    }

    #[test]
    fn a_receiver_that_takes_nothing_stops_its_sender_on_that_lane_alone() {
        let mut pair = Pair::new();
        for n in 0..200 {
            let effects = pair.ends[0].send(Lane::Bulk, n);
            pair.take(0, effects);
        }
        while pair.pass(1) || pair.pass(0) {}
        assert_eq!(pair.waiting[1].len() as u64, Lane::Bulk.window());
        assert!(!pair.ends[0].has_room(Lane::Bulk));
        let effects = pair.ends[0].send(Lane::Control, 7);
        pair.take(0, effects);
        while pair.pass(1) {}
        assert_eq!(pair.waiting[1].back(), Some(&(Lane::Control, 7)));
    }

    /// SE-1.
    #[test]
    fn what_comes_again_is_delivered_once() {
        let mut s: Session<u32> = Session::new();
        s.link_up([0, 0]).unwrap();
        let data = |sequence| Frame::Data { lane: Lane::Bulk, sequence, unit: 7 };
        assert_eq!(s.on_frame(data(0)).unwrap()[..], [SessionEffect::Deliver(Lane::Bulk, 7)]);
        assert!(s.on_frame(data(0)).unwrap().is_empty());
        assert_eq!(s.resume(), [0, 1]);
    }

    /// SE-4.
    #[test]
    fn frames_of_a_broken_peer_are_refused() {
        let mut s: Session<u32> = Session::new();
        s.link_up([0, 0]).unwrap();
        let data = |sequence| Frame::Data { lane: Lane::Bulk, sequence, unit: 0 };
        assert!(matches!(s.on_frame(data(1)), Err(SessionError::Gap { .. })));
        assert!(matches!(s.on_frame(data(64)), Err(SessionError::BeyondGrant { .. })));
        let claim = Frame::Grant { lane: Lane::Control, received: 5, limit: 9 };
        assert!(matches!(s.on_frame(claim), Err(SessionError::NeverSent { .. })));
        assert!(s.link_up([0, 3]).is_err());
    }
}
