//! The whole model in one process, without training: logits of texts, and generation with a cache.
//!
//! The cache of a layer is what multi-head latent attention was made for (technical report 2.1.1): the
//! normed latent and the rotated shared key of each position, whatever the number of heads. Keys and
//! values are never made: the up-projection is taken into the query and the result.

use super::attention::Attention;
use super::expert::{ExpertWeights, expert_forward};
use super::mixture::{Half, Mixture};
use super::{ParameterMap, Weight};
use crate::backend::{Backend, BackendError};
use crate::model::{ModelConfig, NORM_EPS};
use crate::tensor::Tensor;
use std::sync::Arc;

/// What attention remembers of the positions so far.
#[derive(Debug, Clone)]
pub(crate) struct LatentCache {
    /// Normed latents, `[P, C]`.
    pub(crate) latent: Tensor,
    /// Rotated shared keys, `[P, R]`.
    pub(crate) k_rope: Tensor,
}

#[derive(Debug)]
struct Layer {
    attention: Attention,
    mixture: Mixture,
    experts: Vec<ExpertWeights>,
    cache: Option<LatentCache>,
}

/// A model and the positions that it has seen.
#[derive(Debug)]
pub struct Decoder {
    config: Arc<ModelConfig>,
    embedding: Weight,
    layers: Vec<Layer>,
    norm: Weight,
    head: Weight,
    positions: usize,
}

impl Decoder {
    /// A model with all its weights, before the first position.
    pub fn new(config: Arc<ModelConfig>, map: &ParameterMap) -> Self {
        let layer = |index: usize| {
            let prefix = format!("model.layers.{index}.");
            let experts = if config.is_mixture(index) { config.experts as u32 } else { 0 };
            Layer {
                attention: Attention::new(map, &prefix, &config),
                mixture: Mixture::new(map, &prefix, &config, index),
                experts: (0..experts).map(|e| ExpertWeights::new(map, index as u32, e)).collect(),
                cache: None,
            }
        };
        Self {
            embedding: Weight::take(map, "", "model.embed_tokens.weight"),
            layers: (0..config.layers).map(layer).collect(),
            norm: Weight::take(map, "", "model.norm.weight"),
            head: Weight::take(map, "", "lm_head.weight"),
            positions: 0,
            config,
        }
    }

    /// Takes the next tokens of the text and gives their logits, `[T, V]`.
    pub fn feed(&mut self, b: &dyn Backend, tokens: &[u32]) -> Result<Tensor, BackendError> {
        let mut h = b.embedding(&b.upload_indices(tokens.to_vec()), &self.embedding.value);
        for layer in &mut self.layers {
            let (out, cache) = layer.attention.cached(b, h, layer.cache.take(), self.positions, &self.config);
            layer.cache = Some(cache);
            h = match layer.mixture.forward(b, out, &self.config) {
                Half::Done((h, _)) => h,
                Half::Experts { rows, sent, .. } => {
                    let items = layer.experts.iter().cloned().zip(rows).collect();
                    let rows = expert_forward(b, items).into_iter().map(|(y, _)| y).collect();
                    Mixture::forward_rest(b, sent, rows).0
                }
            };
        }
        self.positions += tokens.len();
        let logits = b.linear(&b.rms_norm(&h, &self.norm.value, NORM_EPS), &self.head.value, self.head.role);
        b.synchronize()?;
        Ok(logits)
    }

    /// Positions seen so far.
    pub fn positions(&self) -> usize {
        self.positions
    }
}
