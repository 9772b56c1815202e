//! Products in FP32: by the gate's kernels where operands lie in eights (`hopper/gate.cu`), else, and where they are parts of
//! others, by a plain one (`hopper/fp32_product.cu`). Both add as the CPU does.

use super::CudaBackend;
use super::tensors::Floats;
use crate::backend::BackendError;
use crate::cuda::device::launch_of;
use crate::cuda::failure::told;
use crate::cuda::sources::FP32_PRODUCT;
use crate::tensor::Tensor;
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg};

/// Rows and columns of a tile of the plain product.
const TILE: usize = 64;

/// A matrix in memory: element `(i, j)` lies at `i * row + j * column` elements from `at`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct View {
    pub(super) at: u64,
    pub(super) row: i64,
    pub(super) column: i64,
}

impl View {
    /// Rows that are so many elements apart.
    pub(super) fn rows(at: u64, row: usize) -> Self {
        Self { at, row: row as i64, column: 1 }
    }

    pub(super) fn transposed(self) -> Self {
        Self { at: self.at, row: self.column, column: self.row }
    }

    /// From a column on.
    pub(super) fn from(self, column: usize) -> Self {
        Self { at: self.at + 4 * (column as u64) * self.column as u64, ..self }
    }
}

/// `y_MN = a_MK b_NK^T`, added to what is there if `add`; as many as `steps` says, whose matrices lie steps apart. The kernel's
/// argument.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Product {
    pub(super) a: View,
    pub(super) b: View,
    pub(super) y: u64,
    pub(super) y_row: i64,
    /// Of `a`, `b` and `y`, in elements.
    pub(super) steps: [i64; 3],
    /// M, N and K.
    pub(super) sizes: [i32; 3],
    pub(super) add: i32,
}

// SAFETY: plain data in the kernel's layout.
unsafe impl DeviceRepr for Product {}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Grouped {
    x: u64,
    weights: u64,
    counts: u64,
    y: u64,
    b_row: i64,
    b_column: i64,
    groups: i32,
    rows: i32,
    n: i32,
    k: i32,
}

// SAFETY: plain data in the kernel's layout.
unsafe impl DeviceRepr for Grouped {}

/// Whether the gate's kernels take a weight of this shape, whose elements begin at these places.
fn in_eights(shape: [usize; 2], operands: [&Floats; 2], backend: &CudaBackend) -> bool {
    let aligned = |x: &Floats| x.address(&backend.gpu).is_multiple_of(16);
    shape.iter().all(|n| *n > 0 && n.is_multiple_of(8)) && operands.into_iter().all(aligned)
}

impl CudaBackend {
    /// `x_TI, w_OI -> y_TO`.
    pub(super) fn product(&self, x: &Tensor, w: &Tensor) -> Result<Floats, BackendError> {
        let ([t, i, o], of_x, of_w) = ([x.rows(), x.columns(), w.rows()], self.floats(x)?, self.floats(w)?);
        assert_eq!(i, w.columns(), "columns of a product");
        let mut y = self.room(t, o)?;
        if in_eights([o, i], [&of_x, &of_w], self) {
            let mut room = self.gpu.room(self.gpu.gate_room([t, o, i]))?;
            self.gpu.gate_logits([t, o, i], &of_x.view(), &of_w.view(), &mut room, &mut y)?;
        } else {
            let (a, b) = (self.whole(&of_x, i), self.whole(&of_w, i));
            self.write(&mut y, a, b, [t, o, i])?;
        }
        Ok(Floats::new(y))
    }

    /// `dy_TO, w_OI -> dx_TI`.
    pub(super) fn product_input(&self, dy: &Tensor, w: &Tensor) -> Result<Floats, BackendError> {
        let ([t, o, i], of_dy, of_w) = ([dy.rows(), w.rows(), w.columns()], self.floats(dy)?, self.floats(w)?);
        assert_eq!(o, dy.columns(), "columns of a gradient");
        let mut dx = self.room(t, i)?;
        if in_eights([o, i], [&of_dy, &of_w], self) {
            self.gpu.gate_input_gradient([t, o, i], &of_dy.view(), &of_w.view(), &mut dx)?;
        } else {
            let (a, b) = (self.whole(&of_dy, o), self.whole(&of_w, i).transposed());
            self.write(&mut dx, a, b, [t, i, o])?;
        }
        Ok(Floats::new(dx))
    }

    /// `dy_TO, x_TI -> dw_OI`.
    pub(super) fn product_weight(&self, dy: &Tensor, x: &Tensor) -> Result<Floats, BackendError> {
        let ([t, o, i], of_dy, of_x) = ([dy.rows(), dy.columns(), x.columns()], self.floats(dy)?, self.floats(x)?);
        assert_eq!(t, x.rows(), "rows of a weight's gradient");
        let mut dw = self.room(o, i)?;
        if in_eights([o, i], [&of_dy, &of_x], self) {
            let mut room = self.gpu.room(self.gpu.gate_room([t, o, i]))?;
            self.gpu.gate_weight_gradient([t, o, i], &of_dy.view(), &of_x.view(), &mut room, &mut dw)?;
        } else {
            let (a, b) = (self.whole(&of_dy, o).transposed(), self.whole(&of_x, i).transposed());
            self.write(&mut dw, a, b, [o, i, t])?;
        }
        Ok(Floats::new(dw))
    }

    /// A matrix of so many columns, row after row.
    pub(super) fn whole(&self, x: &Floats, columns: usize) -> View {
        View::rows(x.address(&self.gpu), columns)
    }

    /// One product to a whole matrix.
    fn write(&self, y: &mut CudaSlice<f32>, a: View, b: View, [m, n, k]: [usize; 3]) -> Result<(), BackendError> {
        let (at, _held) = y.device_ptr_mut(&self.gpu.stream);
        let sizes = [m, n, k].map(|n| n as i32);
        self.products(Product { a, b, y: at, y_row: n as i64, steps: [0; 3], sizes, add: 0 }, 1)
    }

    /// Products of matrices that callers have held against their shapes.
    pub(super) fn products(&self, product: Product, count: usize) -> Result<(), BackendError> {
        let [m, n, _] = product.sizes.map(|n| n as usize);
        if m * n * count == 0 {
            return Ok(());
        }
        let tiles = [m, n].map(|n| n.div_ceil(TILE) as u32);
        let function = self.gpu.function(&FP32_PRODUCT, "product", 0)?;
        let mut launch = self.gpu.stream.launch_builder(&function);
        launch.arg(&product);
        let config =
            LaunchConfig { grid_dim: (tiles[0], tiles[1], count as u32), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the callers have held the matrices against the sizes; all work is on one stream.
        unsafe { launch.launch(config) }.map(drop).map_err(|e| self.gpu.error(format!("product: {}", told(e))))
    }

    /// Rows of `x` in groups of `counts`, each with its own weight: `[O, I]` and results of O columns, or of I if `inputs`. `n` and
    /// `k`: columns of results, and terms.
    pub(super) fn grouped(
        &self,
        x: &Tensor,
        counts: &Tensor,
        w: &[Tensor],
        [n, k]: [usize; 2],
        inputs: bool,
    ) -> Result<Floats, BackendError> {
        let weight = if inputs { (k, n) } else { (n, k) };
        assert!(w.iter().all(|w| (w.rows(), w.columns()) == weight), "weights of one shape: {w:?}");
        assert_eq!(counts.columns(), w.len(), "a weight of every group");
        let (of_x, counts) = (self.floats(x)?, self.words(counts)?);
        let weights = w.iter().map(|w| self.floats(w)).collect::<Result<Vec<_>, _>>()?;
        let places: Vec<u64> = weights.iter().map(|w| w.address(&self.gpu)).collect();
        // Rows that no group has are zeros.
        let (places, mut y) = (self.gpu.upload(&places)?, self.gpu.zeros::<f32>(x.rows() * n)?);
        if y.is_empty() {
            return Ok(Floats::new(y));
        }
        let stream = &self.gpu.stream;
        let b = if inputs { View::rows(0, n).transposed() } else { View::rows(0, k) };
        let sizes = [w.len(), x.rows(), n, k].map(|n| n as i32);
        let [groups, rows, of_n, of_k] = sizes;
        {
            let (at, _held) = y.device_ptr_mut(stream);
            let (weights, counts) = (places.device_ptr(stream).0, counts.device_ptr(stream).0);
            let (x, n, k) = (of_x.address(&self.gpu), of_n, of_k);
            let argument = Grouped { x, weights, counts, y: at, b_row: b.row, b_column: b.column, groups, rows, n, k };
            let function = self.gpu.function(&FP32_PRODUCT, "grouped", 0)?;
            let mut launch = stream.launch_builder(&function);
            launch.arg(&argument);
            let mut config = launch_of((x_tiles(rows) + groups) as u32, 256, 0);
            config.grid_dim.1 = (of_n as u32).div_ceil(TILE as u32);
            // SAFETY: the operands are as long as their shapes say, which is asserted; the kernel takes no row beyond them.
            unsafe { launch.launch(config) }.map_err(|e| self.gpu.error(format!("grouped: {}", told(e))))?;
        }
        Ok(Floats::new(y))
    }
}

/// Whole tiles of so many rows.
fn x_tiles(rows: i32) -> i32 {
    rows / TILE as i32
}
