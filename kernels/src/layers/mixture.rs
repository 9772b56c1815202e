//! A layer's feed-forward part with its norm and residual: dense, or a mixture of experts whose
//! routed rows go out in the middle of it and come back.

use super::mlp::{Mlp, MlpSaved};
use super::{ParameterMap, Product, Products, RowsRecipe, Weight};
use crate::backend::Backend;
use crate::model::{ModelConfig, NORM_EPS};
use crate::ops::combine::Dispatch;
use crate::tensor::Tensor;
use std::sync::Arc;

#[derive(Debug, Clone)]
pub(crate) enum FeedForward {
    Dense(Mlp),
    Mixture { gate: Weight, bias: Weight, shared: Option<Mlp> },
}

/// The part of a mixture layer's forward function before the experts answer.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    h: Tensor,
    x: Tensor,
    logits: Tensor,
    experts: Tensor,
    weights: Tensor,
    pub(crate) plan: Arc<Dispatch>,
    shared: Option<(Tensor, MlpSaved)>,
}

#[derive(Debug, Clone)]
pub(crate) enum FeedForwardSaved {
    Dense { h: Tensor, mlp: Box<MlpSaved> },
    Mixture { sent: Box<Sent>, rows: Vec<Tensor> },
}

/// The part of a mixture layer's backward function before the experts answer.
#[derive(Debug, Clone)]
pub(crate) struct SentBack {
    dh: Tensor,
    dx: Tensor,
    h: Tensor,
    plan: Arc<Dispatch>,
}

/// A result, or rows for each expert, how to make them again, and what is needed when they come back.
pub(crate) enum Half<R, S> {
    Done(R),
    Experts { rows: Vec<Tensor>, recipe: RowsRecipe, sent: Box<S> },
}

#[derive(Debug, Clone)]
pub(crate) struct Mixture {
    norm: Weight,
    ffn: FeedForward,
}

impl Mixture {
    pub(crate) fn new(map: &ParameterMap, prefix: &str, config: &ModelConfig, layer: usize) -> Self {
        let ffn = if config.is_mixture(layer) {
            let shared = format!("{prefix}mlp.shared_experts.");
            FeedForward::Mixture {
                gate: Weight::take(map, prefix, "mlp.gate.weight"),
                bias: Weight::take(map, prefix, "mlp.gate.e_score_correction_bias"),
                shared: (config.shared_experts > 0).then(|| Mlp::new(map, &shared)),
            }
        } else {
            FeedForward::Dense(Mlp::new(map, &format!("{prefix}mlp.")))
        };
        Self { norm: Weight::take(map, prefix, "post_attention_layernorm.weight"), ffn }
    }

    /// `h_TD -> h_TD`, or rows for the experts.
    pub(crate) fn forward(
        &self,
        b: &dyn Backend,
        h: Tensor,
        config: &ModelConfig,
    ) -> Half<(Tensor, FeedForwardSaved), Sent> {
        let x = b.rms_norm(&h, &self.norm.value, NORM_EPS);
        match &self.ffn {
            FeedForward::Dense(mlp) => {
                let (y, mlp) = mlp.forward(b, x);
                Half::Done((b.add(&h, &y), FeedForwardSaved::Dense { h, mlp: Box::new(mlp) }))
            }
            FeedForward::Mixture { gate, bias, shared } => {
                let logits = b.linear(&x, &gate.value, gate.role);
                let (experts, weights) = b.gate(&logits, &bias.value, &config.gate());
                let chosen = b.read_indices(&experts).expect("the gate's choice is read before anything is sent");
                let plan = Arc::new(Dispatch::new(&chosen, config.top_k, config.experts, config.groups));
                let (rows, recipe) = (b.dispatch(&x, &plan), RowsRecipe::forward(&x, &plan));
                let shared = shared.as_ref().map(|mlp| mlp.forward(b, x.clone()));
                Half::Experts { rows, recipe, sent: Box::new(Sent { h, x, logits, experts, weights, plan, shared }) }
            }
        }
    }

    /// The rest of [`Self::forward`], with each expert's result.
    pub(crate) fn forward_rest(b: &dyn Backend, sent: Box<Sent>, rows: Vec<Tensor>) -> (Tensor, FeedForwardSaved) {
        let routed = b.combine(&rows, Some(&sent.weights), &sent.plan);
        let h = match &sent.shared {
            Some((shared, _)) => b.add(&b.add(&sent.h, shared), &routed),
            None => b.add(&sent.h, &routed),
        };
        (h, FeedForwardSaved::Mixture { sent, rows })
    }

    /// `dh_TD -> dh_TD`, or gradient rows for the experts.
    pub(crate) fn backward_input(
        &self,
        b: &dyn Backend,
        saved: FeedForwardSaved,
        dh: Tensor,
        config: &ModelConfig,
        balance: f32,
        products: &mut Products,
    ) -> Half<Tensor, SentBack> {
        match (&self.ffn, saved) {
            (FeedForward::Dense(mlp), FeedForwardSaved::Dense { h, mlp: saved }) => {
                let dx = mlp.backward_input(b, *saved, &dh, products);
                Half::Done(self.through_norm(b, &h, dx, &dh, products))
            }
            (FeedForward::Mixture { gate, shared, .. }, FeedForwardSaved::Mixture { sent, rows }) => {
                let (rows, dweights) = b.combine_backward(&dh, &rows, &sent.weights, &sent.plan);
                let recipe = RowsRecipe::backward(&dh, &sent.weights, &sent.plan);
                let mut dlogits = b.gate_backward(&sent.logits, &sent.experts, &dweights, &config.gate());
                if balance > 0.0 {
                    dlogits = b.accumulate(&dlogits, &b.gate_balance_backward(&sent.logits, &config.gate(), balance));
                }
                let mut dx = b.linear_backward_input(&dlogits, &gate.value, gate.role);
                products.push((gate.name.clone(), Product::Linear { dy: dlogits, x: sent.x, role: gate.role }));
                if let (Some(mlp), Some((_, saved))) = (shared, sent.shared) {
                    dx = b.add(&mlp.backward_input(b, saved, &dh, products), &dx);
                }
                Half::Experts { rows, recipe, sent: Box::new(SentBack { dh, dx, h: sent.h, plan: sent.plan }) }
            }
            (FeedForward::Dense(_), FeedForwardSaved::Mixture { .. })
            | (FeedForward::Mixture { .. }, FeedForwardSaved::Dense { .. }) => {
                unreachable!("a layer saves what its own kind needs")
            }
        }
    }

    /// The rest of [`Self::backward_input`], with each expert's input gradient.
    pub(crate) fn backward_rest(
        &self,
        b: &dyn Backend,
        sent: SentBack,
        rows: &[Tensor],
        products: &mut Products,
    ) -> Tensor {
        let dx = b.add(&sent.dx, &b.combine(rows, None, &sent.plan));
        self.through_norm(b, &sent.h, dx, &sent.dh, products)
    }

    fn through_norm(&self, b: &dyn Backend, h: &Tensor, dx: Tensor, dh: &Tensor, products: &mut Products) -> Tensor {
        let dnorm = b.rms_norm_backward_input(h, &self.norm.value, &dx, NORM_EPS);
        products.push((self.norm.name.clone(), Product::RmsNorm { dy: dx, x: h.clone() }));
        b.add(dh, &dnorm)
    }
}
