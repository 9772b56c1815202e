//! E4M3 with one scale for each tile of 1 x 128 elements (technical report 3.3): a quantised tensor
//! carries its scales.
//!
//! A tile's scale is its largest magnitude over 448, the largest E4M3 value; what it is divided by is
//! rounded to the nearest E4M3 value, ties to even. A tile of zeros has scale 1. Columns that do not
//! fill a tile make a shorter one. E4M3 here is the "fn" form: no infinity, `0x7f` and `0xff` are NaN.

/// Elements of a row that share a scale; a block of a weight has as many rows too.
pub(crate) const TILE: usize = 128;
/// The largest E4M3 value.
const MAX: f32 = 448.0;

/// The scale of elements whose largest magnitude is `largest`.
#[inline(always)]
pub(crate) fn scale_of(largest: f32) -> f32 {
    // What is not above this is zero: its scale would be no normal number.
    const LEAST: f32 = 1e-30;
    if largest > LEAST { largest / MAX } else { 1.0 }
}

/// The value of an E4M3 code. Exact in f32.
pub(crate) fn decode(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        // Subnormal: multiples of 2^-9.
        (0, _) => sign * mantissa / 512.0,
        _ => sign * (1.0 + mantissa / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    }
}

/// The nearest E4M3 value of `x`, ties to even, saturating at the largest; NaN stays NaN.
#[inline(always)]
pub(crate) fn nearest(x: f32) -> f32 {
    // The distance of neighbours: 2^-9 below 2^-6, else an eighth of the power of two below x.
    let size = if x.abs() < MAX { x.abs() } else { MAX };
    let exponent = ((size.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    let per_step = f32::from_bits(((3 - exponent + 127) as u32) << 23);
    // size / step is exact and below 2^4; adding and taking away 2^23 rounds it to even.
    let units = (size * per_step + 8_388_608.0) - 8_388_608.0;
    let value = (units * step).copysign(x);
    if x.is_nan() { x } else { value }
}

/// The code of the nearest E4M3 value.
pub(crate) fn encode(x: f32) -> u8 {
    let value = nearest(x);
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let exponent = ((value.abs().to_bits() >> 23) as i32 - 127).max(-6);
    let units = value.abs() * f32::from_bits(((3 - exponent + 127) as u32) << 23);
    // In units of a binade the code is monotonic, so a carry into the next binade is right by itself.
    sign | ((exponent + 6) as u8 * 8 + units as u8)
}

/// The least power of two that is not below a positive number; scales are far from the ends of the range.
#[inline(always)]
pub(crate) fn power_of_two(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7f_ffff) & 0x7f80_0000)
}

/// `x_TD -> (codes_TD, scales_T,ceil(D/128))`; a value is `code * scale`.
pub(crate) fn quantise(x: &[f32], columns: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::new());
    for row in x.chunks_exact(columns.max(1)) {
        for tile in row.chunks(TILE) {
            let largest = tile.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let scale = scale_of(largest);
            scales.push(scale);
            codes.extend(tile.iter().map(|x| encode(x / scale)));
        }
    }
    (codes, scales)
}

/// `w_OI -> (codes_OI, scales_ceil(O/128),ceil(I/128))`: a scale for each block (technical report 3.3).
pub fn quantise_blocks(w: &[f32], rows: usize, columns: usize) -> (Vec<u8>, Vec<f32>) {
    let across = columns.div_ceil(TILE);
    let mut largest = vec![0.0f32; rows.div_ceil(TILE) * across];
    for (r, row) in w.chunks_exact(columns).enumerate() {
        for (tile, largest) in row.chunks(TILE).zip(&mut largest[r / TILE * across..]) {
            *largest = tile.iter().fold(*largest, |m, x| m.max(x.abs()));
        }
    }
    let scales: Vec<f32> = largest.into_iter().map(scale_of).collect();
    let codes = w.chunks_exact(columns).enumerate().flat_map(|(r, row)| {
        let scales = &scales[r / TILE * across..];
        row.iter().enumerate().map(|(c, x)| encode(x / scales[c / TILE])).collect::<Vec<_>>()
    });
    (codes.collect(), scales)
}

/// The values of a matrix that was quantised in blocks.
pub fn dequantise_blocks(codes: &[u8], scales: &[f32], columns: usize) -> Vec<f32> {
    let across = columns.div_ceil(TILE);
    let value = |(at, code): (usize, &u8)| {
        let (r, c) = (at / columns, at % columns);
        decode(*code) * scales[r / TILE * across + c / TILE]
    };
    codes.iter().enumerate().map(value).collect()
}

/// The values of quantised rows.
pub(crate) fn dequantise(codes: &[u8], scales: &[f32], columns: usize) -> Vec<f32> {
    let tiles = codes.chunks_exact(columns.max(1)).flat_map(|row| row.chunks(TILE));
    tiles.zip(scales).flat_map(|(tile, scale)| tile.iter().map(move |c| decode(*c) * scale)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn powers_of_two_are_not_below() {
        for (x, want) in [(1.0, 1.0), (1.1, 2.0), (0.5, 0.5), (0.51, 1.0), (3.9, 4.0), (1e-20, 1.355_252_7e-20)] {
            assert_eq!(power_of_two(x), want);
        }
    }

    #[test]
    fn blocks_come_back_within_half_a_step_of_their_own_scale() {
        let (rows, columns) = (200, 300);
        let mut w = random(rows * columns, 7);
        // The last block is a thousand times smaller than the others.
        for r in 128..rows {
            w[r * columns + 256..(r + 1) * columns].iter_mut().for_each(|x| *x *= 1e-3);
        }
        let (codes, scales) = quantise_blocks(&w, rows, columns);
        assert_eq!((codes.len(), scales.len()), (rows * columns, 6));
        for (at, (x, y)) in w.iter().zip(dequantise_blocks(&codes, &scales, columns)).enumerate() {
            let scale = scales[at / columns / 128 * 3 + at % columns / 128];
            // Half of the distance of neighbours: an eighth of the value at most, or of the least normal.
            let half = (x.abs() / 16.0).max(scale / 1024.0);
            assert!((x - y).abs() <= half * 1.001, "{at}: {x} against {y}");
        }
        assert!(scales[5] < scales[4] * 1e-2);
    }

    #[test]
    fn every_code_is_its_own_nearest() {
        for code in 0..=255u8 {
            let value = decode(code);
            if value.is_nan() {
                assert_eq!(code & 0x7f, 0x7f);
                assert!(decode(encode(value)).is_nan());
            } else {
                assert_eq!(encode(value), code, "{value}");
            }
        }
        assert_eq!((decode(0x7e), decode(1), decode(0x38)), (448.0, 1.0 / 512.0, 1.0));
    }

    /// Against a search over all codes; ties go to the even one.
    #[test]
    fn rounding_is_to_the_nearest_and_ties_to_even() {
        let nearest = |x: f32| {
            let distance = |c: &u8| (f64::from(decode(*c)) - f64::from(x)).abs();
            let by = |a: &u8, b: &u8| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)));
            (0..=0x7eu8).min_by(by).unwrap()
        };
        for i in 0..20_000 {
            let x = i as f32 * 0.0237;
            assert_eq!(decode(encode(x)), decode(nearest(x)), "{x}");
        }
        for pair in 0..0x7eu8 {
            let middle = (decode(pair) + decode(pair + 1)) / 2.0;
            assert_eq!(encode(middle) & 1, 0, "{middle}");
        }
        assert_eq!(decode(encode(1e9)), 448.0);
    }

    #[test]
    fn rows_come_back_within_half_a_step() {
        for columns in [1, 127, 128, 300] {
            let x: Vec<f32> = random(3 * columns, 9).iter().map(|v| v * 7.0).collect();
            let (codes, scales) = quantise(&x, columns);
            assert_eq!(scales.len(), 3 * columns.div_ceil(TILE));
            let y = dequantise(&codes, &scales, columns);
            for (at, (x, y)) in x.iter().zip(&y).enumerate() {
                let scale = scales[at / columns * columns.div_ceil(TILE) + at % columns / TILE];
                // Half of an eighth of a binade, or half of the subnormal step.
                assert!((x - y).abs() <= (x.abs() / 16.0).max(scale / 1024.0) * 1.0001, "{x} {y}");
            }
        }
        assert_eq!(dequantise(&quantise(&[0.0; 5], 5).0, &[1.0], 5), [0.0; 5]);
    }
}
