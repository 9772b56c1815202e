//! How rows for a layer's experts are made again: whoever sent them need not keep each choice's copy of a token's row.
//!
//! - RC-1: an expert's rows made again have the bits of those that were sent, in every precision.

use crate::backend::Backend;
use crate::ops::combine::{Dispatch, Slot};
use crate::tensor::Tensor;
use std::sync::Arc;

/// What the rows of all experts of a layer are made of, for one micro-batch and one direction.
#[derive(Debug, Clone)]
pub struct RowsRecipe {
    /// `[T, D]`: what the rows are copies of.
    x: Tensor,
    /// `[T, K]`: what each copy is multiplied with, on the way back.
    weights: Option<Tensor>,
    plan: Arc<Dispatch>,
}

impl RowsRecipe {
    /// Of the way forward.
    pub(crate) fn forward(x: &Tensor, plan: &Arc<Dispatch>) -> Self {
        Self { x: x.alone(), weights: None, plan: Arc::clone(plan) }
    }

    /// Of the way back.
    pub(crate) fn backward(dy: &Tensor, weights: &Tensor, plan: &Arc<Dispatch>) -> Self {
        Self { x: dy.alone(), weights: Some(weights.alone()), plan: Arc::clone(plan) }
    }

    /// Elements of an expert's rows.
    pub fn elements(&self, expert: u32) -> usize {
        self.plan.tokens[expert as usize].len() * self.x.columns()
    }

    /// An expert's rows, `[tokens of the expert, D]`.
    pub fn rows(&self, b: &dyn Backend, expert: u32) -> Tensor {
        let tokens = &self.plan.tokens[expert as usize];
        if tokens.is_empty() {
            return b.rows(&self.x, 0, 0);
        }
        // Where it is the only expert.
        let alone = |tokens: Vec<u32>| {
            let slots = (0..tokens.len() as u32).map(|row| Slot { expert: 0, row }).collect();
            Dispatch { tokens: vec![tokens], slots, top_k: 1, group_size: 1 }
        };
        let copies = b.dispatch(&self.x, &alone(tokens.clone()));
        let Some(weights) = &self.weights else { return only(copies) };
        let weights = b.read(weights).expect("weights are read before rows are made again");
        let own = tokens.iter().map(|token| weights[self.slot(*token, expert)]).collect::<Vec<_>>();
        // F32 in every precision, as the gate made them.
        let own = Tensor::from_vec(own.len(), 1, own);
        let plan = alone((0..tokens.len() as u32).collect());
        only(b.combine_backward(&copies[0], &copies, &own, &plan).0)
    }

    /// Where the slots have this choice of a token.
    fn slot(&self, token: u32, expert: u32) -> usize {
        let from = token as usize * self.plan.top_k;
        let of_token = &self.plan.slots[from..][..self.plan.top_k];
        from + of_token.iter().position(|slot| slot.expert == expert).expect("a slot of every row")
    }
}

fn only(rows: Vec<Tensor>) -> Tensor {
    rows.into_iter().next().expect("rows of one expert")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Precision;
    use crate::cpu::CpuBackend;
    use crate::ops::testing::random;

    /// RC-1.
    #[test]
    fn rows_made_again_have_the_same_bits() {
        let (tokens, d, experts) = (7, 24, 6);
        let chosen = [0, 2, 4, 1, 2, 4, 0, 1, 2, 0, 2, 4, 0, 1, 4, 1, 2, 4, 0, 1, 2];
        let plan = Arc::new(Dispatch::new(&chosen, 3, experts, 2));
        let words = |t: &Tensor| {
            let (words, region) = t.to_words();
            (t.rows(), t.columns(), words, region.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp8] {
            let b = CpuBackend::new(precision);
            let numbers = |rows, columns, name| random(rows * columns, name);
            let activation = |name| b.upload(tokens, d, Arc::new(numbers(tokens, d, name)));
            let (x, dy) = (activation(1), activation(2));
            let weights = Tensor::from_vec(tokens, 3, numbers(tokens, 3, 3));
            let sent = b.dispatch(&x, &plan);
            let (sent_back, _) = b.combine_backward(&dy, &sent, &weights, &plan);
            let recipes = [RowsRecipe::forward(&x, &plan), RowsRecipe::backward(&dy, &weights, &plan)];
            for (recipe, sent) in recipes.iter().zip([&sent, &sent_back]) {
                for (expert, rows) in sent.iter().enumerate() {
                    let again = recipe.rows(&b, expert as u32);
                    assert_eq!(words(&again), words(rows), "{precision:?}, expert {expert}");
                    assert_eq!(recipe.elements(expert as u32), rows.rows() * d);
                }
            }
            assert!(recipes[0].elements(3) == 0 && recipes[0].elements(2) > d);
        }
    }
}
