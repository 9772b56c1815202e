//! The contract in plain code, with the bits of AMX.

use super::{BLOCK, Columns, K_BLOCK, Part};
use crate::element::{Bf16, Element};

/// Zero instead of a subnormal number.
#[inline(always)]
fn flushed(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { x * 0.0 } else { x }
}

/// The values of a tile's words: the lower and the upper of each pair.
#[inline(always)]
fn halves(tile: &[u32]) -> [[f32; Columns::TILE]; 2] {
    let mut out = [[0.0; Columns::TILE]; 2];
    for (i, word) in tile.iter().enumerate() {
        out[0][i] = flushed(f32::from_bits(word << 16));
        out[1][i] = flushed(f32::from_bits(word & 0xffff_0000));
    }
    out
}

/// See [`super::Path::part`].
pub(super) fn part(a: &[Bf16], stride: usize, b: [&[u32]; 2], from: usize, to: usize, out: &mut Part) {
    *out = [[0.0; BLOCK]; BLOCK];
    crate::wide::run(
        #[inline(always)]
        || {
            for block in from..to {
                for (n, b) in b.iter().enumerate() {
                    let [low, high] = halves(&b[block * Columns::TILE..][..Columns::TILE]);
                    for (m, out) in out.iter_mut().enumerate() {
                        let row = &a[m * stride + block * K_BLOCK..][..K_BLOCK];
                        let (mut even, mut odd) = ([0.0f32; 16], [0.0f32; 16]);
                        for (pair, (low, high)) in
                            row.chunks_exact(2).zip(low.chunks_exact(16).zip(high.chunks_exact(16)))
                        {
                            let (x, y) = (flushed(pair[0].value()), flushed(pair[1].value()));
                            for i in 0..16 {
                                even[i] = flushed(x.mul_add(low[i], even[i]));
                                odd[i] = flushed(y.mul_add(high[i], odd[i]));
                            }
                        }
                        for (i, out) in out[16 * n..][..16].iter_mut().enumerate() {
                            *out = flushed(*out + flushed(even[i] + odd[i]));
                        }
                    }
                }
            }
        },
    );
}
