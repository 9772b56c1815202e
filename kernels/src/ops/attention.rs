//! Causal attention over latent keys and values (multi-head latent attention, technical report 2.1.1).
//!
//! Shapes, with `T` tokens as whole sequences of `S`, `H` heads, `N` key columns without and `R` with
//! rotation, `V` value columns: `q_T,H(N+R)` (rotated), `kv_T,H(N+V)`, `k_rope_T,R` (rotated, shared by
//! the heads), `o_T,HV`, `lse_T,H` (logarithm of the softmax's denominator, with the maximum).
//!
//! A score is the product over `N` plus the product over `R`, in that order, then scaled. A softmax
//! row sums in the fixed order of [`crate::math::sum_of`] over all `S` columns, of which those in the
//! future are zero. The gradient of `k_rope` adds heads in ascending order. Sequences do not mix, so a
//! row depends on its own sequence alone.

use crate::gemm::{Target, View, gemm};
use crate::math::{exp, largest, logarithm, sum_of};
use crate::wide;

/// Sizes of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Heads.
    pub heads: usize,
    /// Key columns of a head without rotation.
    pub nope: usize,
    /// Key columns with rotation.
    pub rope: usize,
    /// Value columns of a head.
    pub value: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Factor of the scores, `(N + R)^-0.5` without YaRN.
    pub scale: f32,
}

impl AttentionShape {
    pub(crate) fn q_row(&self) -> usize {
        self.heads * (self.nope + self.rope)
    }

    pub(crate) fn kv_row(&self) -> usize {
        self.heads * (self.nope + self.value)
    }

    pub(crate) fn o_row(&self) -> usize {
        self.heads * self.value
    }
}

/// Where one head of one sequence lies in each operand.
pub(crate) struct Head<'a> {
    pub(crate) s: &'a AttentionShape,
    /// First token of the sequence.
    pub(crate) first: usize,
    pub(crate) head: usize,
}

impl Head<'_> {
    pub(crate) fn q_at(&self) -> usize {
        self.first * self.s.q_row() + self.head * (self.s.nope + self.s.rope)
    }

    pub(crate) fn kv_at(&self) -> usize {
        self.first * self.s.kv_row() + self.head * (self.s.nope + self.s.value)
    }

    pub(crate) fn o_at(&self) -> usize {
        self.first * self.s.o_row() + self.head * self.s.value
    }

    fn q_nope<'b>(&self, q: &'b [f32]) -> View<'b> {
        View::strided(&q[self.q_at()..], self.s.sequence, self.s.nope, self.s.q_row())
    }

    fn q_rope<'b>(&self, q: &'b [f32]) -> View<'b> {
        View::strided(&q[self.q_at() + self.s.nope..], self.s.sequence, self.s.rope, self.s.q_row())
    }

    fn k_nope<'b>(&self, kv: &'b [f32]) -> View<'b> {
        View::strided(&kv[self.kv_at()..], self.s.sequence, self.s.nope, self.s.kv_row())
    }

    fn values<'b>(&self, kv: &'b [f32]) -> View<'b> {
        View::strided(&kv[self.kv_at() + self.s.nope..], self.s.sequence, self.s.value, self.s.kv_row())
    }

    fn k_rope<'b>(&self, k_rope: &'b [f32]) -> View<'b> {
        View::strided(&k_rope[self.first * self.s.rope..], self.s.sequence, self.s.rope, self.s.rope)
    }

    fn output<'b>(&self, o: &'b [f32]) -> View<'b> {
        View::strided(&o[self.o_at()..], self.s.sequence, self.s.value, self.s.o_row())
    }

    /// Scaled scores `[S, S]`; the future is not masked yet.
    fn scores(&self, q: &[f32], kv: &[f32], k_rope: &[f32]) -> Vec<f32> {
        let n = self.s.sequence;
        let mut scores = wide::unwritten(n * n);
        let target = &mut Target { data: &mut scores, row_stride: n };
        gemm(target, self.q_nope(q), self.k_nope(kv).transposed(), false);
        gemm(target, self.q_rope(q), self.k_rope(k_rope).transposed(), true);
        wide::run(
            #[inline(always)]
            || scores.iter_mut().for_each(|x| *x *= self.s.scale),
        );
        scores
    }
}

/// All heads of all sequences, in order.
pub(crate) fn heads(s: &AttentionShape, tokens: usize) -> impl Iterator<Item = Head<'_>> {
    (0..tokens / s.sequence).flat_map(move |b| (0..s.heads).map(move |head| Head { s, first: b * s.sequence, head }))
}

/// `q, kv, k_rope -> (o, lse)`.
pub(crate) fn forward(q: &[f32], kv: &[f32], k_rope: &[f32], s: &AttentionShape) -> (Vec<f32>, Vec<f32>) {
    let tokens = q.len() / s.q_row();
    let n = s.sequence;
    assert!(tokens.is_multiple_of(s.sequence), "whole sequences");
    let (mut o, mut lse) = (wide::unwritten(tokens * s.o_row()), wide::unwritten(tokens * s.heads));
    for at in heads(s, tokens) {
        let (first, head) = (at.first, at.head);
        let mut p = at.scores(q, kv, k_rope);
        wide::run(
            #[inline(always)]
            || {
                for (i, row) in p.chunks_exact_mut(n).enumerate() {
                    let (past, future) = row.split_at_mut(i + 1);
                    let max = largest(past);
                    past.iter_mut().for_each(|x| *x = exp(*x - max));
                    future.fill(0.0);
                    let sum = sum_of([row], |[p]| p);
                    row.iter_mut().for_each(|x| *x /= sum);
                    lse[(first + i) * s.heads + head] = max + logarithm(sum) as f32;
                }
            },
        );
        let target = &mut Target { data: &mut o[at.o_at()..], row_stride: s.o_row() };
        gemm(target, View::new(&p, n, n), at.values(kv), false);
    }
    (o, lse)
}

/// What [`backward`] reads.
#[derive(Debug)]
pub(crate) struct Saved<'a, E> {
    pub(crate) q: &'a [E],
    pub(crate) kv: &'a [E],
    pub(crate) k_rope: &'a [E],
    pub(crate) o: &'a [E],
    pub(crate) lse: &'a [f32],
}

/// `dO -> (dq, dkv, dk_rope)`; the probabilities are made again from the scores.
pub(crate) fn backward(saved: &Saved<'_, f32>, d_o: &[f32], s: &AttentionShape) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let Saved { q, kv, k_rope, o, lse } = saved;
    let tokens = q.len() / s.q_row();
    let n = s.sequence;
    let (mut dq, mut dkv) = (wide::unwritten(q.len()), wide::unwritten(kv.len()));
    let mut dk_rope = vec![0.0; k_rope.len()];
    for at in heads(s, tokens) {
        let (first, head) = (at.first, at.head);
        let mut p = at.scores(q, kv, k_rope);
        wide::run(
            #[inline(always)]
            || {
                for (i, row) in p.chunks_exact_mut(n).enumerate() {
                    let lse = lse[(first + i) * s.heads + head];
                    row[..=i].iter_mut().for_each(|x| *x = exp(*x - lse));
                    row[i + 1..].fill(0.0);
                }
            },
        );
        let mut ds = wide::unwritten(n * n);
        gemm(&mut Target { data: &mut ds, row_stride: n }, at.output(d_o), at.values(kv).transposed(), false);
        let values = &mut dkv[at.kv_at() + s.nope..];
        gemm(
            &mut Target { data: values, row_stride: s.kv_row() },
            View::new(&p, n, n).transposed(),
            at.output(d_o),
            false,
        );
        wide::run(
            #[inline(always)]
            || {
                for (i, (ds, p)) in ds.chunks_exact_mut(n).zip(p.chunks_exact(n)).enumerate() {
                    let from = at.o_at() + i * s.o_row();
                    let row = from..from + s.value;
                    let inner = sum_of([&d_o[row.clone()], &o[row]], |[d_o, o]| d_o * o);
                    ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = (p * (*ds - inner)) * s.scale);
                }
            },
        );
        let ds = View::new(&ds, n, n);
        let (q_at, row) = (at.q_at(), s.q_row());
        gemm(&mut Target { data: &mut dq[q_at..], row_stride: row }, ds, at.k_nope(kv), false);
        gemm(&mut Target { data: &mut dq[q_at + s.nope..], row_stride: row }, ds, at.k_rope(k_rope), false);
        let keys = &mut dkv[at.kv_at()..];
        gemm(&mut Target { data: keys, row_stride: s.kv_row() }, ds.transposed(), at.q_nope(q), false);
        let keys = &mut dk_rope[first * s.rope..];
        gemm(&mut Target { data: keys, row_stride: s.rope }, ds.transposed(), at.q_rope(q), head > 0);
    }
    (dq, dkv, dk_rope)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn shape(sequence: usize) -> AttentionShape {
        AttentionShape { heads: 2, nope: 3, rope: 2, value: 4, sequence, scale: 5.0f32.powf(-0.5) }
    }

    fn reference(q: &[f64], kv: &[f64], k_rope: &[f64], s: &AttentionShape) -> Vec<f64> {
        let tokens = q.len() / s.q_row();
        let mut o = vec![0.0; tokens * s.o_row()];
        for t in 0..tokens {
            let first = t / s.sequence * s.sequence;
            for h in 0..s.heads {
                let q = &q[t * s.q_row() + h * (s.nope + s.rope)..];
                let kv_at = |u: usize| u * s.kv_row() + h * (s.nope + s.value);
                let weights: Vec<f64> = (first..=t)
                    .map(|u| {
                        let nope: f64 = (0..s.nope).map(|i| q[i] * kv[kv_at(u) + i]).sum();
                        let rope: f64 = (0..s.rope).map(|i| q[s.nope + i] * k_rope[u * s.rope + i]).sum();
                        ((nope + rope) * f64::from(s.scale)).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for c in 0..s.value {
                    o[t * s.o_row() + h * s.value + c] =
                        (first..=t).map(|u| weights[u - first] / total * kv[kv_at(u) + s.nope + c]).sum();
                }
            }
        }
        o
    }

    #[test]
    fn agrees_with_the_reference() {
        for (sequence, sequences) in [(1, 2), (5, 2), (7, 1)] {
            let s = shape(sequence);
            let t = sequence * sequences;
            let (q, kv, kr) = (random(t * s.q_row(), 1), random(t * s.kv_row(), 2), random(t * s.rope, 3));
            let d_o = random(t * s.o_row(), 4);
            let (o, lse) = forward(&q, &kv, &kr, &s);
            let f = |q: &[f64], kv: &[f64], kr: &[f64]| reference(q, kv, kr, &s);
            assert_close(&o, &f(&wide(&q), &wide(&kv), &wide(&kr)), 2e-6, "o");
            let saved = Saved { q: &q, kv: &kv, k_rope: &kr, o: &o, lse: &lse };
            let (dq, dkv, dkr) = backward(&saved, &d_o, &s);
            let want = gradient(&q, |x| dot(&f(x, &wide(&kv), &wide(&kr)), &d_o));
            // A lone token has no gradient through its score: differences give zero.
            if sequence > 1 {
                assert_close(&dq, &want, 5e-6, "dq");
                assert_close(&dkr, &gradient(&kr, |x| dot(&f(&wide(&q), &wide(&kv), x), &d_o)), 5e-6, "dk_rope");
            }
            assert_close(&dkv, &gradient(&kv, |x| dot(&f(&wide(&q), x, &wide(&kr)), &d_o)), 5e-6, "dkv");
        }
    }

    #[test]
    fn a_sequence_does_not_depend_on_the_others() {
        let s = shape(6);
        let t = 18;
        let (q, kv, kr) = (random(t * s.q_row(), 5), random(t * s.kv_row(), 6), random(t * s.rope, 7));
        let d_o = random(t * s.o_row(), 8);
        let (o, lse) = forward(&q, &kv, &kr, &s);
        let all = backward(&Saved { q: &q, kv: &kv, k_rope: &kr, o: &o, lse: &lse }, &d_o, &s);
        for b in 0..3 {
            let cut = |x: &[f32], row: usize| x[b * 6 * row..][..6 * row].to_vec();
            let (q, kv, kr) = (cut(&q, s.q_row()), cut(&kv, s.kv_row()), cut(&kr, s.rope));
            let (part, lse) = forward(&q, &kv, &kr, &s);
            assert!(same_bits(&part, &cut(&o, s.o_row())));
            let saved = Saved { q: &q, kv: &kv, k_rope: &kr, o: &part, lse: &lse };
            let (dq, dkv, dkr) = backward(&saved, &cut(&d_o, s.o_row()), &s);
            assert!(same_bits(&dq, &cut(&all.0, s.q_row())));
            assert!(same_bits(&dkv, &cut(&all.1, s.kv_row())));
            assert!(same_bits(&dkr, &cut(&all.2, s.rope)));
        }
    }
}
