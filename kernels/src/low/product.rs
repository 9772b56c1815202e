//! Whole products, part by part.

use super::{BLOCK, Columns, K_BLOCK, Matrix, Part, Path, TILE};
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

/// `a_MK b_KN`; each sum goes to `put(row, first column, sums of up to 32 columns)`.
pub(crate) fn product(path: Path, a: &Matrix, b: &Columns, causal: Causal, mut put: impl FnMut(usize, usize, &[f32])) {
    let terms = check(a, b);
    let mut part: Part = [[0.0; BLOCK]; BLOCK];
    for n in 0..b.columns.div_ceil(BLOCK) {
        for m in (0..a.rows.div_ceil(BLOCK)).filter(|m| causal.wants(*m, n)) {
            let blocks = causal.blocks(m, terms);
            path.part(&a.data[m * BLOCK * a.stride..], a.stride, b.pair(n), blocks.start, blocks.end, &mut part);
            hand_out(&part, a.rows, b.columns, m, n, &mut put);
        }
    }
}

/// The same with scales of every [`TILE`] terms: `scales_a_M,K/128`, and those of `b` by
/// `scale_b(column, tile)`.
pub(crate) fn scaled_product(
    path: Path,
    a: (&Matrix, &[f32]),
    b: (&Columns, &[f32], usize),
    mut put: impl FnMut(usize, usize, &[f32]),
) {
    let ((a, scales_a), (b, scales_b, columns_per_scale)) = (a, b);
    let terms = check(a, b);
    let tiles = a.columns.div_ceil(TILE);
    let mut part: Part = [[0.0; BLOCK]; BLOCK];
    for n in 0..b.columns.div_ceil(BLOCK) {
        let columns = n * BLOCK..b.columns.min((n + 1) * BLOCK);
        for m in 0..a.rows.div_ceil(BLOCK) {
            let mut total: Part = [[0.0; BLOCK]; BLOCK];
            for tile in 0..tiles {
                let (from, to) = (tile * TILE / K_BLOCK, ((tile + 1) * TILE / K_BLOCK).min(terms));
                path.part(&a.data[m * BLOCK * a.stride..], a.stride, b.pair(n), from, to, &mut part);
                let mut of_columns = [0.0f32; BLOCK];
                for (of, c) in of_columns.iter_mut().zip(columns.clone()) {
                    *of = scales_b[c / columns_per_scale * tiles + tile];
                }
                let rows = m * BLOCK..a.rows.min((m + 1) * BLOCK);
                crate::wide::run(|| {
                    for ((row, total), part) in rows.zip(&mut total).zip(&part) {
                        let scale = scales_a[row * tiles + tile];
                        for i in 0..BLOCK {
                            total[i] += part[i] * (scale * of_columns[i]);
                        }
                    }
                });
            }
            hand_out(&total, a.rows, b.columns, m, n, &mut put);
        }
    }
}

/// Blocks of `K`.
fn check(a: &Matrix, b: &Columns) -> usize {
    assert_eq!(a.columns, b.terms, "inner dimensions of a product");
    a.columns.div_ceil(K_BLOCK)
}

fn hand_out(part: &Part, rows: usize, columns: usize, m: usize, n: usize, put: &mut impl FnMut(usize, usize, &[f32])) {
    let width = BLOCK.min(columns - n * BLOCK);
    for (row, sums) in (m * BLOCK..rows).zip(part) {
        put(row, n * BLOCK, &sums[..width]);
    }
}
