//! What travels between processes, as bytes: a version, then bincode with a limit. Tensors are not
//! encoded: their words travel beside the header, those of f32 from and into their own memory.

use crate::control::Control;
use crate::ids::Address;
use crate::message::{Body, Envelope};
use everstep_kernels::{Tensor, Words};
use everstep_transport::{HEADER_MAX, Lane, Message};
use serde::{Deserialize, Serialize};

/// Changes with every change of a wire type.
const VERSION: u8 = 10;

/// The shape of a tensor whose memory is the message's next region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Shape {
    rows: u32,
    columns: u32,
    /// Whether its elements are BF16, two of them in a word; else they are f32.
    bf16: bool,
}

impl Shape {
    fn words(self) -> Words {
        if self.bf16 { Words::Bf16 } else { Words::F32 }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Header {
    Control(Control),
    Bundle(Vec<(Address, Address, Body<Shape>)>),
}

/// What a message between processes says.
#[derive(Debug, Clone)]
pub enum Unit {
    /// About the job.
    Control(Control),
    /// Between actors.
    Bundle(Vec<Envelope>),
}

/// Bytes that are no message of the job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Another version of the program.
    #[error("a message of version {got}, this program speaks version {VERSION}")]
    Version {
        /// What it says.
        got: u8,
    },
    /// Not decodable.
    #[error("a message cannot be decoded: {0}")]
    Invalid(String),
}

impl Unit {
    /// Which lane it takes: tensors must not delay the rest.
    pub fn lane(&self) -> Lane {
        match self {
            Self::Control(_) => Lane::Control,
            Self::Bundle(bundle) if bundle.iter().any(|e| e.body.carries_tensors()) => Lane::Bulk,
            Self::Bundle(_) => Lane::Control,
        }
    }

    /// As a message. Tensors of f32 lend their memory.
    pub fn encode(self) -> Message {
        let mut regions = Vec::new();
        let header = match self {
            Self::Control(control) => Header::Control(control),
            Self::Bundle(bundle) => {
                let mut lend = |t: Tensor| {
                    let (words, region) = t.to_words();
                    regions.push(region);
                    Shape { rows: t.rows() as u32, columns: t.columns() as u32, bf16: words == Words::Bf16 }
                };
                Header::Bundle(bundle.into_iter().map(|e| (e.from, e.to, e.body.map(&mut lend))).collect())
            }
        };
        let config = bincode::config::standard().with_limit::<HEADER_MAX>();
        let mut bytes = vec![VERSION];
        bytes.extend(bincode::serde::encode_to_vec(&header, config).expect("a message of the job can be encoded"));
        Message { header: bytes.into(), regions }
    }

    /// From a message. Any message gives a unit or an error.
    pub fn decode(message: Message) -> Result<Self, WireError> {
        let invalid = |reason: String| WireError::Invalid(reason);
        let (version, body) = message.header.split_first().ok_or_else(|| invalid("it is empty".to_owned()))?;
        if *version != VERSION {
            return Err(WireError::Version { got: *version });
        }
        let config = bincode::config::standard().with_limit::<HEADER_MAX>();
        let (header, used): (Header, usize) =
            bincode::serde::decode_from_slice(body, config).map_err(|e| invalid(e.to_string()))?;
        if used != body.len() {
            return Err(invalid(format!("{} bytes follow it", body.len() - used)));
        }
        let mut regions = message.regions.into_iter();
        let mut wrong = None;
        let mut take = |shape: Shape| {
            let (rows, columns) = (shape.rows as usize, shape.columns as usize);
            let words = rows.checked_mul(columns).map(|elements| shape.words().count(elements));
            let region = regions.next().filter(|r| Some(r.len()) == words);
            if region.is_none() {
                wrong = Some(format!("no memory for a tensor of {rows} x {columns}"));
            }
            region.map_or_else(
                || Tensor::from_vec(0, 0, Vec::new()),
                |r| Tensor::from_words(rows, columns, shape.words(), r),
            )
        };
        let unit = match header {
            Header::Control(control) => Self::Control(control),
            Header::Bundle(bundle) => {
                let envelope = |(from, to, body): (_, _, Body<Shape>)| Envelope { from, to, body: body.map(&mut take) };
                Self::Bundle(bundle.into_iter().map(envelope).collect())
            }
        };
        if let Some(reason) = wrong {
            return Err(invalid(reason));
        }
        if regions.next().is_some() { Err(invalid("more memory than tensors".to_owned())) } else { Ok(unit) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ActorId, Incarnation};
    use crate::message::{Pass, Turn};
    use everstep_kernels::Bf16;
    use std::sync::Arc;

    fn bundle() -> Vec<Envelope> {
        let address = |actor| Address { actor, incarnation: Incarnation(3) };
        let turn = Turn { step: 4, lane: 1, micro_batch: 0 };
        let rows = |n: usize| Tensor::from_vec(n, 2, vec![1.5; 2 * n]);
        let low = Tensor::bf16(3, 3, Arc::new((0..9).map(Bf16).collect()));
        vec![
            Envelope {
                from: address(ActorId::Stage { lane: 1, stage: 0 }),
                to: address(ActorId::Expert { layer: 1, expert: 2 }),
                body: Body::Rows { turn, pass: Pass::Forward, rows: rows(3) },
            },
            Envelope {
                from: address(ActorId::Stage { lane: 1, stage: 0 }),
                to: address(ActorId::Expert { layer: 1, expert: 3 }),
                body: Body::Rows { turn, pass: Pass::Forward, rows: rows(0) },
            },
            Envelope {
                from: address(ActorId::Stage { lane: 1, stage: 0 }),
                to: address(ActorId::Expert { layer: 1, expert: 4 }),
                body: Body::Rows { turn, pass: Pass::Backward, rows: low },
            },
        ]
    }

    #[test]
    fn bundles_are_read_as_they_are_written_without_a_copy() {
        let before = bundle();
        let message = Unit::Bundle(before.clone()).encode();
        assert!(Arc::ptr_eq(
            &message.regions[0],
            match &before[0].body {
                Body::Rows { rows, .. } => rows.as_host().unwrap(),
                _ => unreachable!(),
            }
        ));
        let Unit::Bundle(after) = Unit::decode(message).unwrap() else { panic!("a bundle") };
        assert_eq!(format!("{after:?}"), format!("{before:?}"));
    }

    proptest::proptest! {
        /// Any bytes give a unit or an error, never a panic; a length that lies takes no memory.
        #[test]
        fn garbage_is_an_error(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300), words in 0usize..9) {
            let mut header = vec![VERSION];
            header.extend(bytes);
            let _ = Unit::decode(Message { header: header.into(), regions: vec![Arc::new(vec![0.0; words])] });
        }

        /// A changed byte of a good message gives a unit or an error, never a panic.
        #[test]
        fn a_changed_byte_is_no_panic(at in 0usize..1000, byte in proptest::prelude::any::<u8>()) {
            let message = Unit::Bundle(bundle()).encode();
            let mut header = message.header.to_vec();
            let at = at % header.len();
            header[at] = byte;
            let _ = Unit::decode(Message { header: header.into(), ..message });
        }
    }

    #[test]
    fn damaged_messages_are_errors() {
        let good = Unit::Bundle(bundle()).encode();
        for cut in 0..good.header.len() {
            assert!(Unit::decode(Message { header: good.header.slice(..cut), regions: good.regions.clone() }).is_err());
        }
        let mut version = good.header.to_vec();
        version[0] = VERSION + 1;
        assert_eq!(
            Unit::decode(Message { header: version.into(), ..good.clone() }).unwrap_err(),
            WireError::Version { got: VERSION + 1 }
        );
        let mut short = good.clone();
        short.regions.pop();
        assert!(Unit::decode(short).is_err());
        let mut long = good;
        long.regions.push(Arc::new(vec![0.0]));
        assert!(Unit::decode(long).is_err());
    }
}
