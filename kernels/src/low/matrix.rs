//! BF16 matrices in the two layouts that products read: rows, and columns in tiles.

use super::{BLOCK, K_BLOCK, Path};
use crate::element::{Bf16, Element};
use crate::tensor::Tensor;
use crate::wide::unwritten;
use std::borrow::Cow;
use std::ops::Range;

/// Rows that a product reads: whole blocks of columns, those after the last zero. Nothing need follow the
/// last row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    data: Source<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Source<'a> {
    Slice(&'a [Bf16]),
    /// Rows without gaps in several pieces.
    Parts(&'a [Tensor]),
}

impl<'a> Rows<'a> {
    /// A matrix that is stored in BF16, if it has whole blocks of columns.
    pub(crate) fn of(x: &'a Tensor) -> Option<Self> {
        let (rows, columns) = (x.rows(), x.columns());
        let usable = x.is_bf16() && columns > 0 && columns.is_multiple_of(BLOCK);
        let data = || x.parts().map_or_else(|| Source::Slice(x.bf16s()), Source::Parts);
        usable.then(|| Self { rows, columns, stride: columns, data: data() })
    }

    fn piece(&self, n: usize) -> Option<&'a [Bf16]> {
        match self.data {
            Source::Slice(data) => (n == 0).then_some(data),
            Source::Parts(parts) => parts.get(n).map(Tensor::bf16s),
        }
    }

    /// The 32 rows from `32 m` on, `stride` apart; those after the last are zero.
    pub(super) fn block(&self, m: usize) -> Cow<'a, [Bf16]> {
        let size = BLOCK * self.stride;
        let wanted = m * size..self.rows.min((m + 1) * BLOCK) * self.stride;
        let (mut block, mut start) = (Vec::new(), 0);
        for piece in (0..).map_while(|n| self.piece(n)) {
            let here = wanted.start.max(start)..wanted.end.min(start + piece.len());
            if !here.is_empty() {
                let piece = &piece[here.start - start..here.end - start];
                if piece.len() == size {
                    return Cow::Borrowed(piece);
                }
                block.reserve_exact(size);
                block.extend_from_slice(piece);
            }
            start += piece.len();
        }
        block.resize(size, Bf16::default());
        Cow::Owned(block)
    }

    /// Rows and columns exchanged.
    pub(crate) fn transposed(&self) -> Matrix {
        let mut out = Matrix::padded(self.columns, self.rows);
        for m in 0..self.rows.div_ceil(BLOCK) {
            out.put_turned(m, &self.block(m), self.stride, 0..self.columns.div_ceil(BLOCK));
        }
        out
    }
}

/// Rows of its own, zeros up to a multiple of 32 in both directions; there is room for one column.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) stride: usize,
    pub(crate) data: Vec<Bf16>,
}

impl Matrix {
    /// A matrix whose elements are still to be written, with zeros around them.
    pub(crate) fn padded(rows: usize, columns: usize) -> Self {
        let stride = columns.max(1).next_multiple_of(BLOCK);
        let mut data = unwritten(rows.next_multiple_of(BLOCK) * stride);
        data[rows * stride..].fill(Bf16::default());
        if columns < stride {
            data.chunks_exact_mut(stride).for_each(|row: &mut [Bf16]| row[columns..].fill(Bf16::default()));
        }
        Self { rows, columns, stride, data }
    }

    /// Of `rows x columns` that are `row_stride` apart, rounded if they are not BF16.
    pub(crate) fn round<E: Element>(x: &[E], rows: usize, columns: usize, row_stride: usize) -> Self {
        let mut out = Self::padded(rows, columns);
        for (row, to) in (0..rows).zip(out.data.chunks_exact_mut(out.stride)) {
            E::round(&x[row * row_stride..][..columns], &mut to[..columns]);
        }
        out
    }

    /// Takes columns `32 m` to `32 m + 31` of the rows of blocks `n` from the rows that are the columns.
    fn put_turned(&mut self, m: usize, rows: &[Bf16], stride: usize, n: Range<usize>) {
        for n in n {
            // Squares of 32 stay in the nearest cache.
            let to = &mut self.data[n * BLOCK * self.stride + m * BLOCK..];
            turn_halves(&rows[n * BLOCK..], stride, to, self.stride);
        }
    }

    /// As a product's left side.
    pub(crate) fn left(&self) -> Left<'_> {
        Left::Rows(self.view())
    }

    /// Its rows.
    pub(crate) fn view(&self) -> Rows<'_> {
        Rows { rows: self.rows, columns: self.columns, stride: self.stride, data: Source::Slice(&self.data) }
    }
}

/// A square of 32 x 32 halves, turned.
fn turn_halves(from: &[Bf16], stride: usize, to: &mut [Bf16], to_stride: usize) {
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
fn turn_words(from: &[Bf16], stride: usize, to: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if super::avx512::has_shuffles() {
        // SAFETY: the instructions are there.
        return unsafe { super::avx512::turn_words(from, stride, to) };
    }
    for i in 0..16 {
        for j in 0..16 {
            let pair = &from[i * stride + 2 * j..][..2];
            to[16 * j + i] = word(pair[0], pair[1]);
        }
    }
}

/// 32 rows of 32 halves to two tiles of pairs of rows.
fn pair_rows(from: &[Bf16], stride: usize, to: [&mut [u32]; 2]) {
    #[cfg(target_arch = "x86_64")]
    if super::avx512::has_shuffles() {
        // SAFETY: the instructions are there.
        return unsafe { super::avx512::pair_rows(from, stride, to) };
    }
    for (half, tile) in to.into_iter().enumerate() {
        for (pair, to) in tile.chunks_exact_mut(16).enumerate() {
            let row = |r: usize| &from[(2 * pair + r) * stride + 16 * half..][..16];
            to.iter_mut().zip(row(0).iter().zip(row(1))).for_each(|(to, (low, high))| *to = word(*low, *high));
        }
    }
}

#[inline(always)]
fn word(low: Bf16, high: Bf16) -> u32 {
    u32::from(low.0) | u32::from(high.0) << 16
}

/// The left side of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Left<'a> {
    /// Its rows.
    Rows(Rows<'a>),
    /// Columns that are its rows, in pairs of terms.
    Pairs(&'a Columns),
}

/// 32 rows of a product's left side.
#[derive(Debug)]
pub(crate) enum Block<'a> {
    /// `stride` apart.
    Rows { data: Cow<'a, [Bf16]>, stride: usize },
    /// Tiles of 16 rows each.
    Pairs([&'a [u32]; 2]),
}

impl<'a> Left<'a> {
    pub(super) fn rows(self) -> usize {
        match self {
            Self::Rows(rows) => rows.rows,
            Self::Pairs(columns) => columns.columns,
        }
    }

    pub(super) fn terms(self) -> usize {
        match self {
            Self::Rows(rows) => rows.columns,
            Self::Pairs(columns) => columns.terms,
        }
    }

    /// The 32 rows from `32 m` on; those after the last are zero.
    pub(crate) fn block(self, m: usize) -> Block<'a> {
        match self {
            Self::Rows(rows) => Block::Rows { data: rows.block(m), stride: rows.stride },
            Self::Pairs(columns) => Block::Pairs(columns.pair(m)),
        }
    }
}

/// A matrix whose columns are the rows of a product's left side, as a path reads them.
#[derive(Debug)]
pub(crate) enum Turned {
    Rows(Matrix),
    Pairs(Columns),
}

impl Turned {
    /// Of `m_KM` that is still to be written.
    pub(crate) fn unwritten(path: Path, rows: usize, columns: usize) -> Self {
        match path {
            // It takes a pair of terms at a time, wherever it is: that is half the way to turning rows.
            Path::Avx512 => Self::Pairs(Columns::unwritten(columns, rows)),
            Path::Amx | Path::Portable => Self::Rows(Matrix::padded(columns, rows)),
        }
    }

    /// Of `m_KM`.
    pub(crate) fn of(path: Path, m: Rows<'_>) -> Self {
        match path {
            Path::Avx512 => Self::Pairs(Columns::of_columns(m)),
            Path::Amx | Path::Portable => Self::Rows(m.transposed()),
        }
    }

    /// Takes the columns of blocks `n` of the 32 rows from `32 m` on; those after the last are zero.
    pub(crate) fn put(&mut self, m: usize, rows: &[Bf16], stride: usize, n: Range<usize>) {
        match self {
            Self::Rows(turned) => turned.put_turned(m, rows, stride, n),
            Self::Pairs(columns) => columns.put_rows(m, rows, stride, n),
        }
    }

    pub(crate) fn left(&self) -> Left<'_> {
        match self {
            Self::Rows(rows) => rows.left(),
            Self::Pairs(columns) => Left::Pairs(columns),
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
    pub(crate) fn of_rows(m: Rows<'_>) -> Self {
        let mut out = Self::unwritten(m.rows, m.columns);
        for (n, panels) in out.data.chunks_exact_mut(2 * out.panel).enumerate() {
            let rows = m.block(n);
            for (half, panel) in panels.chunks_exact_mut(out.panel).enumerate() {
                for (block, tile) in panel.chunks_exact_mut(Self::TILE).enumerate() {
                    turn_words(&rows[16 * half * m.stride + K_BLOCK * block..], m.stride, tile);
                }
            }
        }
        out
    }

    /// The columns of `m_KN`.
    pub(crate) fn of_columns(m: Rows<'_>) -> Self {
        let mut out = Self::unwritten(m.columns, m.rows);
        for block in 0..m.rows.div_ceil(K_BLOCK) {
            out.put_rows(block, &m.block(block), m.stride, 0..m.columns.div_ceil(BLOCK));
        }
        out
    }

    /// Takes block `block` of `K` of the columns of blocks `n`, from the 32 rows that have it.
    fn put_rows(&mut self, block: usize, rows: &[Bf16], stride: usize, n: Range<usize>) {
        for n in n {
            let (left, right) = self.data[2 * n * self.panel..][..2 * self.panel].split_at_mut(self.panel);
            let tiles = [left, right].map(|panel| &mut panel[block * Self::TILE..][..Self::TILE]);
            pair_rows(&rows[BLOCK * n..], stride, tiles);
        }
    }

    /// Tiles of the 32 columns from `32 n` on.
    pub(super) fn pair(&self, n: usize) -> [&[u32]; 2] {
        let at = 2 * n * self.panel;
        [&self.data[at..at + self.panel], &self.data[at + self.panel..at + 2 * self.panel]]
    }
}
