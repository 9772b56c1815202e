//! Attention over the compressed cache, for generation: keys and values are never made.
//!
//! With `kv_b` cut by head into `K_NC` and `V_VC`: a score is `(q_nope K) . latent + q_rope . k_rope`, and
//! a result `V (sum p latent)`. The same numbers as [`super::attention`], summed in another order.
//! Shapes: the newest `T` of `P` positions ask; `C` columns of a latent.

use super::attention::AttentionShape;
use crate::gemm::{Target, View, gemm};
use crate::math::{exp, sum_of};

/// What is remembered of one text.
#[derive(Debug)]
pub(crate) struct Cache<'a> {
    /// `[P, C]`.
    pub(crate) latent: &'a [f32],
    /// `[P, R]`.
    pub(crate) k_rope: &'a [f32],
    pub(crate) positions: usize,
    pub(crate) rank: usize,
}

/// `q_T,H(N+R)`, the cache, `kv_b_H(N+V),C -> o_T,HV`.
pub(crate) fn forward(q: &[f32], cache: &Cache<'_>, kv_b: &[f32], s: &AttentionShape) -> Vec<f32> {
    let (tokens, n, c) = (q.len() / s.q_row(), cache.positions, cache.rank);
    let past = n - tokens;
    let latent = View::new(cache.latent, n, c);
    let mut o = vec![0.0; tokens * s.o_row()];
    let (mut asked, mut p, mut found) = (vec![0.0; tokens * c], vec![0.0; tokens * n], vec![0.0; tokens * c]);
    for head in 0..s.heads {
        let q_at = head * (s.nope + s.rope);
        let w = &kv_b[head * (s.nope + s.value) * c..];
        let q_nope = View::strided(&q[q_at..], tokens, s.nope, s.q_row());
        let q_rope = View::strided(&q[q_at + s.nope..], tokens, s.rope, s.q_row());
        gemm(&mut Target { data: &mut asked, row_stride: c }, q_nope, View::new(w, s.nope, c), false);
        let scores = &mut Target { data: &mut p, row_stride: n };
        gemm(scores, View::new(&asked, tokens, c), latent.transposed(), false);
        gemm(scores, q_rope, View::new(cache.k_rope, n, s.rope).transposed(), true);
        for (i, row) in p.chunks_exact_mut(n).enumerate() {
            let (seen, future) = row.split_at_mut(past + i + 1);
            let max = seen.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x * s.scale));
            for x in seen.iter_mut() {
                *x = exp(*x * s.scale - max);
            }
            future.fill(0.0);
            let sum = sum_of([row], |[p]| p);
            for x in row.iter_mut() {
                *x /= sum;
            }
        }
        gemm(&mut Target { data: &mut found, row_stride: c }, View::new(&p, tokens, n), latent, false);
        let values = View::new(&w[s.nope * c..], s.value, c).transposed();
        let target = &mut Target { data: &mut o[head * s.value..], row_stride: s.o_row() };
        gemm(target, View::new(&found, tokens, c), values, false);
    }
    o
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use crate::ops::{attention, linear};

    #[test]
    fn agrees_with_attention_over_keys_and_values() {
        let (n, c) = (7, 5);
        let s = AttentionShape { heads: 2, nope: 3, rope: 2, value: 4, sequence: n, scale: 0.4 };
        let (q, latent, kr) = (random(n * s.q_row(), 1), random(n * c, 2), random(n * s.rope, 3));
        let kv_b = random(s.kv_row() * c, 4);
        let kv = linear::forward(&latent, &kv_b, n, s.kv_row(), c);
        let want = wide(&attention::forward(&q, &kv, &kr, &s).0);
        for past in [0, 3, 6] {
            let cache = Cache { latent: &latent, k_rope: &kr, positions: n, rank: c };
            let got = forward(&q[past * s.q_row()..], &cache, &kv_b, &s);
            // Both orders of sums are some roundings from the exact one.
            assert_close(&got, &want[past * s.o_row()..], 1e-5, "o");
        }
    }
}
