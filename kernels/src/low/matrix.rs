//! BF16 matrices in the two layouts that products read: rows, and columns in tiles.

use super::{BLOCK, K_BLOCK};

/// Rows one after another, zeros up to a multiple of 32 in both directions; there is room for one column.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    pub(crate) data: Vec<u16>,
}

/// The nearest BF16, ties to even; zero if that is subnormal.
#[inline(always)]
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let near = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    let near = if near & 0x7f80 == 0 { near & 0x8000 } else { near };
    (if x.is_nan() { 0x7fc0 } else { near }) as u16
}

impl Matrix {
    /// A matrix of zeros.
    pub(crate) fn zeros(rows: usize, columns: usize) -> Self {
        let stride = columns.max(1).next_multiple_of(BLOCK);
        Self { rows, columns, stride, data: vec![0; rows.next_multiple_of(BLOCK) * stride] }
    }

    /// Rounds `rows x columns` of f32 that are `row_stride` apart.
    pub(crate) fn round(x: &[f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let mut out = Self::zeros(rows, columns);
        crate::wide::run(|| {
            for (row, to) in (0..rows).zip(out.data.chunks_exact_mut(out.stride)) {
                for (to, x) in to.iter_mut().zip(&x[row * row_stride..][..columns]) {
                    *to = rounded(*x);
                }
            }
        });
        out
    }

    /// Rows and columns exchanged.
    pub(crate) fn transposed(&self) -> Self {
        let mut out = Self::zeros(self.columns, self.rows);
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

    fn zeros(columns: usize, terms: usize) -> Self {
        let panel = terms.max(1).next_multiple_of(K_BLOCK) / K_BLOCK * Self::TILE;
        Self { columns, terms, panel, data: vec![0; columns.next_multiple_of(BLOCK) / 16 * panel] }
    }

    /// The columns of a product with the matrix whose *rows* they are: `m_NK`.
    pub(crate) fn of_rows(m: &Matrix) -> Self {
        let mut out = Self::zeros(m.rows, m.columns);
        if m.rows == 0 {
            return out;
        }
        for (panel, to) in out.data.chunks_exact_mut(out.panel).enumerate() {
            for (block, tile) in to.chunks_exact_mut(Self::TILE).enumerate() {
                turn_words(&m.data[16 * panel * m.stride + K_BLOCK * block..], m.stride, tile);
            }
        }
        out
    }

    /// The columns of `m_KN`.
    pub(crate) fn of_columns(m: &Matrix) -> Self {
        let mut out = Self::zeros(m.columns, m.rows);
        if m.rows == 0 {
            return out;
        }
        crate::wide::run(|| {
            for (panel, to) in out.data.chunks_exact_mut(out.panel).enumerate() {
                for (pair, to) in to.chunks_exact_mut(16).enumerate() {
                    let low = &m.data[2 * pair * m.stride + 16 * panel..][..16];
                    let high = &m.data[(2 * pair + 1) * m.stride + 16 * panel..][..16];
                    for i in 0..16 {
                        to[i] = u32::from(low[i]) | u32::from(high[i]) << 16;
                    }
                }
            }
        });
        out
    }

    /// Tiles of the 32 columns from `32 n` on.
    pub(super) fn pair(&self, n: usize) -> [&[u32]; 2] {
        let at = 2 * n * self.panel;
        [&self.data[at..at + self.panel], &self.data[at + self.panel..at + 2 * self.panel]]
    }
}
