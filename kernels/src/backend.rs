//! The boundary between the model and a device.
//!
//! Rules that every implementation keeps, so that a caller cannot tell what is behind it:
//! - an operation enqueues and returns handles at once; nothing but `read`, `read_indices` and
//!   `synchronize` waits, and only those report a device's errors (an error sticks: every later
//!   read reports it, so a broken step can never be taken for a result);
//! - shapes are the caller's promise, a wrong one panics;
//! - row counts of grouped products stay where they are made: `counts` is a tensor, not a list;
//! - a fused operation is an operation (attention, cross-entropy with its gradient, combine);
//! - rows do not depend on their batch (DESIGN 3.2).

use crate::ops::attention::AttentionShape;
use crate::ops::combine::Dispatch;
use crate::ops::gate::GateShape;
use crate::ops::rope::RopeShape;
use crate::tensor::Tensor;
use std::fmt;
use std::sync::Arc;

/// A device's failure, seen at a synchronisation.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum BackendError {
    /// The device or its driver failed.
    #[error("{device}: {reason}")]
    Device {
        /// The device class.
        device: String,
        /// What it said.
        reason: String,
    },
}

/// Devices with the same name give the same bits; a job does not mix classes (DESIGN 3.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceClass(pub String);

impl fmt::Display for DeviceClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a model is computed: one value of the configuration (technical report 3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Everything in f32.
    #[default]
    Fp32,
    /// Products of BF16 operands with FP32 sums; results and activations rounded to BF16, moments too.
    Bf16,
    /// The same, but products of the blocks' weights with E4M3 operands and scales.
    Fp8,
}

impl Precision {
    /// Whether activations and moments are rounded to BF16.
    pub fn is_low(self) -> bool {
        self != Self::Fp32
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
        })
    }
}

/// What a weight is for: that decides how its products are made in low precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A projection of a block.
    Projection,
    /// The output projection of attention, whose operand has scales of powers of two.
    Output,
    /// A routed expert's first projections: their operand was dispatched, with scales of powers of two.
    ExpertIn,
    /// A routed expert's last projection: its gradient was dispatched, with scales of powers of two.
    ExpertOut,
    /// Outside the blocks: never below BF16.
    Head,
    /// The gate: always f32.
    Gate,
}

/// Saved tensors of an attention.
#[derive(Debug, Clone)]
pub struct AttentionState {
    /// Rotated queries, `[T, H(N+R)]`.
    pub q: Tensor,
    /// Keys without rotation and values, `[T, H(N+V)]`.
    pub kv: Tensor,
    /// Rotated shared keys, `[T, R]`.
    pub k_rope: Tensor,
    /// Result, `[T, HV]`.
    pub o: Tensor,
    /// Logarithms of the denominators, `[T, H]`.
    pub lse: Tensor,
}

/// A device that runs the model's operations. Shapes are given in each operation's file under `ops/`.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Whose bits these are.
    fn class(&self) -> DeviceClass;
    /// An activation from host memory to the device, rounded to what the precision stores.
    fn upload(&self, rows: usize, columns: usize, data: Arc<Vec<f32>>) -> Tensor;
    /// Indices or counts to the device.
    fn upload_indices(&self, data: Vec<u32>) -> Tensor;
    /// Waits for `x` and gives its elements.
    fn read(&self, x: &Tensor) -> Result<Arc<Vec<f32>>, BackendError>;
    /// Waits for a list of indices and gives it.
    fn read_indices(&self, x: &Tensor) -> Result<Vec<u32>, BackendError>;
    /// Waits for everything enqueued.
    fn synchronize(&self) -> Result<(), BackendError>;

    /// `x_TI, w_OI -> y_TO`.
    fn linear(&self, x: &Tensor, w: &Tensor, role: Role) -> Tensor;
    /// `dy_TO, w_OI -> dx_TI`.
    fn linear_backward_input(&self, dy: &Tensor, w: &Tensor, role: Role) -> Tensor;
    /// `dy_TO, x_TI -> dw_OI`.
    fn linear_backward_weight(&self, dy: &Tensor, x: &Tensor, role: Role) -> Tensor;
    /// Rows of `x_TI` in consecutive groups of `counts_G`, each with its own `w_OI -> y_TO`.
    fn grouped_linear(&self, x: &Tensor, counts: &Tensor, w: &[Tensor], role: Role) -> Tensor;
    /// Rows of `dy_TO` in consecutive groups of `counts_G`, each with its own `w_OI -> dx_TI`.
    fn grouped_linear_backward_input(&self, dy: &Tensor, counts: &Tensor, w: &[Tensor], role: Role) -> Tensor;
    /// Rounds to E4M3 in tiles of 1 x 128; the result carries its scales.
    fn quantise(&self, x: &Tensor) -> Tensor;
    /// The values of a quantised matrix.
    fn dequantise(&self, x: &Tensor) -> Tensor;
    /// Element by element `a + b`.
    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor;
    /// Element by element `a + b` in f32 in every precision: sums of gradients (technical report 3.3).
    fn accumulate(&self, a: &Tensor, b: &Tensor) -> Tensor;
    /// Columns `..at` and `at..`.
    fn split(&self, x: &Tensor, at: usize) -> (Tensor, Tensor);
    /// Columns of `a`, then of `b`.
    fn join(&self, a: &Tensor, b: &Tensor) -> Tensor;
    /// Rows of all, one tensor after another; there is at least one.
    fn stack(&self, parts: &[Tensor]) -> Tensor;
    /// Rows `from..from + rows`, of the same data.
    fn rows(&self, x: &Tensor, from: usize, rows: usize) -> Tensor;
    /// `tokens_T, table_VD -> y_TD`.
    fn embedding(&self, tokens: &Tensor, table: &Tensor) -> Tensor;
    /// `tokens_T, dy_TD -> dtable_VD`.
    fn embedding_backward_weight(&self, tokens: &Tensor, dy: &Tensor, vocabulary: usize) -> Tensor;
    /// `x_TD, w_D -> y_TD`.
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Tensor;
    /// `x_TD, w_D, dy_TD -> dx_TD`.
    fn rms_norm_backward_input(&self, x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Tensor;
    /// `x_TD, dy_TD -> dw_D`.
    fn rms_norm_backward_weight(&self, x: &Tensor, dy: &Tensor, eps: f32) -> Tensor;
    /// Rotates, or rotates back.
    fn rope(&self, x: &Tensor, shape: &RopeShape, inverse: bool) -> Tensor;
    /// `q, kv, k_rope ->` all that the backward function needs, the result among it.
    fn attention(&self, q: Tensor, kv: Tensor, k_rope: Tensor, shape: &AttentionShape) -> AttentionState;
    /// Attention of a text's newest `T` positions to all `P` of it, whose keys and values stay compressed:
    /// `q_T,H(N+R), latent_PC, k_rope_PR, kv_b_H(N+V),C -> o_T,HV`.
    fn attention_cached(
        &self,
        q: &Tensor,
        latent: &Tensor,
        k_rope: &Tensor,
        kv_b: &Tensor,
        shape: &AttentionShape,
    ) -> Tensor;
    /// `d_o -> (dq, dkv, dk_rope)`.
    fn attention_backward(
        &self,
        state: &AttentionState,
        d_o: &Tensor,
        shape: &AttentionShape,
    ) -> (Tensor, Tensor, Tensor);
    /// `gate_TI, up_TI -> h_TI`.
    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor;
    /// `gate_TI, up_TI, dh_TI -> [h_TI, dgate_TI, dup_TI]`: the result is made again, not kept.
    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dh: &Tensor) -> [Tensor; 3];
    /// `logits_TE, bias_E -> (experts_TK, weights_TK)`.
    fn gate(&self, logits: &Tensor, bias: &Tensor, shape: &GateShape) -> (Tensor, Tensor);
    /// `logits_TE, experts_TK, dweights_TK -> dlogits_TE`.
    fn gate_backward(&self, logits: &Tensor, experts: &Tensor, dweights: &Tensor, shape: &GateShape) -> Tensor;
    /// `logits_TE -> dlogits_TE` of the sequence-wise balance loss.
    fn gate_balance_backward(&self, logits: &Tensor, shape: &GateShape, factor: f32) -> Tensor;
    /// `x_TD ->` each expert's rows.
    fn dispatch(&self, x: &Tensor, plan: &Dispatch) -> Vec<Tensor>;
    /// Each expert's rows, `weights_TK` or ones `-> y_TD`.
    fn combine(&self, rows: &[Tensor], weights: Option<&Tensor>, plan: &Dispatch) -> Tensor;
    /// `dy_TD`, each expert's rows, `weights_TK` `->` (gradients of each expert's rows, `dweights_TK`).
    fn combine_backward(
        &self,
        dy: &Tensor,
        rows: &[Tensor],
        weights: &Tensor,
        plan: &Dispatch,
    ) -> (Vec<Tensor>, Tensor);
    /// `logits_TV, targets_T -> (loss_T, dlogits_TV)`, the gradient times `scale`.
    fn cross_entropy(&self, logits: &Tensor, targets: &Tensor, scale: f32) -> (Tensor, Tensor);
}
