//! The attention of [`super::attention`] with BF16 operands and FP32 sums: scores from rounded queries and
//! keys, softmax in f32, probabilities and their gradients rounded before they are multiplied.
//!
//! A score is one product over a head's `N + R` columns. Parts that the causal mask makes zero are left
//! out; they would add nothing. Gradients of the shared `k_rope` add heads in ascending order in FP32.

use super::attention::{AttentionShape, Head, Saved, heads};
use crate::element::{Bf16, Element, rounded};
use crate::low::{BLOCK, Causal, Columns, Matrix, Path, Target, product};
use crate::math::{exp, largest, sum_of};
use crate::wide::unwritten;

impl Head<'_> {
    fn queries(&self, q: &[Bf16]) -> Matrix {
        Matrix::round(&q[self.q_at()..], self.s.sequence, self.s.nope + self.s.rope, self.s.q_row())
    }

    /// Keys with and without rotation side by side.
    fn keys(&self, kv: &[Bf16], k_rope: &[Bf16]) -> Matrix {
        let (n, nope, rope) = (self.s.sequence, self.s.nope, self.s.rope);
        let mut keys = Matrix::padded(n, nope + rope);
        for (i, key) in keys.data.chunks_exact_mut(keys.stride).take(n).enumerate() {
            key[..nope].copy_from_slice(&kv[self.kv_at() + i * self.s.kv_row()..][..nope]);
            key[nope..][..rope].copy_from_slice(&k_rope[(self.first + i) * rope..][..rope]);
        }
        keys
    }

    fn rounded_values(&self, kv: &[Bf16]) -> Matrix {
        Matrix::round(&kv[self.kv_at() + self.s.nope..], self.s.sequence, self.s.value, self.s.kv_row())
    }

    fn outputs(&self, o: &[Bf16]) -> Matrix {
        Matrix::round(&o[self.o_at()..], self.s.sequence, self.s.value, self.s.o_row())
    }
}

/// Columns of a row up to which the mask lets products be made: whole parts.
fn reach(i: usize, n: usize) -> usize {
    (i / BLOCK * BLOCK + BLOCK).min(n)
}

/// Scores, of which those after the row's part are left as they are.
fn scores(path: Path, q: &Matrix, keys: &Matrix, out: &mut [f32]) {
    let n = q.rows;
    product(path, q.view(), &Columns::of_rows(keys.view()), Causal::Columns, &mut Target { data: out, stride: n });
}

/// `q, kv, k_rope -> (o, lse)`.
pub(crate) fn forward(
    path: Path,
    q: &[Bf16],
    kv: &[Bf16],
    k_rope: &[Bf16],
    s: &AttentionShape,
) -> (Vec<Bf16>, Vec<f32>) {
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
        let to = &mut Target { data: &mut o[at.o_at()..], stride: s.o_row() };
        product(path, p.view(), &Columns::of_columns(at.rounded_values(kv).view()), Causal::TermsUpTo, to);
    }
    (o, lse)
}

/// `dO -> (dq, dkv, dk_rope)`; the probabilities are made again from the scores.
pub(crate) fn backward(
    path: Path,
    saved: &Saved<'_, Bf16>,
    d_o: &[Bf16],
    s: &AttentionShape,
) -> (Vec<Bf16>, Vec<Bf16>, Vec<Bf16>) {
    let Saved { q, kv, k_rope, o, lse } = saved;
    let (tokens, n, width) = (q.len() / s.q_row(), s.sequence, s.nope + s.rope);
    let (mut dq, mut dkv, mut dk_rope) = (unwritten(q.len()), unwritten(kv.len()), vec![0.0; k_rope.len()]);
    let (mut p, mut ds, mut inner) = (vec![0.0; n * n], vec![0.0; n * n], vec![0.0; s.value]);
    for at in heads(s, tokens) {
        let (queries, keys, outputs) = (at.queries(q), at.keys(kv, k_rope), at.outputs(d_o));
        scores(path, &queries, &keys, &mut p);
        let values = at.rounded_values(kv);
        let to = &mut Target { data: &mut ds, stride: n };
        product(path, outputs.view(), &Columns::of_rows(values.view()), Causal::Columns, to);
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
                    let [d_o, o] = [&d_o[at.clone()], &o[at]].map(|x| x.iter().map(|x| x.value()));
                    inner.iter_mut().zip(d_o.zip(o)).for_each(|(to, (d_o, o))| *to = d_o * o);
                    let inner = sum_of([&inner], |[x]| x);
                    for (ds, p) in ds.iter_mut().zip(p) {
                        *ds = (*p * (*ds - inner)) * s.scale;
                    }
                    ds[i + 1..].fill(0.0);
                }
            },
        );
        let (p, ds) = (Matrix::round(&p, n, n, n), Matrix::round(&ds, n, n, n));
        let to = &mut Target { data: &mut dkv[at.kv_at() + s.nope..], stride: s.kv_row() };
        product(path, p.view().transposed().view(), &Columns::of_columns(outputs.view()), Causal::TermsFrom, to);
        let to = &mut Target { data: &mut dq[at.q_at()..], stride: s.q_row() };
        product(path, ds.view(), &Columns::of_columns(keys.view()), Causal::TermsUpTo, to);
        let mut dkeys: Vec<f32> = unwritten(n * width);
        let to = &mut Target { data: &mut dkeys, stride: width };
        product(path, ds.view().transposed().view(), &Columns::of_columns(queries.view()), Causal::TermsFrom, to);
        for (row, dkey) in dkeys.chunks_exact(width).enumerate() {
            let own = &mut dkv[at.kv_at() + row * s.kv_row()..][..s.nope];
            own.iter_mut().zip(dkey).for_each(|(to, x)| *to = Bf16::nearest(*x));
            let shared = &mut dk_rope[(at.first + row) * s.rope..][..s.rope];
            shared.iter_mut().zip(&dkey[s.nope..]).for_each(|(sum, x)| *sum += x);
        }
    }
    (dq, dkv, rounded(&dk_rope))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::values;
    use crate::ops::attention;
    use crate::ops::testing::*;

    /// Against f32 on rounded operands: what differs is the rounding of probabilities and their gradients,
    /// some 2^-9 of each, so 1e-2 of the largest result is generous and a wrong mask is far outside.
    #[test]
    fn agrees_with_f32_within_the_rounding_of_operands() {
        for (sequence, sequences) in [(1, 2), (5, 2), (70, 1), (64, 2)] {
            let s = AttentionShape { heads: 3, nope: 8, rope: 4, value: 6, sequence, scale: 12.0f32.powf(-0.5) };
            let t = sequence * sequences;
            let low = |n, name| rounded::<Bf16>(&random(n, name));
            let (q, kv, kr, d_o) =
                (low(t * s.q_row(), 1), low(t * s.kv_row(), 2), low(t * s.rope, 3), low(t * s.o_row(), 4));
            let [fq, fkv, fkr, fd_o] = [&q, &kv, &kr, &d_o].map(|x| values(x));
            let (o, lse) = attention::forward(&fq, &fkv, &fkr, &s);
            let saved = Saved { q: &fq, kv: &fkv, k_rope: &fkr, o: &o, lse: &lse };
            let (dq, dkv, dkr) = attention::backward(&saved, &fd_o, &s);
            let lo = rounded::<Bf16>(&o);
            let saved = Saved { q: &q, kv: &kv, k_rope: &kr, o: &lo, lse: &lse };
            for path in Path::available() {
                let (lo, llse) = forward(path, &q, &kv, &kr, &s);
                assert_close(&values(&lo), &wide(&o), 1e-2, "o");
                assert_close(&llse, &wide(&lse), 1e-5, "lse");
                let (ldq, ldkv, ldkr) = backward(path, &saved, &d_o, &s);
                if sequence > 1 {
                    assert_close(&values(&ldq), &wide(&dq), 1e-2, "dq");
                    assert_close(&values(&ldkr), &wide(&dkr), 1e-2, "dk_rope");
                }
                assert_close(&values(&ldkv), &wide(&dkv), 1e-2, "dkv");
            }
        }
    }

    #[test]
    fn a_sequence_does_not_depend_on_the_others() {
        let s = AttentionShape { heads: 2, nope: 8, rope: 4, value: 6, sequence: 40, scale: 0.3 };
        let [q, kv, kr] =
            [(s.q_row(), 1), (s.kv_row(), 2), (s.rope, 3)].map(|(row, name)| rounded(&random(80 * row, name)));
        for path in Path::available() {
            let whole = forward(path, &q, &kv, &kr, &s).0;
            let half = forward(path, &q[40 * s.q_row()..], &kv[40 * s.kv_row()..], &kr[40 * s.rope..], &s).0;
            assert_eq!(half, whole[40 * s.o_row()..]);
        }
    }
}
