//! What benches need beside the kernels: data on the GPU, times by its own clock, and what peers and memory reach.

use super::device::{Gpu, launch_of};
use super::products::{Blocks, Codes};
use super::sources::READ;
use crate::backend::BackendError;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, PushKernelArg, sys as driver};
use std::ffi::c_void;

/// Bytes that push everything else out of the second-level cache (50 MB).
const FLUSH: usize = 256 << 20;
/// What cuBLASLt may use beside its operands; PyTorch gives it as much.
const WORKSPACE: usize = 32 << 20;

impl Gpu {
    /// A copy of host memory.
    pub fn upload<T: DeviceRepr>(&self, data: &[T]) -> Result<CudaSlice<T>, BackendError> {
        if data.is_empty() {
            return self.room(0);
        }
        self.stream.clone_htod(data).map_err(|e| self.error(e))
    }

    /// A copy in host memory, when all before is done.
    pub fn download<T: DeviceRepr>(&self, data: &CudaSlice<T>) -> Result<Vec<T>, BackendError> {
        self.stream.clone_dtoh(data).map_err(|e| self.error(e))
    }

    /// Median seconds of `f` by the GPU's clock. The cache is emptied before each run.
    pub fn seconds(
        &self,
        repetitions: usize,
        mut f: impl FnMut() -> Result<(), BackendError>,
    ) -> Result<f64, BackendError> {
        let say = |e: cudarc::driver::DriverError| self.error(e);
        let mut flush = self.room::<u8>(FLUSH)?;
        for _ in 0..3 {
            f()?;
        }
        let flags = Some(driver::CUevent_flags::CU_EVENT_DEFAULT);
        let mut events = Vec::new();
        for _ in 0..repetitions {
            self.stream.memset_zeros(&mut flush).map_err(say)?;
            let begin = self.stream.record_event(flags).map_err(say)?;
            f()?;
            events.push((begin, self.stream.record_event(flags).map_err(say)?));
        }
        self.synchronize()?;
        let milliseconds = events.iter().map(|(begin, end)| begin.elapsed_ms(end).map_err(say));
        let mut times = milliseconds.collect::<Result<Vec<_>, _>>()?;
        times.sort_by(f32::total_cmp);
        Ok(f64::from(times[times.len() / 2]) / 1e3)
    }

    /// Bytes a second of a copy of `bytes`, counting both ways: what the memory gives.
    pub fn copy_rate(&self, bytes: usize) -> Result<f64, BackendError> {
        let (from, mut to) = (self.room::<u8>(bytes)?, self.room::<u8>(bytes)?);
        let time = self.seconds(20, || self.stream.memcpy_dtod(&from, &mut to).map_err(|e| self.error(e)))?;
        Ok(2.0 * bytes as f64 / time)
    }

    /// Bytes a second of reading so many, at least 16. The cache was emptied by writing: what a kernel reads drives out lines
    /// that must be written first, of which a copy leaves as many as it found. So this is the limit of what only reads.
    pub fn read_rate(&self, bytes: usize) -> Result<f64, BackendError> {
        let pieces = u32::try_from(bytes / 16).map_err(|e| self.error(format!("{bytes} bytes: {e}")))?;
        assert!(pieces > 0, "{bytes} bytes in pieces of 16");
        let (from, mut to) = (self.room::<u8>(bytes)?, self.room::<u32>(1)?);
        let function = self.function(&READ, "read_bytes", 0)?;
        let time = self.seconds(20, || {
            let mut launch = self.stream.launch_builder(&function);
            launch.arg(&from).arg(&mut to).arg(&pieces);
            // SAFETY: the kernel reads as many pieces as there are, and writes one word.
            unsafe { launch.launch(launch_of(pieces.div_ceil(256 * 8), 256, 0)) }.map_err(|e| self.error(e))?;
            Ok(())
        })?;
        Ok(f64::from(pieces) * 16.0 / time)
    }
}

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
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    one: CudaSlice<f32>,
}

/// A prepared product.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl<'a> CublasPeer<'a> {
    /// On a GPU.
    pub fn new(gpu: &'a Gpu) -> Result<Self, BackendError> {
        let handle = result::create_handle().map_err(|e| gpu.error(e))?;
        Ok(Self { gpu, handle, workspace: gpu.room(WORKSPACE)?, one: gpu.upload(&[1.0f32])? })
    }

    /// Median seconds of `times` block-scaled products, which have the operands' meaning; the result is in `y`. The columns
    /// are a multiple of 512: cuBLASLt wants rows of four blocks' scales.
    pub fn block_scaled(
        &self,
        times: usize,
        x: &Codes,
        w: &Blocks,
        y: &mut CudaSlice<u16>,
    ) -> Result<f64, BackendError> {
        assert!(x.columns.is_multiple_of(512), "{} columns in rows of four blocks", x.columns);
        self.fp8(times, x, w, y, Scaling::Blocks)
    }

    /// Median seconds of the product of the same codes with one scale each: what the tensor cores give.
    pub fn tensor_wide(&self, x: &Codes, w: &Blocks, y: &mut CudaSlice<u16>) -> Result<f64, BackendError> {
        self.fp8(1, x, w, y, Scaling::Whole)
    }

    fn fp8(
        &self,
        times: usize,
        x: &Codes,
        w: &Blocks,
        y: &mut CudaSlice<u16>,
        scaling: Scaling,
    ) -> Result<f64, BackendError> {
        let stream = &self.gpu.stream;
        let scales = match scaling {
            Scaling::Whole => [self.one.device_ptr(stream).0; 2],
            Scaling::Blocks => [w.scales.device_ptr(stream).0, x.scales.device_ptr(stream).0],
        };
        let operands = [w.codes.device_ptr(stream).0, x.codes.device_ptr(stream).0];
        let kind = sys::cudaDataType_t::CUDA_R_8F_E4M3;
        self.product(times, kind, [x.rows, w.rows, x.columns], operands, Some((scales, scaling)), y)
    }

    /// Median seconds of `x_MK, w_NK` in BF16.
    pub fn bf16(
        &self,
        [m, n, k]: [usize; 3],
        x: &CudaSlice<u16>,
        w: &CudaSlice<u16>,
        y: &mut CudaSlice<u16>,
    ) -> Result<f64, BackendError> {
        assert_eq!((x.len(), w.len()), (m * k, n * k), "operands of a product");
        let operands = [w.device_ptr(&self.gpu.stream).0, x.device_ptr(&self.gpu.stream).0];
        self.product(1, sys::cudaDataType_t::CUDA_R_16BF, [m, n, k], operands, None, y)
    }

    fn product(
        &self,
        times: usize,
        kind: sys::cudaDataType_t,
        [m, n, k]: [usize; 3],
        operands: [driver::CUdeviceptr; 2],
        scales: Option<([driver::CUdeviceptr; 2], Scaling)>,
        y: &mut CudaSlice<u16>,
    ) -> Result<f64, BackendError> {
        assert_eq!(y.len(), m * n, "a result of {m} x {n}");
        let say = |e: cudarc::cublaslt::result::CublasError| self.gpu.error(format!("cuBLASLt, {m} x {n} x {k}: {e}"));
        let plan = self.plan(kind, [m, n, k], scales).map_err(say)?;
        let (out, _held) = y.device_ptr_mut(&self.gpu.stream);
        let workspace = self.workspace.device_ptr(&self.gpu.stream).0;
        let (alpha, beta) = (1.0f32, 0.0f32);
        // SAFETY: the plan describes exactly these operands, which live until the product is done.
        let go = || unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                operands[0] as *const c_void,
                plan.layouts[0],
                operands[1] as *const c_void,
                plan.layouts[1],
                out as *const c_void,
                plan.layouts[2],
                out as *mut c_void,
                plan.layouts[2],
                &raw const plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                self.gpu.stream.cu_stream().cast(),
            )
        };
        let time = self.gpu.seconds(20, || (0..times).try_for_each(|_| go()).map_err(say));
        // SAFETY: made by `plan`, not used afterwards.
        unsafe {
            for layout in plan.layouts {
                result::destroy_matrix_layout(layout).map_err(say)?;
            }
            result::destroy_matmul_desc(plan.description).map_err(say)?;
        }
        time
    }

    /// Row-major `y = x w^T` is column-major `y^T = w x^T`: the weight is the first operand, transposed.
    fn plan(
        &self,
        kind: sys::cudaDataType_t,
        [m, n, k]: [usize; 3],
        scales: Option<([driver::CUdeviceptr; 2], Scaling)>,
    ) -> Result<Plan, result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let description =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        // SAFETY: the description is alive, each value has the size that is given.
        let set = |attribute, value: *const c_void, size| unsafe {
            result::set_matmul_desc_attribute(description, attribute, value, size)
        };
        let transposed = 1i32;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const transposed).cast(), 4)?;
        if let Some(([of_weight, of_rows], scaling)) = &scales {
            set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, (&raw const *of_weight).cast(), 8)?;
            set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, (&raw const *of_rows).cast(), 8)?;
            if *scaling == Scaling::Blocks {
                use sys::cublasLtMatmulMatrixScale_t as Mode;
                let (blocks, tiles) = (
                    Mode::CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F as i32,
                    Mode::CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F as i32,
                );
                set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, (&raw const blocks).cast(), 4)?;
                set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, (&raw const tiles).cast(), 4)?;
            } else {
                // As PyTorch's fast accumulation.
                let fast = 1i8;
                set(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, (&raw const fast).cast(), 1)?;
            }
        }
        let layouts = [
            result::create_matrix_layout(kind, k as u64, n as u64, k as i64)?,
            result::create_matrix_layout(kind, k as u64, m as u64, k as i64)?,
            result::create_matrix_layout(sys::cudaDataType_t::CUDA_R_16BF, n as u64, m as u64, n as i64)?,
        ];
        let preference = result::create_matmul_pref()?;
        let most = WORKSPACE;
        // SAFETY: everything was made above and is alive.
        let found = unsafe {
            let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference, attribute, (&raw const most).cast(), 8)?;
            let [w, x, y] = layouts;
            let found = result::get_matmul_algo_heuristic(self.handle, description, w, x, y, y, preference);
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Plan { description, layouts, algorithm: found.algo })
    }
}

impl Drop for CublasPeer<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `new`. A failure leaves nothing to be done.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
