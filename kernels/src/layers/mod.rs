//! Layers made of operations. Each has `forward`, `backward_input` and a list of weight products that
//! can be made later: the schedules need the three apart, so there is no tape.

pub(crate) mod attention;
pub(crate) mod decode;
pub(crate) mod expert;
pub(crate) mod mixture;
pub(crate) mod mlp;
pub(crate) mod mtp;
mod recipe;
pub(crate) mod stage;
mod weights;

#[cfg(test)]
mod reference;

pub use recipe::RowsRecipe;
pub use weights::{ParameterMap, Weight, second_use};
pub(crate) use weights::{Product, Products};
