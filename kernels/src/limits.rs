//! What a machine could do: measured limits and peers for benches. Not part of any result.

use gemm::Parallelism;
use std::time::Instant;

/// Steps of the chains of [`multiply_add_limit`].
const STEPS: usize = 4_000_000;

/// GFLOPS of fused multiply-adds on one core with all operands in registers: no product is faster.
pub fn multiply_add_limit() -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has the instructions.
            return best_of(16 * CHAINS, || unsafe { x86::chains_512(STEPS) });
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has the instructions.
            return best_of(8 * CHAINS, || unsafe { x86::chains_256(STEPS) });
        }
    }
    best_of(1, || {
        let mut x = std::hint::black_box(1.0f32);
        (0..STEPS).for_each(|_| x = x * 0.999 + 0.001);
        x
    })
}

/// The same of pairs of BF16 with FP32 sums; none where the CPU has no such instruction of its vectors.
pub fn bf16_limit() -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bf16") && std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has the instructions.
        return Some(best_of(2 * 16 * CHAINS, || unsafe { x86::chains_bf16(STEPS) }));
    }
    None
}

/// Independent chains: enough to hide the latency of an instruction.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 12;

/// The best of a few runs, in GFLOPS at two operations for each of `lanes` values and step.
fn best_of(lanes: usize, mut run: impl FnMut() -> f32) -> f64 {
    let seconds = (0..5).map(|_| {
        let began = Instant::now();
        std::hint::black_box(run());
        began.elapsed().as_secs_f64()
    });
    2.0 * (lanes * STEPS) as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::CHAINS;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub(super) fn chains_512(steps: usize) -> f32 {
        let (a, b) = (_mm512_set1_ps(std::hint::black_box(0.999)), _mm512_set1_ps(0.001));
        let mut x = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..steps {
            for x in &mut x {
                *x = _mm512_fmadd_ps(*x, a, b);
            }
        }
        x.into_iter().map(|x| _mm512_reduce_add_ps(x)).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn chains_bf16(steps: usize) -> f32 {
        // SAFETY: 512 bits are 512 bits. 32 times 0.5 in BF16, and a tiny number.
        let halves = |bits| unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(bits)) };
        let (a, b) = (halves(std::hint::black_box(0x3f00)), halves(0x2000));
        let mut x = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..steps {
            for x in &mut x {
                *x = _mm512_dpbf16_ps(*x, a, b);
            }
        }
        x.into_iter().map(|x| _mm512_reduce_add_ps(x)).sum()
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn chains_256(steps: usize) -> f32 {
        let (a, b) = (_mm256_set1_ps(std::hint::black_box(0.999)), _mm256_set1_ps(0.001));
        let mut x = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..steps {
            for x in &mut x {
                *x = _mm256_fmadd_ps(*x, a, b);
            }
        }
        x.into_iter().map(|x| _mm256_cvtss_f32(x)).sum()
    }
}

/// The `gemm` crate alone, `y = x w^T`, with its own choice of blocks: what batch invariance costs is the
/// difference to this.
pub fn peer_linear(x: &[f32], w: &[f32], y: &mut [f32], rows: usize, out: usize, input: usize) {
    assert!(x.len() == rows * input && w.len() == out * input && y.len() == rows * out, "shapes of a product");
    // SAFETY: the slices have exactly the elements that the shapes name, and y is not aliased.
    unsafe {
        gemm::gemm(
            rows,
            out,
            input,
            y.as_mut_ptr(),
            1,
            out as isize,
            false,
            x.as_ptr(),
            1,
            input as isize,
            w.as_ptr(),
            input as isize,
            1,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
