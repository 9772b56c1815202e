//! What the elements of a matrix are stored as. Arithmetic is f32, whatever is stored: an operation widens
//! what it reads and rounds what it writes, once.

use crate::math::{bf16_bits, bf16_value};
use crate::tensor::Tensor;
use crate::wide::{self, Pattern};
use std::ops::Range;
use std::sync::Arc;

/// A BF16 number: the upper half of an f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// Elements of activations: f32, or BF16 in low precision.
pub(crate) trait Element: Pattern + bytemuck::Pod + Default + Send + Sync + 'static {
    /// Which of the two it is.
    const IS_BF16: bool;
    /// The value; exact.
    fn value(self) -> f32;
    /// The nearest element, ties to even.
    fn nearest(x: f32) -> Self;
    /// The nearest BF16 of each: itself, if it is one.
    fn round(x: &[Self], out: &mut [Bf16]);
    /// A row's values: itself, or what is put into `scratch`, which is as long.
    fn row<'a>(x: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
    /// Rounds numbers to as many elements, as [`Self::nearest`] does.
    fn store(x: &[f32], out: &mut [Self]);
    /// A matrix of such elements in host memory.
    fn tensor(rows: usize, columns: usize, data: Arc<Vec<Self>>) -> Tensor;
    /// The elements of a matrix that is stored so.
    fn of(x: &Tensor) -> &[Self];
}

impl Element for f32 {
    const IS_BF16: bool = false;

    #[inline(always)]
    fn value(self) -> f32 {
        self
    }

    #[inline(always)]
    fn nearest(x: f32) -> Self {
        x
    }

    fn round(x: &[f32], out: &mut [Bf16]) {
        Bf16::store(x, out);
    }

    #[inline(always)]
    fn row<'a>(x: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        x
    }

    fn store(x: &[f32], out: &mut [f32]) {
        out.copy_from_slice(x);
    }

    fn tensor(rows: usize, columns: usize, data: Arc<Vec<f32>>) -> Tensor {
        Tensor::host(rows, columns, data)
    }

    fn of(x: &Tensor) -> &[f32] {
        x.f32s()
    }
}

impl Element for Bf16 {
    const IS_BF16: bool = true;

    #[inline(always)]
    fn value(self) -> f32 {
        bf16_value(self.0)
    }

    #[inline(always)]
    fn nearest(x: f32) -> Self {
        Self(bf16_bits(x))
    }

    fn round(x: &[Self], out: &mut [Self]) {
        out.copy_from_slice(x);
    }

    #[inline(always)]
    fn row<'a>(x: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        scratch.iter_mut().zip(x).for_each(|(to, x)| *to = x.value());
        scratch
    }

    #[inline(always)]
    fn store(x: &[f32], out: &mut [Self]) {
        assert_eq!(x.len(), out.len(), "numbers to round");
        #[cfg(target_arch = "x86_64")]
        if crate::low::has_rounding() {
            // SAFETY: the instructions are there.
            return unsafe { crate::low::round(x, out) };
        }
        wide::run(
            #[inline(always)]
            || out.iter_mut().zip(x).for_each(|(out, x)| *out = Self::nearest(*x)),
        );
    }

    fn tensor(rows: usize, columns: usize, data: Arc<Vec<Self>>) -> Tensor {
        Tensor::bf16(rows, columns, data)
    }

    fn of(x: &Tensor) -> &[Self] {
        x.bf16s()
    }
}

/// Numbers that are made before they are rounded: they stay in the nearest cache.
pub(crate) const PIECE: usize = 256;

/// Rounds what `fill` makes of each range of elements.
#[inline(always)]
pub(crate) fn in_pieces<E: Element>(out: &mut [E], mut fill: impl FnMut(Range<usize>, &mut [f32])) {
    let all = 0..out.len();
    if !E::IS_BF16 {
        return fill(all, bytemuck::cast_slice_mut(out));
    }
    let mut piece = [0.0f32; PIECE];
    for (from, out) in all.step_by(PIECE).zip(out.chunks_mut(PIECE)) {
        let piece = &mut piece[..out.len()];
        fill(from..from + out.len(), piece);
        E::store(piece, out);
    }
}

/// Rounds numbers to elements.
pub(crate) fn rounded<E: Element>(x: &[f32]) -> Vec<E> {
    let mut out = wide::unwritten(x.len());
    E::store(x, &mut out);
    out
}

/// The values of elements.
pub(crate) fn values<E: Element>(x: &[E]) -> Vec<f32> {
    let mut out = wide::unwritten(x.len());
    wide::run(
        #[inline(always)]
        || out.iter_mut().zip(x).for_each(|(to, x)| *to = x.value()),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Around every BF16 value, and between two: ties, subnormal numbers, infinities and NaNs.
    #[test]
    fn slices_are_rounded_as_their_elements_are() {
        let near = |bits: u16| [0x8000u32, 0x7fff, 0x8001, 1, 0].map(|low| f32::from_bits(u32::from(bits) << 16 | low));
        let x: Vec<f32> = (0..=u16::MAX).flat_map(near).collect();
        let want: Vec<Bf16> = x.iter().map(|x| Bf16::nearest(*x)).collect();
        assert_eq!(rounded::<Bf16>(&x), want);
        for n in 0..40 {
            assert_eq!(rounded::<Bf16>(&x[7..7 + n]), want[7..7 + n], "{n} elements");
        }
    }
}
