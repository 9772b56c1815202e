//! The gate's products: the CPU's bits, for any number of tokens.

use crate::{low, random, report, times, wanted};
use everstep_kernels::{Activation, Backend, BackendError, CpuBackend, Gpu, Precision, Role, Tensor, bf16_bits};
use std::sync::Arc;

/// Elements of other bits.
fn other<T: Copy>(got: &[T], want: &[T], bits: impl Fn(T) -> u32) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).filter(|(a, b)| bits(**a) != bits(**b)).count() as f64
}

/// Logits, the gradient of the input, the gradient of the weight.
type Products<X> = (Vec<f32>, Vec<X>, Vec<f32>);

/// What the GPU makes of activations of one kind, over poison.
fn run<X: Activation + Copy>(
    gpu: &Gpu,
    shape: [usize; 3],
    (x, poison): (&[X], X),
    (w, dlogits): (&[f32], &[f32]),
) -> Result<Products<X>, BackendError> {
    let (x_gpu, w, dlogits) = (gpu.upload(x)?, gpu.upload(w)?, gpu.upload(dlogits)?);
    let mut room = gpu.upload(&vec![f32::NAN; gpu.gate_room(shape)])?;
    let mut logits = gpu.upload(&vec![f32::NAN; dlogits.len()])?;
    gpu.gate_logits(shape, &x_gpu, &w, &mut room, &mut logits)?;
    let mut dx = gpu.upload(&vec![poison; x.len()])?;
    gpu.gate_input_gradient(shape, &dlogits, &w, &mut dx)?;
    let mut dw = gpu.upload(&vec![f32::NAN; w.len()])?;
    gpu.gate_weight_gradient(shape, &dlogits, &x_gpu, &mut room, &mut dw)?;
    Ok((gpu.download(&logits)?, gpu.download(&dx)?, gpu.download(&dw)?))
}

/// All three, ten times, from activations in BF16 and from the same in f32.
fn gate(gpu: &Gpu, shape: [usize; 3]) -> Result<bool, BackendError> {
    let ([tokens, experts, inputs], b) = (shape, CpuBackend::new(Precision::Bf16));
    let (x, words) = low(&b, tokens, inputs, 61)?;
    let (w, dlogits) = (random(experts, inputs, 62), random(tokens, experts, 63));
    let weight = Tensor::host(experts, inputs, Arc::clone(&w));
    let gradient = Tensor::host(tokens, experts, Arc::clone(&dlogits));
    let want_logits = b.read(&b.linear(&x, &weight, Role::Gate))?;
    let want_dw = b.read(&b.linear_backward_weight(&gradient, &x, Role::Gate))?;
    let want_dx = CpuBackend::FP32.read(&CpuBackend::FP32.linear_backward_input(&gradient, &weight, Role::Gate))?;
    let want_words: Vec<u16> = want_dx.iter().map(|x| bf16_bits(*x)).collect();
    let exact = b.read(&x)?;
    let mut wrong = [0.0; 3];
    for _ in 0..times(10) {
        let (logits, dx, dw) = run(gpu, shape, (&words, 0x7fff), (&w, &dlogits))?;
        wrong[0] += other(&logits, &want_logits, f32::to_bits);
        wrong[1] += other(&dx, &want_words, u32::from);
        wrong[2] += other(&dw, &want_dw, f32::to_bits);
        let (logits, dx, dw) = run(gpu, shape, (&exact, f32::NAN), (&w, &dlogits))?;
        wrong[0] += other(&logits, &want_logits, f32::to_bits);
        wrong[1] += other(&dx, &want_dx, f32::to_bits);
        wrong[2] += other(&dw, &want_dw, f32::to_bits);
    }
    let mut good = true;
    for (what, wrong) in ["logits", "gradient of the input", "gradient of the weight"].iter().zip(wrong) {
        good &= report(&format!("gate, {what}: other bits, of all runs"), shape, wrong, 0.0);
    }
    Ok(good)
}

/// Gates of the published models, and shapes that are not whole.
pub(crate) fn all(gpu: &Gpu) -> Result<bool, BackendError> {
    let mut good = true;
    for (experts, inputs) in [(64, 2048), (256, 7168)] {
        for tokens in [0, 1, 7, 129, 4096] {
            if wanted(tokens * inputs) {
                good &= gate(gpu, [tokens, experts, inputs])?;
            }
        }
    }
    // Fewer experts than a tile has columns, terms that fill no slice, tokens enough for one part of several blocks, and more,
    // which leave places to other parts.
    for shape in [[1000, 8, 136], [77, 264, 1032], [33_792, 24, 1032], [40_000, 24, 1032]] {
        if wanted(shape[0] * shape[2]) {
            good &= gate(gpu, shape)?;
        }
    }
    Ok(good)
}
