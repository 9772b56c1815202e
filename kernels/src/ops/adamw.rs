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
    /// What an average of the weights keeps of itself (EMA, technical report 3.2.3); none: there is no average.
    pub ema: Option<f32>,
}

/// Mixes an element's weight and moments with its index, of which `key` is a multiple, into two words: each
/// (and what comes last, the average or else the key) is taken in before a round of splitmix64, which leaves no two inputs alike.
#[inline(always)]
fn mix(key: u64, [w, m, v]: [f32; 3], last: u64) -> (u64, u64) {
    #[inline(always)]
    fn splitmix(mut z: u64) -> u64 {
        z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    let [w, m, v] = [w, m, v].map(|x| u64::from(x.to_bits()));
    let low = splitmix(key ^ (w | m << 32));
    (low, splitmix(low ^ (v | last << 32)))
}

/// Odd, so that its multiples tell all indices apart.
const KEY: u64 = 0xD6E8_FEB8_6659_FD93;

/// Elements of a block: few enough for the nearest cache, and for sums of halves of words in a word.
const BLOCK: usize = 1024;

/// The wrapping sum of a block's mixed elements, the first of which has index `first`.
#[inline(always)]
fn block_sum(state: [&[f32]; 3], average: Option<&[f32]>, first: usize) -> u128 {
    match average {
        Some(average) => mixed_sum(state, first, |at, _| u64::from(average[at].to_bits())),
        None => mixed_sum(state, first, |_, key| key),
    }
}

/// The sum with `last(place in the block, key)`.
#[inline(always)]
fn mixed_sum([w, m, v]: [&[f32]; 3], first: usize, last: impl Fn(usize, u64) -> u64) -> u128 {
    // A word's halves are added apart, so that lanes need no carries.
    let (mut low, mut middle, mut high) = ([0u64; 8], [0u64; 8], [0u64; 8]);
    let mut keys: [u64; 8] = std::array::from_fn(|lane| KEY.wrapping_mul((first + lane) as u64));
    let mut add = |lane: usize, key: u64, element: [f32; 3], last: u64| {
        let (l, h) = mix(key, element, last);
        low[lane] += l & 0xffff_ffff;
        middle[lane] += l >> 32;
        high[lane] = high[lane].wrapping_add(h);
    };
    let [w, m, v] = [w, m, v].map(|x| x.as_chunks::<8>());
    for (n, ((w, m), v)) in w.0.iter().zip(m.0).zip(v.0).enumerate() {
        for lane in 0..8 {
            add(lane, keys[lane], [w[lane], m[lane], v[lane]], last(8 * n + lane, keys[lane]));
            keys[lane] = keys[lane].wrapping_add(KEY.wrapping_mul(8));
        }
    }
    let whole = 8 * w.0.len();
    for (lane, ((w, m), v)) in w.1.iter().zip(m.1).zip(v.1).enumerate() {
        add(lane, keys[lane], [*w, *m, *v], last(whole + lane, keys[lane]));
    }
    let all = |words: [u64; 8]| words.iter().fold(0u128, |sum, w| sum.wrapping_add(u128::from(*w)));
    all(low).wrapping_add(all(middle) << 32).wrapping_add(all(high) << 64)
}

/// The 128-bit wrapping sum of a parameter's mixed elements: weight, both moments and, if there is one, the
/// average. Panics on another number of parts, or parts of other lengths.
pub fn state_sum(state: &[&[f32]]) -> u128 {
    let (parts, average) = taken_apart(state);
    wide::run(
        #[inline(always)]
        || {
            let of_block = |from: usize| {
                let at = from..parts[0].len().min(from + BLOCK);
                block_sum(parts.map(|x| &x[at.clone()]), average.map(|x| &x[at.clone()]), from)
            };
            (0..parts[0].len()).step_by(BLOCK).map(of_block).fold(0, u128::wrapping_add)
        },
    )
}

/// Weight and moments, and the average if there is one.
fn taken_apart<'a>(state: &[&'a [f32]]) -> ([&'a [f32]; 3], Option<&'a [f32]>) {
    let (&[w, m, v], rest) = state.split_first_chunk().expect("a weight and its moments");
    assert!(rest.len() <= 1 && state.iter().all(|x| x.len() == w.len()), "parts of a state");
    ([w, m, v], rest.first().copied())
}

/// One step, from a state (as in [`state_sum`]) and the gradient: the next state with its sum.
pub fn step(state: &[&[f32]], g: &[f32], a: &AdamW) -> (Vec<Vec<f32>>, u128) {
    let ([w, m, v], average) = taken_apart(state);
    assert_eq!(average.is_some(), a.ema.is_some(), "an average, if it is kept");
    assert_eq!(g.len(), w.len(), "a gradient of every weight");
    let n = w.len();
    let mut out: [Vec<f32>; 3] = [(); 3].map(|()| wide::unwritten(n));
    let mut averaged = average.map(|_| wide::unwritten(n));
    let mut sum = 0u128;
    let mut moments = [[0.0f32; BLOCK]; 2];
    wide::run(
        #[inline(always)]
        || {
            for from in (0..n).step_by(BLOCK) {
                let at = from..n.min(from + BLOCK);
                let [new_w, out_m, out_v] = &mut out;
                let [new_m, new_v] = moments.each_mut().map(|block| &mut block[..at.len()]);
                let (new_w, out_m, out_v) = (&mut new_w[at.clone()], &mut out_m[at.clone()], &mut out_v[at.clone()]);
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
                let kept = averaged.as_mut().zip(average).zip(a.ema).map(|((new, old), keep)| {
                    let new: &mut [f32] = &mut new[at.clone()];
                    average_into(new, &old[at], new_w, keep);
                    &*new
                });
                sum = sum.wrapping_add(block_sum([new_w, new_m, new_v], kept, from));
                // Hardly anyone reads them before the next step.
                wide::stream(new_m, out_m);
                wide::stream(new_v, out_v);
            }
        },
    );
    (out.into_iter().chain(averaged).collect(), sum)
}

/// `keep * old + (1 - keep) * w`.
#[inline(always)]
fn average_into(new: &mut [f32], old: &[f32], w: &[f32], keep: f32) {
    for ((new, old), w) in new.iter_mut().zip(old).zip(w) {
        *new = keep * old + (1.0 - keep) * w;
    }
}

/// The next average of a weight that no gradient moves: a gate's bias.
pub fn averaged(old: &[f32], w: &[f32], keep: f32) -> Vec<f32> {
    let mut new = vec![0.0; w.len()];
    average_into(&mut new, old, w, keep);
    new
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
        ema: None,
    };

    #[test]
    fn agrees_with_the_reference_and_sums_what_it_wrote() {
        let n = 5003;
        let (w, m, g) = (random(n, 1), random(n, 2), random(n, 3));
        let v: Vec<f32> = random(n, 4).iter().map(|x| x * x).collect();
        let (w0, m0, v0) = (wide(&w), wide(&m), wide(&v));
        let (next, sum) = step(&[&w, &m, &v], &g, &STEP);
        let [w, m, v] = next.try_into().expect("no average");
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
        assert_eq!(sum, state_sum(&[&w, &m, &v]));
    }

    #[test]
    fn low_moments_are_bf16_and_close() {
        let n = 1000;
        let (w0, g) = (random(n, 1), random(n, 3));
        let run = |low_moments| {
            let (mut w, mut m, mut v) = (w0.clone(), vec![0.0; n], vec![0.0; n]);
            for _ in 0..3 {
                let next = step(&[&w, &m, &v], &g, &AdamW { low_moments, ..STEP }).0;
                [w, m, v] = next.try_into().expect("no average");
            }
            (w, m, v)
        };
        let ((w, m, v), (exact, ..)) = (run(true), run(false));
        assert!(m.iter().chain(&v).all(|x| x.to_bits() & 0xffff == 0));
        // Three roundings of 2^-9 in an update of lr and less.
        assert!(w.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 3.0 * STEP.lr * 0.02));
        assert_ne!(w, exact);
    }

    /// Blocks and lanes do not show: it is a plain sum of mixed elements.
    #[test]
    fn sums_in_blocks_are_plain_sums() {
        let n = 5 * BLOCK + 3;
        let [w, m, v, e] = [8, 9, 10, 11].map(|name| random(n, name));
        for average in [None, Some(&e[..])] {
            let plain = (0..n).fold(0u128, |sum, i| {
                let key = KEY.wrapping_mul(i as u64);
                let last = average.map_or(key, |e| u64::from(e[i].to_bits()));
                let (low, high) = mix(key, [w[i], m[i], v[i]], last);
                sum.wrapping_add(u128::from(high) << 64 | u128::from(low))
            });
            let state: Vec<&[f32]> = [&w[..], &m, &v].into_iter().chain(average).collect();
            assert_eq!(state_sum(&state), plain);
        }
    }

    #[test]
    fn a_flipped_bit_or_two_exchanged_elements_change_the_sum() {
        let state = [5, 6, 7, 12].map(|name| random(100, name));
        let sum_of = |state: &[Vec<f32>]| state_sum(&state.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let mut seen = std::collections::BTreeSet::new();
        for parts in [3, 4] {
            assert!(seen.insert(sum_of(&state[..parts])));
            for part in 0..parts {
                for bit in 0..32 {
                    let mut other = state[..parts].to_vec();
                    other[part][17] = f32::from_bits(state[part][17].to_bits() ^ (1 << bit));
                    assert!(seen.insert(sum_of(&other)), "bit {bit} of {part}");
                }
                let mut other = state[..parts].to_vec();
                other[part].swap(3, 4);
                assert!(seen.insert(sum_of(&other)), "{part}");
                // A part in the place of another, and a change that another one undoes.
                let mut other = state[..parts].to_vec();
                other.rotate_left(part);
                assert!(part == 0 || seen.insert(sum_of(&other)), "{part}");
                let mut other = state[..parts].to_vec();
                let (up, down) = (state[part][8].to_bits() + 1, state[part][9].to_bits() - 1);
                (other[part][8], other[part][9]) = (f32::from_bits(up), f32::from_bits(down));
                assert!(seen.insert(sum_of(&other)), "{part}");
            }
        }
    }

    #[test]
    fn an_average_follows_its_weight() {
        let n = 300;
        let [w, m, e, g] = [1, 2, 3, 4].map(|name| random(n, name));
        let v = vec![0.5; n];
        let (plain, _) = step(&[&w, &m, &v], &g, &STEP);
        let (next, sum) = step(&[&w, &m, &v, &e], &g, &AdamW { ema: Some(0.75), ..STEP });
        assert_eq!(next[..3], plain[..], "it changes nothing else");
        let want: Vec<f64> = e.iter().zip(&next[0]).map(|(e, w)| 0.75 * f64::from(*e) + 0.25 * f64::from(*w)).collect();
        assert_close(&next[3], &want, 1e-7, "average");
        assert_eq!(averaged(&e, &next[0], 0.75), next[3]);
        assert_eq!(sum, state_sum(&next.iter().map(Vec::as_slice).collect::<Vec<_>>()));
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
