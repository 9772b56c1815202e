//! The gate's choice and its gradients, dispatch and combine. Kernels: `hopper/choice.cu`, `hopper/combine.cu`, and
//! `hopper/permute.cu` at the speed of memory, with the same bits.

use super::CudaBackend;
use super::elements::{by_element, by_row};
use super::tensors::{Elements, Made};
use crate::backend::{Backend, BackendError};
use crate::cuda::device::run;
use crate::cuda::memory::Memory;
use crate::cuda::products::TILE;
use crate::cuda::rows::{CHOICES_MAX, Places};
use crate::cuda::sources::{CHOICE, COMBINE, Source};
use crate::ops::combine::{Dispatch, Slot};
use crate::ops::gate::GateShape;
use crate::tensor::Tensor;

/// Warps of a block, each of which chooses for a token.
const WARPS: usize = 8;

/// See [`CudaBackend::places`]. Panics if a slot is none of the rows that its expert gets: the kernels do not look.
fn places_of(plan: &Dispatch) -> Vec<u32> {
    let starts = plan.starts();
    let place = |slot: &Slot| {
        let rows = plan.tokens.get(slot.expert as usize).map_or(0, Vec::len);
        assert!((slot.row as usize) < rows, "{slot:?} among {rows} rows of that expert");
        starts[slot.expert as usize] as u32 + slot.row
    };
    plan.slots.iter().map(place).collect()
}

impl CudaBackend {
    /// The kernels for what is stored.
    fn combiners(&self) -> &'static Source {
        &COMBINE[usize::from(self.low())]
    }

    /// The experts of each token, ascending, and their weights.
    pub(super) fn choose(
        &self,
        logits: &Tensor,
        bias: &Tensor,
        s: &GateShape,
    ) -> Result<(Memory<u32>, Elements), BackendError> {
        let allowed = s.experts / s.groups * s.groups_kept;
        assert!(s.experts.is_multiple_of(s.groups) && s.top_k <= allowed, "a choice among {allowed}: {s:?}");
        assert_eq!([logits.columns(), bias.columns()], [s.experts; 2], "columns of a gate");
        let (of_logits, of_bias, tokens) = (self.wide(logits)?, self.wide(bias)?, logits.rows());
        let (mut experts, weights) = (self.gpu.room::<u32>(tokens * s.top_k)?, self.wide_room(tokens, s.top_k)?);
        let shape = (tokens.div_ceil(WARPS), 32 * WARPS as u32, 4 * WARPS * (2 * (s.experts + s.groups) + s.top_k));
        let sizes = [tokens, s.experts, s.top_k, s.groups, s.groups_kept].map(|n| n as i32);
        let ([t, count, top_k, groups, kept], scale) = (sizes, &s.routed_scale);
        let (logits, bias, to) = (&of_logits.address(), &of_bias.address(), (&mut experts, &weights.address()));
        run!(self.gpu, CHOICE, "gate", shape, logits, bias, to.0, to.1, &t, &count, &top_k, &groups, &kept, scale)?;
        Ok((experts, weights))
    }

    pub(super) fn choice_gradient(
        &self,
        logits: &Tensor,
        experts: &Tensor,
        dweights: &Tensor,
        s: &GateShape,
    ) -> Result<Elements, BackendError> {
        let (of_logits, chosen, of_weights) = (self.wide(logits)?, self.indices(experts)?, self.wide(dweights)?);
        assert_eq!(logits.columns(), s.experts, "columns of a gate");
        assert_eq!([chosen.data.len(), of_weights.len()], [logits.rows() * s.top_k; 2], "choices of every token");
        assert!(chosen.below <= s.experts as u64, "choices below {} of {} experts", chosen.below, s.experts);
        let d = Elements::f32(self.gpu.zeros(of_logits.len())?);
        let (shape, sizes) = (by_element(logits.rows()), [logits.rows(), s.experts, s.top_k].map(|n| n as i32));
        let ([t, count, top_k], logits, dw) = (sizes, &of_logits.address(), &of_weights.address());
        let scale = &s.routed_scale;
        run!(
            self.gpu,
            CHOICE,
            "gate_backward",
            shape,
            logits,
            &*chosen.data,
            dw,
            &d.address(),
            &t,
            &count,
            &top_k,
            scale
        )?;
        Ok(d)
    }

    pub(super) fn balance_gradient(
        &self,
        logits: &Tensor,
        s: &GateShape,
        factor: f32,
    ) -> Result<Elements, BackendError> {
        let (of_logits, tokens) = (self.wide(logits)?, logits.rows());
        assert_eq!(logits.columns(), s.experts, "columns of a gate");
        assert!(s.sequence > 0 && s.top_k > 0, "sequences of tokens that choose: {s:?}");
        let mut counts = self.gpu.zeros::<u32>(tokens.div_ceil(s.sequence) * s.experts)?;
        let d = self.wide_room(tokens, s.experts)?;
        let (elements, shape, logits) = (of_logits.len() as u64, by_element(of_logits.len()), &of_logits.address());
        let [t, count, top_k, sequence] = [tokens, s.experts, s.top_k, s.sequence].map(|n| n as i32);
        let (count, top_k, sequence) = (&count, &top_k, &sequence);
        run!(self.gpu, CHOICE, "balance_counts", shape, logits, &mut counts, &elements, count, top_k, sequence)?;
        let (shape, of) = (by_row(tokens), &counts);
        run!(
            self.gpu,
            CHOICE,
            "balance_backward",
            shape,
            logits,
            of,
            &d.address(),
            &t,
            count,
            top_k,
            sequence,
            &factor
        )?;
        Ok(d)
    }

    /// The rows of all experts, one expert after another.
    pub(super) fn sent(&self, x: &Tensor, plan: &Dispatch) -> Result<Elements, BackendError> {
        let tokens: Vec<u32> = plan.tokens.iter().flatten().copied().collect();
        self.gather(&self.gpu.upload(&tokens)?, x)
    }

    /// Each expert's rows of those of all.
    pub(super) fn by_expert(&self, rows: &Tensor, plan: &Dispatch) -> Vec<Tensor> {
        plan.starts().into_iter().zip(&plan.tokens).map(|(from, t)| self.rows(rows, from, t.len())).collect()
    }

    /// The row of each choice where the rows of all experts follow each other.
    fn places(&self, plan: &Dispatch) -> Result<Memory<u32>, BackendError> {
        self.gpu.upload(&places_of(plan))
    }

    /// The same for the kernels at the speed of memory, if they take rows like these.
    fn fast_places(&self, plan: &Dispatch, columns: usize) -> Result<Option<Places>, BackendError> {
        if !self.low() || !columns.is_multiple_of(TILE) || plan.top_k > CHOICES_MAX {
            return Ok(None);
        }
        let place: Vec<i32> = places_of(plan).into_iter().map(|row| row as i32).collect();
        let experts: Vec<i32> = plan.slots.iter().map(|slot| slot.expert as i32).collect();
        Places::new(&self.gpu, (plan.top_k, plan.group_size, place.len()), &place, &experts).map(Some)
    }

    pub(super) fn combined(
        &self,
        rows: &[Tensor],
        weights: Option<&Tensor>,
        plan: &Dispatch,
    ) -> Result<Elements, BackendError> {
        let (all, columns) = (self.stacked(rows)?, rows[0].columns());
        assert_eq!(all.len(), plan.slots.len() * columns, "rows of every expert, as the plan has them");
        let weights = weights.map(|w| self.wide(w)).transpose()?;
        assert!(weights.as_ref().is_none_or(|w| w.len() == plan.slots.len()), "a weight of every slot");
        if let Some(places) = self.fast_places(plan, columns)? {
            let mut y = self.gpu.room(plan.slots.len() / plan.top_k * columns)?;
            self.gpu.combine_rows(&all.words(), &places, weights.as_ref().map(Elements::floats), &mut y, columns)?;
            return Ok(Elements::bf16(y));
        }
        let groups: Vec<u32> = plan.slots.iter().map(|s| s.expert / plan.group_size as u32).collect();
        let (places, groups) = (self.places(plan)?, self.gpu.upload(&groups)?);
        // A place that is none: ones.
        let of_weights = weights.as_ref().map_or(0, Elements::address);
        let y = self.room(plan.slots.len() / plan.top_k, columns)?;
        let (count, shape) = (y.len() as u64, by_element(y.len()));
        let ([columns, top_k], rows) = ([columns, plan.top_k].map(|n| n as i32), &all.address());
        let of = (&places, &groups, &of_weights);
        run!(
            self.gpu,
            *self.combiners(),
            "combine",
            shape,
            rows,
            of.0,
            of.1,
            of.2,
            &y.address(),
            &count,
            &columns,
            &top_k
        )?;
        Ok(y)
    }

    pub(super) fn combined_gradients(
        &self,
        dy: &Tensor,
        rows: &[Tensor],
        weights: &Tensor,
        plan: &Dispatch,
    ) -> Made<2> {
        let (all, of_dy, of_weights, columns) =
            (self.stacked(rows)?, self.activation(dy)?, self.wide(weights)?, dy.columns());
        assert_eq!(all.len(), plan.slots.len() * columns, "rows of every expert, as the plan has them");
        assert_eq!(of_dy.len() * plan.top_k, plan.slots.len() * columns, "a gradient of every token");
        assert_eq!(of_weights.len(), plan.slots.len(), "a weight of every slot");
        if let Some(places) = self.fast_places(plan, columns)? {
            let (mut drows, mut dweights) = (self.gpu.room(all.len())?, self.gpu.room(of_weights.len())?);
            let (dy, rows, made) = (of_dy.words(), all.words(), (&mut drows, &mut dweights));
            self.gpu.combine_rows_backward(&dy, &rows, &places, &of_weights.floats(), made, columns)?;
            return Ok([Elements::bf16(drows), Elements::f32(dweights)]);
        }
        let (places, choices, shape) = (self.places(plan)?, plan.slots.len() as u64, by_row(plan.slots.len()));
        let (drows, dweights) = (self.room(1, all.len())?, self.wide_room(1, of_weights.len())?);
        let ([columns, top_k], dy, rows) = ([columns, plan.top_k].map(|n| n as i32), &of_dy.address(), &all.address());
        let (of, to) = ((&places, &of_weights.address()), (&drows.address(), &dweights.address()));
        let (columns, top_k) = (&columns, &top_k);
        run!(
            self.gpu,
            *self.combiners(),
            "combine_backward",
            shape,
            dy,
            rows,
            of.0,
            of.1,
            to.0,
            to.1,
            &choices,
            columns,
            top_k
        )?;
        Ok([drows, dweights])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_rows_of_the_experts_one_after_another() {
        assert_eq!(places_of(&Dispatch::new(&[0, 2, 1, 2, 0, 1], 2, 3, 1)), [0, 4, 2, 5, 1, 3]);
    }

    #[test]
    #[should_panic(expected = "Slot { expert: 1, row: 1 } among 1 rows of that expert")]
    fn a_slot_beyond_its_experts_rows_is_refused() {
        let mut plan = Dispatch::new(&[0, 1], 1, 2, 1);
        plan.slots[1].row = 1;
        places_of(&plan);
    }

    #[test]
    #[should_panic(expected = "Slot { expert: 2, row: 0 } among 0 rows of that expert")]
    fn a_slot_of_no_expert_is_refused() {
        let mut plan = Dispatch::new(&[0, 1], 1, 2, 1);
        plan.slots[1].expert = 2;
        places_of(&plan);
    }
}
