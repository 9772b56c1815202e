//! Softmax cross-entropy with its gradient, fused: the logits are read once.
//!
//! `logits_TV`, `targets_T`. The gradient is multiplied by `scale`, the reciprocal of the number of
//! valid targets of the whole step, so that sums over micro-batches and lanes need no division. A row
//! whose target is [`IGNORED`] has loss 0 and no gradient.

/// The target of a position that has none.
pub(crate) const IGNORED: u32 = u32::MAX;

use crate::element::Element;
use crate::math::{exp, largest, logarithm, sum_of};

/// `logits, targets, scale -> (loss_T, dlogits_TV)`; losses in nats, not scaled.
pub(crate) fn forward_backward<E: Element>(logits: &[E], targets: &[u32], v: usize, scale: f32) -> (Vec<f32>, Vec<E>) {
    let mut losses = Vec::with_capacity(targets.len());
    let mut dlogits = vec![E::default(); logits.len()];
    let (mut scratch, mut d) = (vec![0.0; v], vec![0.0; v]);
    for ((row, out), target) in logits.chunks_exact(v).zip(dlogits.chunks_exact_mut(v)).zip(targets) {
        if *target == IGNORED {
            losses.push(0.0);
            continue;
        }
        let target = *target as usize;
        let (loss, sum) = crate::wide::run(
            #[inline(always)]
            || {
                let row = E::row(row, &mut scratch);
                let max = largest(row);
                d.iter_mut().zip(row).for_each(|(d, x)| *d = exp(x - max));
                let sum = sum_of([&d], |[d]| d);
                d.iter_mut().for_each(|d| *d = (*d / sum) * scale);
                d[target] -= scale;
                E::store(&d, out);
                (row[target] - max, sum)
            },
        );
        losses.push((logarithm(sum) - f64::from(loss)) as f32);
    }
    (losses, dlogits)
}

/// The mean loss of `logits_TV` in nats, summed in f64 in order of the rows.
pub fn mean_loss(logits: &[f32], targets: &[u32]) -> f64 {
    let losses = forward_backward(logits, targets, logits.len() / targets.len().max(1), 0.0).0;
    losses.iter().map(|l| f64::from(*l)).sum::<f64>() / targets.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn reference(logits: &[f64], targets: &[u32], v: usize) -> Vec<f64> {
        let row = |(row, t): (&[f64], &u32)| match *t {
            IGNORED => 0.0,
            t => row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[t as usize],
        };
        logits.chunks_exact(v).zip(targets).map(row).collect()
    }

    #[test]
    fn agrees_with_the_reference() {
        let (v, targets, scale) = (19, [3, 18, IGNORED, 0, 7], 0.25);
        let logits = random(targets.len() * v, 1);
        let (losses, dlogits) = forward_backward(&logits, &targets, v, scale);
        assert_close(&losses, &reference(&wide(&logits), &targets, v), 1e-6, "loss");
        let want = gradient(&logits, |l| reference(l, &targets, v).iter().sum::<f64>() * f64::from(scale));
        assert_close(&dlogits, &want, 1e-6, "dlogits");
    }
}
