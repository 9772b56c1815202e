//! The CPU backend: f32 in host memory, rounded to BF16 where the precision says so. Operations run when
//! they are called, on the caller's thread.

use crate::backend::{AttentionState, Backend, BackendError, DeviceClass, Precision, Role};
use crate::low::linear::Form;
use crate::low::{self, Path};
use crate::math::{bf16_bits, bf16_value, round_to_bf16};
use crate::ops::attention::{self, AttentionShape};
use crate::ops::combine::{self, Dispatch};
use crate::ops::gate::{self, GateShape};
use crate::ops::rope::{self, RopeShape};
use crate::ops::{attention_low, cross_entropy, embedding, latent_attention, linear, quantise, rms_norm, swiglu};
use crate::philox::Philox;
use crate::tensor::Tensor;
use crate::wide;
use std::sync::{Arc, OnceLock};

const PURPOSE_CLASS: u32 = 5;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub struct CpuBackend {
    precision: Precision,
    path: Path,
}

impl CpuBackend {
    /// Everything in f32.
    pub const FP32: Self = Self { precision: Precision::Fp32, path: Path::Portable };

    /// By the fastest instructions that this CPU has for a precision.
    pub fn new(precision: Precision) -> Self {
        let path = if precision.is_low() { Path::detect() } else { Path::Portable };
        Self { precision, path }
    }

    /// Results of an operation as they are stored in this precision.
    fn stored(&self, rows: usize, columns: usize, mut data: Vec<f32>) -> Tensor {
        if self.precision.is_low() {
            round_to_bf16(&mut data);
        }
        Tensor::from_vec(rows, columns, data)
    }

    fn stored_like(&self, x: &Tensor, data: Vec<f32>) -> Tensor {
        self.stored(x.rows(), x.columns(), data)
    }
}

/// A matrix of the shape of `x`.
fn like(x: &Tensor, data: Vec<f32>) -> Tensor {
    Tensor::from_vec(x.rows(), x.columns(), data)
}

/// Products of small, ragged and blocked shapes in all three forms, hashed; some operands are tiny.
fn products_hash(b: &CpuBackend) -> String {
    let mut hasher = blake3::Hasher::new();
    for (rows, out, input) in [(1, 7, 5), (2, 96, 40), (17, 33, 257), (64, 48, 513), (300, 70, 2)] {
        let random = |rows: usize, columns, name| {
            let mut x = Philox::new(0, PURPOSE_CLASS, name).normals(rows * columns, 1.0);
            x.iter_mut().step_by(7).for_each(|x| *x *= 1e-20);
            Tensor::from_vec(rows, columns, x)
        };
        let (x, w, dy) = (random(rows, input, 1), random(out, input, 2), random(rows, out, 3));
        for role in [Role::Gate, Role::Head, Role::Projection] {
            for product in [
                b.linear(&x, &w, role),
                b.linear_backward_input(&dy, &w, role),
                b.linear_backward_weight(&dy, &x, role),
            ] {
                hasher.update(bytemuck::cast_slice(product.f32s()));
            }
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// Runs `product` on each group of rows; it writes the group's results.
fn by_group(
    x: &Tensor,
    counts: &Tensor,
    w: &[Tensor],
    columns: usize,
    product: impl Fn(&[f32], usize, &Tensor, &mut [f32]),
) -> Tensor {
    let mut out = wide::unwritten(x.rows() * columns);
    let mut from = 0;
    for (count, w) in counts.u32s().iter().zip(w) {
        let rows = *count as usize;
        let part = &x.f32s()[from * x.columns()..][..rows * x.columns()];
        product(part, rows, w, &mut out[from * columns..][..rows * columns]);
        from += rows;
    }
    assert_eq!(from, x.rows(), "rows of all groups");
    Tensor::from_vec(x.rows(), columns, out)
}

impl Backend for CpuBackend {
    /// Named by what it computes: the hash of some products. Machines whose products have the same bits
    /// are of one class, whatever their instructions; all other operations are plain IEEE arithmetic.
    fn class(&self) -> DeviceClass {
        static CLASSES: [OnceLock<String>; 3] = [const { OnceLock::new() }; 3];
        let class = &CLASSES[self.precision as usize];
        DeviceClass(class.get_or_init(|| format!("cpu {} {}", self.precision, &products_hash(self)[..12])).clone())
    }

    fn upload(&self, rows: usize, columns: usize, data: Arc<Vec<f32>>) -> Tensor {
        Tensor::host(rows, columns, data)
    }

    fn upload_indices(&self, data: Vec<u32>) -> Tensor {
        Tensor::indices(data)
    }

    fn read(&self, x: &Tensor) -> Result<Arc<Vec<f32>>, BackendError> {
        Ok(Arc::clone(x.as_host().expect("an f32 matrix of the CPU backend")))
    }

    fn read_indices(&self, x: &Tensor) -> Result<Vec<u32>, BackendError> {
        Ok(x.u32s().to_vec())
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn linear(&self, x: &Tensor, w: &Tensor, role: Role) -> Tensor {
        let y = match Form::of(self.precision, role) {
            None => linear::forward(x.f32s(), w.f32s(), x.rows(), w.rows(), w.columns()),
            Some(form) => low::linear::forward(self.path, form, x, w),
        };
        Tensor::from_vec(x.rows(), w.rows(), y)
    }

    fn linear_backward_input(&self, dy: &Tensor, w: &Tensor, role: Role) -> Tensor {
        match Form::of(self.precision, role) {
            None => {
                let dx = linear::backward_input(dy.f32s(), w.f32s(), dy.rows(), w.rows(), w.columns());
                self.stored(dy.rows(), w.columns(), dx)
            }
            Some(form) => {
                let dx = low::linear::backward_input(self.path, form, dy, w);
                Tensor::from_vec(dy.rows(), w.columns(), dx)
            }
        }
    }

    fn linear_backward_weight(&self, dy: &Tensor, x: &Tensor, role: Role) -> Tensor {
        let (out, input) = (dy.columns(), x.columns());
        let dw = match Form::of(self.precision, role) {
            None => linear::backward_weight(dy.f32s(), x.f32s(), dy.rows(), out, input),
            Some(form) => low::linear::backward_weight(self.path, form, dy, x),
        };
        Tensor::from_vec(out, input, dw)
    }

    fn grouped_linear(&self, x: &Tensor, counts: &Tensor, w: &[Tensor], role: Role) -> Tensor {
        let out = w.first().map_or(0, Tensor::rows);
        by_group(x, counts, w, out, |x, rows, w, y| match Form::of(self.precision, role) {
            None => y.copy_from_slice(&linear::forward(x, w.f32s(), rows, w.rows(), w.columns())),
            Some(form) => low::linear::forward_rows(self.path, form, x, rows, w, y),
        })
    }

    fn grouped_linear_backward_input(&self, dy: &Tensor, counts: &Tensor, w: &[Tensor], role: Role) -> Tensor {
        let input = w.first().map_or(0, Tensor::columns);
        by_group(dy, counts, w, input, |dy, rows, w, dx| match Form::of(self.precision, role) {
            None => dx.copy_from_slice(&linear::backward_input(dy, w.f32s(), rows, w.rows(), w.columns())),
            Some(form) => low::linear::backward_input_rows(self.path, form, dy, rows, w, dx),
        })
    }

    fn quantise(&self, x: &Tensor) -> Tensor {
        let (codes, scales) = quantise::quantise(x.f32s(), x.columns());
        Tensor::quantised(x.rows(), x.columns(), codes, scales)
    }

    fn dequantise(&self, x: &Tensor) -> Tensor {
        let (codes, scales) = x.as_quantised().expect("a quantised matrix of the CPU backend");
        like(x, quantise::dequantise(codes, scales, x.columns()))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        assert_eq!((a.rows(), a.columns()), (b.rows(), b.columns()), "shapes of a sum");
        let mut sum = wide::unwritten(a.f32s().len());
        let low = self.precision.is_low();
        wide::run(
            #[inline(always)]
            || {
                for ((sum, a), b) in sum.iter_mut().zip(a.f32s()).zip(b.f32s()) {
                    *sum = if low { bf16_value(bf16_bits(a + b)) } else { a + b };
                }
            },
        );
        Tensor::from_vec(a.rows(), a.columns(), sum)
    }

    fn accumulate(&self, a: &Tensor, b: &Tensor) -> Tensor {
        assert_eq!((a.rows(), a.columns()), (b.rows(), b.columns()), "shapes of a sum");
        like(a, wide::sum(a.f32s(), b.f32s()))
    }

    fn split(&self, x: &Tensor, at: usize) -> (Tensor, Tensor) {
        let (mut left, mut right) = (Vec::with_capacity(x.rows() * at), Vec::new());
        right.reserve(x.rows() * (x.columns() - at));
        for row in x.f32s().chunks_exact(x.columns()) {
            left.extend_from_slice(&row[..at]);
            right.extend_from_slice(&row[at..]);
        }
        (Tensor::from_vec(x.rows(), at, left), Tensor::from_vec(x.rows(), x.columns() - at, right))
    }

    fn join(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let mut joined = Vec::with_capacity(a.rows() * (a.columns() + b.columns()));
        for (a, b) in a.f32s().chunks_exact(a.columns()).zip(b.f32s().chunks_exact(b.columns())) {
            joined.extend_from_slice(a);
            joined.extend_from_slice(b);
        }
        Tensor::from_vec(a.rows(), a.columns() + b.columns(), joined)
    }

    fn stack(&self, parts: &[Tensor]) -> Tensor {
        if let [only] = parts {
            return only.clone();
        }
        let columns = parts.first().expect("at least one part").columns();
        let mut data = Vec::with_capacity(parts.iter().map(|p| p.f32s().len()).sum());
        parts.iter().for_each(|p| data.extend_from_slice(p.f32s()));
        Tensor::from_vec(parts.iter().map(Tensor::rows).sum(), columns, data)
    }

    fn rows(&self, x: &Tensor, from: usize, rows: usize) -> Tensor {
        Tensor::from_vec(rows, x.columns(), x.f32s()[from * x.columns()..][..rows * x.columns()].to_vec())
    }

    fn embedding(&self, tokens: &Tensor, table: &Tensor) -> Tensor {
        let y = embedding::forward(tokens.u32s(), table.f32s(), table.columns());
        self.stored(tokens.columns(), table.columns(), y)
    }

    fn embedding_backward_weight(&self, tokens: &Tensor, dy: &Tensor, vocabulary: usize) -> Tensor {
        let d = embedding::backward_weight(tokens.u32s(), dy.f32s(), vocabulary, dy.columns());
        Tensor::from_vec(vocabulary, dy.columns(), d)
    }

    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Tensor {
        self.stored_like(x, rms_norm::forward(x.f32s(), w.f32s(), eps))
    }

    fn rms_norm_backward_input(&self, x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Tensor {
        self.stored_like(x, rms_norm::backward_input(x.f32s(), w.f32s(), dy.f32s(), eps))
    }

    fn rms_norm_backward_weight(&self, x: &Tensor, dy: &Tensor, eps: f32) -> Tensor {
        Tensor::from_vec(1, x.columns(), rms_norm::backward_weight(x.f32s(), dy.f32s(), x.columns(), eps))
    }

    fn rope(&self, x: &Tensor, shape: &RopeShape, inverse: bool) -> Tensor {
        self.stored_like(x, rope::rotate(x.f32s(), shape, inverse))
    }

    fn attention(&self, q: Tensor, kv: Tensor, k_rope: Tensor, shape: &AttentionShape) -> AttentionState {
        let (o, lse) = if self.precision.is_low() {
            attention_low::forward(self.path, q.f32s(), kv.f32s(), k_rope.f32s(), shape)
        } else {
            attention::forward(q.f32s(), kv.f32s(), k_rope.f32s(), shape)
        };
        let o = self.stored(q.rows(), shape.heads * shape.value, o);
        let lse = Tensor::from_vec(q.rows(), shape.heads, lse);
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
        let cache = latent_attention::Cache {
            latent: latent.f32s(),
            k_rope: k_rope.f32s(),
            positions: latent.rows(),
            rank: latent.columns(),
        };
        let o = latent_attention::forward(q.f32s(), &cache, kv_b.f32s(), shape);
        self.stored(q.rows(), shape.heads * shape.value, o)
    }

    fn attention_backward(
        &self,
        state: &AttentionState,
        d_o: &Tensor,
        shape: &AttentionShape,
    ) -> (Tensor, Tensor, Tensor) {
        let saved = attention::Saved {
            q: state.q.f32s(),
            kv: state.kv.f32s(),
            k_rope: state.k_rope.f32s(),
            o: state.o.f32s(),
            lse: state.lse.f32s(),
        };
        let (dq, dkv, dk_rope) = if self.precision.is_low() {
            attention_low::backward(self.path, &saved, d_o.f32s(), shape)
        } else {
            attention::backward(&saved, d_o.f32s(), shape)
        };
        (self.stored_like(&state.q, dq), self.stored_like(&state.kv, dkv), self.stored_like(&state.k_rope, dk_rope))
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        self.stored_like(gate, swiglu::forward(gate.f32s(), up.f32s()))
    }

    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dh: &Tensor) -> (Tensor, Tensor) {
        let (dgate, dup) = swiglu::backward(gate.f32s(), up.f32s(), dh.f32s());
        (self.stored_like(gate, dgate), self.stored_like(up, dup))
    }

    fn gate(&self, logits: &Tensor, bias: &Tensor, shape: &GateShape) -> (Tensor, Tensor) {
        let (experts, weights) = gate::forward(logits.f32s(), bias.f32s(), shape);
        (Tensor::indices(experts), Tensor::from_vec(logits.rows(), shape.top_k, weights))
    }

    fn gate_backward(&self, logits: &Tensor, experts: &Tensor, dweights: &Tensor, shape: &GateShape) -> Tensor {
        like(logits, gate::backward(logits.f32s(), experts.u32s(), dweights.f32s(), shape))
    }

    fn gate_balance_backward(&self, logits: &Tensor, shape: &GateShape, factor: f32) -> Tensor {
        like(logits, gate::balance_backward(logits.f32s(), shape, factor))
    }

    fn gather(&self, x: &Tensor, tokens: &[u32]) -> Tensor {
        Tensor::from_vec(tokens.len(), x.columns(), combine::gather(x.f32s(), tokens, x.columns()))
    }

    fn combine(&self, rows: &[Tensor], weights: Option<&Tensor>, plan: &Dispatch) -> Tensor {
        let columns = rows.first().expect("at least one expert").columns();
        let views: Vec<&[f32]> = rows.iter().map(Tensor::f32s).collect();
        let y = combine::forward(&views, weights.map(Tensor::f32s), plan, columns);
        self.stored(plan.slots.len() / plan.top_k, columns, y)
    }

    fn combine_backward(
        &self,
        dy: &Tensor,
        rows: &[Tensor],
        weights: &Tensor,
        plan: &Dispatch,
    ) -> (Vec<Tensor>, Tensor) {
        let views: Vec<&[f32]> = rows.iter().map(Tensor::f32s).collect();
        let (drows, dweights) = combine::backward(dy.f32s(), &views, weights.f32s(), plan, dy.columns());
        let drows = drows.into_iter().map(|d| self.stored(d.len() / dy.columns(), dy.columns(), d)).collect();
        (drows, like(weights, dweights))
    }

    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, scale: f32) -> (Tensor, Tensor) {
        let (losses, dlogits) = cross_entropy::forward_backward(logits.f32s(), targets.u32s(), logits.columns(), scale);
        (Tensor::from_vec(1, targets.columns(), losses), self.stored_like(logits, dlogits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{random, same_bits};

    const ROWS: usize = 37;
    const D: usize = 24;

    fn matrix(rows: usize, columns: usize, name: u32) -> Tensor {
        Tensor::from_vec(rows, columns, random(rows * columns, name))
    }

    /// Every operation on rows, from a batch to its results by row.
    fn operations(b: &CpuBackend, x: &Tensor, y: &Tensor) -> Vec<(&'static str, Tensor)> {
        let (square, wide, norm) = (matrix(D, D, 1), matrix(5 * D, D, 2), matrix(1, D, 3));
        let (counts, role) = (b.upload_indices(vec![x.rows() as u32]), Role::Output);
        let gate = GateShape { experts: D, top_k: 3, groups: 4, groups_kept: 2, routed_scale: 1.5, sequence: 1 };
        let (experts, weights) = b.gate(x, &norm, &gate);
        let (dgate, dup) = b.swiglu_backward(x, y, y);
        let targets = b.upload_indices(vec![7; x.rows()]);
        let plan = Dispatch::new(experts.u32s(), 3, D, 4);
        let sent: Vec<Tensor> = plan.tokens.iter().map(|t| b.gather(y, t)).collect();
        vec![
            ("linear", b.linear(x, &wide, role)),
            ("linear_backward_input", b.linear_backward_input(x, &square, role)),
            ("grouped_linear", b.grouped_linear(x, &counts, std::slice::from_ref(&wide), role)),
            (
                "grouped_linear_backward_input",
                b.grouped_linear_backward_input(x, &counts, std::slice::from_ref(&square), role),
            ),
            ("add", b.add(x, y)),
            ("accumulate", b.accumulate(x, y)),
            ("rms_norm", b.rms_norm(x, &norm, 1e-6)),
            ("rms_norm_backward_input", b.rms_norm_backward_input(x, &norm, y, 1e-6)),
            ("swiglu", b.swiglu(x, y)),
            ("swiglu_backward gate", dgate),
            ("swiglu_backward up", dup),
            ("gate_balance_backward", b.gate_balance_backward(x, &gate, 0.1)),
            ("gate_backward", b.gate_backward(x, &experts, &weights, &gate)),
            ("combine", b.combine(&sent, Some(&weights), &plan)),
            ("gate", weights),
            ("cross_entropy", b.cross_entropy(x, &targets, 0.1).1),
            ("dequantise of quantise", b.dequantise(&b.quantise(x))),
        ]
    }

    /// Rows do not depend on their batch, nor on what other threads do.
    #[test]
    fn every_row_is_its_own() {
        for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp8] {
            for path in Path::available() {
                rows_are_their_own(&CpuBackend { precision, path });
            }
        }
    }

    /// Sums of gradients are f32 in every precision; other sums are stored as activations are.
    #[test]
    fn gradients_are_added_in_f32() {
        let (x, y) = (matrix(3, D, 8), matrix(3, D, 9));
        let exact: Vec<f32> = x.f32s().iter().zip(y.f32s()).map(|(a, b)| a + b).collect();
        for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp8] {
            let b = CpuBackend::new(precision);
            assert!(same_bits(b.accumulate(&x, &y).f32s(), &exact));
            assert_eq!(same_bits(b.add(&x, &y).f32s(), &exact), !precision.is_low());
        }
    }

    fn rows_are_their_own(b: &CpuBackend) {
        let (x, y) = (matrix(ROWS, D, 4), matrix(ROWS, D, 5));
        let whole = operations(b, &x, &y);
        std::thread::scope(|scope| {
            for rows in [1, 2, 5, 16] {
                let (x, y, whole) = (&x, &y, &whole);
                scope.spawn(move || {
                    for from in [0, 7, ROWS - rows] {
                        let part = operations(b, &b.rows(x, from, rows), &b.rows(y, from, rows));
                        for ((name, all), (_, part)) in whole.iter().zip(&part) {
                            let expected = b.rows(all, from, rows);
                            assert!(same_bits(part.f32s(), expected.f32s()), "{b:?} {name}: {rows} rows from {from}");
                        }
                    }
                });
            }
        });
    }
}
