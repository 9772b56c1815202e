//! Dispatch and combine of a mixture layer: which row goes to which expert, and how the experts'
//! rows become one row again.
//!
//! Order of sums (DESIGN 3.1): within a group of experts, products `weight * row` are added in
//! ascending order of expert, each made first and then added; then the groups' sums in ascending
//! order of group. So a token's result does not depend on where its experts are.

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

    /// Rows that each expert gets.
    pub fn counts(&self) -> Vec<u64> {
        self.tokens.iter().map(|t| t.len() as u64).collect()
    }
}

/// Rows `tokens` of `x_TD`.
pub(crate) fn gather(x: &[f32], tokens: &[u32], d: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(tokens.len() * d);
    tokens.iter().for_each(|t| rows.extend_from_slice(&x[*t as usize * d..][..d]));
    rows
}

/// Experts' rows, `weights_TK` (or ones) `-> y_TD`.
pub(crate) fn forward(rows: &[&[f32]], weights: Option<&[f32]>, plan: &Dispatch, d: usize) -> Vec<f32> {
    let tokens = plan.slots.len() / plan.top_k;
    let mut y = vec![0.0; tokens * d];
    let mut group = vec![0.0; d];
    for (t, (slots, y)) in plan.slots.chunks_exact(plan.top_k).zip(y.chunks_exact_mut(d)).enumerate() {
        let mut k = 0;
        while k < slots.len() {
            let id = slots[k].expert as usize / plan.group_size;
            group.fill(0.0);
            while k < slots.len() && slots[k].expert as usize / plan.group_size == id {
                let row = &rows[slots[k].expert as usize][slots[k].row as usize * d..][..d];
                let w = weights.map_or(1.0, |w| w[t * plan.top_k + k]);
                crate::wide::run(
                    #[inline(always)]
                    || group.iter_mut().zip(row).for_each(|(sum, x)| *sum += w * x),
                );
                k += 1;
            }
            crate::wide::run(
                #[inline(always)]
                || y.iter_mut().zip(&group).for_each(|(y, sum)| *y += sum),
            );
        }
    }
    y
}

/// `dy_TD`, the experts' rows and `weights_TK` `->` (gradient of each expert's rows, `dweights_TK`).
pub(crate) fn backward(
    dy: &[f32],
    rows: &[&[f32]],
    weights: &[f32],
    plan: &Dispatch,
    d: usize,
) -> (Vec<Vec<f32>>, Vec<f32>) {
    let whole = rows.iter().zip(plan.counts()).all(|(rows, count)| rows.len() as u64 == count * d as u64);
    assert!(whole && rows.len() == plan.tokens.len(), "rows of every expert, as the plan has them");
    let mut drows: Vec<Vec<f32>> = rows.iter().map(|r| crate::wide::unwritten(r.len())).collect();
    let mut dweights = crate::wide::unwritten(weights.len());
    for (at, slot) in plan.slots.iter().enumerate() {
        let dy = &dy[at / plan.top_k * d..][..d];
        let from = slot.row as usize * d;
        let row = &rows[slot.expert as usize][from..][..d];
        let out = &mut drows[slot.expert as usize][from..][..d];
        crate::wide::run(
            #[inline(always)]
            || {
                dweights[at] = crate::math::sum_of([dy, row], |[dy, row]| dy * row);
                out.iter_mut().zip(dy).for_each(|(out, dy)| *out = weights[at] * dy);
            },
        );
    }
    (drows, dweights)
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let want = gradient(&weights, |w| dot(&reference(&wide_rows, w, &plan, d), &dy));
        assert_close(&dweights, &want, 1e-6, "dweights");
        for e in 0..6 {
            let want = gradient(&rows[e], |r| {
                let mut rows = wide_rows.clone();
                rows[e] = r.to_vec();
                dot(&reference(&rows, &wide(&weights), &plan, d), &dy)
            });
            assert_close(&drows[e], &want, 1e-6, "drows");
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
}
