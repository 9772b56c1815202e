//! The backend's operations, and a model made of them, beside the CPU's: in FP32 the same bits; in BF16 too, but for products.

use crate::{norm_difference, product_most, random, report, unlike, wanted};
use everstep_kernels::{
    AttentionShape, Backend, BackendError, CpuBackend, CudaBackend, Decoder, Dispatch, ExpertWeights, GateShape,
    ModelConfig, ParameterMap, Precision, Progress, Role, RopeShape, Scales, StageInput, StageModel, Tensor, Update,
    Yarn, expert_backward_input, expert_backward_weight, expert_forward,
};
use std::collections::BTreeMap;
use std::sync::Arc;

type Results = Vec<(String, Tensor)>;

/// A GPU and the CPU in one precision.
#[derive(Clone, Copy)]
struct Both<'a> {
    gpu: &'a CudaBackend,
    cpu: &'a CpuBackend,
    low: bool,
}

impl Both<'_> {
    /// Runs the same on both, and compares what it gives: bits, or numbers where a tolerance is named for BF16.
    fn compare(
        self,
        what: &str,
        tolerance: impl Fn(&str, usize) -> f64,
        run: impl Fn(&dyn Backend) -> Result<Results, BackendError>,
    ) -> Result<bool, BackendError> {
        let mut good = true;
        for ((name, got), (_, want)) in run(self.gpu)?.into_iter().zip(run(self.cpu)?) {
            let (got, shape) = (self.gpu.read(&got)?, (want.rows(), want.columns()));
            let want = self.cpu.read(&want)?;
            assert_eq!(got.len(), want.len(), "{what}, {name}");
            let most = if self.low { tolerance(&name, got.len()) } else { 0.0 };
            let (precision, unit) =
                (if self.low { "BF16" } else { "FP32" }, if most == 0.0 { ": other bits" } else { "" });
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

/// Products in BF16 are those of the CPU in other orders: a rounded result in some hundred is another neighbour, and FP32 sums
/// differ in their last bits.
fn products(name: &str, results: usize) -> f64 {
    match name {
        "linear_backward_weight" => GRADIENT,
        name if name.contains("linear") => product_most(results),
        _ => 0.0,
    }
}

/// Sums of up to 1,000 terms in FP32, whose additions the tensor cores cut off where the CPU rounds.
const GRADIENT: f64 = 1e-4;

/// Shares and gradients of scores are rounded to BF16 before they are multiplied, each in its own order, or not at all; the shared
/// keys' gradient adds heads that cuDNN has rounded.
fn scores(name: &str, _: usize) -> f64 {
    if name.starts_with("rope") || name == "attention_cached" { 0.0 } else { 1e-2 }
}

/// Some thousand roundings to BF16 on the way, one after another; and gradients that are small beside their terms.
fn models(name: &str, _: usize) -> f64 {
    if name == "losses" { 1e-3 } else { 5e-2 }
}

fn named<const N: usize>(list: [(&str, Tensor); N]) -> Results {
    list.map(|(name, tensor)| (name.to_owned(), tensor)).into()
}

/// A weight: in host memory.
fn weight(rows: usize, columns: usize, name: u32) -> Tensor {
    Tensor::host(rows, columns, random(rows, columns, name))
}

fn matrix(b: &dyn Backend, rows: usize, columns: usize, name: u32) -> Tensor {
    b.upload(rows, columns, random(rows, columns, name))
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

/// Rows of a batch, and the same rows in smaller ones: no bit differs, in any precision.
fn alone(gpu: &CudaBackend, precision: Precision, d: usize, out: usize) -> Result<bool, BackendError> {
    let (t, role) = (300, Role::Projection);
    let (x, dy) = (matrix(gpu, t, d, 120), matrix(gpu, t, out, 121));
    let (w, other, norm) = (weight(out, d, 122), weight(out, d, 123), weight(1, d, 124));
    let operations = |from: usize, rows: usize| {
        let (x, dy) = (gpu.rows(&x, from, rows), gpu.rows(&dy, from, rows));
        // Two groups, of which the first ends where the first hundred rows do.
        let first = 100usize.saturating_sub(from).min(rows);
        let (counts, w) = (gpu.upload_indices(vec![first as u32, (rows - first) as u32]), [w.clone(), other.clone()]);
        named([
            ("linear", gpu.linear(&x, &w[0], role)),
            ("linear of a gate", gpu.linear(&x, &w[0], Role::Gate)),
            ("linear_backward_input", gpu.linear_backward_input(&dy, &w[0], role)),
            ("grouped_linear", gpu.grouped_linear(&x, &counts, &w, role)),
            ("grouped_linear_backward_input", gpu.grouped_linear_backward_input(&dy, &counts, &w, role)),
            ("rms_norm", gpu.rms_norm(&x, &norm, 1e-6)),
            ("rms_norm_backward_input", gpu.rms_norm_backward_input(&x, &norm, &x, 1e-6)),
            ("swiglu", gpu.swiglu(&x, &x)),
        ])
    };
    let (whole, mut good) = (operations(0, t), true);
    for (from, rows) in [(0, 1), (7, 129), (99, 2), (171, 129), (299, 1)] {
        for ((name, all), (_, part)) in whole.iter().zip(operations(from, rows)) {
            let (want, got) = (gpu.read(&gpu.rows(all, from, rows))?, gpu.read(&part)?);
            let what = format!("{precision} rows of a batch and alone, {name}: other bits");
            good &= report(&what, (from, rows, d, out), unlike(&got, &want), 0.0);
        }
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

fn config(large: bool) -> ModelConfig {
    let of = |small: usize, big: usize| if large { big } else { small };
    ModelConfig {
        vocabulary: of(11, 1000),
        hidden: of(8, 256),
        layers: 3,
        dense_layers: 1,
        dense_inner: of(12, 520),
        heads: of(2, 4),
        query_rank: Some(of(5, 96)),
        kv_rank: of(4, 64),
        nope: of(4, 32),
        rope: of(2, 16),
        value: of(3, 32),
        experts: of(4, 16),
        shared_experts: 1,
        expert_inner: of(6, 64),
        top_k: of(2, 4),
        groups: of(2, 4),
        groups_kept: of(1, 2),
        routed_scale: 2.5,
        sequence: of(5, 128),
        rope_theta: 10_000.0,
        yarn: None,
        mtp: 1,
        initial_std: if large { 0.05 } else { 0.3 },
    }
}

fn parameters(c: &ModelConfig) -> ParameterMap {
    let value = |(i, p): (usize, everstep_kernels::Parameter)| {
        let values = match p.update {
            Update::Decayed => p.initial(5, c.initial_std),
            Update::Plain => random(1, p.len(), i as u32).iter().map(|x| 1.0 + 0.2 * x).collect(),
            Update::Balance => random(1, p.len(), i as u32).iter().map(|x| 0.1 * x).collect(),
        };
        (p.name, Tensor::from_vec(p.rows, p.columns, values))
    };
    c.parameters().into_iter().enumerate().map(value).collect()
}

/// Two micro-batches through a whole model and back: losses and all gradients. Then logits by the cache.
fn model(b: &dyn Backend, c: &ModelConfig, map: &ParameterMap) -> Result<Results, BackendError> {
    let scales = Scales { loss: 0.01, mtp: 0.003, balance: 0.002 };
    let mut stage = StageModel::new(Arc::new(c.clone()), 0..c.layers, map, scales);
    let experts = |layer: u32| (0..c.experts as u32).map(move |e| ExpertWeights::new(map, layer, e));
    let (mut saved, mut results) = (BTreeMap::new(), Results::new());
    for m in 0..2u32 {
        let tokens: Vec<u32> = (0..2 * c.sequence as u32).map(|n| (n * n + m) % c.vocabulary as u32).collect();
        let targets = tokens[1..].iter().copied().chain([7]).collect();
        let mut progress = stage.forward(b, m, StageInput::Tokens(tokens), Some(targets));
        while let Progress::Experts { layer, rows } = progress {
            let made = expert_forward(b, experts(layer).zip(rows).collect());
            let (y, keep): (Vec<_>, Vec<_>) = made.into_iter().unzip();
            saved.insert(layer, keep);
            progress = stage.resume_forward(b, m, y);
        }
        let mut progress = stage.backward_input(b, m, None);
        while let Progress::Experts { layer, rows } = progress {
            let items = saved.remove(&layer).expect("they were saved").into_iter().zip(rows);
            let made = expert_backward_input(b, experts(layer).zip(items).collect());
            let (dx, held): (Vec<_>, Vec<_>) = made.into_iter().unzip();
            for (weights, held) in experts(layer).zip(held) {
                let made = expert_backward_weight(b, &weights, &[held]);
                results.extend(made.into_iter().map(|(name, gradient)| (format!("{name} of {m}"), gradient)));
            }
            progress = stage.resume_backward(b, m, dx);
        }
        stage.weight(b, m);
    }
    let sums = stage.take_sums();
    results.extend(sums.gradients.into_iter().map(|(name, gradient)| (name.to_string(), gradient)));
    let losses = sums.losses.iter().flat_map(|loss| [*loss as f32, (*loss - f64::from(*loss as f32)) as f32]);
    results.push(("losses".to_owned(), Tensor::from_vec(2, 2, losses.collect())));
    let mut decoder = Decoder::new(Arc::new(c.clone()), map);
    for tokens in [&[1u32, 4, 10][..], &[0], &[3]] {
        results.push((format!("logits after {}", decoder.positions()), decoder.feed(b, tokens)?));
    }
    Ok(results)
}

/// Shapes that fill tiles and that do not, without rows too; then models, of which the larger fills some tiles.
pub(crate) fn all(gpu: &CudaBackend, precision: Precision) -> Result<bool, BackendError> {
    let (cpu, low, mut good) = (CpuBackend::new(precision), precision == Precision::Bf16, true);
    let both = Both { gpu, cpu: &cpu, low };
    for (t, d, out) in
        [(0, 24, 16), (1, 7, 5), (5, 24, 16), (77, 37, 70), (300, 40, 72), (1000, 520, 264), (130, 2100, 33)]
    {
        if wanted(t * d) {
            good &= both.compare("rows", products, |b| rows(b, t, d, out))?;
        }
    }
    if !low {
        good &= both.compare("sums of nothing", |_, _| 0.0, faint)?;
        good &= both.compare("logarithms", |_, _| 0.0, logarithms)?;
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
    for (t, d, experts, top_k, groups, groups_kept) in
        [(0, 8, 8, 2, 4, 2), (1, 8, 4, 1, 1, 1), (33, 12, 12, 3, 4, 2), (200, 72, 64, 8, 8, 4), (70, 5, 40, 6, 40, 9)]
    {
        let s = GateShape { experts, top_k, groups, groups_kept, routed_scale: 2.5, sequence: 32 };
        good &= both.compare("routed", products, |b| routed(b, t, d, &s))?;
    }
    for (d, out) in [(40, 72), (37, 70), (1024, 520)] {
        good &= alone(gpu, precision, d, out)?;
    }
    for (nope, rope, value, sequence) in [(128, 64, 128, 96), (64, 64, 128, 96), (32, 32, 64, 96), (5, 2, 3, 33)] {
        let s = AttentionShape { heads: 2, nope, rope, value, sequence, scale: 0.1 };
        good &= sequences_alone(gpu, precision, &s)?;
    }
    // The sums of the small one are too short for what is rounded to BF16 to be small beside them.
    let models_of = if low { &[true][..] } else { &[false, true] };
    for large in models_of {
        let mut c = config(*large);
        if low {
            // Every expert is chosen: what is rounded otherwise may be chosen otherwise.
            (c.top_k, c.groups_kept) = (c.experts, c.groups);
        }
        let map = parameters(&c);
        let what = if *large { "a larger model" } else { "a model" };
        good &= both.compare(what, models, |b| model(b, &c, &map))?;
    }
    Ok(good)
}
