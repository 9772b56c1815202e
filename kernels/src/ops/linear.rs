//! `y = x w^T`, weights as `[out, in]` like the published checkpoints.
//!
//! `x_TI`: rows by inputs; `w_OI`; `y_TO`. Sums as in [`crate::gemm`], so a row of `y` or of `dx`
//! depends on that row alone. `dw` sums over the rows in their order: a product over one
//! micro-batch's rows, which its caller adds to others afterwards (DESIGN 3.1).

use crate::gemm::{Target, View, gemm};

/// `x_TI w_OI^T -> y_TO`.
pub(crate) fn forward(x: &[f32], w: &[f32], rows: usize, out: usize, input: usize) -> Vec<f32> {
    let mut y = crate::wide::unwritten(rows * out);
    let target = &mut Target { data: &mut y, row_stride: out };
    gemm(target, View::new(x, rows, input), View::new(w, out, input).transposed(), false);
    y
}

/// `dy_TO w_OI -> dx_TI`.
pub(crate) fn backward_input(dy: &[f32], w: &[f32], rows: usize, out: usize, input: usize) -> Vec<f32> {
    let mut dx = crate::wide::unwritten(rows * input);
    let target = &mut Target { data: &mut dx, row_stride: input };
    gemm(target, View::new(dy, rows, out), View::new(w, out, input), false);
    dx
}

/// `dy_TO^T x_TI -> dw_OI`.
pub(crate) fn backward_weight(dy: &[f32], x: &[f32], rows: usize, out: usize, input: usize) -> Vec<f32> {
    let mut dw = crate::wide::unwritten(out * input);
    let target = &mut Target { data: &mut dw, row_stride: input };
    gemm(target, View::new(dy, rows, out).transposed(), View::new(x, rows, input), false);
    dw
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    fn reference(x: &[f64], w: &[f64], rows: usize, out: usize, input: usize) -> Vec<f64> {
        let mut y = vec![0.0; rows * out];
        for t in 0..rows {
            for o in 0..out {
                y[t * out + o] = (0..input).map(|i| x[t * input + i] * w[o * input + i]).sum();
            }
        }
        y
    }

    // f32 sums of at most 300 terms: 300 * 2^-24 is 2e-5, in practice far less.
    const TOLERANCE: f64 = 2e-5;

    #[test]
    fn forward_and_backward_agree_with_the_reference() {
        for (t, o, i) in [(1, 3, 5), (7, 4, 6), (13, 9, 300)] {
            let (x, w, dy) = (random(t * i, 1), random(o * i, 2), random(t * o, 3));
            assert_close(&forward(&x, &w, t, o, i), &reference(&wide(&x), &wide(&w), t, o, i), TOLERANCE, "y");
            let dx = gradient(&x, |x| dot(&reference(x, &wide(&w), t, o, i), &dy));
            assert_close(&backward_input(&dy, &w, t, o, i), &dx, TOLERANCE, "dx");
            if i < 100 {
                let dw = gradient(&w, |w| dot(&reference(&wide(&x), w, t, o, i), &dy));
                assert_close(&backward_weight(&dy, &x, t, o, i), &dw, TOLERANCE, "dw");
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let (o, i, all) = (48, 130, 67);
        let (x, w) = (random(all * i, 4), random(o * i, 5));
        let whole = forward(&x, &w, all, o, i);
        for rows in [1, 2, 3, 8, 33, 66] {
            for start in [0, all - rows] {
                let part = forward(&x[start * i..][..rows * i], &w, rows, o, i);
                assert!(same_bits(&part, &whole[start * o..][..rows * o]), "{rows} rows at {start}");
            }
        }
    }
}
