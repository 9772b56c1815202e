//! The contract in plain code, with the bits of AMX.

use super::{BLOCK, Columns, K_BLOCK, Part};
use crate::math::bf16_value;

/// Zero instead of a subnormal number.
#[inline(always)]
fn flushed(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { x * 0.0 } else { x }
}

/// See [`super::Path::part`].
pub(super) fn part(a: &[u16], stride: usize, b: [&[u32]; 2], from: usize, to: usize, out: &mut Part) {
    *out = [[0.0; BLOCK]; BLOCK];
    crate::wide::run(
        #[inline(always)]
        || {
            for block in from..to {
                for (m, out) in out.iter_mut().enumerate() {
                    let row = &a[m * stride + block * K_BLOCK..][..K_BLOCK];
                    for (b, out) in b.iter().zip(out.chunks_exact_mut(16)) {
                        let tile = &b[block * Columns::TILE..][..Columns::TILE];
                        let (mut even, mut odd) = ([0.0f32; 16], [0.0f32; 16]);
                        for (pair, words) in row.chunks_exact(2).zip(tile.chunks_exact(16)) {
                            let (x, y) = (bf16_value(pair[0]), bf16_value(pair[1]));
                            for i in 0..16 {
                                even[i] = flushed(x.mul_add(bf16_value(words[i] as u16), even[i]));
                                odd[i] = flushed(y.mul_add(bf16_value((words[i] >> 16) as u16), odd[i]));
                            }
                        }
                        for i in 0..16 {
                            out[i] = flushed(out[i] + flushed(even[i] + odd[i]));
                        }
                    }
                }
            }
        },
    );
}
