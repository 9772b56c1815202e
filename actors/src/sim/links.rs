//! What the simulated world does for sessions: links, frames on their way, deliveries.

use super::contracts::{Broken, c4, c5};
use super::coverage::kinds_of;
use super::network::{Flight, Ill, Life, Link, Network};
use super::world::{SimEvent, World};
use crate::plant::{Bug, planted};
use crate::root::RootEvent;
use crate::wire::Unit;
use everstep_transport::{Effects, Frame, Lane, Session, SessionBug, SessionEffect};

/// Microseconds after which a link that is silent breaks.
const IDLE: u64 = 500_000;
/// Microseconds until what was lost is sent again, at most.
const LOST: u64 = 200_000;

impl World {
    pub(super) fn session(&mut self, owner: Life, peer: Life) -> &mut Session<Unit> {
        let bugs = [(Bug::LostAtReconnect, SessionBug::Forgets), (Bug::DeliveredAgain, SessionBug::Repeats)];
        let bug = || bugs.into_iter().find(|(bug, _)| planted(*bug));
        let new = || bug().map_or_else(Session::new, |(_, bug)| Session::with(bug));
        self.network.sessions.entry((owner, peer)).or_insert_with(new)
    }

    /// Makes sure that two lives are being connected.
    pub(super) fn connect(&mut self, a: Life, b: Life) {
        let pair = Network::pair(a, b);
        if !self.network.links.contains_key(&pair) && self.alive(a) && self.alive(b) {
            self.network.links.insert(pair, Link::default());
            let delay = 100 + self.draw(3000);
            self.after(delay, SimEvent::LinkUp(pair.0, pair.1));
        }
    }

    pub(super) fn link_up(&mut self, a: Life, b: Life) -> Result<(), Broken> {
        if !self.alive(a) || !self.alive(b) {
            return Ok(());
        }
        let lost = [(a, b), (b, a)].iter().filter_map(|way| self.network.one_way.get(way).copied()).max().unwrap_or(0);
        let lost = lost.max(self.parted_until(a, b));
        if lost > self.now {
            // Dialling needs both ways.
            self.after(lost - self.now, SimEvent::LinkUp(a, b));
            return Ok(());
        }
        let Some(link) = self.network.links.get_mut(&(a, b)) else { return Ok(()) };
        link.number += 1;
        link.up = true;
        link.last.clear();
        link.mixed = false;
        let resumes = [self.session(a, b).resume(), self.session(b, a).resume()];
        for (owner, peer, theirs) in [(a, b, resumes[1]), (b, a, resumes[0])] {
            let effects = self.session(owner, peer).link_up(theirs).map_err(|e| ("session", e.to_string()))?;
            self.sessioned(owner, peer, effects)?;
        }
        Ok(())
    }

    /// Gives whether there was one that was up.
    pub(super) fn break_links(&mut self, life: Life) -> bool {
        let pairs: Vec<(Life, Life)> =
            self.network.links.keys().filter(|(a, b)| *a == life || *b == life).copied().collect();
        let mut any = false;
        for (a, b) in pairs {
            let delay = 1000 + self.draw(100_000);
            any |= self.break_link(a, b, delay);
        }
        any
    }

    /// Breaks the link of two lives, the lower first; it comes back after a while. Gives whether it was up.
    pub(super) fn break_link(&mut self, a: Life, b: Life, micros: u64) -> bool {
        let Some(link) = self.network.links.get_mut(&(a, b)).filter(|l| l.up) else { return false };
        link.up = false;
        link.number += 1;
        self.session(a, b).link_down();
        self.session(b, a).link_down();
        self.after(micros, SimEvent::LinkUp(a, b));
        true
    }

    /// What one life sends to another is lost for a while, however often it is sent. The other breaks the link when it has heard nothing for too long, and
    /// the first hears of that; until it is over, dialling is of no use. Gives whether their link was up.
    pub(super) fn lose_one_way(&mut self, from: Life, to: Life, micros: u64) -> bool {
        let until = self.network.one_way.entry((from, to)).or_default();
        *until = (self.now + micros).max(*until);
        let pair = Network::pair(from, to);
        let Some(link) = self.network.links.get(&pair).filter(|l| l.up) else { return false };
        self.after(IDLE, SimEvent::Silent { from, to, link: link.number });
        true
    }

    /// The processes of these slots and all others do not reach each other for a while. Gives whether a link was up between them.
    pub(super) fn part(&mut self, mask: u64, micros: u64) -> bool {
        self.network.parts.push((mask, self.now + micros));
        let between = self.network.links.keys().copied().filter(|(a, b)| self.is_parted(*a, *b, mask));
        let mut any = false;
        for (a, b) in between.collect::<Vec<(Life, Life)>>() {
            any |= self.lose_one_way(a, b, micros);
            self.lose_one_way(b, a, micros);
        }
        any
    }

    fn is_parted(&self, a: Life, b: Life, mask: u64) -> bool {
        let inside = |life| {
            let slot = self.nodes.iter().position(|n| n.as_ref().is_some_and(|n| n.life == life));
            slot.is_some_and(|slot| mask >> slot & 1 == 1)
        };
        inside(a) != inside(b)
    }

    fn parted_until(&self, a: Life, b: Life) -> u64 {
        let parts = self.network.parts.iter().filter(|(mask, _)| self.is_parted(a, b, *mask));
        parts.map(|(_, until)| *until).max().unwrap_or(0)
    }

    /// A link that was silent for too long, if it is still that one, and still silent.
    pub(super) fn silent(&mut self, from: Life, to: Life, number: u64) {
        let until = self.network.one_way.get(&(from, to)).copied().unwrap_or(0);
        let pair = Network::pair(from, to);
        if until > self.now && self.network.links.get(&pair).is_some_and(|l| l.number == number) {
            self.break_link(pair.0, pair.1, until - self.now);
        }
    }

    pub(super) fn transmit(&mut self, from: Life, to: Life, unit: Unit) -> Result<(), Broken> {
        self.connect(from, to);
        let lane = unit.lane();
        let effects = self.session(from, to).send(lane, unit);
        let kept = self.session(from, to).kept();
        self.bounded("what a session keeps", kept, c5::SESSION)?;
        self.sessioned(from, to, effects)
    }

    /// Carries out what the session that `owner` has with `peer` asks for.
    pub(super) fn sessioned(&mut self, owner: Life, peer: Life, effects: Effects<Unit>) -> Result<(), Broken> {
        for effect in effects {
            match effect {
                SessionEffect::Transmit(frame) => self.fly(owner, peer, frame),
                SessionEffect::Deliver(lane, unit) => {
                    self.delivered(owner, peer, lane)?;
                    self.receive(owner, peer, unit)?;
                    if self.alive(owner) {
                        let grant = self.session(owner, peer).consumed(lane);
                        grant.into_iter().for_each(|frame| self.fly(owner, peer, frame));
                    }
                }
            }
        }
        Ok(())
    }

    /// SE-1: no more units are delivered than a session says it has.
    fn delivered(&mut self, owner: Life, peer: Life, lane: Lane) -> Result<(), Broken> {
        let at = usize::from(lane == Lane::Bulk);
        let has = self.session(owner, peer).resume()[at];
        let delivered = &mut self.network.delivered.entry((owner, peer)).or_default()[at];
        *delivered += 1;
        let what = || format!("{delivered} {lane:?} units were delivered from {peer} to {owner}, which has {has}");
        if *delivered <= has { Ok(()) } else { Err(("session", what())) }
    }

    pub(super) fn fly(&mut self, from: Life, to: Life, frame: Frame<Unit>) {
        let (now, pair) = (self.now, Network::pair(from, to));
        // What is lost on the way is sent again until it comes, or the link breaks.
        let held = self.network.one_way.get(&(from, to)).map_or(0, |until| until.saturating_sub(now));
        let mut delay = held + 50 + self.draw(900);
        let (mut doubled, mut overtaken) = (false, false);
        for life in [from, to] {
            let Some(ill) = self.network.impaired.get(&life).copied().filter(|ill| ill.until > now) else { continue };
            match ill.how {
                Ill::Slow(more) => delay += more,
                Ill::Loses(of) if self.draws.below(of) == 0 => delay += self.draws.below(LOST),
                Ill::Doubles(of) => doubled |= self.draws.below(of) == 0,
                Ill::Mixes(of) => overtaken |= self.draws.below(of) == 0,
                Ill::Loses(_) => {}
            }
        }
        let late = if doubled { self.draws.below(2) * self.draws.below(LOST / 10) } else { 0 };
        let Some(link) = self.network.links.get_mut(&pair).filter(|l| l.up) else { return };
        let last = link.last.entry(from).or_default();
        let arrives = if overtaken {
            link.mixed = true;
            now.max(*last) + delay + LOST / 10
        } else {
            *last = (now + delay).max(*last + 1);
            *last
        };
        let (at, number) = (arrives - now, link.number);
        if let Some((kind, kill)) = self.ambush
            && kinds_of(&frame).any(|of| of == kind)
        {
            self.ambush = None;
            self.after(at / 2, SimEvent::Ambush { from, to, kind, kill });
        }
        let flight = |frame| SimEvent::Arrive(Flight { from, to, link: number, frame });
        if doubled {
            self.after(at + late, flight(frame.clone()));
        }
        self.after(at, flight(frame));
    }

    pub(super) fn arrive(&mut self, flight: Flight) -> Result<(), Broken> {
        let pair = Network::pair(flight.from, flight.to);
        let link = self.network.links.get(&pair).filter(|l| l.up && l.number == flight.link);
        let (present, mixed) = (link.is_some(), link.is_some_and(|link| link.mixed));
        let ended = !self.alive(flight.to);
        if !present || ended {
            let state = self.state();
            self.coverage.lose(&flight.frame, ended, state);
            return Ok(());
        }
        match self.session(flight.to, flight.from).on_frame(flight.frame) {
            Ok(effects) => self.sessioned(flight.to, flight.from, effects),
            // A link that does not keep the order ends (SE-4).
            Err(_) if mixed => {
                let delay = 1000 + self.draw(100_000);
                self.break_link(pair.0, pair.1, delay);
                Ok(())
            }
            Err(error) => Err(("session", error.to_string())),
        }
    }

    pub(super) fn receive(&mut self, to: Life, from: Life, unit: Unit) -> Result<(), Broken> {
        if self.root.as_ref().is_some_and(|r| r.life == to) {
            return match unit {
                Unit::Control(control) => self.root_hears(from, control),
                Unit::Bundle(bundle) => {
                    bundle.iter().for_each(|e| self.copies.heard(e.from, &e.body));
                    self.tell_root(RootEvent::Arrived(bundle))
                }
            };
        }
        match unit {
            Unit::Control(control) => self.node_hears(to, control),
            Unit::Bundle(bundle) => {
                let Some(node) = self.node_of_life(to) else { return Ok(()) };
                let (stale, before) = (c4::stale(&bundle, node.router.table()), node.router.refused());
                let actions = node.router.arrive(bundle);
                c4::refused(stale, node.router.refused() - before)?;
                let held = node.router.held();
                self.bounded("messages that wait for an epoch", held, c5::EARLY)?;
                self.perform_node(to, actions)
            }
        }
    }
}
