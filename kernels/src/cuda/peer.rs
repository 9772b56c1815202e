//! cuBLASLt as the peer of the products: the same operands, timed by the same clock.

use super::blas::{Library, Product, Way};
use super::device::Gpu;
use super::memory::Memory;
use super::products::{Blocks, Codes};
use crate::backend::BackendError;
use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};

/// What cuBLASLt may use beside its operands; PyTorch gives it as much.
const WORKSPACE: usize = 32 << 20;

/// How an operand is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scaling {
    /// By one factor.
    Whole,
    /// Rows by 128, weights by 128 x 128.
    Blocks,
}

/// cuBLASLt's products of the same operands.
#[derive(Debug)]
pub struct CublasPeer<'a> {
    gpu: &'a Gpu,
    library: Library,
    workspace: Memory<u8>,
    one: Memory<f32>,
}

impl<'a> CublasPeer<'a> {
    /// On a GPU.
    pub fn new(gpu: &'a Gpu) -> Result<Self, BackendError> {
        Ok(Self { gpu, library: Library::new(gpu)?, workspace: gpu.room(WORKSPACE)?, one: gpu.upload(&[1.0f32])? })
    }

    /// Median seconds of `times` block-scaled products, which have the operands' meaning; the result is in `y`. The columns
    /// are a multiple of 512: cuBLASLt wants rows of four blocks' scales.
    pub fn block_scaled(&self, times: usize, x: &Codes, w: &Blocks, y: &mut Memory<u16>) -> Result<f64, BackendError> {
        assert!(x.columns.is_multiple_of(512), "{} columns in rows of four blocks", x.columns);
        self.fp8(times, x, w, y, Scaling::Blocks)
    }

    /// Median seconds of the product of the same codes with one scale each: what the tensor cores give.
    pub fn tensor_wide(&self, x: &Codes, w: &Blocks, y: &mut Memory<u16>) -> Result<f64, BackendError> {
        self.fp8(1, x, w, y, Scaling::Whole)
    }

    fn fp8(
        &self,
        times: usize,
        x: &Codes,
        w: &Blocks,
        y: &mut Memory<u16>,
        scaling: Scaling,
    ) -> Result<f64, BackendError> {
        let (stream, shape) = (&self.gpu.stream, [x.rows, w.rows, x.columns]);
        let product = self.scaled(shape, x, w, scaling).map_err(|e| self.say(shape, e))?;
        assert_eq!(y.len(), x.rows * w.rows, "a result of {} x {}", x.rows, w.rows);
        let operands = [w.addresses(self.gpu)[0], x.codes.device_ptr(stream).0];
        self.time(times, shape, &product, operands, y)
    }

    /// Median seconds of the three products of `x_TI` and `w_OI` in FP32, in an order of sums of its own: the result, and
    /// the gradients of `x` and of `w` as if that were the result's.
    pub fn f32_products(&self, shape: [usize; 3], x: &Memory<f32>, w: &Memory<f32>) -> Result<[f64; 3], BackendError> {
        self.products(sys::cudaDataType_t::CUDA_R_32F, shape, x, w)
    }

    /// The same in BF16; the gradient of the weight in FP32, and not added to another.
    pub fn bf16_products(&self, shape: [usize; 3], x: &Memory<u16>, w: &Memory<u16>) -> Result<[f64; 3], BackendError> {
        self.products(sys::cudaDataType_t::CUDA_R_16BF, shape, x, w)
    }

    /// Operands of this kind; the gradient of the weight is in FP32.
    fn products<T: DeviceRepr>(
        &self,
        kind: sys::cudaDataType_t,
        [tokens, out, input]: [usize; 3],
        x: &Memory<T>,
        w: &Memory<T>,
    ) -> Result<[f64; 3], BackendError> {
        let shape = [tokens, out, input];
        assert_eq!((x.len(), w.len()), (tokens * input, out * input), "operands of a product");
        let stream = &self.gpu.stream;
        let (mut y, mut dx) = (self.gpu.room::<T>(tokens * out)?, self.gpu.room::<T>(tokens * input)?);
        let mut dw = self.gpu.room::<f32>(out * input)?;
        let product = |way, result| Product::new(way, shape, kind, result).map_err(|e| self.say(shape, e));
        let [of_x, of_w] = [x, w].map(|operand| operand.device_ptr(stream).0);
        let forward = self.time(1, shape, &product(Way::Forward, kind)?, [of_w, of_x], &mut y)?;
        let of_y = y.device_ptr(stream).0;
        let backward = self.time(1, shape, &product(Way::Input, kind)?, [of_w, of_y], &mut dx)?;
        let single = sys::cudaDataType_t::CUDA_R_32F;
        let weight = self.time(1, shape, &product(Way::Weight, single)?, [of_x, of_y], &mut dw)?;
        Ok([forward, backward, weight])
    }

    /// Median seconds of so many of a product, by the algorithm that cuBLASLt takes for the fastest.
    fn time<T: DeviceRepr>(
        &self,
        times: usize,
        shape: [usize; 3],
        product: &Product,
        [a, b]: [CUdeviceptr; 2],
        y: &mut Memory<T>,
    ) -> Result<f64, BackendError> {
        let say = |e| self.say(shape, e);
        let found = product.algorithms(&self.library, WORKSPACE, true, 1).map_err(say)?;
        let Some(best) = found.first() else {
            return Err(self.gpu.error(format!("cuBLASLt has no product of {shape:?}")));
        };
        let stream = &self.gpu.stream;
        let (out, _held) = y.device_ptr_mut(stream);
        let (on, workspace) = ((&self.library, stream.cu_stream().cast()), self.workspace.device_ptr(stream).0);
        self.gpu.seconds(20, || {
            // SAFETY: callers hold the lengths of what they pass against the product, and all lives until it is timed.
            let go = |_| unsafe { product.run(on, &best.algo, [a, b, out], false, (workspace, WORKSPACE)) };
            (0..times).try_for_each(go).map_err(say)
        })
    }

    fn say(&self, shape: [usize; 3], e: CublasError) -> BackendError {
        self.gpu.error(format!("cuBLASLt, {shape:?}: {e}"))
    }

    /// The product of E4M3 operands with their scales, rounded to BF16.
    fn scaled(&self, shape: [usize; 3], x: &Codes, w: &Blocks, scaling: Scaling) -> Result<Product, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let kinds = (sys::cudaDataType_t::CUDA_R_8F_E4M3, sys::cudaDataType_t::CUDA_R_16BF);
        let (stream, product) = (&self.gpu.stream, Product::new(Way::Forward, shape, kinds.0, kinds.1)?);
        let [of_weight, of_rows] = match scaling {
            Scaling::Whole => [self.one.device_ptr(stream).0; 2],
            Scaling::Blocks => [w.addresses(self.gpu)[1], x.scales.device_ptr(stream).0],
        };
        product.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, of_weight)?;
        product.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, of_rows)?;
        match scaling {
            Scaling::Blocks => {
                use sys::cublasLtMatmulMatrixScale_t as Mode;
                let blocks = Mode::CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F as i32;
                let tiles = Mode::CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F as i32;
                product.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, blocks)?;
                product.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, tiles)?;
            }
            // As PyTorch's fast accumulation.
            Scaling::Whole => product.set(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, 1i8)?,
        }
        Ok(product)
    }
}
