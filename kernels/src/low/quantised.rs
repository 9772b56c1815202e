//! E4M3 matrices as BF16 values with scales along `K` (technical report 3.3).

use super::{Matrix, TILE};
use crate::element::{Bf16, Element};
use crate::ops::quantise::{nearest, power_of_two, scale_of};

/// How a scale follows from a tile's largest magnitude.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scaling {
    /// The largest becomes the largest E4M3 value.
    Exact,
    /// The same, rounded up to a power of two.
    PowerOfTwo,
}

impl Scaling {
    #[inline(always)]
    fn of(self, largest: f32) -> f32 {
        let scale = scale_of(largest);
        if self == Self::PowerOfTwo { power_of_two(scale) } else { scale }
    }
}

/// Values and scales.
#[derive(Debug, Clone)]
pub(crate) struct Quantised {
    pub(crate) values: Matrix,
    /// By row and tile, by block of 128 rows and tile, or of [`Self::columns`] by column and tile.
    pub(crate) scales: Vec<f32>,
}

impl Quantised {
    /// `x_TK` in tiles of 1 x 128.
    pub(crate) fn rows<E: Element>(x: &[E], rows: usize, columns: usize, scaling: Scaling) -> Self {
        let mut values = Matrix::padded(rows, columns);
        let mut scales = Vec::with_capacity(rows * columns.div_ceil(TILE));
        let mut scratch = vec![0.0; columns];
        crate::wide::run(
            #[inline(always)]
            || {
                for (row, to) in x.chunks_exact(columns.max(1)).zip(values.data.chunks_exact_mut(values.stride)) {
                    for (tile, to) in E::row(row, &mut scratch).chunks(TILE).zip(to.chunks_mut(TILE)) {
                        let scale = scaling.of(largest(tile));
                        scales.push(scale);
                        for (to, x) in to.iter_mut().zip(tile) {
                            *to = bits(nearest(x / scale));
                        }
                    }
                }
            },
        );
        Self { values, scales }
    }

    /// `w_OK` in blocks of 128 x 128.
    pub(crate) fn blocks(w: &[f32], rows: usize, columns: usize) -> Self {
        let tiles = columns.div_ceil(TILE);
        let mut greatest = vec![0.0f32; rows.div_ceil(TILE) * tiles];
        let mut values = Matrix::padded(rows, columns);
        crate::wide::run(
            #[inline(always)]
            || {
                for (r, row) in w.chunks_exact(columns).enumerate() {
                    for (tile, greatest) in row.chunks(TILE).zip(&mut greatest[r / TILE * tiles..]) {
                        *greatest = greatest.max(largest(tile));
                    }
                }
            },
        );
        let scales: Vec<f32> = greatest.into_iter().map(|x| Scaling::Exact.of(x)).collect();
        crate::wide::run(
            #[inline(always)]
            || {
                for (r, (row, to)) in
                    w.chunks_exact(columns).zip(values.data.chunks_exact_mut(values.stride)).enumerate()
                {
                    for ((tile, to), scale) in
                        row.chunks(TILE).zip(to.chunks_mut(TILE)).zip(&scales[r / TILE * tiles..])
                    {
                        for (to, x) in to.iter_mut().zip(tile) {
                            *to = bits(nearest(x / scale));
                        }
                    }
                }
            },
        );
        Self { values, scales }
    }

    /// `x_TN` in tiles of 128 x 1 along the tokens; scales by column, then tile.
    pub(crate) fn columns<E: Element>(x: &[E], rows: usize, columns: usize, scaling: Scaling) -> Self {
        let mut values = Matrix::padded(rows, columns);
        let tiles = rows.div_ceil(TILE);
        let mut scales = vec![0.0; columns * tiles];
        let (mut of, mut scratch) = (vec![0.0f32; columns], vec![0.0; columns]);
        crate::wide::run(
            #[inline(always)]
            || {
                let parts = x.chunks(TILE * columns.max(1)).zip(values.data.chunks_mut(TILE * values.stride));
                for (tile, (x, to)) in parts.enumerate() {
                    of.fill(0.0);
                    for row in x.chunks_exact(columns) {
                        for (m, x) in of.iter_mut().zip(E::row(row, &mut scratch)) {
                            *m = if x.abs() > *m { x.abs() } else { *m };
                        }
                    }
                    for (c, of) in of.iter_mut().enumerate() {
                        *of = scaling.of(*of);
                        scales[c * tiles + tile] = *of;
                    }
                    for (row, to) in x.chunks_exact(columns).zip(to.chunks_exact_mut(values.stride)) {
                        for ((to, x), of) in to.iter_mut().zip(E::row(row, &mut scratch)).zip(&of) {
                            *to = bits(nearest(x / of));
                        }
                    }
                }
            },
        );
        Self { values, scales }
    }

    /// The values, rounded to f32.
    pub(crate) fn dequantised_rows(&self) -> Vec<f32> {
        let Matrix { rows, columns, stride, data } = &self.values;
        let mut out = crate::wide::unwritten(rows * columns);
        let tiles = columns.div_ceil(TILE);
        crate::wide::run(
            #[inline(always)]
            || {
                for (r, (to, from)) in
                    out.chunks_exact_mut((*columns).max(1)).zip(data.chunks_exact(*stride)).enumerate()
                {
                    for (t, (to, from)) in to.chunks_mut(TILE).zip(from.chunks(TILE)).enumerate() {
                        let scale = self.scales[r * tiles + t];
                        for (to, from) in to.iter_mut().zip(from) {
                            *to = from.value() * scale;
                        }
                    }
                }
            },
        );
        out
    }
}

/// E4M3 values are exact in BF16.
#[inline(always)]
fn bits(value: f32) -> Bf16 {
    Bf16((value.to_bits() >> 16) as u16)
}

/// The largest magnitude, by lanes: a maximum has no order that could show.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let (mut lanes, (whole, rest)) = ([0.0f32; 16], x.as_chunks::<16>());
    for chunk in whole {
        lanes.iter_mut().zip(chunk).for_each(|(m, x)| *m = if x.abs() > *m { x.abs() } else { *m });
    }
    lanes.iter().chain(rest).fold(0.0, |m, x| if x.abs() > m { x.abs() } else { m })
}
