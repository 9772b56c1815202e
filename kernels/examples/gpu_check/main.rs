//! Runs what there is for the GPU against the CPU backend, on a real GPU. Prints JSON lines; fails if anything differs
//! more than it may, or if there is no GPU. Speed is `everstep bench`. With `--small` it leaves out large shapes and repetitions,
//! for compute-sanitizer; with names of parts all others.

mod adamw;
mod attention;
mod backend;
mod dense;
mod fp8;
mod gate;
mod memory;
mod model;
mod same;

use everstep_kernels::{
    Backend, BackendError, Codes, CpuBackend, CudaBackend, Dense, Dispatch, GateShape, Gpu, NoCubins, Philox, Places,
    Precision, Tensor, bf16_bits, bf16_value,
};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

/// Another one in each run.
fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()))
}

/// Whether only small shapes are wanted.
fn small() -> bool {
    static SMALL: OnceLock<bool> = OnceLock::new();
    *SMALL.get_or_init(|| std::env::args().any(|argument| argument == "--small"))
}

const PARTS: [&str; 9] = ["adamw", "fp32", "bf16", "fp8", "products", "rows", "gate", "libraries", "memory"];

/// The parts that are named.
fn named() -> impl Iterator<Item = String> {
    std::env::args().skip(1).filter(|argument| argument != "--small")
}

/// Whether a part is wanted: it is named, or none is.
fn part(name: &str) -> bool {
    assert!(PARTS.contains(&name), "a part that can be named");
    named().next().is_none() || named().any(|argument| argument == name)
}

/// Whether a matrix of so many elements is wanted.
fn wanted(elements: usize) -> bool {
    !small() || elements <= 1 << 18
}

/// Repetitions of which the bits are compared.
fn times(all: usize) -> usize {
    if small() { 2 } else { all }
}

fn random(rows: usize, columns: usize, name: u32) -> Arc<Vec<f32>> {
    Arc::new(Philox::new(seed(), 50, name).normals(rows * columns, 1.0))
}

/// Root of the sum of squared differences relative to that of squares.
fn norm_difference(a: &[f32], b: &[f32]) -> f64 {
    assert!(a.len() == b.len() && a.iter().all(|x| x.is_finite()), "numbers, and as many as expected");
    let squares = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter().zip(b).map(|(a, b)| f(f64::from(*a), f64::from(*b)).powi(2)).sum()
    };
    (squares(&|a, b| a - b) / squares(&|_, b| b).max(1e-300)).sqrt()
}

fn report(what: &str, shape: impl std::fmt::Debug, difference: f64, most: f64) -> bool {
    let good = difference <= most;
    println!(
        "{{\"check\":\"{what}\",\"shape\":\"{shape:?}\",\"difference\":{difference:.2e},\"most\":{most:e},\"good\":{good}}}"
    );
    good
}

/// BF16 of random rows, as the CPU's backend stores them and as words of the GPU.
fn low(b: &CpuBackend, rows: usize, columns: usize, name: u32) -> Result<(Tensor, Vec<u16>), BackendError> {
    let x = b.upload(rows, columns, random(rows, columns, name));
    let words = b.read(&x)?.iter().map(|x| bf16_bits(*x)).collect();
    Ok((x, words))
}

fn values(words: &[u16]) -> Vec<f32> {
    words.iter().map(|w| bf16_value(*w)).collect()
}

/// Both round the same sums, in other orders, to BF16: a result in some hundred is another neighbour.
const PRODUCT: f64 = 1e-3;
/// Of some few results that one may be most: neighbours are at most 2^-7 apart.
fn product_most(results: usize) -> f64 {
    if results < 100 { 8e-3 } else { PRODUCT }
}
/// Elements that differ, of results that must not.
fn unlike<T: PartialEq>(got: &[T], want: &[T]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).filter(|(a, b)| a != b).count() as f64
}

/// What is done to rows: the bits of the CPU backend in BF16.
fn rows(gpu: &Gpu, tokens: usize, columns: usize) -> Result<bool, BackendError> {
    let b = CpuBackend::new(Precision::Bf16);
    let words = |x: &Tensor| Ok::<Vec<u16>, BackendError>(b.read(x)?.iter().map(|x| bf16_bits(*x)).collect());
    let ((x, x_words), (up, up_words)) = (low(&b, tokens, columns, 11)?, low(&b, tokens, columns, 12)?);
    let (x_gpu, up_gpu, weight) = (gpu.upload(&x_words)?, gpu.upload(&up_words)?, random(1, columns, 13));
    let same_codes = |what: &str, got: &Codes, rows: &Tensor| -> Result<bool, BackendError> {
        let q = b.quantise(rows);
        let (codes, scales) = q.as_quantised().expect("a quantised matrix");
        let (mut other, tiles) = (unlike(&gpu.download(got.codes())?, codes), columns / 128);
        let of_gpu = gpu.download(got.scales())?;
        let at = |row: usize, tile: usize| of_gpu[tile * Codes::stride(rows.rows()) + row];
        let by_row: Vec<f32> = (0..scales.len()).map(|n| at(n / tiles, n % tiles)).collect();
        other += unlike(&by_row, scales);
        Ok(report(&format!("{what}: codes and scales of other bits"), (rows.rows(), columns), other, 0.0))
    };
    let (mut y, mut codes) = (gpu.upload(&vec![0x7fffu16; tokens * columns])?, gpu.codes(tokens, columns)?);
    let out = (&mut y, &mut codes, &mut gpu.upload(&vec![f32::NAN; tokens])?);
    gpu.rms_norm_quantised(&x_gpu, &gpu.upload(&weight)?, out, 1e-6)?;
    let want = b.rms_norm(&x, &Tensor::host(1, columns, Arc::clone(&weight)), 1e-6);
    let mut good = report("norm: other bits", (tokens, columns), unlike(&gpu.download(&y)?, &words(&want)?), 0.0);
    good &= same_codes("norm", &codes, &want)?;
    gpu.rms_norm_backward([&x_gpu, &up_gpu], &gpu.upload(&weight)?, &mut y, 1e-6)?;
    let want = b.rms_norm_backward_input(&x, &Tensor::host(1, columns, Arc::clone(&weight)), &up, 1e-6);
    good &= report("norm's gradient: other bits", (tokens, columns), unlike(&gpu.download(&y)?, &words(&want)?), 0.0);
    gpu.swiglu_quantised(&x_gpu, &up_gpu, &mut y, &mut codes)?;
    let want = b.swiglu(&x, &up);
    good &= report("SwiGLU: other bits", (tokens, columns), unlike(&gpu.download(&y)?, &words(&want)?), 0.0);
    good &= same_codes("SwiGLU", &codes, &want)?;
    // Experts by a gate's choice.
    let shape = GateShape { experts: 32, top_k: 8, groups: 8, groups_kept: 4, routed_scale: 2.5, sequence: tokens };
    let logits = Tensor::host(tokens, shape.experts, random(tokens, shape.experts, 14));
    let (experts, weights) = b.gate(&logits, &Tensor::from_vec(1, shape.experts, vec![0.0; shape.experts]), &shape);
    let chosen = b.read_indices(&experts)?;
    let plan = Dispatch::new(&chosen, shape.top_k, shape.experts, shape.groups);
    let starts = plan.starts();
    let place: Vec<i32> = plan.slots.iter().map(|s| (starts[s.expert as usize] as u32 + s.row) as i32).collect();
    let named: Vec<i32> = chosen.iter().map(|e| *e as i32).collect();
    let places = Places::new(gpu, (shape.top_k, shape.experts / shape.groups, place.len()), &place, &named)?;
    let (made, made_words) = low(&b, place.len(), columns, 15)?;
    let of_experts: Vec<Tensor> =
        starts.iter().zip(plan.counts()).map(|(from, count)| b.rows(&made, *from, count as usize)).collect();
    let (rows, of) = (gpu.upload(&made_words)?, gpu.upload(&b.read(&weights)?)?);
    gpu.combine_rows(&rows, &places, Some(of.as_view()), &mut y, columns)?;
    let want = words(&b.combine(&of_experts, Some(&weights), &plan))?;
    good &= report("combine: other bits", (tokens, columns), unlike(&gpu.download(&y)?, &want), 0.0);
    let mut sent = gpu.upload(&vec![0xffu8; place.len() * columns])?;
    let mut scales = gpu.upload(&vec![f32::NAN; place.len() * columns / 128])?;
    gpu.dispatch_quantised(&x_gpu, &places, (&mut sent, &mut scales), columns, false)?;
    let want = b.quantise(&b.stack(&b.dispatch(&x, &plan)));
    let (codes, of_rows) = want.as_quantised().expect("a quantised matrix");
    let other = unlike(&gpu.download(&sent)?, codes) + unlike(&gpu.download(&scales)?, of_rows);
    Ok(good & report("dispatch: other bits", (tokens, columns), other, 0.0))
}

/// The CPU adds the rows one after another: sums of some thousand f32 terms in another order.
const WEIGHTS: f64 = 1e-5;

/// The gradient of a norm's weights, a hundred times: the same bits, those of the CPU's sums of 16 rows in the GPU's order.
fn norm_weight(gpu: &Gpu, tokens: usize, columns: usize) -> Result<bool, BackendError> {
    let (b, eps) = (CpuBackend::new(Precision::Bf16), 1e-6);
    let ((x, x_words), (dy, dy_words)) = (low(&b, tokens, columns, 41)?, low(&b, tokens, columns, 42)?);
    let (x_gpu, dy_gpu, strips) = (gpu.upload(&x_words)?, gpu.upload(&dy_words)?, Gpu::strips(tokens));
    let (mut y, mut codes) = (gpu.upload(&x_words)?, gpu.codes(tokens, columns)?);
    let mut roots = gpu.upload(&vec![f32::NAN; tokens])?;
    gpu.rms_norm_quantised(&x_gpu, &gpu.upload(&vec![1.0; columns])?, (&mut y, &mut codes, &mut roots), eps)?;
    let (mut first, mut other) = (None, 0.0);
    for _ in 0..times(100) {
        let mut sums = gpu.upload(&vec![f32::NAN; strips * columns])?;
        let mut dw = gpu.upload(&vec![f32::NAN; columns])?;
        gpu.rms_norm_weight_gradient(&x_gpu, &dy_gpu, &roots, &mut sums, &mut dw)?;
        let got = gpu.download(&dw)?;
        other += unlike(&got, first.get_or_insert_with(|| got.clone()));
    }
    let got = first.expect("there were runs");
    let mut good = report("norm's weights: elements of other bits, of all runs", (tokens, columns), other, 0.0);
    let chain = |from: usize| {
        let count = 16.min(tokens - from);
        b.read(&b.rms_norm_backward_weight(&b.rows(&x, from, count), &b.rows(&dy, from, count), eps))
    };
    let chains = (0..tokens).step_by(16).map(chain).collect::<Result<Vec<_>, _>>()?;
    let total = |parts: &[Arc<Vec<f32>>]| {
        let zeros = vec![0.0; columns];
        Arc::new(parts.iter().fold(zeros, |sum, part| everstep_kernels::sum(&sum, part)))
    };
    // Eight chains are a strip; then eight runs of strips, and the runs.
    let sums: Vec<_> = chains.chunks(8).map(total).collect();
    let want = total(&sums.chunks(strips.div_ceil(8)).map(total).collect::<Vec<_>>());
    good &= report("norm's weights: other bits", (tokens, columns), unlike(&got, &want), 0.0);
    let whole = b.read(&b.rms_norm_backward_weight(&x, &dy, eps))?;
    Ok(good & report("norm's weights", (tokens, columns), norm_difference(&got, &whole), WEIGHTS))
}

/// The gradients of combine, a hundred times: the bits of the CPU, whose order of sums they have. Half of the experts get
/// no rows, and every fifth choice is not here.
fn combine_backward(gpu: &Gpu, tokens: usize, top_k: usize, columns: usize) -> Result<bool, BackendError> {
    let b = CpuBackend::new(Precision::Bf16);
    let chosen: Vec<u32> = (0..tokens * top_k).map(|at| (at % top_k * 4 + at / top_k / 3 % 2 * 2) as u32).collect();
    let plan = Dispatch::new(&chosen, top_k, 4 * top_k, top_k);
    let (starts, rows) = (plan.starts(), plan.slots.len());
    let row = |at: usize| starts[plan.slots[at].expert as usize] + plan.slots[at].row as usize;
    let here = |at: usize| at % 5 != 4;
    let place: Vec<i32> = (0..rows).map(|at| if here(at) { row(at) as i32 } else { -1 }).collect();
    let named: Vec<i32> = chosen.iter().map(|e| *e as i32).collect();
    let places = Places::new(gpu, (top_k, plan.group_size, rows), &place, &named)?;
    let ((dy, dy_words), (made, made_words)) = (low(&b, tokens, columns, 43)?, low(&b, rows, columns, 44)?);
    let weights = Tensor::host(tokens, top_k, random(tokens, top_k, 45));
    let of_experts: Vec<Tensor> =
        starts.iter().zip(plan.counts()).map(|(from, count)| b.rows(&made, *from, count as usize)).collect();
    let (drows, dweights) = b.combine_backward(&dy, &of_experts, &weights, &plan);
    let mut want_rows: Vec<u16> = b.read(&b.stack(&drows))?.iter().map(|x| bf16_bits(*x)).collect();
    let mut want_weights = b.read(&dweights)?.to_vec();
    for at in (0..rows).filter(|at| !here(*at)) {
        want_weights[at] = 0.0;
        want_rows[row(at) * columns..][..columns].fill(0x7fff);
    }
    let (dy, made, weights) = (gpu.upload(&dy_words)?, gpu.upload(&made_words)?, gpu.upload(&b.read(&weights)?)?);
    let (mut of_rows, mut of_weights) = (0.0, 0.0);
    for _ in 0..times(100) {
        let mut drows = gpu.upload(&vec![0x7fffu16; rows * columns])?;
        let mut dweights = gpu.upload(&vec![f32::NAN; rows])?;
        gpu.combine_rows_backward(&dy, &made, &places, &weights, (&mut drows, &mut dweights), columns)?;
        of_rows += unlike(&gpu.download(&drows)?, &want_rows);
        of_weights += unlike(&gpu.download(&dweights)?, &want_weights);
    }
    let shape = (tokens, top_k, columns);
    let good = report("combine backward, rows: other bits, of all runs", shape, of_rows, 0.0);
    Ok(good & report("combine backward, weights: other bits, of all runs", shape, of_weights, 0.0))
}

/// What is done to rows at the speed of memory.
fn all_rows(gpu: &Gpu) -> Result<bool, BackendError> {
    let mut good = true;
    // Two of them with more rows than the card has at once.
    for (tokens, columns) in [(0, 128), (1, 128), (5001, 128), (1001, 1152), (77, 7168), (801, 7168), (5, 24_576)] {
        if wanted(tokens * columns) {
            good &= rows(gpu, tokens, columns)?;
        }
    }
    // Chains and strips that are not whole, one of columns too; runs of one strip and of several.
    for (tokens, columns) in [
        (0, 128),
        (1, 128),
        (3, 384),
        (77, 7168),
        (1001, 1152),
        (2100, 7168),
        (4611, 512),
        (8191, 2048),
        (16_389, 384),
        (2100, 8192),
    ] {
        if wanted(tokens * columns) {
            good &= norm_weight(gpu, tokens, columns)?;
        }
    }
    for (tokens, top_k, columns) in
        [(0, 8, 128), (1, 8, 128), (3, 1, 384), (33, 32, 256), (51, 11, 640), (1001, 6, 1152), (77, 8, 7168)]
    {
        if wanted(tokens * columns) {
            good &= combine_backward(gpu, tokens, top_k, columns)?;
        }
    }
    Ok(good)
}

/// Products in BF16 and attention.
fn libraries(gpu: &Arc<Gpu>) -> Result<bool, BackendError> {
    Ok((small() || dense::all(gpu)?) & attention::all(gpu)?)
}

fn check() -> Result<bool, BackendError> {
    let gpu = CudaBackend::new(0, Precision::Fp32, Box::new(NoCubins))?;
    println!("{{\"seed\":{}}}", seed());
    println!("{{\"device_class\":\"{}\",\"card\":\"{}\"}}", gpu.class(), gpu.gpu().card()?);
    println!("{{\"cublaslt\":{}}}", Dense::new(gpu.gpu())?.library());
    let backend = |name, precision| {
        Ok::<_, BackendError>(
            !part(name) || backend::all(&CudaBackend::new(0, precision, Box::new(NoCubins))?, precision)?,
        )
    };
    let good = (!part("adamw") || adamw::all(&gpu)?)
        & backend("fp32", Precision::Fp32)?
        & backend("bf16", Precision::Bf16)?
        & backend("fp8", Precision::Fp8)?
        & (!part("products") || fp8::all(gpu.gpu())?)
        & (!part("rows") || all_rows(gpu.gpu())?)
        & (!part("gate") || gate::all(gpu.gpu())?)
        & (!part("libraries") || libraries(gpu.gpu())?)
        & (!part("memory") || memory::all(&gpu)?);
    // What cannot run is an error at the next read, and it sticks.
    let x = gpu.upload(1, 2, random(1, 2, 6));
    let sum = gpu.add(&x, &gpu.upload_indices(vec![0, 1]));
    let refused = gpu.read(&sum).is_err() && gpu.read(&x).is_err();
    println!("{{\"an_operation_that_cannot_run_is_an_error_at_each_read\":{refused}}}");
    Ok(good && refused)
}

fn main() -> ExitCode {
    if let Some(other) = named().find(|name| !PARTS.contains(&name.as_str())) {
        eprintln!("error: there is no part {other:?}: there are {}, and --small", PARTS.join(", "));
        return ExitCode::FAILURE;
    }
    match check() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
