//! Attention in BF16 by cuDNN: the same bits each time, close to f64.

use crate::{low, norm_difference, report, times, values};
use everstep_kernels::{
    BackendError, CausalAttention, CausalGradients, CausalShape, CpuBackend, Gpu, Precision, Qkv, bf16_value,
};
use std::sync::Arc;

/// One head of one sequence in f64: result, logarithms, and the gradients of queries, keys and values.
fn head(s: &CausalShape, [q, k, v, d_o]: [&dyn Fn(usize, usize) -> f64; 4]) -> [Vec<f64>; 5] {
    let (n, scale) = (s.tokens, (s.keys as f64).sqrt().recip());
    let dot =
        |width: usize, a: &dyn Fn(usize) -> f64, b: &dyn Fn(usize) -> f64| (0..width).map(|c| a(c) * b(c)).sum::<f64>();
    let (mut o, mut logs) = (vec![0.0; n * s.values], vec![0.0; n]);
    let (mut dq, mut dk, mut dv) = (vec![0.0; n * s.keys], vec![0.0; n * s.keys], vec![0.0; n * s.values]);
    for t in 0..n {
        let scores: Vec<f64> = (0..=t).map(|u| scale * dot(s.keys, &|c| q(t, c), &|c| k(u, c))).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        logs[t] = top + scores.iter().map(|x| (x - top).exp()).sum::<f64>().ln();
        let p: Vec<f64> = scores.iter().map(|x| (x - logs[t]).exp()).collect();
        for (u, p) in p.iter().enumerate() {
            (0..s.values).for_each(|c| o[t * s.values + c] += p * v(u, c));
        }
        let sum = dot(s.values, &|c| o[t * s.values + c], &|c| d_o(t, c));
        for (u, p) in p.iter().enumerate() {
            let ds = p * (dot(s.values, &|c| d_o(t, c), &|c| v(u, c)) - sum) * scale;
            for c in 0..s.keys {
                dq[t * s.keys + c] += ds * k(u, c);
                dk[u * s.keys + c] += ds * q(t, c);
            }
            (0..s.values).for_each(|c| dv[u * s.values + c] += p * d_o(t, c));
        }
    }
    [o, logs, dq, dk, dv]
}

/// BF16 of results and of the shares that meet the values.
const ATTENTION: f64 = 5e-3;

/// Both passes, twenty times: the same bits, and close to f64.
fn attention(gpu: &Arc<Gpu>, shape: CausalShape) -> Result<bool, BackendError> {
    let b = CpuBackend::new(Precision::Bf16);
    let words = |width: usize, name| Ok::<_, BackendError>(low(&b, shape.rows(), width, name)?.1);
    let host = [words(shape.keys, 31)?, words(shape.keys, 32)?, words(shape.values, 33)?, words(shape.values, 34)?];
    let x = Qkv { q: gpu.upload(&host[0])?, k: gpu.upload(&host[1])?, v: gpu.upload(&host[2])? };
    let d_o = gpu.upload(&host[3])?;
    let passes = CausalAttention::new(gpu, shape)?;
    let mut first = None;
    let mut same = true;
    for _ in 0..times(20) {
        let poison = |count: usize| gpu.upload(&vec![0x7fffu16; count]);
        let (mut o, mut logs) = (poison(shape.thin())?, gpu.upload(&vec![f32::NAN; shape.rows()])?);
        let mut sums = gpu.upload(&vec![f32::NAN; shape.rows()])?;
        let mut out =
            CausalGradients { dq: poison(shape.wide())?, dk: poison(shape.wide())?, dv: poison(shape.thin())? };
        passes.forward(&x, &mut o, &mut logs)?;
        passes.backward(&x, (&o, &logs), &d_o, &mut out, &mut sums)?;
        let results = [gpu.download(&o)?, gpu.download(&out.dq)?, gpu.download(&out.dk)?, gpu.download(&out.dv)?];
        let got = (results, gpu.download(&logs)?);
        same &= got == *first.get_or_insert_with(|| got.clone());
    }
    let (results, logs) = first.expect("there were runs");
    let mut good = report("attention: runs that differ", shape, f64::from(!same), 0.0);
    let mut worst = [0.0f64; 5];
    for (batch, h) in (0..shape.batch).flat_map(|batch| (0..shape.heads).map(move |h| (batch, h))) {
        let at = |t: usize, width: usize| ((batch * shape.tokens + t) * shape.heads + h) * width;
        let value = |part: usize, width: usize| {
            let host = &host;
            move |t: usize, c: usize| f64::from(bf16_value(host[part][at(t, width) + c]))
        };
        let inputs: [&dyn Fn(usize, usize) -> f64; 4] =
            [&value(0, shape.keys), &value(1, shape.keys), &value(2, shape.values), &value(3, shape.values)];
        let wanted = head(&shape, inputs);
        let of = |words: &[u16], width: usize| -> Vec<f32> {
            let row = |t: usize| values(&words[at(t, width)..][..width]);
            (0..shape.tokens).flat_map(row).collect()
        };
        let rows = &logs[(batch * shape.heads + h) * shape.tokens..][..shape.tokens];
        let got = [
            of(&results[0], shape.values),
            rows.to_vec(),
            of(&results[1], shape.keys),
            of(&results[2], shape.keys),
            of(&results[3], shape.values),
        ];
        for ((worst, got), wanted) in worst.iter_mut().zip(&got).zip(&wanted) {
            let wanted: Vec<f32> = wanted.iter().map(|x| *x as f32).collect();
            *worst = worst.max(norm_difference(got, &wanted));
        }
    }
    for (what, worst) in ["result", "logarithms", "dq", "dk", "dv"].iter().zip(worst) {
        good &= report(&format!("attention, {what}"), shape, worst, ATTENTION);
    }
    Ok(good)
}

/// Whole tiles and others, without sequences or tokens too.
pub(crate) fn all(gpu: &Arc<Gpu>) -> Result<bool, BackendError> {
    let mut good = true;
    for (keys, values) in [(192, 128), (128, 128), (64, 64)] {
        for (batch, heads, tokens) in [(0, 3, 256), (2, 3, 0), (2, 3, 256), (1, 2, 333)] {
            good &= attention(gpu, CausalShape { batch, heads, tokens, keys, values })?;
        }
    }
    Ok(good)
}
