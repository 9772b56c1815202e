//! AdamW: states of three steps, the sums of what was read and written, and squared sums; all have the CPU's bits.

use crate::{random, report, times, unlike};
use everstep_kernels::{
    AdamW, Backend, BackendError, CpuBackend, CudaBackend, Precision, Tensor, adamw_step, square_sums,
};

const STEP: AdamW = AdamW {
    lr: 1e-2,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    decay: 0.1,
    clip: 0.7,
    correction1: 2.0,
    correction2: 3.0,
    ema: None,
};

/// Three steps, and the first one again and again: no bit differs.
fn steps(gpu: &CudaBackend, [rows, columns]: [usize; 2], low: bool, ema: Option<f32>) -> Result<bool, BackendError> {
    let a = AdamW { ema, ..STEP };
    let matrix = |name| Tensor::host(rows, columns, random(rows, columns, name));
    let moment = |name, square: bool| {
        let values = random(rows, columns, name).iter().map(|x| if square { x * x } else { *x }).collect::<Vec<_>>();
        // As they are stored.
        let precision = if low { Precision::Bf16 } else { Precision::Fp32 };
        CpuBackend::new(precision).upload(rows, columns, values.into())
    };
    let mut want: Vec<Tensor> = vec![matrix(190), moment(191, false), moment(192, true)];
    want.extend(ema.map(|_| matrix(193)));
    let (mut got, start, mut other, mut first) = (want.clone(), want.clone(), 0.0, None);
    for step in 0..3 {
        let g = matrix(194 + step);
        let (of_cpu, of_gpu) = (adamw_step(&want, &gpu.read(&g)?, &a), gpu.adamw_step(&got, &g, &a)?);
        other += f64::from(of_cpu.1 != of_gpu.1);
        (want, got) = (of_cpu.0, of_gpu.0);
        first.get_or_insert_with(|| (g.clone(), of_cpu.1));
        for (want, got) in want.iter().zip(&got) {
            other += unlike(&bits(&CpuBackend::FP32.read(want)?), &bits(&gpu.read(got)?));
        }
    }
    let (g, sums) = first.expect("there was a step");
    for _ in 0..times(1000) {
        other += f64::from(gpu.adamw_step(&start, &g, &a)?.1 != sums);
    }
    Ok(report("AdamW: other bits and sums", (rows, columns, low, ema), other, 0.0))
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Moments of both kinds, with and without an average.
pub(crate) fn all(gpu: &CudaBackend) -> Result<bool, BackendError> {
    let mut good = true;
    for shape in [[0, 7], [1, 1], [3, 683], [37, 141], [300, 1031]] {
        for (low, ema) in [(false, None), (true, None), (false, Some(0.9)), (true, Some(0.999))] {
            good &= steps(gpu, shape, low, ema)?;
        }
        let g = random(shape[0], shape[1], 198);
        let (want, got) = (square_sums(&g), gpu.square_sums(&Tensor::host(shape[0], shape[1], g))?);
        good &= report("squared sums: other bits", shape, unlike(&got, &want), 0.0);
    }
    Ok(good)
}
