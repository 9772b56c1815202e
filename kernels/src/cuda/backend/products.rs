//! Products. In BF16 by cuBLASLt (`dense.rs`); those of the gate, and all in FP32, by the gate's kernels (`hopper/gate.cu`). Both take
//! weights in eights; others, and parts of matrices, go through a plain one in FP32 (`hopper/product.cu`). In FP8: `scaled.rs`.

use super::CudaBackend;
use super::tensors::Elements;
use crate::backend::{BackendError, Role};
use crate::cuda::blas::Way;
use crate::cuda::device::launch_of;
use crate::cuda::failure::told;
use crate::cuda::sources::PRODUCT;
use crate::tensor::Tensor;
use cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};

/// Rows and columns of a tile of the plain product.
const TILE: usize = 64;

/// A matrix of FP32 in memory: element `(i, j)` lies at `i * row + j * column` elements from `at`.
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

    /// From a row on.
    pub(super) fn after_rows(self, row: usize) -> Self {
        Self { at: self.at + 4 * (row as u64) * self.row as u64, ..self }
    }
}

/// `y_MN = a_MK b_NK^T`, added to what is there if `add`; as many as a launch says, whose matrices lie steps apart. The kernel's
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

/// Whether fast kernels take a weight of this shape, with operands that begin at these places.
fn in_eights(shape: [usize; 2], operands: [&Elements; 2]) -> bool {
    let aligned = |x: &Elements| x.address().is_multiple_of(16);
    shape.iter().all(|n| *n > 0 && n.is_multiple_of(8)) && operands.into_iter().all(aligned)
}

impl CudaBackend {
    /// Whether a role's products have BF16 operands.
    fn rounds(&self, role: Role) -> bool {
        self.low() && role != Role::Gate
    }

    /// `x_TI, w_OI -> y_TO`. Logits of a gate are FP32.
    pub(super) fn product(&self, x: &Tensor, w: &Tensor, role: Role) -> Result<Elements, BackendError> {
        let ([t, i, o], rounds) = ([x.rows(), x.columns(), w.rows()], self.rounds(role));
        assert_eq!(i, w.columns(), "columns of a product");
        if let Some([scaling, _]) = self.scalings(role) {
            return self.scaled(x, scaling, w, false);
        }
        let (of_x, of_w) = (self.activation(x)?, self.elements(w, rounds)?);
        let y = self.room_in(t * o, rounds)?;
        if !in_eights([o, i], [&of_x, &of_w]) {
            let (of_x, of_w) = (self.in_form(&of_x, false)?, self.in_form(&of_w, false)?);
            let made = self.plain(View::rows(of_x.address(), i), View::rows(of_w.address(), i), [t, o, i])?;
            return self.in_form(&made, rounds);
        }
        if let (true, Some(dense)) = (rounds, &self.dense) {
            dense.product(Way::Forward, [t, o, i], [of_w.address(), of_x.address(), y.address()])?;
            return Ok(y);
        }
        let (mut room, mut y) = (self.gpu.room(self.gpu.gate_room([t, o, i]))?, self.gpu.room(t * o)?);
        if self.low() {
            self.gpu.gate_logits([t, o, i], &of_x.words(), &of_w.floats(), &mut room, &mut y)?;
        } else {
            self.gpu.gate_logits([t, o, i], &of_x.floats(), &of_w.floats(), &mut room, &mut y)?;
        }
        Ok(Elements::f32(y))
    }

    /// `dy_TO, w_OI -> dx_TI`. Gradients of a gate's logits are FP32.
    pub(super) fn product_input(&self, dy: &Tensor, w: &Tensor, role: Role) -> Result<Elements, BackendError> {
        let ([t, o, i], rounds) = ([dy.rows(), w.rows(), w.columns()], self.rounds(role));
        assert_eq!(o, dy.columns(), "columns of a gradient");
        if let Some([_, scaling]) = self.scalings(role) {
            return self.scaled(dy, scaling, w, true);
        }
        let (of_dy, of_w) = (self.elements(dy, rounds)?, self.elements(w, rounds)?);
        if !in_eights([o, i], [&of_dy, &of_w]) {
            let (of_dy, of_w) = (self.in_form(&of_dy, false)?, self.in_form(&of_w, false)?);
            let b = View::rows(of_w.address(), i).transposed();
            return self.in_form(&self.plain(View::rows(of_dy.address(), o), b, [t, i, o])?, self.low());
        }
        if let (true, Some(dense)) = (rounds, &self.dense) {
            let dx = self.room_in(t * i, true)?;
            dense.product(Way::Input, [t, o, i], [of_w.address(), of_dy.address(), dx.address()])?;
            return Ok(dx);
        }
        if self.low() {
            let mut dx = self.gpu.room::<u16>(t * i)?;
            self.gpu.gate_input_gradient([t, o, i], &of_dy.floats(), &of_w.floats(), &mut dx)?;
            return Ok(Elements::bf16(dx));
        }
        let mut dx = self.gpu.room::<f32>(t * i)?;
        self.gpu.gate_input_gradient([t, o, i], &of_dy.floats(), &of_w.floats(), &mut dx)?;
        Ok(Elements::f32(dx))
    }

    /// `dy_TO, x_TI -> dw_OI`, in FP32.
    pub(super) fn product_weight(&self, dy: &Tensor, x: &Tensor, role: Role) -> Result<Elements, BackendError> {
        let ([t, o, i], rounds) = ([dy.rows(), dy.columns(), x.columns()], self.rounds(role));
        assert_eq!(t, x.rows(), "rows of a weight's gradient");
        if let Some(scalings) = self.scalings(role) {
            return self.scaled_weight(dy, x, scalings);
        }
        let (of_dy, of_x) = (self.elements(dy, rounds)?, self.activation(x)?);
        if !in_eights([o, i], [&of_dy, &of_x]) {
            let (of_dy, of_x) = (self.in_form(&of_dy, false)?, self.in_form(&of_x, false)?);
            let (a, b) = (View::rows(of_dy.address(), o), View::rows(of_x.address(), i));
            return self.plain(a.transposed(), b.transposed(), [o, i, t]);
        }
        if let (true, Some(dense)) = (rounds, &self.dense) {
            // It is added to what is there.
            let dw = Elements::f32(self.gpu.zeros(o * i)?);
            dense.product(Way::Weight, [t, o, i], [of_x.address(), of_dy.address(), dw.address()])?;
            return Ok(dw);
        }
        let (mut room, mut dw) = (self.gpu.room(self.gpu.gate_room([t, o, i]))?, self.gpu.room(o * i)?);
        if self.low() {
            self.gpu.gate_weight_gradient([t, o, i], &of_dy.floats(), &of_x.words(), &mut room, &mut dw)?;
        } else {
            self.gpu.gate_weight_gradient([t, o, i], &of_dy.floats(), &of_x.floats(), &mut room, &mut dw)?;
        }
        Ok(Elements::f32(dw))
    }

    /// One product of matrices that the caller has held against the sizes.
    fn plain(&self, a: View, b: View, [m, n, k]: [usize; 3]) -> Result<Elements, BackendError> {
        let y = self.room_in(m * n, false)?;
        let sizes = [m, n, k].map(|n| n as i32);
        self.products(Product { a, b, y: y.address(), y_row: n as i64, steps: [0; 3], sizes, add: 0 }, 1)?;
        Ok(y)
    }

    /// Products of matrices that callers have held against their sizes.
    pub(super) fn products(&self, product: Product, count: usize) -> Result<(), BackendError> {
        let [m, n, _] = product.sizes.map(|n| n as usize);
        if m * n * count == 0 {
            return Ok(());
        }
        let tiles = [m, n].map(|n| n.div_ceil(TILE) as u32);
        let function = self.gpu.function(&PRODUCT, "product", 0)?;
        let mut launch = self.gpu.stream.launch_builder(&function);
        launch.arg(&product);
        let config =
            LaunchConfig { grid_dim: (tiles[0], tiles[1], count as u32), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the callers have held the matrices against the sizes; all work is on one stream.
        unsafe { launch.launch(config) }.map(drop).map_err(|e| self.gpu.error(format!("product: {}", told(e))))
    }

    /// Rows of `x` in groups of `counts`, each with its own weight `[O, I]`: results, or gradients of the input if `inputs`. `n` and
    /// `k`: columns of results, and terms.
    pub(super) fn grouped(
        &self,
        x: &Tensor,
        counts: &Tensor,
        (w, role): (&[Tensor], Role),
        [n, k]: [usize; 2],
        inputs: bool,
    ) -> Result<Elements, BackendError> {
        let weight = if inputs { (k, n) } else { (n, k) };
        assert!(w.iter().all(|w| (w.rows(), w.columns()) == weight), "weights of one shape: {w:?}");
        assert_eq!(counts.columns(), w.len(), "a weight of every group");
        if let Some(scalings) = self.scalings(role) {
            return self.scaled_grouped(x, scalings[usize::from(inputs)], counts, (w, inputs), n);
        }
        let (of_x, low) = (self.activation(x)?, self.low());
        let weights = w.iter().map(|w| self.elements(w, low)).collect::<Result<Vec<_>, _>>()?;
        let eights = weights.iter().all(|w| in_eights([n, k], [&of_x, w]));
        if let (true, Some(dense)) = (eights, &self.dense) {
            let counts = self.numbers(counts)?;
            // Rows that no group has are zeros.
            let (y, mut from) = (Elements::bf16(self.gpu.zeros(x.rows() * n)?), 0);
            for (count, w) in counts.iter().map(|n| *n as usize).zip(&weights) {
                let (of, to) = (of_x.part(from * k, count * k), y.part(from * n, count * n));
                let (way, [out, input]) = if inputs { (Way::Input, [k, n]) } else { (Way::Forward, [n, k]) };
                dense.product(way, [count, out, input], [w.address(), of.address(), to.address()])?;
                from += count;
            }
            return Ok(y);
        }
        let weights = weights.iter().map(|w| self.in_form(w, false)).collect::<Result<Vec<_>, _>>()?;
        let y = self.plain_grouped(&self.in_form(&of_x, false)?, counts, &weights, [x.rows(), n, k], inputs)?;
        self.in_form(&y, low)
    }

    /// The same in FP32, whatever the shapes; counts stay on the device.
    fn plain_grouped(
        &self,
        x: &Elements,
        counts: &Tensor,
        weights: &[Elements],
        [rows, n, k]: [usize; 3],
        inputs: bool,
    ) -> Result<Elements, BackendError> {
        use cudarc::driver::DevicePtr;
        let places: Vec<u64> = weights.iter().map(Elements::address).collect();
        let (places, y) = (self.gpu.upload(&places)?, Elements::f32(self.gpu.zeros(rows * n)?));
        if y.len() == 0 {
            return Ok(y);
        }
        let (stream, indices) = (&self.gpu.stream, self.indices(counts)?);
        let (weights, counts) = (places.device_ptr(stream).0, indices.data.device_ptr(stream).0);
        let b = if inputs { View::rows(0, n).transposed() } else { View::rows(0, k) };
        // No more tiles of rows than whole ones, and one of each group.
        let tiles = (rows / TILE + places.len(), n.div_ceil(TILE));
        let [groups, rows, n, k] = [places.len(), rows, n, k].map(|n| n as i32);
        let (x, to) = (x.address(), y.address());
        let argument = Grouped { x, weights, counts, y: to, b_row: b.row, b_column: b.column, groups, rows, n, k };
        let function = self.gpu.function(&PRODUCT, "grouped", 0)?;
        let mut launch = stream.launch_builder(&function);
        launch.arg(&argument);
        let mut config = launch_of(tiles.0 as u32, 256, 0);
        config.grid_dim.1 = tiles.1 as u32;
        // SAFETY: the operands are as long as the caller's shapes say, which it asserts; the kernel takes no row beyond them.
        unsafe { launch.launch(config) }.map_err(|e| self.gpu.error(format!("grouped: {}", told(e))))?;
        Ok(y)
    }
}
