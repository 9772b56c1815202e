//! Runs plain loops with the widest vectors that the CPU has. Rust neither reorders nor contracts
//! floating-point operations, so the bits are the same for every width.

/// `a + b`, element by element.
pub fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    let mut sum = vec![0.0; a.len()];
    run(|| sum.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum = a + b));
    sum
}

/// Adds `b` to `a`, element by element.
pub fn add_to(a: &mut [f32], b: &[f32]) {
    run(|| a.iter_mut().zip(b).for_each(|(a, b)| *a += b));
}

/// Compiles `f`, and what is inlined into it, for each width, and runs the widest that is there.
#[inline(always)]
pub(crate) fn run<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}
