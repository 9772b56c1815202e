//! A feed-forward part, `down(silu(gate x) * up x)`: dense layers and shared experts.

use super::{ParameterMap, Product, Products, Weight};
use crate::backend::Backend;
use crate::tensor::Tensor;

#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    gate: Weight,
    up: Weight,
    down: Weight,
}

#[derive(Debug, Clone)]
pub(crate) struct MlpSaved {
    x: Tensor,
    gate: Tensor,
    up: Tensor,
}

impl Mlp {
    pub(crate) fn new(map: &ParameterMap, prefix: &str) -> Self {
        Self {
            gate: Weight::take(map, prefix, "gate_proj.weight"),
            up: Weight::take(map, prefix, "up_proj.weight"),
            down: Weight::take(map, prefix, "down_proj.weight"),
        }
    }

    /// `x_TD -> y_TD`.
    pub(crate) fn forward(&self, b: &dyn Backend, x: Tensor) -> (Tensor, MlpSaved) {
        let (gate, up) = (b.linear(&x, &self.gate.value, self.gate.role), b.linear(&x, &self.up.value, self.up.role));
        let h = b.swiglu(&gate, &up);
        (b.linear(&h, &self.down.value, self.down.role), MlpSaved { x, gate, up })
    }

    /// `dy_TD -> dx_TD`.
    pub(crate) fn backward_input(
        &self,
        b: &dyn Backend,
        saved: MlpSaved,
        dy: &Tensor,
        products: &mut Products,
    ) -> Tensor {
        let MlpSaved { x, gate, up } = saved;
        let dh = b.linear_backward_input(dy, &self.down.value, self.down.role);
        let [h, dgate, dup] = b.swiglu_backward(&gate, &up, &dh);
        let dx = b.add(
            &b.linear_backward_input(&dgate, &self.gate.value, self.gate.role),
            &b.linear_backward_input(&dup, &self.up.value, self.up.role),
        );
        let mut push = |weight: &Weight, dy, x| {
            products.push((weight.name.clone(), Product::Linear { dy, x, role: weight.role }));
        };
        push(&self.gate, dgate, x.clone());
        push(&self.up, dup, x);
        push(&self.down, dy.clone(), h);
        dx
    }
}
