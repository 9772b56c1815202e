//! A link over a queue pair: the core between a session's queues and a device, as a task of RDMA's own thread.
//!
//! It waits for completions as events. Only while they come at short intervals it looks for the next ones a few times before it
//! waits: how often, what it found teaches ([`Looks`]).

use super::packet::{SLOTS, SlotGrant};
use super::probe;
use super::protocol::{Core, Effect};
use super::sys::{CmEventKind, Done, Granted, Memory, QueuePair, Watch};
use crate::connection::Trial;
use crate::hub::Refusals;
use crate::link::{Link, QUEUE};
use crate::message::{FRAGMENT_MAX, Fragment};
use crate::session::{Frame, Lane};
use crate::side::Token;
use bytes::Bytes;
use smallvec::smallvec;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Nothing has arrived for so long, though something is on its way: the path is of no use. Sooner than silence is taken for a death.
const PROGRESS: Duration = Duration::from_millis(250);
/// After so long what came is answered (RD-6), if nothing goes back by itself.
const ANSWER: Duration = Duration::from_millis(50);
/// Frames that wait for the session.
const ARRIVED: usize = 256;

/// Starts a link on the thread that calls.
pub(super) fn start(
    pair: QueuePair,
    token: Token,
    breaks: watch::Receiver<()>,
    refusals: Refusals,
) -> io::Result<Trial> {
    let (control, control_queue) = mpsc::channel(QUEUE);
    let (bulk, bulk_queue) = mpsc::channel(QUEUE);
    let (arrived, incoming) = mpsc::channel(ARRIVED);
    let (prove, proven) = oneshot::channel();
    let (begin, begun) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    let (back, freed) = mpsc::channel(SLOTS);
    let device = pair.id().device().unwrap_or_default();
    let probe = probe(&token);
    let core = Core::new(pair.has_words(), probe.len() as u32);
    let mut driver = Driver {
        completions: pair.watch()?,
        connection: pair.id().watch()?,
        pair,
        core,
        slots: std::array::from_fn(|_| None),
        probes: BTreeSet::new(),
        probe,
        arrived,
        waiting: VecDeque::new(),
        held: VecDeque::new(),
        prove: Some(prove),
        back,
        breaks,
        refusals,
        looks: Looks::default(),
        progress: Instant::now(),
        answer_at: None,
    };
    for slot in 0..SLOTS as u8 {
        driver.grant(slot, Memory::new(FRAGMENT_MAX))?;
    }
    tokio::spawn(async move {
        let why = match driver.run(control_queue, bulk_queue, freed, begun).await {
            Ok(()) => "the session's end of the link is gone".to_owned(),
            Err(error) => error.to_string(),
        };
        driver.pair.disconnect();
        // The device's memory is free before anybody hears of the end.
        drop(driver);
        let _ = end.send(why);
    });
    Ok(Trial {
        link: Some(Link { control, bulk, incoming }),
        proven: Some(proven),
        begin: Some(begin),
        ended: Some(ended),
        device,
    })
}

/// How often to look for completions before waiting for them: more often when that found some.
#[derive(Debug, Default)]
struct Looks {
    most: u32,
    left: u32,
    /// What is found now is found by looking.
    looking: bool,
}

impl Looks {
    const MOST: u32 = 64;

    /// Some were found.
    fn found(&mut self) {
        self.most = if self.looking { (2 * self.most).min(Self::MOST) } else { self.most.max(1) };
        self.left = self.most;
    }

    /// None were: whether to look again.
    fn again(&mut self) -> bool {
        self.looking = self.left > 0;
        if self.looking {
            self.left -= 1;
        } else {
            self.most /= 2;
        }
        self.looking
    }
}

struct Driver {
    completions: Watch,
    connection: Watch,
    pair: QueuePair,
    core: Core,
    slots: [Option<Granted>; SLOTS],
    /// Numbers of writes that are probes.
    probes: BTreeSet<u64>,
    probe: Bytes,
    arrived: mpsc::Sender<Frame<Fragment>>,
    /// Frames for which the session has no room yet.
    waiting: VecDeque<Frame<Fragment>>,
    /// What arrived meanwhile, at most as much as receive buffers take: they are posted again when it is looked at.
    held: VecDeque<Done>,
    prove: Option<oneshot::Sender<()>>,
    back: mpsc::Sender<(u8, Memory)>,
    /// Changes when all links are to fail (chaos).
    breaks: watch::Receiver<()>,
    /// Where it is told that the peer said what no correct member says.
    refusals: Refusals,
    looks: Looks,
    /// When something arrived last, or was sent while nothing was on its way.
    progress: Instant,
    /// When to answer.
    answer_at: Option<Instant>,
}

impl Driver {
    /// Until the session's end is dropped, or something fails.
    async fn run(
        &mut self,
        mut control: mpsc::Receiver<Frame<Fragment>>,
        mut bulk: mpsc::Receiver<Frame<Fragment>>,
        mut freed: mpsc::Receiver<(u8, Memory)>,
        mut begun: oneshot::Receiver<u64>,
    ) -> io::Result<()> {
        let mut waits_for_begin = true;
        loop {
            // Before what may come because the peer was told.
            if waits_for_begin && let Ok(first) = begun.try_recv() {
                waits_for_begin = false;
                self.core.begin(first);
            }
            // First what is left, for which there may be room now: nothing is taken while something is left.
            if !self.deliver() {
                return Ok(());
            }
            let found = self.take_completions()?;
            self.flush()?;
            if !self.deliver() {
                return Ok(());
            }
            if found {
                self.looks.found();
            }
            let more = !self.waiting.is_empty() || !self.held.is_empty();
            let look = !more && self.looks.again();
            let room = [Lane::Control, Lane::Bulk].map(|lane| self.core.has_room(lane));
            let wake = self.wake(more)?;
            tokio::select! {
                biased;
                // Then there is room, or nobody takes frames any more.
                _ = async { self.arrived.reserve().await.is_ok() }, if more => {}
                ready = self.completions.readable() => {
                    ready?;
                    // Armed first, looked at after: a completion between the two wakes again.
                    while self.pair.woken() {}
                    self.pair.arm()?;
                }
                ready = self.connection.readable() => {
                    ready?;
                    self.connection_events()?;
                }
                frame = control.recv(), if room[0] => match frame {
                    Some(frame) => self.send(frame, &mut control, Lane::Control),
                    None => return Ok(()),
                },
                Some(frame) = bulk.recv(), if room[1] => self.send(frame, &mut bulk, Lane::Bulk),
                Some((slot, memory)) = freed.recv() => self.grant(slot, memory)?,
                first = &mut begun, if waits_for_begin => {
                    waits_for_begin = false;
                    self.core.begin(first.map_err(|_| io::Error::other("the trial was given up"))?);
                }
                () = async { tokio::time::sleep_until(wake.expect("looked at")).await }, if wake.is_some() => {}
                Ok(()) = self.breaks.changed() => self.pair.fail()?,
                () = tokio::task::yield_now(), if look => {}
            }
        }
    }

    /// Does what is due, and says when something will be. `more`: the session has no room, and nothing is taken meanwhile.
    fn wake(&mut self, more: bool) -> io::Result<Option<Instant>> {
        let now = Instant::now();
        if more || !self.core.in_flight() {
            self.progress = now;
        } else if now >= self.progress + PROGRESS {
            return Err(io::Error::other(format!("nothing has arrived for {PROGRESS:?}")));
        }
        if !more && !self.core.is_unanswered() {
            self.answer_at = None;
        } else if *self.answer_at.get_or_insert(now + ANSWER) <= now {
            self.answer_at = None;
            self.core.answer();
            self.flush()?;
        }
        let stuck = self.core.in_flight().then(|| self.progress + PROGRESS);
        Ok(self.answer_at.into_iter().chain(stuck).min())
    }

    /// Takes a frame, and those that wait behind it.
    fn send(&mut self, first: Frame<Fragment>, queue: &mut mpsc::Receiver<Frame<Fragment>>, lane: Lane) {
        self.core.send(first);
        while self.core.has_room(lane)
            && let Ok(frame) = queue.try_recv()
        {
            self.core.send(frame);
        }
    }

    /// Takes what has ended; gives whether there was something. What arrived waits while the session has no room; what was sent does
    /// not, since it makes room for the next packet.
    fn take_completions(&mut self) -> io::Result<bool> {
        let mut found = false;
        while self.waiting.is_empty()
            && let Some(arrived) = self.held.pop_front()
        {
            self.take(arrived)?;
        }
        while let Some(done) = self.pair.done()? {
            found = true;
            let arrived = matches!(done, Done::Received(..) | Done::Written(..));
            if arrived {
                self.progress = Instant::now();
            }
            if arrived && !(self.waiting.is_empty() && self.held.is_empty()) {
                self.held.push_back(done);
            } else {
                self.take(done)?;
            }
        }
        Ok(found)
    }

    fn take(&mut self, done: Done) -> io::Result<()> {
        match done {
            Done::Sent => self.core.sent(),
            Done::Placed(number) => {
                let probe = self.probes.remove(&number);
                let effect = self.core.placed(probe);
                effect.map_or(Ok(()), |effect| self.perform(effect))?;
            }
            Done::Received(buffer, length) => {
                let said = self.core.on_packet(self.pair.packet(buffer, length));
                let effects = said.map_err(|error| self.refused(&error))?;
                effects.into_iter().try_for_each(|effect| self.perform(effect))?;
                self.post(buffer)?;
            }
            Done::Written(buffer, word) => {
                let effect = self.core.on_write(word).map_err(|error| self.refused(&error))?;
                self.perform(effect)?;
                self.post(buffer)?;
            }
        }
        Ok(())
    }

    /// The peer did what no correct member does.
    fn refused(&self, why: &dyn std::fmt::Display) -> io::Error {
        self.refusals.add(format!("over RDMA: {why}"));
        io::Error::other(why.to_string())
    }

    fn post(&mut self, buffer: usize) -> io::Result<()> {
        self.pair.post(buffer)?;
        self.core.posted();
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.core.in_flight() {
            self.progress = Instant::now();
        }
        self.core.flush().into_iter().try_for_each(|effect| self.perform(effect))
    }

    fn perform(&mut self, effect: Effect) -> io::Result<()> {
        match effect {
            Effect::Send(packet) => self.pair.send(|buffer| packet.write(buffer))?,
            Effect::Write(grant, fragment, word) => {
                self.pair.write(grant, fragment.parts, word)?;
            }
            Effect::Probe(grant, word) => {
                let number = self.pair.write(grant, smallvec![self.probe.clone()], word)?;
                self.probes.insert(number);
            }
            Effect::Check(slot, length) => {
                let memory = self.revoke(slot)?;
                if memory.as_ref()[..length as usize] != self.probe[..] {
                    return Err(self.refused(&"the probe arrived with other bytes"));
                }
                self.grant(slot, memory)?;
                let effect = self.core.proven();
                effect.map_or(Ok(()), |effect| self.perform(effect))?;
            }
            Effect::Deliver(frame) => self.waiting.push_back(frame),
            Effect::DeliverSlot(sequence, slot, length, last) => {
                let memory = Some(self.revoke(slot)?);
                let written = Written { memory, slot, length: length as usize, back: self.back.clone() };
                let unit = Fragment { parts: smallvec![Bytes::from_owner(written)], last };
                self.waiting.push_back(Frame::Data { lane: Lane::Bulk, sequence, unit });
            }
            Effect::Proven => {
                if let Some(prove) = self.prove.take() {
                    let _ = prove.send(());
                }
            }
        }
        Ok(())
    }

    fn grant(&mut self, slot: u8, memory: Memory) -> io::Result<()> {
        let granted = self.pair.grant(memory)?;
        self.core.grant(SlotGrant { slot, address: granted.address(), key: granted.key() });
        self.slots[usize::from(slot)] = Some(granted);
        Ok(())
    }

    fn revoke(&mut self, slot: u8) -> io::Result<Memory> {
        let granted = self.slots[usize::from(slot)].take();
        granted.ok_or_else(|| io::Error::other("a slot without memory was written"))?.revoke()
    }

    /// Hands over frames for which there is room; false if nobody takes them any more.
    fn deliver(&mut self) -> bool {
        while let Some(frame) = self.waiting.pop_front() {
            match self.arrived.try_send(frame) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(frame)) => {
                    self.waiting.push_front(frame);
                    return true;
                }
                Err(mpsc::error::TrySendError::Closed(_)) => return false,
            }
        }
        true
    }

    fn connection_events(&self) -> io::Result<()> {
        while let Some(event) = self.pair.id().event()? {
            if let CmEventKind::Ended(why) = event.kind {
                return Err(io::Error::other(why));
            }
        }
        Ok(())
    }
}

/// What was written to a slot, until it is read.
struct Written {
    memory: Option<Memory>,
    slot: u8,
    length: usize,
    back: mpsc::Sender<(u8, Memory)>,
}

impl AsRef<[u8]> for Written {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory.as_ref()[..self.length])
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // A link that has ended grants nothing more.
            let _ = self.back.try_send((self.slot, memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_worth_their_while_or_become_fewer() {
        let mut looks = Looks::default();
        assert!(!looks.again(), "who is idle does not look");
        for _ in 0..20 {
            looks.found();
            assert!(looks.again());
        }
        assert_eq!(looks.most, Looks::MOST);
        for _ in 0..20 {
            looks.found();
            while looks.again() {}
        }
        assert!(looks.most <= 1 && !looks.again());
    }
}
