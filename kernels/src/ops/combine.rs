//! Dispatch and combine of a mixture layer: which row goes to which expert, and how the experts'
//! rows become one row again.
//!
//! Order of sums (DESIGN 3.1): within a group of experts, products `weight * row` are added in
//! ascending order of expert, each made first and then added, and the sum is rounded to the type that
//! rows travel in; then the groups' sums are added in ascending order of group. So a token's result
//! does not depend on where its experts are, nor on who adds the rows of a whole group.

use crate::element::{Element, in_pieces};
use crate::math::sum_of;
use crate::tensor::Tensor;
use crate::wide;

/// Where one choice of a token went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The expert.
    pub expert: u32,
    /// The row among the expert's rows.
    pub row: u32,
}

/// Who gets which rows of one micro-batch. Pure data, made from the gate's choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispatch {
    /// Tokens of each expert, ascending.
    pub tokens: Vec<Vec<u32>>,
    /// `top_k` slots of each token, in ascending order of expert.
    pub slots: Vec<Slot>,
    /// Slots of a token.
    pub top_k: usize,
    /// Experts of a group.
    pub group_size: usize,
}

impl Dispatch {
    /// From the experts of each token, ascending in each token.
    pub fn new(experts: &[u32], top_k: usize, expert_count: usize, groups: usize) -> Self {
        let mut tokens = vec![Vec::new(); expert_count];
        let mut slots = Vec::with_capacity(experts.len());
        for (at, expert) in experts.iter().enumerate() {
            let list: &mut Vec<u32> = &mut tokens[*expert as usize];
            slots.push(Slot { expert: *expert, row: list.len() as u32 });
            list.push((at / top_k) as u32);
        }
        Self { tokens, slots, top_k, group_size: expert_count / groups }
    }

    /// Rows of all experts, one expert after another, by expert.
    pub(crate) fn by_expert(&self, rows: &Tensor) -> Vec<Tensor> {
        self.starts().into_iter().zip(&self.tokens).map(|(from, tokens)| rows.view(from, tokens.len())).collect()
    }

    /// Each expert's first row, where the rows of all lie one expert after another.
    pub fn starts(&self) -> Vec<usize> {
        let first = |end: &mut usize, tokens: &Vec<u32>| Some(std::mem::replace(end, *end + tokens.len()));
        self.tokens.iter().scan(0, first).collect()
    }

    /// Rows that each expert gets.
    pub fn counts(&self) -> Vec<u64> {
        self.tokens.iter().map(|t| t.len() as u64).collect()
    }
}

/// `x_TD ->` each expert's rows, one expert after another.
pub(crate) fn dispatch<E: Element>(x: &[E], plan: &Dispatch, d: usize) -> Vec<E> {
    let mut rows = Vec::with_capacity(plan.slots.len() * d);
    plan.tokens.iter().flatten().for_each(|t| rows.extend_from_slice(&x[*t as usize * d..][..d]));
    rows
}

/// Experts' rows, `weights_TK` (or ones) `-> y_TD`.
pub(crate) fn forward<E: Element>(rows: &[&[E]], weights: Option<&[f32]>, plan: &Dispatch, d: usize) -> Vec<E> {
    let tokens = plan.slots.len() / plan.top_k;
    let mut out = wide::unwritten(tokens * d);
    let (mut y, mut group, mut rounded) = (vec![0.0f32; d], vec![0.0f32; d], vec![E::default(); d]);
    wide::run(
        #[inline(always)]
        || {
            for (t, (slots, out)) in plan.slots.chunks_exact(plan.top_k).zip(out.chunks_exact_mut(d)).enumerate() {
                y.fill(0.0);
                let mut k = 0;
                while k < slots.len() {
                    let id = slots[k].expert as usize / plan.group_size;
                    group.fill(0.0);
                    while k < slots.len() && slots[k].expert as usize / plan.group_size == id {
                        let row = &rows[slots[k].expert as usize][slots[k].row as usize * d..][..d];
                        let w = weights.map_or(1.0, |w| w[t * plan.top_k + k]);
                        group.iter_mut().zip(row).for_each(|(sum, x)| *sum += w * x.value());
                        k += 1;
                    }
                    E::store(&group, &mut rounded);
                    y.iter_mut().zip(&rounded).for_each(|(y, sum)| *y += sum.value());
                }
                E::store(&y, out);
            }
        },
    );
    out
}

/// `dy_TD`, the experts' rows and `weights_TK` `->` (gradients of the experts' rows, one expert after
/// another, `dweights_TK`).
pub(crate) fn backward<E: Element>(
    dy: &[E],
    rows: &[&[E]],
    weights: &[f32],
    plan: &Dispatch,
    d: usize,
) -> (Vec<E>, Vec<f32>) {
    let whole = rows.iter().zip(plan.counts()).all(|(rows, count)| rows.len() as u64 == count * d as u64);
    assert!(whole && rows.len() == plan.tokens.len(), "rows of every expert, as the plan has them");
    // Results are written token by token: one that is missing would leave some unwritten.
    assert_eq!(dy.len() * plan.top_k, plan.slots.len() * d, "a gradient of every token");
    assert_eq!(weights.len(), plan.slots.len(), "a weight of every slot");
    let starts = plan.starts();
    let mut drows = wide::unwritten(plan.slots.len() * d);
    let mut dweights = wide::unwritten(weights.len());
    let (mut of_dy, mut of_row) = (vec![0.0; d], vec![0.0; d]);
    wide::run(
        #[inline(always)]
        || {
            for (t, (dy, slots)) in dy.chunks_exact(d).zip(plan.slots.chunks_exact(plan.top_k)).enumerate() {
                let dy = E::row(dy, &mut of_dy);
                for (k, slot) in slots.iter().enumerate() {
                    let (at, expert) = (t * plan.top_k + k, slot.expert as usize);
                    let of_expert = slot.row as usize;
                    let row = E::row(&rows[expert][of_expert * d..][..d], &mut of_row);
                    dweights[at] = sum_of([dy, row], |[dy, row]| dy * row);
                    let out = &mut drows[(starts[expert] + of_expert) * d..][..d];
                    let weight = weights[at];
                    in_pieces(out, |at, out| out.iter_mut().zip(&dy[at]).for_each(|(out, dy)| *out = weight * dy));
                }
            }
        },
    );
    (drows, dweights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Bf16;
    use crate::ops::testing::*;

    fn reference(rows: &[Vec<f64>], weights: &[f64], plan: &Dispatch, d: usize) -> Vec<f64> {
        let mut y = vec![0.0; plan.slots.len() / plan.top_k * d];
        for (at, slot) in plan.slots.iter().enumerate() {
            for i in 0..d {
                y[at / plan.top_k * d + i] += weights[at] * rows[slot.expert as usize][slot.row as usize * d + i];
            }
        }
        y
    }

    #[test]
    fn agrees_with_the_reference() {
        let (d, k) = (5, 3);
        let plan = Dispatch::new(&[0, 2, 5, 1, 2, 3, 0, 4, 5], k, 6, 3);
        assert_eq!(plan.counts(), [2, 1, 2, 1, 1, 2]);
        assert_eq!(plan.tokens[2], [0, 1]);
        let rows: Vec<Vec<f32>> = plan.tokens.iter().enumerate().map(|(e, t)| random(t.len() * d, e as u32)).collect();
        let views: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let (weights, dy) = (random(9, 20), random(3 * d, 21));
        let wide_rows: Vec<Vec<f64>> = rows.iter().map(|r| wide(r)).collect();
        let want = reference(&wide_rows, &wide(&weights), &plan, d);
        assert_close(&forward(&views, Some(&weights), &plan, d), &want, 1e-6, "y");
        let (drows, dweights) = backward(&dy, &views, &weights, &plan, d);
        let mut drows = &drows[..];
        let want = gradient(&weights, |w| dot(&reference(&wide_rows, w, &plan, d), &dy));
        assert_close(&dweights, &want, 1e-6, "dweights");
        for e in 0..6 {
            let want = gradient(&rows[e], |r| {
                let mut rows = wide_rows.clone();
                rows[e] = r.to_vec();
                dot(&reference(&rows, &wide(&weights), &plan, d), &dy)
            });
            let of_expert = drows.split_off(..rows[e].len()).expect("as many rows");
            assert_close(of_expert, &want, 1e-6, "drows");
        }
    }

    #[test]
    fn groups_are_summed_before_they_are_added() {
        let plan = Dispatch::new(&[0, 1, 2, 3], 4, 4, 2);
        let rows = [[1e8f32], [-1e8], [1.0], [1e-3]];
        let views: Vec<&[f32]> = rows.iter().map(|r| &r[..]).collect();
        let grouped = (1e8f32 + -1e8) + (1.0 + 1e-3);
        assert_eq!(forward(&views, None, &plan, 1), [grouped]);
    }

    #[test]
    fn a_groups_sum_is_rounded_to_the_type_of_its_rows() {
        // 1 + 2^-8 lies in the middle of two BF16 values and goes to 1; what three of them lack then shows.
        let plan = Dispatch::new(&[0, 1, 2, 3, 4, 5], 6, 6, 3);
        let rows: Vec<Bf16> = [1.0, 1.0 / 256.0].repeat(3).into_iter().map(Bf16::nearest).collect();
        let views: Vec<&[Bf16]> = rows.chunks(1).collect();
        let by_group = forward(&views, None, &plan, 1);
        assert_eq!(by_group[0].value(), 3.0);
        let plan = Dispatch::new(&[0, 1, 2, 3, 4, 5], 6, 6, 1);
        assert_eq!(forward(&views, None, &plan, 1)[0].value(), 3.015625);
    }
}
