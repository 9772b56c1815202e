//! The model's operations on a GPU. In FP32 they have the CPU's bits: the same terms in the same order, rounded alike. In BF16 all
//! but products and attention have: products of two BF16 operands are cuBLASLt's (`dense.rs`), or
//! add in the CPU's FP32 order; attention of the usual widths is cuDNN's. In FP8 operands of the blocks' products have the CPU's
//! codes and scales, and the tensor cores add them (`scaled.rs`); norms and SwiGLU make theirs at once. All else is as in BF16.
//!
//! An operation enqueues its kernels on one stream and gives a handle. What cannot run gives a handle without data, and an error
//! that sticks: the next read reports the first one. Weights come as matrices in host memory; each is copied to the GPU once, and
//! stays there as long as a handle to it lives.

mod adamw;
mod attention;
mod elements;
mod heads;
mod products;
mod route;
mod scaled;
mod tensors;

use super::attention::library;
use super::dense::Dense;
use super::device::{Cubins, Gpu};
use super::sources::compiler;
use crate::backend::{AttentionState, Backend, BackendError, DeviceClass, Precision, Role};
use crate::ops::attention::AttentionShape;
use crate::ops::combine::Dispatch;
use crate::ops::gate::GateShape;
use crate::ops::rope::RopeShape;
use crate::tensor::Tensor;
use elements::Angles;
use heads::Planned;
use std::sync::{Arc, Mutex, PoisonError};
use tensors::{Elements, Indices, Made};

/// See the module.
#[derive(Debug)]
pub struct CudaBackend {
    gpu: Arc<Gpu>,
    precision: Precision,
    /// In BF16 and FP8.
    dense: Option<Dense>,
    angles: Angles,
    planned: Planned,
    /// What is behind it, as far as it decides over bits.
    class: String,
    failed: Mutex<Option<BackendError>>,
}

/// What decides how products in low precision add: libraries choose by the card, and they and the compiler by their versions.
struct Chosen {
    card: String,
    /// NVRTC's version.
    compiler: String,
    cublas: usize,
    cudnn: usize,
}

/// What nodes that make the same bits have in common. FP32 has the CPU's bits by construction, so nothing is chosen there.
fn class(architecture: &str, precision: Precision, chosen: Option<Chosen>) -> String {
    let class = format!("cuda {architecture} {precision}");
    let Some(Chosen { card, compiler, cublas, cudnn }) = chosen else { return class };
    format!("{class}, {card}, NVRTC {compiler}, cuBLASLt {cublas}, cuDNN {cudnn}")
}

impl CudaBackend {
    /// The backend of one GPU; machine code of kernels is kept in `cubins`.
    pub fn new(ordinal: usize, precision: Precision, cubins: Box<dyn Cubins>) -> Result<Self, BackendError> {
        let gpu = Arc::new(Gpu::new(ordinal, cubins)?);
        let (dense, class) = match precision {
            Precision::Fp32 => (None, class(&gpu.architecture(), precision, None)),
            Precision::Bf16 | Precision::Fp8 => {
                let cudnn = library().map_err(|e| gpu.error(e))?;
                let (dense, compiler) = (Dense::new(&gpu)?, compiler().map_err(|e| gpu.error(e))?);
                let (card, cublas, compiler) = (gpu.card()?, dense.library(), compiler.to_string());
                let class = class(&gpu.architecture(), precision, Some(Chosen { card, compiler, cublas, cudnn }));
                (Some(dense), class)
            }
        };
        let (angles, planned) = (Angles::default(), Planned::default());
        Ok(Self { gpu, precision, dense, angles, planned, class, failed: Mutex::default() })
    }

    /// Its GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Whether activations are BF16.
    fn low(&self) -> bool {
        self.precision.is_low()
    }

    /// Records the first error; later reads report it.
    fn fail(&self, error: BackendError) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    /// The matrices of an operation, or its error for later.
    fn all<const N: usize>(&self, shapes: [[usize; 2]; N], result: Made<N>) -> [Tensor; N] {
        let mut made = result.map_err(|e| self.fail(e)).ok().into_iter().flatten();
        shapes.map(|[rows, columns]| match made.next() {
            Some(floats) => floats.tensor(rows, columns),
            None => tensors::nothing(rows, columns),
        })
    }

    fn one(&self, rows: usize, columns: usize, result: Result<Elements, BackendError>) -> Tensor {
        let [made] = self.all([[rows, columns]], result.map(|floats| [floats]));
        made
    }

    fn like(&self, x: &Tensor, result: Result<Elements, BackendError>) -> Tensor {
        self.one(x.rows(), x.columns(), result)
    }
}

impl Backend for CudaBackend {
    fn class(&self) -> DeviceClass {
        DeviceClass(self.class.clone())
    }

    fn upload(&self, rows: usize, columns: usize, data: Arc<Vec<f32>>) -> Tensor {
        self.one(rows, columns, self.copied(&data, self.low()))
    }

    fn upload_indices(&self, data: Vec<u32>) -> Tensor {
        let (count, copy) = (data.len(), self.gpu.upload(&data));
        let below = data.iter().max().map_or(0, |most| u64::from(*most) + 1);
        self.list(count, copy.map(|copy| Indices { data: Arc::new(copy), host: Some(Arc::new(data)), below }))
    }

    fn read(&self, x: &Tensor) -> Result<Arc<Vec<f32>>, BackendError> {
        self.synchronize()?;
        if x.buffer().is_none() {
            return Ok(x.as_host().map_or_else(|| Arc::new(x.values().into_owned()), Arc::clone));
        }
        Ok(Arc::new(self.stored(x)?.download(&self.gpu)?))
    }

    fn read_indices(&self, x: &Tensor) -> Result<Vec<u32>, BackendError> {
        self.synchronize()?;
        self.gpu.download(&*self.indices(x)?.data)
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        if let Some(error) = self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Err(error);
        }
        self.gpu.synchronize()
    }

    fn linear(&self, x: &Tensor, w: &Tensor, role: Role) -> Tensor {
        self.one(x.rows(), w.rows(), self.product(x, w, role))
    }

    fn linear_backward_input(&self, dy: &Tensor, w: &Tensor, role: Role) -> Tensor {
        self.one(dy.rows(), w.columns(), self.product_input(dy, w, role))
    }

    fn linear_backward_weight(&self, dy: &Tensor, x: &Tensor, role: Role) -> Tensor {
        self.one(dy.columns(), x.columns(), self.product_weight(dy, x, role))
    }

    fn grouped_linear(&self, x: &Tensor, counts: &Tensor, w: &[Tensor], role: Role) -> Tensor {
        let out = w.first().map_or(0, Tensor::rows);
        self.one(x.rows(), out, self.grouped(x, counts, (w, role), [out, x.columns()], false))
    }

    fn grouped_linear_backward_input(&self, dy: &Tensor, counts: &Tensor, w: &[Tensor], role: Role) -> Tensor {
        let input = w.first().map_or(0, Tensor::columns);
        self.one(dy.rows(), input, self.grouped(dy, counts, (w, role), [input, dy.columns()], true))
    }

    fn quantise(&self, x: &Tensor) -> Tensor {
        self.to_codes(x).unwrap_or_else(|error| self.like(x, Err(error)))
    }

    fn dequantise(&self, x: &Tensor) -> Tensor {
        self.like(x, self.of_codes(x))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.like(a, self.sum(a, b, self.low()))
    }

    fn accumulate(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.like(a, self.sum(a, b, false))
    }

    fn split(&self, x: &Tensor, at: usize) -> (Tensor, Tensor) {
        let rest = x.columns() - at;
        let parts = (self.columns(x, 0, at), self.columns(x, at, rest));
        (self.one(x.rows(), at, parts.0), self.one(x.rows(), rest, parts.1))
    }

    fn join(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.one(a.rows(), a.columns() + b.columns(), self.joined(a, b))
    }

    fn stack(&self, parts: &[Tensor]) -> Tensor {
        if let [only] = parts {
            // With what it keeps.
            return only.clone();
        }
        let rows = parts.iter().map(Tensor::rows).sum();
        self.one(rows, parts[0].columns(), self.stacked(parts))
    }

    fn rows(&self, x: &Tensor, from: usize, rows: usize) -> Tensor {
        assert!(from + rows <= x.rows(), "rows {from} to {} of {}", from + rows, x.rows());
        let part = self.stored(x).map(|all| all.part(from * x.columns(), rows * x.columns()));
        self.one(rows, x.columns(), part)
    }

    fn embedding(&self, tokens: &Tensor, table: &Tensor) -> Tensor {
        self.one(tokens.columns(), table.columns(), self.embedded(tokens, table))
    }

    fn embedding_backward_weight(&self, tokens: &Tensor, dy: &Tensor, vocabulary: usize) -> Tensor {
        self.one(vocabulary, dy.columns(), self.embedding_weight(tokens, dy, vocabulary))
    }

    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Tensor {
        if self.quantises_norm(x.columns()) {
            let [y] = self.with_codes(x, self.norm_quantised(x, w, eps));
            return y;
        }
        self.like(x, self.norm(x, w, eps))
    }

    fn rms_norm_backward_input(&self, x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Tensor {
        self.like(x, self.norm_input(x, w, dy, eps))
    }

    fn rms_norm_backward_weight(&self, x: &Tensor, dy: &Tensor, eps: f32) -> Tensor {
        self.one(1, x.columns(), self.norm_weight(x, dy, eps))
    }

    fn rope(&self, x: &Tensor, shape: &RopeShape, inverse: bool) -> Tensor {
        self.like(x, self.rotated(x, shape, inverse))
    }

    fn attention(&self, q: Tensor, kv: Tensor, k_rope: Tensor, shape: &AttentionShape) -> AttentionState {
        let made = self.attention_forward([&q, &kv, &k_rope], shape);
        let [o, lse] = self.all([[q.rows(), shape.o_row()], [q.rows(), shape.heads]], made);
        AttentionState { q, kv, k_rope, o, lse }
    }

    fn attention_cached(
        &self,
        q: &Tensor,
        latent: &Tensor,
        k_rope: &Tensor,
        kv_b: &Tensor,
        shape: &AttentionShape,
    ) -> Tensor {
        self.one(q.rows(), shape.o_row(), self.attention_over([q, latent, k_rope, kv_b], shape))
    }

    fn attention_backward(
        &self,
        state: &AttentionState,
        d_o: &Tensor,
        shape: &AttentionShape,
    ) -> (Tensor, Tensor, Tensor) {
        let shapes = [&state.q, &state.kv, &state.k_rope].map(|t| [t.rows(), t.columns()]);
        self.all(shapes, self.attention_gradients(state, d_o, shape)).into()
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        if self.quantises(gate.columns()) {
            let [h] = self.with_codes(gate, self.gated_quantised(gate, up));
            return h;
        }
        self.like(gate, self.gated(gate, up))
    }

    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dh: &Tensor) -> [Tensor; 3] {
        if self.quantises(gate.columns()) {
            return self.with_codes(gate, self.gated_gradients_quantised(gate, up, dh));
        }
        self.all([[gate.rows(), gate.columns()]; 3], self.gated_gradients(gate, up, dh))
    }

    fn gate(&self, logits: &Tensor, bias: &Tensor, shape: &GateShape) -> (Tensor, Tensor) {
        let (experts, weights) = match self.choose(logits, bias, shape) {
            Ok((experts, weights)) => {
                let below = shape.experts as u64;
                (Ok(Indices { data: Arc::new(experts), host: None, below }), Ok(weights))
            }
            Err(error) => (Err(error.clone()), Err(error)),
        };
        (self.list(logits.rows() * shape.top_k, experts), self.one(logits.rows(), shape.top_k, weights))
    }

    fn gate_backward(&self, logits: &Tensor, experts: &Tensor, dweights: &Tensor, shape: &GateShape) -> Tensor {
        self.like(logits, self.choice_gradient(logits, experts, dweights, shape))
    }

    fn gate_balance_backward(&self, logits: &Tensor, shape: &GateShape, factor: f32) -> Tensor {
        self.like(logits, self.balance_gradient(logits, shape, factor))
    }

    fn dispatch(&self, x: &Tensor, plan: &Dispatch) -> Vec<Tensor> {
        let rows = self.one(plan.slots.len(), x.columns(), self.sent(x, plan));
        self.by_expert(&rows, plan)
    }

    fn combine(&self, rows: &[Tensor], weights: Option<&Tensor>, plan: &Dispatch) -> Tensor {
        let columns = rows.first().expect("at least one expert").columns();
        self.one(plan.slots.len() / plan.top_k, columns, self.combined(rows, weights, plan))
    }

    fn combine_backward(
        &self,
        dy: &Tensor,
        rows: &[Tensor],
        weights: &Tensor,
        plan: &Dispatch,
    ) -> (Vec<Tensor>, Tensor) {
        let shapes = [[plan.slots.len(), dy.columns()], [weights.rows(), weights.columns()]];
        let [drows, dweights] = self.all(shapes, self.combined_gradients(dy, rows, weights, plan));
        (self.by_expert(&drows, plan), dweights)
    }

    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, scale: f32) -> (Tensor, Tensor) {
        let shapes = [[1, targets.columns()], [logits.rows(), logits.columns()]];
        self.all(shapes, self.losses(logits, targets, scale)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_may_change_bits_in_low_precision_is_in_the_class() {
        let chosen = |card: &str, compiler: &str, cublas, cudnn| {
            let (card, compiler) = (card.to_owned(), compiler.to_owned());
            class("sm_90", Precision::Bf16, Some(Chosen { card, compiler, cublas, cudnn }))
        };
        let mut all = vec![
            chosen("H100", "13.0", 130_100, 91_900),
            chosen("H200", "13.0", 130_100, 91_900),
            chosen("H100", "13.1", 130_100, 91_900),
            chosen("H100", "13.0", 130_200, 91_900),
            chosen("H100", "13.0", 130_100, 91_901),
            class("sm_90", Precision::Fp32, None),
        ];
        assert_eq!(all[0], "cuda sm_90 bf16, H100, NVRTC 13.0, cuBLASLt 130100, cuDNN 91900");
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count, "each is another class");
    }
}
