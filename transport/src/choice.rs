//! Which way a session takes, as a pure core on each end of its connection: QUIC first, RDMA once it is proven, QUIC again when that
//! fails, and RDMA again later.
//!
//! ```text
//! dialler                               other
//!   Offer                  ->
//!                          <-  Listen(token, addresses), or Decline
//!   connects with the token, both prove the path with probes
//!                          <-  Proven(what its session has): it rests
//!   rests; Go(what its session has), goes on over RDMA
//!                          ->  goes on over RDMA
//! ```
//! - CH-1: a session rests from when it says what it has until it goes on with what the other has: so nothing is lost or repeated.
//! - CH-2: whoever finds RDMA of no use says so; then the dialler opens new streams, and both go on over QUIC.
//! - CH-3: what is said of an earlier round changes nothing.
//! - CH-4: no state but the two ways lasts longer than [`ROUND`], and no state in which a session rests longer than [`REST`].
//! - CH-5: after a failure RDMA is tried again, at first after [`FIRST`], then after twice as long each time, up to [`LONGEST`]; and after
//!   [`FIRST`] again if it was of use for longer than it was waited for.

use crate::side::{Greeting, Said, Token};
use std::net::SocketAddr;
use std::time::Duration;

/// A path must be proven by then.
const ROUND: Duration = Duration::from_secs(5);
/// A session that rests goes on by then, or its connection is given up: sooner than its silence would be taken for a death.
const REST: Duration = Duration::from_millis(250);
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// The way that a session takes, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Over QUIC: RDMA was not tried, or why it is not used.
    Quic(Option<String>),
    /// Over RDMA, with this device.
    Rdma(String),
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Quic(None) => f.write_str("quic"),
            Self::Quic(Some(why)) => write!(f, "quic ({why})"),
            Self::Rdma(device) => write!(f, "rdma ({device})"),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// The session goes on over QUIC.
    Linked,
    /// The other end said something of a round.
    Said(u32, Said),
    /// The path that is tried is proven, with this device.
    Proven(String),
    /// It cannot be made, or has ended.
    Failed(String),
    /// The session rests, with this.
    Rests(Greeting),
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Say it of a round.
    Say(u32, Said),
    /// Wait for who comes over RDMA, and say where (with [`Said::Listen`], of that round).
    Listen(u32),
    /// Connect over RDMA.
    Dial(Vec<SocketAddr>, Token),
    /// Let the session rest.
    Rest,
    /// The session goes on over the path that was tried; the other end has this.
    Take(Greeting),
    /// The path that was tried or taken is not needed any more.
    Drop,
    /// Open new streams: the session goes on over QUIC.
    Return,
    /// Give the connection up.
    Close,
    /// Tell operators.
    Tell(Way),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Over QUIC; the dialler tries RDMA at this time.
    Quic(Option<Duration>),
    /// Offered.
    Asked,
    /// The path is made and proven. Whether this end has; what the other rests with, if it has.
    Trying(Option<String>, Option<Greeting>),
    /// The session will rest. The device, and what the other rests with: only the dialler knows.
    Stopping(String, Option<Greeting>),
    /// The session rests until the dialler goes.
    Resting(String),
    /// Over RDMA, since.
    Rdma(Duration),
    /// Back to QUIC: until there are streams.
    Returning,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Choice {
    dials: bool,
    /// Why this end has no RDMA, if it has none.
    unable: Option<String>,
    round: u32,
    state: State,
    since: Duration,
    failures: u32,
    /// Why the last try failed.
    why: Option<String>,
}

impl Choice {
    /// Of one end, which can do RDMA, or why it cannot.
    pub(crate) fn new(dials: bool, unable: Option<String>) -> Self {
        Self { dials, unable, round: 0, state: State::Returning, since: Duration::ZERO, failures: 0, why: None }
    }

    /// When to call with [`Event::Tick`].
    pub(crate) fn deadline(&self) -> Option<Duration> {
        match self.state {
            State::Quic(again) => again,
            State::Rdma(_) => None,
            State::Asked | State::Trying(..) => Some(self.since + ROUND),
            State::Stopping(..) | State::Resting(_) | State::Returning => Some(self.since + REST),
        }
    }

    fn enter(&mut self, now: Duration, state: State) {
        self.state = state;
        self.since = now;
    }

    /// An event.
    pub(crate) fn on(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        match event {
            Event::Linked => self.linked(now),
            Event::Said(round, said) => self.said(now, round, said),
            Event::Proven(device) => self.proven(now, device),
            Event::Failed(why) => self.fail(now, why, true),
            Event::Rests(greeting) => self.rests(now, greeting),
            Event::Tick if self.deadline().is_some_and(|at| at <= now) => self.tick(now),
            Event::Tick => Vec::new(),
        }
    }

    fn linked(&mut self, now: Duration) -> Vec<Effect> {
        let able = self.dials && self.unable.is_none();
        self.enter(now, State::Quic(able.then_some(now + self.wait())));
        // The dialler may have given a round up of which this end does not know yet.
        vec![Effect::Drop, Effect::Tell(Way::Quic(self.why.clone().or(self.unable.clone())))]
    }

    /// How long RDMA is not tried after so many failures.
    fn wait(&self) -> Duration {
        match self.failures {
            0 => Duration::ZERO,
            n => FIRST.saturating_mul(1 << (n - 1).min(10)).min(LONGEST),
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Effect> {
        match self.state {
            State::Quic(_) => {
                self.round += 1;
                self.enter(now, State::Asked);
                vec![Effect::Say(self.round, Said::Offer)]
            }
            State::Returning => {
                self.since = now;
                vec![Effect::Close]
            }
            State::Asked | State::Trying(..) => {
                self.fail(now, format!("no way over RDMA was found in {ROUND:?}"), true)
            }
            State::Stopping(..) | State::Resting(_) => self.fail(now, format!("it was not taken in {REST:?}"), true),
            State::Rdma(_) => Vec::new(),
        }
    }

    fn said(&mut self, now: Duration, round: u32, said: Said) -> Vec<Effect> {
        if !self.dials && said == Said::Offer && round > self.round {
            return self.offered(now, round);
        }
        // CH-3.
        if round != self.round {
            return Vec::new();
        }
        match (said, self.state.clone()) {
            (Said::Listen(token, addresses), State::Asked) if self.dials => {
                self.enter(now, State::Trying(None, None));
                vec![Effect::Dial(addresses, token)]
            }
            (Said::Decline(why), State::Asked) => {
                let why = format!("the other side: {why}");
                // It is asked again, but seldom.
                self.enter(now, State::Quic(Some(now + LONGEST)));
                self.why = Some(why.clone());
                vec![Effect::Tell(Way::Quic(Some(why)))]
            }
            (Said::Proven(theirs), State::Trying(device, None)) if self.dials => self.both(now, device, Some(theirs)),
            (Said::Go(theirs), State::Resting(device)) => {
                self.enter(now, State::Rdma(now));
                vec![Effect::Take(theirs), Effect::Tell(Way::Rdma(device))]
            }
            (Said::Back(why), _) => self.fail(now, format!("the other side: {why}"), false),
            // An end that has given the round up says so by itself.
            _ => Vec::new(),
        }
    }

    fn offered(&mut self, now: Duration, round: u32) -> Vec<Effect> {
        self.round = round;
        // The dialler has begun again: its last round is over.
        let mut effects = vec![Effect::Drop];
        match &self.unable {
            Some(why) => effects.push(Effect::Say(round, Said::Decline(why.clone()))),
            None => {
                self.enter(now, State::Trying(None, None));
                effects.push(Effect::Listen(round));
            }
        }
        effects
    }

    fn proven(&mut self, now: Duration, device: String) -> Vec<Effect> {
        match &self.state {
            State::Trying(None, theirs) => {
                let theirs = *theirs;
                self.both(now, Some(device), theirs)
            }
            _ => Vec::new(),
        }
    }

    /// CH-1: the other end rests first, then the dialler.
    fn both(&mut self, now: Duration, device: Option<String>, theirs: Option<Greeting>) -> Vec<Effect> {
        match (device, theirs) {
            (Some(device), theirs) if !self.dials || theirs.is_some() => {
                self.enter(now, State::Stopping(device, theirs));
                vec![Effect::Rest]
            }
            (device, theirs) => {
                self.state = State::Trying(device, theirs);
                Vec::new()
            }
        }
    }

    fn rests(&mut self, now: Duration, greeting: Greeting) -> Vec<Effect> {
        match self.state.clone() {
            State::Stopping(device, Some(theirs)) => {
                self.enter(now, State::Rdma(now));
                let go = Effect::Say(self.round, Said::Go(greeting));
                vec![go, Effect::Take(theirs), Effect::Tell(Way::Rdma(device))]
            }
            State::Stopping(device, None) => {
                self.enter(now, State::Resting(device));
                vec![Effect::Say(self.round, Said::Proven(greeting))]
            }
            _ => Vec::new(),
        }
    }

    /// CH-2.
    fn fail(&mut self, now: Duration, why: String, say: bool) -> Vec<Effect> {
        let mut effects = Vec::new();
        match self.state {
            State::Quic(_) | State::Returning => return effects,
            State::Rdma(since) if now - since > self.wait() => self.failures = 1,
            _ => self.failures += 1,
        }
        if say {
            effects.push(Effect::Say(self.round, Said::Back(why.clone())));
        }
        self.why = Some(why);
        effects.push(Effect::Drop);
        self.enter(now, State::Returning);
        // The other end may rest already: then its streams are closed.
        if self.dials {
            effects.push(Effect::Return);
        }
        effects
    }
}

#[cfg(test)]
mod tests;
