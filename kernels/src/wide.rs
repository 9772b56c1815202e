//! Runs plain loops with the widest vectors that the CPU has. Rust neither reorders nor contracts
//! floating-point operations, so the bits are the same for every width.

use crate::element::Bf16;

/// `n` elements that the caller writes before it reads them: zeroing what is written next costs a fifth of
/// a step. Debug builds begin with what no test takes for a result.
#[inline(always)]
pub(crate) fn unwritten<T: Pattern>(n: usize) -> Vec<T> {
    if cfg!(debug_assertions) {
        return vec![T::POISON; n];
    }
    let mut data: Vec<T> = Vec::with_capacity(n);
    // SAFETY: the capacity is there, every bit pattern is a value of the type, and callers write all
    // elements, which the tests of debug builds would see.
    #[allow(clippy::uninit_vec)]
    unsafe {
        data.set_len(n);
    }
    data
}

/// Types of which every bit pattern is a value.
pub(crate) trait Pattern: Copy {
    /// Something that is not a result.
    const POISON: Self;
}

impl Pattern for f32 {
    const POISON: Self = f32::NAN;
}

impl Pattern for Bf16 {
    const POISON: Self = Bf16(0x7fc1);
}

impl Pattern for u32 {
    const POISON: Self = 0x7fc1_7fc1;
}

/// Copies past the caches, for what is read much later: where they go is not read first, and nothing else leaves.
/// Whoever the data is given to after this is dropped sees what was stored.
pub(crate) struct Streams(());

impl Streams {
    /// Begins.
    pub(crate) fn new() -> Self {
        Self(())
    }

    /// A copy.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn copy<T: bytemuck::Pod>(&self, from: &[T], to: &mut [T]) {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        assert_eq!(from.len(), to.len(), "elements of a copy");
        let each = size_of::<__m128i>() / size_of::<T>();
        // SAFETY: any bits are a vector, and any are elements.
        let (head, whole, tail) = unsafe { to.align_to_mut::<__m128i>() };
        let (first, rest) = from.split_at(head.len());
        let (middle, last) = rest.split_at(each * whole.len());
        head.copy_from_slice(first);
        tail.copy_from_slice(last);
        for (to, from) in whole.iter_mut().zip(middle.chunks_exact(each)) {
            // SAFETY: both are a vector's bytes, and `to` lies as a vector does.
            unsafe { _mm_stream_si128(to, _mm_loadu_si128(from.as_ptr().cast())) };
        }
    }

    /// A copy.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn copy<T: bytemuck::Pod>(&self, from: &[T], to: &mut [T]) {
        to.copy_from_slice(from);
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every CPU of this kind has it.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

/// `a + b`, element by element.
pub fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "terms of a sum");
    let mut sum = unwritten(a.len());
    run(
        #[inline(always)]
        || sum.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum = a + b),
    );
    sum
}

/// Adds `b` to `a`, element by element.
pub fn add_to(a: &mut [f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "terms of a sum");
    run(
        #[inline(always)]
        || a.iter_mut().zip(b).for_each(|(a, b)| *a += b),
    );
}

/// Compiles `f`, and what is inlined into it, for each width, and runs the widest that is there.
#[inline(always)]
pub(crate) fn run<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streamed_copy_is_a_copy_wherever_it_lies() {
        fn copies<T: bytemuck::Pod + PartialEq + std::fmt::Debug>(of: impl Fn(u16) -> T) {
            let from: Vec<T> = (1..=40).map(&of).collect();
            for (at, start, n) in (0..8).flat_map(|at| (0..8).flat_map(move |s| (0..30).map(move |n| (at, s, n)))) {
                let mut to = [of(0); 40];
                Streams::new().copy(&from[start..start + n], &mut to[at..at + n]);
                assert_eq!(to[at..at + n], from[start..start + n], "{n} elements to {at}");
                assert!(to[..at].iter().chain(&to[at + n..]).all(|x| *x == of(0)), "{n} elements to {at}");
            }
        }
        copies(f32::from);
        copies(Bf16);
    }
}
