//! Attention in BF16 by cuDNN, sequence by sequence: what a sequence gets does not depend on others. Kernels that lay heads out:
//! `hopper/heads.cu`.

use super::CudaBackend;
use super::elements::by_element;
use super::tensors::{Elements, Made};
use crate::backend::{AttentionState, BackendError};
use crate::cuda::attention::{CausalAttention, CausalShape};
use crate::cuda::device::run;
use crate::cuda::sources::HEADS;
use crate::ops::attention::AttentionShape;
use crate::tensor::Tensor;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Plans that are kept: a model has attentions of one shape or two.
const PLANS_MAX: usize = 4;
/// Tokens of a sequence, at least: cuDNN is for long ones.
const TOKENS_LEAST: usize = 64;

type Plans = Vec<(AttentionShape, CausalAttention)>;

/// Attentions that were planned, by their shape.
#[derive(Debug, Default)]
pub(super) struct Planned(Mutex<Plans>);

/// Operands of cuDNN's attention, of all sequences.
struct Laid {
    q: Elements,
    k: Elements,
    v: Elements,
}

impl CudaBackend {
    /// Whether an attention is cuDNN's: that depends on its shape alone.
    pub(super) fn is_planned(&self, s: &AttentionShape) -> bool {
        let known = matches!((s.nope + s.rope, s.value), (192 | 128, 128) | (64, 64));
        self.low() && known && s.sequence >= TOKENS_LEAST
    }

    /// The plans, with the one of a shape as the last.
    fn plans(&self, s: &AttentionShape) -> Result<MutexGuard<'_, Plans>, BackendError> {
        let mut plans = self.planned.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = plans.iter().position(|(of, _)| of == s) {
            plans[at..].rotate_left(1);
            return Ok(plans);
        }
        if plans.len() == PLANS_MAX {
            // Its room is in use until the stream is past what was enqueued, and is freed in its order.
            plans.remove(0);
        }
        let (heads, tokens, keys, values) = (s.heads, s.sequence, s.nope + s.rope, s.value);
        let shape = CausalShape { batch: 1, heads, tokens, keys, values };
        plans.push((*s, CausalAttention::with_scale(&self.gpu, shape, s.scale)?));
        Ok(plans)
    }

    fn laid(&self, [q, kv, k_rope]: [&Tensor; 3], s: &AttentionShape) -> Result<Laid, BackendError> {
        let (tokens, keys) = (q.rows(), s.nope + s.rope);
        let (q, kv, k_rope) = (self.activation(q)?, self.activation(kv)?, self.activation(k_rope)?);
        let (k, v) = (self.room(tokens, s.heads * keys)?, self.room(tokens, s.heads * s.value)?);
        let count = k.len() + v.len();
        let (shape, count) = (by_element(count), count as u64);
        let [heads, nope, rope, values] = [s.heads, s.nope, s.rope, s.value].map(|n| n as i32);
        let (from, to) = ((&kv.address(), &k_rope.address()), (&k.address(), &v.address()));
        let (heads, nope, rope) = (&heads, &nope, &rope);
        run!(self.gpu, HEADS, "join_heads", shape, from.0, from.1, to.0, to.1, &count, heads, nope, rope, &values)?;
        Ok(Laid { q, k, v })
    }

    /// Numbers of `[rows][columns]` by column.
    fn turned(&self, x: &Elements, y: &Elements, [rows, columns]: [usize; 2]) -> Result<(), BackendError> {
        assert_eq!([x.len(), y.len()], [rows * columns; 2], "numbers of heads and tokens");
        let (shape, count, [rows, columns]) = (by_element(x.len()), x.len() as u64, [rows, columns].map(|n| n as i32));
        run!(self.gpu, HEADS, "turn_numbers", shape, &x.address(), &y.address(), &count, &rows, &columns)
    }

    pub(super) fn planned_forward(&self, of: [&Tensor; 3], s: &AttentionShape) -> Made<2> {
        let (tokens, n, plans) = (of[0].rows(), s.sequence, self.plans(s)?);
        let (laid, passes) = (self.laid(of, s)?, &plans.last().expect("the plan of the shape").1);
        let (o, lse) = (self.room(tokens, s.o_row())?, self.wide_room(tokens, s.heads)?);
        let statistics = self.wide_room(s.heads, n)?;
        for first in (0..tokens).step_by(n) {
            let at = |x: &Elements| x.part(x.len() / tokens * first, x.len() / tokens * n).address();
            passes.run(0, &[at(&laid.q), at(&laid.k), at(&laid.v), at(&o), statistics.address()])?;
            self.turned(&statistics, &lse.part(first * s.heads, n * s.heads), [s.heads, n])?;
        }
        Ok([o, lse])
    }

    pub(super) fn planned_gradients(&self, state: &AttentionState, d_o: &Tensor, s: &AttentionShape) -> Made<3> {
        let (tokens, n, plans) = (state.q.rows(), s.sequence, self.plans(s)?);
        let laid = self.laid([&state.q, &state.kv, &state.k_rope], s)?;
        let passes = &plans.last().expect("the plan of the shape").1;
        let (o, d_o, lse) = (self.activation(&state.o)?, self.activation(d_o)?, self.wide(&state.lse)?);
        let like = |x: &Elements| self.room(1, x.len());
        let (dq, dk, dv) = (like(&laid.q)?, like(&laid.k)?, like(&laid.v)?);
        let (statistics, sums) = (self.wide_room(s.heads, n)?, self.wide_room(s.heads, n)?);
        for first in (0..tokens).step_by(n) {
            let at = |x: &Elements| x.part(x.len() / tokens * first, x.len() / tokens * n).address();
            self.turned(&lse.part(first * s.heads, n * s.heads), &statistics, [n, s.heads])?;
            let inputs = [at(&laid.q), at(&laid.k), at(&laid.v), at(&o), statistics.address()];
            let others = [at(&d_o), at(&dq), at(&dk), at(&dv), sums.address()];
            passes.run(1, &[inputs, others].concat())?;
        }
        let (dkv, dk_rope) = (self.room(tokens, s.kv_row())?, self.room(tokens, s.rope)?);
        let [heads, nope, rope, values] = [s.heads, s.nope, s.rope, s.value].map(|n| n as i32);
        let (from, to, count) = ((&dk.address(), &dv.address()), &dkv.address(), dkv.len() as u64);
        let shape = by_element(dkv.len());
        run!(self.gpu, HEADS, "split_heads", shape, from.0, from.1, to, &count, &nope, &rope, &values)?;
        let (shape, to, count) = (by_element(dk_rope.len()), &dk_rope.address(), dk_rope.len() as u64);
        run!(self.gpu, HEADS, "sum_heads", shape, from.0, to, &count, &heads, &nope, &rope)?;
        Ok([dq, dkv, dk_rope])
    }
}
