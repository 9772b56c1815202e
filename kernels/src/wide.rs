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

/// A copy past the caches, for what is read much later: where it goes is not read first, and nothing else leaves.
pub(crate) fn stream(from: &[f32], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "elements of a copy");
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128, _mm_loadu_ps, _mm_sfence, _mm_stream_ps};
        // SAFETY: four f32 are a vector.
        let (head, whole, tail) = unsafe { to.align_to_mut::<__m128>() };
        let (first, rest) = from.split_at(head.len());
        let (middle, last) = rest.split_at(4 * whole.len());
        head.copy_from_slice(first);
        tail.copy_from_slice(last);
        for (to, from) in whole.iter_mut().zip(middle.as_chunks::<4>().0) {
            // SAFETY: both have four elements, and `to` lies as a vector does.
            unsafe { _mm_stream_ps(std::ptr::from_mut(to).cast(), _mm_loadu_ps(from.as_ptr())) };
        }
        // SAFETY: every CPU of this kind has it. Whoever the data is given to sees what was stored.
        unsafe { _mm_sfence() };
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
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
        let from: Vec<f32> = (0..40).map(|i| i as f32).collect();
        for (at, start, n) in (0..4).flat_map(|at| (0..4).flat_map(move |s| (0..20).map(move |n| (at, s, n)))) {
            let mut to = [-1.0; 40];
            stream(&from[start..start + n], &mut to[at..at + n]);
            assert_eq!(to[at..at + n], from[start..start + n], "{n} elements to {at}");
            assert!(to[..at].iter().chain(&to[at + n..]).all(|x| *x == -1.0), "{n} elements to {at}");
        }
    }
}
