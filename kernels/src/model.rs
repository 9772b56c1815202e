//! What a model consists of: its sizes, and every parameter by name, shape, group and initial value.
//!
//! Names are those of the published checkpoints. Parameters come in groups: the unit that one
//! sender's gradient sums name and one reducer owns.

use crate::ops::attention::AttentionShape;
use crate::ops::gate::GateShape;
use crate::ops::rope::{RopeShape, Yarn};
use crate::philox::Philox;
use std::fmt;
use std::sync::Arc;

/// Sizes of a DeepSeek-V3-style model (technical report 4.2).
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Layers at the start whose feed-forward part is dense.
    pub dense_layers: usize,
    /// Inner width of a dense feed-forward part.
    pub dense_inner: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the compressed query; none: queries are not compressed.
    pub query_rank: Option<usize>,
    /// Width of the compressed keys and values.
    pub kv_rank: usize,
    /// Key columns of a head without rotation.
    pub nope: usize,
    /// Key columns of a head with rotation.
    pub rope: usize,
    /// Value columns of a head.
    pub value: usize,
    /// Routed experts of a mixture layer.
    pub experts: usize,
    /// Shared experts of a mixture layer.
    pub shared_experts: usize,
    /// Inner width of an expert.
    pub expert_inner: usize,
    /// Routed experts of a token.
    pub top_k: usize,
    /// Groups of experts.
    pub groups: usize,
    /// Groups that a token may use.
    pub groups_kept: usize,
    /// What a token's expert weights sum to.
    pub routed_scale: f32,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How they are stretched for long texts, if they are.
    pub yarn: Option<Yarn>,
    /// Modules of multi-token prediction: 0 or 1 (technical report 2.2).
    pub mtp: usize,
    /// Deviation of the initial matrices.
    pub initial_std: f64,
}

/// Added to the mean square in every RMSNorm.
pub(crate) const NORM_EPS: f32 = 1e-6;

const PURPOSE_INITIAL: u32 = 1;

/// Parameters that are summed, stored and handed out together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// The token embedding.
    Embedding,
    /// A layer without its routed experts.
    Layer(u32),
    /// The final norm and the output head.
    Head,
    /// One routed expert.
    Expert {
        /// Its layer.
        layer: u32,
        /// Its index in the layer.
        expert: u32,
    },
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::Layer(layer) => write!(f, "layer {layer}"),
            Self::Head => f.write_str("head"),
            Self::Expert { layer, expert } => write!(f, "expert {layer}.{expert}"),
        }
    }
}

/// What changes a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// AdamW with weight decay.
    Decayed,
    /// AdamW without (norms).
    Plain,
    /// The gate's bias: moved by the load of its experts, never by a gradient.
    Balance,
}

/// One parameter tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Its name in a checkpoint.
    pub name: Arc<str>,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Whose part it is.
    pub group: Group,
    /// How it changes.
    pub update: Update,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.columns
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its value before the first step: a pure function of the seed and its name.
    pub fn initial(&self, seed: u64, std: f64) -> Vec<f32> {
        match self.update {
            Update::Decayed => Philox::named(seed, PURPOSE_INITIAL, &self.name).normals(self.len(), std),
            Update::Plain => vec![1.0; self.len()],
            Update::Balance => vec![0.0; self.len()],
        }
    }
}

/// Collects the parameters of one group.
struct Inventory {
    list: Vec<Parameter>,
    group: Group,
    prefix: String,
}

impl Inventory {
    fn push(&mut self, name: &str, rows: usize, columns: usize, update: Update) {
        let name = format!("{}{name}", self.prefix).into();
        self.list.push(Parameter { name, rows, columns, group: self.group, update });
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) {
        self.push(name, rows, columns, Update::Decayed);
    }

    fn norm(&mut self, name: &str, columns: usize) {
        self.push(name, 1, columns, Update::Plain);
    }

    fn mlp(&mut self, part: &str, hidden: usize, inner: usize) {
        self.matrix(&format!("{part}gate_proj.weight"), inner, hidden);
        self.matrix(&format!("{part}up_proj.weight"), inner, hidden);
        self.matrix(&format!("{part}down_proj.weight"), hidden, inner);
    }
}

impl ModelConfig {
    /// Whether a layer has routed experts. The layer of multi-token prediction is like the last one.
    pub fn is_mixture(&self, layer: usize) -> bool {
        layer >= self.dense_layers && self.dense_layers < self.layers
    }

    /// Layers with that of multi-token prediction, which follows the others.
    pub fn blocks(&self) -> usize {
        self.layers + self.mtp
    }

    /// All groups in order of dependence.
    pub fn groups_of_model(&self) -> Vec<Group> {
        let mut groups = vec![Group::Embedding];
        for layer in 0..self.blocks() as u32 {
            groups.push(Group::Layer(layer));
            if self.is_mixture(layer as usize) {
                groups.extend((0..self.experts as u32).map(|expert| Group::Expert { layer, expert }));
            }
        }
        groups.push(Group::Head);
        groups
    }

    /// Parameters of one group.
    pub fn parameters_of(&self, group: Group) -> Vec<Parameter> {
        let d = self.hidden;
        let mut all = Inventory { list: Vec::new(), group, prefix: String::new() };
        match group {
            Group::Embedding => all.matrix("model.embed_tokens.weight", self.vocabulary, d),
            Group::Head => {
                all.norm("model.norm.weight", d);
                all.matrix("lm_head.weight", self.vocabulary, d);
            }
            Group::Expert { layer, expert } => {
                all.prefix = format!("model.layers.{layer}.mlp.experts.{expert}.");
                all.mlp("", d, self.expert_inner);
            }
            Group::Layer(layer) => {
                all.prefix = format!("model.layers.{layer}.");
                self.layer_parameters(layer as usize, &mut all);
            }
        }
        all.list
    }

    fn layer_parameters(&self, layer: usize, all: &mut Inventory) {
        let (d, q) = (self.hidden, self.heads * (self.nope + self.rope));
        all.norm("input_layernorm.weight", d);
        if let Some(rank) = self.query_rank {
            all.matrix("self_attn.q_a_proj.weight", rank, d);
            all.norm("self_attn.q_a_layernorm.weight", rank);
            all.matrix("self_attn.q_b_proj.weight", q, rank);
        } else {
            all.matrix("self_attn.q_proj.weight", q, d);
        }
        all.matrix("self_attn.kv_a_proj_with_mqa.weight", self.kv_rank + self.rope, d);
        all.norm("self_attn.kv_a_layernorm.weight", self.kv_rank);
        all.matrix("self_attn.kv_b_proj.weight", self.heads * (self.nope + self.value), self.kv_rank);
        all.matrix("self_attn.o_proj.weight", d, self.heads * self.value);
        all.norm("post_attention_layernorm.weight", d);
        if self.is_mixture(layer) {
            all.matrix("mlp.gate.weight", self.experts, d);
            all.push("mlp.gate.e_score_correction_bias", 1, self.experts, Update::Balance);
            if self.shared_experts > 0 {
                all.mlp("mlp.shared_experts.", d, self.shared_experts * self.expert_inner);
            }
        } else {
            all.mlp("mlp.", d, self.dense_inner);
        }
        if layer >= self.layers {
            all.norm("enorm.weight", d);
            all.norm("hnorm.weight", d);
            all.matrix("eh_proj.weight", d, 2 * d);
            all.norm("shared_head.norm.weight", d);
        }
    }

    /// All parameters, by group.
    pub fn parameters(&self) -> Vec<Parameter> {
        self.groups_of_model().into_iter().flat_map(|g| self.parameters_of(g)).collect()
    }

    /// Sizes of the attention.
    pub fn attention(&self) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            nope: self.nope,
            rope: self.rope,
            value: self.value,
            sequence: self.sequence,
            scale: (libm::pow((self.nope + self.rope) as f64, -0.5) * self.yarn.map_or(1.0, |yarn| yarn.score_factor()))
                as f32,
        }
    }

    /// Rotated columns of the queries.
    pub fn query_rope(&self) -> RopeShape {
        RopeShape {
            heads: self.heads,
            head_width: self.nope + self.rope,
            offset: self.nope,
            width: self.rope,
            sequence: self.sequence,
            first: 0,
            theta: self.rope_theta,
            yarn: self.yarn,
        }
    }

    /// Rotated columns of the shared keys.
    pub fn key_rope(&self) -> RopeShape {
        RopeShape { heads: 1, head_width: self.rope, offset: 0, ..self.query_rope() }
    }

    /// Sizes of the gate.
    pub fn gate(&self) -> GateShape {
        GateShape {
            experts: self.experts,
            top_k: self.top_k,
            groups: self.groups,
            groups_kept: self.groups_kept,
            routed_scale: self.routed_scale,
            sequence: self.sequence,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published totals of the 671B model (README_WEIGHTS; without multi-token prediction).
    #[test]
    fn the_published_model_has_671_billion_parameters() {
        let config = ModelConfig {
            vocabulary: 129_280,
            hidden: 7168,
            layers: 61,
            dense_layers: 3,
            dense_inner: 18_432,
            heads: 128,
            query_rank: Some(1536),
            kv_rank: 512,
            nope: 128,
            rope: 64,
            value: 128,
            experts: 256,
            shared_experts: 1,
            expert_inner: 2048,
            top_k: 8,
            groups: 8,
            groups_kept: 4,
            routed_scale: 2.5,
            sequence: 4096,
            rope_theta: 10_000.0,
            yarn: None,
            mtp: 0,
            initial_std: 0.006,
        };
        let total: usize = config.parameters().iter().filter(|p| p.update == Update::Decayed).map(Parameter::len).sum();
        assert_eq!(total / 1_000_000, 671_025);
        let attention: usize = config
            .parameters_of(Group::Layer(0))
            .iter()
            .filter(|p| p.name.contains("self_attn") && p.update == Update::Decayed)
            .map(Parameter::len)
            .sum();
        assert_eq!(attention, 187_105_280);
        // The module's own parameters, without embedding and head (derived in the reference from 1.1).
        let mtp = ModelConfig { mtp: 1, ..config.clone() };
        let own = mtp.parameters().iter().filter(|p| p.update == Update::Decayed).map(Parameter::len).sum::<usize>();
        assert_eq!((own - total) / 1_000_000, 11_610);
    }
}
