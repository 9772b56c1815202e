//! Two ends, what they say to each other, and paths that are proven or fail at any time.

use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    Quic,
    Resting,
    Rdma,
}

struct End {
    choice: Choice,
    session: Session,
    /// What it said it has, last.
    rested: Greeting,
    /// Events that will come.
    events: VecDeque<Event>,
    /// Whether there is something that is tried or taken.
    path: bool,
    told: Vec<Way>,
}

struct World {
    now: Duration,
    /// The dialler first.
    ends: [End; 2],
    wires: [VecDeque<(u32, Said)>; 2],
    rests: u64,
    closed: bool,
}

impl World {
    fn new(able: [bool; 2]) -> Self {
        let end = |dials: bool, able: bool| End {
            choice: Choice::new(dials, (!able).then(|| "no device".to_owned())),
            session: Session::Quic,
            rested: [0; 4],
            events: VecDeque::from([Event::Linked]),
            path: false,
            told: Vec::new(),
        };
        let ends = [end(true, able[0]), end(false, able[1])];
        Self { now: Duration::ZERO, ends, wires: Default::default(), rests: 0, closed: false }
    }

    fn on(&mut self, at: usize, event: Event) {
        for effect in self.ends[at].choice.on(self.now, event) {
            let other = 1 - at;
            match effect {
                Effect::Say(round, said) => self.wires[at].push_back((round, said)),
                Effect::Listen(round) => {
                    self.ends[at].path = true;
                    self.wires[at].push_back((round, Said::Listen([1; 32], Vec::new())));
                }
                Effect::Dial(..) => self.ends[at].path = true,
                Effect::Rest => {
                    self.rests += 1;
                    self.ends[at].session = Session::Resting;
                    self.ends[at].rested = [self.rests; 4];
                    self.ends[at].events.push_back(Event::Rests([self.rests; 4]));
                }
                // CH-1. A session that goes on over streams that were opened since does not take the path.
                Effect::Take(theirs) => {
                    if self.ends[at].session == Session::Resting {
                        assert_eq!(theirs, self.ends[other].rested, "it goes on with what the other has");
                        self.ends[at].session = Session::Rdma;
                    }
                }
                Effect::Drop => {
                    if std::mem::take(&mut self.ends[at].path) && self.ends[other].path {
                        self.ends[other].events.push_back(Event::Failed("the other end dropped it".to_owned()));
                    }
                }
                Effect::Return => {
                    for end in &mut self.ends {
                        end.session = Session::Quic;
                        end.events.push_back(Event::Linked);
                    }
                }
                Effect::Close => self.closed = true,
                Effect::Tell(way) => self.ends[at].told.push(way),
            }
        }
    }

    fn hear(&mut self, at: usize) -> bool {
        let Some((round, said)) = self.wires[1 - at].pop_front() else { return false };
        self.on(at, Event::Said(round, said));
        true
    }

    fn happen(&mut self, at: usize) -> bool {
        let Some(event) = self.ends[at].events.pop_front() else { return false };
        self.on(at, event);
        true
    }

    fn settle(&mut self) {
        while (0..2).any(|at| self.hear(at) || self.happen(at)) {}
    }

    fn tick(&mut self) {
        (0..2).for_each(|at| self.on(at, Event::Tick));
    }

    /// Both prove the path, when both try one.
    fn prove(&mut self) {
        if self.ends.iter().all(|end| end.path) {
            (0..2).for_each(|at| self.on(at, Event::Proven("rxe0".to_owned())));
        }
    }
}

#[test]
fn a_proven_path_is_taken_and_left_when_it_fails() {
    let mut world = World::new([true; 2]);
    world.settle();
    world.tick();
    world.settle();
    world.prove();
    world.settle();
    assert_eq!([world.ends[0].session, world.ends[1].session], [Session::Rdma; 2]);
    assert_eq!(world.ends[1].told.last(), Some(&Way::Rdma("rxe0".to_owned())));
    for (failures, at) in [(1, 0), (2, 1), (3, 0)] {
        world.on(at, Event::Failed("a request failed".to_owned()));
        world.settle();
        assert_eq!([world.ends[0].session, world.ends[1].session], [Session::Quic; 2]);
        assert!(
            matches!(world.ends[1 - at].told.last(), Some(Way::Quic(Some(why))) if why.contains("a request failed"))
        );
        // CH-5.
        let again = world.ends[0].choice.deadline().unwrap() - world.now;
        assert_eq!(again, FIRST * (1 << (failures - 1)));
        world.now += again;
        world.tick();
        world.settle();
        world.prove();
        world.settle();
        assert_eq!([world.ends[0].session, world.ends[1].session], [Session::Rdma; 2]);
    }
    world.now += FIRST * 4 + Duration::from_millis(1);
    world.on(0, Event::Failed("the device was removed".to_owned()));
    world.settle();
    assert_eq!(
        world.ends[0].choice.deadline(),
        Some(world.now + FIRST),
        "it was of use for longer than it was waited for"
    );
}

#[test]
fn who_has_no_device_stays_with_quic_and_says_why() {
    for able in [[false, true], [true, false], [false, false]] {
        let mut world = World::new(able);
        world.settle();
        world.tick();
        world.settle();
        assert_eq!([world.ends[0].session, world.ends[1].session], [Session::Quic; 2]);
        let told = world.ends[0].told.last().unwrap().to_string();
        assert!(told.contains("no device"), "{told}");
        assert_eq!(world.ends[0].choice.deadline(), able[0].then_some(LONGEST));
    }
}

proptest! {
    /// CH-1, CH-2, CH-3, CH-4: whatever is said late and whatever fails, both go the same way in the end.
    #[test]
    fn both_ends_go_the_same_way(steps in prop::collection::vec((0..12u8, 0..2usize), 0..200)) {
        let mut world = World::new([true; 2]);
        for (step, at) in steps {
            match step {
                0..4 => drop(world.hear(at)),
                4..7 => drop(world.happen(at)),
                7 => world.on(at, Event::Proven("rxe0".to_owned())),
                8 => {
                    world.now += Duration::from_millis(70);
                    world.tick();
                }
                9 => if world.ends[at].path {
                    world.on(at, Event::Failed("chance".to_owned()));
                },
                _ => world.on(at, Event::Tick),
            }
        }
        // Whoever was kept from hearing for too long may have given up. CH-4: with nothing more going wrong, neither is left in between.
        world.settle();
        world.closed = false;
        for _ in 0..200 {
            world.settle();
            world.now += Duration::from_secs(1);
            world.tick();
        }
        world.settle();
        prop_assert!(!world.closed, "nobody had to give the connection up");
        prop_assert_eq!(world.ends[0].session, world.ends[1].session);
        prop_assert!(world.ends[0].session != Session::Resting);
    }
}
