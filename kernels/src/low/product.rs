//! Whole products, part by part.

use super::{BLOCK, Columns, K_BLOCK, Part, Path, Rows, TILE};
use crate::element::Element;
use std::ops::Range;

/// Which parts of a product of one sequence with itself are needed or not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Causal {
    /// All.
    No,
    /// Columns after the row are not wanted (scores).
    Columns,
    /// Terms after the row are zero (probabilities by values).
    TermsUpTo,
    /// Terms before the row are zero (the transposed of that).
    TermsFrom,
}

impl Causal {
    fn wants(self, m: usize, n: usize) -> bool {
        self != Self::Columns || n <= m
    }

    /// Blocks of `K` for the rows from `32 m` on.
    fn blocks(self, m: usize, all: usize) -> Range<usize> {
        const { assert!(K_BLOCK == BLOCK) };
        match self {
            Self::No | Self::Columns => 0..all,
            Self::TermsUpTo => 0..(m + 1).min(all),
            Self::TermsFrom => m.min(all)..all,
        }
    }
}

/// Where a product goes: rows `stride` apart, rounded to its elements.
#[derive(Debug)]
pub(crate) struct Target<'a, E> {
    pub(crate) data: &'a mut [E],
    pub(crate) stride: usize,
}

impl<E: Element> Target<'_, E> {
    /// Takes the part at `(32 m, 32 n)` of a matrix of `rows x columns`.
    fn put(&mut self, part: &Part, rows: usize, columns: usize, m: usize, n: usize) {
        let (width, stride) = (BLOCK.min(columns - n * BLOCK), self.stride);
        let at = &mut self.data[m * BLOCK * stride + n * BLOCK..];
        crate::wide::run(
            #[inline(always)]
            || {
                for (row, sums) in (0..rows - m * BLOCK).zip(part) {
                    let to = &mut at[row * stride..][..width];
                    to.iter_mut().zip(sums).for_each(|(to, sum)| *to = E::nearest(*sum));
                }
            },
        );
    }
}

/// `a_MK b_KN`.
pub(crate) fn product<E: Element>(path: Path, a: Rows<'_>, b: &Columns, causal: Causal, to: &mut Target<'_, E>) {
    let terms = check(a, b);
    let _held = path.begin();
    let mut part: Part = [[0.0; BLOCK]; BLOCK];
    for m in 0..a.rows.div_ceil(BLOCK) {
        // The rows stay in the nearest cache while the columns pass.
        let (rows, blocks) = (a.block(m), causal.blocks(m, terms));
        for n in (0..b.columns.div_ceil(BLOCK)).filter(|n| causal.wants(m, *n)) {
            path.part(&rows, a.stride, b.pair(n), blocks.start, blocks.end, &mut part);
            to.put(&part, a.rows, b.columns, m, n);
        }
    }
}

/// The same with scales of every [`TILE`] terms: `scales_a_M,K/128`, and those of `b` by tile and
/// `columns_per_scale`.
pub(crate) fn scaled_product<E: Element>(
    path: Path,
    (a, scales_a): (Rows<'_>, &[f32]),
    (b, scales_b, columns_per_scale): (&Columns, &[f32], usize),
    out: &mut Target<'_, E>,
) {
    let terms = check(a, b);
    let _held = path.begin();
    let tiles = a.columns.div_ceil(TILE);
    let mut part: Part = [[0.0; BLOCK]; BLOCK];
    for m in 0..a.rows.div_ceil(BLOCK) {
        let block = a.block(m);
        for n in 0..b.columns.div_ceil(BLOCK) {
            let mut total: Part = [[0.0; BLOCK]; BLOCK];
            for tile in 0..tiles {
                let (from, to) = (tile * TILE / K_BLOCK, ((tile + 1) * TILE / K_BLOCK).min(terms));
                path.part(&block, a.stride, b.pair(n), from, to, &mut part);
                let mut of_columns = [0.0f32; BLOCK];
                for (of, c) in of_columns.iter_mut().zip(n * BLOCK..b.columns) {
                    *of = scales_b[c / columns_per_scale * tiles + tile];
                }
                crate::wide::run(
                    #[inline(always)]
                    || {
                        for ((row, total), part) in (m * BLOCK..a.rows).zip(&mut total).zip(&part) {
                            let scale = scales_a[row * tiles + tile];
                            for ((total, part), of) in total.iter_mut().zip(part).zip(&of_columns) {
                                *total += part * (scale * of);
                            }
                        }
                    },
                );
            }
            out.put(&total, a.rows, b.columns, m, n);
        }
    }
}

/// Blocks of `K`.
fn check(a: Rows<'_>, b: &Columns) -> usize {
    assert_eq!(a.columns, b.terms, "inner dimensions of a product");
    a.columns.div_ceil(K_BLOCK)
}
