//! Causal attention as latent attention trains it, through cuDNN: keys of one width, values of another, BF16, and a
//! backward pass that repeats its bits.
//!
//! What decides over the bits: the last product of the backward graph writes dQ in BF16 itself. cuDNN then keeps the
//! scores' gradients in its workspace (two bytes each, tokens rounded up to 128) and multiplies them in order; through an
//! FP32 tensor that is rounded afterwards, blocks would add to dQ in whatever order they come.

use super::cudnn::{BF16, F32, Four, Graph, Handle, Id, Plan, packed, turned};
use super::device::Gpu;
use super::failure::all_there;
use super::memory::{Memory, enter};
use crate::backend::BackendError;
use cudarc::cudnn::sys::{cudnnPointwiseMode_t as Mode, cudnnReduceTensorOp_t as Reduction};
use cudarc::driver::{DevicePtr, DevicePtrMut};
use std::fmt;
use std::sync::Arc;

/// Sizes of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CausalShape {
    /// Sequences.
    pub batch: usize,
    /// Heads of each.
    pub heads: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Width of queries and keys.
    pub keys: usize,
    /// Width of values.
    pub values: usize,
}

impl CausalShape {
    fn four(&self, width: usize) -> Four {
        [self.batch, self.heads, self.tokens, width].map(|n| n as i64)
    }

    /// Elements of queries or keys, `[batch][tokens][heads][keys]`.
    pub fn wide(&self) -> usize {
        self.batch * self.heads * self.tokens * self.keys
    }

    /// Elements of values or results, `[batch][tokens][heads][values]`.
    pub fn thin(&self) -> usize {
        self.batch * self.heads * self.tokens * self.values
    }

    /// A logarithm for each query, `[batch][heads][tokens]`.
    pub fn rows(&self) -> usize {
        self.batch * self.heads * self.tokens
    }
}

/// Strides of `[batch][tokens][heads][width]`.
fn by_token([_, heads, tokens, width]: Four) -> Four {
    [tokens * heads * width, width, heads * width, 1]
}

/// A tensor of `width` in memory, as it lies; or by its columns.
fn given(g: &mut Graph, argument: usize, dimensions: Four) -> Result<Id, String> {
    g.given(argument, BF16, dimensions, by_token(dimensions))
}

fn given_turned(g: &mut Graph, argument: usize, dimensions: Four) -> Result<Id, String> {
    g.given(argument, BF16, turned(dimensions), turned(by_token(dimensions)))
}

/// q, k, v, o, statistics.
fn forward(s: &CausalShape, scale: f32) -> Result<Graph, String> {
    let (mut graph, wide, thin) = (Graph::default(), s.four(s.keys), s.four(s.values));
    let g = &mut graph;
    let (q, k, v) = (given(g, 0, wide)?, given_turned(g, 1, wide)?, given(g, 2, thin)?);
    let o = given(g, 3, thin)?;
    let statistics = g.given(4, F32, s.four(1), packed(s.four(1)))?;
    let (scores, scale) = (g.product(q, k, None)?, g.number(scale)?);
    let scores = g.apply(Mode::CUDNN_POINTWISE_MUL, scores, scale)?;
    let scores = g.causal(scores)?;
    let top = g.reduce(Reduction::CUDNN_REDUCE_TENSOR_MAX, scores)?;
    let below = g.apply(Mode::CUDNN_POINTWISE_SUB, scores, top)?;
    let powers = g.map(Mode::CUDNN_POINTWISE_EXP, below)?;
    let total = g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, powers)?;
    let logarithm = g.map(Mode::CUDNN_POINTWISE_LOG, total)?;
    g.apply_into(Mode::CUDNN_POINTWISE_ADD, top, logarithm, statistics)?;
    let shares = g.apply_rounded(Mode::CUDNN_POINTWISE_DIV, powers, total)?;
    g.product(shares, v, Some(o))?;
    Ok(graph)
}

/// q, k, v, o, statistics, do, dq, dk, dv, row sums.
fn backward(s: &CausalShape, scale: f32) -> Result<Graph, String> {
    let (mut graph, wide, thin) = (Graph::default(), s.four(s.keys), s.four(s.values));
    let g = &mut graph;
    let (q, k, v) = (given(g, 0, wide)?, given_turned(g, 1, wide)?, given_turned(g, 2, thin)?);
    let (o, d_o) = (given(g, 3, thin)?, given(g, 5, thin)?);
    let (dq, dk, dv) = (given(g, 6, wide)?, given(g, 7, wide)?, given(g, 8, thin)?);
    let statistics = g.given(4, F32, s.four(1), packed(s.four(1)))?;
    let sums = g.given(9, F32, s.four(1), packed(s.four(1)))?;
    let (scale, one) = (g.number(scale)?, g.number(1.0)?);
    let both = g.apply(Mode::CUDNN_POINTWISE_MUL, d_o, o)?;
    let of_row = g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, both)?;
    g.apply_into(Mode::CUDNN_POINTWISE_MUL, of_row, one, sums)?;
    let scores = g.product(q, k, None)?;
    let scores = g.apply(Mode::CUDNN_POINTWISE_MUL, scores, scale)?;
    let below = g.apply(Mode::CUDNN_POINTWISE_SUB, scores, statistics)?;
    let below = g.causal(below)?;
    let p = g.map(Mode::CUDNN_POINTWISE_EXP, below)?;
    let by_key = g.transpose(p, BF16)?;
    g.product(by_key, d_o, Some(dv))?;
    let dp = g.product(d_o, v, None)?;
    let dp = g.apply(Mode::CUDNN_POINTWISE_SUB, dp, sums)?;
    let ds = g.apply(Mode::CUDNN_POINTWISE_MUL, dp, p)?;
    let ds = g.apply(Mode::CUDNN_POINTWISE_MUL, ds, scale)?;
    let by_key = g.transpose(ds, BF16)?;
    g.product(by_key, q, Some(dk))?;
    let keys = g.transpose(k, F32)?;
    g.product(ds, keys, Some(dq))?;
    Ok(graph)
}

/// The version of cuDNN, if it is there.
pub(super) fn library() -> Result<usize, String> {
    // SAFETY: this only looks for the library.
    let there = unsafe { cudarc::cudnn::sys::is_culib_present() };
    all_there(&[("cuDNN (libcudnn)", there)])?;
    // SAFETY: it has no arguments, and the library is there.
    Ok(unsafe { cudarc::cudnn::sys::cudnnGetVersion() })
}

/// Both passes of one shape.
pub struct CausalAttention {
    gpu: Arc<Gpu>,
    shape: CausalShape,
    // Dropped before the handle that made them.
    plans: Option<[Plan; 2]>,
    handle: Handle,
    space: Memory<u8>,
}

// SAFETY: cuDNN's handles and descriptors may be used from any thread, from one at a time; so this is not shared between any.
unsafe impl Send for CausalAttention {}

impl fmt::Debug for CausalAttention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CausalAttention").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl Drop for CausalAttention {
    fn drop(&mut self) {
        // Plans and handle are freed after this, in the thread's context.
        enter(self.gpu.stream.context());
    }
}

/// Gradients of queries, keys and values.
#[derive(Debug)]
pub struct CausalGradients {
    /// Like the queries.
    pub dq: Memory<u16>,
    /// Like the keys.
    pub dk: Memory<u16>,
    /// Like the values.
    pub dv: Memory<u16>,
}

/// Queries, keys and values in BF16, in the order of [`CausalShape`].
#[derive(Debug)]
pub struct Qkv {
    /// `[batch][tokens][heads][keys]`.
    pub q: Memory<u16>,
    /// `[batch][tokens][heads][keys]`.
    pub k: Memory<u16>,
    /// `[batch][tokens][heads][values]`.
    pub v: Memory<u16>,
}

impl CausalAttention {
    /// Plans both passes, with scores by the root of the keys' width.
    pub fn new(gpu: &Arc<Gpu>, shape: CausalShape) -> Result<Self, BackendError> {
        Self::with_scale(gpu, shape, (shape.keys as f32).sqrt().recip())
    }

    /// The same with another factor of the scores. cuDNN compiles a kernel for each pass. It takes no tensor without elements, and
    /// there is nothing to do.
    pub(super) fn with_scale(gpu: &Arc<Gpu>, shape: CausalShape, scale: f32) -> Result<Self, BackendError> {
        library().map_err(|e| gpu.error(e))?;
        // cuDNN makes a handle for the GPU of the thread's context.
        gpu.bind()?;
        let say = |e: String| gpu.error(format!("attention {shape:?}: {e}"));
        let handle = Handle::new().map_err(say)?;
        let plan = |graph: Result<Graph, String>| graph.and_then(|g| g.plan(&handle)).map_err(say);
        let plans = if shape.rows() == 0 {
            None
        } else {
            Some([plan(forward(&shape, scale))?, plan(backward(&shape, scale))?])
        };
        let space = gpu.room(plans.iter().flatten().map(|p| p.workspace).max().unwrap_or(0))?;
        Ok(Self { gpu: Arc::clone(gpu), handle, shape, plans, space })
    }

    /// `o` and the logarithms of the sums of each row.
    pub fn forward(&self, x: &Qkv, o: &mut Memory<u16>, statistics: &mut Memory<f32>) -> Result<(), BackendError> {
        let s = &self.shape;
        assert_eq!((o.len(), statistics.len()), (s.thin(), s.rows()), "elements of an attention's result");
        let stream = &self.gpu.stream;
        let [q, k, v] = self.inputs(x);
        let arguments = [q, k, v, o.device_ptr_mut(stream).0, statistics.device_ptr_mut(stream).0];
        self.run(0, &arguments)
    }

    /// Gradients of all three. `sums` is room for a number for each row.
    pub fn backward(
        &self,
        x: &Qkv,
        (o, statistics): (&Memory<u16>, &Memory<f32>),
        d_o: &Memory<u16>,
        out: &mut CausalGradients,
        sums: &mut Memory<f32>,
    ) -> Result<(), BackendError> {
        let s = &self.shape;
        assert_eq!([o.len(), d_o.len()], [s.thin(); 2], "elements of an attention's result");
        assert_eq!([statistics.len(), sums.len()], [s.rows(); 2], "numbers of rows");
        assert_eq!([out.dq.len(), out.dk.len(), out.dv.len()], [s.wide(), s.wide(), s.thin()], "elements of gradients");
        let stream = &self.gpu.stream;
        let [q, k, v] = self.inputs(x);
        let arguments = [
            q,
            k,
            v,
            o.device_ptr(stream).0,
            statistics.device_ptr(stream).0,
            d_o.device_ptr(stream).0,
            out.dq.device_ptr_mut(stream).0,
            out.dk.device_ptr_mut(stream).0,
            out.dv.device_ptr_mut(stream).0,
            sums.device_ptr_mut(stream).0,
        ];
        self.run(1, &arguments)
    }

    /// Where queries, keys and values are; they are as long as the shape says.
    fn inputs(&self, x: &Qkv) -> [u64; 3] {
        let (wide, thin) = (self.shape.wide(), self.shape.thin());
        assert_eq!([x.q.len(), x.k.len(), x.v.len()], [wide, wide, thin], "elements of an attention");
        [&x.q, &x.k, &x.v].map(|part| part.device_ptr(&self.gpu.stream).0)
    }

    /// Enqueues a pass on tensors at these addresses, whose lengths the callers have held against the shape.
    pub(super) fn run(&self, pass: usize, arguments: &[u64]) -> Result<(), BackendError> {
        let Some(plans) = &self.plans else { return Ok(()) };
        self.gpu.bind()?;
        let space = self.space.device_ptr(&self.gpu.stream).0;
        // SAFETY: the callers have held the lengths against the shape; all work is on one stream, in whose order memory
        // is freed too.
        unsafe { plans[pass].run(&self.handle, self.gpu.stream.cu_stream(), arguments, space) }
            .map_err(|e| self.gpu.error(e))
    }
}
