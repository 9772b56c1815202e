//! BF16 matrices in the two layouts that products read: rows, and columns in tiles.

use super::{BLOCK, K_BLOCK};
use crate::wide::unwritten;

/// Rows one after another, zeros up to a multiple of 32 in both directions; there is room for one column.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    pub(crate) data: Vec<u16>,
}

/// The nearest BF16, ties to even; a subnormal number is zero. As the instruction VCVTNEPS2BF16 has it.
#[inline(always)]
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let near = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    let near = if x.abs() < f32::MIN_POSITIVE { bits >> 16 & 0x8000 } else { near };
    (if x.is_nan() { bits >> 16 | 0x40 } else { near }) as u16
}

impl Matrix {
    /// A matrix whose elements are still to be written, with zeros around them.
    pub(crate) fn padded(rows: usize, columns: usize) -> Self {
        let stride = columns.max(1).next_multiple_of(BLOCK);
        let mut data = unwritten(rows.next_multiple_of(BLOCK) * stride);
        data[rows * stride..].fill(0);
        if columns < stride {
            data.chunks_exact_mut(stride).for_each(|row: &mut [u16]| row[columns..].fill(0));
        }
        Self { rows, columns, stride, data }
    }

    /// Rounds `rows x columns` of f32 that are `row_stride` apart.
    pub(crate) fn round(x: &[f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let mut out = Self::padded(rows, columns);
        crate::wide::run(
            #[inline(always)]
            || {
                for (row, to) in (0..rows).zip(out.data.chunks_exact_mut(out.stride)) {
                    for (to, x) in to.iter_mut().zip(&x[row * row_stride..][..columns]) {
                        *to = rounded(*x);
                    }
                }
            },
        );
        out
    }

    /// Rows and columns exchanged.
    pub(crate) fn transposed(&self) -> Self {
        let mut out = Self::padded(self.columns, self.rows);
        // Squares of 32 stay in the nearest cache.
        for r in (0..self.rows).step_by(BLOCK) {
            for c in (0..self.columns).step_by(BLOCK) {
                let to = &mut out.data[c * out.stride + r..];
                turn_halves(&self.data[r * self.stride + c..], self.stride, to, out.stride);
            }
        }
        out
    }
}

/// A square of 32 x 32 halves, turned.
fn turn_halves(from: &[u16], stride: usize, to: &mut [u16], to_stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if super::avx512::has_shuffles() {
        // SAFETY: the instructions are there.
        return unsafe { super::avx512::turn_halves(from, stride, to, to_stride) };
    }
    for i in 0..BLOCK {
        for j in 0..BLOCK {
            to[j * to_stride + i] = from[i * stride + j];
        }
    }
}

/// 16 rows of 32 halves to 16 rows of 16 words, each a pair of halves: words turned.
fn turn_words(from: &[u16], stride: usize, to: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if super::avx512::has_shuffles() {
        // SAFETY: the instructions are there.
        return unsafe { super::avx512::turn_words(from, stride, to) };
    }
    for i in 0..16 {
        for j in 0..16 {
            let pair = &from[i * stride + 2 * j..][..2];
            to[16 * j + i] = u32::from(pair[0]) | u32::from(pair[1]) << 16;
        }
    }
}

/// Columns in tiles of 16 pairs of terms by 16 columns, the pairs' two terms side by side; the tiles of
/// 16 columns follow each other along `K`.
#[derive(Debug, Clone)]
pub(crate) struct Columns {
    pub(crate) columns: usize,
    pub(crate) terms: usize,
    /// Words of 16 columns.
    pub(crate) panel: usize,
    pub(crate) data: Vec<u32>,
}

impl Columns {
    /// Words of a tile.
    pub(crate) const TILE: usize = 256;

    /// Tiles that are still to be written.
    fn unwritten(columns: usize, terms: usize) -> Self {
        let panel = terms.max(1).div_ceil(K_BLOCK) * Self::TILE;
        Self { columns, terms, panel, data: unwritten(columns.next_multiple_of(BLOCK) / 16 * panel) }
    }

    /// The columns of a product with the matrix whose *rows* they are: `m_NK`.
    pub(crate) fn of_rows(m: &Matrix) -> Self {
        let mut out = Self::unwritten(m.rows, m.columns);
        for (panel, to) in out.data.chunks_exact_mut(out.panel).enumerate() {
            for (block, tile) in to.chunks_exact_mut(Self::TILE).enumerate() {
                turn_words(&m.data[16 * panel * m.stride + K_BLOCK * block..], m.stride, tile);
            }
        }
        out
    }

    /// The columns of `m_KN`.
    pub(crate) fn of_columns(m: &Matrix) -> Self {
        let mut out = Self::unwritten(m.columns, m.rows);
        if m.rows == 0 {
            // A product over no terms reads none of it.
            return out;
        }
        crate::wide::run(
            #[inline(always)]
            || {
                for (panel, to) in out.data.chunks_exact_mut(out.panel).enumerate() {
                    for (pair, to) in to.chunks_exact_mut(16).enumerate() {
                        let low = &m.data[2 * pair * m.stride + 16 * panel..][..16];
                        let high = &m.data[(2 * pair + 1) * m.stride + 16 * panel..][..16];
                        for i in 0..16 {
                            to[i] = u32::from(low[i]) | u32::from(high[i]) << 16;
                        }
                    }
                }
            },
        );
        out
    }

    /// Tiles of the 32 columns from `32 n` on.
    pub(super) fn pair(&self, n: usize) -> [&[u32]; 2] {
        let at = 2 * n * self.panel;
        [&self.data[at..at + self.panel], &self.data[at + self.panel..at + 2 * self.panel]]
    }
}
