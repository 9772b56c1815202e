//! Products in FP8: operands in E4M3 with scales along their terms (technical report 3.3), made once for a handle and kept with it as
//! the CPU's are (`low/linear.rs`). Kernels: `hopper/fp8_gemm.cu`, `hopper/fp8_wgrad.cu`, and those that quantise.
//!
//! Operands have any shape. Columns are filled up with zeros to whole tiles, which changes no scale and no sum.

use super::CudaBackend;
use super::elements::by_element;
use super::tensors::{Buffer, Elements, nothing};
use crate::backend::{BackendError, Precision, Role};
use crate::cuda::device::run;
use crate::cuda::products::{Blocks, Codes, Groups, TILE};
use crate::cuda::sources::QUANTISE;
use crate::low::Scaling;
use crate::low::linear::Form;
use crate::tensor::{Place, Tensor};
use std::sync::Arc;

/// The most columns of a norm that is quantised as it is made: four rows twice in shared memory.
const NORM_COLUMNS_MAX: usize = 28_672;

/// Matrices, each with its codes.
type Quantised<const N: usize> = Result<[(Elements, Codes); N], BackendError>;

fn whole(columns: usize) -> usize {
    columns.next_multiple_of(TILE)
}

fn power(scaling: Scaling) -> bool {
    scaling == Scaling::PowerOfTwo
}

impl CudaBackend {
    /// How a role's activations and gradients are scaled, if its products are in FP8.
    pub(super) fn scalings(&self, role: Role) -> Option<[Scaling; 2]> {
        match Form::of(self.precision, role)? {
            Form::Rounded => None,
            Form::Quantised { x, dy } => Some([x, dy]),
        }
    }

    /// `x` times a weight's rows, or its columns if `turned`.
    pub(super) fn scaled(
        &self,
        x: &Tensor,
        scaling: Scaling,
        w: &Tensor,
        turned: bool,
    ) -> Result<Elements, BackendError> {
        let (n, k) = if turned { (w.columns(), w.rows()) } else { (w.rows(), w.columns()) };
        assert_eq!(x.columns(), k, "terms of a product");
        let (x, w) = (self.along_rows(x, scaling)?, self.weights(std::slice::from_ref(w), turned)?);
        let mut y = self.gpu.room(x.rows * w.rows)?;
        self.gpu.fp8_linear(x, &w, &mut y)?;
        self.cut(Elements::bf16(y), w.rows, [x.rows, n])
    }

    /// The same of groups of rows, each with its own weight. `n`: columns of the result.
    pub(super) fn scaled_grouped(
        &self,
        x: &Tensor,
        scaling: Scaling,
        counts: &Tensor,
        (w, turned): (&[Tensor], bool),
        n: usize,
    ) -> Result<Elements, BackendError> {
        if w.is_empty() {
            return self.room(x.rows(), 0);
        }
        let (x, w) = (self.along_rows(x, scaling)?, self.weights(w, turned)?);
        let groups = Groups::new(&self.gpu, &self.numbers(counts)?)?;
        let mut y = self.gpu.room(x.rows * w.rows)?;
        self.gpu.fp8_grouped(x, &w, &groups, &mut y)?;
        self.cut(Elements::bf16(y), w.rows, [x.rows, n])
    }

    /// `dy_TO, x_TI -> dw_OI` in FP32.
    pub(super) fn scaled_weight(
        &self,
        dy: &Tensor,
        x: &Tensor,
        [of_x, of_dy]: [Scaling; 2],
    ) -> Result<Elements, BackendError> {
        let groups = Groups::new(&self.gpu, &[dy.rows() as u32])?;
        let (a, b) = (self.along_columns(dy, of_dy, &groups)?, self.again_along_columns(x, of_x, &groups)?);
        // It is added to what is there.
        let mut dw = self.gpu.zeros(a.rows * b.rows)?;
        self.gpu.fp8_weight_gradient(a, b, &groups, &mut dw)?;
        self.cut(Elements::f32(dw), b.rows, [dy.columns(), x.columns()])
    }

    /// The first rows and columns of a matrix whose rows are `width` long: itself, if it has no other columns.
    fn cut(&self, made: Elements, width: usize, [rows, columns]: [usize; 2]) -> Result<Elements, BackendError> {
        let made = made.part(0, rows * width);
        if width == columns {
            return Ok(made);
        }
        let y = self.room_in(rows * columns, made.is_low())?;
        self.copy_columns(&made, [width, 0, columns], &y, [columns, 0])?;
        Ok(y)
    }

    /// Elements in BF16 with whole tiles of columns.
    fn filled_up(&self, x: &Tensor) -> Result<Elements, BackendError> {
        let (of_x, columns) = (self.activation(x)?, x.columns());
        if columns == whole(columns) {
            return Ok(of_x);
        }
        let y = Elements::bf16(self.gpu.zeros(x.rows() * whole(columns))?);
        self.copy_columns(&of_x, [columns, 0, columns], &y, [whole(columns), 0])?;
        Ok(y)
    }

    fn codes_in<'a>(
        &self,
        place: &'a Place,
        make: impl FnOnce() -> Result<Codes, BackendError>,
    ) -> Result<&'a Codes, BackendError> {
        match self.kept(place, || make().map(Buffer::Codes))? {
            Buffer::Codes(codes) => Ok(codes),
            other => unreachable!("codes, not {other:?}"),
        }
    }

    /// In tiles along its rows.
    fn along_rows<'a>(&self, x: &'a Tensor, scaling: Scaling) -> Result<&'a Codes, BackendError> {
        self.codes_in(&x.forms().on_device.along_rows[scaling as usize], || {
            let mut codes = self.gpu.codes(x.rows(), whole(x.columns()))?;
            self.gpu.quantise_rows(&self.filled_up(x)?.words(), &mut codes, power(scaling))?;
            Ok(codes)
        })
    }

    /// A gradient in tiles along its columns, which are the rows of a weight gradient.
    fn along_columns<'a>(&self, dy: &'a Tensor, scaling: Scaling, all: &Groups) -> Result<&'a Codes, BackendError> {
        self.codes_in(&dy.forms().on_device.along_columns[scaling as usize], || {
            let mut codes = self.gpu.codes(whole(dy.columns()), all.filled())?;
            self.gpu.turn(&self.filled_up(dy)?.words(), all, &mut codes, power(scaling))?;
            Ok(codes)
        })
    }

    /// An activation is kept in tiles along its rows: for a weight gradient those are quantised once more.
    fn again_along_columns<'a>(
        &self,
        x: &'a Tensor,
        scaling: Scaling,
        all: &Groups,
    ) -> Result<&'a Codes, BackendError> {
        self.codes_in(&x.forms().on_device.again[scaling as usize], || {
            let rows = self.along_rows(x, scaling)?;
            let mut codes = self.gpu.codes(rows.columns, all.filled())?;
            self.gpu.turn_codes(rows, all, &mut codes, power(scaling))?;
            Ok(codes)
        })
    }

    /// Weights, one after another. Those that have no codes yet are quantised side by side: so a grouped product finds the
    /// weights of its experts, and reads them where they are.
    fn weights(&self, all: &[Tensor], turned: bool) -> Result<Blocks, BackendError> {
        fn place(w: &Tensor) -> &Place {
            &w.forms().on_device.blocks
        }
        let missing: Vec<&Tensor> = all.iter().filter(|w| place(w).get().is_none()).collect();
        if let Some(first) = missing.first() {
            // In FP32 only as long as it takes.
            let floats = missing.iter().map(|w| match w.buffer() {
                None => self.gpu.upload::<f32>(&w.values()),
                Some(_) => self.gpu.joined(&[self.wide(w)?.floats()]),
            });
            let shape = [first.rows(), first.columns()];
            let mut both = self.gpu.blocks(missing.len(), shape)?;
            self.gpu.quantise_blocks(floats, shape, &mut both)?;
            for (at, w) in missing.iter().enumerate() {
                self.kept(place(w), || Ok(Buffer::Weight(both.each_ref().map(|of| of.one(at)))))?;
            }
        }
        let kept = |w| match self.kept(place(w), || unreachable!("it is there")) {
            Ok(Buffer::Weight(both)) => Ok(&both[usize::from(turned)]),
            Ok(other) => unreachable!("a weight, not {other:?}"),
            Err(error) => Err(error),
        };
        let found = all.iter().map(kept).collect::<Result<Vec<_>, _>>()?;
        Blocks::stacked(&self.gpu, &found)
    }
}

/// What is quantised as it is made: its products will ask for it, all with exact scales.
impl CudaBackend {
    /// Whether a SwiGLU of so many columns is.
    pub(super) fn quantises(&self, columns: usize) -> bool {
        self.precision == Precision::Fp8 && columns.is_multiple_of(TILE) && columns > 0
    }

    /// Whether a norm is.
    pub(super) fn quantises_norm(&self, columns: usize) -> bool {
        self.quantises(columns) && columns <= NORM_COLUMNS_MAX
    }

    /// Handles that keep their codes, or the error of the operation for later.
    pub(super) fn with_codes<const N: usize>(&self, like: &Tensor, made: Quantised<N>) -> [Tensor; N] {
        let [rows, columns] = [like.rows(), like.columns()];
        match made {
            Ok(made) => made.map(|(elements, codes)| {
                let y = elements.tensor(rows, columns);
                let place = &y.forms().on_device.along_rows[Scaling::Exact as usize];
                place.set(Arc::new(Buffer::Codes(codes))).expect("a new handle keeps nothing");
                y
            }),
            Err(error) => {
                self.fail(error);
                [(); N].map(|()| nothing(rows, columns))
            }
        }
    }

    pub(super) fn norm_quantised(&self, x: &Tensor, w: &Tensor, eps: f32) -> Quantised<1> {
        let (of_x, of_w, [rows, columns]) = (self.activation(x)?, self.wide(w)?, [x.rows(), x.columns()]);
        let (mut y, mut codes) = (self.gpu.room(rows * columns)?, self.gpu.codes(rows, columns)?);
        let out = (&mut y, &mut codes, &mut self.gpu.room(rows)?);
        self.gpu.rms_norm_quantised(&of_x.words(), &of_w.floats(), out, eps)?;
        Ok([(Elements::bf16(y), codes)])
    }

    pub(super) fn gated_quantised(&self, gate: &Tensor, up: &Tensor) -> Quantised<1> {
        let (of_gate, of_up, [rows, columns]) =
            (self.activation(gate)?, self.activation(up)?, [gate.rows(), gate.columns()]);
        let (mut h, mut codes) = (self.gpu.room(rows * columns)?, self.gpu.codes(rows, columns)?);
        self.gpu.swiglu_quantised(&of_gate.words(), &of_up.words(), &mut h, &mut codes)?;
        Ok([(Elements::bf16(h), codes)])
    }

    pub(super) fn gated_gradients_quantised(&self, gate: &Tensor, up: &Tensor, dh: &Tensor) -> Quantised<3> {
        let [h] = self.gated_quantised(gate, up)?;
        let [of_gate, of_up, of_dh] = [self.activation(gate)?, self.activation(up)?, self.activation(dh)?];
        let ([rows, columns], n) = ([gate.rows(), gate.columns()], gate.rows() * gate.columns());
        let (mut dgate, mut dup) = (self.gpu.room(n)?, self.gpu.room(n)?);
        let (mut codes_gate, mut codes_up) = (self.gpu.codes(rows, columns)?, self.gpu.codes(rows, columns)?);
        self.gpu.swiglu_backward_quantised(
            [&of_gate.words(), &of_up.words(), &of_dh.words()],
            [&mut dgate, &mut dup],
            [&mut codes_gate, &mut codes_up],
        )?;
        Ok([h, (Elements::bf16(dgate), codes_gate), (Elements::bf16(dup), codes_up)])
    }
}

/// The operations by themselves, in any precision. No layer asks for them.
impl CudaBackend {
    pub(super) fn to_codes(&self, x: &Tensor) -> Result<Tensor, BackendError> {
        let (of_x, rows, columns) = (self.wide(x)?, x.rows(), x.columns());
        let mut codes = self.gpu.codes(rows, whole(columns))?;
        let [r, _, stride] = codes.sizes();
        let (shape, c, of_x) = (((rows * columns.div_ceil(TILE)).div_ceil(8), 256, 0), columns as i32, &of_x.address());
        if rows * columns > 0 {
            run!(
                self.gpu,
                QUANTISE,
                "quantise_floats",
                shape,
                of_x,
                &mut codes.codes,
                &mut codes.scales,
                &r,
                &c,
                &stride
            )?;
        }
        Ok(Tensor::device(rows, columns, Arc::new(Buffer::Codes(codes))))
    }

    pub(super) fn of_codes(&self, x: &Tensor) -> Result<Elements, BackendError> {
        let Some(Buffer::Codes(codes)) = self.behind(x) else {
            return Err(self.gpu.error(format!("{x:?} has no codes on this device")));
        };
        let y = self.wide_room(x.rows(), x.columns())?;
        let ([_, _, stride], count, columns) = (codes.sizes(), y.len() as u64, x.columns() as i32);
        let (shape, to) = (by_element(y.len()), &y.address());
        run!(self.gpu, QUANTISE, "dequantise_rows", shape, &codes.codes, &codes.scales, to, &count, &columns, &stride)?;
        Ok(y)
    }
}
