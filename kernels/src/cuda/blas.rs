//! cuBLASLt's handle, and descriptions of its products. It counts by column: a row-major matrix is its transposed, so the
//! operands change places and a weight comes first.

use super::device::Gpu;
use super::memory::enter;
use crate::backend::BackendError;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdeviceptr;
use std::ffi::c_void;
use std::sync::Arc;

/// Bytes at whose multiples matrices begin, at least: rows of others do, if they are of whole eights of BF16.
const ALIGNMENT: u32 = 16;

/// cuBLASLt on one GPU.
#[derive(Debug)]
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    /// In which the handle was made, and is destroyed.
    context: Arc<CudaContext>,
}

// SAFETY: by its documentation the library may be called with one handle from any thread, also at the same time.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// The GPU's context is the thread's from here on: the handle is made in it.
    pub(super) fn new(gpu: &Gpu) -> Result<Self, BackendError> {
        gpu.bind()?;
        let handle = result::create_handle().map_err(|e| gpu.error(e))?;
        Ok(Self { handle, context: Arc::clone(gpu.stream.context()) })
    }

    /// Its number.
    #[expect(clippy::unused_self, reason = "the library is known to be there once it has made a handle")]
    pub(super) fn version(&self) -> usize {
        // SAFETY: it has no arguments, and the library is there: it made the handle.
        unsafe { sys::cublasLtGetVersion() }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        enter(&self.context);
        // SAFETY: the handle was made by `new` and is nobody else's. A failure leaves nothing to be done.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// The three products of a linear layer with `w_OI`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// `w_OI, x_TI -> y_TO`.
    Forward,
    /// `w_OI, dy_TO -> dx_TI`.
    Input,
    /// `x_TI, dy_TO -> dw_OI`.
    Weight,
}

impl Way {
    /// Rows and columns of the operands and of the result as cuBLASLt sees them, and whether it turns the operands.
    fn matrices(self, [tokens, out, input]: [usize; 3]) -> ([[usize; 2]; 3], [bool; 2]) {
        match self {
            Self::Forward => ([[input, out], [input, tokens], [out, tokens]], [true, false]),
            Self::Input => ([[input, out], [out, tokens], [input, tokens]], [false, false]),
            Self::Weight => ([[input, tokens], [out, tokens], [input, out]], [false, true]),
        }
    }
}

/// A product that is described; its memory is cuBLASLt's and freed with it.
#[derive(Debug)]
pub(super) struct Product {
    description: sys::cublasLtMatmulDesc_t,
    /// Of the operands and of the result.
    layouts: Vec<sys::cublasLtMatrixLayout_t>,
}

impl Product {
    /// Of `[T, O, I]`, with operands and a result of these kinds and FP32 sums.
    pub(super) fn new(
        way: Way,
        shape: [usize; 3],
        operands: sys::cudaDataType_t,
        of_result: sys::cudaDataType_t,
    ) -> Result<Self, CublasError> {
        let (matrices, turned) = way.matrices(shape);
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let mut product = Self { description: result::create_matmul_desc(compute, scale)?, layouts: Vec::new() };
        for ([rows, columns], kind) in matrices.into_iter().zip([operands, operands, of_result]) {
            product.layouts.push(result::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64)?);
        }
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(turned[0]))?;
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(turned[1]))?;
        Ok(product)
    }

    /// An attribute, by a value of the size that cuBLASLt gives it.
    pub(super) fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: T,
    ) -> Result<(), CublasError> {
        let size = size_of::<T>();
        // SAFETY: the description is alive, and the value lives until the end of the call.
        unsafe { result::set_matmul_desc_attribute(self.description, attribute, (&raw const value).cast(), size) }
    }

    /// At most `count` algorithms that use no more than so many bytes besides, the fastest first as cuBLASLt guesses.
    /// `split`: they may cut a sum and add its parts, and count on matrices that begin where allocations do.
    pub(super) fn algorithms(
        &self,
        library: &Library,
        workspace: usize,
        split: bool,
        count: usize,
    ) -> Result<Vec<sys::cublasLtMatmulHeuristicResult_t>, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref()?;
        let nothing = sys::cublasLtMatmulHeuristicResult_t {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let (mut found, mut length) = (vec![nothing; count], 0);
        let whole = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        let any = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_MASK as u32;
        let schemes = if split { any } else { whole };
        let [a, b, y] = self.layouts();
        // SAFETY: everything was made by cuBLASLt and is alive; there is room for `count` results.
        let done = unsafe {
            let bytes = (&raw const workspace).cast();
            let set = |attribute, value, size| result::set_matmul_pref_attribute(preference, attribute, value, size);
            let done = set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes, 8)
                .and_then(|()| {
                    let mask = (&raw const schemes).cast();
                    set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, mask, 4)
                })
                .and_then(|()| {
                    use Attribute as Of;
                    if split {
                        return Ok(());
                    }
                    let bytes = ALIGNMENT;
                    let alignment = (&raw const bytes).cast();
                    let all = [
                        Of::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                        Of::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                        Of::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                        Of::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                    ];
                    all.into_iter().try_for_each(|of| set(of, alignment, 4))
                })
                .and_then(|()| {
                    let (to, count, length) = (found.as_mut_ptr(), count as i32, &raw mut length);
                    let product = self.description;
                    sys::cublasLtMatmulAlgoGetHeuristic(
                        library.handle,
                        product,
                        a,
                        b,
                        y,
                        y,
                        preference,
                        count,
                        to,
                        length,
                    )
                    .result()
                });
            result::destroy_matmul_pref(preference).and(done)
        };
        done?;
        found.truncate(length.max(0) as usize);
        found.retain(|f| f.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(found)
    }

    /// `y = a b`, added to what is there if `add`, on a stream.
    ///
    /// # Safety
    /// The operands and the result are as large as the description says and live until the stream is past this; so does the
    /// workspace, which has as many bytes as said.
    pub(super) unsafe fn run(
        &self,
        (library, stream): (&Library, sys::cudaStream_t),
        algorithm: &sys::cublasLtMatmulAlgo_t,
        [a, b, y]: [CUdeviceptr; 3],
        add: bool,
        (workspace, bytes): (CUdeviceptr, usize),
    ) -> Result<(), CublasError> {
        let (alpha, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let [of_a, of_b, of_y] = self.layouts();
        // SAFETY: the description and its layouts are alive; the rest is the caller's promise.
        unsafe {
            result::matmul(
                library.handle,
                self.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                a as *const c_void,
                of_a,
                b as *const c_void,
                of_b,
                y as *const c_void,
                of_y,
                y as *mut c_void,
                of_y,
                algorithm,
                workspace as *mut c_void,
                bytes,
                stream,
            )
        }
    }

    fn layouts(&self) -> [sys::cublasLtMatrixLayout_t; 3] {
        [self.layouts[0], self.layouts[1], self.layouts[2]]
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: all were made by `new` and are not used afterwards. A failure leaves nothing to be done.
        unsafe {
            for layout in &self.layouts {
                let _ = result::destroy_matrix_layout(*layout);
            }
            let _ = result::destroy_matmul_desc(self.description);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_fit() {
        for way in [Way::Forward, Way::Input, Way::Weight] {
            let ([a, b, y], turned) = way.matrices([2, 3, 5]);
            let [a, b] = [(a, turned[0]), (b, turned[1])].map(|([r, c], turned)| if turned { [c, r] } else { [r, c] });
            assert_eq!((a[1], [a[0], b[1]]), (b[0], y), "{way:?}");
        }
    }
}
