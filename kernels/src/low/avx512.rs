//! Products by AVX-512-BF16: one chain for each element over all of `K`, each step adding a pair's second
//! product and then its first, both fused. Another order than the tiles': a device class of its own.

use super::Part;

#[cfg(not(target_arch = "x86_64"))]
mod without {
    pub(crate) fn available() -> bool {
        false
    }

    pub(crate) fn part(_: &[crate::element::Bf16], _: usize, _: [&[u32]; 2], _: usize, _: usize, _: &mut super::Part) {
        unreachable!("the path was not detected");
    }
}
#[cfg(not(target_arch = "x86_64"))]
pub(super) use without::{available, part};

#[cfg(target_arch = "x86_64")]
pub(super) use with::{available, has_shuffles, pair_rows, part, turn_halves, turn_words};

#[cfg(target_arch = "x86_64")]
mod with {
    use super::Part;
    use crate::element::Bf16;
    use crate::low::{Columns, K_BLOCK};
    use std::arch::x86_64::*;

    /// Whether the CPU has the instructions.
    pub(crate) fn available() -> bool {
        is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f")
    }

    /// Whether [`turn_words`], [`turn_halves`] and [`pair_rows`] can be used.
    #[inline(always)]
    pub(crate) fn has_shuffles() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
    }

    /// 32 rows of 32 halves, `stride` apart, to two tiles of 16 pairs of rows by 16 columns.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(crate) fn pair_rows(from: &[Bf16], stride: usize, mut to: [&mut [u32]; 2]) {
        const HALVES: [[u16; 32]; 2] = {
            let mut halves = [[0; 32]; 2];
            let mut i = 0;
            while i < 16 {
                // From 32 on they are the second operand's.
                (halves[0][2 * i], halves[0][2 * i + 1]) = (i as u16, i as u16 + 32);
                (halves[1][2 * i], halves[1][2 * i + 1]) = (i as u16 + 16, i as u16 + 48);
                i += 1;
            }
            halves
        };
        assert!(from.len() >= 31 * stride + 32 && to.iter().all(|to| to.len() >= 256), "a square of halves");
        // SAFETY: an array of 64 bytes.
        let halves = HALVES.map(|halves| unsafe { _mm512_loadu_si512(halves.as_ptr().cast()) });
        for pair in 0..16 {
            // SAFETY: the lengths were checked.
            let (low, high) = unsafe {
                let at = from.as_ptr().add(2 * pair * stride);
                (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(stride).cast()))
            };
            for (to, halves) in to.iter_mut().zip(halves) {
                let words = _mm512_permutex2var_epi16(low, halves, high);
                // SAFETY: as above.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().add(16 * pair).cast(), words) };
            }
        }
    }

    /// See [`super::super::Path::part`].
    pub(crate) fn part(a: &[Bf16], stride: usize, b: [&[u32]; 2], from: usize, to: usize, out: &mut Part) {
        debug_assert!(available());
        for m in (0..out.len()).step_by(8) {
            // SAFETY: the instructions are there, and the caller has checked that the operands reach to block `to`.
            unsafe { rows(&a[m * stride..], stride, b, from, to, &mut out[m..m + 8]) };
        }
    }

    /// Eight rows: sixteen sums of sixteen columns in registers.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn rows(a: &[Bf16], stride: usize, b: [&[u32]; 2], from: usize, to: usize, out: &mut [[f32; 32]]) {
        let mut sums = [[_mm512_setzero_ps(); 2]; 8];
        for pair in from * K_BLOCK / 2..to * K_BLOCK / 2 {
            // Tiles follow each other: pair p of the whole panel is its p-th row of 16 words.
            const { assert!(Columns::TILE == 16 * 16) };
            // SAFETY: both panels have at least `to * 16` rows of 16 words.
            let columns = unsafe {
                [
                    _mm512_loadu_si512(b[0].as_ptr().add(16 * pair).cast()),
                    _mm512_loadu_si512(b[1].as_ptr().add(16 * pair).cast()),
                ]
            };
            for (m, sums) in sums.iter_mut().enumerate() {
                // SAFETY: rows are `stride` apart and have at least `to * 32` terms.
                let two = unsafe { a.as_ptr().add(m * stride + 2 * pair).cast::<i32>().read_unaligned() };
                // SAFETY: 512 bits are 512 bits.
                let two: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(two)) };
                for (sum, column) in sums.iter_mut().zip(columns) {
                    // SAFETY: as above.
                    *sum = _mm512_dpbf16_ps(*sum, two, unsafe { std::mem::transmute::<__m512i, __m512bh>(column) });
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            // SAFETY: a row has 32 elements.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(out.as_mut_ptr().add(16), sums[1]);
            }
        }
    }

    /// Rows and columns of 16 x 16 words exchanged, in registers.
    #[target_feature(enable = "avx512f")]
    fn exchange(mut r: [__m512i; 16]) -> [__m512i; 16] {
        let mut t = r;
        // Words of neighbouring rows, then pairs of words, then quarters of rows, then halves.
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[4 + i]);
            t[4 + i] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[4 + i]);
            t[8 + i] = _mm512_shuffle_i32x4::<0x88>(r[8 + i], r[12 + i]);
            t[12 + i] = _mm512_shuffle_i32x4::<0xdd>(r[8 + i], r[12 + i]);
        }
        for i in 0..4 {
            r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[8 + i]);
            r[4 + i] = _mm512_shuffle_i32x4::<0x88>(t[4 + i], t[12 + i]);
            r[8 + i] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[8 + i]);
            r[12 + i] = _mm512_shuffle_i32x4::<0xdd>(t[4 + i], t[12 + i]);
        }
        r
    }

    /// 16 rows of 32 halves, `stride` apart, to 16 rows of 16 words: words are turned.
    #[target_feature(enable = "avx512f")]
    pub(crate) fn turn_words(from: &[Bf16], stride: usize, to: &mut [u32]) {
        assert!(from.len() >= 15 * stride + 32 && to.len() >= 256, "a square of words");
        // SAFETY: the lengths were checked.
        let rows = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(from.as_ptr().add(i * stride).cast()) });
        for (i, row) in exchange(rows).into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().add(16 * i).cast(), row) };
        }
    }

    /// A square of 32 x 32 halves, turned.
    #[target_feature(enable = "avx512f")]
    pub(crate) fn turn_halves(from: &[Bf16], stride: usize, to: &mut [Bf16], to_stride: usize) {
        assert!(from.len() >= 31 * stride + 32 && to.len() >= 31 * to_stride + 32, "a square of halves");
        for half in 0..2 {
            let pair = |i: usize| {
                // SAFETY: the lengths were checked; 16 halves from column 0 or 16 of rows up to 31.
                let (low, high) = unsafe {
                    let at = from.as_ptr().add(2 * i * stride + 16 * half);
                    (_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(stride).cast()))
                };
                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                _mm512_or_si512(_mm512_cvtepu16_epi32(low), high)
            };
            for (i, row) in exchange(std::array::from_fn(pair)).into_iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().add((16 * half + i) * to_stride).cast(), row) };
            }
        }
    }
}
