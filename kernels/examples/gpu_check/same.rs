//! Bits that stay: of the same input again, of rows in another batch, of operands quantised in another launch.

use crate::backend::{Results, matrix, named, weight};
use crate::{report, times, unlike, wanted};
use everstep_kernels::{AttentionShape, Backend, BackendError, CudaBackend, Precision, Role, Tensor};

/// Products, each of a handle of its own: what they keep of an operand is made anew.
fn all_products(gpu: &CudaBackend, [x, dy]: [&Tensor; 2], w: &[Tensor; 2], first: usize) -> Results {
    let (role, rows) = (Role::Projection, x.rows());
    let new = |x: &Tensor| gpu.rows(x, 0, rows);
    let counts = gpu.upload_indices(vec![first as u32, (rows - first) as u32]);
    named([
        ("linear", gpu.linear(&new(x), &w[0], role)),
        ("linear_backward_input", gpu.linear_backward_input(&new(dy), &w[0], role)),
        ("grouped_linear", gpu.grouped_linear(&new(x), &counts, w, role)),
        ("grouped_linear_backward_input", gpu.grouped_linear_backward_input(&new(dy), &counts, w, role)),
        ("linear_backward_weight", gpu.linear_backward_weight(&new(dy), &new(x), role)),
    ])
}

/// Rows of a batch, and the same rows in smaller ones: no bit differs, in any precision.
fn alone(gpu: &CudaBackend, precision: Precision, [t, d, out]: [usize; 3]) -> Result<bool, BackendError> {
    let (x, dy) = (matrix(gpu, t, d, 120), matrix(gpu, t, out, 121));
    let (w, norm) = ([weight(out, d, 122), weight(out, d, 123)], weight(1, d, 124));
    let operations = |from: usize, rows: usize| {
        let (x, dy) = (gpu.rows(&x, from, rows), gpu.rows(&dy, from, rows));
        // Two groups, of which the first ends where the first hundred rows do.
        let mut all = all_products(gpu, [&x, &dy], &w, 100usize.saturating_sub(from).min(rows));
        // The gradient of a weight is a sum over rows.
        all.pop();
        all.extend(named([
            ("linear of a gate", gpu.linear(&x, &w[0], Role::Gate)),
            ("rms_norm", gpu.rms_norm(&x, &norm, 1e-6)),
            ("rms_norm_backward_input", gpu.rms_norm_backward_input(&x, &norm, &x, 1e-6)),
            ("swiglu", gpu.swiglu(&x, &x)),
        ]));
        all
    };
    let (whole, mut good) = (operations(0, t), true);
    for (from, rows) in [(0, 1), (7, 129), (99, 2), (171, 129), (t - 1, 1)] {
        for ((name, all), (_, part)) in whole.iter().zip(operations(from, rows)) {
            let (want, got) = (gpu.read(&gpu.rows(all, from, rows))?, gpu.read(&part)?);
            let what = format!("{precision} rows of a batch and alone, {name}: other bits");
            good &= report(&what, (from, rows, d, out), unlike(&got, &want), 0.0);
        }
    }
    Ok(good)
}

/// The same products a thousand times, operands quantised anew: no bit differs.
fn repeated(gpu: &CudaBackend, precision: Precision, [t, d, out]: [usize; 3]) -> Result<bool, BackendError> {
    let (x, dy, w) = (matrix(gpu, t, d, 170), matrix(gpu, t, out, 171), [weight(out, d, 172), weight(out, d, 173)]);
    let (mut first, mut other) = (Vec::new(), 0.0);
    for _ in 0..times(1000) {
        let made = all_products(gpu, [&x, &dy], &w, t / 3);
        let got = made.iter().map(|(_, y)| gpu.read(y)).collect::<Result<Vec<_>, _>>()?;
        if first.is_empty() {
            first.clone_from(&got);
        }
        other += first.iter().zip(&got).map(|(want, got)| unlike(got, want)).sum::<f64>();
    }
    Ok(report(&format!("{precision} products a thousand times: other bits"), (t, d, out), other, 0.0))
}

/// What is quantised as it is made has the products of what is quantised afterwards, which a new handle is.
fn quantised_at_once(gpu: &CudaBackend, [t, d, out]: [usize; 3]) -> Result<bool, BackendError> {
    let (x, up, dh, dy) =
        (matrix(gpu, t, d, 180), matrix(gpu, t, d, 181), matrix(gpu, t, d, 182), matrix(gpu, t, out, 183));
    let (w, back, norm) = (weight(out, d, 184), weight(d, out, 185), weight(1, d, 186));
    let [h, dgate, dup] = gpu.swiglu_backward(&x, &up, &dh);
    let mut good = true;
    for (name, made) in [
        ("norm", gpu.rms_norm(&x, &norm, 1e-6)),
        ("swiglu", gpu.swiglu(&x, &up)),
        ("swiglu_backward, result", h),
        ("swiglu_backward, gate", dgate),
        ("swiglu_backward, up", dup),
    ] {
        let products = |x: &Tensor| {
            Ok::<_, BackendError>([
                gpu.read(&gpu.linear(x, &w, Role::Projection))?,
                gpu.read(&gpu.linear_backward_input(x, &back, Role::ExpertIn))?,
                gpu.read(&gpu.linear_backward_weight(&dy, x, Role::Projection))?,
            ])
        };
        let (got, want) = (products(&made)?, products(&gpu.rows(&made, 0, t))?);
        let other = got.iter().zip(&want).map(|(got, want)| unlike(got, want)).sum();
        good &= report(&format!("products of a {name} that is quantised at once: other bits"), (t, d, out), other, 0.0);
    }
    Ok(good)
}

/// The same of sequences.
fn sequences_alone(gpu: &CudaBackend, precision: Precision, s: &AttentionShape) -> Result<bool, BackendError> {
    let t = 3 * s.sequence;
    let widths = [s.heads * (s.nope + s.rope), s.heads * (s.nope + s.value), s.rope, s.heads * s.value];
    let mut name = 130;
    let operands = widths.map(|columns| {
        name += 1;
        matrix(gpu, t, columns, name)
    });
    let run = |from: usize, rows: usize| {
        let [q, kv, k_rope, d_o] = operands.each_ref().map(|x| gpu.rows(x, from, rows));
        let state = gpu.attention(q, kv, k_rope, s);
        let (dq, dkv, dk_rope) = gpu.attention_backward(&state, &d_o, s);
        named([("result", state.o), ("dq", dq), ("dkv", dkv), ("dk_rope", dk_rope)])
    };
    let (whole, mut good) = (run(0, t), true);
    for ((name, all), (_, part)) in whole.iter().zip(run(s.sequence, s.sequence)) {
        let (want, got) = (gpu.read(&gpu.rows(all, s.sequence, s.sequence))?, gpu.read(&part)?);
        let what = format!("{precision} a sequence of a batch and alone, {name}: other bits");
        good &= report(&what, (s.nope + s.rope, s.value, s.sequence), unlike(&got, &want), 0.0);
    }
    Ok(good)
}

/// Of one precision.
pub(crate) fn all(gpu: &CudaBackend, precision: Precision) -> Result<bool, BackendError> {
    let mut good = true;
    // The last one takes other tiles than its parts.
    for shape in [[300, 40, 72], [300, 37, 70], [300, 1024, 520], [2816, 1024, 1536]] {
        if wanted(shape[0] * shape[1]) {
            good &= alone(gpu, precision, shape)?;
        }
    }
    for (nope, rope, value, sequence) in [(128, 64, 128, 96), (64, 64, 128, 96), (32, 32, 64, 96), (5, 2, 3, 33)] {
        let s = AttentionShape { heads: 2, nope, rope, value, sequence, scale: 0.1 };
        good &= sequences_alone(gpu, precision, &s)?;
    }
    if precision == Precision::Fp8 {
        for shape in [[0, 128, 72], [300, 256, 136], [129, 1152, 100]] {
            good &= repeated(gpu, precision, shape)? & quantised_at_once(gpu, shape)?;
        }
    }
    Ok(good)
}
