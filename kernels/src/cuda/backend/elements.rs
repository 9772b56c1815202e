//! Elements and rows: sums, columns, embedding, norms, rotation, SwiGLU, cross-entropy. Kernels: `hopper/fp32_rows.cu`.

use super::CudaBackend;
use super::tensors::{Floats, Made};
use crate::backend::BackendError;
use crate::cuda::device::{Gpu, run};
use crate::cuda::sources::FP32_ROWS;
use crate::ops::rope::{self, RopeShape};
use crate::tensor::Tensor;
use cudarc::driver::CudaSlice;
use std::sync::{Arc, Mutex, PoisonError};

/// Tables of rotations that are kept: layers ask for the same few.
const ANGLES_MAX: usize = 8;
/// Columns of an embedding's gradient that a block adds.
const WIDTH: usize = 2048;

/// Rotations by their shape, the newest last.
#[derive(Debug, Default)]
pub(super) struct Angles(Mutex<Vec<(RopeShape, Arc<CudaSlice<f32>>)>>);

impl Angles {
    fn of(&self, gpu: &Gpu, shape: &RopeShape) -> Result<Arc<CudaSlice<f32>>, BackendError> {
        // Pieces of a row share it.
        let key = RopeShape { heads: 1, head_width: shape.width, offset: 0, ..*shape };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = kept.iter().find(|(of, _)| *of == key) {
            return Ok(Arc::clone(table));
        }
        let pairs: Vec<f32> = rope::table(&key).into_iter().flat_map(|(cos, sin)| [cos, sin]).collect();
        let table = Arc::new(gpu.upload(&pairs)?);
        if kept.len() == ANGLES_MAX {
            kept.remove(0);
        }
        kept.push((key, Arc::clone(&table)));
        Ok(table)
    }
}

/// A launch of a thread for each element.
pub(super) fn by_element(count: usize) -> (usize, u32, usize) {
    (count.div_ceil(256), 256, 0)
}

/// A launch of half a warp for each row.
pub(super) fn by_row(rows: usize) -> (usize, u32, usize) {
    (rows.div_ceil(16), 256, 0)
}

impl CudaBackend {
    /// Room for a result, which its kernel writes whole.
    pub(super) fn room(&self, rows: usize, columns: usize) -> Result<CudaSlice<f32>, BackendError> {
        self.gpu.room(rows * columns)
    }

    pub(super) fn sum(&self, a: &Tensor, b: &Tensor) -> Result<Floats, BackendError> {
        assert_eq!((a.rows(), a.columns()), (b.rows(), b.columns()), "shapes of a sum");
        let (of_a, of_b, mut y) = (self.floats(a)?, self.floats(b)?, self.room(a.rows(), a.columns())?);
        let count = y.len() as u64;
        run!(self.gpu, FP32_ROWS, "add", by_element(y.len()), &of_a.view(), &of_b.view(), &mut y, &count)?;
        Ok(Floats::new(y))
    }

    /// Columns of `x`, from one on so many.
    pub(super) fn columns(&self, x: &Tensor, from: usize, count: usize) -> Result<Floats, BackendError> {
        let mut y = self.room(x.rows(), count)?;
        self.copy_columns(x, [from, count], &mut y, [0, count])?;
        Ok(Floats::new(y))
    }

    pub(super) fn joined(&self, a: &Tensor, b: &Tensor) -> Result<Floats, BackendError> {
        assert_eq!(a.rows(), b.rows(), "rows that are joined");
        let width = a.columns() + b.columns();
        let mut y = self.room(a.rows(), width)?;
        self.copy_columns(a, [0, a.columns()], &mut y, [0, width])?;
        self.copy_columns(b, [0, b.columns()], &mut y, [a.columns(), width])?;
        Ok(Floats::new(y))
    }

    /// So many columns of `x`, from one on, to those of a matrix of some width, from one on.
    fn copy_columns(
        &self,
        x: &Tensor,
        [from, count]: [usize; 2],
        y: &mut CudaSlice<f32>,
        [to, width]: [usize; 2],
    ) -> Result<(), BackendError> {
        let fits = from + count <= x.columns() && to + count <= width && y.len() == x.rows() * width;
        assert!(fits, "columns {from} to {} of {x:?}", from + count);
        if count == 0 {
            return Ok(());
        }
        let (of_x, rows, shape) = (self.floats(x)?, x.rows() as u64, by_element(x.rows() * count));
        let [count, x_row, from, y_row, to] = [count, x.columns(), from, width, to].map(|n| n as i32);
        run!(self.gpu, FP32_ROWS, "copy_columns", shape, &of_x.view(), y, &rows, &count, &x_row, &from, &y_row, &to)
    }

    /// Rows of a table by their indices.
    pub(super) fn gather(&self, index: &CudaSlice<u32>, table: &Tensor) -> Result<Floats, BackendError> {
        let (of, mut y, rows) = (self.floats(table)?, self.room(index.len(), table.columns())?, index.len() as u64);
        let (shape, columns, height) = (by_element(y.len()), table.columns() as i32, table.rows() as u32);
        run!(self.gpu, FP32_ROWS, "gather", shape, index, &of.view(), &mut y, &rows, &columns, &height)?;
        Ok(Floats::new(y))
    }

    pub(super) fn embedding_weight(&self, tokens: &Tensor, dy: &Tensor, height: usize) -> Result<Floats, BackendError> {
        let (tokens, of_dy, mut dtable) =
            (self.words(tokens)?, self.floats(dy)?, self.gpu.zeros(height * dy.columns())?);
        assert_eq!(tokens.len(), dy.rows(), "a gradient of every token");
        if dy.rows() > 0 {
            let shape = (dy.rows() * dy.columns().div_ceil(WIDTH), 256, 0);
            let [rows, columns, height] = [dy.rows(), dy.columns(), height].map(|n| n as i32);
            let dy = &of_dy.view();
            run!(self.gpu, FP32_ROWS, "embedding_weight", shape, &*tokens, dy, &mut dtable, &rows, &columns, &height)?;
        }
        Ok(Floats::new(dtable))
    }

    pub(super) fn norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Result<Floats, BackendError> {
        assert_eq!((w.rows(), w.columns()), (1, x.columns()), "weights of a norm");
        let (of_x, of_w, mut y) = (self.floats(x)?, self.floats(w)?, self.room(x.rows(), x.columns())?);
        let (shape, rows, columns) = (by_row(x.rows()), x.rows() as u64, x.columns() as i32);
        run!(self.gpu, FP32_ROWS, "rms_norm", shape, &of_x.view(), &of_w.view(), &mut y, &rows, &columns, &eps)?;
        Ok(Floats::new(y))
    }

    pub(super) fn norm_input(&self, x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Result<Floats, BackendError> {
        let like = (x.rows(), x.columns());
        assert_eq!((w.rows(), w.columns(), like), (1, x.columns(), (dy.rows(), dy.columns())), "operands of a norm");
        let (of_x, of_w, of_dy) = (self.floats(x)?, self.floats(w)?, self.floats(dy)?);
        let (mut dx, shape, rows, columns) = (self.room(like.0, like.1)?, by_row(like.0), like.0 as u64, like.1 as i32);
        let (x, w, dy) = (&of_x.view(), &of_w.view(), &of_dy.view());
        run!(self.gpu, FP32_ROWS, "rms_norm_backward", shape, x, w, dy, &mut dx, &rows, &columns, &eps)?;
        Ok(Floats::new(dx))
    }

    pub(super) fn norm_weight(&self, x: &Tensor, dy: &Tensor, eps: f32) -> Result<Floats, BackendError> {
        assert_eq!((x.rows(), x.columns()), (dy.rows(), dy.columns()), "operands of a norm");
        let (of_x, of_dy) = (self.floats(x)?, self.floats(dy)?);
        let (mut roots, mut dw) = (self.room(1, x.rows())?, self.room(1, x.columns())?);
        let (rows, columns) = (x.rows() as u64, x.columns() as i32);
        run!(self.gpu, FP32_ROWS, "rms_roots", by_row(x.rows()), &of_x.view(), &mut roots, &rows, &columns, &eps)?;
        let (shape, x, dy) = (by_element(x.columns()), &of_x.view(), &of_dy.view());
        run!(self.gpu, FP32_ROWS, "rms_norm_weight", shape, x, dy, &roots, &mut dw, &rows, &columns)?;
        Ok(Floats::new(dw))
    }

    pub(super) fn rotated(&self, x: &Tensor, s: &RopeShape, inverse: bool) -> Result<Floats, BackendError> {
        let fits = x.columns() == s.heads * s.head_width && s.width.is_multiple_of(2);
        assert!(fits && s.offset + s.width <= s.head_width, "a rotation of {x:?}: {s:?}");
        let (of_x, angles, mut y) = (self.floats(x)?, self.angles.of(&self.gpu, s)?, self.room(x.rows(), x.columns())?);
        let (shape, count, inverse) = (by_element(y.len()), y.len() as u64, i32::from(inverse));
        let sizes = [x.columns(), s.head_width, s.offset, s.width, s.sequence].map(|n| n as i32);
        let ([c, head, offset, width, sequence], x) = (sizes, &of_x.view());
        let (c, head, offset, width, sequence) = (&c, &head, &offset, &width, &sequence);
        run!(
            self.gpu, FP32_ROWS, "rope", shape, x, &*angles, &mut y, &count, c, head, offset, width, sequence, &inverse
        )?;
        Ok(Floats::new(y))
    }

    pub(super) fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Floats, BackendError> {
        assert_eq!((gate.rows(), gate.columns()), (up.rows(), up.columns()), "elements of gate and up");
        let (of_gate, of_up, mut h) = (self.floats(gate)?, self.floats(up)?, self.room(gate.rows(), gate.columns())?);
        let count = h.len() as u64;
        run!(self.gpu, FP32_ROWS, "swiglu", by_element(h.len()), &of_gate.view(), &of_up.view(), &mut h, &count)?;
        Ok(Floats::new(h))
    }

    pub(super) fn gated_gradients(&self, gate: &Tensor, up: &Tensor, dh: &Tensor) -> Made<3> {
        let like = (gate.rows(), gate.columns());
        assert_eq!([like; 2], [(up.rows(), up.columns()), (dh.rows(), dh.columns())], "elements of a SwiGLU");
        let (of_gate, of_up, of_dh) = (self.floats(gate)?, self.floats(up)?, self.floats(dh)?);
        let room = || self.room(like.0, like.1);
        let (mut h, mut dgate, mut dup, count) = (room()?, room()?, room()?, (like.0 * like.1) as u64);
        let (shape, gate, up, dh) = (by_element(like.0 * like.1), &of_gate.view(), &of_up.view(), &of_dh.view());
        run!(self.gpu, FP32_ROWS, "swiglu_backward", shape, gate, up, dh, &mut h, &mut dgate, &mut dup, &count)?;
        Ok([h, dgate, dup].map(Floats::new))
    }

    pub(super) fn losses(&self, logits: &Tensor, targets: &Tensor, scale: f32) -> Made<2> {
        let (targets, of, shape) = (self.words(targets)?, self.floats(logits)?, by_row(logits.rows()));
        assert_eq!(targets.len(), logits.rows(), "a target of every row");
        let (mut losses, mut d) = (self.room(1, targets.len())?, self.room(logits.rows(), logits.columns())?);
        let (rows, columns, x) = (logits.rows() as u64, logits.columns() as i32, &of.view());
        run!(self.gpu, FP32_ROWS, "cross_entropy", shape, x, &*targets, &mut losses, &mut d, &rows, &columns, &scale)?;
        Ok([losses, d].map(Floats::new))
    }
}
