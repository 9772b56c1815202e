//! Scalar functions whose bits are the same on every machine.
//!
//! The system's `expf` differs between libc versions, and C1 promises equal bits wherever an actor
//! runs, so the functions on the hot path are written out here in plain IEEE operations (no fused
//! multiply-add, no table). Rust never contracts or reorders them, whatever the vector width.

/// Lanes of every fixed-order sum. A sum over a row is `LANES` partial sums, then a binary tree.
pub(crate) const LANES: usize = 16;

/// `e^x` in f32, relative error below 3e-7 on [-87, 88]; clamped outside, NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let nan = x.is_nan();
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor coefficients 1/k!, enough for |r| <= ln(2)/2.
    let mut p = 1.388_888_9e-3;
    p = p * r + 8.333_334e-3;
    p = p * r + 4.166_666_8e-2;
    p = p * r + 0.166_666_67;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // The integer stands in the lowest bits of the shifted number; -87 to 88 keep the exponent in range.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if nan { f32::NAN } else { p * scale }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The sum of `term` over the elements of slices of one length, in a fixed order: lane `i % LANES`
/// ascending, then the lanes as a binary tree.
#[inline(always)]
pub(crate) fn sum_of<const N: usize>(slices: [&[f32]; N], term: impl Fn([f32; N]) -> f32) -> f32 {
    let n = slices[0].len();
    let parts = slices.map(|s| s[..n].as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for chunk in 0..n / LANES {
        // By reference: arrays of values go through memory, one by one.
        let of = parts.map(|(whole, _)| &whole[chunk]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(of.map(|x| x[lane]));
        }
    }
    for i in 0..n % LANES {
        lanes[i] += term(parts.map(|(_, rest)| rest[i]));
    }
    tree(lanes)
}

/// The lanes as a binary tree.
#[inline(always)]
fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The nearest bf16 of `x`, ties to even; NaN stays NaN.
#[inline(always)]
pub fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The value of a bf16; exact.
#[inline(always)]
pub fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The largest of some numbers; negative infinity of none. It has no order that could show.
#[inline(always)]
pub(crate) fn largest(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        lanes.iter_mut().zip(chunk).for_each(|(m, x)| *m = if *x > *m { *x } else { *m });
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m })
}

/// The natural logarithm in f64, of an f32: by construction the same on a GPU, where `hopper/exact.cuh` has the same operations in the
/// same order. Its bits are those of the portable libm.
///
/// A number above zero is `2^n (1 + f)`, with `1 + f` between the roots of a half and of two, and `log(1 + f)` a polynomial in
/// `s = f / (2 + f)`.
pub(crate) fn logarithm(x: f32) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == 0.0 || x.is_infinite() {
        return if x == 0.0 { f64::NEG_INFINITY } else { f64::INFINITY };
    }
    // The bits of the root of a half, and what lies between those and the bits of one, but for their lower halves.
    const ROOT: u64 = 0x3fe6_a09e << 32;
    const BETWEEN: u64 = (0x3ff0_0000 << 32) - ROOT;
    const BELOW_EXPONENT: u64 = (1 << 52) - 1;
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let bits = f64::from(x).to_bits() + BETWEEN;
    let n = f64::from((bits >> 52) as i32 - 1023);
    let f = f64::from_bits((bits & BELOW_EXPONENT) + ROOT) - 1.0;
    let (half, s) = (0.5 * f * f, f / (2.0 + f));
    let z = s * s;
    let w = z * z;
    let even = w * (3.999_999_999_940_942e-1 + w * (2.222_219_843_214_978_4e-1 + w * 1.531_383_769_920_937_3e-1));
    let odd = z
        * (6.666_666_666_666_735e-1
            + w * (2.857_142_874_366_239e-1 + w * (1.818_357_216_161_805e-1 + w * 1.479_819_860_511_658_6e-1)));
    s * (half + (odd + even)) + n * LN2_LOW - half + f + n * LN2_HIGH
}

/// The cosine by a portable libm: a system's own may differ in the last bit.
pub fn cosine(x: f64) -> f64 {
    libm::cos(x)
}

/// `base` to the power of `n` by squaring: one order of products everywhere.
pub fn power(base: f64, mut n: u64) -> f64 {
    let (mut result, mut square) = (1.0, base);
    while n > 0 {
        if n & 1 == 1 {
            result *= square;
        }
        square *= square;
        n >>= 1;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_the_nearest_with_ties_to_even() {
        for bits in 0..=u16::MAX {
            let value = bf16_value(bits);
            if value.is_nan() {
                assert!(bf16_value(bf16_bits(value)).is_nan());
            } else {
                assert_eq!(bf16_bits(value), bits);
            }
        }
        let (low, high) = (bf16_value(0x3f80), bf16_value(0x3f81));
        assert_eq!(bf16_bits((low + high) / 2.0), 0x3f80);
        assert_eq!(bf16_bits((high + bf16_value(0x3f82)) / 2.0), 0x3f82);
        assert_eq!(bf16_bits(f32::MAX), 0x7f80, "past the largest it is infinite");
    }

    #[test]
    fn exp_is_close_to_f64() {
        let mut worst = 0.0f64;
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 3e-7, "worst relative error {worst:e}");
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn the_logarithm_is_libms() {
        let same = |bits: u32| {
            let x = f32::from_bits(bits);
            let (got, want) = (logarithm(x), libm::log(f64::from(x)));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x:e}: {got:e}, not {want:e}");
        };
        // Every sign and exponent with its ends, and mantissas between; then all floats about one and about the roots, where the
        // exponent changes.
        for exponent in 0..512 {
            for mantissa in (0..1 << 23).step_by(65_537).chain([1, 0x35_04f3, 0x35_04f4, (1 << 23) - 1]) {
                same(exponent << 23 | mantissa);
            }
        }
        for middle in [1.0f32, std::f32::consts::FRAC_1_SQRT_2, std::f32::consts::SQRT_2].map(f32::to_bits) {
            (middle - 1000..middle + 1000).for_each(same);
        }
    }

    #[test]
    fn sum_is_close_to_f64_for_ragged_lengths() {
        for n in [0, 1, 15, 16, 17, 100, 1000] {
            let exact: f64 = (0..n).map(|i| 1.0 / (i as f64 + 1.0)).sum();
            let x: Vec<f32> = (0..n).map(|i| (1.0 / (i as f64 + 1.0)) as f32).collect();
            let got = sum_of([&x], |[x]| x);
            assert!((f64::from(got) - exact).abs() < 1e-5, "{n}: {got} against {exact}");
            let mut lanes = [0.0f32; LANES];
            x.iter().enumerate().for_each(|(i, x)| lanes[i % LANES] += x * x);
            assert_eq!(sum_of([&x, &x], |[a, b]| a * b).to_bits(), tree(lanes).to_bits());
        }
    }

    #[test]
    fn power_agrees_with_powi() {
        assert!((power(0.95, 137) - 0.95f64.powi(137)).abs() < 1e-15);
        assert_eq!(power(3.0, 0), 1.0);
    }
}
