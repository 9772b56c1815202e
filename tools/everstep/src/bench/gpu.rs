//! `everstep bench gemm|grouped|wgrad|quantise`: the Hopper kernels beside cuBLASLt and the copy of the same card. Times are
//! medians by the card's clock, the cache emptied before each run. Operands are random codes: the power that a product
//! draws, and so its clock, depends on them.

use super::cubins::Folder;
use super::median;
use super::torch::Torch;
use anyhow::Result;
use everstep_kernels::{
    Blocks, CausalAttention, CausalGradients, CausalShape, Codes, CublasPeer, Dense, Gpu, Groups, Philox, Places, Qkv,
};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const REPETITIONS: usize = 20;
/// Rounds of ours and peer in turns; the best of each counts.
const ROUNDS: usize = 3;
/// Rounds of grouped products, of which the median of each counts.
const GROUPED_ROUNDS: usize = 5;
/// The card draws all it may: each timing begins after the same rest.
const REST: Duration = Duration::from_millis(100);
/// Dense E4M3 of an H100 SXM by its data sheet, BF16, and FP32 without tensor cores.
const LIMIT_TFLOPS: f64 = 1979.0;
const LIMIT_BF16: f64 = 989.0;
const LIMIT_FP32: f64 = 67.0;

/// What can be measured on a GPU.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum What {
    /// Dense products in FP8, with those in BF16, and the gate's in FP32.
    Gemm,
    /// Products grouped by expert.
    Grouped {
        /// A Python that has PyTorch: its grouped product takes turns with ours.
        #[arg(long, value_name = "PYTHON")]
        torch: Option<PathBuf>,
    },
    /// Weight gradients grouped over tokens.
    Wgrad,
    /// What is done to rows: quantise, norm and its weights' gradient, SwiGLU, dispatch, combine, its gradients, turn.
    Quantise,
    /// Causal attention, forward and backward, deterministic.
    Attention,
}

pub(crate) fn run(what: What) -> Result<()> {
    let gpu = Arc::new(Gpu::new(0, Box::new(Folder::find()))?);
    println!("{}", json!({ "card": gpu.card()? }));
    match what {
        What::Gemm => gemm(&gpu).and_then(|()| gate(&gpu)),
        What::Grouped { torch } => grouped(&gpu, torch.as_deref().map(Torch::start).transpose()?),
        What::Wgrad => wgrad(&gpu),
        What::Quantise => rows(&gpu),
        What::Attention => attention(&gpu),
    }
}

/// Random codes of values within (-2, 2): no NaN among them.
fn random_codes(count: usize, name: u32) -> Vec<u8> {
    let random = Philox::new(7, 51, name);
    // A uniform number has 53 random bits: six bytes.
    (0..count.div_ceil(6) as u64)
        .flat_map(|n| ((random.uniform(n) * (1u64 << 48) as f64) as u64).to_le_bytes().into_iter().take(6))
        .map(|byte| byte & 0xbf)
        .take(count)
        .collect()
}

fn random_scales(count: usize, name: u32) -> Vec<f32> {
    let random = Philox::new(7, 52, name);
    (0..count as u64).map(|n| 0.005 + 0.01 * random.uniform(n) as f32).collect()
}

fn codes(gpu: &Gpu, rows: usize, columns: usize, name: u32) -> Result<Codes> {
    let scales = gpu.upload(&random_scales(Codes::scale_count(rows, columns), name))?;
    Ok(Codes::new(rows, columns, gpu.upload(&random_codes(rows * columns, name))?, scales))
}

fn blocks(gpu: &Gpu, groups: usize, rows: usize, columns: usize) -> Result<Blocks> {
    let scales = gpu.upload(&random_scales(groups * rows.div_ceil(128) * columns / 128, 3))?;
    Ok(Blocks::new(groups, rows, columns, gpu.upload(&random_codes(groups * rows * columns, 3))?, scales))
}

/// The best of several rounds, each after a rest.
fn best(mut timed: impl FnMut() -> Result<f64>) -> Result<f64> {
    Ok(in_turns(&mut [&mut timed])?[0])
}

/// The best of several rounds of each, in turns, each after a rest.
fn in_turns(timed: &mut [&mut dyn FnMut() -> Result<f64>]) -> Result<Vec<f64>> {
    let all = rounds(ROUNDS, timed)?;
    Ok(all.into_iter().map(|times| times.into_iter().fold(f64::INFINITY, f64::min)).collect())
}

/// The times of each, in turns, each after a rest.
fn rounds(count: usize, timed: &mut [&mut dyn FnMut() -> Result<f64>]) -> Result<Vec<Vec<f64>>> {
    let mut all = vec![Vec::new(); timed.len()];
    for _ in 0..count {
        for (times, timed) in all.iter_mut().zip(timed.iter_mut()) {
            std::thread::sleep(REST);
            times.push(timed()?);
        }
    }
    Ok(all)
}

fn geometric_mean(all: &[f64]) -> f64 {
    (all.iter().map(|x| x.ln()).sum::<f64>() / all.len() as f64).exp()
}

/// Dense products with the shapes of the published model, and a cube.
fn gemm(gpu: &Arc<Gpu>) -> Result<()> {
    let cublas = CublasPeer::new(gpu)?;
    let mut ratios = Vec::new();
    for (m, n, k) in [
        (4096, 2112, 7168),
        (4096, 24576, 1536),
        (4096, 32768, 512),
        (4096, 7168, 16384),
        (4096, 4096, 7168),
        (4096, 7168, 2048),
        (8192, 8192, 8192),
    ] {
        let (x, w) = (codes(gpu, m, k, 1)?, blocks(gpu, 1, n, k)?);
        let (mut y, mut theirs) = (gpu.upload(&vec![0u16; m * n])?, gpu.upload(&vec![0u16; m * n])?);
        let mut run = || Ok(gpu.seconds(REPETITIONS, || gpu.fp8_linear(&x, &w, &mut y))?);
        let times = in_turns(&mut [&mut run, &mut || Ok(cublas.block_scaled(1, &x, &w, &mut theirs)?)])?;
        let (ours, peer) = (times[0], times[1]);
        let (got, want) = (gpu.download(&y)?, gpu.download(&theirs)?);
        let wide = best(|| Ok(cublas.tensor_wide(&x, &w, &mut theirs)?))?;
        let [bf16, other] = bf16(gpu, &cublas, [m, n, k])?;
        let tflops = |time: f64| 2.0 * (m * n * k) as f64 / time / 1e12;
        ratios.push(peer / ours);
        println!(
            "{}",
            json!({
                "bench": "dense FP8, scales 1x128 by 128x128", "m": m, "n": n, "k": k, "tflops": tflops(ours),
                "peer": "cuBLASLt, block-scaled", "peer_tflops": tflops(peer), "ratio": peer / ours,
                "results_differ": differ(&got, &want), "tensor_wide_tflops": tflops(wide),
                "bf16_tflops": bf16.map(tflops), "bf16_peer": "cuBLASLt, an algorithm for each number of rows",
                "bf16_peer_tflops": other.map(tflops), "bf16_limit_tflops": LIMIT_BF16,
                "limit": "tensor cores by the data sheet", "limit_tflops": LIMIT_TFLOPS,
            })
        );
    }
    println!("{}", json!({ "bench": "dense FP8", "geometric_mean_of_ratios": geometric_mean(&ratios) }));
    Ok(())
}

/// Seconds of the result and the two gradients in BF16, by the algorithms that are taken for any number of rows, and by those
/// that cuBLASLt takes for these.
fn bf16(gpu: &Arc<Gpu>, cublas: &CublasPeer<'_>, shape: [usize; 3]) -> Result<[[f64; 3]; 2]> {
    let ([m, n, k], dense) = (shape, Dense::new(gpu)?);
    let (x, w) = (gpu.upload(&random_bf16(m * k, 4))?, gpu.upload(&random_bf16(n * k, 5))?);
    let dy = gpu.upload(&random_bf16(m * n, 10))?;
    let (mut y, mut dx) = (gpu.upload(&vec![0u16; m * n])?, gpu.upload(&vec![0u16; m * k])?);
    let mut dw = gpu.upload(&vec![0f32; n * k])?;
    least(
        &mut || {
            Ok([
                gpu.seconds(REPETITIONS, || dense.forward(shape, &x, &w, &mut y))?,
                gpu.seconds(REPETITIONS, || dense.backward_input(shape, &dy, &w, &mut dx))?,
                gpu.seconds(REPETITIONS, || dense.backward_weight(shape, &dy, &x, &mut dw))?,
            ])
        },
        &mut || Ok(cublas.bf16_products(shape, &x, &w)?),
    )
}

/// The best of several rounds of ours and the peer's three products, in turns, each after a rest.
fn least<'a>(
    ours: &'a mut dyn FnMut() -> Result<[f64; 3]>,
    theirs: &'a mut dyn FnMut() -> Result<[f64; 3]>,
) -> Result<[[f64; 3]; 2]> {
    let (mut least, mut both) = ([[f64::INFINITY; 3]; 2], [ours, theirs]);
    for _ in 0..ROUNDS {
        for (least, timed) in least.iter_mut().zip(&mut both) {
            std::thread::sleep(REST);
            least.iter_mut().zip(timed()?).for_each(|(least, time)| *least = least.min(time));
        }
    }
    Ok(least)
}

/// The gate's three products, with the CPU's order of sums, from activations in BF16; cuBLASLt has them in FP32.
fn gate(gpu: &Gpu) -> Result<()> {
    let cublas = CublasPeer::new(gpu)?;
    for (tokens, experts, inputs) in [(4096, 64, 2048), (8192, 64, 2048), (8192, 256, 7168), (16384, 256, 7168)] {
        let shape = [tokens, experts, inputs];
        let words = random_bf16(tokens * inputs, 9);
        let wide: Vec<f32> = words.iter().map(|x| everstep_kernels::bf16_value(*x)).collect();
        let (x, wide) = (gpu.upload(&words)?, gpu.upload(&wide)?);
        let normals = |count, name| gpu.upload(&Philox::new(7, 54, name).normals(count, 1.0));
        let (w, dlogits) = (normals(experts * inputs, 1)?, normals(tokens * experts, 2)?);
        let mut room = gpu.upload(&vec![0f32; gpu.gate_room(shape)])?;
        let (mut logits, mut dw) = (normals(tokens * experts, 3)?, normals(experts * inputs, 4)?);
        let mut dx = gpu.upload(&vec![0u16; tokens * inputs])?;
        let mut run = || {
            Ok([
                gpu.seconds(REPETITIONS, || gpu.gate_logits(shape, &x, &w, &mut room, &mut logits))?,
                gpu.seconds(REPETITIONS, || gpu.gate_input_gradient(shape, &dlogits, &w, &mut dx))?,
                gpu.seconds(REPETITIONS, || gpu.gate_weight_gradient(shape, &dlogits, &x, &mut room, &mut dw))?,
            ])
        };
        let times = least(&mut run, &mut || Ok(cublas.f32_products(shape, &wide, &w)?))?;
        let tflops = |time: f64| 2.0 * (tokens * experts * inputs) as f64 / time / 1e12;
        for (at, what) in ["logits", "gradient of the input", "gradient of the weight"].iter().enumerate() {
            let [ours, peer] = times.map(|of| of[at]);
            println!(
                "{}",
                json!({
                    "bench": format!("gate in FP32, {what}"), "tokens": tokens, "experts": experts, "inputs": inputs,
                    "microseconds": ours * 1e6, "tflops": tflops(ours), "peer": "cuBLASLt, FP32, an order of its own",
                    "peer_tflops": tflops(peer), "ratio": peer / ours,
                    "limit": "FP32 multiply-adds by the data sheet", "limit_tflops": LIMIT_FP32,
                })
            );
        }
    }
    Ok(())
}

/// Relative difference of two results in BF16: the root of the sums of squares.
fn differ(a: &[u16], b: &[u16]) -> f64 {
    let value = |x: &u16| f64::from(everstep_kernels::bf16_value(*x));
    let (mut apart, mut whole) = (0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        apart += (value(a) - value(b)).powi(2);
        whole += value(b).powi(2);
    }
    (apart / whole).sqrt()
}

fn random_bf16(count: usize, name: u32) -> Vec<u16> {
    Philox::new(7, 53, name).normals(count, 1.0).into_iter().map(everstep_kernels::bf16_bits).collect()
}

/// Experts' products. PyTorch's has scales by row; where it is not there, cuBLASLt runs as many of one group, one after another, in
/// one timing.
fn grouped(gpu: &Gpu, mut torch: Option<Torch>) -> Result<()> {
    let (cublas, mut ratios) = (CublasPeer::new(gpu)?, Vec::new());
    let peer_is = match &torch {
        Some(torch) => format!("torch._scaled_grouped_mm, scales by row, PyTorch {}", torch.version),
        None => "cuBLASLt, block-scaled, one group after another".to_owned(),
    };
    for (groups, rows, n, k) in [
        (8, 4096, 6144, 7168),
        (8, 4096, 7168, 3072),
        (8, 4096, 4096, 4096),
        (8, 4096, 4096, 2048),
        (64, 1536, 1024, 2048),
        (64, 1536, 2048, 512),
    ] {
        let (x, w) = (codes(gpu, groups * rows, k, 1)?, blocks(gpu, groups, n, k)?);
        let at = Groups::new(gpu, &vec![rows as u32; groups])?;
        let mut y = gpu.upload(&vec![0u16; groups * rows * n])?;
        let (one_x, one_w) = (codes(gpu, rows, k, 1)?, blocks(gpu, 1, n, k)?);
        let mut one_y = gpu.upload(&vec![0u16; rows * n])?;
        let mut run = || Ok(gpu.seconds(REPETITIONS, || gpu.fp8_grouped(&x, &w, &at, &mut y))?);
        let mut theirs = || match &mut torch {
            Some(torch) => torch.grouped([groups, rows, n, k]),
            None => Ok(cublas.block_scaled(groups, &one_x, &one_w, &mut one_y)?),
        };
        let mut times = rounds(GROUPED_ROUNDS, &mut [&mut run, &mut theirs])?.into_iter().map(median);
        let (ours, peer) = (times.next().expect("ours"), times.next().expect("the peer's"));
        let tflops = |time: f64| 2.0 * (groups * rows * n * k) as f64 / time / 1e12;
        ratios.push(peer / ours);
        println!(
            "{}",
            json!({
                "bench": "FP8 grouped by expert", "groups": groups, "rows": rows, "n": n, "k": k, "tflops": tflops(ours),
                "peer": peer_is, "peer_tflops": tflops(peer), "ratio": peer / ours,
                "limit": "tensor cores by the data sheet", "limit_tflops": LIMIT_TFLOPS,
            })
        );
    }
    println!("{}", json!({ "bench": "FP8 grouped by expert", "geometric_mean_of_ratios": geometric_mean(&ratios) }));
    Ok(())
}

/// Weight gradients; no library has scales 1x128 by 1x128 with a sum in FP32.
fn wgrad(gpu: &Gpu) -> Result<()> {
    for (groups, m, n, tokens) in [(8, 7168, 2048, 4096), (8, 4096, 7168, 4096), (64, 2048, 1024, 1536)] {
        let (dy, x) = (codes(gpu, m, groups * tokens, 1)?, codes(gpu, n, groups * tokens, 2)?);
        let at = Groups::new(gpu, &vec![tokens as u32; groups])?;
        let mut dw = gpu.upload(&vec![0f32; groups * m * n])?;
        let ours = best(|| Ok(gpu.seconds(REPETITIONS, || gpu.fp8_weight_gradient(&dy, &x, &at, &mut dw))?))?;
        println!(
            "{}",
            json!({
                "bench": "weight gradient, FP8, added to FP32", "groups": groups, "m": m, "n": n, "tokens": tokens,
                "tflops": 2.0 * (groups * m * n * tokens) as f64 / ours / 1e12,
                "limit": "tensor cores by the data sheet", "limit_tflops": LIMIT_TFLOPS,
            })
        );
    }
    Ok(())
}

/// A line of what is done to rows, against the copy of as many bytes.
fn line(gpu: &Gpu, what: &str, [rows, columns]: [usize; 2], bytes: usize, time: f64) -> Result<()> {
    let (rate, copy) = (bytes as f64 / time, best(|| Ok(1.0 / gpu.copy_rate(bytes / 2)?))?);
    println!(
        "{}",
        json!({
            "bench": what, "rows": rows, "columns": columns, "gb_per_s": rate / 1e9,
            "limit": "copy of as many bytes", "limit_gb_per_s": 1e-9 / copy, "share": rate * copy,
        })
    );
    Ok(())
}

/// What is done to rows.
fn rows(gpu: &Gpu) -> Result<()> {
    for columns in [2048usize, 7168] {
        in_place(gpu, [8192, columns])?;
        norm_gradient(gpu, [8192, columns])?;
        norm_weights(gpu, [8192, columns])?;
        routed(gpu, [8192, columns])?;
    }
    norm_gradient(gpu, [16384, 7168])?;
    norm_weights(gpu, [16384, 7168])
}

/// The gradient of what a norm is given.
fn norm_gradient(gpu: &Gpu, shape: [usize; 2]) -> Result<()> {
    let n = shape[0] * shape[1];
    let (x, dy) = (gpu.upload(&random_bf16(n, 6))?, gpu.upload(&random_bf16(n, 7))?);
    let (weight, mut dx) = (gpu.upload(&vec![1.0f32; shape[1]])?, gpu.upload(&vec![0u16; n])?);
    let time = best(|| Ok(gpu.seconds(REPETITIONS, || gpu.rms_norm_backward([&x, &dy], &weight, &mut dx, 1e-6))?))?;
    line(gpu, "RMSNorm, gradient", shape, 6 * n, time)
}

/// The gradient of a norm's weights, of the factors that the norm kept: it only reads, so its limit is reading; the copy's rate
/// stands beside it.
fn norm_weights(gpu: &Gpu, shape: [usize; 2]) -> Result<()> {
    let [tokens, columns] = shape;
    let n = tokens * columns;
    let (x, dy) = (gpu.upload(&random_bf16(n, 6))?, gpu.upload(&random_bf16(n, 7))?);
    let (roots, mut dw) = (gpu.upload(&vec![1f32; tokens])?, gpu.upload(&vec![0f32; columns])?);
    let mut sums = gpu.upload(&vec![0f32; Gpu::strips(tokens) * columns])?;
    let bytes = 4 * n + 4 * (tokens + columns);
    let mut gradient = || gpu.rms_norm_weight_gradient(&x, &dy, &roots, &mut sums, &mut dw);
    let mut ours = || Ok(gpu.seconds(REPETITIONS, &mut gradient)?);
    let (mut copy, mut read) = (|| Ok(1.0 / gpu.copy_rate(bytes / 2)?), || Ok(1.0 / gpu.read_rate(bytes)?));
    let times = in_turns(&mut [&mut ours, &mut copy, &mut read])?;
    let rate = bytes as f64 / times[0];
    println!(
        "{}",
        json!({
            "bench": "RMSNorm, gradient of the weights", "rows": tokens, "columns": columns, "gb_per_s": rate / 1e9,
            "limit": "copy of as many bytes", "limit_gb_per_s": 1e-9 / times[1], "share": rate * times[1],
            "read_limit": "reading as many bytes", "read_limit_gb_per_s": 1e-9 / times[2], "read_share": rate * times[2],
        })
    );
    Ok(())
}

/// What leaves rows where they are.
fn in_place(gpu: &Gpu, shape: [usize; 2]) -> Result<()> {
    let [tokens, columns] = shape;
    let n = tokens * columns;
    let scales = 4 * n / 128;
    let x = gpu.upload(&random_bf16(n, 6))?;
    let up = gpu.upload(&random_bf16(n, 7))?;
    let weight = gpu.upload(&vec![1.0f32; columns])?;
    let mut y = gpu.upload(&vec![0u16; n])?;
    let mut out = gpu.codes(tokens, columns)?;
    let time = best(|| Ok(gpu.seconds(REPETITIONS, || gpu.quantise_rows(&x, &mut out, false))?))?;
    line(gpu, "quantise", shape, 3 * n + scales, time)?;
    let mut roots = gpu.upload(&vec![0f32; tokens])?;
    let mut norm = || gpu.rms_norm_quantised(&x, &weight, (&mut y, &mut out, &mut roots), 1e-6);
    let time = best(|| Ok(gpu.seconds(REPETITIONS, &mut norm)?))?;
    line(gpu, "RMSNorm and quantise", shape, 5 * n + scales + 4 * tokens, time)?;
    let time = best(|| Ok(gpu.seconds(REPETITIONS, || gpu.swiglu_quantised(&x, &up, &mut y, &mut out))?))?;
    line(gpu, "SwiGLU and quantise", shape, 7 * n + scales, time)?;
    let (dh, mut dup, mut of_dup) =
        (gpu.upload(&random_bf16(n, 8))?, gpu.upload(&vec![0u16; n])?, gpu.codes(tokens, columns)?);
    let mut gradients = || gpu.swiglu_backward_quantised([&x, &up, &dh], [&mut y, &mut dup], [&mut out, &mut of_dup]);
    let time = best(|| Ok(gpu.seconds(REPETITIONS, &mut gradients)?))?;
    line(gpu, "SwiGLU, gradients, and quantise", shape, 12 * n + 2 * scales, time)?;
    weights(gpu, shape)?;
    let groups = Groups::new(gpu, &[tokens as u32 / 8; 8])?;
    let mut turned = gpu.codes(columns, tokens)?;
    let time = best(|| Ok(gpu.seconds(REPETITIONS, || gpu.turn(&x, &groups, &mut turned, false))?))?;
    line(gpu, "turn and quantise", shape, 3 * n + scales, time)
}

/// A weight to E4M3 in both orders.
fn weights(gpu: &Gpu, shape: [usize; 2]) -> Result<()> {
    let w = gpu.upload(&Philox::new(7, 54, 11).normals(shape[0] * shape[1], 1.0))?;
    let mut both = gpu.blocks(1, shape)?;
    let mut quantise = || gpu.quantise_blocks([&w].into_iter().map(Ok), shape, &mut both);
    let time = best(|| Ok(gpu.seconds(REPETITIONS, &mut quantise)?))?;
    line(gpu, "quantise a weight", shape, 6 * w.len() + 8 * (w.len() >> 14), time)
}

/// What moves rows to experts and back.
fn routed(gpu: &Gpu, shape: [usize; 2]) -> Result<()> {
    let ([tokens, columns], top_k, experts) = (shape, 8usize, 64usize);
    let n = tokens * columns;
    let scales = 4 * n / 128;
    let x = gpu.upload(&random_bf16(n, 6))?;
    let mut y = gpu.upload(&vec![0u16; n])?;
    // Each token's choices, spread over the experts; rows lie by expert.
    let choice = |t: usize, k: usize| (t * 11 + k * (experts / top_k)) % experts;
    let mut chosen: Vec<Vec<usize>> = (0..tokens).map(|t| (0..top_k).map(|k| choice(t, k)).collect()).collect();
    chosen.iter_mut().for_each(|list| list.sort_unstable());
    let mut next = vec![0i32; experts];
    let each = (tokens * top_k / experts) as i32;
    let flat: Vec<usize> = chosen.concat();
    let place: Vec<i32> = flat
        .iter()
        .map(|e| {
            next[*e] += 1;
            *e as i32 * each + next[*e] - 1
        })
        .collect();
    let named: Vec<i32> = flat.iter().map(|e| *e as i32).collect();
    let places = Places::new(gpu, (top_k, 8, tokens * top_k), &place, &named)?;
    let made = gpu.upload(&random_bf16(n * top_k, 8))?;
    let weights = gpu.upload(&vec![0.125f32; tokens * top_k])?;
    let mut combine = || gpu.combine_rows(&made, &places, Some(weights.as_view()), &mut y, columns);
    let time = best(|| Ok(gpu.seconds(REPETITIONS, &mut combine)?))?;
    line(gpu, "combine", shape, 2 * n * (top_k + 1) + 12 * tokens * top_k, time)?;
    let (mut drows, mut dweights) = (gpu.upload(&vec![0u16; n * top_k])?, gpu.upload(&vec![0f32; tokens * top_k])?);
    let backward = |drows: &mut _, dweights: &mut _| {
        gpu.combine_rows_backward(&x, &made, &places, &weights, (drows, dweights), columns)
    };
    let time = best(|| Ok(gpu.seconds(REPETITIONS, || backward(&mut drows, &mut dweights))?))?;
    line(gpu, "combine, gradients", shape, 2 * n * (2 * top_k + 1) + 12 * tokens * top_k, time)?;
    let (mut sent, mut sent_scales) = (gpu.upload(&vec![0u8; n * top_k])?, gpu.upload(&vec![0f32; n * top_k / 128])?);
    let dispatch = |sent: &mut _, scales: &mut _| gpu.dispatch_quantised(&x, &places, (sent, scales), columns, true);
    let time = best(|| Ok(gpu.seconds(REPETITIONS, || dispatch(&mut sent, &mut sent_scales))?))?;
    line(gpu, "dispatch and quantise", shape, 2 * n + top_k * (n + scales) + 4 * tokens * top_k, time)
}

/// Attention as latent attention trains it. Products count once for each score that a token sees: two forward, five
/// backward.
fn attention(gpu: &Arc<Gpu>) -> Result<()> {
    let shape = CausalShape { batch: 4, heads: 16, tokens: 4096, keys: 192, values: 128 };
    let passes = CausalAttention::new(gpu, shape)?;
    let random = |count, name| gpu.upload(&random_bf16(count, name));
    let x = Qkv { q: random(shape.wide(), 1)?, k: random(shape.wide(), 2)?, v: random(shape.thin(), 3)? };
    let (d_o, mut o) = (random(shape.thin(), 4)?, gpu.upload(&vec![0u16; shape.thin()])?);
    let (mut statistics, mut sums) = (gpu.upload(&vec![0f32; shape.rows()])?, gpu.upload(&vec![0f32; shape.rows()])?);
    let empty = |count| gpu.upload(&vec![0u16; count]);
    let mut out = CausalGradients { dq: empty(shape.wide())?, dk: empty(shape.wide())?, dv: empty(shape.thin())? };
    let forward = best(|| Ok(gpu.seconds(REPETITIONS, || passes.forward(&x, &mut o, &mut statistics))?))?;
    let run = |out: &mut _, sums: &mut _| passes.backward(&x, (&o, &statistics), &d_o, out, sums);
    let backward = best(|| Ok(gpu.seconds(REPETITIONS, || run(&mut out, &mut sums))?))?;
    let scores = (shape.batch * shape.heads * shape.tokens * (shape.tokens + 1) / 2) as f64;
    let flops = 2.0 * scores * (3 * shape.keys + 2 * shape.values + shape.keys + shape.values) as f64;
    println!(
        "{}",
        json!({
            "bench": "causal attention, BF16, deterministic, by cuDNN", "batch": shape.batch, "heads": shape.heads,
            "tokens": shape.tokens, "keys": shape.keys, "values": shape.values, "forward_ms": forward * 1e3,
            "backward_ms": backward * 1e3, "both_ms": (forward + backward) * 1e3,
            "tflops": flops / (forward + backward) / 1e12, "limit": "tensor cores by the data sheet",
            "limit_tflops": LIMIT_BF16,
        })
    );
    Ok(())
}
