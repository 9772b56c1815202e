//! Named weights, and weight-gradient products that wait for their turn.

use crate::backend::{Backend, Role};
use crate::model::NORM_EPS;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Tensors by parameter name.
pub type ParameterMap = BTreeMap<Arc<str>, Tensor>;

/// A parameter's name and value.
#[derive(Debug, Clone)]
pub struct Weight {
    /// Name in a checkpoint.
    pub name: Arc<str>,
    /// Value.
    pub value: Tensor,
    /// What it is for, if it is a matrix of a product.
    pub role: Role,
}

/// The role of a parameter, by its published name.
fn role(name: &str) -> Role {
    let routed = name.contains(".mlp.experts.");
    if name.ends_with("o_proj.weight") {
        Role::Output
    } else if routed && name.ends_with("down_proj.weight") {
        Role::ExpertOut
    } else if routed {
        Role::ExpertIn
    } else if name.ends_with("mlp.gate.weight") {
        Role::Gate
    } else if name.ends_with("eh_proj.weight") || name.starts_with("lm_head") {
        Role::Head
    } else {
        Role::Projection
    }
}

impl Weight {
    /// Takes `prefix` + `name` from a map that has it: maps are made from the same inventory.
    pub(crate) fn take(map: &ParameterMap, prefix: &str, name: &str) -> Self {
        let full = format!("{prefix}{name}");
        let (name, value) = map.get_key_value(full.as_str()).unwrap_or_else(|| panic!("no parameter {full}"));
        Self { role: role(name), name: Arc::clone(name), value: value.clone() }
    }
}

/// The name under which the gradient of a parameter's second use is summed: the embedding and the head
/// are used by multi-token prediction too, and the sums of the uses are added last (DESIGN 3.1).
pub fn second_use(name: &str) -> Arc<str> {
    format!("{name} (second use)").into()
}

/// What a weight gradient is made of.
#[derive(Debug, Clone)]
pub(crate) enum Product {
    Linear { dy: Tensor, x: Tensor, role: Role },
    RmsNorm { dy: Tensor, x: Tensor },
    Embedding { dy: Tensor, tokens: Tensor, vocabulary: usize },
}

impl Product {
    pub(crate) fn make(&self, backend: &dyn Backend) -> Tensor {
        match self {
            Self::Linear { dy, x, role } => backend.linear_backward_weight(dy, x, *role),
            Self::RmsNorm { dy, x } => backend.rms_norm_backward_weight(x, dy, NORM_EPS),
            Self::Embedding { dy, tokens, vocabulary } => backend.embedding_backward_weight(tokens, dy, *vocabulary),
        }
    }
}

/// Products of one micro-batch, by parameter.
pub(crate) type Products = Vec<(Arc<str>, Product)>;
