//! What the elements of a matrix are stored as. Arithmetic is f32, whatever is stored: an operation widens
//! what it reads and rounds what it writes, once.

use crate::math::{bf16_bits, bf16_value};
use crate::tensor::Tensor;
use crate::wide::Pattern;
use std::sync::Arc;

/// A BF16 number: the upper half of an f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// Elements of activations: f32, or BF16 in low precision.
pub(crate) trait Element: Pattern + Default + Send + Sync + 'static {
    /// The value; exact.
    fn value(self) -> f32;
    /// The nearest element, ties to even.
    fn nearest(x: f32) -> Self;
    /// The nearest BF16: itself, if it is one.
    fn bf16(self) -> Bf16;
    /// A row's values: itself, or what is put into `scratch`, which is as long.
    fn row<'a>(x: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
    /// A matrix of such elements in host memory.
    fn tensor(rows: usize, columns: usize, data: Arc<Vec<Self>>) -> Tensor;
    /// The elements of a matrix that is stored so.
    fn of(x: &Tensor) -> &[Self];
}

impl Element for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }

    #[inline(always)]
    fn nearest(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn bf16(self) -> Bf16 {
        Bf16::nearest(self)
    }

    #[inline(always)]
    fn row<'a>(x: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        x
    }

    fn tensor(rows: usize, columns: usize, data: Arc<Vec<f32>>) -> Tensor {
        Tensor::host(rows, columns, data)
    }

    fn of(x: &Tensor) -> &[f32] {
        x.f32s()
    }
}

impl Element for Bf16 {
    #[inline(always)]
    fn value(self) -> f32 {
        bf16_value(self.0)
    }

    #[inline(always)]
    fn nearest(x: f32) -> Self {
        Self(bf16_bits(x))
    }

    #[inline(always)]
    fn bf16(self) -> Self {
        self
    }

    #[inline(always)]
    fn row<'a>(x: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        scratch.iter_mut().zip(x).for_each(|(to, x)| *to = x.value());
        scratch
    }

    fn tensor(rows: usize, columns: usize, data: Arc<Vec<Self>>) -> Tensor {
        Tensor::bf16(rows, columns, data)
    }

    fn of(x: &Tensor) -> &[Self] {
        x.bf16s()
    }
}

/// Rounds numbers to elements.
pub(crate) fn rounded<E: Element>(x: &[f32]) -> Vec<E> {
    let mut out = crate::wide::unwritten(x.len());
    crate::wide::run(
        #[inline(always)]
        || out.iter_mut().zip(x).for_each(|(to, x)| *to = E::nearest(*x)),
    );
    out
}

/// The values of elements.
pub(crate) fn values<E: Element>(x: &[E]) -> Vec<f32> {
    let mut out = crate::wide::unwritten(x.len());
    crate::wide::run(
        #[inline(always)]
        || out.iter_mut().zip(x).for_each(|(to, x)| *to = x.value()),
    );
    out
}
