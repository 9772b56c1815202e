//! Frames as bytes on a stream.
//!
//! Data: `1`, lane, number (u64), whether it is the last fragment, length (u32), bytes.
//! Grant: `2`, lane, received (u64), limit (u64). All little-endian.

use crate::message::{FRAGMENT_MAX, Fragment};
use crate::session::{Frame, Lane};
use bytes::{BufMut, Bytes, BytesMut};

/// Bytes of a data frame before its payload, without the kind.
pub(crate) const DATA_HEAD: usize = 14;
/// Bytes of a grant, without the kind.
pub(crate) const GRANT: usize = 17;

/// What a stream starts a frame with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Grant,
}

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

pub(crate) fn kind(byte: u8) -> Result<Kind, FrameError> {
    match byte {
        1 => Ok(Kind::Data),
        2 => Ok(Kind::Grant),
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

/// Lane, number, whether it is the last, and length of a data frame.
pub(crate) fn data_head(b: &[u8; DATA_HEAD]) -> Result<(Lane, u64, bool, usize), FrameError> {
    let got = u32::from_le_bytes(*b[10..].first_chunk().expect("four bytes")) as usize;
    if got > FRAGMENT_MAX {
        return Err(FrameError::TooLong { got });
    }
    Ok((lane(b[0])?, number(&b[1..]), b[9] != 0, got))
}

pub(crate) fn grant(b: &[u8; GRANT]) -> Result<Frame<Fragment>, FrameError> {
    Ok(Frame::Grant { lane: lane(b[0])?, received: number(&b[1..]), limit: number(&b[9..]) })
}

/// A frame as pieces to be written one after another; payloads are not copied.
pub(crate) fn encode(frame: Frame<Fragment>) -> Vec<Bytes> {
    let mut head = BytesMut::with_capacity(18);
    let byte = |lane| if lane == Lane::Control { 0 } else { 1 };
    match frame {
        Frame::Grant { lane, received, limit } => {
            head.put_slice(&[2, byte(lane)]);
            head.put_u64_le(received);
            head.put_u64_le(limit);
            vec![head.freeze()]
        }
        Frame::Data { lane, sequence, unit } => {
            head.put_slice(&[1, byte(lane)]);
            head.put_u64_le(sequence);
            head.put_u8(u8::from(unit.last));
            head.put_u32_le(unit.len() as u32);
            std::iter::once(head.freeze()).chain(unit.parts).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_are_written() {
        let unit = Fragment { parts: vec![Bytes::from_static(b"ab"), Bytes::from_static(b"c")], last: true };
        let bytes = encode(Frame::Data { lane: Lane::Bulk, sequence: 7, unit }).concat();
        assert_eq!(kind(bytes[0]), Ok(Kind::Data));
        assert_eq!(data_head(bytes[1..].first_chunk().unwrap()), Ok((Lane::Bulk, 7, true, 3)));
        let frame = Frame::Grant { lane: Lane::Control, received: 5, limit: 1 << 40 };
        let bytes = encode(frame.clone()).concat();
        assert_eq!(kind(bytes[0]), Ok(Kind::Grant));
        assert_eq!(grant(bytes[1..].first_chunk().unwrap()), Ok(frame));
    }

    #[test]
    fn garbage_is_refused() {
        assert_eq!(kind(9), Err(FrameError::Kind(9)));
        let mut head = [0; DATA_HEAD];
        head[0] = 3;
        assert_eq!(data_head(&head), Err(FrameError::Lane(3)));
        head[13] = 255;
        assert!(matches!(data_head(&head), Err(FrameError::TooLong { .. })));
    }
}
