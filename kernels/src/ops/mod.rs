//! The operations, one file each: the contract in the header, the CPU version, and in its tests an
//! f64 reference of the forward function. Backward functions are held against central differences
//! of that reference.

pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod attention_low;
pub(crate) mod combine;
pub(crate) mod cross_entropy;
pub(crate) mod embedding;
pub(crate) mod gate;
pub(crate) mod latent_attention;
pub(crate) mod linear;
pub(crate) mod quantise;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod swiglu;

#[cfg(test)]
pub(crate) mod testing;
