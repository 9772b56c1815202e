//! RMSNorm: `y = w * x / sqrt(mean(x^2) + eps)` for each row.
//!
//! `x_TD`, `w_D`. Sums over a row run in the fixed order of [`crate::math::sum_of`]; the weight
//! gradient sums over rows in ascending order.

use crate::element::{Element, in_pieces};
use crate::math::sum_of;
use crate::wide;

#[inline(always)]
fn scale(x: &[f32], eps: f32) -> f32 {
    let squares = sum_of([x], |[x]| x * x);
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

/// `x_TD, w_D -> y_TD`.
pub(crate) fn forward<E: Element>(x: &[E], w: &[f32], eps: f32) -> Vec<E> {
    assert!(x.len().is_multiple_of(w.len()), "whole rows");
    let (mut y, mut scratch) = (wide::unwritten(x.len()), vec![0.0; w.len()]);
    wide::run(
        #[inline(always)]
        || {
            for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
                let x = E::row(x, &mut scratch);
                let r = scale(x, eps);
                in_pieces(y, |at, y| {
                    let of = x[at.clone()].iter().zip(&w[at]);
                    y.iter_mut().zip(of).for_each(|(y, (x, w))| *y = (x * r) * w);
                });
            }
        },
    );
    y
}

/// `x_TD, w_D, dy_TD -> dx_TD`.
pub(crate) fn backward_input<E: Element>(x: &[E], w: &[f32], dy: &[E], eps: f32) -> Vec<E> {
    let d = w.len();
    assert!(x.len().is_multiple_of(d) && x.len() == dy.len(), "whole rows");
    let (mut dx, mut scratch) = (wide::unwritten(x.len()), [vec![0.0; d], vec![0.0; d]]);
    wide::run(
        #[inline(always)]
        || {
            let [of_x, of_dy] = &mut scratch;
            for ((x, dy), dx) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
                let (x, dy) = (E::row(x, of_x), E::row(dy, of_dy));
                let r = scale(x, eps);
                let mean = sum_of([x, w, dy], |[x, w, dy]| (dy * w) * (x * r)) / d as f32;
                in_pieces(dx, |at, dx| {
                    let of = x[at.clone()].iter().zip(&w[at.clone()]).zip(&dy[at]);
                    for (dx, ((x, w), dy)) in dx.iter_mut().zip(of) {
                        *dx = r * (dy * w - (x * r) * mean);
                    }
                });
            }
        },
    );
    dx
}

/// `x_TD, dy_TD -> dw_D`.
pub(crate) fn backward_weight<E: Element>(x: &[E], dy: &[E], d: usize, eps: f32) -> Vec<f32> {
    let (mut dw, mut scratch) = (vec![0.0; d], vec![0.0; d]);
    wide::run(
        #[inline(always)]
        || {
            for (x, dy) in x.chunks_exact(d).zip(dy.chunks_exact(d)) {
                let x = E::row(x, &mut scratch);
                let r = scale(x, eps);
                for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                    *dw += dy.value() * (x * r);
                }
            }
        },
    );
    dw
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn reference(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
        x.chunks_exact(w.len())
            .flat_map(|x| {
                let r = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
                x.iter().zip(w).map(move |(x, w)| x * r * w).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn agrees_with_the_reference() {
        let eps = 1e-6;
        for (t, d) in [(1, 5), (3, 16), (4, 37)] {
            let (x, w, dy) = (random(t * d, 1), random(d, 2), random(t * d, 3));
            let f = |x: &[f64], w: &[f64]| reference(x, w, f64::from(eps));
            assert_close(&forward(&x, &w, eps), &f(&wide(&x), &wide(&w)), 1e-6, "y");
            let dx = gradient(&x, |x| dot(&f(x, &wide(&w)), &dy));
            assert_close(&backward_input(&x, &w, &dy, eps), &dx, 2e-6, "dx");
            let dw = gradient(&w, |w| dot(&f(&wide(&x), w), &dy));
            assert_close(&backward_weight(&x, &dy, d, eps), &dw, 2e-6, "dw");
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let (d, all) = (33, 9);
        let (x, w, dy) = (random(all * d, 4), random(d, 5), random(all * d, 6));
        let (y, dx) = (forward(&x, &w, 1e-6), backward_input(&x, &w, &dy, 1e-6));
        for t in 0..all {
            let at = t * d..(t + 1) * d;
            assert!(same_bits(&forward(&x[at.clone()], &w, 1e-6), &y[at.clone()]));
            assert!(same_bits(&backward_input(&x[at.clone()], &w, &dy[at.clone()], 1e-6), &dx[at]));
        }
    }
}
