//! A source of text as tokens: one after another, each one, two or four bytes wide, little-endian.
//!
//! Where the bytes are (memory, a mapped file) is nobody's concern here.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// What is known of a source without its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceInfo {
    /// Tokens.
    pub tokens: u64,
    /// Bytes of a token: 1, 2 or 4.
    pub width: u8,
    /// BLAKE3 of the bytes, in hexadecimal.
    pub hash: String,
    /// Documents in it.
    pub documents: u64,
}

impl SourceInfo {
    /// Bytes of all tokens.
    pub fn bytes(&self) -> u64 {
        self.tokens * u64::from(self.width)
    }
}

/// The narrowest width for a vocabulary.
pub fn token_width(vocabulary: usize) -> u8 {
    match vocabulary {
        0..=0x100 => 1,
        0x101..=0x1_0000 => 2,
        _ => 4,
    }
}

/// See the module.
#[derive(Clone)]
pub struct Tokens {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    width: usize,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({} of {} bytes)", self.len(), self.width)
    }
}

impl Tokens {
    /// Of bytes that hold tokens of `width`, which is 1, 2 or 4.
    pub fn new(bytes: Arc<dyn AsRef<[u8]> + Send + Sync>, width: u8) -> Self {
        assert!(matches!(width, 1 | 2 | 4), "tokens of {width} bytes");
        Self { bytes, width: usize::from(width) }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.as_bytes().len() / self.width
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// Some of them.
    pub fn read(&self, range: Range<usize>) -> Vec<u32> {
        let bytes = &self.as_bytes()[range.start * self.width..range.end * self.width];
        match self.width {
            1 => bytes.iter().map(|b| u32::from(*b)).collect(),
            2 => bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect(),
            _ => bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_every_width_come_back() {
        for (width, tokens) in [(1, vec![0u32, 255, 7]), (2, vec![65_535, 256, 1]), (4, vec![u32::MAX, 70_000, 2])] {
            let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()[..width].to_vec()).collect();
            let read = Tokens::new(Arc::new(bytes), width as u8);
            assert_eq!((read.len(), read.read(0..3)), (3, tokens.clone()));
            assert_eq!(read.read(1..2), tokens[1..2]);
        }
        assert_eq!([256, 257, 65_536, 65_537].map(token_width), [1, 2, 2, 4]);
    }
}
