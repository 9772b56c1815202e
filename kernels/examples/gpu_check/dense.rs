//! Linear layers in BF16: a row has the same bits among any others, and they are near the CPU's.

use crate::{PRODUCT, low, norm_difference, random, report, unlike, values};
use everstep_kernels::{Backend, BackendError, CpuBackend, Dense, Gpu, Precision, Role, Tensor, bf16_bits};
use std::sync::Arc;

/// Rows of the whole product, and of those that are made again.
const MOST: usize = 4096;
const FEWER: [usize; 6] = [0, 1, 7, 129, 1000, MOST];
/// Rows that the CPU makes too.
const COMPARED: usize = 129;
/// Sums of up to 4,096 terms in FP32, whose additions the tensor cores cut off where the CPU rounds.
const GRADIENT: f64 = 1e-4;

/// Both products of rows, and the gradient of the weight, for a weight of `out` x `input`.
fn dense(gpu: &Arc<Gpu>, out: usize, input: usize) -> Result<bool, BackendError> {
    let (b, dense) = (CpuBackend::new(Precision::Bf16), Dense::new(gpu)?);
    let ((x, x_words), (dy, dy_words)) = (low(&b, MOST, input, 71)?, low(&b, MOST, out, 72)?);
    let host = random(out, input, 73);
    let words: Vec<u16> = host.iter().map(|x| bf16_bits(*x)).collect();
    let (w, weight) = (gpu.upload(&words)?, Tensor::host(out, input, host));
    let poison = |count: usize| gpu.upload(&vec![0x7fffu16; count]);
    let forward = |rows: usize, from: usize| {
        let x = gpu.upload(&x_words[from * input..][..rows * input])?;
        let mut y = poison(rows * out)?;
        dense.forward([rows, out, input], &x, &w, &mut y)?;
        gpu.download(&y)
    };
    let backward = |rows: usize, from: usize| {
        let dy = gpu.upload(&dy_words[from * out..][..rows * out])?;
        let mut dx = poison(rows * input)?;
        dense.backward_input([rows, out, input], &dy, &w, &mut dx)?;
        gpu.download(&dx)
    };
    let (y, dx) = (forward(MOST, 0)?, backward(MOST, 0)?);
    let mut good = true;
    for rows in FEWER {
        let mut other = 0.0;
        for from in [0, (MOST - rows) / 2, MOST - rows] {
            other += unlike(&forward(rows, from)?, &y[from * out..][..rows * out]);
            other += unlike(&backward(rows, from)?, &dx[from * input..][..rows * input]);
        }
        good &= report("products, BF16, of fewer rows: other bits", (rows, out, input), other, 0.0);
    }
    let want = b.read(&b.linear(&b.rows(&x, 0, COMPARED), &weight, Role::Head))?;
    let error = norm_difference(&values(&y[..COMPARED * out]), &want);
    good &= report("product, BF16", (COMPARED, out, input), error, PRODUCT);
    let want = b.read(&b.linear_backward_input(&b.rows(&dy, 0, COMPARED), &weight, Role::Head))?;
    let error = norm_difference(&values(&dx[..COMPARED * input]), &want);
    good &= report("gradient of the input, BF16", (COMPARED, out, input), error, PRODUCT);
    for rows in FEWER {
        let shape = [rows, out, input];
        let (few_dy, few_x) = (gpu.upload(&dy_words[..rows * out])?, gpu.upload(&x_words[..rows * input])?);
        let before = random(out, input, 74);
        let (mut first, mut other) = (None, 0.0);
        for _ in 0..10 {
            let mut dw = gpu.upload(&before)?;
            dense.backward_weight(shape, &few_dy, &few_x, &mut dw)?;
            let got = gpu.download(&dw)?;
            other += unlike(&got, first.get_or_insert_with(|| got.clone()));
        }
        good &= report("gradient of the weight, BF16, ten times: other bits", shape, other, 0.0);
        let got: Vec<f32> =
            first.expect("there were runs").iter().zip(before.iter()).map(|(sum, before)| sum - before).collect();
        let (dy, x) = (b.rows(&dy, 0, rows), b.rows(&x, 0, rows));
        let want = b.read(&b.linear_backward_weight(&dy, &x, Role::Head))?;
        good &= report("gradient of the weight, BF16", shape, norm_difference(&got, &want), GRADIENT);
    }
    Ok(good)
}

/// Weights of several shapes, of which the last fills no tile.
pub(crate) fn all(gpu: &Arc<Gpu>) -> Result<bool, BackendError> {
    let mut good = true;
    for (out, input) in [(2112, 1024), (1536, 512), (512, 2048), (1024, 7168), (136, 264)] {
        good &= dense(gpu, out, input)?;
    }
    Ok(good)
}
