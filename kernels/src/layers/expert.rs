//! A routed expert, and the grouped batch in which a host runs many at once.
//!
//! Rows keep their bits whatever they are batched with; a weight gradient is one product over one
//! micro-batch's rows in order of (lane, token).

use super::{ParameterMap, Product, Weight};
use crate::backend::{Backend, Role};
use crate::tensor::Tensor;

/// Weights of one expert.
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    gate: Weight,
    up: Weight,
    down: Weight,
}

impl ExpertWeights {
    /// From the parameters of its group.
    pub fn new(map: &ParameterMap, layer: u32, expert: u32) -> Self {
        let prefix = format!("model.layers.{layer}.mlp.experts.{expert}.");
        Self {
            gate: Weight::take(map, &prefix, "gate_proj.weight"),
            up: Weight::take(map, &prefix, "up_proj.weight"),
            down: Weight::take(map, &prefix, "down_proj.weight"),
        }
    }
}

/// What an expert keeps of some rows between forward and backward.
#[derive(Debug, Clone)]
pub struct ExpertSaved {
    x: Tensor,
    gate: Tensor,
    up: Tensor,
}

/// What an expert keeps of some rows until their weight gradient.
#[derive(Debug, Clone)]
pub struct ExpertHeld {
    x: Tensor,
    h: Tensor,
    dgate: Tensor,
    dup: Tensor,
    dy: Tensor,
}

impl ExpertHeld {
    /// Rows held.
    pub fn rows(&self) -> usize {
        self.dy.rows()
    }
}

/// Splits rows that were stacked back into the items' parts.
fn unstack(b: &dyn Backend, all: &Tensor, counts: &[u32]) -> Vec<Tensor> {
    let mut from = 0;
    counts
        .iter()
        .map(|count| {
            let part = b.rows(all, from, *count as usize);
            from += *count as usize;
            part
        })
        .collect()
}

fn weights_of<T>(items: &[(ExpertWeights, T)], which: impl Fn(&ExpertWeights) -> &Weight) -> Vec<Tensor> {
    items.iter().map(|(w, _)| which(w).value.clone()).collect()
}

/// Forward for many experts' rows `x_ND` as one batch `-> (y_ND, saved)` by item.
pub fn expert_forward(b: &dyn Backend, items: Vec<(ExpertWeights, Tensor)>) -> Vec<(Tensor, ExpertSaved)> {
    if items.is_empty() {
        return Vec::new();
    }
    let counts: Vec<u32> = items.iter().map(|(_, x)| x.rows() as u32).collect();
    let groups = b.upload_indices(counts.clone());
    let x = b.stack(&items.iter().map(|(_, x)| x.clone()).collect::<Vec<_>>());
    let gate = b.grouped_linear(&x, &groups, &weights_of(&items, |w| &w.gate), Role::ExpertIn);
    let up = b.grouped_linear(&x, &groups, &weights_of(&items, |w| &w.up), Role::ExpertIn);
    let y = b.grouped_linear(&b.swiglu(&gate, &up), &groups, &weights_of(&items, |w| &w.down), Role::ExpertOut);
    let parts = unstack(b, &gate, &counts).into_iter().zip(unstack(b, &up, &counts));
    unstack(b, &y, &counts)
        .into_iter()
        .zip(parts)
        .zip(items)
        .map(|((y, (gate, up)), (_, x))| (y, ExpertSaved { x, gate, up }))
        .collect()
}

/// Input gradient for many experts' rows `dy_ND` as one batch `-> (dx_ND, held)` by item.
pub fn expert_backward_input(
    b: &dyn Backend,
    items: Vec<(ExpertWeights, (ExpertSaved, Tensor))>,
) -> Vec<(Tensor, ExpertHeld)> {
    if items.is_empty() {
        return Vec::new();
    }
    let counts: Vec<u32> = items.iter().map(|(_, (_, dy))| dy.rows() as u32).collect();
    let groups = b.upload_indices(counts.clone());
    let all = |part: fn(&(ExpertSaved, Tensor)) -> &Tensor| {
        b.stack(&items.iter().map(|(_, item)| part(item).clone()).collect::<Vec<_>>())
    };
    let (dy, gate, up) = (all(|i| &i.1), all(|i| &i.0.gate), all(|i| &i.0.up));
    let dh = b.grouped_linear_backward_input(&dy, &groups, &weights_of(&items, |w| &w.down), Role::ExpertOut);
    let [h, dgate, dup] = b.swiglu_backward(&gate, &up, &dh);
    let dx = b.add(
        &b.grouped_linear_backward_input(&dgate, &groups, &weights_of(&items, |w| &w.gate), Role::ExpertIn),
        &b.grouped_linear_backward_input(&dup, &groups, &weights_of(&items, |w| &w.up), Role::ExpertIn),
    );
    let [h, dgate, dup, dx] = [h, dgate, dup, dx].map(|t| unstack(b, &t, &counts).into_iter());
    h.zip(dgate)
        .zip(dup)
        .zip(dx)
        .zip(items)
        .map(|((((h, dgate), dup), dx), (_, (saved, dy)))| (dx, ExpertHeld { x: saved.x, h, dgate, dup, dy }))
        .collect()
}

/// Weight gradients of one micro-batch, by name: `parts` are the lanes' rows in order of lane.
pub fn expert_backward_weight(b: &dyn Backend, weights: &ExpertWeights, parts: &[ExpertHeld]) -> ParameterMap {
    let all = |part: fn(&ExpertHeld) -> &Tensor| b.stack(&parts.iter().map(|p| part(p).clone()).collect::<Vec<_>>());
    let x = all(|p| &p.x);
    let product = |weight: &Weight, dy: Tensor, x: Tensor| {
        (weight.name.clone(), Product::Linear { dy, x, role: weight.role }.make(b))
    };
    ParameterMap::from([
        product(&weights.gate, all(|p| &p.dgate), x.clone()),
        product(&weights.up, all(|p| &p.dup), x),
        product(&weights.down, all(|p| &p.dy), all(|p| &p.h)),
    ])
}
