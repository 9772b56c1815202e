//! Fragments to a message, and that to what actors say to each other.
#![no_main]

use bytes::Bytes;
use everstep_actors::Unit;
use everstep_transport::{Assembler, Fragment};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((cut, bytes)) = bytes.split_first() else { return };
    let mut pieces = bytes.chunks(usize::from(*cut) + 1).map(Bytes::copy_from_slice).peekable();
    let mut assembler = Assembler::default();
    while let Some(piece) = pieces.next() {
        let fragment = Fragment { parts: [piece].into(), last: pieces.peek().is_none() };
        match assembler.push(&fragment) {
            Ok(None) => {}
            Ok(Some(message)) => {
                if let Ok(unit) = Unit::decode(message) {
                    let again = Unit::decode(unit.encode()).expect("what was decoded can be sent on");
                    drop(again);
                }
            }
            Err(_) => return,
        }
    }
});
