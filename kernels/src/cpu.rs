//! The CPU backend: activations in host memory, as f32 or BF16, whatever the precision stores. Operations
//! run when they are called, on the caller's thread.

use crate::backend::{AttentionState, Backend, BackendError, DeviceClass, Precision, Role};
use crate::element::{self, Bf16, Element, in_pieces};
use crate::low::linear::Form;
use crate::low::{self, Path};
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

    /// Numbers as activations are stored in this precision.
    fn stored(&self, rows: usize, columns: usize, data: Vec<f32>) -> Tensor {
        if self.precision.is_low() {
            tensor(rows, columns, element::rounded::<Bf16>(&data))
        } else {
            tensor(rows, columns, data)
        }
    }
}

/// Runs an operation on elements of the kind that a precision stores.
macro_rules! as_stored {
    ($backend:expr, $element:ident => $run:expr) => {
        if $backend.precision.is_low() {
            type $element = Bf16;
            $run
        } else {
            type $element = f32;
            $run
        }
    };
}

fn tensor<E: Element>(rows: usize, columns: usize, data: Vec<E>) -> Tensor {
    E::tensor(rows, columns, Arc::new(data))
}

/// A matrix of the shape of `x`.
fn like<E: Element>(x: &Tensor, data: Vec<E>) -> Tensor {
    tensor(x.rows(), x.columns(), data)
}

/// A matrix of results that `fill` makes.
fn filled<E: Element>(rows: usize, columns: usize, fill: impl FnOnce(&mut [E])) -> Tensor {
    let mut data = wide::unwritten(rows * columns);
    fill(&mut data);
    tensor(rows, columns, data)
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
                hasher.update(bytemuck::cast_slice(&product.values()));
            }
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// Runs `product` on each group of rows; it writes the group's results.
fn by_group<E: Element>(
    x: &Tensor,
    counts: &Tensor,
    w: &[Tensor],
    columns: usize,
    product: impl Fn(&Tensor, &Tensor, &mut [E]),
) -> Tensor {
    filled(x.rows(), columns, |mut out| {
        let mut from = 0;
        for (count, w) in counts.u32s().iter().zip(w) {
            let rows = *count as usize;
            let to = out.split_off_mut(..rows * columns).expect("rows of all groups");
            product(&x.view(from, rows), w, to);
            from += rows;
        }
        assert!(out.is_empty(), "rows of all groups");
    })
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
        self.stored(rows, columns, Arc::unwrap_or_clone(data))
    }

    fn upload_indices(&self, data: Vec<u32>) -> Tensor {
        Tensor::indices(data)
    }

    fn read(&self, x: &Tensor) -> Result<Arc<Vec<f32>>, BackendError> {
        Ok(x.as_host().map_or_else(|| Arc::new(x.values().into_owned()), Arc::clone))
    }

    fn read_indices(&self, x: &Tensor) -> Result<Vec<u32>, BackendError> {
        Ok(x.u32s().to_vec())
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn linear(&self, x: &Tensor, w: &Tensor, role: Role) -> Tensor {
        match Form::of(self.precision, role) {
            None => {
                let y = linear::forward(&x.values(), w.f32s(), x.rows(), w.rows(), w.columns());
                tensor(x.rows(), w.rows(), y)
            }
            Some(form) => filled::<Bf16>(x.rows(), w.rows(), |y| low::linear::forward(self.path, form, x, w, y)),
        }
    }

    fn linear_backward_input(&self, dy: &Tensor, w: &Tensor, role: Role) -> Tensor {
        let (rows, columns) = (dy.rows(), w.columns());
        match Form::of(self.precision, role) {
            None => self.stored(rows, columns, linear::backward_input(&dy.values(), w.f32s(), rows, w.rows(), columns)),
            Some(form) => filled::<Bf16>(rows, columns, |dx| low::linear::backward_input(self.path, form, dy, w, dx)),
        }
    }

    fn linear_backward_weight(&self, dy: &Tensor, x: &Tensor, role: Role) -> Tensor {
        let (out, input) = (dy.columns(), x.columns());
        let dw = match Form::of(self.precision, role) {
            None => linear::backward_weight(&dy.values(), &x.values(), dy.rows(), out, input),
            Some(form) => low::linear::backward_weight(self.path, form, dy, x),
        };
        tensor(out, input, dw)
    }

    fn grouped_linear(&self, x: &Tensor, counts: &Tensor, w: &[Tensor], role: Role) -> Tensor {
        let out = w.first().map_or(0, Tensor::rows);
        match Form::of(self.precision, role) {
            None => by_group(x, counts, w, out, |x, w, y| {
                y.copy_from_slice(&linear::forward(x.f32s(), w.f32s(), x.rows(), w.rows(), w.columns()));
            }),
            Some(form) => by_group::<Bf16>(x, counts, w, out, |x, w, y| low::linear::forward(self.path, form, x, w, y)),
        }
    }

    fn grouped_linear_backward_input(&self, dy: &Tensor, counts: &Tensor, w: &[Tensor], role: Role) -> Tensor {
        let input = w.first().map_or(0, Tensor::columns);
        match Form::of(self.precision, role) {
            None => by_group(dy, counts, w, input, |dy, w, dx| {
                dx.copy_from_slice(&linear::backward_input(dy.f32s(), w.f32s(), dy.rows(), w.rows(), w.columns()));
            }),
            Some(form) => by_group::<Bf16>(dy, counts, w, input, |dy, w, dx| {
                low::linear::backward_input(self.path, form, dy, w, dx);
            }),
        }
    }

    fn quantise(&self, x: &Tensor) -> Tensor {
        let (codes, scales) = quantise::quantise(&x.values(), x.columns());
        Tensor::quantised(x.rows(), x.columns(), codes, scales)
    }

    fn dequantise(&self, x: &Tensor) -> Tensor {
        let (codes, scales) = x.as_quantised().expect("a quantised matrix of the CPU backend");
        like(x, quantise::dequantise(codes, scales, x.columns()))
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        assert_eq!((a.rows(), a.columns()), (b.rows(), b.columns()), "shapes of a sum");
        as_stored!(self, E => filled::<E>(a.rows(), a.columns(), |sum| {
            let (a, b) = (E::of(a), E::of(b));
            wide::run(
                #[inline(always)]
                || {
                    in_pieces(sum, |at, sum| {
                        let terms = a[at.clone()].iter().zip(&b[at]);
                        sum.iter_mut().zip(terms).for_each(|(sum, (a, b))| *sum = a.value() + b.value());
                    });
                },
            );
        }))
    }

    fn accumulate(&self, a: &Tensor, b: &Tensor) -> Tensor {
        assert_eq!((a.rows(), a.columns()), (b.rows(), b.columns()), "shapes of a sum");
        like(a, wide::sum(a.f32s(), b.f32s()))
    }

    fn split(&self, x: &Tensor, at: usize) -> (Tensor, Tensor) {
        as_stored!(self, E => {
            let (mut left, mut right) = (Vec::with_capacity(x.rows() * at), Vec::new());
            right.reserve(x.rows() * (x.columns() - at));
            for row in E::of(x).chunks_exact(x.columns()) {
                left.extend_from_slice(&row[..at]);
                right.extend_from_slice(&row[at..]);
            }
            (tensor::<E>(x.rows(), at, left), tensor::<E>(x.rows(), x.columns() - at, right))
        })
    }

    fn join(&self, a: &Tensor, b: &Tensor) -> Tensor {
        as_stored!(self, E => {
            let mut joined = Vec::with_capacity(a.rows() * (a.columns() + b.columns()));
            for (a, b) in E::of(a).chunks_exact(a.columns()).zip(E::of(b).chunks_exact(b.columns())) {
                joined.extend_from_slice(a);
                joined.extend_from_slice(b);
            }
            tensor::<E>(a.rows(), a.columns() + b.columns(), joined)
        })
    }

    fn stack(&self, parts: &[Tensor]) -> Tensor {
        Tensor::stacked(parts)
    }

    fn rows(&self, x: &Tensor, from: usize, rows: usize) -> Tensor {
        x.view(from, rows)
    }

    fn embedding(&self, tokens: &Tensor, table: &Tensor) -> Tensor {
        let (rows, d) = (tokens.columns(), table.columns());
        as_stored!(self, E => tensor(rows, d, embedding::forward::<E>(tokens.u32s(), table.f32s(), d)))
    }

    fn embedding_backward_weight(&self, tokens: &Tensor, dy: &Tensor, vocabulary: usize) -> Tensor {
        let d = dy.columns();
        as_stored!(self, E => {
            tensor(vocabulary, d, embedding::backward_weight(tokens.u32s(), E::of(dy), vocabulary, d))
        })
    }

    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Tensor {
        as_stored!(self, E => like(x, rms_norm::forward(E::of(x), w.f32s(), eps)))
    }

    fn rms_norm_backward_input(&self, x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Tensor {
        as_stored!(self, E => like(x, rms_norm::backward_input(E::of(x), w.f32s(), E::of(dy), eps)))
    }

    fn rms_norm_backward_weight(&self, x: &Tensor, dy: &Tensor, eps: f32) -> Tensor {
        let d = x.columns();
        as_stored!(self, E => tensor(1, d, rms_norm::backward_weight(E::of(x), E::of(dy), d, eps)))
    }

    fn rope(&self, x: &Tensor, shape: &RopeShape, inverse: bool) -> Tensor {
        as_stored!(self, E => like(x, rope::rotate(E::of(x), shape, inverse)))
    }

    fn attention(&self, q: Tensor, kv: Tensor, k_rope: Tensor, shape: &AttentionShape) -> AttentionState {
        let (rows, columns) = (q.rows(), shape.heads * shape.value);
        let (o, lse) = if self.precision.is_low() {
            let (o, lse) = attention_low::forward(self.path, q.bf16s(), kv.bf16s(), k_rope.bf16s(), shape);
            (tensor(rows, columns, o), lse)
        } else {
            let (o, lse) = attention::forward(q.f32s(), kv.f32s(), k_rope.f32s(), shape);
            (tensor(rows, columns, o), lse)
        };
        AttentionState { q, kv, k_rope, o, lse: tensor(rows, shape.heads, lse) }
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
            latent: &latent.values(),
            k_rope: &k_rope.values(),
            positions: latent.rows(),
            rank: latent.columns(),
        };
        let o = latent_attention::forward(&q.values(), &cache, kv_b.f32s(), shape);
        self.stored(q.rows(), shape.heads * shape.value, o)
    }

    fn attention_backward(
        &self,
        state: &AttentionState,
        d_o: &Tensor,
        shape: &AttentionShape,
    ) -> (Tensor, Tensor, Tensor) {
        let AttentionState { q, kv, k_rope, o, lse } = state;
        macro_rules! saved {
            ($elements:ident) => {{
                let [q, kv, k_rope, o] = [q, kv, k_rope, o].map(Tensor::$elements);
                attention::Saved { q, kv, k_rope, o, lse: lse.f32s() }
            }};
        }
        if self.precision.is_low() {
            let (dq, dkv, dk_rope) = attention_low::backward(self.path, &saved!(bf16s), d_o.bf16s(), shape);
            (like(q, dq), like(kv, dkv), like(k_rope, dk_rope))
        } else {
            let (dq, dkv, dk_rope) = attention::backward(&saved!(f32s), d_o.f32s(), shape);
            (like(q, dq), like(kv, dkv), like(k_rope, dk_rope))
        }
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        as_stored!(self, E => like(gate, swiglu::forward(E::of(gate), E::of(up))))
    }

    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dh: &Tensor) -> [Tensor; 3] {
        as_stored!(self, E => swiglu::backward(E::of(gate), E::of(up), E::of(dh)).map(|data| like(gate, data)))
    }

    fn gate(&self, logits: &Tensor, bias: &Tensor, shape: &GateShape) -> (Tensor, Tensor) {
        let (experts, weights) = gate::forward(logits.f32s(), bias.f32s(), shape);
        (Tensor::indices(experts), tensor(logits.rows(), shape.top_k, weights))
    }

    fn gate_backward(&self, logits: &Tensor, experts: &Tensor, dweights: &Tensor, shape: &GateShape) -> Tensor {
        like(logits, gate::backward(logits.f32s(), experts.u32s(), dweights.f32s(), shape))
    }

    fn gate_balance_backward(&self, logits: &Tensor, shape: &GateShape, factor: f32) -> Tensor {
        like(logits, gate::balance_backward(logits.f32s(), shape, factor))
    }

    fn dispatch(&self, x: &Tensor, plan: &Dispatch) -> Vec<Tensor> {
        let (rows, d) = (plan.slots.len(), x.columns());
        plan.by_expert(&as_stored!(self, E => tensor(rows, d, combine::dispatch(E::of(x), plan, d))))
    }

    fn combine(&self, rows: &[Tensor], weights: Option<&Tensor>, plan: &Dispatch) -> Tensor {
        let columns = rows.first().expect("at least one expert").columns();
        as_stored!(self, E => {
            let views: Vec<&[E]> = rows.iter().map(E::of).collect();
            let y = combine::forward(&views, weights.map(Tensor::f32s), plan, columns);
            tensor(plan.slots.len() / plan.top_k, columns, y)
        })
    }

    fn combine_backward(
        &self,
        dy: &Tensor,
        rows: &[Tensor],
        weights: &Tensor,
        plan: &Dispatch,
    ) -> (Vec<Tensor>, Tensor) {
        let d = dy.columns();
        as_stored!(self, E => {
            let views: Vec<&[E]> = rows.iter().map(E::of).collect();
            let (drows, dweights) = combine::backward(E::of(dy), &views, weights.f32s(), plan, d);
            (plan.by_expert(&tensor(plan.slots.len(), d, drows)), like(weights, dweights))
        })
    }

    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, scale: f32) -> (Tensor, Tensor) {
        let (targets, v) = (targets.u32s(), logits.columns());
        as_stored!(self, E => {
            let (losses, dlogits) = cross_entropy::forward_backward(E::of(logits), targets, v, scale);
            (tensor(1, targets.len(), losses), like(logits, dlogits))
        })
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
        let logits = Tensor::from_vec(x.rows(), D, x.values().into_owned());
        let (square, wide, norm) = (matrix(D, D, 1), matrix(5 * D, D, 2), matrix(1, D, 3));
        let (counts, role) = (b.upload_indices(vec![x.rows() as u32]), Role::Output);
        let gate = GateShape { experts: D, top_k: 3, groups: 4, groups_kept: 2, routed_scale: 1.5, sequence: 1 };
        let (experts, weights) = b.gate(&logits, &norm, &gate);
        let [_, dgate, dup] = b.swiglu_backward(x, y, y);
        let targets = b.upload_indices(vec![7; x.rows()]);
        let plan = Dispatch::new(experts.u32s(), 3, D, 4);
        let sent = b.dispatch(y, &plan);
        vec![
            ("linear", b.linear(x, &wide, role)),
            ("linear_backward_input", b.linear_backward_input(x, &square, role)),
            ("grouped_linear", b.grouped_linear(x, &counts, std::slice::from_ref(&wide), role)),
            (
                "grouped_linear_backward_input",
                b.grouped_linear_backward_input(x, &counts, std::slice::from_ref(&square), role),
            ),
            ("add", b.add(x, y)),
            ("accumulate", b.accumulate(&logits, &logits)),
            ("rms_norm", b.rms_norm(x, &norm, 1e-6)),
            ("rms_norm_backward_input", b.rms_norm_backward_input(x, &norm, y, 1e-6)),
            ("swiglu", b.swiglu(x, y)),
            ("swiglu_backward gate", dgate),
            ("swiglu_backward up", dup),
            ("gate_balance_backward", b.gate_balance_backward(&logits, &gate, 0.1)),
            ("gate_backward", b.gate_backward(&logits, &experts, &weights, &gate)),
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
            let [x, y] = [&x, &y].map(|t| b.upload(3, D, Arc::new(t.f32s().to_vec())));
            let sum = b.add(&x, &y).values().into_owned();
            assert_eq!(same_bits(&sum, &exact), !precision.is_low());
        }
    }

    fn rows_are_their_own(b: &CpuBackend) {
        let [x, y] = [4, 5].map(|name| b.upload(ROWS, D, Arc::new(random(ROWS * D, name))));
        let whole = operations(b, &x, &y);
        std::thread::scope(|scope| {
            for rows in [1, 2, 5, 16] {
                let (x, y, whole) = (&x, &y, &whole);
                scope.spawn(move || {
                    for from in [0, 7, ROWS - rows] {
                        let part = operations(b, &b.rows(x, from, rows), &b.rows(y, from, rows));
                        for ((name, all), (_, part)) in whole.iter().zip(&part) {
                            let expected = b.rows(all, from, rows);
                            assert!(
                                same_bits(&part.values(), &expected.values()),
                                "{b:?} {name}: {rows} rows from {from}"
                            );
                        }
                    }
                });
            }
        });
    }
}
