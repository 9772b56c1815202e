//! The backend's operations beside the CPU's: in FP32 the same bits; in BF16 and FP8 too, but for products.

use crate::{fp8, model, norm_difference, product_most, random, report, same, wanted};
use everstep_kernels::{
    AttentionShape, Backend, BackendError, CpuBackend, CudaBackend, Dispatch, GateShape, Precision, Role, RopeShape,
    Tensor, Yarn,
};

pub(crate) type Results = Vec<(String, Tensor)>;

/// A GPU and the CPU in one precision.
#[derive(Clone, Copy)]
pub(crate) struct Both<'a> {
    gpu: &'a CudaBackend,
    cpu: &'a CpuBackend,
    pub(crate) precision: Precision,
}

impl Both<'_> {
    /// Runs the same on both, and compares what it gives: bits, or numbers where a tolerance is named for low precision.
    pub(crate) fn compare(
        self,
        what: &str,
        tolerance: impl Fn(Precision, &str, usize) -> f64,
        run: impl Fn(&dyn Backend) -> Result<Results, BackendError>,
    ) -> Result<bool, BackendError> {
        let mut good = true;
        for ((name, got), (_, want)) in run(self.gpu)?.into_iter().zip(run(self.cpu)?) {
            let (got, shape) = (self.gpu.read(&got)?, (want.rows(), want.columns()));
            let want = self.cpu.read(&want)?;
            assert_eq!(got.len(), want.len(), "{what}, {name}");
            let precision = self.precision;
            let most = if precision.is_low() { tolerance(precision, &name, got.len()) } else { 0.0 };
            let unit = if most == 0.0 { ": other bits" } else { "" };
            let difference = if most == 0.0 {
                got.iter().zip(want.iter()).filter(|(a, b)| a.to_bits() != b.to_bits()).count() as f64
            } else {
                norm_difference(&got, &want)
            };
            good &= report(&format!("{precision} {what}, {name}{unit}"), shape, difference, most);
        }
        Ok(good)
    }
}

/// Products in BF16 and FP8 are those of the CPU in other orders: a rounded result in some hundred is another neighbour, and FP32
/// sums differ in their last bits.
fn products(precision: Precision, name: &str, results: usize) -> f64 {
    match name {
        name if name.starts_with("linear_backward_weight") && precision == Precision::Fp8 => fp8::GRADIENT,
        name if name.starts_with("linear_backward_weight") => GRADIENT,
        name if name.contains("linear") => product_most(results),
        _ => 0.0,
    }
}

/// Sums of up to 1,000 terms in FP32, whose additions the tensor cores cut off where the CPU rounds.
const GRADIENT: f64 = 1e-4;

/// Shares and gradients of scores are rounded to BF16 before they are multiplied, each in its own order, or not at all; the shared
/// keys' gradient adds heads that cuDNN has rounded.
fn scores(_: Precision, name: &str, _: usize) -> f64 {
    if name.starts_with("rope") || name == "attention_cached" { 0.0 } else { 1e-2 }
}

pub(crate) fn named<const N: usize>(list: [(&str, Tensor); N]) -> Results {
    list.map(|(name, tensor)| (name.to_owned(), tensor)).into()
}

/// A weight: in host memory.
pub(crate) fn weight(rows: usize, columns: usize, name: u32) -> Tensor {
    Tensor::host(rows, columns, random(rows, columns, name))
}

pub(crate) fn matrix(b: &dyn Backend, rows: usize, columns: usize, name: u32) -> Tensor {
    b.upload(rows, columns, random(rows, columns, name))
}

/// Products of each role, whose operands are scaled in FP8 as the role says; and the operations of E4M3 alone.
fn roles(b: &dyn Backend, t: usize, d: usize, out: usize) -> Result<Results, BackendError> {
    let (x, dy, w) = (matrix(b, t, d, 160), matrix(b, t, out, 161), weight(out, d, 162));
    let mut all = Results::new();
    for role in [Role::Output, Role::ExpertIn, Role::ExpertOut, Role::Head, Role::Gate] {
        let (y, dx, dw) =
            (b.linear(&x, &w, role), b.linear_backward_input(&dy, &w, role), b.linear_backward_weight(&dy, &x, role));
        if role == Role::Gate {
            // They are FP32 in every precision.
            all.extend(named([("gate's logits", y), ("gate's input gradient", dx), ("gate's weight gradient", dw)]));
            continue;
        }
        for (name, made) in [("linear", y), ("linear_backward_input", dx), ("linear_backward_weight", dw)] {
            all.push((format!("{name} of {role:?}"), made));
        }
    }
    all.push(("dequantise of quantise".to_owned(), b.dequantise(&b.quantise(&x))));
    Ok(all)
}

/// What is done to rows of `d` columns, and products to and from `out` columns.
fn rows(b: &dyn Backend, t: usize, d: usize, out: usize) -> Result<Results, BackendError> {
    let (x, y, dy) = (matrix(b, t, d, 80), matrix(b, t, d, 81), matrix(b, t, out, 82));
    let (w, norm, role) = (weight(out, d, 83), weight(1, d, 84), Role::Projection);
    let (left, right) = b.split(&x, d / 3);
    let part = b.rows(&x, t / 3, t - t / 3);
    let [h, dgate, dup] = b.swiglu_backward(&x, &y, &part_or(b, &y));
    let tokens: Vec<u32> = (0..t as u32).map(|n| n * n % 7 % out as u32).collect();
    let targets: Vec<u32> = (0..t as u32).map(|n| if n % 5 == 3 { u32::MAX } else { n % d as u32 }).collect();
    let (losses, dlogits) = b.cross_entropy(&x, &b.upload_indices(targets), 0.25);
    let tokens = b.upload_indices(tokens);
    Ok(named([
        ("linear", b.linear(&x, &w, role)),
        ("linear of a part", b.linear(&part, &w, role)),
        ("linear_backward_input", b.linear_backward_input(&dy, &w, role)),
        ("linear_backward_weight", b.linear_backward_weight(&dy, &x, role)),
        ("add", b.add(&x, &y)),
        ("accumulate", b.accumulate(&norm, &norm)),
        ("join", b.join(&right, &left)),
        ("split, left", left),
        ("split, right", right),
        ("stack of parts", b.stack(&[part.clone(), x.clone(), b.rows(&x, 0, t / 3)])),
        ("stack of what follows", b.stack(&[b.rows(&x, 0, t / 3), part])),
        ("rms_norm", b.rms_norm(&x, &norm, 1e-6)),
        ("rms_norm_backward_input", b.rms_norm_backward_input(&x, &norm, &y, 1e-6)),
        ("rms_norm_backward_weight", b.rms_norm_backward_weight(&x, &y, 1e-6)),
        ("swiglu", b.swiglu(&x, &y)),
        ("swiglu_backward, result", h),
        ("swiglu_backward, gate", dgate),
        ("swiglu_backward, up", dup),
        ("embedding", b.embedding(&tokens, &w)),
        ("embedding_backward_weight", b.embedding_backward_weight(&tokens, &x, out)),
        ("cross_entropy, losses", losses),
        ("cross_entropy, gradient", dlogits),
    ]))
}

/// The same elements through another handle.
fn part_or(b: &dyn Backend, x: &Tensor) -> Tensor {
    b.rows(x, 0, x.rows())
}

/// Attention, its gradients and rotations, of so many sequences.
fn attention(b: &dyn Backend, sequences: usize, s: &AttentionShape) -> Result<Results, BackendError> {
    let t = sequences * s.sequence;
    let (qk, kv) = (s.heads * (s.nope + s.rope), s.heads * (s.nope + s.value));
    let (q, kv, k_rope) = (matrix(b, t, qk, 90), matrix(b, t, kv, 91), matrix(b, t, s.rope, 92));
    let yarn = Yarn { factor: 3.0, original: 6, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0 };
    let (heads, head_width, offset, width) = (s.heads, s.nope + s.rope, s.nope, s.rope);
    let (sequence, first, theta) = (s.sequence, 3, 10_000.0);
    let rope = RopeShape { heads, head_width, offset, width, sequence, first, theta, yarn: Some(yarn) };
    let (turned, back) = (b.rope(&q, &rope, false), b.rope(&q, &rope, true));
    let state = b.attention(q, kv, k_rope, s);
    let (dq, dkv, dk_rope) = b.attention_backward(&state, &matrix(b, t, s.heads * s.value, 93), s);
    Ok(named([
        ("rope", turned),
        ("rope back", back),
        ("result", state.o),
        ("logarithms", state.lse),
        ("dq", dq),
        ("dkv", dkv),
        ("dk_rope", dk_rope),
    ]))
}

/// The newest `t` of `p` positions, whose keys and values stay compressed in `c` columns.
fn cached(b: &dyn Backend, [t, p, c]: [usize; 3], s: &AttentionShape) -> Result<Results, BackendError> {
    let q = matrix(b, t, s.heads * (s.nope + s.rope), 94);
    let (latent, k_rope) = (matrix(b, p, c, 95), matrix(b, p, s.rope, 96));
    let kv_b = weight(s.heads * (s.nope + s.value), c, 97);
    Ok(named([("attention_cached", b.attention_cached(&q, &latent, &k_rope, &kv_b, s))]))
}

/// The gate, dispatch, products of the experts and combine, with all gradients.
fn routed(b: &dyn Backend, t: usize, d: usize, s: &GateShape) -> Result<Results, BackendError> {
    // Logits are FP32 in every precision.
    let (logits, bias, x) = (weight(t, s.experts, 100), weight(1, s.experts, 101), matrix(b, t, d, 102));
    let (experts, weights) = b.gate(&logits, &bias, s);
    let chosen = b.read_indices(&experts)?;
    let plan = Dispatch::new(&chosen, s.top_k, s.experts, s.groups);
    let sent = b.dispatch(&x, &plan);
    let counts = b.upload_indices(plan.counts().iter().map(|n| *n as u32).collect());
    // In eights where the rows are.
    let out = if d.is_multiple_of(8) { d + 8 } else { d + 3 };
    let w: Vec<Tensor> = (0..s.experts).map(|e| weight(out, d, 110 + e as u32)).collect();
    let (all, role) = (b.stack(&sent), Role::ExpertIn);
    let y = b.grouped_linear(&all, &counts, &w, role);
    let dx = b.grouped_linear_backward_input(&matrix(b, all.rows(), out, 104), &counts, &w, role);
    let dy = matrix(b, t, d, 103);
    let (drows, dweights) = b.combine_backward(&dy, &sent, &weights, &plan);
    // Rows that no longer lie one after another.
    let apart: Vec<Tensor> = sent.iter().map(|rows| b.add(rows, rows)).collect();
    let choices = Tensor::from_vec(t, s.top_k, chosen.iter().map(|e| *e as f32).collect());
    Ok(named([
        ("experts", b.upload(t, s.top_k, b.read(&choices)?)),
        ("weights", weights.clone()),
        ("gate_backward", b.gate_backward(&logits, &experts, &dweights, s)),
        ("gate_balance_backward", b.gate_balance_backward(&logits, s, 0.1)),
        ("dispatch", all),
        ("grouped_linear", y),
        ("grouped_linear_backward_input", dx),
        ("combine", b.combine(&sent, Some(&weights), &plan)),
        ("combine of rows apart, without weights", b.combine(&apart, None, &plan)),
        ("combine_backward, rows", b.stack(&drows)),
        ("combine_backward, weights", dweights),
    ]))
}

/// Products whose terms are too small to be held: the sums are zeros, each with its sign.
fn faint(b: &dyn Backend) -> Result<Results, BackendError> {
    let small = |rows, columns, name| random(rows, columns, name).iter().map(|x| x * 1e-30).collect::<Vec<f32>>();
    let mut all = Results::new();
    for (t, d, out) in [(5, 1, 3), (5, 2, 3), (1, 7, 5), (3, 300, 70), (33, 24, 16), (300, 520, 264)] {
        let (x, dy) = (b.upload(t, d, small(t, d, 140).into()), b.upload(t, out, small(t, out, 141).into()));
        let (w, role) = (Tensor::from_vec(out, d, small(out, d, 142)), Role::Projection);
        let counts = b.upload_indices(vec![t as u32]);
        all.extend(named([
            ("linear", b.linear(&x, &w, role)),
            ("linear_backward_input", b.linear_backward_input(&dy, &w, role)),
            ("linear_backward_weight", b.linear_backward_weight(&dy, &x, role)),
            ("grouped_linear", b.grouped_linear(&x, &counts, &[w], role)),
        ]));
    }
    Ok(all)
}

/// Losses that are logarithms of sums from 1 to some thousand: the target is the largest logit.
fn logarithms(b: &dyn Backend) -> Result<Results, BackendError> {
    let mut all = Results::new();
    for (t, v) in [(1 << 18, 2), (1 << 16, 3), (1 << 14, 40), (1 << 12, 1000), (64, 20_000)] {
        let logits = random(t, v, 143);
        let largest = |row: &[f32]| (0..v).max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("a column") as u32;
        let targets = b.upload_indices(logits.chunks(v).map(largest).collect());
        all.push((format!("of {v} terms"), b.cross_entropy(&b.upload(t, v, logits), &targets, 1.0).0));
    }
    Ok(all)
}

/// Shapes that fill tiles and that do not, without rows too; then the same rows in other batches, and models.
pub(crate) fn all(gpu: &CudaBackend, precision: Precision) -> Result<bool, BackendError> {
    let cpu = CpuBackend::new(precision);
    let both = Both { gpu, cpu: &cpu, precision };
    let mut good = operations(both)?;
    if !precision.is_low() {
        good &= both.compare("sums of nothing", |_, _, _| 0.0, faint)?;
        good &= both.compare("logarithms", |_, _, _| 0.0, logarithms)?;
    }
    Ok(good & same::all(gpu, precision)? & model::all(both)?)
}

/// Each operation.
fn operations(both: Both<'_>) -> Result<bool, BackendError> {
    let mut good = true;
    for (t, d, out) in [
        (0, 24, 16),
        (1, 7, 5),
        (5, 24, 16),
        (77, 37, 70),
        (300, 40, 72),
        (1000, 520, 264),
        (130, 2100, 33),
        (257, 384, 128),
        (0, 128, 16),
        (67, 1152, 520),
    ] {
        if wanted(t * d) {
            good &= both.compare("rows", products, |b| rows(b, t, d, out))?;
            good &= both.compare("roles", products, |b| roles(b, t, d, out))?;
        }
    }
    for (sequences, heads, nope, rope, value, sequence) in [
        (0, 2, 3, 2, 4, 5),
        (1, 1, 4, 2, 3, 1),
        (2, 3, 7, 4, 5, 67),
        (2, 4, 128, 64, 128, 300),
        (2, 4, 64, 64, 128, 200),
        (3, 2, 32, 32, 64, 64),
    ] {
        let s = AttentionShape { heads, nope, rope, value, sequence, scale: 1.1 / ((nope + rope) as f32).sqrt() };
        good &= both.compare("attention", scores, |b| attention(b, sequences, &s))?;
        good &= both.compare("attention", scores, |b| cached(b, [sequence.min(3), sequence, 20], &s))?;
    }
    for (t, d, experts, top_k, groups, groups_kept) in [
        (0, 8, 8, 2, 4, 2),
        (1, 8, 4, 1, 1, 1),
        (33, 12, 12, 3, 4, 2),
        (200, 72, 64, 8, 8, 4),
        (70, 5, 40, 6, 40, 9),
        // Whole tiles of columns, and more choices than those kernels take.
        (0, 128, 8, 2, 4, 2),
        (64, 128, 4, 1, 1, 1),
        (130, 384, 64, 8, 8, 4),
        (33, 256, 48, 11, 16, 9),
        (7, 128, 40, 33, 40, 40),
    ] {
        let s = GateShape { experts, top_k, groups, groups_kept, routed_scale: 2.5, sequence: 32 };
        good &= both.compare("routed", products, |b| routed(b, t, d, &s))?;
    }
    Ok(good)
}
