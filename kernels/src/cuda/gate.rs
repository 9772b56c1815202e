//! The gate's products in FP32: logits, and the gradients of its input and its weight. They have the bits of the CPU; layouts
//! and orders of sums are told in `hopper/gate.cu`.

use super::device::{Gpu, launch_of};
use super::sources::GATE;
use crate::backend::BackendError;
use cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};

/// A tile of a result, and the terms of a block, as the kernel has them.
const TILE: (usize, usize) = (128, 64);
const BLOCK: usize = 256;
/// Bytes of shared memory: two stages of 16 terms, and a tile of sums.
const SHARED: usize = (2 * 16 * (TILE.0 + TILE.1) + TILE.0 * TILE.1) * 4;

/// What activations are stored as: f32, or BF16 as `u16`.
pub trait Activation: DeviceRepr {
    /// Functions of `hopper/gate.cu`: logits, gradient of the input, gradient of the weight.
    #[doc(hidden)]
    const NAMES: [&'static str; 3];
}

impl Activation for u16 {
    const NAMES: [&'static str; 3] = ["logits_bf16", "input_bf16", "weight_bf16"];
}

impl Activation for f32 {
    const NAMES: [&'static str; 3] = ["logits_f32", "input_f32", "weight_f32"];
}

/// Blocks of each part of a product of `tiles`: the fewest parts among those that should be done first. One part on a
/// multiprocessor hides its waits worse than several, and where there is more than one, blocks go through memory. Those are
/// estimates; the result's bits are the same for all.
fn share(tiles: usize, blocks: usize, processors: usize) -> usize {
    let cost = |each: &usize| {
        let turns = (tiles * blocks.div_ceil(*each)).div_ceil(processors);
        let time = if turns == 1 { 125 } else { 100 * turns };
        time * each * if *each < blocks { 130 } else { 100 }
    };
    (1..=blocks.max(1)).rev().min_by_key(cost).expect("there is one at least")
}

/// The sizes of a product of the kernel: rows and columns of its result, and the terms of its sums.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    m: usize,
    n: usize,
    k: usize,
}

impl Sizes {
    fn tiles(self) -> usize {
        self.m.div_ceil(TILE.0) * self.n.div_ceil(TILE.1)
    }

    fn blocks(self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    /// Elements of `sums` if there are parts of so many blocks.
    fn sums(self, each: usize) -> usize {
        if each < self.blocks() { self.blocks() * self.m * self.n } else { 0 }
    }
}

/// Panics if the kernel does not take so many.
fn check(experts: usize, inputs: usize) {
    let fits = experts.is_multiple_of(8) && inputs.is_multiple_of(8) && experts > 0 && inputs > 0;
    assert!(fits, "a gate of {experts} experts and {inputs} inputs, in eights");
}

impl Gpu {
    fn gate_share(&self, sizes: Sizes) -> usize {
        share(sizes.tiles(), sizes.blocks(), self.processors as usize)
    }

    /// Elements of the room that logits and gradients of a weight of `[T, E, I]` need between the parts of their sums.
    pub fn gate_room(&self, [tokens, experts, inputs]: [usize; 3]) -> usize {
        let all = [Sizes { m: tokens, n: experts, k: inputs }, Sizes { m: inputs, n: experts, k: tokens }];
        all.into_iter().map(|sizes| sizes.sums(self.gate_share(sizes))).max().unwrap_or(0)
    }

    /// `x_TI, w_EI -> logits_TE`. `room` is as long as [`Self::gate_room`] says, or longer.
    pub fn gate_logits<X: Activation>(
        &self,
        [tokens, experts, inputs]: [usize; 3],
        x: &CudaSlice<X>,
        w: &CudaSlice<f32>,
        room: &mut CudaSlice<f32>,
        logits: &mut CudaSlice<f32>,
    ) -> Result<(), BackendError> {
        check(experts, inputs);
        let lengths = (x.len(), w.len(), logits.len());
        assert_eq!(lengths, (tokens * inputs, experts * inputs, tokens * experts), "elements of a gate");
        let sizes = Sizes { m: tokens, n: experts, k: inputs };
        self.in_parts(X::NAMES[0], sizes, x, w, room, logits)
    }

    /// `dlogits_TE, w_EI -> dx_TI`, rounded once if that is BF16.
    pub fn gate_input_gradient<X: Activation>(
        &self,
        [tokens, experts, inputs]: [usize; 3],
        dlogits: &CudaSlice<f32>,
        w: &CudaSlice<f32>,
        dx: &mut CudaSlice<X>,
    ) -> Result<(), BackendError> {
        check(experts, inputs);
        let lengths = (dlogits.len(), w.len(), dx.len());
        assert_eq!(lengths, (tokens * experts, experts * inputs, tokens * inputs), "elements of a gate's gradients");
        let sizes = Sizes { m: tokens, n: inputs, k: experts };
        // There are few terms and many tiles: one part, which needs no room.
        self.gate_product(X::NAMES[1], sizes, sizes.blocks(), (dlogits, w), dx, &mut self.room(0)?)
    }

    /// `dlogits_TE, x_TI -> dw_EI`, all tokens in their order. `room` as for the logits.
    pub fn gate_weight_gradient<X: Activation>(
        &self,
        [tokens, experts, inputs]: [usize; 3],
        dlogits: &CudaSlice<f32>,
        x: &CudaSlice<X>,
        room: &mut CudaSlice<f32>,
        dw: &mut CudaSlice<f32>,
    ) -> Result<(), BackendError> {
        check(experts, inputs);
        let lengths = (dlogits.len(), x.len(), dw.len());
        assert_eq!(lengths, (tokens * experts, tokens * inputs, experts * inputs), "elements of a gate's gradients");
        let sizes = Sizes { m: inputs, n: experts, k: tokens };
        self.in_parts(X::NAMES[2], sizes, x, dlogits, room, dw)
    }

    /// A product of as many parts as are best, and the sum of their blocks.
    fn in_parts<X: Activation>(
        &self,
        name: &'static str,
        sizes: Sizes,
        a: &CudaSlice<X>,
        b: &CudaSlice<f32>,
        room: &mut CudaSlice<f32>,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), BackendError> {
        let each = self.gate_share(sizes);
        let (needed, elements) = (sizes.sums(each), sizes.m * sizes.n);
        assert!(room.len() >= needed, "room for {needed} sums, not {}", room.len());
        self.gate_product(name, sizes, each, (a, b), y, room)?;
        if needed == 0 {
            return Ok(());
        }
        let function = self.function(&GATE, "sum_blocks", 0)?;
        let (count, blocks) = (elements as u32, sizes.blocks() as i32);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&*room).arg(y).arg(&count).arg(&blocks);
        let config = launch_of(count.div_ceil(4 * 256), 256, 0);
        // SAFETY: `y` has so many elements and `room` as many of each block, which is asserted; the kernel checks its own.
        unsafe { launch.launch(config) }.map_err(|e| self.error(format!("sum_blocks: {e}")))?;
        Ok(())
    }

    /// The product in parts of `each` blocks, of operands whose lengths the callers have asserted.
    fn gate_product<A: DeviceRepr, Y: DeviceRepr>(
        &self,
        name: &'static str,
        sizes: Sizes,
        each: usize,
        (a, b): (&CudaSlice<A>, &CudaSlice<f32>),
        y: &mut CudaSlice<Y>,
        sums: &mut CudaSlice<f32>,
    ) -> Result<(), BackendError> {
        let each = each.max(1);
        let blocks = sizes.tiles() * sizes.blocks().div_ceil(each).max(1);
        if blocks == 0 {
            return Ok(());
        }
        let function = self.function(&GATE, name, SHARED as u32)?;
        let [m, n, k, each] = [sizes.m, sizes.n, sizes.k, each].map(|n| n as i32);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(a).arg(b).arg(y).arg(sums).arg(&m).arg(&n).arg(&k).arg(&each);
        // SAFETY: the lengths are asserted by the callers; the kernel checks its rows, columns and terms, and writes `sums`
        // only where there are parts.
        unsafe { launch.launch(launch_of(blocks as u32, 128, SHARED as u32)) }
            .map_err(|e| self.error(format!("{name}: {e}")))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fill_a_card_and_cost_nothing_where_it_is_full() {
        // 16,384 tokens of 256 experts are tiles enough; a weight of 64 experts is not.
        assert_eq!(share(512, 28, 132), 28);
        assert_eq!(share(128, 28, 132), 28);
        assert!(share(16, 32, 132) <= 4);
        assert_eq!(share(1, 0, 132), 1);
    }
}
