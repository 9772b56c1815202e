//! Products by AVX-512-BF16: one chain for each element over all of `K`, each step adding a pair's second
//! product and then its first, both fused. Another order than the tiles': a device class of its own.

#[cfg(not(target_arch = "x86_64"))]
mod without {
    pub(crate) fn available() -> bool {
        false
    }

    pub(crate) unsafe fn part<E>(
        _: &crate::low::Block<'_>,
        _: usize,
        _: [&[u32]; 2],
        _: std::ops::Range<usize>,
        _: usize,
        _: &mut crate::low::Target<'_, E>,
    ) {
        unreachable!("the path was not detected");
    }
}
#[cfg(not(target_arch = "x86_64"))]
pub(super) use without::{available, part};

#[cfg(target_arch = "x86_64")]
pub(super) use with::{available, has_shuffles, pair_rows, part, turn_halves, turn_words};
#[cfg(target_arch = "x86_64")]
pub(crate) use with::{has_rounding, round};

#[cfg(target_arch = "x86_64")]
mod with {
    use crate::element::{Bf16, Element};
    use crate::low::{BLOCK, Block, Columns, Target};
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// Whether the CPU has the instructions.
    #[inline(always)]
    pub(crate) fn available() -> bool {
        is_x86_feature_detected!("avx512bf16") && has_shuffles()
    }

    /// Whether [`round`] can be used.
    #[inline(always)]
    pub(crate) fn has_rounding() -> bool {
        available() && is_x86_feature_detected!("avx512dq")
    }

    /// The nearest BF16 of each, ties to even. The instruction makes subnormal numbers zero: where there is one,
    /// it is not used.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub(crate) fn round(x: &[f32], out: &mut [Bf16]) {
        assert_eq!(x.len(), out.len(), "numbers to round");
        const SUBNORMAL: i32 = 0x20;
        let ((x, rest), (out, last)) = (x.as_chunks::<32>(), out.as_chunks_mut::<32>());
        for (x, out) in x.iter().zip(out) {
            // SAFETY: 32 numbers are there.
            let (low, high) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))) };
            if _mm512_fpclass_ps_mask::<SUBNORMAL>(low) | _mm512_fpclass_ps_mask::<SUBNORMAL>(high) == 0 {
                // SAFETY: 512 bits are 512 bits, and there is room for 32 elements.
                unsafe {
                    let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), rounded);
                }
            } else {
                out.iter_mut().zip(x).for_each(|(out, x)| *out = Bf16::nearest(*x));
            }
        }
        last.iter_mut().zip(rest).for_each(|(out, x)| *out = Bf16::nearest(*x));
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
                // Of a whole matrix, the square below has its turn after those beside this one: its rows are far away
                // where they were written long ago. Past the end it is an address that nothing reads.
                for row in [32, 33] {
                    _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(row * stride).cast());
                }
                (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(stride).cast()))
            };
            for (to, halves) in to.iter_mut().zip(halves) {
                let words = _mm512_permutex2var_epi16(low, halves, high);
                // SAFETY: as above.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().add(16 * pair).cast(), words) };
            }
        }
    }

    /// See [`super::super::Path::part`]: eight rows at a time, from registers to where they go.
    ///
    /// # Safety
    ///
    /// The path was detected, and both sides have the pairs: 32 rows of the left one, and both tiles of the right.
    pub(crate) unsafe fn part<E: Element>(
        left: &Block<'_>,
        rows: usize,
        b: [&[u32]; 2],
        pairs: Range<usize>,
        columns: usize,
        to: &mut Target<'_, E>,
    ) {
        debug_assert!(available());
        assert!(rows > 0 && rows <= BLOCK && columns > 0 && columns <= BLOCK, "a part of {rows} x {columns}");
        assert!(to.data.len() >= (rows - 1) * to.stride + columns, "room for a part");
        let wanted = u32::MAX >> (BLOCK - columns);
        for m in (0..rows).step_by(8) {
            let to = (to.data[m * to.stride..].as_mut_ptr(), to.stride);
            let rows = rows.min(m + 8) - m;
            match left {
                // SAFETY: the caller's promise; the room was checked.
                Block::Rows { data, stride: row } => unsafe {
                    let a = data.as_ptr().add(m * row).cast();
                    eight::<E, 4>(a, 2 * row, b, pairs.clone(), to, rows, wanted);
                },
                // SAFETY: as above.
                Block::Pairs(panels) => unsafe {
                    let a = panels[m / 16].as_ptr().add(m % 16).cast();
                    eight::<E, 64>(a, 4, b, pairs.clone(), to, rows, wanted);
                },
            }
        }
    }

    /// Eight rows: sixteen sums of sixteen columns in registers. A pair of terms of row `m` is at
    /// `a + m * row + pair * PAIR` bytes. The first `rows` of them and the `wanted` columns are written.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn eight<E: Element, const PAIR: usize>(
        a: *const u8,
        row: usize,
        b: [&[u32]; 2],
        pairs: Range<usize>,
        (to, stride): (*mut E, usize),
        rows: usize,
        wanted: u32,
    ) {
        const { assert!(size_of::<E>() == if E::IS_BF16 { 2 } else { 4 }) };
        let mut sums = [[_mm512_setzero_ps(); 2]; 8];
        for pair in pairs {
            // Tiles follow each other: pair p of the whole panel is its p-th row of 16 words.
            const { assert!(Columns::TILE == 16 * 16) };
            // SAFETY: the caller has checked that both panels have the pairs.
            let columns = b.map(|b| unsafe { _mm512_loadu_si512(b.as_ptr().add(16 * pair).cast()) });
            for (m, sums) in sums.iter_mut().enumerate() {
                // SAFETY: and so have eight rows.
                let two = unsafe { a.add(m * row + pair * PAIR).cast::<i32>().read_unaligned() };
                // SAFETY: 512 bits are 512 bits.
                let two: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(two)) };
                for (sum, column) in sums.iter_mut().zip(columns) {
                    // SAFETY: as above.
                    *sum = _mm512_dpbf16_ps(*sum, two, unsafe { std::mem::transmute::<__m512i, __m512bh>(column) });
                }
            }
        }
        for (m, [left, right]) in sums.into_iter().enumerate() {
            // Not a shorter loop: it would put the sums into memory.
            if m == rows {
                break;
            }
            // SAFETY: the caller has checked that there is room for the wanted columns of each row.
            unsafe {
                let to = to.add(m * stride);
                if E::IS_BF16 {
                    // Sums are never subnormal, so this rounds as `Element::nearest` does.
                    let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(right, left));
                    // Stores under a mask are slow.
                    if wanted == u32::MAX {
                        _mm512_storeu_si512(to.cast(), halves);
                    } else {
                        _mm512_mask_storeu_epi16(to.cast(), wanted, halves);
                    }
                } else if wanted == u32::MAX {
                    _mm512_storeu_ps(to.cast(), left);
                    _mm512_storeu_ps(to.cast::<f32>().add(16), right);
                } else {
                    _mm512_mask_storeu_ps(to.cast(), wanted as u16, left);
                    _mm512_mask_storeu_ps(to.cast::<f32>().wrapping_add(16), (wanted >> 16) as u16, right);
                }
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
