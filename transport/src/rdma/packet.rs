//! What goes through an RDMA link's queue pair, as bytes.
//!
//! A packet (one SEND): credits (u16), numbers of grants (u8) and of words (u8), grants, words, then bytes of the control lane's stream
//! up to its end. A grant: slot (u8), address (u64), key (u32). A word (u32) is what comes with a WRITE as its immediate word, or in a
//! packet after it where devices have none (iWARP): bits 0 to 19 length, 20 whether the message ends here, 21 whether it is the probe, 24
//! to 31 the slot. All little-endian.

use crate::message::FRAGMENT_MAX;
use bytes::{Buf, BufMut, BytesMut};

/// Bytes of a packet at most: of a receive buffer.
pub(crate) const PACKET: usize = 8192;
/// Slots of a link: half the window of the bulk lane, so that a link has no more memory than one over QUIC.
pub(crate) const SLOTS: usize = 32;

const HEAD: usize = 4;
const WORD: usize = 4;
const GRANT: usize = 13;
/// Grants in one packet, so that there is room for the stream beside them.
pub(crate) const GRANTS_MAX: usize = SLOTS;
/// Bytes of the stream that a packet takes beside so many grants and words.
pub(crate) const fn room(grants: usize, words: usize) -> usize {
    PACKET - HEAD - GRANT * grants - WORD * words
}

/// Room in the receiver's memory for one fragment, until it is written or the link ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotGrant {
    pub(crate) slot: u8,
    pub(crate) address: u64,
    pub(crate) key: u32,
}

/// One SEND.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Packet {
    /// Receive buffers that are there again.
    pub(crate) credits: u16,
    pub(crate) grants: Vec<SlotGrant>,
    /// Of writes that have gone before.
    pub(crate) words: Vec<u32>,
    /// The next bytes of the control lane.
    pub(crate) stream: BytesMut,
}

/// Bytes or an immediate word that no correct peer sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PacketError {
    #[error("a packet of {0} bytes, expected {HEAD} to {PACKET}")]
    Length(usize),
    #[error("a packet claims {0} grants of slots or words of writes, the limit is {GRANTS_MAX}")]
    Grants(usize),
    #[error("a packet claims {claimed} bytes of grants and words and has {got}")]
    Short { claimed: usize, got: usize },
    #[error("a slot {0} is granted or written, expected one below {SLOTS}")]
    Slot(u8),
    #[error("a write claims {0} bytes, the limit is {FRAGMENT_MAX}")]
    TooLong(u32),
}

impl Packet {
    /// Writes the packet to the front of a buffer; gives its length.
    pub(crate) fn write(&self, mut buffer: &mut [u8]) -> usize {
        let all = buffer.len();
        buffer.put_u16_le(self.credits);
        buffer.put_u8(self.grants.len() as u8);
        buffer.put_u8(self.words.len() as u8);
        for grant in &self.grants {
            buffer.put_u8(grant.slot);
            buffer.put_u64_le(grant.address);
            buffer.put_u32_le(grant.key);
        }
        self.words.iter().for_each(|word| buffer.put_u32_le(*word));
        buffer.put_slice(&self.stream);
        all - buffer.len()
    }

    /// Whether there is more in it than credits.
    pub(crate) fn is_answered(&self) -> bool {
        !(self.grants.is_empty() && self.words.is_empty() && self.stream.is_empty())
    }

    /// Reads one.
    pub(crate) fn read(mut bytes: &[u8]) -> Result<Self, PacketError> {
        if !(HEAD..=PACKET).contains(&bytes.len()) {
            return Err(PacketError::Length(bytes.len()));
        }
        let credits = bytes.get_u16_le();
        let (grants, words) = (usize::from(bytes.get_u8()), usize::from(bytes.get_u8()));
        if grants.max(words) > GRANTS_MAX {
            return Err(PacketError::Grants(grants.max(words)));
        }
        let claimed = GRANT * grants + WORD * words;
        if bytes.len() < claimed {
            return Err(PacketError::Short { claimed, got: bytes.len() });
        }
        let mut grant = || {
            let slot = in_range(bytes.get_u8())?;
            Ok(SlotGrant { slot, address: bytes.get_u64_le(), key: bytes.get_u32_le() })
        };
        let grants = (0..grants).map(|_| grant()).collect::<Result<_, _>>()?;
        let words = (0..words).map(|_| bytes.get_u32_le()).collect();
        Ok(Self { credits, grants, words, stream: bytes.into() })
    }
}

fn in_range(slot: u8) -> Result<u8, PacketError> {
    if usize::from(slot) < SLOTS { Ok(slot) } else { Err(PacketError::Slot(slot)) }
}

/// What comes with a WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Immediate {
    pub(crate) slot: u8,
    /// Bytes that were written to the slot's begin.
    pub(crate) length: u32,
    /// Whether the message ends here.
    pub(crate) last: bool,
    /// Whether it is no fragment, but what proves the path.
    pub(crate) probe: bool,
}

impl From<Immediate> for u32 {
    fn from(i: Immediate) -> Self {
        Self::from(i.slot) << 24 | Self::from(i.probe) << 21 | Self::from(i.last) << 20 | i.length
    }
}

impl TryFrom<u32> for Immediate {
    type Error = PacketError;

    fn try_from(word: u32) -> Result<Self, PacketError> {
        let length = word & 0xF_FFFF;
        if length as usize > FRAGMENT_MAX {
            return Err(PacketError::TooLong(length));
        }
        let slot = in_range((word >> 24) as u8)?;
        Ok(Self { slot, length, last: word >> 20 & 1 == 1, probe: word >> 21 & 1 == 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn grants() -> impl Strategy<Value = Vec<SlotGrant>> {
        let grant = (0..SLOTS as u8, any::<u64>(), any::<u32>());
        prop::collection::vec(grant.prop_map(|(slot, address, key)| SlotGrant { slot, address, key }), 0..=GRANTS_MAX)
    }

    proptest! {
        #[test]
        fn packets_are_read_as_they_are_written(
            credits: u16,
            grants in grants(),
            words in prop::collection::vec(any::<u32>(), 0..=GRANTS_MAX),
            length: prop::sample::Index,
        ) {
            let stream = BytesMut::from_iter((0..length.index(room(grants.len(), words.len()) + 1)).map(|n| n as u8));
            let packet = Packet { credits, grants, words, stream };
            let mut buffer = [0; PACKET];
            let written = packet.write(&mut buffer);
            prop_assert_eq!(Packet::read(&buffer[..written]), Ok(packet));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000), word: u32) {
            if let Ok(packet) = Packet::read(&bytes) {
                let mut buffer = [0; PACKET];
                let written = packet.write(&mut buffer);
                prop_assert_eq!(&buffer[..written], &bytes[..]);
            }
            if let Ok(immediate) = Immediate::try_from(word) {
                prop_assert_eq!(Immediate::try_from(u32::from(immediate)), Ok(immediate));
            }
        }
    }

    #[test]
    fn what_is_too_much_is_refused() {
        assert_eq!(Packet::read(&[0; 2]), Err(PacketError::Length(2)));
        assert_eq!(Packet::read(&[0; PACKET + 1]), Err(PacketError::Length(PACKET + 1)));
        assert_eq!(Packet::read(&[0, 0, 33, 0]), Err(PacketError::Grants(33)));
        assert_eq!(Packet::read(&[0, 0, 1, 1, 0]), Err(PacketError::Short { claimed: 17, got: 1 }));
        let mut bytes = [0; 17];
        (bytes[2], bytes[4]) = (1, 32);
        assert_eq!(Packet::read(&bytes), Err(PacketError::Slot(32)));
        assert_eq!(Immediate::try_from(0x4_0001), Err(PacketError::TooLong(0x4_0001)));
        assert_eq!(Immediate::try_from(32 << 24), Err(PacketError::Slot(32)));
    }
}
