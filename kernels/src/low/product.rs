//! Whole products, part by part.

use super::{BLOCK, Block, Columns, K_BLOCK, Left, Part, Path, Rows, TILE};
use crate::element::Element;
use std::ops::Range;

/// Which terms of a product of one sequence with itself are not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Causal {
    /// All.
    No,
    /// Terms before the row are zero (the transposed of probabilities).
    TermsFrom,
}

impl Causal {
    /// Blocks of `K` for the rows from `32 m` on.
    fn terms(self, m: usize, all: usize) -> Range<usize> {
        const { assert!(K_BLOCK == BLOCK) };
        match self {
            Self::No => 0..all,
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
    /// What follows row `row` and column `column`.
    pub(crate) fn at(&mut self, row: usize, column: usize) -> Target<'_, E> {
        Target { data: &mut self.data[row * self.stride + column..], stride: self.stride }
    }

    /// Takes the first rows and columns of a part.
    pub(super) fn put(&mut self, part: &Part, rows: usize, columns: usize) {
        for (row, sums) in part.iter().take(rows).enumerate() {
            E::store(&sums[..columns], &mut self.data[row * self.stride..][..columns]);
        }
    }
}

/// 32 rows of a product's left side, of which `rows` are wanted, and the blocks of `K` that are summed.
#[derive(Debug)]
pub(crate) struct Strip<'a> {
    pub(crate) left: Block<'a>,
    pub(crate) rows: usize,
    pub(crate) terms: Range<usize>,
}

/// Makes products on this thread. A thread has one at a time, since it has one set of tiles.
#[derive(Debug)]
pub(crate) struct Maker {
    path: Path,
    part: Part,
    _tiles: Option<super::amx::Tiles>,
}

impl Maker {
    pub(crate) fn new(path: Path) -> Self {
        Self { path, part: [[0.0; BLOCK]; BLOCK], _tiles: path.begin() }
    }

    /// `a_MK b_KN`.
    pub(crate) fn product<E: Element>(&mut self, a: Left<'_>, b: &Columns, causal: Causal, to: &mut Target<'_, E>) {
        let terms = check(a, b);
        for m in 0..a.rows().div_ceil(BLOCK) {
            // The rows stay in the nearest cache while the columns pass.
            let rows = BLOCK.min(a.rows() - m * BLOCK);
            let strip = Strip { left: a.block(m), rows, terms: causal.terms(m, terms) };
            self.multiply(&strip, b, b.columns.div_ceil(BLOCK), &mut to.at(m * BLOCK, 0));
        }
    }

    /// A strip times the first `blocks` blocks of columns. Other columns are left as they are.
    pub(crate) fn multiply<E: Element>(&mut self, a: &Strip<'_>, b: &Columns, blocks: usize, to: &mut Target<'_, E>) {
        for n in 0..blocks {
            let to = &mut to.at(0, n * BLOCK);
            if self.path == Path::Avx512 {
                // From registers to where it goes.
                super::avx512_part(a, b, n, to);
            } else {
                let wanted = BLOCK.min(b.columns - n * BLOCK);
                to.put(self.sums(a, b, n), a.rows, wanted);
            }
        }
    }

    /// The sums of a strip times the columns of block `n`, of which those that are there count.
    fn sums(&mut self, a: &Strip<'_>, b: &Columns, n: usize) -> &Part {
        self.path.part(a, b, n, &mut self.part);
        &self.part
    }
}

/// `a_MK b_KN`.
pub(crate) fn product<E: Element>(path: Path, a: Left<'_>, b: &Columns, to: &mut Target<'_, E>) {
    Maker::new(path).product(a, b, Causal::No, to);
}

/// The same with scales of every [`TILE`] terms: `scales_a_M,K/128`, and those of `b` by tile and
/// `columns_per_scale`.
pub(crate) fn scaled_product<E: Element>(
    path: Path,
    (a, scales_a): (Rows<'_>, &[f32]),
    (b, scales_b, columns_per_scale): (&Columns, &[f32], usize),
    out: &mut Target<'_, E>,
) {
    let terms = check(Left::Rows(a), b);
    let mut maker = Maker::new(path);
    let tiles = a.columns.div_ceil(TILE);
    for m in 0..a.rows.div_ceil(BLOCK) {
        let rows = BLOCK.min(a.rows - m * BLOCK);
        let mut strip = Strip { left: Left::Rows(a).block(m), rows, terms: 0..0 };
        for n in 0..b.columns.div_ceil(BLOCK) {
            let mut total: Part = [[0.0; BLOCK]; BLOCK];
            for tile in 0..tiles {
                strip.terms = tile * TILE / K_BLOCK..((tile + 1) * TILE / K_BLOCK).min(terms);
                let part = maker.sums(&strip, b, n);
                let mut of_columns = [0.0f32; BLOCK];
                for (of, c) in of_columns.iter_mut().zip(n * BLOCK..b.columns) {
                    *of = scales_b[c / columns_per_scale * tiles + tile];
                }
                crate::wide::run(
                    #[inline(always)]
                    || {
                        for ((row, total), part) in (m * BLOCK..a.rows).zip(&mut total).zip(part) {
                            let scale = scales_a[row * tiles + tile];
                            for ((total, part), of) in total.iter_mut().zip(part).zip(&of_columns) {
                                *total += part * (scale * of);
                            }
                        }
                    },
                );
            }
            out.at(m * BLOCK, n * BLOCK).put(&total, rows, BLOCK.min(b.columns - n * BLOCK));
        }
    }
}

/// Blocks of `K`.
fn check(a: Left<'_>, b: &Columns) -> usize {
    assert_eq!(a.terms(), b.terms, "inner dimensions of a product");
    b.terms.div_ceil(K_BLOCK)
}
