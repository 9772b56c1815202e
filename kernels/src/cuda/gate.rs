//! The gate's products in FP32: logits, and the gradients of its input and its weight. They have the bits of the CPU; layouts
//! and orders of sums are told in `hopper/gate.cu`.

use super::device::{Gpu, launch_of};
use super::failure::told;
use super::memory::Memory;
use super::sources::GATE;
use crate::backend::BackendError;
use cudarc::driver::{DevicePtr, DeviceRepr, PushKernelArg};

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

/// What an H100 was measured to need, in ns: a block of a tile, alone on a multiprocessor and beside another, and the launch
/// that adds blocks; and the bytes of its operands in a ns. Only the choice of parts depends on them.
const ALONE_NS: usize = 16_400;
const BESIDE_NS: usize = 26_900;
const LAUNCH_NS: usize = 4_000;
const BYTES_PER_NS: usize = 2_500;

/// The sizes of a product of the kernel: rows and columns of its result, and the terms of its sums.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    m: usize,
    n: usize,
    k: usize,
}

/// How the blocks of each tile are shared: a first part of `head`, one at least, and others of `each`. The first part adds its
/// blocks itself; those of the others go through memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parts {
    head: usize,
    each: usize,
}

impl Sizes {
    fn tiles(self) -> usize {
        self.m.div_ceil(TILE.0) * self.n.div_ceil(TILE.1)
    }

    fn blocks(self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    /// One part, which needs no room.
    fn whole(self) -> Parts {
        Parts { head: self.blocks().max(1), each: 1 }
    }

    /// Blocks that the first part leaves to others.
    fn left(self, parts: Parts) -> usize {
        self.blocks().saturating_sub(parts.head)
    }

    /// Sums of each element that meet in memory.
    fn sums(self, parts: Parts) -> usize {
        if self.left(parts) == 0 { 0 } else { 1 + self.left(parts) }
    }

    /// When all is done, about. Two blocks of threads have a place on each multiprocessor; first parts go first, and the others
    /// take places that are free or become free.
    fn time_ns(self, parts: Parts, processors: usize) -> usize {
        let (tiles, places, Parts { head, each }) = (self.tiles(), 2 * processors, parts);
        let others = tiles * self.left(parts).div_ceil(each);
        // The last round of first parts leaves places free. In blocks: when that begins, and when it and the others end.
        let (begin, last) = (tiles / places * head, tiles % places);
        let (free, heads_end) = (places - last, begin + if last > 0 { head } else { 0 });
        let others_end = match others.saturating_sub(free * (head / each)) {
            0 => begin + each * others.div_ceil(free),
            late => begin + head + each * late.div_ceil(places),
        };
        let blocks = if tiles + others <= processors {
            heads_end.max(others_end) * ALONE_NS
        } else if tiles <= processors {
            others_end * BESIDE_NS + heads_end.saturating_sub(others_end) * ALONE_NS
        } else {
            heads_end.max(others_end) * BESIDE_NS
        };
        // Each sum is written and read.
        let bytes = self.sums(parts) * self.m * self.n * 8;
        blocks + bytes / BYTES_PER_NS + if bytes > 0 { LAUNCH_NS } else { 0 }
    }

    /// The parts that should be done first: of those that are equal, the fewest.
    fn parts(self, processors: usize) -> Parts {
        let shared = (1..self.blocks()).rev().flat_map(|head| {
            let each = [16, 8, 4, 2, 1].into_iter().filter(move |each| *each <= head.min(self.blocks() - head));
            each.map(move |each| Parts { head, each })
        });
        let all = std::iter::once(self.whole()).chain(shared);
        all.min_by_key(|parts| self.time_ns(*parts, processors)).expect("one part is among them")
    }
}

/// Panics if the kernel does not take so many.
fn check(experts: usize, inputs: usize) {
    let fits = experts.is_multiple_of(8) && inputs.is_multiple_of(8) && experts > 0 && inputs > 0;
    assert!(fits, "a gate of {experts} experts and {inputs} inputs, in eights");
}

impl Gpu {
    /// Elements of the room that logits and gradients of a weight of `[T, E, I]` need between the parts of their sums.
    pub fn gate_room(&self, [tokens, experts, inputs]: [usize; 3]) -> usize {
        let all = [Sizes { m: tokens, n: experts, k: inputs }, Sizes { m: inputs, n: experts, k: tokens }];
        let room = |sizes: Sizes| sizes.sums(sizes.parts(self.processors as usize)) * sizes.m * sizes.n;
        all.into_iter().map(room).max().unwrap_or(0)
    }

    /// `x_TI, w_EI -> logits_TE`. `room` is as long as [`Self::gate_room`] says, or longer.
    pub fn gate_logits<X: Activation>(
        &self,
        [tokens, experts, inputs]: [usize; 3],
        x: &impl DevicePtr<X>,
        w: &impl DevicePtr<f32>,
        room: &mut Memory<f32>,
        logits: &mut Memory<f32>,
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
        dlogits: &impl DevicePtr<f32>,
        w: &impl DevicePtr<f32>,
        dx: &mut Memory<X>,
    ) -> Result<(), BackendError> {
        check(experts, inputs);
        let lengths = (dlogits.len(), w.len(), dx.len());
        assert_eq!(lengths, (tokens * experts, experts * inputs, tokens * inputs), "elements of a gate's gradients");
        let sizes = Sizes { m: tokens, n: inputs, k: experts };
        // There are few terms and many tiles.
        self.gate_product(X::NAMES[1], sizes, sizes.whole(), (dlogits, w), dx, &mut self.room(0)?)
    }

    /// `dlogits_TE, x_TI -> dw_EI`, all tokens in their order. `room` as for the logits.
    pub fn gate_weight_gradient<X: Activation>(
        &self,
        [tokens, experts, inputs]: [usize; 3],
        dlogits: &impl DevicePtr<f32>,
        x: &impl DevicePtr<X>,
        room: &mut Memory<f32>,
        dw: &mut Memory<f32>,
    ) -> Result<(), BackendError> {
        check(experts, inputs);
        let lengths = (dlogits.len(), x.len(), dw.len());
        assert_eq!(lengths, (tokens * experts, tokens * inputs, experts * inputs), "elements of a gate's gradients");
        let sizes = Sizes { m: inputs, n: experts, k: tokens };
        self.in_parts(X::NAMES[2], sizes, x, dlogits, room, dw)
    }

    /// A product of the parts that are best, and the sum of what they leave.
    fn in_parts<X: Activation>(
        &self,
        name: &'static str,
        sizes: Sizes,
        a: &impl DevicePtr<X>,
        b: &impl DevicePtr<f32>,
        room: &mut Memory<f32>,
        y: &mut Memory<f32>,
    ) -> Result<(), BackendError> {
        let parts = sizes.parts(self.processors as usize);
        let (sums, elements) = (sizes.sums(parts), sizes.m * sizes.n);
        let needed = sums * elements;
        assert!(room.len() >= needed, "room for {needed} sums, not {}", room.len());
        self.gate_product(name, sizes, parts, (a, b), y, room)?;
        if needed == 0 {
            return Ok(());
        }
        let count = u32::try_from(elements).map_err(|_| {
            self.error(format!(
                "{name}: a result of {} x {} elements, of which there may be {}",
                sizes.m,
                sizes.n,
                u32::MAX
            ))
        })?;
        let (function, sums) = (self.function(&GATE, "sum_blocks", 0)?, sums as i32);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&*room).arg(y).arg(&count).arg(&sums);
        let config = launch_of(count.div_ceil(4 * 256), 256, 0);
        // SAFETY: `y` has so many elements and `room` as many of each sum, which is asserted; the kernel checks its own.
        unsafe { launch.launch(config) }.map_err(|e| self.error(format!("sum_blocks: {}", told(e))))?;
        Ok(())
    }

    /// The product in parts, of operands whose lengths the callers have asserted.
    fn gate_product<A: DeviceRepr, Y: DeviceRepr>(
        &self,
        name: &'static str,
        sizes: Sizes,
        parts: Parts,
        (a, b): (&impl DevicePtr<A>, &impl DevicePtr<f32>),
        y: &mut Memory<Y>,
        sums: &mut Memory<f32>,
    ) -> Result<(), BackendError> {
        let blocks = sizes.tiles() * (1 + sizes.left(parts).div_ceil(parts.each));
        if blocks == 0 {
            return Ok(());
        }
        let function = self.function(&GATE, name, SHARED as u32)?;
        let [m, n, k, head, each] = [sizes.m, sizes.n, sizes.k, parts.head, parts.each].map(|n| n as i32);
        let ((a, _a), (b, _b)) = (a.device_ptr(&self.stream), b.device_ptr(&self.stream));
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&a).arg(&b).arg(y).arg(sums).arg(&m).arg(&n).arg(&k).arg(&head).arg(&each);
        // SAFETY: the lengths are asserted by the callers; the kernel checks its rows, columns and terms, and writes `sums`
        // only where there are parts.
        unsafe { launch.launch(launch_of(blocks as u32, 128, SHARED as u32)) }
            .map_err(|e| self.error(format!("{name}: {}", told(e))))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: usize = 132;

    fn parts(m: usize, n: usize, k: usize) -> (usize, usize) {
        let Parts { head, each } = Sizes { m, n, k }.parts(H100);
        (head, each)
    }

    #[test]
    fn parts_fill_a_card_and_are_one_where_it_is_full() {
        // Logits of 8,192 and 16,384 tokens of 256 experts are one and two rounds of tiles.
        assert_eq!(parts(8192, 256, 7168), (28, 1));
        assert_eq!(parts(16_384, 256, 7168), (28, 1));
        // The gradient of their weight leaves places free, which some blocks of each tile fill.
        assert_eq!(parts(7168, 256, 8192), (28, 4));
        // 64 experts are few tiles: equal parts, in one round.
        assert_eq!(parts(4096, 64, 2048), (1, 1));
        assert_eq!(parts(2048, 64, 8192), (2, 2));
        // Nothing to add, or nothing to make.
        assert_eq!(parts(2048, 64, 0), (1, 1));
        assert_eq!(parts(0, 64, 256), (1, 1));
    }

    #[test]
    fn a_sum_in_memory_is_counted_where_blocks_are_left() {
        let sizes = Sizes { m: 7168, n: 256, k: 8192 };
        assert_eq!(sizes.sums(Parts { head: 28, each: 4 }), 5);
        assert_eq!(sizes.sums(sizes.whole()), 0);
    }

    #[test]
    fn times_are_about_those_that_were_measured() {
        // Sizes, parts, and microseconds on an H100.
        let measured = [
            ([4096, 64, 2048], [1, 1], 39),
            ([4096, 64, 2048], [2, 1], 54),
            ([4096, 64, 2048], [8, 1], 137),
            ([8192, 64, 2048], [3, 1], 83),
            ([2048, 64, 8192], [4, 4], 81),
            ([8192, 256, 7168], [28, 1], 754),
            ([7168, 256, 8192], [28, 4], 790),
            ([7168, 256, 16_384], [54, 2], 1503),
        ];
        for ([m, n, k], [head, each], microseconds) in measured {
            let (time, was) = (Sizes { m, n, k }.time_ns(Parts { head, each }, H100), microseconds * 1000);
            assert!(time.abs_diff(was) * 20 <= was, "{m} x {n} x {k}: {time} ns, not {was}");
        }
    }
}
