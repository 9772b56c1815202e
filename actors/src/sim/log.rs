//! The log of a simulated job: a line for each event and each thing worth a word, in order. Its hash names all that happened: equal
//! for equal seeds, on any machine and in any build.

use super::network::{Flight, Life};
use super::world::{ForRoot, SimEvent};
use crate::message::Envelope;
use crate::wire::Unit;
use everstep_transport::Frame;
use std::collections::VecDeque;
use std::fmt::{self, Write};

/// Lines that a violation tells.
const TRAIL: usize = 60;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Log {
    hasher: blake3::Hasher,
    /// All of it, if somebody wants to read it.
    pub(super) text: Option<String>,
    trail: VecDeque<String>,
}

impl Write for Log {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.hasher.update(text.as_bytes());
        if let Some(all) = &mut self.text {
            all.push_str(text);
        }
        Ok(())
    }
}

impl Log {
    /// Something worth a word happens at a microsecond.
    pub(super) fn note(&mut self, now: u64, text: &str) {
        if self.trail.len() == TRAIL {
            self.trail.pop_front();
        }
        let line = format!("{now:>10} us  {text}");
        let _ = writeln!(self, "{line}");
        self.trail.push_back(line);
    }

    /// An event happens; `number`: in the order in which they were caused.
    pub(super) fn event(&mut self, now: u64, number: u64, event: &SimEvent) {
        // Nothing that is written to is a device.
        let _ =
            write!(self, "{now:>10} {number} ").and_then(|()| self.words(event)).and_then(|()| self.write_char('\n'));
    }

    fn words(&mut self, event: &SimEvent) -> fmt::Result {
        match event {
            SimEvent::Arrive(flight) => self.flight(flight),
            SimEvent::LinkUp(a, b) => write!(self, "link {a} {b}"),
            SimEvent::Silent { from, to, link } => write!(self, "silent {from} {to} link {link}"),
            SimEvent::Ambush { from, to, kind, kill } => write!(self, "ambush {from} {to} {kind} {kill}"),
            SimEvent::Wake(life, actor, cell) => write!(self, "wake {life} {actor} {cell}"),
            SimEvent::Computed(life, actor, cell, _) => write!(self, "computed {life} {actor} {cell}"),
            SimEvent::Heartbeat(life) => self.of("heartbeat", *life),
            SimEvent::Root(life, ForRoot::Tick) => self.of("tick", *life),
            SimEvent::Root(life, ForRoot::Open) => self.of("open", *life),
            SimEvent::Root(life, ForRoot::Written) => self.of("written", *life),
            SimEvent::Root(life, ForRoot::Write) => self.of("write", *life),
            SimEvent::Root(life, ForRoot::Read(_)) => self.of("read", *life),
            SimEvent::Lost(node) => write!(self, "lost {node}"),
            SimEvent::Start(slot) => write!(self, "start {slot}"),
            SimEvent::StartRoot => self.write_str("start supervisor"),
            SimEvent::Resume(life) => self.of("resume", *life),
            SimEvent::StoreHeals => self.write_str("store heals"),
            SimEvent::Fault(fault) => write!(self, "{fault:?}"),
        }
    }

    fn of(&mut self, what: &str, life: Life) -> fmt::Result {
        write!(self, "{what} {life}")
    }

    fn flight(&mut self, Flight { from, to, link, frame }: &Flight) -> fmt::Result {
        write!(self, "{from} to {to} link {link} ")?;
        match frame {
            Frame::Grant { lane, received, limit } => write!(self, "{lane:?} grant {received} {limit}"),
            Frame::Data { lane, sequence, unit: Unit::Control(_) } => write!(self, "{lane:?} {sequence} control"),
            Frame::Data { lane, sequence, unit: Unit::Bundle(bundle) } => {
                write!(self, "{lane:?} {sequence}")?;
                let of = |Envelope { from, to, body }: &Envelope| write!(self, " {} {from} {to}", body.kind());
                bundle.iter().try_for_each(of)
            }
        }
    }

    /// The last words.
    pub(super) fn trail(&self) -> Box<[String]> {
        self.trail.iter().cloned().collect()
    }

    /// BLAKE3 of all of it, in hexadecimal.
    pub(super) fn hash(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}
