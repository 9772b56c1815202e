//! The attention of [`super::attention`] with BF16 operands and FP32 sums: scores from rounded queries and
//! keys, softmax in f32, probabilities and their gradients rounded before they are multiplied.
//!
//! A score is one product over a head's `N + R` columns. Parts that the causal mask makes zero are left
//! out; they would add nothing. Gradients of the shared `k_rope` add heads in ascending order in FP32.

use super::attention::{AttentionShape, Head, Saved, heads};
use crate::element::{Bf16, Element, rounded};
use crate::low::{BLOCK, Block, Causal, Columns, Maker, Matrix, Path, Strip, Target, Turned};
use crate::math::{exp, largest, logarithm, sum_of};
use crate::wide::unwritten;
use std::ops::Range;

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

/// One head's rows in strips of 32, each as far as the mask lets it reach.
struct Strips {
    maker: Maker,
    /// Tokens, and those of whole blocks.
    n: usize,
    padded: usize,
}

impl Strips {
    fn new(path: Path, n: usize) -> Self {
        Self { maker: Maker::new(path), n, padded: n.next_multiple_of(BLOCK) }
    }

    /// Rows of strip `m`.
    fn rows(&self, m: usize) -> Range<usize> {
        m * BLOCK..self.n.min((m + 1) * BLOCK)
    }

    /// A strip of numbers, zero at first.
    fn strip<E: Element>(&self) -> Vec<E> {
        vec![E::default(); BLOCK * self.padded]
    }

    /// Strip `m` of `a b^T`, up to block `m` of the columns: the mask leaves nothing after it.
    fn scores(&mut self, m: usize, a: &Matrix, b: &Columns, out: &mut [f32]) {
        let strip = Strip { left: a.left().block(m), rows: self.rows(m).len(), terms: 0..a.columns.div_ceil(BLOCK) };
        self.maker.multiply(&strip, b, m + 1, &mut Target { data: out, stride: self.padded });
    }

    /// Strip `m` times a matrix: columns after block `m` are not read.
    fn times<E: Element>(&mut self, m: usize, strip: &[Bf16], b: &Columns, to: &mut Target<'_, E>) {
        let left = Block::Rows { data: strip.into(), stride: self.padded };
        let strip = Strip { left, rows: self.rows(m).len(), terms: 0..m + 1 };
        self.maker.multiply(&strip, b, b.columns.div_ceil(BLOCK), to);
    }
}

/// `q, kv, k_rope -> (o, lse)`.
pub(crate) fn forward(
    path: Path,
    q: &[Bf16],
    kv: &[Bf16],
    k_rope: &[Bf16],
    s: &AttentionShape,
) -> (Vec<Bf16>, Vec<f32>) {
    let tokens = q.len() / s.q_row();
    assert!(tokens.is_multiple_of(s.sequence), "whole sequences");
    let (mut o, mut lse) = (unwritten(tokens * s.o_row()), unwritten(tokens * s.heads));
    let mut strips = Strips::new(path, s.sequence);
    let (mut scores, mut p) = (strips.strip::<f32>(), strips.strip::<Bf16>());
    for at in heads(s, tokens) {
        let (queries, keys) = (at.queries(q), Columns::of_rows(at.keys(kv, k_rope).view()));
        let values = Columns::of_columns(at.rounded_values(kv).view());
        for m in 0..s.sequence.div_ceil(BLOCK) {
            strips.scores(m, &queries, &keys, &mut scores);
            crate::wide::run(
                #[inline(always)]
                || {
                    let (rows, reach) = (strips.rows(m), strips.rows(m).end);
                    let of_rows = scores.chunks_exact_mut(strips.padded).zip(p.chunks_exact_mut(strips.padded));
                    for (i, (row, p)) in rows.zip(of_rows) {
                        let (row, p) = (&mut row[..reach], &mut p[..reach]);
                        let (past, future) = row.split_at_mut(i + 1);
                        let max = largest(past) * s.scale;
                        for x in past.iter_mut() {
                            *x = exp(*x * s.scale - max);
                        }
                        future.fill(0.0);
                        let sum = sum_of([row], |[p]| p);
                        row.iter_mut().for_each(|x| *x /= sum);
                        Bf16::store(row, p);
                        lse[(at.first + i) * s.heads + at.head] = max + logarithm(sum) as f32;
                    }
                },
            );
            let to = &mut Target { data: &mut o[at.o_at()..], stride: s.o_row() };
            strips.times(m, &p, &values, &mut to.at(m * BLOCK, 0));
        }
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
    let mut strips = Strips::new(path, n);
    let [mut scores, mut dscores] = [strips.strip::<f32>(), strips.strip()];
    let [mut p, mut ds] = [strips.strip::<Bf16>(), strips.strip()];
    let [mut turned_p, mut turned_ds] = [(); 2].map(|()| Turned::unwritten(path, n, n));
    let (mut inner, mut dkeys) = (vec![0.0; s.value], unwritten::<f32>(n * width));
    for at in heads(s, tokens) {
        let (queries, keys, outputs) = (at.queries(q), at.keys(kv, k_rope), at.outputs(d_o));
        let keys_by_rows = Columns::of_rows(keys.view());
        let keys_by_columns = Columns::of_columns(keys.view());
        let values = Columns::of_rows(at.rounded_values(kv).view());
        for m in 0..n.div_ceil(BLOCK) {
            strips.scores(m, &queries, &keys_by_rows, &mut scores);
            strips.scores(m, &outputs, &values, &mut dscores);
            let (rows, padded) = (strips.rows(m), strips.padded);
            crate::wide::run(
                #[inline(always)]
                || {
                    let of_scores = scores.chunks_exact_mut(padded).zip(dscores.chunks_exact_mut(padded));
                    let results = p.chunks_exact_mut(padded).zip(ds.chunks_exact_mut(padded));
                    for (i, ((x, dx), (p, ds))) in rows.clone().zip(of_scores.zip(results)) {
                        let (x, dx, p, ds) = (&mut x[..=i], &mut dx[..=i], &mut p[..rows.end], &mut ds[..rows.end]);
                        let lse = lse[(at.first + i) * s.heads + at.head];
                        for x in x.iter_mut() {
                            *x = exp(*x * s.scale - lse);
                        }
                        let from = at.o_at() + i * s.o_row();
                        let at = from..from + s.value;
                        let [d_o, o] = [&d_o[at.clone()], &o[at]].map(|x| x.iter().map(|x| x.value()));
                        inner.iter_mut().zip(d_o.zip(o)).for_each(|(to, (d_o, o))| *to = d_o * o);
                        let inner = sum_of([&inner], |[x]| x);
                        for (dx, x) in dx.iter_mut().zip(x.iter()) {
                            *dx = (*x * (*dx - inner)) * s.scale;
                        }
                        for (to, x) in [(p, x), (ds, dx)] {
                            Bf16::store(x, &mut to[..=i]);
                            to[i + 1..].fill(Bf16::default());
                        }
                    }
                },
            );
            // Rows after the last are terms of the turned.
            for rest in [&mut p, &mut ds] {
                rest[rows.len() * padded..].fill(Bf16::default());
            }
            turned_p.put(m, &p, padded, 0..m + 1);
            turned_ds.put(m, &ds, padded, 0..m + 1);
            let to = &mut Target { data: &mut dq[at.q_at()..], stride: s.q_row() };
            strips.times(m, &ds, &keys_by_columns, &mut to.at(m * BLOCK, 0));
        }
        let to = &mut Target { data: &mut dkv[at.kv_at() + s.nope..], stride: s.kv_row() };
        strips.maker.product(turned_p.left(), &Columns::of_columns(outputs.view()), Causal::TermsFrom, to);
        let to = &mut Target { data: &mut dkeys, stride: width };
        strips.maker.product(turned_ds.left(), &Columns::of_columns(queries.view()), Causal::TermsFrom, to);
        for (row, dkey) in dkeys.chunks_exact(width).enumerate() {
            let own = &mut dkv[at.kv_at() + row * s.kv_row()..][..s.nope];
            Bf16::store(&dkey[..s.nope], own);
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
