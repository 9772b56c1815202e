//! Runs plain loops with the widest vectors that the CPU has. Rust neither reorders nor contracts
//! floating-point operations, so the bits are the same for every width.

/// Compiles `f`, and what is inlined into it, for each width, and runs the widest that is there.
#[inline(always)]
pub(crate) fn run<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}
