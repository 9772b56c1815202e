//! Linear layers in BF16 by cuBLASLt, whose rows do not depend on their batch.
//!
//! Left to itself cuBLASLt chooses an algorithm by all three sizes, and algorithms have different orders of sums. Here one is
//! chosen for each product of a weight `[O, I]`, the one that should be the fastest for [`ASKED`] tokens, and taken for any
//! number of them. An algorithm is a tile, its stages and a cluster; which of a tile's rows are there changes nothing for the
//! others. None is taken that could cut a sum in parts: no split, no reduction, no workspace for it.
//!
//! A gradient of a weight is a sum over tokens, in an order that depends on their number, and on nothing else.
//!
//! The choice is the library's: another version of it, or another card, may choose otherwise and make other bits. So
//! [`Dense::library`] is part of what nodes must have in common.

use super::blas::{Library, Product, Way};
use super::device::Gpu;
use super::memory::Memory;
use crate::backend::BackendError;
use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{DevicePtr, DevicePtrMut};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Tokens that an algorithm is chosen for.
const ASKED: usize = 4096;
/// Algorithms that are looked at, at most.
const CANDIDATES: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Dense {
    gpu: Arc<Gpu>,
    library: Library,
    /// What was chosen, by product, outputs and inputs.
    chosen: Mutex<BTreeMap<(Way, usize, usize), sys::cublasLtMatmulAlgo_t>>,
}

impl Dense {
    /// On a GPU.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, BackendError> {
        Ok(Self { gpu: Arc::clone(gpu), library: Library::new(gpu)?, chosen: Mutex::default() })
    }

    /// The version of cuBLASLt that chooses.
    pub fn library(&self) -> usize {
        self.library.version()
    }

    /// `x_TI, w_OI -> y_TO`, FP32 sums rounded to BF16; sizes are `[T, O, I]`, and O and I multiples of 8.
    pub fn forward(
        &self,
        [tokens, out, input]: [usize; 3],
        x: &Memory<u16>,
        w: &Memory<u16>,
        y: &mut Memory<u16>,
    ) -> Result<(), BackendError> {
        assert_eq!((x.len(), w.len(), y.len()), (tokens * input, out * input, tokens * out), "matrices of a product");
        let stream = &self.gpu.stream;
        let ((of_w, _w), (of_x, _x), (of_y, _y)) =
            (w.device_ptr(stream), x.device_ptr(stream), y.device_ptr_mut(stream));
        self.product(Way::Forward, [tokens, out, input], [of_w, of_x, of_y])
    }

    /// `dy_TO, w_OI -> dx_TI`, as the result.
    pub fn backward_input(
        &self,
        [tokens, out, input]: [usize; 3],
        dy: &Memory<u16>,
        w: &Memory<u16>,
        dx: &mut Memory<u16>,
    ) -> Result<(), BackendError> {
        assert_eq!((dy.len(), w.len(), dx.len()), (tokens * out, out * input, tokens * input), "matrices of a product");
        let stream = &self.gpu.stream;
        let ((of_w, _w), (of_dy, _dy)) = (w.device_ptr(stream), dy.device_ptr(stream));
        let (of_dx, _dx) = dx.device_ptr_mut(stream);
        self.product(Way::Input, [tokens, out, input], [of_w, of_dy, of_dx])
    }

    /// `dw_OI += dy_TO^T x_TI` in FP32.
    pub fn backward_weight(
        &self,
        [tokens, out, input]: [usize; 3],
        dy: &Memory<u16>,
        x: &Memory<u16>,
        dw: &mut Memory<f32>,
    ) -> Result<(), BackendError> {
        assert_eq!((dy.len(), x.len(), dw.len()), (tokens * out, tokens * input, out * input), "matrices of a product");
        let stream = &self.gpu.stream;
        let ((of_x, _x), (of_dy, _dy)) = (x.device_ptr(stream), dy.device_ptr(stream));
        let (of_dw, _dw) = dw.device_ptr_mut(stream);
        self.product(Way::Weight, [tokens, out, input], [of_x, of_dy, of_dw])
    }

    /// A product of matrices whose lengths the callers have asserted, and which begin at multiples of 16 bytes.
    pub(super) fn product(&self, way: Way, shape: [usize; 3], matrices: [CUdeviceptr; 3]) -> Result<(), BackendError> {
        let [tokens, out, input] = shape;
        let fits = out.is_multiple_of(8) && input.is_multiple_of(8) && out > 0 && input > 0;
        assert!(fits, "a weight of {out} x {input}, in eights");
        if tokens == 0 {
            return Ok(());
        }
        let gpu = &self.gpu;
        gpu.bind()?;
        let say = |e: CublasError| gpu.error(format!("cuBLASLt, {way:?} of {shape:?}: {e}"));
        let algorithm = self.algorithm(way, out, input)?;
        let product = described(way, shape).map_err(say)?;
        let on = (&self.library, gpu.stream.cu_stream().cast());
        // SAFETY: the product is of matrices as long as the callers assert, which live as long as their borrows; it needs no
        // workspace.
        unsafe { product.run(on, &algorithm, matrices, way == Way::Weight, (0, 0)) }.map_err(say)
    }

    /// The one algorithm of a product of a weight.
    fn algorithm(&self, way: Way, out: usize, input: usize) -> Result<sys::cublasLtMatmulAlgo_t, BackendError> {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(algorithm) = chosen.get(&(way, out, input)) {
            return Ok(*algorithm);
        }
        let say = |e: CublasError| self.gpu.error(format!("cuBLASLt, {way:?} of {out} x {input}: {e}"));
        let product = described(way, [ASKED, out, input]).map_err(say)?;
        let found = product.algorithms(&self.library, 0, false, CANDIDATES).map_err(say)?;
        for candidate in found {
            if candidate.workspaceSize == 0 && whole(&candidate.algo).map_err(say)? {
                chosen.insert((way, out, input), candidate.algo);
                return Ok(candidate.algo);
            }
        }
        Err(self.gpu.error(format!("cuBLASLt has no {way:?} of {out} x {input} that leaves sums whole")))
    }
}

/// A product of BF16 operands, to BF16 or to the FP32 of a weight's gradient.
fn described(way: Way, shape: [usize; 3]) -> Result<Product, CublasError> {
    use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
    Product::new(way, shape, CUDA_R_16BF, if way == Way::Weight { CUDA_R_32F } else { CUDA_R_16BF })
}

/// Whether an algorithm adds each sum in one place.
fn whole(algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<bool, CublasError> {
    use sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;
    let get = |attribute| {
        let (mut value, mut written) = (0u32, 0);
        // SAFETY: both attributes are words, and the pointers are of live ones.
        unsafe {
            sys::cublasLtMatmulAlgoConfigGetAttribute(
                algorithm,
                attribute,
                (&raw mut value).cast(),
                size_of::<u32>(),
                &raw mut written,
            )
        }
        .result()?;
        Ok(value)
    };
    // A number of parts of 0 or 1 is no split.
    Ok(get(Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM)? <= 1
        && get(Attribute::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)? == 0)
}
