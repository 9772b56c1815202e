//! Multi-head latent attention with its norm and residual: `h + o(attention(norm(h)))`
//! (technical report 2.1.1). Only the latent part of the keys is normalised, never the rotated part.

use super::decode::LatentCache;
use super::{ParameterMap, Product, Products, Weight};
use crate::backend::{AttentionState, Backend};
use crate::model::{ModelConfig, NORM_EPS};
use crate::ops::rope::RopeShape;
use crate::tensor::Tensor;

#[derive(Debug, Clone)]
enum Query {
    Direct(Weight),
    Compressed { a: Weight, norm: Weight, b: Weight },
}

#[derive(Debug, Clone)]
pub(crate) struct Attention {
    norm: Weight,
    query: Query,
    kv_a: Weight,
    kv_norm: Weight,
    kv_b: Weight,
    o: Weight,
}

#[derive(Debug, Clone)]
pub(crate) struct AttentionSaved {
    h: Tensor,
    x: Tensor,
    /// The compressed query before and after its norm.
    query: Option<(Tensor, Tensor)>,
    latent: Tensor,
    latent_normed: Tensor,
    state: AttentionState,
}

impl Attention {
    pub(crate) fn new(map: &ParameterMap, prefix: &str, config: &ModelConfig) -> Self {
        let take = |name: &str| Weight::take(map, prefix, name);
        let query = if config.query_rank.is_some() {
            Query::Compressed {
                a: take("self_attn.q_a_proj.weight"),
                norm: take("self_attn.q_a_layernorm.weight"),
                b: take("self_attn.q_b_proj.weight"),
            }
        } else {
            Query::Direct(take("self_attn.q_proj.weight"))
        };
        Self {
            norm: take("input_layernorm.weight"),
            query,
            kv_a: take("self_attn.kv_a_proj_with_mqa.weight"),
            kv_norm: take("self_attn.kv_a_layernorm.weight"),
            kv_b: take("self_attn.kv_b_proj.weight"),
            o: take("self_attn.o_proj.weight"),
        }
    }

    /// `h_TD -> h_TD`.
    pub(crate) fn forward(&self, b: &dyn Backend, h: Tensor, config: &ModelConfig) -> (Tensor, AttentionSaved) {
        let x = b.rms_norm(&h, &self.norm.value, NORM_EPS);
        let (q, query) = self.query(b, &x);
        let q = b.rope(&q, &config.query_rope(), false);
        let (latent, k_rope) = b.split(&b.linear(&x, &self.kv_a.value, self.kv_a.role), config.kv_rank);
        let k_rope = b.rope(&k_rope, &config.key_rope(), false);
        let latent_normed = b.rms_norm(&latent, &self.kv_norm.value, NORM_EPS);
        let kv = b.linear(&latent_normed, &self.kv_b.value, self.kv_b.role);
        let state = b.attention(q, kv, k_rope, &config.attention());
        let out = b.add(&h, &b.linear(&state.o, &self.o.value, self.o.role));
        (out, AttentionSaved { h, x, query, latent, latent_normed, state })
    }

    /// The query before its rotation.
    fn query(&self, b: &dyn Backend, x: &Tensor) -> (Tensor, Option<(Tensor, Tensor)>) {
        match &self.query {
            Query::Direct(w) => (b.linear(x, &w.value, w.role), None),
            Query::Compressed { a, norm, b: up } => {
                let low = b.linear(x, &a.value, a.role);
                let normed = b.rms_norm(&low, &norm.value, NORM_EPS);
                (b.linear(&normed, &up.value, up.role), Some((low, normed)))
            }
        }
    }

    /// `h_TD -> h_TD` of one text's next positions, from `first` on, and the cache with them.
    pub(crate) fn cached(
        &self,
        b: &dyn Backend,
        h: Tensor,
        cache: Option<LatentCache>,
        first: usize,
        config: &ModelConfig,
    ) -> (Tensor, LatentCache) {
        let x = b.rms_norm(&h, &self.norm.value, NORM_EPS);
        let at = |shape: RopeShape| RopeShape { first, sequence: h.rows(), ..shape };
        let q = b.rope(&self.query(b, &x).0, &at(config.query_rope()), false);
        let (latent, k_rope) = b.split(&b.linear(&x, &self.kv_a.value, self.kv_a.role), config.kv_rank);
        let k_rope = b.rope(&k_rope, &at(config.key_rope()), false);
        let latent = b.rms_norm(&latent, &self.kv_norm.value, NORM_EPS);
        // A stack holds its parts and, once it is read, the whole: over many positions, everything twice.
        let after = |earlier: Tensor, new: Tensor| b.stack(&[earlier, new]).in_one_piece();
        let cache = match cache {
            Some(c) => LatentCache { latent: after(c.latent, latent), k_rope: after(c.k_rope, k_rope) },
            None => LatentCache { latent, k_rope },
        };
        let o = b.attention_cached(&q, &cache.latent, &cache.k_rope, &self.kv_b.value, &config.attention());
        (b.add(&h, &b.linear(&o, &self.o.value, self.o.role)), cache)
    }

    /// `dh_TD -> dh_TD`.
    pub(crate) fn backward_input(
        &self,
        b: &dyn Backend,
        saved: AttentionSaved,
        dh: &Tensor,
        config: &ModelConfig,
        products: &mut Products,
    ) -> Tensor {
        let AttentionSaved { h, x, query, latent, latent_normed, state } = saved;
        let mut linear = |weight: &Weight, dy: &Tensor, x: &Tensor| {
            products.push((weight.name.clone(), Product::Linear { dy: dy.clone(), x: x.clone(), role: weight.role }));
            b.linear_backward_input(dy, &weight.value, weight.role)
        };
        let d_o = linear(&self.o, dh, &state.o);
        let (dq, dkv, dk_rope) = b.attention_backward(&state, &d_o, &config.attention());
        let dk_rope = b.rope(&dk_rope, &config.key_rope(), true);
        let dq = b.rope(&dq, &config.query_rope(), true);
        let dlatent_normed = linear(&self.kv_b, &dkv, &latent_normed);
        let dlatent = b.rms_norm_backward_input(&latent, &self.kv_norm.value, &dlatent_normed, NORM_EPS);
        let dx_kv = linear(&self.kv_a, &b.join(&dlatent, &dk_rope), &x);
        let mut norms = vec![(self.kv_norm.name.clone(), Product::RmsNorm { dy: dlatent_normed, x: latent })];
        let dx_q = match (&self.query, query) {
            (Query::Compressed { a, norm, b: up }, Some((low, normed))) => {
                let dnormed = linear(up, &dq, &normed);
                let dlow = b.rms_norm_backward_input(&low, &norm.value, &dnormed, NORM_EPS);
                norms.push((norm.name.clone(), Product::RmsNorm { dy: dnormed, x: low }));
                linear(a, &dlow, &x)
            }
            (Query::Direct(w), _) => linear(w, &dq, &x),
            (Query::Compressed { .. }, None) => unreachable!("a compressed query saves its latent"),
        };
        let dx = b.add(&dx_q, &dx_kv);
        let dnorm = b.rms_norm_backward_input(&h, &self.norm.value, &dx, NORM_EPS);
        norms.push((self.norm.name.clone(), Product::RmsNorm { dy: dx, x: h }));
        products.extend(norms);
        b.add(dh, &dnorm)
    }
}
