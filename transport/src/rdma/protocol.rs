//! The pure half of an RDMA link: what is sent when, and what becomes of what comes.
//!
//! The control lane is a stream of bytes in packets (SEND); a fragment of the bulk lane is written (WRITE) into a slot that its receiver
//! granted, with an immediate word, or a word in a packet behind it.
//! - RD-1: frames of a lane are delivered in the order in which they were given to the other end, each once.
//! - RD-2: nothing is sent for which the peer has no receive buffer, and nothing written but into a slot that is granted, once for
//!   each grant: one buffer is kept back, with which each end can always tell the other that buffers are there again.
//! - RD-3: what waits is bounded: [`STREAM_MAX`] bytes and [`FRAGMENTS`] fragments.
//! - RD-4: what no correct peer sends ends the link, and nothing else: it is told as an error.
//! - RD-5: no frame goes before both ends have proven the path with a probe each, in both ways.
//! - RD-6: what arrives is answered, at the latest when [`Core::answer`] says that it is time, and answers are not: so whoever is not
//!   answered knows that what it sent does not arrive. Completions do not say so on all devices: iWARP's tell that TCP has taken it.

use super::packet::{Immediate, Packet, PacketError, SLOTS, SlotGrant, room};
use crate::codec::{self, FrameError, FrameReader};
use crate::message::Fragment;
use crate::session::{Frame, Lane};
use bytes::Bytes;
use std::collections::VecDeque;

/// Receive buffers of each end.
pub(crate) const RECEIVES: usize = 256;
/// Packets on their way at most: send buffers of each end.
pub(crate) const PACKETS: usize = 32;
/// Writes on their way at most: a packet waits behind no more.
pub(crate) const WRITES: usize = 4;
/// Bytes of the control lane that wait, beside one frame.
pub(crate) const STREAM_MAX: usize = 256 << 10;
/// Fragments that wait.
pub(crate) const FRAGMENTS: usize = 4;

/// What the end has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Send it.
    Send(Packet),
    /// Write the parts to the granted slot, with an immediate word if there is one.
    Write(SlotGrant, Fragment, Option<u32>),
    /// Write the probe to the granted slot, in the same way.
    Probe(SlotGrant, Option<u32>),
    /// What the peer wrote to a slot must be the probe: [`Core::proven`] if so.
    Check(u8, u32),
    /// A frame came.
    Deliver(Frame<Fragment>),
    /// A fragment came: number, slot, length, whether the message ends here.
    DeliverSlot(u64, u8, u32, bool),
    /// The path is proven: [`Core::begin`] when the session comes this way.
    Proven,
}

/// The peer broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CoreError {
    #[error(transparent)]
    Packet(#[from] PacketError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("slot {0} was written and is not granted")]
    NotGranted(u8),
    #[error("{0} receive buffers are said to be there, the limit is {RECEIVES}")]
    Credits(usize),
    #[error("{0} slots are granted, the limit is {SLOTS}")]
    Grants(usize),
    #[error("{0} before the path is proven")]
    Early(&'static str),
    #[error("a second probe")]
    Again,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Core {
    /// Whether a WRITE takes an immediate word.
    immediate: bool,
    /// Bytes of the probe.
    probe: u32,
    /// What took a receive buffer of the peer's that is not known to be there again, in order: whether it will be answered.
    taken: VecDeque<bool>,
    /// How many of those will be.
    expected: usize,
    /// Receive buffers of ours that are there again and that the peer does not know of.
    owed: usize,
    /// Whether something came that is to be answered, and whether it is time.
    unanswered: bool,
    answer: bool,
    /// Slots that the peer has granted.
    theirs: VecDeque<SlotGrant>,
    /// Slots to grant.
    grants: VecDeque<SlotGrant>,
    /// Whether the peer may write to each of our slots.
    granted: [bool; SLOTS],
    stream: VecDeque<Bytes>,
    waiting: usize,
    fragments: VecDeque<Fragment>,
    /// Of writes that have gone without.
    words: VecDeque<u32>,
    packets: usize,
    writes: usize,
    incoming: FrameReader,
    /// The number of the next fragment to come; none until the session comes this way.
    next: Option<u64>,
    probe_sent: bool,
    probe_placed: bool,
    probe_seen: bool,
}

impl Core {
    /// Of a link whose writes take an immediate word or not, and whose path is proven with so many bytes.
    pub(crate) fn new(immediate: bool, probe: u32) -> Self {
        Self {
            immediate,
            probe,
            taken: VecDeque::new(),
            expected: 0,
            owed: 0,
            unanswered: false,
            answer: false,
            theirs: VecDeque::new(),
            grants: VecDeque::new(),
            granted: [false; SLOTS],
            stream: VecDeque::new(),
            waiting: 0,
            fragments: VecDeque::new(),
            words: VecDeque::new(),
            packets: 0,
            writes: 0,
            incoming: FrameReader::default(),
            next: None,
            probe_sent: false,
            probe_placed: false,
            probe_seen: false,
        }
    }

    /// Whether another frame of a lane may be given.
    pub(crate) fn has_room(&self, lane: Lane) -> bool {
        match lane {
            Lane::Control => self.waiting < STREAM_MAX,
            Lane::Bulk => self.fragments.len() < FRAGMENTS,
        }
    }

    /// Whether something is on its way, as far as is known.
    pub(crate) fn in_flight(&self) -> bool {
        self.packets + self.writes + self.expected > 0
    }

    /// Whether something came that is to be answered: RD-6.
    pub(crate) fn is_unanswered(&self) -> bool {
        self.unanswered
    }

    /// It is time to answer, or to show that this end lives though it takes nothing now.
    pub(crate) fn answer(&mut self) {
        self.answer = true;
    }

    /// Receive buffers that the peer has for us.
    fn credits(&self) -> usize {
        RECEIVES - self.taken.len()
    }

    /// Takes one.
    fn take(&mut self, is_answered: bool) {
        self.taken.push_back(is_answered);
        self.expected += usize::from(is_answered);
    }

    /// The session comes this way: the number of the next fragment that it lacks. To be called before the peer hears that it may send.
    pub(crate) fn begin(&mut self, first: u64) {
        self.next = Some(first);
    }

    /// A frame to send.
    pub(crate) fn send(&mut self, frame: Frame<Fragment>) {
        match frame {
            Frame::Data { lane: Lane::Bulk, unit, .. } => self.fragments.push_back(unit),
            frame => {
                for piece in codec::encode([frame]) {
                    self.waiting += piece.len();
                    self.stream.push_back(piece);
                }
            }
        }
    }

    /// Memory for a slot is there (again).
    pub(crate) fn grant(&mut self, grant: SlotGrant) {
        self.grants.push_back(grant);
    }

    /// A receive buffer is there again.
    pub(crate) fn posted(&mut self) {
        self.owed += 1;
    }

    /// A packet has gone.
    pub(crate) fn sent(&mut self) {
        self.packets -= 1;
    }

    /// A write is in its place.
    pub(crate) fn placed(&mut self, probe: bool) -> Option<Effect> {
        self.writes -= 1;
        self.probe_placed |= probe;
        self.now_proven(probe)
    }

    /// The peer's probe has the right bytes.
    pub(crate) fn proven(&mut self) -> Option<Effect> {
        self.probe_seen = true;
        self.now_proven(true)
    }

    fn now_proven(&self, changed: bool) -> Option<Effect> {
        (changed && self.probe_placed && self.probe_seen).then_some(Effect::Proven)
    }

    /// A packet came.
    pub(crate) fn on_packet(&mut self, bytes: &[u8]) -> Result<Vec<Effect>, CoreError> {
        let packet = Packet::read(bytes)?;
        let credits = usize::from(packet.credits);
        if credits > self.taken.len() {
            return Err(CoreError::Credits(self.credits() + credits));
        }
        self.expected -= self.taken.drain(..credits).filter(|is_answered| *is_answered).count();
        self.unanswered |= packet.is_answered();
        self.theirs.extend(packet.grants);
        if self.theirs.len() > SLOTS {
            return Err(CoreError::Grants(self.theirs.len()));
        }
        if !packet.stream.is_empty() && !self.probe_seen {
            return Err(CoreError::Early("a frame"));
        }
        let mut stream = packet.stream.freeze();
        let mut effects = packet.words.into_iter().map(|word| self.on_write(word)).collect::<Result<Vec<_>, _>>()?;
        while let Some(frame) = self.incoming.next(&mut stream)? {
            effects.push(Effect::Deliver(frame));
        }
        Ok(effects)
    }

    /// The peer wrote to a slot.
    pub(crate) fn on_write(&mut self, word: u32) -> Result<Effect, CoreError> {
        let Immediate { slot, length, last, probe } = word.try_into()?;
        if !std::mem::take(&mut self.granted[usize::from(slot)]) {
            return Err(CoreError::NotGranted(slot));
        }
        if probe {
            return if self.probe_seen { Err(CoreError::Again) } else { Ok(Effect::Check(slot, length)) };
        }
        self.unanswered = true;
        let next = self.next.as_mut().ok_or(CoreError::Early("a fragment"))?;
        *next += 1;
        Ok(Effect::DeliverSlot(*next - 1, slot, length, last))
    }

    /// What can go now.
    pub(crate) fn flush(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        loop {
            let before = effects.len();
            if self.packets < PACKETS && self.packet_due() {
                effects.push(Effect::Send(self.packet()));
            }
            let words = self.immediate || self.words.len() < WRITES;
            if self.writes < WRITES && words && self.credits() > 1 && !self.theirs.is_empty() {
                effects.extend(self.write());
            }
            if effects.len() == before {
                return effects;
            }
        }
    }

    /// RD-2: the last credit is for telling credits.
    fn packet_due(&self) -> bool {
        let something = !self.stream.is_empty() || !self.grants.is_empty() || !self.words.is_empty();
        let credits = self.credits();
        ((something || self.answer) && credits > 1)
            || (self.owed >= if self.answer { 1 } else { RECEIVES / 4 } && credits > 0)
    }

    fn packet(&mut self) -> Packet {
        let spare = self.credits() > 1;
        self.packets += 1;
        let mut packet = Packet { credits: self.owed as u16, ..Packet::default() };
        (self.owed, self.answer, self.unanswered) = (0, false, false);
        if !spare {
            self.take(false);
            return packet;
        }
        packet.grants = self.grants.drain(..).collect();
        for grant in &packet.grants {
            self.granted[usize::from(grant.slot)] = true;
        }
        packet.words = self.words.drain(..).collect();
        let mut left = room(packet.grants.len(), packet.words.len());
        while left > 0
            && let Some(piece) = self.stream.front_mut()
        {
            let part = piece.split_to(left.min(piece.len()));
            packet.stream.extend_from_slice(&part);
            left -= part.len();
            self.waiting -= part.len();
            if piece.is_empty() {
                self.stream.pop_front();
            }
        }
        self.take(packet.is_answered());
        packet
    }

    fn write(&mut self) -> Option<Effect> {
        let effect = if !self.probe_sent {
            self.probe_sent = true;
            let grant = self.theirs.pop_front()?;
            Effect::Probe(grant, self.word(grant.slot, self.probe, false, true))
        } else {
            let fragment = self.fragments.pop_front()?;
            let grant = self.theirs.pop_front()?;
            let word = self.word(grant.slot, fragment.len() as u32, fragment.last, false);
            Effect::Write(grant, fragment, word)
        };
        self.writes += 1;
        Some(effect)
    }

    /// A write's word, if it goes with it; that takes a receive buffer. Else the next packet has it.
    fn word(&mut self, slot: u8, length: u32, last: bool, probe: bool) -> Option<u32> {
        let word = Immediate { slot, length, last, probe }.into();
        if self.immediate {
            self.take(true);
            return Some(word);
        }
        self.words.push_back(word);
        None
    }
}

#[cfg(test)]
mod tests;
