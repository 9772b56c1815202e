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

pub(crate) use matrix::{Columns, Matrix, Rows};
pub(crate) use product::{Causal, Target, product, scaled_product};
pub(crate) use quantised::{Quantised, Scaling};

/// Terms that share scales.
pub(crate) use crate::ops::quantise::TILE;

use crate::element::Bf16;
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

    /// `sum a b` of 32 rows and 32 columns over blocks `from..to` of `K`.
    fn part(self, a: &[Bf16], stride: usize, b: [&[u32]; 2], from: usize, to: usize, out: &mut Part) {
        assert!(a.len() >= (BLOCK - 1) * stride + to * K_BLOCK, "rows of a part");
        assert!(b.iter().all(|b| b.len() >= to * Columns::TILE), "columns of a part");
        match self {
            Self::Amx => amx::part(a, stride, b, from, to, out),
            Self::Avx512 => avx512::part(a, stride, b, from, to, out),
            Self::Portable => portable::part(a, stride, b, from, to, out),
        }
    }
}
