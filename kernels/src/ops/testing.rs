//! Helpers of the operations' tests.

use crate::philox::Philox;

/// `n` reproducible normal numbers.
pub(crate) fn random(n: usize, name: u32) -> Vec<f32> {
    Philox::new(11, 99, name).normals(n, 1.0)
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// Largest difference, relative to the largest element of the reference.
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1e-12f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs() / scale;
        assert!(error <= tolerance, "{what}[{i}]: {g} against {w}, relative error {error:e}");
    }
}

/// Central differences of `f` at `x`. With f64 and this step their own error is about 1e-9.
pub(crate) fn gradient(x: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut at = wide(x);
    (0..x.len())
        .map(|i| {
            let keep = at[i];
            at[i] = keep + STEP;
            let up = f(&at);
            at[i] = keep - STEP;
            let down = f(&at);
            at[i] = keep;
            (up - down) / (2.0 * STEP)
        })
        .collect()
}

/// `sum a b`, the scalar whose gradient with respect to `a` is `b`.
pub(crate) fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * f64::from(*y)).sum()
}

pub(crate) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits())
}
