//! Named weights, and weight-gradient products that wait for their turn.

use crate::backend::Backend;
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
}

impl Weight {
    /// Takes `prefix` + `name` from a map that has it: maps are made from the same inventory.
    pub(crate) fn take(map: &ParameterMap, prefix: &str, name: &str) -> Self {
        let full = format!("{prefix}{name}");
        let (name, value) = map.get_key_value(full.as_str()).unwrap_or_else(|| panic!("no parameter {full}"));
        Self { name: Arc::clone(name), value: value.clone() }
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
    Linear { dy: Tensor, x: Tensor },
    RmsNorm { dy: Tensor, x: Tensor },
    Embedding { dy: Tensor, tokens: Tensor, vocabulary: usize },
}

impl Product {
    pub(crate) fn make(&self, backend: &dyn Backend) -> Tensor {
        match self {
            Self::Linear { dy, x } => backend.linear_backward_weight(dy, x),
            Self::RmsNorm { dy, x } => backend.rms_norm_backward_weight(x, dy, NORM_EPS),
            Self::Embedding { dy, tokens, vocabulary } => backend.embedding_backward_weight(tokens, dy, *vocabulary),
        }
    }
}

/// Products of one micro-batch, by parameter.
pub(crate) type Products = Vec<(Arc<str>, Product)>;
