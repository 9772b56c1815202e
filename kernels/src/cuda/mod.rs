//! The CUDA backend, through the driver, NVRTC and cuBLASLt; nothing is needed to build it.
//!
//! So far it has RMSNorm and the linear product: enough to know that the trait fits a GPU. What is
//! missing is reported, as every device error, at the next read: an operation that cannot run gives a
//! handle without data and an error that sticks.
//!
//! RMSNorm makes the CPU's bits: the same sums in the same order, without contraction. The product is
//! cuBLASLt's, whose order of sums is its own choice by shape; it agrees with the CPU's within
//! rounding, and is not yet independent of the number of rows.

mod attention;
mod blas;
mod cudnn;
mod dense;
mod device;
mod failure;
mod gate;
mod measure;
mod peer;
mod products;
mod rows;
mod sources;

pub use attention::{CausalAttention, CausalGradients, CausalShape, Qkv};
pub use dense::Dense;
pub use device::{Cubins, Gpu, NoCubins};
pub use gate::Activation;
pub use peer::CublasPeer;
pub use products::{Blocks, Codes, Groups};
pub use rows::Places;
pub use sources::{SOURCES, Source};

use crate::backend::{AttentionState, Backend, BackendError, DeviceClass, Role};
use crate::ops::attention::AttentionShape;
use crate::ops::combine::Dispatch;
use crate::ops::gate::GateShape;
use crate::ops::rope::RopeShape;
use crate::tensor::{DeviceBuffer, Tensor};
use cudarc::cublaslt::{CudaBlasLT, Matmul, MatmulConfig, MatmulShared, Workspace, sys};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, PushKernelArg};
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

/// Sixteen lanes sum a row as `math::sum_of` does; eight rows share a block.
const RMS_NORM: &str = r#"
extern "C" __global__ void rms_norm(const float* x, const float* w, float* y, int rows, int columns, float eps) {
    int row = blockIdx.x * 8 + threadIdx.x / 16;
    int lane = threadIdx.x % 16;
    bool there = row < rows;
    float sum = 0.0f;
    for (int i = lane; there && i < columns; i += 16) {
        float v = x[(long long)row * columns + i];
        sum = __fadd_rn(sum, __fmul_rn(v, v));
    }
    for (int width = 8; width > 0; width /= 2) {
        sum = __fadd_rn(sum, __shfl_down_sync(0xffffffffu, sum, width, 16));
    }
    sum = __shfl_sync(0xffffffffu, sum, 0, 16);
    float r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)columns), eps)));
    for (int i = lane; there && i < columns; i += 16) {
        long long at = (long long)row * columns + i;
        y[at] = __fmul_rn(__fmul_rn(x[at], r), w[i]);
    }
}
"#;

#[derive(Debug)]
enum Buffer {
    F32(CudaSlice<f32>),
    U32(CudaSlice<u32>),
    /// Of an operation that failed.
    Nothing,
}

impl DeviceBuffer for Buffer {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// cuBLASLt with f32 sums of f32 products: the crate's own f32 rounds operands to TF32 first.
#[derive(Debug)]
struct FullF32(CudaBlasLT);

impl MatmulShared for FullF32 {
    fn handle(&self) -> &sys::cublasLtHandle_t {
        self.0.handle()
    }

    fn workspace(&self) -> &Workspace {
        self.0.workspace()
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.0.stream()
    }
}

impl Matmul<f32> for FullF32 {
    fn matrix_type() -> sys::cudaDataType {
        sys::cudaDataType_t::CUDA_R_32F
    }

    fn compute_type() -> sys::cublasComputeType_t {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    }
}

/// See the module.
#[derive(Debug)]
pub struct CudaBackend {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    blas: FullF32,
    rms_norm: CudaFunction,
    class: String,
    failed: Mutex<Option<BackendError>>,
}

impl CudaBackend {
    /// The backend of one GPU; machine code of kernels is kept in `cubins`.
    pub fn new(ordinal: usize, cubins: Box<dyn Cubins>) -> Result<Self, BackendError> {
        let gpu = Gpu::new(ordinal, cubins)?;
        let stream = Arc::clone(&gpu.stream);
        let ptx = cudarc::nvrtc::compile_ptx(RMS_NORM).map_err(|e| gpu.error(e))?;
        let module = stream.context().load_module(ptx).map_err(|e| gpu.error(e))?;
        let rms_norm = module.load_function("rms_norm").map_err(|e| gpu.error(e))?;
        let blas = FullF32(CudaBlasLT::new(Arc::clone(&stream)).map_err(|e| gpu.error(e))?);
        let class = format!("cuda {} f32", gpu.architecture());
        Ok(Self { gpu, stream, blas, rms_norm, class, failed: Mutex::new(None) })
    }

    /// Its GPU, for the kernels that are not operations yet.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn error(&self, reason: impl std::fmt::Display) -> BackendError {
        BackendError::Device { device: self.class.clone(), reason: reason.to_string() }
    }

    /// Records the first error; later reads report it.
    fn fail(&self, error: BackendError) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn nothing(&self, rows: usize, columns: usize) -> Tensor {
        Tensor::device(rows, columns, Arc::new(Buffer::Nothing))
    }

    fn unsupported(&self, operation: &'static str, rows: usize, columns: usize) -> Tensor {
        self.fail(BackendError::Unsupported { operation, device: self.class.clone() });
        self.nothing(rows, columns)
    }

    /// The tensor of an operation, or its error for later.
    fn finish(&self, rows: usize, columns: usize, result: Result<CudaSlice<f32>, BackendError>) -> Tensor {
        match result {
            Ok(data) => Tensor::device(rows, columns, Arc::new(Buffer::F32(data))),
            Err(error) => {
                self.fail(error);
                self.nothing(rows, columns)
            }
        }
    }

    fn floats<'a>(&self, x: &'a Tensor) -> Result<&'a CudaSlice<f32>, BackendError> {
        match x.buffer().and_then(|b| b.as_any().downcast_ref::<Buffer>()) {
            Some(Buffer::F32(data)) => Ok(data),
            Some(Buffer::U32(_) | Buffer::Nothing) | None => {
                Err(self.error("a tensor without f32 data on this device"))
            }
        }
    }

    /// `c_MN = a_MK b_KN` on row-major data; `b` is `[N, K]` when `transposed`.
    fn product(&self, a: &Tensor, b: &Tensor, n: usize, transposed: bool) -> Result<CudaSlice<f32>, BackendError> {
        let (m, k) = (a.rows(), a.columns());
        let mut c = self.gpu.zeros::<f32>(m * n)?;
        // Row-major c is column-major c^T = b^T a^T, so the operands change places.
        let config = MatmulConfig {
            transa: transposed,
            transb: false,
            transc: false,
            m: n as u64,
            n: m as u64,
            k: k as u64,
            alpha: 1.0,
            lda: if transposed { k } else { n } as i64,
            ldb: k as i64,
            beta: 0.0,
            ldc: n as i64,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        let (a, b) = (self.floats(a)?, self.floats(b)?);
        // SAFETY: the three buffers have exactly the elements that the configuration names.
        unsafe { self.blas.matmul(config, b, a, &mut c, None, None) }.map_err(|e| self.error(e))?;
        Ok(c)
    }

    fn run_rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Result<CudaSlice<f32>, BackendError> {
        let (rows, columns) = (x.rows() as i32, x.columns() as i32);
        let mut y = self.gpu.zeros::<f32>(x.rows() * x.columns())?;
        let config = device::launch_of(x.rows().div_ceil(8) as u32, 128, 0);
        let (x, w) = (self.floats(x)?, self.floats(w)?);
        let mut launch = self.stream.launch_builder(&self.rms_norm);
        launch.arg(x).arg(w).arg(&mut y).arg(&rows).arg(&columns).arg(&eps);
        // SAFETY: the kernel reads and writes `rows * columns` elements of x and y and `columns` of w,
        // which is what they have; it checks its row.
        unsafe { launch.launch(config) }.map_err(|e| self.error(e))?;
        Ok(y)
    }
}

impl Backend for CudaBackend {
    fn class(&self) -> DeviceClass {
        DeviceClass(self.class.clone())
    }

    fn upload(&self, rows: usize, columns: usize, data: Arc<Vec<f32>>) -> Tensor {
        self.finish(rows, columns, self.gpu.upload(&data))
    }

    fn upload_indices(&self, data: Vec<u32>) -> Tensor {
        match self.gpu.upload(&data) {
            Ok(slice) => Tensor::device(1, data.len(), Arc::new(Buffer::U32(slice))),
            Err(e) => {
                self.fail(e);
                self.nothing(1, data.len())
            }
        }
    }

    fn read(&self, x: &Tensor) -> Result<Arc<Vec<f32>>, BackendError> {
        self.synchronize()?;
        Ok(Arc::new(self.stream.clone_dtoh(self.floats(x)?).map_err(|e| self.error(e))?))
    }

    fn read_indices(&self, x: &Tensor) -> Result<Vec<u32>, BackendError> {
        self.synchronize()?;
        match x.buffer().and_then(|b| b.as_any().downcast_ref::<Buffer>()) {
            Some(Buffer::U32(data)) => self.stream.clone_dtoh(data).map_err(|e| self.error(e)),
            Some(Buffer::F32(_) | Buffer::Nothing) | None => Err(self.error("a tensor without indices on this device")),
        }
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        if let Some(error) = self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Err(error);
        }
        self.gpu.synchronize()
    }

    fn linear(&self, x: &Tensor, w: &Tensor, _: Role) -> Tensor {
        self.finish(x.rows(), w.rows(), self.product(x, w, w.rows(), true))
    }

    fn linear_backward_input(&self, dy: &Tensor, w: &Tensor, _: Role) -> Tensor {
        self.finish(dy.rows(), w.columns(), self.product(dy, w, w.columns(), false))
    }

    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Tensor {
        self.finish(x.rows(), x.columns(), self.run_rms_norm(x, w, eps))
    }

    fn linear_backward_weight(&self, dy: &Tensor, x: &Tensor, _: Role) -> Tensor {
        self.unsupported("linear_backward_weight", dy.columns(), x.columns())
    }

    fn grouped_linear(&self, x: &Tensor, _: &Tensor, w: &[Tensor], _: Role) -> Tensor {
        self.unsupported("grouped_linear", x.rows(), w.first().map_or(0, Tensor::rows))
    }

    fn grouped_linear_backward_input(&self, dy: &Tensor, _: &Tensor, w: &[Tensor], _: Role) -> Tensor {
        self.unsupported("grouped_linear_backward_input", dy.rows(), w.first().map_or(0, Tensor::columns))
    }

    fn quantise(&self, x: &Tensor) -> Tensor {
        self.unsupported("quantise", x.rows(), x.columns())
    }

    fn dequantise(&self, x: &Tensor) -> Tensor {
        self.unsupported("dequantise", x.rows(), x.columns())
    }

    fn add(&self, a: &Tensor, _: &Tensor) -> Tensor {
        self.unsupported("add", a.rows(), a.columns())
    }

    fn accumulate(&self, a: &Tensor, _: &Tensor) -> Tensor {
        self.unsupported("accumulate", a.rows(), a.columns())
    }

    fn split(&self, x: &Tensor, at: usize) -> (Tensor, Tensor) {
        let left = self.unsupported("split", x.rows(), at);
        (left, self.nothing(x.rows(), x.columns() - at))
    }

    fn join(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.unsupported("join", a.rows(), a.columns() + b.columns())
    }

    fn stack(&self, parts: &[Tensor]) -> Tensor {
        let rows = parts.iter().map(Tensor::rows).sum();
        self.unsupported("stack", rows, parts.first().map_or(0, Tensor::columns))
    }

    fn rows(&self, x: &Tensor, _: usize, rows: usize) -> Tensor {
        self.unsupported("rows", rows, x.columns())
    }

    fn embedding(&self, tokens: &Tensor, table: &Tensor) -> Tensor {
        self.unsupported("embedding", tokens.columns(), table.columns())
    }

    fn embedding_backward_weight(&self, _: &Tensor, dy: &Tensor, vocabulary: usize) -> Tensor {
        self.unsupported("embedding_backward_weight", vocabulary, dy.columns())
    }

    fn rms_norm_backward_input(&self, x: &Tensor, _: &Tensor, _: &Tensor, _: f32) -> Tensor {
        self.unsupported("rms_norm_backward_input", x.rows(), x.columns())
    }

    fn rms_norm_backward_weight(&self, x: &Tensor, _: &Tensor, _: f32) -> Tensor {
        self.unsupported("rms_norm_backward_weight", 1, x.columns())
    }

    fn rope(&self, x: &Tensor, _: &RopeShape, _: bool) -> Tensor {
        self.unsupported("rope", x.rows(), x.columns())
    }

    fn attention(&self, q: Tensor, kv: Tensor, k_rope: Tensor, shape: &AttentionShape) -> AttentionState {
        let o = self.unsupported("attention", q.rows(), shape.heads * shape.value);
        let lse = self.nothing(q.rows(), shape.heads);
        AttentionState { q, kv, k_rope, o, lse }
    }

    fn attention_cached(&self, q: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, shape: &AttentionShape) -> Tensor {
        self.unsupported("attention_cached", q.rows(), shape.heads * shape.value)
    }

    fn attention_backward(&self, state: &AttentionState, _: &Tensor, _: &AttentionShape) -> (Tensor, Tensor, Tensor) {
        let dq = self.unsupported("attention_backward", state.q.rows(), state.q.columns());
        let like = |t: &Tensor| self.nothing(t.rows(), t.columns());
        (dq, like(&state.kv), like(&state.k_rope))
    }

    fn swiglu(&self, gate: &Tensor, _: &Tensor) -> Tensor {
        self.unsupported("swiglu", gate.rows(), gate.columns())
    }

    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, _: &Tensor) -> [Tensor; 3] {
        let h = self.unsupported("swiglu_backward", gate.rows(), gate.columns());
        [h, self.nothing(gate.rows(), gate.columns()), self.nothing(up.rows(), up.columns())]
    }

    fn gate(&self, logits: &Tensor, _: &Tensor, shape: &GateShape) -> (Tensor, Tensor) {
        let experts = self.unsupported("gate", 1, logits.rows() * shape.top_k);
        (experts, self.nothing(logits.rows(), shape.top_k))
    }

    fn gate_backward(&self, logits: &Tensor, _: &Tensor, _: &Tensor, _: &GateShape) -> Tensor {
        self.unsupported("gate_backward", logits.rows(), logits.columns())
    }

    fn gate_balance_backward(&self, logits: &Tensor, _: &GateShape, _: f32) -> Tensor {
        self.unsupported("gate_balance_backward", logits.rows(), logits.columns())
    }

    fn dispatch(&self, x: &Tensor, plan: &Dispatch) -> Vec<Tensor> {
        plan.by_expert(&self.unsupported("dispatch", plan.slots.len(), x.columns()))
    }

    fn combine(&self, rows: &[Tensor], _: Option<&Tensor>, plan: &Dispatch) -> Tensor {
        self.unsupported("combine", plan.slots.len() / plan.top_k, rows.first().map_or(0, Tensor::columns))
    }

    fn combine_backward(&self, _: &Tensor, rows: &[Tensor], weights: &Tensor, _: &Dispatch) -> (Vec<Tensor>, Tensor) {
        let dweights = self.unsupported("combine_backward", weights.rows(), weights.columns());
        (rows.iter().map(|r| self.nothing(r.rows(), r.columns())).collect(), dweights)
    }

    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, _: f32) -> (Tensor, Tensor) {
        let losses = self.unsupported("cross_entropy", 1, targets.columns());
        (losses, self.nothing(logits.rows(), logits.columns()))
    }
}
