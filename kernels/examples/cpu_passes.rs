//! Operations of a training step in BF16 on one thread, at the sizes of configs/peers/small.toml: the time of each for
//! an element, and the rate of its products beside that of their instruction alone. With a name, only operations that
//! begin with it.

use everstep_kernels::{
    AdamW, AttentionShape, Backend, Bf16, CpuBackend, Dispatch, GateShape, Philox, Precision, Role, RopeShape, Tensor,
    adamw_step, bf16_limit,
};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// The program's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TOKENS: usize = 1024;
const HIDDEN: usize = 256;
const REPETITIONS: usize = 25;
/// Bytes that caches don't hold.
const FAR: usize = 200 << 20;

/// Median seconds of a few runs.
fn time(f: &dyn Fn()) -> f64 {
    f();
    let run = |_| {
        let began = Instant::now();
        f();
        began.elapsed().as_secs_f64()
    };
    let mut times: Vec<f64> = (0..REPETITIONS).map(run).collect();
    times.sort_by(f64::total_cmp);
    times[REPETITIONS / 2]
}

fn numbers(rows: usize, columns: usize, name: u32) -> Arc<Vec<f32>> {
    Arc::new(Philox::new(1, 9, name).normals(rows * columns, 1.0))
}

struct Bench {
    b: CpuBackend,
    only: String,
    limit: Option<f64>,
}

/// Rows, gradients of results and weights of a product.
type Set = (Tensor, Tensor, Tensor);

impl Bench {
    fn activation(&self, columns: usize, name: u32) -> Tensor {
        self.b.upload(TOKENS, columns, numbers(TOKENS, columns, name))
    }

    /// Prints the time of what makes `elements`.
    fn pass(&self, name: &str, elements: usize, f: &dyn Fn()) {
        if name.starts_with(&self.only) {
            let ns = time(f) * 1e9;
            println!("{name:28} {:8.1} us, {:6.3} ns an element", ns / 1e3, ns / elements as f64);
        }
    }

    fn element_by_element(&self) {
        let (b, n) = (&self.b, TOKENS * HIDDEN);
        let (h, dh, gain) = (self.activation(HIDDEN, 1), self.activation(HIDDEN, 2), matrix(1, HIDDEN));
        self.pass("rms_norm", n, &|| drop(black_box(b.rms_norm(&h, &gain, 1e-6))));
        self.pass("rms_norm_backward_input", n, &|| drop(black_box(b.rms_norm_backward_input(&h, &gain, &dh, 1e-6))));
        self.pass("rms_norm_backward_weight", n, &|| drop(black_box(b.rms_norm_backward_weight(&h, &dh, 1e-6))));
        self.pass("add", n, &|| drop(black_box(b.add(&h, &dh))));
        let [gate, up, dy] = [3, 4, 5].map(|name| self.activation(768, name));
        self.pass("swiglu", TOKENS * 768, &|| drop(black_box(b.swiglu(&gate, &up))));
        self.pass("swiglu_backward", TOKENS * 768, &|| drop(black_box(b.swiglu_backward(&gate, &up, &dy))));
        let tokens = b.upload_indices((0..TOKENS as u32).map(|t| t % 512).collect());
        let table = matrix(512, HIDDEN);
        self.pass("embedding", n, &|| drop(black_box(b.embedding(&tokens, &table))));
        self.pass("embedding_backward_weight", n, &|| {
            drop(black_box(b.embedding_backward_weight(&tokens, &dh, 512)));
        });
        let logits = self.activation(512, 1);
        self.pass("cross_entropy", TOKENS * 512, &|| drop(black_box(b.cross_entropy(&logits, &tokens, 0.1))));
    }

    fn mixture(&self) {
        let b = &self.b;
        let (h, dh) = (self.activation(HIDDEN, 1), self.activation(HIDDEN, 2));
        let shape = GateShape { experts: 16, groups: 4, groups_kept: 2, top_k: 4, routed_scale: 2.5, sequence: 256 };
        let (scores, bias) = (matrix(TOKENS, 16), matrix(1, 16));
        let (experts, weights) = b.gate(&scores, &bias, &shape);
        let n = TOKENS * 16;
        self.pass("gate", n, &|| drop(black_box(b.gate(&scores, &bias, &shape))));
        self.pass("gate_backward", n, &|| drop(black_box(b.gate_backward(&scores, &experts, &weights, &shape))));
        self.pass("gate_balance_backward", n, &|| drop(black_box(b.gate_balance_backward(&scores, &shape, 0.1))));
        let plan = Dispatch::new(&b.read_indices(&experts).expect("on the CPU"), 4, 16, 4);
        let (rows, n) = (b.dispatch(&h, &plan), 4 * TOKENS * HIDDEN);
        self.pass("dispatch", n, &|| drop(black_box(b.dispatch(&h, &plan))));
        self.pass("combine", n, &|| drop(black_box(b.combine(&rows, Some(&weights), &plan))));
        self.pass("combine_backward", n, &|| drop(black_box(b.combine_backward(&dh, &rows, &weights, &plan))));
    }

    fn attention(&self) {
        let b = &self.b;
        let rope = RopeShape {
            heads: 4,
            head_width: 48,
            offset: 32,
            width: 16,
            sequence: 256,
            first: 0,
            theta: 1e4,
            yarn: None,
        };
        let rotated = self.activation(4 * 48, 1);
        self.pass("rope", TOKENS * 4 * 16, &|| drop(black_box(b.rope(&rotated, &rope, false))));
        let shape = AttentionShape { heads: 4, nope: 32, rope: 16, value: 32, sequence: 256, scale: 0.14 };
        let (q, kv) = (self.activation(4 * 48, 1), self.activation(4 * 64, 2));
        let (k_rope, d_o) = (self.activation(16, 3), self.activation(4 * 32, 4));
        let scores = 4 * TOKENS * 256;
        self.pass("attention", scores, &|| {
            drop(black_box(b.attention(q.clone(), kv.clone(), k_rope.clone(), &shape)));
        });
        let state = b.attention(q.clone(), kv.clone(), k_rope.clone(), &shape);
        self.pass("attention_backward", scores, &|| drop(black_box(b.attention_backward(&state, &d_o, &shape))));
    }

    fn optimizer(&self) {
        let n = 768 * HIDDEN;
        let gradient = numbers(n, 1, 4);
        let moment = || Tensor::bf16(768, HIDDEN, Arc::new(vec![Bf16(0); n]));
        let state = [matrix(768, HIDDEN), moment(), moment()];
        let adamw = AdamW {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            decay: 0.1,
            clip: 1.0,
            correction1: 1.0,
            correction2: 1.0,
            ema: None,
        };
        self.pass("adamw", n, &|| drop(black_box(adamw_step(&state, &gradient, &adamw))));
    }

    /// Prints a product's rate: with operands that were written long ago, as in a step, and with forms that are made.
    fn product(&self, name: &str, [rows, out, input]: [usize; 3], cold: &dyn Fn(), warm: &dyn Fn()) {
        if name.starts_with(&self.only) {
            let rate = |f| 2.0 * (rows * out * input) as f64 / time(f) / 1e9;
            let (cold, warm) = (rate(cold), rate(warm));
            let limit = self.limit.map_or_else(|| "unknown".to_owned(), |limit| format!("{limit:6.1}"));
            println!(
                "{name:24} {rows:5} x {out:4} x {input:4}: {cold:6.1} GFLOPS, all made and near {warm:6.1}; limit {limit}"
            );
        }
    }

    fn products(&self, shape: [usize; 3]) {
        if !"linear_backward_weight".starts_with(&self.only) && !self.only.starts_with("linear") {
            return;
        }
        let (b, [rows, out, input]) = (&self.b, shape);
        let fresh = |columns, name| b.upload(rows, columns, numbers(rows, columns, name));
        let bytes = 2 * rows * (input + out) + 4 * out * input;
        let sets = FAR / bytes + 1;
        let many: Vec<[Tensor; 3]> = (0..sets).map(|_| [fresh(input, 1), fresh(out, 2), matrix(out, input)]).collect();
        let next = Cell::new(0);
        let cold = || {
            next.set((next.get() + 1) % many.len());
            let [x, dy, w] = &many[next.get()];
            // Handles without forms.
            let w = Tensor::host(out, input, Arc::clone(w.as_host().expect("a whole matrix")));
            (b.rows(x, 0, rows), b.rows(dy, 0, rows), w)
        };
        let [x, dy, w] = &many[0];
        let forward = |(x, _, w): Set| drop(black_box(b.linear(&x, &w, Role::Projection)));
        self.product("linear", shape, &|| forward(cold()), &|| forward((x.clone(), dy.clone(), w.clone())));
        let backward = |(_, dy, w): Set| drop(black_box(b.linear_backward_input(&dy, &w, Role::Projection)));
        self.product("linear_backward_input", shape, &|| backward(cold()), &|| {
            backward((x.clone(), dy.clone(), w.clone()))
        });
        let weight = |(x, dy, _): Set| drop(black_box(b.linear_backward_weight(&dy, &x, Role::Projection)));
        self.product("linear_backward_weight", shape, &|| weight(cold()), &|| {
            weight((x.clone(), dy.clone(), w.clone()))
        });
    }
}

fn matrix(rows: usize, columns: usize) -> Tensor {
    Tensor::host(rows, columns, numbers(rows, columns, 7))
}

fn main() {
    let only = std::env::args().nth(1).unwrap_or_default();
    let bench = Bench { b: CpuBackend::new(Precision::Bf16), only, limit: bf16_limit() };
    bench.element_by_element();
    bench.mixture();
    bench.attention();
    bench.optimizer();
    for shape in [[1024, 768, 256], [1024, 256, 768], [1024, 192, 96], [256, 128, 256], [250, 256, 128]] {
        bench.products(shape);
    }
}
