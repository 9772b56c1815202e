//! Arithmetic of Everstep: the operations, the layers made of them, and the boundary to a device.
//! Knows no actor, no network and no file.

mod backend;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod element;
mod gemm;
mod layers;
mod limits;
mod low;
mod math;
mod model;
mod ops;
mod philox;
mod tensor;
mod wide;

pub use backend::{AttentionState, Backend, BackendError, DeviceClass, Precision, Role};
pub use cpu::CpuBackend;
#[cfg(feature = "cuda")]
pub use cuda::{
    Activation, Blocks, CausalAttention, CausalGradients, CausalShape, Codes, Cubins, CublasPeer, CudaBackend, Dense,
    Gpu, Groups, Memory, NoCubins, Places, Qkv, SOURCES, Source,
};
pub use element::Bf16;
pub use layers::decode::Decoder;
pub use layers::expert::{
    ExpertHeld, ExpertSaved, ExpertWeights, expert_backward_input, expert_backward_weight, expert_forward,
};
pub use layers::stage::{Progress, Scales, StageInput, StageModel, StageSums};
pub use layers::{ParameterMap, RowsRecipe, Weight, second_use};
pub use limits::{bf16_limit, multiply_add_limit, peer_linear};
pub use math::{bf16_bits, bf16_value, cosine, power};
pub use model::{Group, ModelConfig, Parameter, Update};
pub use ops::adamw::{AdamW, NORM_CHUNK, averaged, square_sums, state_sum, step as adamw_step};
pub use ops::attention::AttentionShape;
pub use ops::combine::{Dispatch, Slot};
pub use ops::cross_entropy::mean_loss;
pub use ops::gate::GateShape;
pub use ops::quantise::{dequantise_blocks, quantise_blocks};
pub use ops::rope::{RopeShape, Yarn};
pub use philox::Philox;
pub use tensor::{DeviceBuffer, Tensor, Words};
pub use wide::{add_to, sum};
