//! The gate of a mixture layer (technical report 2.1.2): sigmoid scores, a bias that takes part in
//! the selection alone, group-limited top-k.
//!
//! A group's score is the sum of its two highest biased scores. Equal scores go to the lower index,
//! for groups and for experts. Chosen experts are listed in ascending order: the order of every
//! later sum. Weights are the unbiased scores, normalised to `routed_scale`.
//!
//! The sequence-wise balance loss, `alpha sum_i f_i P_i` for each sequence of `T` tokens: `f_i` is
//! `E / (K T)` times the tokens whose `K` highest *unbiased* scores, over all groups, contain expert
//! `i`, and `P_i` the mean of the scores' share of their row. Perfect balance gives `alpha`.

use crate::math::{sigmoid, sum_of};
use crate::wide;

/// Experts, and how many of them a token is sent to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateShape {
    /// Routed experts of the layer.
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Groups of experts.
    pub groups: usize,
    /// Groups that a token may use.
    pub groups_kept: usize,
    /// What the weights of a token sum to.
    pub routed_scale: f32,
    /// Tokens of a sequence.
    pub sequence: usize,
}

/// The `k` highest of some scores with their indices: equal ones by lower index, in ascending order of index.
#[derive(Debug, Default)]
struct Highest(Vec<(i32, usize)>);

impl Highest {
    /// Of scores whose indices ascend. Panics if there are fewer than `k`.
    fn find(&mut self, scores: impl Iterator<Item = (usize, f32)>, k: usize) {
        let best = &mut self.0;
        best.clear();
        for (i, score) in scores {
            // The order of `f32::total_cmp`.
            let bits = score.to_bits().cast_signed();
            let key = bits ^ (((bits >> 31).cast_unsigned() >> 1).cast_signed());
            if best.len() == k {
                // An equal one before it stays.
                if best.last().is_none_or(|last| last.0 >= key) {
                    continue;
                }
                best.pop();
            }
            let at = best.iter().position(|other| other.0 < key).unwrap_or(best.len());
            best.insert(at, (key, i));
        }
        assert_eq!(best.len(), k, "scores to choose from");
        best.sort_unstable_by_key(|(_, i)| *i);
    }

    fn indices(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|(_, i)| *i)
    }
}

/// Chooses experts, row after row.
#[derive(Debug, Default)]
struct Chooser {
    of_group: Highest,
    groups: Highest,
    experts: Highest,
}

impl Chooser {
    fn choose(&mut self, biased: &[f32], shape: &GateShape) {
        let size = shape.experts / shape.groups;
        let of_group = &mut self.of_group;
        let group_scores = biased.chunks_exact(size).map(|group| {
            of_group.find(group.iter().copied().enumerate(), size.min(2));
            of_group.indices().map(|i| group[i]).sum::<f32>()
        });
        self.groups.find(group_scores.enumerate(), shape.groups_kept);
        let allowed = self.groups.indices().flat_map(|g| g * size..(g + 1) * size);
        self.experts.find(allowed.map(|e| (e, biased[e])), shape.top_k);
    }
}

fn sigmoids(logits: &[f32]) -> Vec<f32> {
    let mut scores = wide::unwritten(logits.len());
    wide::run(
        #[inline(always)]
        || scores.iter_mut().zip(logits).for_each(|(s, x)| *s = sigmoid(*x)),
    );
    scores
}

/// `logits_TE, bias_E -> (experts_TK, weights_TK)`.
pub(crate) fn forward(logits: &[f32], bias: &[f32], shape: &GateShape) -> (Vec<u32>, Vec<f32>) {
    let choices = logits.len() / shape.experts * shape.top_k;
    let (mut experts, mut weights) = (Vec::with_capacity(choices), Vec::with_capacity(choices));
    let (mut biased, mut chooser) = (vec![0.0; shape.experts], Chooser::default());
    for scores in sigmoids(logits).chunks_exact(shape.experts) {
        biased.iter_mut().zip(scores.iter().zip(bias)).for_each(|(to, (s, b))| *to = s + b);
        chooser.choose(&biased, shape);
        let chosen = || chooser.experts.indices();
        let total: f32 = chosen().map(|e| scores[e]).sum::<f32>() + 1e-20;
        weights.extend(chosen().map(|e| scores[e] / total * shape.routed_scale));
        experts.extend(chosen().map(|e| e as u32));
    }
    (experts, weights)
}

/// `logits_TE, experts_TK, dweights_TK -> dlogits_TE`. The choice itself has no gradient.
pub(crate) fn backward(logits: &[f32], experts: &[u32], dweights: &[f32], shape: &GateShape) -> Vec<f32> {
    let mut dlogits = vec![0.0; logits.len()];
    let rows = logits.chunks_exact(shape.experts).zip(dlogits.chunks_exact_mut(shape.experts));
    let chosen = experts.chunks_exact(shape.top_k).zip(dweights.chunks_exact(shape.top_k));
    for ((row, d), (experts, dw)) in rows.zip(chosen) {
        let scores: Vec<f32> = experts.iter().map(|e| sigmoid(row[*e as usize])).collect();
        let total: f32 = scores.iter().sum::<f32>() + 1e-20;
        let mean: f32 = scores.iter().zip(dw).map(|(s, dw)| s * dw).sum::<f32>() / total;
        for ((e, s), dw) in experts.iter().zip(&scores).zip(dw) {
            let ds = (dw - mean) / total * shape.routed_scale;
            d[*e as usize] = ds * (s * (1.0 - s));
        }
    }
    dlogits
}

/// `logits_TE -> dlogits_TE` of the balance loss, each sequence's loss times `factor * T`: with `alpha`
/// over the targets of the step, the losses' mean over the step's sequences times `alpha`.
pub(crate) fn balance_backward(logits: &[f32], shape: &GateShape, factor: f32) -> Vec<f32> {
    let e = shape.experts;
    let (mut dlogits, mut chosen) = (vec![0.0; logits.len()], Highest::default());
    for (rows, d) in logits.chunks(shape.sequence * e).zip(dlogits.chunks_mut(shape.sequence * e)) {
        let mut counts = vec![0u32; e];
        for row in rows.chunks_exact(e) {
            chosen.find(row.iter().copied().enumerate(), shape.top_k);
            chosen.indices().for_each(|i| counts[i] += 1);
        }
        let per_count = e as f32 / (shape.top_k * (rows.len() / e)) as f32;
        let f: Vec<f32> = counts.iter().map(|c| *c as f32 * per_count).collect();
        let scores = sigmoids(rows);
        wide::run(
            #[inline(always)]
            || {
                for (scores, d) in scores.chunks_exact(e).zip(d.chunks_exact_mut(e)) {
                    let total = sum_of([scores], |[s]| s);
                    let mean = sum_of([&f, scores], |[f, s]| f * s) / total;
                    for ((d, s), f) in d.iter_mut().zip(scores).zip(&f) {
                        let ds = factor * (f - mean) / total;
                        *d = ds * (s * (1.0 - s));
                    }
                }
            },
        );
    }
    dlogits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    const SHAPE: GateShape =
        GateShape { experts: 12, top_k: 3, groups: 4, groups_kept: 2, routed_scale: 2.5, sequence: 4 };

    #[test]
    fn the_balance_loss_has_the_gradient_of_differences() {
        let (e, t, alpha) = (SHAPE.experts, SHAPE.sequence, 0.3f32);
        let logits = random(2 * t * e, 5);
        let loss = |l: &[f64], at: &[f32]| -> f64 {
            let of_sequence = |(l, at): (&[f64], &[f32])| -> f64 {
                let s: Vec<f64> = l.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
                (0..e)
                    .map(|i| {
                        // The indicator has no gradient: it is taken where the logits are.
                        let rank = |row: &[f32]| row.iter().filter(|x| **x > row[i]).count();
                        let f = at.chunks_exact(e).filter(|row| rank(row) < SHAPE.top_k).count() as f64 * e as f64
                            / (SHAPE.top_k * t) as f64;
                        let p = s.chunks_exact(e).map(|s| s[i] / s.iter().sum::<f64>()).sum::<f64>() / t as f64;
                        f64::from(alpha) * f * p
                    })
                    .sum()
            };
            l.chunks_exact(t * e).zip(at.chunks_exact(t * e)).map(of_sequence).sum::<f64>() / 2.0
        };
        let want = gradient(&logits, |l| loss(l, &logits));
        let factor = alpha / (2 * t) as f32;
        assert_close(&balance_backward(&logits, &SHAPE, factor), &want, 1e-5, "dlogits");
        let balanced = vec![0.0f64; t * e];
        let even: Vec<f32> = (0..t * e).map(|n| if (n % e) / 3 == n / e { 1.0 } else { 0.0 }).collect();
        assert!((loss(&balanced, &even) * 2.0 - f64::from(alpha)).abs() < 1e-7, "perfect balance gives alpha");
    }

    /// The order of `total_cmp`, equal ones by lower index, whatever the numbers are.
    #[test]
    fn the_highest_are_those_of_a_sort() {
        let odd =
            [0.0, -0.0, 1.0, -1.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE, 1e-40];
        let mut highest = Highest::default();
        for round in 0..200 {
            let n = 1 + round % 17;
            let scores: Vec<f32> =
                random(n, round as u32).iter().map(|x| odd[(x.abs() * 1000.0) as usize % odd.len()]).collect();
            for k in 0..=n {
                let mut sorted: Vec<usize> = (0..n).collect();
                sorted.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
                sorted.truncate(k);
                sorted.sort_unstable();
                highest.find(scores.iter().copied().enumerate(), k);
                assert_eq!(highest.indices().collect::<Vec<_>>(), sorted, "{k} of {scores:?}");
            }
        }
    }

    /// Chooses by brute force over all sets; weights in f64.
    fn reference(logits: &[f64], bias: &[f64], s: &GateShape) -> (Vec<u32>, Vec<f64>) {
        let (mut experts, mut weights) = (Vec::new(), Vec::new());
        for row in logits.chunks_exact(s.experts) {
            let score: Vec<f64> = row.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
            let c: Vec<f64> = score.iter().zip(bias).map(|(s, b)| s + b).collect();
            let size = s.experts / s.groups;
            let rank = |values: &[f64], i: usize| {
                values.iter().enumerate().filter(|(j, v)| **v > values[i] || (**v == values[i] && *j < i)).count()
            };
            let group: Vec<f64> =
                c.chunks_exact(size).map(|g| (0..size).filter(|i| rank(g, *i) < 2).map(|i| g[i]).sum()).collect();
            let masked: Vec<f64> = (0..s.experts)
                .map(|e| if rank(&group, e / size) < s.groups_kept { c[e] } else { f64::NEG_INFINITY })
                .collect();
            let chosen: Vec<usize> = (0..s.experts).filter(|e| rank(&masked, *e) < s.top_k).collect();
            let total: f64 = chosen.iter().map(|e| score[*e]).sum();
            weights.extend(chosen.iter().map(|e| score[*e] / total * f64::from(s.routed_scale)));
            experts.extend(chosen.iter().map(|e| *e as u32));
        }
        (experts, weights)
    }

    #[test]
    fn agrees_with_the_reference_with_ties_and_negative_biases() {
        let rows = 40;
        let logits = random(rows * SHAPE.experts, 1);
        for bias in [vec![0.0; 12], random(12, 2), vec![-5.0; 12]] {
            let (experts, weights) = forward(&logits, &bias, &SHAPE);
            let (want, want_weights) = reference(&wide(&logits), &wide(&bias), &SHAPE);
            assert_eq!(experts, want);
            assert_close(&weights, &want_weights, 1e-6, "weights");
        }
        let tied = vec![0.5; SHAPE.experts];
        assert_eq!(forward(&tied, &[0.0; 12], &SHAPE).0, vec![0, 1, 2]);
    }

    #[test]
    fn backward_agrees_with_differences() {
        let logits = random(6 * SHAPE.experts, 3);
        let bias = vec![0.0; SHAPE.experts];
        let (experts, weights) = forward(&logits, &bias, &SHAPE);
        let dw = random(weights.len(), 4);
        let want = gradient(&logits, |l| dot(&reference(l, &[0.0; 12], &SHAPE).1, &dw));
        assert_close(&backward(&logits, &experts, &dw, &SHAPE), &want, 2e-6, "dlogits");
    }
}
