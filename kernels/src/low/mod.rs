//! Products of BF16 matrices with FP32 sums, and of E4M3 ones, whose values are exact in BF16: the
//! reference for GPU kernels, and fast where the CPU has matrix tiles.
//!
//! Contract, held bit for bit by the tests against scalar code: `K` is cut into blocks of [`K_BLOCK`]. A
//! block's sum is two chains of fused multiply-adds from zero, over its even and its odd terms ascending,
//! which are then added; blocks are added to the total in ascending order. There are no subnormal numbers:
//! operands and results of each operation that would be subnormal are zero. That is what AMX tiles do, and
//! what the portable path does by itself; the AVX-512-BF16 path sums in another order ([`avx512`]) and is a
//! device class of its own. An element depends on its row and its column alone.
//!
//! With scales (technical report 3.3), every [`TILE`] terms make a sum of their own that starts from zero and
//! is added to the FP32 total times the two scales' product.

mod amx;
mod avx512;
pub(crate) mod linear;
mod matrix;
mod portable;
mod product;
mod quantised;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::{has_rounding, round};
pub(crate) use matrix::{Block, Columns, Left, Matrix, Rows, Turned};
pub(crate) use product::{Causal, Maker, Strip, Target, product, scaled_product};
pub(crate) use quantised::{Quantised, Scaling};

/// Terms that share scales.
pub(crate) use crate::ops::quantise::TILE;

use crate::element::Element;
use std::ops::Range;
use std::sync::OnceLock;

/// Terms that a matrix tile sums at once.
pub(crate) const K_BLOCK: usize = 32;
/// Rows and columns of the part of a product that is made at once.
pub(crate) const BLOCK: usize = 32;
/// A part of a product, by row.
pub(crate) type Part = [[f32; BLOCK]; BLOCK];

/// Which instructions make products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// AMX tiles.
    Amx,
    /// AVX-512-BF16.
    Avx512,
    /// Any CPU, with the bits of AMX.
    Portable,
}

impl Path {
    /// The fastest that this CPU has.
    pub(crate) fn detect() -> Self {
        static PATH: OnceLock<Path> = OnceLock::new();
        *PATH.get_or_init(|| *Self::available().first().expect("the portable path is always there"))
    }

    /// All that this CPU has, the fastest first.
    pub(crate) fn available() -> Vec<Self> {
        let all = [(amx::available(), Self::Amx), (avx512::available(), Self::Avx512), (true, Self::Portable)];
        all.into_iter().filter_map(|(has, path)| has.then_some(path)).collect()
    }

    /// What a thread needs while it makes parts.
    fn begin(self) -> Option<amx::Tiles> {
        (self == Self::Amx).then(amx::Tiles::take)
    }

    /// The sums of a strip times block `n` of the columns, of which those that are there count.
    fn part(self, a: &Strip<'_>, columns: &Columns, n: usize, out: &mut Part) {
        let (b, Range { start, end }) = (operands(a, columns, n), a.terms.clone());
        match (self, &a.left) {
            (Self::Avx512, _) => {
                avx512_part(a, columns, n, &mut Target { data: out.as_flattened_mut(), stride: BLOCK });
            }
            (Self::Amx, Block::Rows { data, stride }) => amx::part(data, *stride, b, start, end, out),
            (Self::Portable, Block::Rows { data, stride }) => portable::part(data, *stride, b, start, end, out),
            (Self::Amx | Self::Portable, Block::Pairs(_)) => unreachable!("these paths read rows: see `Turned`"),
        }
    }
}

/// The same where [`Path::Avx512`] was detected, to where it goes.
fn avx512_part<E: Element>(a: &Strip<'_>, columns: &Columns, n: usize, to: &mut Target<'_, E>) {
    let (b, Range { start, end }) = (operands(a, columns, n), a.terms.clone());
    // One pair of zeros after the last gives the bits that all of them give.
    let pairs = start * K_BLOCK / 2..(end * K_BLOCK / 2).min(columns.terms.div_ceil(2) + 1);
    // SAFETY: the path was detected, and both sides were held against the terms.
    unsafe { avx512::part(&a.left, a.rows, b, pairs, BLOCK.min(columns.columns - n * BLOCK), to) };
}

/// Block `n` of the columns. Panics if a side does not reach to the last of the terms.
fn operands<'a>(a: &Strip<'_>, columns: &'a Columns, n: usize) -> [&'a [u32]; 2] {
    let (b, end) = (columns.pair(n), a.terms.end);
    assert!(b.iter().all(|b| b.len() >= end * Columns::TILE), "columns of a part");
    let reach = match &a.left {
        Block::Rows { data, stride } => data.len() >= (BLOCK - 1) * stride + end * K_BLOCK,
        Block::Pairs(a) => a.iter().all(|a| a.len() >= end * Columns::TILE),
    };
    assert!(reach, "rows of a part");
    b
}
