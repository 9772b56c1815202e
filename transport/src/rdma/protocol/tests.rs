//! Two ends and a wire that keeps the order of each direction, as a reliable connection does.

use super::*;
use crate::codec::tests::joined;
use crate::rdma::packet::PACKET;
use proptest::prelude::*;
use smallvec::smallvec;

/// What is on its way.
enum Wire {
    Send(Vec<u8>),
    Write(u8, Vec<u8>, Option<u32>, bool),
}

#[derive(Default)]
struct End {
    /// Bytes of each slot.
    slots: Vec<Vec<u8>>,
    /// Receive buffers that are posted.
    buffers: usize,
    /// Taken and not posted again.
    used: usize,
    /// Slots whose fragments are still read.
    held: Vec<u8>,
    got: Vec<Frame<Fragment>>,
    proven: bool,
}

struct Pair {
    cores: [Core; 2],
    ends: [End; 2],
    wires: [VecDeque<Wire>; 2],
    key: u32,
}

const PROBE: [u8; 9] = *b"the probe";

impl Pair {
    fn new(immediate: bool) -> Self {
        let end = || End { slots: vec![Vec::new(); SLOTS], buffers: RECEIVES, ..End::default() };
        let mut pair = Self {
            cores: [0; 2].map(|_| Core::new(immediate, PROBE.len() as u32)),
            ends: [end(), end()],
            wires: [VecDeque::new(), VecDeque::new()],
            key: 0,
        };
        for at in 0..2 {
            (0..SLOTS as u8).for_each(|slot| pair.grant(at, slot));
            pair.flush(at);
        }
        while (0..2).any(|at| pair.arrive(at)) {}
        assert!(pair.ends.iter().all(|end| end.proven));
        for core in &mut pair.cores {
            core.begin(0);
        }
        pair
    }

    fn grant(&mut self, at: usize, slot: u8) {
        self.key += 1;
        self.cores[at].grant(SlotGrant { slot, address: u64::from(slot) << 32, key: self.key });
    }

    /// RD-2: a buffer is there for all that is sent.
    fn flush(&mut self, at: usize) {
        for effect in self.cores[at].flush() {
            let takes = !matches!(effect, Effect::Write(_, _, None) | Effect::Probe(_, None));
            assert!(!takes || self.ends[1 - at].buffers > 0, "nothing is sent without a receive buffer");
            self.ends[1 - at].buffers -= usize::from(takes);
            self.wires[at].push_back(match effect {
                Effect::Send(packet) => {
                    let mut bytes = [0; PACKET];
                    let length = packet.write(&mut bytes);
                    Wire::Send(bytes[..length].to_vec())
                }
                Effect::Write(grant, fragment, word) => Wire::Write(grant.slot, fragment.parts.concat(), word, false),
                Effect::Probe(grant, word) => Wire::Write(grant.slot, PROBE.to_vec(), word, true),
                other => panic!("{other:?} is no effect of sending"),
            });
        }
    }

    /// The first thing on the way from `at` arrives, and its sender knows. False if there is none.
    fn arrive(&mut self, at: usize) -> bool {
        let Some(first) = self.wires[at].pop_front() else { return false };
        let to = 1 - at;
        let (effects, gone) = match first {
            Wire::Send(bytes) => {
                self.ends[to].used += 1;
                self.cores[at].sent();
                (self.cores[to].on_packet(&bytes).unwrap(), None)
            }
            Wire::Write(slot, bytes, word, probe) => {
                self.ends[to].used += usize::from(word.is_some());
                self.ends[to].slots[usize::from(slot)] = bytes;
                let effects = word.map(|word| self.cores[to].on_write(word).unwrap());
                (effects.into_iter().collect(), self.cores[at].placed(probe))
            }
        };
        self.ends[at].proven |= gone.is_some();
        for effect in effects {
            self.take(to, effect);
        }
        self.post(to);
        self.flush(to);
        self.flush(at);
        true
    }

    fn take(&mut self, at: usize, effect: Effect) {
        let end = &mut self.ends[at];
        match effect {
            Effect::Deliver(frame) => end.got.push(joined(frame)),
            Effect::DeliverSlot(sequence, slot, length, last) => {
                let bytes = Bytes::from(end.slots[usize::from(slot)].clone());
                assert_eq!(bytes.len(), length as usize);
                let unit = Fragment { parts: smallvec![bytes], last };
                end.got.push(Frame::Data { lane: Lane::Bulk, sequence, unit });
                end.held.push(slot);
            }
            Effect::Check(slot, length) => {
                assert_eq!((&end.slots[usize::from(slot)][..], length), (&PROBE[..], 9));
                end.proven |= self.cores[at].proven().is_some();
                self.grant(at, slot);
            }
            other => panic!("{other:?} is no effect of receiving"),
        }
    }

    fn post(&mut self, at: usize) {
        let end = &mut self.ends[at];
        end.buffers += end.used;
        (0..std::mem::take(&mut end.used)).for_each(|_| self.cores[at].posted());
    }

    /// The oldest fragment that is still read is read.
    fn read(&mut self, at: usize) -> bool {
        if self.ends[at].held.is_empty() {
            return false;
        }
        let slot = self.ends[at].held.remove(0);
        self.grant(at, slot);
        self.flush(at);
        true
    }
}

fn unit(n: usize, length: usize) -> Fragment {
    Fragment { parts: smallvec![Bytes::from(vec![n as u8; length])], last: n.is_multiple_of(3) }
}

proptest! {
    /// RD-1, RD-2, RD-3: whatever the order in which things arrive, are read and are sent.
    #[test]
    fn frames_arrive_in_order(immediate: bool, steps in prop::collection::vec((0..8u8, 0..2usize, any::<prop::sample::Index>()), 0..400)) {
        let mut pair = Pair::new(immediate);
        let mut want: [[Vec<Frame<Fragment>>; 2]; 2] = Default::default();
        for (step, at, index) in steps {
            match step {
                0..3 => drop(pair.arrive(at)),
                3 => drop(pair.read(at)),
                _ => {
                    let lane = if step < 6 { Lane::Control } else { Lane::Bulk };
                    if !pair.cores[at].has_room(lane) {
                        continue;
                    }
                    let sent = &mut want[at][usize::from(lane == Lane::Bulk)];
                    let length = if lane == Lane::Bulk { index.index(300) } else { index.index(20_000) };
                    let frame = if step == 5 {
                        Frame::Grant { lane: Lane::Bulk, received: 1, limit: index.index(1000) as u64 }
                    } else {
                        Frame::Data { lane, sequence: sent.len() as u64, unit: unit(sent.len(), length) }
                    };
                    sent.push(frame.clone());
                    pair.cores[at].send(frame);
                    pair.flush(at);
                }
            }
        }
        while (0..2).any(|at| pair.arrive(at) || pair.read(at)) {}
        for (to, of_peer) in [(1, &want[0]), (0, &want[1])] {
            let is_bulk = |frame: &&Frame<Fragment>| matches!(frame, Frame::Data { lane: Lane::Bulk, .. });
            let got = &pair.ends[to].got;
            let (bulk, control): (Vec<_>, Vec<_>) = got.iter().partition(is_bulk);
            prop_assert!(control.into_iter().eq(&of_peer[0]));
            prop_assert!(bulk.into_iter().eq(&of_peer[1]));
        }
    }

    /// RD-4.
    #[test]
    fn any_packet_is_taken_or_refused(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 3..60), 0..20), words: [u32; 8]) {
        let mut pair = Pair::new(true);
        for packet in &packets {
            if pair.cores[0].on_packet(packet).is_err() {
                break;
            }
        }
        let results = words.map(|word| pair.cores[0].on_write(word).is_ok());
        prop_assert!(results.len() == 8);
    }
}

/// RD-2: a link on which one end only sends goes on for ever.
#[test]
fn credits_come_back() {
    let mut pair = Pair::new(true);
    for n in 0..20 * RECEIVES {
        pair.cores[0].send(Frame::Data { lane: Lane::Control, sequence: n as u64, unit: unit(n, 4000) });
        pair.flush(0);
        while pair.arrive(0) || pair.arrive(1) {}
    }
    assert_eq!(pair.ends[1].got.len(), 20 * RECEIVES);
}

/// RD-6.
#[test]
fn what_arrives_is_answered_and_answers_are_not() {
    for immediate in [true, false] {
        let mut pair = Pair::new(immediate);
        let settle = |pair: &mut Pair| {
            while let Some(at) = (0..2).find(|at| pair.cores[*at].is_unanswered()) {
                pair.cores[at].answer();
                pair.flush(at);
                while (0..2).any(|at| pair.arrive(at)) {}
            }
        };
        settle(&mut pair);
        assert!(pair.cores.iter().all(|core| !core.in_flight()));
        for lane in Lane::ALL {
            pair.cores[0].send(Frame::Data { lane, sequence: 0, unit: unit(0, 100) });
            pair.flush(0);
            while (0..2).any(|at| pair.arrive(at)) {}
            assert!(pair.cores[0].in_flight() && pair.cores[1].is_unanswered(), "all has gone, and no answer has come");
            settle(&mut pair);
            assert!(pair.cores.iter().all(|core| !core.in_flight() && !core.is_unanswered()));
        }
        // Whoever takes nothing now shows that it lives.
        pair.cores[1].answer();
        assert_eq!(pair.cores[1].flush(), [Effect::Send(Packet::default())]);
        assert!(pair.cores[1].in_flight(), "until it has gone");
        pair.cores[1].sent();
        assert!(!pair.cores[1].in_flight());
    }
}

/// RD-4, RD-5.
#[test]
fn what_no_correct_peer_sends_is_refused() {
    let mut core = Core::new(true, 9);
    let write = |slot, probe| u32::from(Immediate { slot, length: 9, last: true, probe });
    assert_eq!(core.on_write(write(3, false)), Err(CoreError::NotGranted(3)));
    core.grant(SlotGrant { slot: 3, address: 0, key: 0 });
    assert_eq!(core.flush().len(), 1);
    assert_eq!(core.on_write(write(3, false)), Err(CoreError::Early("a fragment")));
    assert_eq!(core.on_packet(&[0, 0, 0, 0, 9]), Err(CoreError::Early("a frame")));
    assert_eq!(core.on_packet(&[2, 0, 0, 0]), Err(CoreError::Credits(RECEIVES + 1)));
    let mut core = Core::new(true, 9);
    core.grant(SlotGrant { slot: 3, address: 0, key: 0 });
    core.grant(SlotGrant { slot: 4, address: 0, key: 0 });
    core.flush();
    assert_eq!(core.on_write(write(3, true)), Ok(Effect::Check(3, 9)));
    assert_eq!(core.proven(), None);
    assert_eq!(core.on_write(write(4, true)), Err(CoreError::Again));
    assert_eq!(core.on_write(write(3, true)), Err(CoreError::NotGranted(3)), "a grant is for one write");
    assert_eq!(core.on_packet(&[0, 0, 0, 0, 9]), Err(CoreError::Frame(FrameError::Kind(9))));
}
