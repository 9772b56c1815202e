//! Elements and rows: sums, columns, embedding, norms, rotation, SwiGLU, cross-entropy. Kernels: `hopper/elements.cu`; norms'
//! gradients in low precision are those of `hopper/norm.cu`, at the speed of memory, with the same bits.

use super::CudaBackend;
use super::tensors::{Elements, Made};
use crate::backend::BackendError;
use crate::cuda::device::{Gpu, run};
use crate::cuda::memory::Memory;
use crate::cuda::products::TILE;
use crate::cuda::sources::{ELEMENTS, Source};
use crate::ops::rope::{self, RopeShape};
use crate::tensor::Tensor;
use std::sync::{Arc, Mutex, PoisonError};

/// Tables of rotations that are kept: layers ask for the same few.
const ANGLES_MAX: usize = 8;
/// The most columns of a norm whose gradient is made at the speed of memory: two rows of it and of its gradient in shared memory.
const NORM_COLUMNS_MAX: usize = 24_576;
/// Columns of an embedding's gradient that a block adds.
const WIDTH: usize = 2048;

/// Rotations by their shape, the newest last.
#[derive(Debug, Default)]
pub(super) struct Angles(Mutex<Vec<(RopeShape, Arc<Memory<f32>>)>>);

impl Angles {
    fn of(&self, gpu: &Gpu, shape: &RopeShape) -> Result<Arc<Memory<f32>>, BackendError> {
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
    /// The kernels for what is stored.
    fn kernels(&self) -> &'static Source {
        &ELEMENTS[usize::from(self.low())]
    }

    /// Room for a result as activations are stored, which its kernel writes whole.
    pub(super) fn room(&self, rows: usize, columns: usize) -> Result<Elements, BackendError> {
        self.room_in(rows * columns, self.low())
    }

    /// The same in FP32.
    pub(super) fn wide_room(&self, rows: usize, columns: usize) -> Result<Elements, BackendError> {
        self.room_in(rows * columns, false)
    }

    /// The sum of two matrices, in BF16 or FP32.
    pub(super) fn sum(&self, a: &Tensor, b: &Tensor, low: bool) -> Result<Elements, BackendError> {
        assert_eq!((a.rows(), a.columns()), (b.rows(), b.columns()), "shapes of a sum");
        let (of_a, of_b) = (self.elements(a, low)?, self.elements(b, low)?);
        let (y, count, shape) = (self.room_in(of_a.len(), low)?, of_a.len() as u64, by_element(of_a.len()));
        let kernels = &ELEMENTS[usize::from(low)];
        run!(self.gpu, *kernels, "add", shape, &of_a.address(), &of_b.address(), &y.address(), &count)?;
        Ok(y)
    }

    /// Columns of `x`, from one on so many.
    pub(super) fn columns(&self, x: &Tensor, from: usize, count: usize) -> Result<Elements, BackendError> {
        let y = self.room(x.rows(), count)?;
        self.copy_columns(&self.activation(x)?, [x.columns(), from, count], &y, [count, 0])?;
        Ok(y)
    }

    pub(super) fn joined(&self, a: &Tensor, b: &Tensor) -> Result<Elements, BackendError> {
        assert_eq!(a.rows(), b.rows(), "rows that are joined");
        let width = a.columns() + b.columns();
        let y = self.room(a.rows(), width)?;
        self.copy_columns(&self.activation(a)?, [a.columns(), 0, a.columns()], &y, [width, 0])?;
        self.copy_columns(&self.activation(b)?, [b.columns(), 0, b.columns()], &y, [width, a.columns()])?;
        Ok(y)
    }

    /// Of rows that are `width` long, so many columns from one on; to those of `y`, whose rows have a length of their own, from one
    /// on.
    pub(super) fn copy_columns(
        &self,
        x: &Elements,
        [width, from, count]: [usize; 3],
        y: &Elements,
        [y_width, to]: [usize; 2],
    ) -> Result<(), BackendError> {
        if count == 0 {
            return Ok(());
        }
        let rows = x.len() / width;
        let fits = from + count <= width && to + count <= y_width && y.len() == rows * y_width;
        assert!(fits && x.is_low() == y.is_low(), "columns {from} to {} of {width}", from + count);
        let (kernels, shape, rows) = (&ELEMENTS[usize::from(x.is_low())], by_element(rows * count), rows as u64);
        let [count, width, from, y_width, to] = [count, width, from, y_width, to].map(|n| n as i32);
        let (x, y) = (&x.address(), &y.address());
        run!(self.gpu, *kernels, "copy_columns", shape, x, y, &rows, &count, &width, &from, &y_width, &to)
    }

    /// Rows of a table of weights by their tokens.
    pub(super) fn embedded(&self, tokens: &Tensor, table: &Tensor) -> Result<Elements, BackendError> {
        let (index, of, y) = (self.indices(tokens)?, self.wide(table)?, self.room(tokens.columns(), table.columns())?);
        let (shape, rows) = (by_element(y.len()), tokens.columns() as u64);
        let (columns, height, index) = (table.columns() as i32, table.rows() as u32, &*index.data);
        let (of, to) = (&of.address(), &y.address());
        run!(self.gpu, *self.kernels(), "embedding", shape, index, of, to, &rows, &columns, &height)?;
        Ok(y)
    }

    /// Rows of a matrix by their indices.
    pub(super) fn gather(&self, index: &Memory<u32>, x: &Tensor) -> Result<Elements, BackendError> {
        let (of, y, rows) = (self.activation(x)?, self.room(index.len(), x.columns())?, index.len() as u64);
        let (shape, columns, height) = (by_element(y.len()), x.columns() as i32, x.rows() as u32);
        let (of, to) = (&of.address(), &y.address());
        run!(self.gpu, *self.kernels(), "gather", shape, index, of, to, &rows, &columns, &height)?;
        Ok(y)
    }

    pub(super) fn embedding_weight(
        &self,
        tokens: &Tensor,
        dy: &Tensor,
        height: usize,
    ) -> Result<Elements, BackendError> {
        let (tokens, of_dy) = (self.indices(tokens)?, self.activation(dy)?);
        let dtable = Elements::f32(self.gpu.zeros(height * dy.columns())?);
        assert_eq!(tokens.data.len(), dy.rows(), "a gradient of every token");
        if dy.rows() > 0 {
            let shape = (dy.rows() * dy.columns().div_ceil(WIDTH), 256, 0);
            let [rows, columns, height] = [dy.rows(), dy.columns(), height].map(|n| n as i32);
            let (index, of, to) = (&*tokens.data, &of_dy.address(), &dtable.address());
            run!(self.gpu, *self.kernels(), "embedding_weight", shape, index, of, to, &rows, &columns, &height)?;
        }
        Ok(dtable)
    }

    pub(super) fn norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Result<Elements, BackendError> {
        assert_eq!((w.rows(), w.columns()), (1, x.columns()), "weights of a norm");
        let (of_x, of_w, y) = (self.activation(x)?, self.wide(w)?, self.room(x.rows(), x.columns())?);
        let (shape, rows, columns) = (by_row(x.rows()), x.rows() as u64, x.columns() as i32);
        run!(
            self.gpu,
            *self.kernels(),
            "rms_norm",
            shape,
            &of_x.address(),
            &of_w.address(),
            &y.address(),
            &rows,
            &columns,
            &eps
        )?;
        Ok(y)
    }

    pub(super) fn norm_input(&self, x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Result<Elements, BackendError> {
        let like = (x.rows(), x.columns());
        assert_eq!((w.rows(), w.columns(), like), (1, x.columns(), (dy.rows(), dy.columns())), "operands of a norm");
        let (of_x, of_w, of_dy) = (self.activation(x)?, self.wide(w)?, self.activation(dy)?);
        if self.low() && like.1.is_multiple_of(TILE) && (1..=NORM_COLUMNS_MAX).contains(&like.1) {
            let mut dx = self.gpu.room(of_x.len())?;
            self.gpu.rms_norm_backward([&of_x.words(), &of_dy.words()], &of_w.floats(), &mut dx, eps)?;
            return Ok(Elements::bf16(dx));
        }
        let (dx, shape, rows, columns) = (self.room(like.0, like.1)?, by_row(like.0), like.0 as u64, like.1 as i32);
        let (x, w, dy) = (&of_x.address(), &of_w.address(), &of_dy.address());
        run!(self.gpu, *self.kernels(), "rms_norm_backward", shape, x, w, dy, &dx.address(), &rows, &columns, &eps)?;
        Ok(dx)
    }

    pub(super) fn norm_weight(&self, x: &Tensor, dy: &Tensor, eps: f32) -> Result<Elements, BackendError> {
        assert_eq!((x.rows(), x.columns()), (dy.rows(), dy.columns()), "operands of a norm");
        let (of_x, of_dy) = (self.activation(x)?, self.activation(dy)?);
        let (roots, dw) = (self.wide_room(1, x.rows())?, self.wide_room(1, x.columns())?);
        let (rows, columns) = (x.rows() as u64, x.columns() as i32);
        run!(
            self.gpu,
            *self.kernels(),
            "rms_roots",
            by_row(x.rows()),
            &of_x.address(),
            &roots.address(),
            &rows,
            &columns,
            &eps
        )?;
        let (shape, x, dy) = (by_element(x.columns()), &of_x.address(), &of_dy.address());
        run!(
            self.gpu,
            *self.kernels(),
            "rms_norm_weight",
            shape,
            x,
            dy,
            &roots.address(),
            &dw.address(),
            &rows,
            &columns
        )?;
        Ok(dw)
    }

    pub(super) fn rotated(&self, x: &Tensor, s: &RopeShape, inverse: bool) -> Result<Elements, BackendError> {
        let fits = x.columns() == s.heads * s.head_width && s.width.is_multiple_of(2);
        assert!(fits && s.offset + s.width <= s.head_width, "a rotation of {x:?}: {s:?}");
        let (of_x, angles, y) = (self.activation(x)?, self.angles.of(&self.gpu, s)?, self.room(x.rows(), x.columns())?);
        let (shape, count, inverse) = (by_element(y.len()), y.len() as u64, i32::from(inverse));
        let sizes = [x.columns(), s.head_width, s.offset, s.width, s.sequence].map(|n| n as i32);
        let ([c, head, offset, width, sequence], x) = (sizes, &of_x.address());
        let (c, head, offset, width, sequence) = (&c, &head, &offset, &width, &sequence);
        run!(
            self.gpu,
            *self.kernels(),
            "rope",
            shape,
            x,
            &*angles,
            &y.address(),
            &count,
            c,
            head,
            offset,
            width,
            sequence,
            &inverse
        )?;
        Ok(y)
    }

    pub(super) fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Elements, BackendError> {
        assert_eq!((gate.rows(), gate.columns()), (up.rows(), up.columns()), "elements of gate and up");
        let (of_gate, of_up, h) =
            (self.activation(gate)?, self.activation(up)?, self.room(gate.rows(), gate.columns())?);
        let count = h.len() as u64;
        run!(
            self.gpu,
            *self.kernels(),
            "swiglu",
            by_element(h.len()),
            &of_gate.address(),
            &of_up.address(),
            &h.address(),
            &count
        )?;
        Ok(h)
    }

    pub(super) fn gated_gradients(&self, gate: &Tensor, up: &Tensor, dh: &Tensor) -> Made<3> {
        let like = (gate.rows(), gate.columns());
        assert_eq!([like; 2], [(up.rows(), up.columns()), (dh.rows(), dh.columns())], "elements of a SwiGLU");
        let (of_gate, of_up, of_dh) = (self.activation(gate)?, self.activation(up)?, self.activation(dh)?);
        let room = || self.room(like.0, like.1);
        let (h, dgate, dup, count) = (room()?, room()?, room()?, (like.0 * like.1) as u64);
        let (shape, gate, up, dh) =
            (by_element(like.0 * like.1), &of_gate.address(), &of_up.address(), &of_dh.address());
        run!(
            self.gpu,
            *self.kernels(),
            "swiglu_backward",
            shape,
            gate,
            up,
            dh,
            &h.address(),
            &dgate.address(),
            &dup.address(),
            &count
        )?;
        Ok([h, dgate, dup])
    }

    pub(super) fn losses(&self, logits: &Tensor, targets: &Tensor, scale: f32) -> Made<2> {
        let (targets, of, shape) = (self.indices(targets)?.data, self.activation(logits)?, by_row(logits.rows()));
        assert_eq!(targets.len(), logits.rows(), "a target of every row");
        let (losses, d) = (self.wide_room(1, targets.len())?, self.room(logits.rows(), logits.columns())?);
        let (rows, columns, x) = (logits.rows() as u64, logits.columns() as i32, &of.address());
        run!(
            self.gpu,
            *self.kernels(),
            "cross_entropy",
            shape,
            x,
            &*targets,
            &losses.address(),
            &d.address(),
            &rows,
            &columns,
            &scale
        )?;
        Ok([losses, d])
    }
}
