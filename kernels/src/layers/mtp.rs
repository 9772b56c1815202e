//! Multi-token prediction (technical report 2.2): one more block that predicts the token after the next.
//!
//! Its input joins the embedding of the next token with the main model's result, in this order, each
//! with its own norm: the layout of the published weights (`eh_proj`: embedding, then hidden). The
//! hidden state is taken after the final norm, as inference engines do that read those weights. Embedding
//! and head are the main model's own; their gradients from here are sums of their own
//! ([`second_use`]), so that the order of all sums is fixed (DESIGN 3.1).

use super::{ParameterMap, Product, Products, Weight, second_use};
use crate::backend::Backend;
use crate::model::NORM_EPS;
use crate::ops::cross_entropy::IGNORED;
use crate::tensor::Tensor;

/// The parts of the module around its block.
#[derive(Debug, Clone)]
pub(crate) struct Prediction {
    enorm: Weight,
    hnorm: Weight,
    project: Weight,
    norm: Weight,
    embedding: Weight,
    head: Weight,
}

/// What the entrance keeps.
#[derive(Debug)]
pub(crate) struct Entered {
    tokens: Tensor,
    embedded: Tensor,
    hidden: Tensor,
    joined: Tensor,
}

/// What the exit keeps.
#[derive(Debug)]
pub(crate) struct Left {
    h: Tensor,
    x: Tensor,
    dlogits: Tensor,
}

/// The targets of the module: those of the next position, none at a sequence's end.
fn shifted(targets: &[u32], sequence: usize) -> Vec<u32> {
    targets.chunks(sequence).flat_map(|s| s[1..].iter().copied().chain([IGNORED])).collect()
}

impl Prediction {
    pub(crate) fn new(map: &ParameterMap, prefix: &str) -> Self {
        let shared = |name: &str| {
            let weight = Weight::take(map, "", name);
            Weight { name: second_use(name), ..weight }
        };
        Self {
            enorm: Weight::take(map, prefix, "enorm.weight"),
            hnorm: Weight::take(map, prefix, "hnorm.weight"),
            project: Weight::take(map, prefix, "eh_proj.weight"),
            norm: Weight::take(map, prefix, "shared_head.norm.weight"),
            embedding: shared("model.embed_tokens.weight"),
            head: shared("lm_head.weight"),
        }
    }

    /// `hidden_TD` (after the final norm) and the next tokens `-> h_TD` for the block.
    pub(crate) fn enter(&self, b: &dyn Backend, hidden: Tensor, next: &[u32]) -> (Tensor, Entered) {
        let tokens = b.upload_indices(next.to_vec());
        let embedded = b.embedding(&tokens, &self.embedding.value);
        let e = b.rms_norm(&embedded, &self.enorm.value, NORM_EPS);
        let h = b.rms_norm(&hidden, &self.hnorm.value, NORM_EPS);
        let joined = b.join(&e, &h);
        (b.linear(&joined, &self.project.value, self.project.role), Entered { tokens, embedded, hidden, joined })
    }

    /// The block's result `h_TD -> loss_T`, with `scale` on the gradient.
    pub(crate) fn leave(
        &self,
        b: &dyn Backend,
        h: Tensor,
        next: &[u32],
        sequence: usize,
        scale: f32,
    ) -> (Tensor, Left) {
        let x = b.rms_norm(&h, &self.norm.value, NORM_EPS);
        let logits = b.linear(&x, &self.head.value, self.head.role);
        let targets = b.upload_indices(shifted(next, sequence));
        let (losses, dlogits) = b.cross_entropy(&logits, &targets, scale);
        (losses, Left { h, x, dlogits })
    }

    /// Back through the exit: the gradient of the block's result.
    pub(crate) fn backward_leave(&self, b: &dyn Backend, left: Left, products: &mut Products) -> Tensor {
        let Left { h, x, dlogits } = left;
        let dx = b.linear_backward_input(&dlogits, &self.head.value, self.head.role);
        let dh = b.rms_norm_backward_input(&h, &self.norm.value, &dx, NORM_EPS);
        products.push((self.head.name.clone(), Product::Linear { dy: dlogits, x, role: self.head.role }));
        products.push((self.norm.name.clone(), Product::RmsNorm { dy: dx, x: h }));
        dh
    }

    /// Back through the entrance: the gradient of the hidden state.
    pub(crate) fn backward_enter(
        &self,
        b: &dyn Backend,
        entered: Entered,
        dh: Tensor,
        products: &mut Products,
    ) -> Tensor {
        let Entered { tokens, embedded, hidden, joined } = entered;
        let djoined = b.linear_backward_input(&dh, &self.project.value, self.project.role);
        let (de, dhidden) = b.split(&djoined, embedded.columns());
        let dembedded = b.rms_norm_backward_input(&embedded, &self.enorm.value, &de, NORM_EPS);
        let dx = b.rms_norm_backward_input(&hidden, &self.hnorm.value, &dhidden, NORM_EPS);
        let vocabulary = self.embedding.value.rows();
        products.push((self.project.name.clone(), Product::Linear { dy: dh, x: joined, role: self.project.role }));
        products.push((self.enorm.name.clone(), Product::RmsNorm { dy: de, x: embedded }));
        products.push((self.hnorm.name.clone(), Product::RmsNorm { dy: dhidden, x: hidden }));
        products.push((self.embedding.name.clone(), Product::Embedding { dy: dembedded, tokens, vocabulary }));
        dx
    }
}
