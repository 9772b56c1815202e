//! Frames as bytes on a stream.
//!
//! Data: `1`, lane, number (u64), whether it is the last fragment, length (u32), bytes.
//! Grant: `2`, lane, received (u64), limit (u64). All little-endian.

use crate::message::{FRAGMENT_MAX, Fragment, Parts};
use crate::session::{Frame, Lane};
use bytes::{BufMut, Bytes, BytesMut};
use std::mem::take;

/// Bytes of a data frame before its payload, with the kind.
const DATA_HEAD: usize = 15;
/// Bytes of a grant, with the kind.
const GRANT: usize = 18;
/// Bytes of a payload's parts that go, or are kept, with what is before and after them in one piece.
const SHORT: usize = 1024;

/// Bytes that are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first byte of a frame is no kind.
    #[error("a frame starts with {0}, expected 1 or 2")]
    Kind(u8),
    /// The lane is none.
    #[error("a frame names lane {0}, expected 0 or 1")]
    Lane(u8),
    /// A fragment is too long.
    #[error("a fragment claims {got} bytes, the limit is {FRAGMENT_MAX}")]
    TooLong {
        /// What it claims.
        got: usize,
    },
}

/// Bytes of a frame's begin, by its kind.
fn head_length(kind: u8) -> Result<usize, FrameError> {
    match kind {
        1 => Ok(DATA_HEAD),
        2 => Ok(GRANT),
        other => Err(FrameError::Kind(other)),
    }
}

fn lane(byte: u8) -> Result<Lane, FrameError> {
    match byte {
        0 => Ok(Lane::Control),
        1 => Ok(Lane::Bulk),
        other => Err(FrameError::Lane(other)),
    }
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().expect("eight bytes"))
}

/// Takes frames off a stream, in whatever pieces it comes. Payloads are slices of the pieces; what is held is of one frame.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    head: [u8; GRANT],
    /// Bytes of the head that came.
    have: usize,
    payload: Option<Payload>,
}

/// The payload of a data frame whose head has come.
#[derive(Debug)]
struct Payload {
    lane: Lane,
    sequence: u64,
    missing: usize,
    unit: Fragment,
}

impl FrameReader {
    /// Takes from a piece what belongs to the next frame. None: the whole piece does, and more is to come.
    pub(crate) fn next(&mut self, piece: &mut Bytes) -> Result<Option<Frame<Fragment>>, FrameError> {
        loop {
            if let Some(Payload { missing, unit, .. }) = &mut self.payload {
                let part = piece.split_to(piece.len().min(*missing));
                *missing -= part.len();
                match unit.parts.last_mut() {
                    _ if part.is_empty() => {}
                    // A part may keep a whole datagram: many short ones are not kept.
                    Some(last) if last.len() + part.len() <= SHORT => *last = [&last[..], &part].concat().into(),
                    _ => unit.parts.push(part),
                }
                let whole = self.payload.take_if(|payload| payload.missing == 0);
                return Ok(whole.map(|Payload { lane, sequence, unit, .. }| Frame::Data { lane, sequence, unit }));
            }
            let wanted = if self.have == 0 { 1 } else { head_length(self.head[0])? };
            let part = piece.split_to(piece.len().min(wanted - self.have));
            self.head[self.have..][..part.len()].copy_from_slice(&part);
            self.have += part.len();
            if self.have < wanted {
                return Ok(None);
            }
            if self.have > 1
                && let Some(grant) = self.begin()?
            {
                return Ok(Some(grant));
            }
        }
    }

    /// The head is there: that of a payload, or a whole grant.
    fn begin(&mut self) -> Result<Option<Frame<Fragment>>, FrameError> {
        self.have = 0;
        let (lane, rest) = (lane(self.head[1])?, &self.head[2..]);
        if self.head[0] == 2 {
            return Ok(Some(Frame::Grant { lane, received: number(rest), limit: number(&rest[8..]) }));
        }
        let missing = u32::from_le_bytes(*rest[9..].first_chunk().expect("four bytes")) as usize;
        if missing > FRAGMENT_MAX {
            return Err(FrameError::TooLong { got: missing });
        }
        let unit = Fragment { parts: Parts::new(), last: rest[8] != 0 };
        self.payload = Some(Payload { lane, sequence: number(rest), missing, unit });
        Ok(None)
    }
}

/// Frames as pieces to be written one after another. Long parts of payloads are not copied.
pub(crate) fn encode(frames: impl IntoIterator<Item = Frame<Fragment>>) -> Vec<Bytes> {
    let (mut pieces, mut open) = (Vec::new(), BytesMut::new());
    let byte = |lane| if lane == Lane::Control { 0 } else { 1 };
    for frame in frames {
        match frame {
            Frame::Grant { lane, received, limit } => {
                open.put_slice(&[2, byte(lane)]);
                open.put_u64_le(received);
                open.put_u64_le(limit);
            }
            Frame::Data { lane, sequence, unit } => {
                open.put_slice(&[1, byte(lane)]);
                open.put_u64_le(sequence);
                open.put_u8(u8::from(unit.last));
                open.put_u32_le(unit.len() as u32);
                for part in unit.parts {
                    if part.len() <= SHORT {
                        open.put_slice(&part);
                    } else {
                        pieces.extend([take(&mut open).freeze(), part]);
                    }
                }
            }
        }
    }
    if !open.is_empty() {
        pieces.push(open.freeze());
    }
    pieces
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use smallvec::smallvec;

    fn frame() -> impl Strategy<Value = Frame<Fragment>> {
        let lane = || prop::sample::select(&Lane::ALL[..]);
        let grant = (lane(), any::<u64>(), any::<u64>());
        let data = (lane(), any::<u64>(), any::<bool>(), prop::collection::vec(0..3 * SHORT, 0..4));
        prop_oneof![
            grant.prop_map(|(lane, received, limit)| Frame::Grant { lane, received, limit }),
            data.prop_map(|(lane, sequence, last, lengths)| {
                let parts = lengths.into_iter().map(|length| Bytes::from_iter((0..length).map(|n| n as u8))).collect();
                Frame::Data { lane, sequence, unit: Fragment { parts, last } }
            }),
        ]
    }

    /// Parts do not survive: only their bytes do.
    pub(crate) fn joined(frame: Frame<Fragment>) -> Frame<Fragment> {
        match frame {
            Frame::Data { lane, sequence, unit } => {
                let parts = smallvec![unit.parts.concat().into()];
                Frame::Data { lane, sequence, unit: Fragment { parts, last: unit.last } }
            }
            grant => grant,
        }
    }

    fn read(pieces: impl IntoIterator<Item = Bytes>) -> Result<Vec<Frame<Fragment>>, FrameError> {
        let (mut reader, mut frames) = (FrameReader::default(), Vec::new());
        for mut piece in pieces {
            while let Some(frame) = reader.next(&mut piece)? {
                if let Frame::Data { unit, .. } = &frame {
                    assert!(unit.parts.len() <= 2 * unit.len() / SHORT + 2, "{} parts", unit.parts.len());
                }
                frames.push(joined(frame));
            }
            assert!(piece.is_empty());
        }
        Ok(frames)
    }

    proptest! {
        #[test]
        fn frames_are_read_as_they_are_written(frames in prop::collection::vec(frame(), 0..5), cut in 1..2000usize) {
            let bytes: Bytes = encode(frames.clone()).concat().into();
            let want: Vec<_> = frames.into_iter().map(joined).collect();
            prop_assert_eq!(&read(bytes.chunks(cut).map(Bytes::copy_from_slice)).unwrap(), &want);
            prop_assert_eq!(&read([bytes]).unwrap(), &want);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(0..4u8, 0..200)) {
            let _ = read([bytes.into()]);
        }
    }

    #[test]
    fn garbage_is_refused() {
        let one = |bytes: &[u8]| read([Bytes::copy_from_slice(bytes)]);
        assert_eq!(one(&[9]).unwrap_err(), FrameError::Kind(9));
        let mut head = [0; DATA_HEAD];
        (head[0], head[1]) = (1, 3);
        assert_eq!(one(&head).unwrap_err(), FrameError::Lane(3));
        (head[1], head[14]) = (0, 255);
        assert!(matches!(one(&head), Err(FrameError::TooLong { .. })));
    }
}
