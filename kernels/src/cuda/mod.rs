//! The GPU, through the driver, NVRTC, cuBLASLt and cuDNN; nothing of them is needed to build it.
//!
//! [`CudaBackend`] has the model's operations in FP32, with the CPU's bits, in BF16 and in FP8. The fast kernels that it is made of are
//! functions of [`Gpu`]; of those for rows it takes the ones that quantise.

mod attention;
mod backend;
mod blas;
mod cudnn;
mod dense;
mod device;
mod failure;
mod gate;
mod measure;
mod memory;
mod peer;
mod products;
mod rows;
mod sources;

pub use attention::{CausalAttention, CausalGradients, CausalShape, Qkv};
pub use backend::CudaBackend;
pub use dense::Dense;
pub use device::{Cubins, Gpu, NoCubins};
pub use gate::Activation;
pub use memory::Memory;
pub use peer::CublasPeer;
pub use products::{Blocks, Codes, Groups};
pub use rows::Places;
pub use sources::{SOURCES, Source};
