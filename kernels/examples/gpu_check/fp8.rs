//! Products in FP8 and what makes their operands, beside the CPU backend's.

use crate::{low, norm_difference, product_most, random, report, times, unlike, values, wanted};
use everstep_kernels::{
    Backend, BackendError, Blocks, Codes, CpuBackend, Gpu, Groups, Precision, Role, Tensor, quantise_blocks,
};
use std::sync::Arc;

/// Rows in E4M3 by the GPU; they must be the CPU's to the last bit.
fn quantised(gpu: &Gpu, b: &CpuBackend, x: &Tensor, words: &[u16]) -> Result<(Codes, bool), BackendError> {
    let (rows, columns) = (x.rows(), x.columns());
    let mut codes = gpu.codes(rows, columns)?;
    gpu.quantise_rows(&gpu.upload(words)?, &mut codes, false)?;
    let q = b.quantise(x);
    let (want_codes, want_scales) = q.as_quantised().expect("a quantised matrix");
    let (got_codes, got_scales) = (gpu.download(codes.codes())?, gpu.download(codes.scales())?);
    let tiles = columns / 128;
    let scale = |row: usize, tile: usize| got_scales[tile * Codes::stride(rows) + row].to_bits();
    let same = (0..rows * tiles).all(|at| scale(at / tiles, at % tiles) == want_scales[at].to_bits());
    let good = report("quantise: other bits", (rows, columns), f64::from(!same || got_codes != want_codes), 0.0);
    Ok((codes, good))
}

/// Weights in E4M3 by the GPU, in both orders; they must be the CPU's to the last bit, and zeros beyond.
fn blocks(
    gpu: &Gpu,
    weights: &[Arc<Vec<f32>>],
    rows: usize,
    columns: usize,
) -> Result<([Blocks; 2], bool), BackendError> {
    let mut both = gpu.blocks(weights.len(), [rows, columns])?;
    gpu.quantise_blocks(weights.iter().map(|w| gpu.upload(w)), [rows, columns], &mut both)?;
    let turn = |w: &[f32]| (0..rows * columns).map(|at| w[at % rows * columns + at / rows]).collect::<Vec<_>>();
    let turned: Vec<_> = weights.iter().map(|w| turn(w)).collect();
    let straight: Vec<_> = weights.iter().map(|w| w.to_vec()).collect();
    let mut other = 0.0;
    for (got, (all, [rows, columns])) in both.iter().zip([(straight, [rows, columns]), (turned, [columns, rows])]) {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        let (height, width) = (rows.next_multiple_of(8), columns.next_multiple_of(128));
        for w in all {
            let (of_w, of_blocks) = quantise_blocks(&w, rows, columns);
            let start = codes.len();
            codes.resize(start + height * width, 0);
            let lines = codes[start..].chunks_mut(width).zip(of_w.chunks(columns));
            lines.for_each(|(line, of_w)| line[..columns].copy_from_slice(of_w));
            scales.extend(of_blocks);
        }
        let (of_gpu, scales_of_gpu) = got.views();
        other += unlike(&gpu.download(&of_gpu)?, &codes) + unlike(&gpu.download(&scales_of_gpu)?, &scales);
    }
    let good = report("quantise weights: other bits", (weights.len(), rows, columns), other, 0.0);
    Ok((both, good))
}

/// The tensor cores add 128 products of E4M3 with some 14 bits (technical report 3.3.2), the CPU with 24: against f64
/// too the difference is 1.3e-4, whatever the number of tokens.
pub(crate) const GRADIENT: f64 = 3e-4;

/// Products in FP8: rows of groups, each against its weight.
fn fp8(gpu: &Gpu, counts: &[u32], out: usize, input: usize) -> Result<bool, BackendError> {
    let b = CpuBackend::new(Precision::Fp8);
    let rows = counts.iter().sum::<u32>() as usize;
    let (x, words) = low(&b, rows, input, 7)?;
    let weights: Vec<_> = (0..counts.len()).map(|g| random(out, input, 20 + g as u32)).collect();
    let (codes, mut good) = quantised(gpu, &b, &x, &words)?;
    let ([w, _], same) = blocks(gpu, &weights, out, input)?;
    good &= same;
    let host: Vec<Tensor> = weights.iter().map(|w| Tensor::host(out, input, Arc::clone(w))).collect();
    let poison = vec![0x7fff; rows * out];
    let mut y = gpu.upload(&poison)?;
    if counts.len() == 1 {
        gpu.fp8_linear(&codes, &w, &mut y)?;
        let want = b.read(&b.linear(&x, &host[0], Role::Projection))?;
        good &= report(
            "product, FP8",
            (rows, out, input),
            norm_difference(&values(&gpu.download(&y)?), &want),
            product_most(rows * out),
        );
    }
    let mut y = gpu.upload(&poison)?;
    gpu.fp8_grouped(&codes, &w, &Groups::new(gpu, counts)?, &mut y)?;
    let grouped = b.grouped_linear(&x, &b.upload_indices(counts.to_vec()), &host, Role::Projection);
    let error = norm_difference(&values(&gpu.download(&y)?), &b.read(&grouped)?);
    Ok(good & report("grouped product, FP8", (counts, out, input), error, product_most(rows * out)))
}

/// Weight gradients of groups of rows that are turned on the GPU, added to what is there.
fn weight_gradient(gpu: &Gpu, counts: &[u32], out: usize, input: usize) -> Result<bool, BackendError> {
    let b = CpuBackend::new(Precision::Fp8);
    let tokens = counts.iter().sum::<u32>() as usize;
    let ((dy, dy_words), (x, x_words)) = (low(&b, tokens, out, 8)?, low(&b, tokens, input, 9)?);
    let groups = Groups::new(gpu, counts)?;
    let (mut of_dy, mut of_x) = (gpu.codes(out, groups.filled())?, gpu.codes(input, groups.filled())?);
    gpu.turn(&gpu.upload(&dy_words)?, &groups, &mut of_dy, false)?;
    let (kept, mut good) = quantised(gpu, &b, &x, &x_words)?;
    gpu.turn_codes(&kept, &groups, &mut of_x, false)?;
    let before = random(counts.len() * out, input, 10);
    let mut dw = gpu.upload(&before)?;
    gpu.fp8_weight_gradient(&of_dy, &of_x, &groups, &mut dw)?;
    let got: Vec<f32> = gpu.download(&dw)?.iter().zip(before.iter()).map(|(sum, before)| sum - before).collect();
    let mut from = 0;
    for (count, got) in counts.iter().map(|n| *n as usize).zip(got.chunks(out * input)) {
        let (dy, x) = (b.rows(&dy, from, count), b.rows(&x, from, count));
        from += count;
        let error = if count == 0 {
            got.iter().fold(0.0, |m, x| f64::from(x.abs()).max(m))
        } else {
            norm_difference(got, &b.read(&b.linear_backward_weight(&dy, &x, Role::Projection))?)
        };
        good &= report("weight gradient, FP8", (count, out, input), error, GRADIENT);
    }
    Ok(good)
}

/// A thousand times the same product of each kind: no bit differs.
fn repeated(gpu: &Gpu) -> Result<bool, BackendError> {
    let b = CpuBackend::new(Precision::Fp8);
    let mut good = true;
    for (rows, out, input) in
        [(129, 200, 256), (2816, 1536, 128), (2816, 1536, 1024), (2816, 1536, 4096), (300, 2112, 1024)]
    {
        if !wanted(rows * input) {
            continue;
        }
        let (x, words) = low(&b, rows, input, 16)?;
        let (codes, _) = quantised(gpu, &b, &x, &words)?;
        let ([w, _], _) = blocks(gpu, &[random(out, input, 17)], out, input)?;
        let (mut first, mut other) = (None, 0.0);
        let mut y = gpu.upload(&vec![0x7fff; rows * out])?;
        for _ in 0..times(1000) {
            gpu.fp8_linear(&codes, &w, &mut y)?;
            let got = gpu.download(&y)?;
            other += unlike(&got, first.get_or_insert_with(|| got.clone()));
        }
        good &= report("a product a thousand times: other bits", (rows, out, input), other, 0.0);
    }
    Ok(good)
}

/// Products in FP8, by themselves.
pub(crate) fn all(gpu: &Gpu) -> Result<bool, BackendError> {
    let mut good = repeated(gpu)?;
    for (count, rows, columns) in [(1, 1, 1), (2, 7, 130), (3, 136, 256), (1, 300, 1031)] {
        let weights: Vec<_> = (0..count).map(|at| random(rows, columns, 60 + at)).collect();
        good &= blocks(gpu, &weights, rows, columns)?.1;
    }
    for (counts, out, input) in [
        (&[0][..], 136, 256),
        (&[0, 0, 0], 136, 256),
        (&[1], 8, 128),
        (&[77], 136, 256),
        (&[300], 2112, 1024),
        (&[1000], 1000, 640),
        (&[2047], 520, 1536),
        // Those that take the other tiles.
        (&[2816], 1536, 128),
        (&[2816], 1536, 1024),
        (&[2816], 1536, 4096),
        // A large weight.
        (&[3, 0, 300, 256], 5120, 4096),
        (&[5, 0, 0, 131, 256, 257, 1, 300], 256, 512),
        (&[0, 1000, 33, 0], 1000, 384),
    ] {
        if wanted(counts.iter().sum::<u32>() as usize * input) {
            good &= fp8(gpu, counts, out, input)?;
        }
    }
    for (counts, out, input) in [
        (&[0][..], 128, 256),
        (&[0, 0, 0], 256, 128),
        (&[1], 128, 128),
        (&[128], 256, 128),
        (&[4096], 640, 512),
        (&[5, 0, 131, 256, 0, 1, 300], 384, 256),
    ] {
        if wanted(counts.iter().sum::<u32>() as usize * input) {
            good &= weight_gradient(gpu, counts, out, input)?;
        }
    }
    Ok(good)
}
