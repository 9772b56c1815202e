//! Messages and the fragments in which they travel.
//!
//! A message is a small header (encoded by its owner) and regions of raw f32 words. A tensor's bytes go
//! from its memory into the stream and from the stream into the memory of the receiver's tensor, never
//! through an encoder.
//!
//! Layout of the byte string that is cut into fragments: `u32` header length, `u32` number of regions,
//! one `u32` length in words for each, header, regions; all little-endian.

use bytes::{BufMut, Bytes, BytesMut};
use smallvec::{SmallVec, smallvec};
use std::sync::Arc;

/// Bytes of a fragment: what one grant of the bulk lane stands for.
pub const FRAGMENT_MAX: usize = 256 * 1024;
/// Bytes of a header.
pub const HEADER_MAX: usize = 16 << 20;
/// Bytes of a header that goes with the start in one piece.
const SHORT: usize = 4096;
/// Regions of a message.
pub const REGIONS_MAX: usize = 65_536;
/// Words of all regions of a message.
pub const WORDS_MAX: u64 = 1 << 32;

/// Words of a region for which memory is taken before they come, or more if as many have come: a claim alone costs no more.
const AHEAD: usize = 16 << 20;

/// A message between two processes.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Message {
    /// Encoded by the message's owner. Clones of a message share it: what is said to many is encoded once.
    pub header: Bytes,
    /// Host memory of tensors.
    pub regions: Vec<Arc<Vec<f32>>>,
}

/// Mostly there is one.
pub type Parts = SmallVec<[Bytes; 1]>;

/// A piece of a message; at most [`FRAGMENT_MAX`] bytes in all parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragment {
    /// Slices of the message's memory.
    pub parts: Parts,
    /// Whether the message ends here.
    pub last: bool,
}

impl Fragment {
    /// Bytes of all parts.
    pub fn len(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Lends a region's memory as bytes.
struct RegionBytes(Arc<Vec<f32>>);

impl AsRef<[u8]> for RegionBytes {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl Message {
    /// A message without regions.
    pub fn small(header: impl Into<Bytes>) -> Self {
        Self { header: header.into(), regions: Vec::new() }
    }

    /// Cuts the message; copies nothing but a short header.
    pub fn fragments(self) -> SmallVec<[Fragment; 1]> {
        let short = self.header.len() <= SHORT;
        let copied = if short { self.header.len() } else { 0 };
        let mut start = BytesMut::with_capacity(8 + 4 * self.regions.len() + copied);
        start.put_u32_le(self.header.len() as u32);
        start.put_u32_le(self.regions.len() as u32);
        for region in &self.regions {
            start.put_u32_le(region.len() as u32);
        }
        let header = if short {
            start.put_slice(&self.header);
            Bytes::new()
        } else {
            self.header
        };
        let regions = self.regions.into_iter().filter(|r| !r.is_empty()).map(|r| Bytes::from_owner(RegionBytes(r)));
        let mut fragments: SmallVec<[Fragment; 1]> = smallvec![Fragment { parts: Parts::new(), last: false }];
        let mut room = FRAGMENT_MAX;
        for mut piece in [start.freeze(), header].into_iter().chain(regions) {
            while !piece.is_empty() {
                if room == 0 {
                    fragments.push(Fragment { parts: Parts::new(), last: false });
                    room = FRAGMENT_MAX;
                }
                let part = piece.split_to(room.min(piece.len()));
                room -= part.len();
                fragments.last_mut().expect("at least one").parts.push(part);
            }
        }
        fragments.last_mut().expect("at least one").last = true;
        fragments
    }
}

/// Bytes that are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A length is beyond its limit.
    #[error("a message claims {what} of {got}, the limit is {limit}")]
    TooLarge {
        /// Which length.
        what: &'static str,
        /// What it claims.
        got: u64,
        /// What is allowed.
        limit: u64,
    },
    /// There is no memory for a region.
    #[error("no memory for {words} words of a message")]
    NoMemory {
        /// Its length.
        words: usize,
    },
    /// It ends before or after its lengths say.
    #[error("a message of {expected} bytes ended after {got}")]
    WrongLength {
        /// By its own lengths.
        expected: u64,
        /// Bytes there were.
        got: u64,
    },
}

/// Puts the fragments of one lane together again.
#[derive(Debug, Default)]
pub struct Assembler {
    start: Vec<u8>,
    /// Lengths that the start names: header, then regions.
    lengths: Option<(usize, Vec<usize>)>,
    header: Vec<u8>,
    regions: Vec<Vec<f32>>,
    /// The region that is being filled.
    at: usize,
    /// Bytes of its next word that came.
    word: ([u8; 4], usize),
    total: u64,
}

impl Assembler {
    /// Takes the next fragment; gives the message that it completes.
    pub fn push(&mut self, fragment: &Fragment) -> Result<Option<Message>, MessageError> {
        if self.total == 0
            && fragment.last
            && let [part] = &fragment.parts[..]
            && let Some(message) = small(part)
        {
            return Ok(Some(message));
        }
        for part in &fragment.parts {
            self.total += part.len() as u64;
            self.take(part)?;
        }
        if !fragment.last {
            return Ok(None);
        }
        let done = std::mem::take(self);
        let expected = match &done.lengths {
            Some((header, regions)) => (8 + 4 * regions.len() + header + 4 * regions.iter().sum::<usize>()) as u64,
            None => 8,
        };
        if done.lengths.is_none() || done.total != expected {
            return Err(MessageError::WrongLength { expected, got: done.total });
        }
        let regions = done.regions.into_iter().map(Arc::new).collect();
        Ok(Some(Message { header: done.header.into(), regions }))
    }

    fn take(&mut self, mut part: &[u8]) -> Result<(), MessageError> {
        while !part.is_empty() {
            if self.lengths.is_none() {
                let wanted = self.start_wanted()?;
                let take = (wanted - self.start.len()).min(part.len());
                self.start.extend_from_slice(&part[..take]);
                part = &part[take..];
                self.read_lengths()?;
            } else {
                part = self.fill(part)?;
            }
        }
        Ok(())
    }

    fn length(&self, at: usize) -> usize {
        number(&self.start[4 * at..])
    }

    /// Bytes of the start, as far as they are known.
    fn start_wanted(&self) -> Result<usize, MessageError> {
        if self.start.len() < 8 {
            return Ok(8);
        }
        let (header, regions) = (self.length(0), self.length(1));
        let limit = |what, got: usize, limit: usize| {
            if got <= limit {
                Ok(())
            } else {
                Err(MessageError::TooLarge { what, got: got as u64, limit: limit as u64 })
            }
        };
        limit("a header", header, HEADER_MAX)?;
        limit("a number of regions", regions, REGIONS_MAX)?;
        Ok(8 + 4 * regions)
    }

    fn read_lengths(&mut self) -> Result<(), MessageError> {
        if self.start.len() < 8 || self.start.len() < self.start_wanted()? {
            return Ok(());
        }
        let regions: Vec<usize> = (0..self.length(1)).map(|r| self.length(2 + r)).collect();
        let words = regions.iter().map(|r| *r as u64).sum::<u64>();
        if words > WORDS_MAX {
            return Err(MessageError::TooLarge { what: "regions", got: words, limit: WORDS_MAX });
        }
        self.regions = regions.iter().map(|_| Vec::new()).collect();
        self.lengths = Some((self.length(0), regions));
        Ok(())
    }

    /// Fills the header, then the regions; gives what is left of `part`.
    fn fill<'a>(&mut self, part: &'a [u8]) -> Result<&'a [u8], MessageError> {
        let (header, lengths) = self.lengths.as_ref().expect("lengths are read before they are filled");
        if self.header.len() < *header {
            let take = (header - self.header.len()).min(part.len());
            self.header.extend_from_slice(&part[..take]);
            return Ok(&part[take..]);
        }
        while self.at < lengths.len() && self.regions[self.at].len() == lengths[self.at] {
            self.at += 1;
        }
        let Some(words) = lengths.get(self.at).copied() else {
            return Err(MessageError::WrongLength { expected: self.total - part.len() as u64, got: self.total });
        };
        let region = &mut self.regions[self.at];
        if region.capacity() == region.len() {
            let more = (words - region.len()).min(region.len().max(AHEAD));
            region.try_reserve_exact(more).map_err(|_| MessageError::NoMemory { words })?;
        }
        let missing = 4 * (words.min(region.capacity()) - region.len()) - self.word.1;
        let (bytes, rest) = part.split_at(missing.min(part.len()));
        append(region, &mut self.word, bytes);
        Ok(rest)
    }
}

/// A message that is one short piece, without regions: what most are.
fn small(part: &Bytes) -> Option<Message> {
    let header = part.get(8..).filter(|h| h.len() <= SHORT && h.len() == number(part) && number(&part[4..]) == 0)?;
    // A copy: the piece may be a small part of much memory.
    Some(Message::small(Bytes::copy_from_slice(header)))
}

fn number(bytes: &[u8]) -> usize {
    u32::from_le_bytes(*bytes.first_chunk().expect("four bytes")) as usize
}

/// Appends bytes of words, and keeps those of a word that is not whole.
fn append(words: &mut Vec<f32>, (begun, have): &mut ([u8; 4], usize), mut bytes: &[u8]) {
    if *have > 0 {
        let (first, rest) = bytes.split_at(bytes.len().min(4 - *have));
        begun[*have..][..first.len()].copy_from_slice(first);
        (*have, bytes) = (*have + first.len(), rest);
        if *have < 4 {
            return;
        }
        words.push(f32::from_le_bytes(*begun));
    }
    let (whole, rest) = bytes.as_chunks::<4>();
    match bytemuck::try_cast_slice(whole) {
        Ok(whole) => words.extend_from_slice(whole),
        Err(_) => words.extend(whole.iter().map(|word| f32::from_le_bytes(*word))),
    }
    begun[..rest.len()].copy_from_slice(rest);
    *have = rest.len();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Through fragments whose parts come in pieces of so many bytes.
    fn pass(message: Message, cut: usize) -> Message {
        let mut assembler = Assembler::default();
        let fragments = message.fragments();
        let n = fragments.len();
        for (i, fragment) in fragments.iter().enumerate() {
            assert!(fragment.len() <= FRAGMENT_MAX);
            let pieces = |part: &Bytes| part.chunks(cut).map(Bytes::copy_from_slice).collect::<Vec<_>>();
            let cut = Fragment { parts: fragment.parts.iter().flat_map(pieces).collect(), last: fragment.last };
            match assembler.push(&cut).unwrap() {
                Some(done) if i + 1 == n => return done,
                None if i + 1 < n => {}
                other => panic!("{other:?} at {i} of {n}"),
            }
        }
        unreachable!()
    }

    #[test]
    fn messages_survive_being_cut() {
        for lengths in [vec![], vec![0], vec![1], vec![65_536], vec![0, 65_533, 0, 70_000, 3, 200_000, 0]] {
            for header in [0, 1, SHORT, SHORT + 1, 300_000] {
                let region = |(i, n): (usize, &usize)| Arc::new((0..*n).map(|x| (x + i) as f32).collect());
                let message = Message {
                    header: (0..header).map(|i| i as u8).collect(),
                    regions: lengths.iter().enumerate().map(region).collect(),
                };
                for cut in [5, 1001, usize::MAX] {
                    assert_eq!(pass(message.clone(), cut), message);
                }
            }
        }
    }

    #[test]
    fn memory_is_taken_as_words_come() {
        let words = 3 * AHEAD + 5;
        let start: Vec<u8> = [0, 1, words as u32].iter().flat_map(|n| n.to_le_bytes()).collect();
        let mut assembler = Assembler::default();
        let mut push = |bytes: Bytes, last| {
            let message = assembler.push(&Fragment { parts: smallvec![bytes], last }).unwrap();
            (message, assembler.regions.first().map_or(0, Vec::capacity))
        };
        assert_eq!(push(start.into(), false), (None, 0));
        assert_eq!(push(vec![0, 0, 0x80].into(), false), (None, AHEAD));
        assert_eq!(push([&[0x3F][..], &vec![0; 4 * AHEAD - 4]].concat().into(), false), (None, AHEAD));
        let (message, _) = push(vec![0; 4 * (words - AHEAD)].into(), true);
        let region = &message.unwrap().regions[0];
        assert!(region.len() == words && region[0] == 1.0 && region[1..].iter().all(|x| *x == 0.0));
    }

    proptest! {
        /// Any bytes give a message or an error, never a panic, and claims take no memory.
        #[test]
        fn garbage_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..200) {
            let cut = cut.min(bytes.len());
            let mut assembler = Assembler::default();
            let first = Fragment { parts: smallvec![Bytes::copy_from_slice(&bytes[..cut])], last: false };
            let second = Fragment { parts: smallvec![Bytes::copy_from_slice(&bytes[cut..])], last: true };
            let _ = assembler.push(&first).and_then(|_| assembler.push(&second));
        }
    }
}
