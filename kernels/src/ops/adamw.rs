//! AdamW with decoupled weight decay, and the two things that are measured beside it: the squared
//! sums of a gradient (for clipping) and the fingerprint of what was written (contract C1, DESIGN 3.6).
//!
//! Every element is its own: chunks, shards and threads do not show in the result.

use crate::math::{bf16_bits, bf16_value};
use crate::wide;

/// Elements whose squares make one f64 part of the norm.
pub const NORM_CHUNK: usize = 64 * 1024;

/// The numbers of one optimizer step, the same for every shard.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay; zero for tensors that have none.
    pub decay: f32,
    /// What the gradient is multiplied with (clipping).
    pub clip: f32,
    /// `1 / (1 - beta1^step)`.
    pub correction1: f32,
    /// `1 / (1 - beta2^step)`.
    pub correction2: f32,
    /// Whether moments are rounded to BF16 (technical report 3.3); the update is made of rounded ones.
    pub low_moments: bool,
}

/// 128-bit wrapping sums over weights, first and second moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateSums(pub [u128; 3]);

/// Mixes an element's index and bits into two words (two rounds of splitmix64 with other constants).
#[inline(always)]
fn mix(index: u64, bits: u32) -> (u64, u64) {
    #[inline(always)]
    fn splitmix(mut z: u64) -> u64 {
        z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    let low = splitmix(index.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ u64::from(bits));
    let high = splitmix(low ^ (index << 32 | u64::from(bits)));
    (low, high)
}

/// Elements of a block: few enough for the nearest cache, and for sums of halves of words in a word.
const BLOCK: usize = 2048;

/// The wrapping sum of a block's mixed elements, the first of which has index `first`.
#[inline(always)]
fn block_sum(x: &[f32], first: usize) -> u128 {
    // A word's halves are added apart, so that lanes need no carries.
    let (mut low, mut middle, mut high) = ([0u64; 8], [0u64; 8], [0u64; 8]);
    let mut add = |lane: usize, index: usize, x: f32| {
        let (l, h) = mix(index as u64, x.to_bits());
        low[lane] += l & 0xffff_ffff;
        middle[lane] += l >> 32;
        high[lane] = high[lane].wrapping_add(h);
    };
    let (whole, rest) = x.as_chunks::<8>();
    for (n, chunk) in whole.iter().enumerate() {
        for (lane, x) in chunk.iter().enumerate() {
            add(lane, first + 8 * n + lane, *x);
        }
    }
    for (lane, x) in rest.iter().enumerate() {
        add(lane, first + 8 * whole.len() + lane, *x);
    }
    let all = |words: [u64; 8]| words.iter().fold(0u128, |sum, w| sum.wrapping_add(u128::from(*w)));
    all(low).wrapping_add(all(middle) << 32).wrapping_add(all(high) << 64)
}

/// The sum of one tensor.
pub fn state_sum(x: &[f32]) -> u128 {
    wide::run(
        #[inline(always)]
        || {
            let blocks = x.chunks(BLOCK).enumerate();
            blocks.fold(0, |sum: u128, (n, block)| sum.wrapping_add(block_sum(block, n * BLOCK)))
        },
    )
}

/// The sums of a parameter's whole state.
pub fn state_sums(w: &[f32], m: &[f32], v: &[f32]) -> StateSums {
    StateSums([state_sum(w), state_sum(m), state_sum(v)])
}

/// A parameter's weight and moments after a step.
type Stepped = [Vec<f32>; 3];

/// One step, from `w`, `m` and `v` and the gradient; with the sums of what was written.
pub fn step(w: &[f32], m: &[f32], v: &[f32], g: &[f32], a: &AdamW) -> (Stepped, StateSums) {
    let n = w.len();
    let mut out: Stepped = [wide::unwritten(n), wide::unwritten(n), wide::unwritten(n)];
    let mut sums = [0u128; 3];
    wide::run(
        #[inline(always)]
        || {
            for from in (0..n).step_by(BLOCK) {
                let at = from..n.min(from + BLOCK);
                let [new_w, new_m, new_v] = &mut out;
                let (new_w, new_m, new_v) = (&mut new_w[at.clone()], &mut new_m[at.clone()], &mut new_v[at.clone()]);
                let (w, m, v, g) = (&w[at.clone()], &m[at.clone()], &v[at.clone()], &g[at.clone()]);
                for i in 0..w.len() {
                    let g = g[i] * a.clip;
                    let mut first = a.beta1 * m[i] + (1.0 - a.beta1) * g;
                    let mut second = a.beta2 * v[i] + (1.0 - a.beta2) * (g * g);
                    if a.low_moments {
                        (first, second) = (bf16_value(bf16_bits(first)), bf16_value(bf16_bits(second)));
                    }
                    let update = (first * a.correction1) / ((second * a.correction2).sqrt() + a.eps);
                    new_w[i] = w[i] - a.lr * (update + a.decay * w[i]);
                    (new_m[i], new_v[i]) = (first, second);
                }
                for (sum, x) in sums.iter_mut().zip([&*new_w, &*new_m, &*new_v]) {
                    *sum = sum.wrapping_add(block_sum(x, from));
                }
            }
        },
    );
    (out, StateSums(sums))
}

/// Squared sums of a gradient, one for each [`NORM_CHUNK`] elements, in f64 by eight fixed lanes.
pub fn square_sums(g: &[f32]) -> Vec<f64> {
    wide::run(
        #[inline(always)]
        || {
            let of_chunk = |chunk: &[f32]| {
                let mut lanes = [0.0f64; 8];
                let (whole, rest) = chunk.as_chunks::<8>();
                for eight in whole {
                    for (lane, x) in lanes.iter_mut().zip(eight) {
                        *lane += f64::from(*x) * f64::from(*x);
                    }
                }
                for (lane, x) in lanes.iter_mut().zip(rest) {
                    *lane += f64::from(*x) * f64::from(*x);
                }
                let pairs = [lanes[0] + lanes[4], lanes[1] + lanes[5], lanes[2] + lanes[6], lanes[3] + lanes[7]];
                (pairs[0] + pairs[2]) + (pairs[1] + pairs[3])
            };
            g.chunks(NORM_CHUNK).map(of_chunk).collect()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    const STEP: AdamW = AdamW {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        decay: 0.1,
        clip: 0.5,
        correction1: 2.0,
        correction2: 3.0,
        low_moments: false,
    };

    #[test]
    fn agrees_with_the_reference_and_sums_what_it_wrote() {
        let n = 5003;
        let (w, m, g) = (random(n, 1), random(n, 2), random(n, 3));
        let v: Vec<f32> = random(n, 4).iter().map(|x| x * x).collect();
        let (w0, m0, v0) = (wide(&w), wide(&m), wide(&v));
        let ([w, m, v], sums) = step(&w, &m, &v, &g, &STEP);
        let (mut ew, mut em, mut ev) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..n {
            let grad = f64::from(g[i]) * 0.5;
            em.push(0.9 * m0[i] + 0.1 * grad);
            ev.push(0.95 * v0[i] + 0.05 * grad * grad);
            ew.push(w0[i] - 1e-2 * (em[i] * 2.0 / ((ev[i] * 3.0).sqrt() + 1e-8) + 0.1 * w0[i]));
        }
        assert_close(&w, &ew, 1e-6, "w");
        assert_close(&m, &em, 1e-6, "m");
        assert_close(&v, &ev, 1e-6, "v");
        assert_eq!(sums, state_sums(&w, &m, &v));
    }

    #[test]
    fn low_moments_are_bf16_and_close() {
        let n = 1000;
        let (w0, g) = (random(n, 1), random(n, 3));
        let run = |low_moments| {
            let (mut w, mut m, mut v) = (w0.clone(), vec![0.0; n], vec![0.0; n]);
            for _ in 0..3 {
                ([w, m, v], _) = step(&w, &m, &v, &g, &AdamW { low_moments, ..STEP });
            }
            (w, m, v)
        };
        let ((w, m, v), (exact, ..)) = (run(true), run(false));
        assert!(m.iter().chain(&v).all(|x| x.to_bits() & 0xffff == 0));
        // Three roundings of 2^-9 in an update of lr and less.
        assert!(w.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 3.0 * STEP.lr * 0.02));
        assert_ne!(w, exact);
    }

    /// What stored fingerprints were made with: a plain sum of mixed elements.
    #[test]
    fn sums_in_blocks_are_plain_sums() {
        let x = random(5 * BLOCK + 3, 8);
        let word = |(i, x): (usize, &f32)| mix(i as u64, x.to_bits());
        let plain = x
            .iter()
            .enumerate()
            .map(word)
            .fold(0u128, |sum, (low, high)| sum.wrapping_add(u128::from(high) << 64 | u128::from(low)));
        assert_eq!(state_sum(&x), plain);
    }

    #[test]
    fn a_flipped_bit_or_two_exchanged_elements_change_the_sum() {
        let x = random(100, 5);
        let sum = state_sum(&x);
        for bit in 0..32 {
            let mut y = x.clone();
            y[17] = f32::from_bits(y[17].to_bits() ^ (1 << bit));
            assert_ne!(state_sum(&y), sum);
        }
        let mut y = x.clone();
        y.swap(3, 4);
        assert_ne!(state_sum(&y), sum);
    }

    #[test]
    fn square_sums_come_by_chunk() {
        let g = random(NORM_CHUNK + 5, 6);
        let parts = square_sums(&g);
        assert_eq!(parts.len(), 2);
        let exact: f64 = wide(&g).iter().map(|x| x * x).sum();
        assert!((parts.iter().sum::<f64>() - exact).abs() / exact < 1e-12);
        assert_eq!(square_sums(&g[..NORM_CHUNK]), parts[..1]);
    }
}
