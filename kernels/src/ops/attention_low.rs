//! The attention of [`super::attention`] with BF16 operands and FP32 sums: scores from rounded queries and
//! keys, softmax in f32, probabilities and their gradients rounded before they are multiplied.
//!
//! A score is one product over a head's `N + R` columns. Parts that the causal mask makes zero are left
//! out; they would add nothing. Gradients of the shared `k_rope` add heads in ascending order in FP32.

use super::attention::{AttentionShape, Head, Saved, heads};
use crate::low::{BLOCK, Causal, Columns, Matrix, Path, Target, product};
use crate::math::{exp, largest, sum_of};
use crate::wide::unwritten;

impl Head<'_> {
    fn queries(&self, q: &[f32]) -> Matrix {
        Matrix::round(&q[self.q_at()..], self.s.sequence, self.s.nope + self.s.rope, self.s.q_row())
    }

    /// Keys with and without rotation side by side.
    fn keys(&self, kv: &[f32], k_rope: &[f32]) -> Matrix {
        let (n, nope, rope) = (self.s.sequence, self.s.nope, self.s.rope);
        let mut keys = unwritten(n * (nope + rope));
        for (i, key) in keys.chunks_exact_mut(nope + rope).enumerate() {
            key[..nope].copy_from_slice(&kv[self.kv_at() + i * self.s.kv_row()..][..nope]);
            key[nope..].copy_from_slice(&k_rope[(self.first + i) * rope..][..rope]);
        }
        Matrix::round(&keys, n, nope + rope, nope + rope)
    }

    fn rounded_values(&self, kv: &[f32]) -> Matrix {
        Matrix::round(&kv[self.kv_at() + self.s.nope..], self.s.sequence, self.s.value, self.s.kv_row())
    }

    fn outputs(&self, o: &[f32]) -> Matrix {
        Matrix::round(&o[self.o_at()..], self.s.sequence, self.s.value, self.s.o_row())
    }
}

/// Rows `stride` apart, not rounded.
fn plain(data: &mut [f32], stride: usize) -> Target<'_> {
    Target { data, stride, round: false }
}

/// Columns of a row up to which the mask lets products be made: whole parts.
fn reach(i: usize, n: usize) -> usize {
    (i / BLOCK * BLOCK + BLOCK).min(n)
}

/// Scores, of which those after the row's part are left as they are.
fn scores(path: Path, q: &Matrix, keys: &Matrix, out: &mut [f32]) {
    let n = q.rows;
    product(path, q, &Columns::of_rows(keys), Causal::Columns, &mut plain(out, n));
}

/// `q, kv, k_rope -> (o, lse)`.
pub(crate) fn forward(path: Path, q: &[f32], kv: &[f32], k_rope: &[f32], s: &AttentionShape) -> (Vec<f32>, Vec<f32>) {
    let (tokens, n) = (q.len() / s.q_row(), s.sequence);
    assert!(tokens.is_multiple_of(s.sequence), "whole sequences");
    let (mut o, mut lse) = (unwritten(tokens * s.o_row()), unwritten(tokens * s.heads));
    let mut p = vec![0.0; n * n];
    for at in heads(s, tokens) {
        scores(path, &at.queries(q), &at.keys(kv, k_rope), &mut p);
        crate::wide::run(
            #[inline(always)]
            || {
                for (i, row) in p.chunks_exact_mut(n).enumerate() {
                    let row = &mut row[..reach(i, n)];
                    let (past, future) = row.split_at_mut(i + 1);
                    let max = largest(past) * s.scale;
                    for x in past.iter_mut() {
                        *x = exp(*x * s.scale - max);
                    }
                    future.fill(0.0);
                    let sum = sum_of([row], |[p]| p);
                    for x in row.iter_mut() {
                        *x /= sum;
                    }
                    lse[(at.first + i) * s.heads + at.head] = max + libm::log(f64::from(sum)) as f32;
                }
            },
        );
        // Stale scores lie in parts that are not read.
        let p = Matrix::round(&p, n, n, n);
        let to = &mut plain(&mut o[at.o_at()..], s.o_row());
        product(path, &p, &Columns::of_columns(&at.rounded_values(kv)), Causal::TermsUpTo, to);
    }
    (o, lse)
}

/// `dO -> (dq, dkv, dk_rope)`; the probabilities are made again from the scores.
pub(crate) fn backward(
    path: Path,
    saved: &Saved<'_>,
    d_o: &[f32],
    s: &AttentionShape,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let Saved { q, kv, k_rope, o, lse } = saved;
    let (tokens, n, width) = (q.len() / s.q_row(), s.sequence, s.nope + s.rope);
    let (mut dq, mut dkv, mut dk_rope) = (unwritten(q.len()), unwritten(kv.len()), vec![0.0; k_rope.len()]);
    let (mut p, mut ds) = (vec![0.0; n * n], vec![0.0; n * n]);
    for at in heads(s, tokens) {
        let (queries, keys, outputs) = (at.queries(q), at.keys(kv, k_rope), at.outputs(d_o));
        scores(path, &queries, &keys, &mut p);
        product(path, &outputs, &Columns::of_rows(&at.rounded_values(kv)), Causal::Columns, &mut plain(&mut ds, n));
        crate::wide::run(
            #[inline(always)]
            || {
                for (i, (p, ds)) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).enumerate() {
                    let (p, ds) = (&mut p[..reach(i, n)], &mut ds[..reach(i, n)]);
                    let lse = lse[(at.first + i) * s.heads + at.head];
                    for x in &mut p[..=i] {
                        *x = exp(*x * s.scale - lse);
                    }
                    p[i + 1..].fill(0.0);
                    let from = at.o_at() + i * s.o_row();
                    let at = from..from + s.value;
                    let inner = sum_of([&d_o[at.clone()], &o[at]], |[d_o, o]| d_o * o);
                    for (ds, p) in ds.iter_mut().zip(p) {
                        *ds = (*p * (*ds - inner)) * s.scale;
                    }
                    ds[i + 1..].fill(0.0);
                }
            },
        );
        let (p, ds) = (Matrix::round(&p, n, n, n), Matrix::round(&ds, n, n, n));
        let to = &mut plain(&mut dkv[at.kv_at() + s.nope..], s.kv_row());
        product(path, &p.transposed(), &Columns::of_columns(&outputs), Causal::TermsFrom, to);
        let to = &mut plain(&mut dq[at.q_at()..], s.q_row());
        product(path, &ds, &Columns::of_columns(&keys), Causal::TermsUpTo, to);
        let mut dkeys = unwritten(n * width);
        let to = &mut plain(&mut dkeys, width);
        product(path, &ds.transposed(), &Columns::of_columns(&queries), Causal::TermsFrom, to);
        for (row, dkey) in dkeys.chunks_exact(width).enumerate() {
            dkv[at.kv_at() + row * s.kv_row()..][..s.nope].copy_from_slice(&dkey[..s.nope]);
            let shared = &mut dk_rope[(at.first + row) * s.rope..][..s.rope];
            shared.iter_mut().zip(&dkey[s.nope..]).for_each(|(sum, x)| *sum += x);
        }
    }
    (dq, dkv, dk_rope)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::round_to_bf16;
    use crate::ops::attention;
    use crate::ops::testing::*;

    /// Against f32 on rounded operands: what differs is the rounding of probabilities and their gradients,
    /// some 2^-9 of each, so 1e-2 of the largest result is generous and a wrong mask is far outside.
    #[test]
    fn agrees_with_f32_within_the_rounding_of_operands() {
        for (sequence, sequences) in [(1, 2), (5, 2), (70, 1), (64, 2)] {
            let s = AttentionShape { heads: 3, nope: 8, rope: 4, value: 6, sequence, scale: 12.0f32.powf(-0.5) };
            let t = sequence * sequences;
            let low = |n, name| {
                let mut x = random(n, name);
                round_to_bf16(&mut x);
                x
            };
            let (q, kv, kr, d_o) =
                (low(t * s.q_row(), 1), low(t * s.kv_row(), 2), low(t * s.rope, 3), low(t * s.o_row(), 4));
            let (o, lse) = attention::forward(&q, &kv, &kr, &s);
            let saved = Saved { q: &q, kv: &kv, k_rope: &kr, o: &o, lse: &lse };
            let (dq, dkv, dkr) = attention::backward(&saved, &d_o, &s);
            for path in Path::available() {
                let (lo, llse) = forward(path, &q, &kv, &kr, &s);
                assert_close(&lo, &wide(&o), 1e-2, "o");
                assert_close(&llse, &wide(&lse), 1e-5, "lse");
                let (ldq, ldkv, ldkr) = backward(path, &saved, &d_o, &s);
                if sequence > 1 {
                    assert_close(&ldq, &wide(&dq), 1e-2, "dq");
                    assert_close(&ldkr, &wide(&dkr), 1e-2, "dk_rope");
                }
                assert_close(&ldkv, &wide(&dkv), 1e-2, "dkv");
            }
        }
    }

    #[test]
    fn a_sequence_does_not_depend_on_the_others() {
        let s = AttentionShape { heads: 2, nope: 8, rope: 4, value: 6, sequence: 40, scale: 0.3 };
        let (q, kv, kr) = (random(80 * s.q_row(), 1), random(80 * s.kv_row(), 2), random(80 * s.rope, 3));
        for path in Path::available() {
            let whole = forward(path, &q, &kv, &kr, &s).0;
            let half = forward(path, &q[40 * s.q_row()..], &kv[40 * s.kv_row()..], &kr[40 * s.rope..], &s).0;
            assert!(same_bits(&half, &whole[40 * s.o_row()..]));
        }
    }
}
