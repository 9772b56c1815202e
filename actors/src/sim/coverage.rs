//! What a generator of faults has reached: kinds of faults that met something, which messages were lost to what and in which state of
//! the job, and how long queues became. What is missing is what it is blind for.

use super::plan::Fault;
use crate::control::Control;
use crate::message::Body;
use crate::wire::Unit;
use everstep_transport::Frame;
use std::collections::BTreeMap;

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Faults by kind: those that met something.
    pub faults: BTreeMap<&'static str, u64>,
    /// Faults that met nothing: their process was not there, their message never came.
    pub missed: u64,
    /// Faults that were due when the job was over.
    pub late: u64,
    /// Messages that were on their way, by kind, by what they were lost to, and by what the job was doing.
    pub lost: BTreeMap<(&'static str, &'static str, State), u64>,
    /// The most that each queue held.
    pub lengths: BTreeMap<&'static str, usize>,
    /// Jobs that ended because nobody held their state and no checkpoint was whole.
    pub nothing_left: u64,
}

/// What a job is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It has no supervisor.
    Headless,
    /// Nobody has its state: it begins, or goes back to a checkpoint.
    Stateless,
    /// Somebody has a new life or place, and no step was committed since.
    Recovering,
    /// None of these.
    Stepping,
}

impl State {
    const ALL: [(Self, &str); 4] = [
        (Self::Headless, "without a supervisor"),
        (Self::Stateless, "without a state"),
        (Self::Recovering, "in a new epoch"),
        (Self::Stepping, "in a step"),
    ];
}

/// What messages are lost to.
const TO: [&str; 2] = ["their link", "their receiver's end"];

/// What nodes and the supervisor's process say to each other in a simulated job.
const CONTROLS: [&str; 8] = ["join", "return", "welcome", "table", "leave", "fence", "heartbeat", "actor failed"];
const GRANT: &str = "grant";

/// All kinds of messages of a simulated job.
pub(super) fn kinds() -> impl Iterator<Item = &'static str> {
    Body::<()>::KINDS.into_iter().chain(CONTROLS)
}

/// The kinds of what a frame carries.
pub(super) fn kinds_of(frame: &Frame<Unit>) -> impl Iterator<Item = &'static str> {
    let (bundle, other) = match frame {
        Frame::Data { unit: Unit::Bundle(bundle), .. } => (&bundle[..], None),
        Frame::Data { unit: Unit::Control(control), .. } => (&[][..], Some(kind(control))),
        Frame::Grant { .. } => (&[][..], Some(GRANT)),
    };
    bundle.iter().map(|e| e.body.kind()).chain(other)
}

fn kind(control: &Control) -> &'static str {
    let at = match control {
        Control::Join { .. } => 0,
        Control::Return { .. } => 1,
        Control::Welcome { .. } => 2,
        Control::Table(_) => 3,
        Control::Leave { .. } => 4,
        Control::Fence => 5,
        Control::Heartbeat { .. } => 6,
        Control::ActorFailed { .. } => 7,
        other => unreachable!("nobody says {other:?} in a simulated job"),
    };
    CONTROLS[at]
}

impl Coverage {
    pub(super) fn fault(&mut self, fault: Fault) {
        *self.faults.entry(fault.kind()).or_default() += 1;
    }

    /// A frame on its way is lost: to its link, or to the end of its receiver.
    pub(super) fn lose(&mut self, frame: &Frame<Unit>, receiver_ended: bool, state: State) {
        let to = TO[usize::from(receiver_ended)];
        kinds_of(frame).for_each(|kind| *self.lost.entry((kind, to, state)).or_default() += 1);
    }

    pub(super) fn length(&mut self, what: &'static str, length: usize) {
        let most = self.lengths.entry(what).or_default();
        *most = length.max(*most);
    }

    /// Adds another seed's.
    pub fn add(&mut self, other: &Self) {
        other.faults.iter().for_each(|(kind, n)| *self.faults.entry(kind).or_default() += n);
        self.missed += other.missed;
        self.late += other.late;
        self.nothing_left += other.nothing_left;
        other.lost.iter().for_each(|(key, n)| *self.lost.entry(*key).or_default() += n);
        other.lengths.iter().for_each(|(what, n)| self.length(what, *n));
    }

    /// All that there could be, with how often it was: faults, then messages, by what they were lost to and when; then the longest
    /// queues.
    pub fn table(&self) -> Vec<(String, u64)> {
        let of_kind = |kind| self.faults.get(kind).copied().unwrap_or(0);
        let faults = Fault::KINDS.into_iter().map(|kind| (kind.to_owned(), of_kind(kind)));
        let others = [
            ("faults that met nothing".to_owned(), self.missed),
            ("faults that were due when the job was over".to_owned(), self.late),
            ("jobs of which nothing was left".to_owned(), self.nothing_left),
        ];
        let lost =
            kinds().chain([GRANT]).flat_map(|kind| TO.map(|to| State::ALL.map(|state| (kind, to, state)))).flatten();
        let lost = lost.map(|(kind, to, (state, words))| {
            let times = self.lost.get(&(kind, to, state)).copied().unwrap_or(0);
            (format!("{kind} lost to {to} {words}"), times)
        });
        let lengths = self.lengths.iter().map(|(what, most)| (format!("at most: {what}"), *most as u64));
        faults.chain(others).chain(lost).chain(lengths).collect()
    }
}
