//! Each operation of a training step in BF16 on one thread, at the sizes of configs/peers/small.toml: time for an
//! element and, for what only moves memory, the share of a copy's rate.

use everstep_kernels::{
    AdamW, AttentionShape, Backend, CpuBackend, Dispatch, GateShape, Philox, Precision, Role, RopeShape, Tensor,
    adamw_step,
};
use std::sync::Arc;
use std::time::Instant;

// The program's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TOKENS: usize = 1024;
const REPETITIONS: usize = 101;

fn keep<R>(result: R) {
    std::hint::black_box(result);
}

/// Median seconds of a few runs.
fn time(f: &dyn Fn()) -> f64 {
    let mut times: Vec<f64> = (0..REPETITIONS)
        .map(|_| {
            let began = Instant::now();
            f();
            began.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[REPETITIONS / 2]
}

fn numbers(rows: usize, columns: usize, name: u32) -> Arc<Vec<f32>> {
    Arc::new(Philox::new(1, 9, name).normals(rows * columns, 1.0))
}

fn main() {
    let b = &CpuBackend::new(Precision::Bf16);
    let x = |columns, name| b.upload(TOKENS, columns, numbers(TOKENS, columns, name));
    let w = |rows, columns| Tensor::host(rows, columns, numbers(rows, columns, 7));
    let only = std::env::args().nth(1).unwrap_or_default();
    let print = |name: &str, elements: usize, f: &dyn Fn()| {
        if name.starts_with(&only) {
            let seconds = time(f);
            println!(
                "{name:34} {elements:9} elements {:8.1} us {:6.3} ns an element",
                seconds * 1e6,
                seconds * 1e9 / elements as f64
            );
        }
    };
    let (h, dh, d) = (x(256, 1), x(256, 2), TOKENS * 256);
    let gain = w(1, 256);
    print("rms_norm", d, &|| keep(b.rms_norm(&h, &gain, 1e-6)));
    print("rms_norm_backward_input", d, &|| keep(b.rms_norm_backward_input(&h, &gain, &dh, 1e-6)));
    print("rms_norm_backward_weight", d, &|| keep(b.rms_norm_backward_weight(&h, &dh, 1e-6)));
    print("add", d, &|| keep(b.add(&h, &dh)));
    let (gate, up, dy) = (x(768, 3), x(768, 4), x(768, 5));
    print("swiglu", TOKENS * 768, &|| keep(b.swiglu(&gate, &up)));
    print("swiglu_backward", TOKENS * 768, &|| keep(b.swiglu_backward(&gate, &up, &dy)));

    let shape = GateShape { experts: 16, groups: 4, groups_kept: 2, top_k: 4, routed_scale: 2.5, sequence: 256 };
    let (scores, bias) = (Tensor::host(TOKENS, 16, numbers(TOKENS, 16, 6)), w(1, 16));
    let (experts, weights) = b.gate(&scores, &bias, &shape);
    print("gate", TOKENS * 16, &|| keep(b.gate(&scores, &bias, &shape)));
    print("gate_backward", TOKENS * 16, &|| keep(b.gate_backward(&scores, &experts, &weights, &shape)));
    print("gate_balance_backward", TOKENS * 16, &|| keep(b.gate_balance_backward(&scores, &shape, 0.1)));
    let plan = Dispatch::new(&b.read_indices(&experts).expect("on the CPU"), 4, 16, 4);
    print("dispatch", 4 * d, &|| keep(b.dispatch(&h, &plan)));
    let rows = b.dispatch(&h, &plan);
    print("combine", 4 * d, &|| keep(b.combine(&rows, Some(&weights), &plan)));
    print("combine_backward", 4 * d, &|| keep(b.combine_backward(&dh, &rows, &weights, &plan)));

    let rope =
        RopeShape { heads: 4, head_width: 48, offset: 32, width: 16, sequence: 256, first: 0, theta: 1e4, yarn: None };
    let rotated = x(4 * 48, 1);
    print("rope", TOKENS * 4 * 16, &|| keep(b.rope(&rotated, &rope, false)));
    let attention = AttentionShape { heads: 4, nope: 32, rope: 16, value: 32, sequence: 256, scale: 0.14 };
    let (q, kv, k_rope, d_o) = (x(4 * 48, 1), x(4 * 64, 2), x(16, 3), x(128, 4));
    let scores_made = 4 * 4 * 256 * 256;
    print("attention", scores_made, &|| keep(b.attention(q.clone(), kv.clone(), k_rope.clone(), &attention)));
    let state = b.attention(q, kv, k_rope, &attention);
    print("attention_backward", scores_made, &|| keep(b.attention_backward(&state, &d_o, &attention)));

    let logits = x(512, 1);
    let targets = b.upload_indices((0..TOKENS as u32).map(|t| t % 512).collect());
    print("cross_entropy", TOKENS * 512, &|| keep(b.cross_entropy(&logits, &targets, 0.1)));
    let tokens = b.upload_indices((0..TOKENS as u32).map(|t| t % 512).collect());
    let table = w(512, 256);
    print("embedding", d, &|| keep(b.embedding(&tokens, &table)));
    print("embedding_backward_weight", d, &|| keep(b.embedding_backward_weight(&tokens, &dh, 512)));

    let n = 768 * 256;
    let state = [1, 2, 3].map(|name| numbers(n, 1, name));
    let parts: Vec<&[f32]> = state.iter().map(|s| s.as_slice()).collect();
    let gradient = numbers(n, 1, 4);
    let adamw = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        decay: 0.1,
        clip: 1.0,
        correction1: 1.0,
        correction2: 1.0,
        low_moments: true,
        ema: None,
    };
    print("adamw", n, &|| keep(adamw_step(&parts, &gradient, &adamw)));

    // Products: fresh handles, so that forms are made as in a step.
    for (rows, out, input) in
        [(1024, 768, 256), (1024, 256, 768), (1024, 192, 96), (1024, 256, 128), (256, 128, 256), (256, 256, 128)]
    {
        let fresh = |columns, name| b.upload(rows, columns, numbers(rows, columns, name));
        let flops = 2.0 * (rows * out * input) as f64;
        let show = |name: &str, cold: &dyn Fn(), warm: &dyn Fn()| {
            if !name.starts_with(&only) {
                return;
            }
            let (cold, warm) = (time(cold), time(warm));
            println!(
                "{name:24} {rows:5} x {out:4} x {input:4}: {:6.1} GFLOPS, with forms made {:6.1}",
                flops / cold / 1e9,
                flops / warm / 1e9
            );
        };
        let weights = numbers(out, input, 3);
        let (x, dy) = (fresh(input, 1), fresh(out, 2));
        let made = Tensor::host(out, input, weights.clone());
        let again = |t: &Tensor| b.rows(t, 0, t.rows());
        show("linear", &|| keep(b.linear(&x, &Tensor::host(out, input, weights.clone()), Role::Projection)), &|| {
            keep(b.linear(&x, &made, Role::Projection))
        });
        show(
            "linear_backward_input",
            &|| keep(b.linear_backward_input(&dy, &Tensor::host(out, input, weights.clone()), Role::Projection)),
            &|| keep(b.linear_backward_input(&dy, &made, Role::Projection)),
        );
        // As in a step: operands that were written long ago.
        let many: Vec<(Tensor, Tensor)> = (0..64).map(|_| (fresh(out, 2), fresh(input, 1))).collect();
        let next = std::cell::Cell::new(0);
        let cold = || {
            next.set((next.get() + 1) % many.len());
            let (dy, x) = &many[next.get()];
            keep(b.linear_backward_weight(&again(dy), &again(x), Role::Projection));
        };
        show("linear_backward_weight", &cold, &|| keep(b.linear_backward_weight(&dy, &x, Role::Projection)));
    }
}
