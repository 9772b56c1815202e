//! AdamW with decoupled weight decay, and the two things that are measured beside it: the squared
//! sums of a gradient (for clipping) and the fingerprint of what was written (contract C1, DESIGN 3.6).
//!
//! Every element is its own: chunks, shards and threads do not show in the result.

use crate::element::{Bf16, Element};
use crate::tensor::Tensor;
use crate::wide;
use std::sync::Arc;

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
    /// What an average of the weights keeps of itself (EMA, technical report 3.2.3); none: there is no average.
    pub ema: Option<f32>,
}

/// Elements of moments: f32, or BF16 (technical report 3.3), of which the update is made then.
trait Moment: Element {
    /// The bits of a weight and its moments, in two words of which the second has its upper half free.
    fn bits(w: f32, m: Self, v: Self) -> [u64; 2];
}

impl Moment for f32 {
    #[inline(always)]
    fn bits(w: f32, m: f32, v: f32) -> [u64; 2] {
        let [w, m, v] = [w, m, v].map(|x| u64::from(x.to_bits()));
        [w | m << 32, v]
    }
}

impl Moment for Bf16 {
    #[inline(always)]
    fn bits(w: f32, m: Self, v: Self) -> [u64; 2] {
        let [m, v] = [m, v].map(|x| u64::from(x.0));
        [u64::from(w.to_bits()) | m << 32 | v << 48, 0]
    }
}

/// Mixes an element's bits with its index, of which `key` is a multiple, into two words. No two values
/// of one element are alike in both. The second is mixed as splitmix64 does it, so that changes don't undo each other.
#[inline(always)]
fn mix(key: u64, [a, b]: [u64; 2]) -> [u64; 2] {
    const BY: u64 = 0xBF58_476D_1CE4_E5B9;
    let low = key ^ a;
    let low = (low ^ (low >> 32)).wrapping_mul(BY);
    let high = low ^ b;
    let high = (high ^ (high >> 30)).wrapping_mul(BY);
    let high = (high ^ (high >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    [low, high ^ (high >> 31)]
}

/// Odd, so that its multiples tell all indices apart.
const KEY: u64 = 0xD6E8_FEB8_6659_FD93;

/// Elements of a block: few enough for the nearest cache, and for sums of halves of words in a word.
const BLOCK: usize = 2048;

/// A weight and its moments.
type State<'a, M> = (&'a [f32], [&'a [M]; 2]);

/// The wrapping sum of a block's mixed elements, the first of which has index `first`.
#[inline(always)]
fn block_sum<M: Moment>(state: State<'_, M>, average: Option<&[f32]>, first: usize) -> u128 {
    match average {
        Some(average) => mixed_sum(state, first, |at| u64::from(average[at].to_bits()) << 32),
        None => mixed_sum(state, first, |_| 0),
    }
}

/// The sum with the bits that `more` has for a place in the block.
#[inline(always)]
fn mixed_sum<M: Moment>((w, [m, v]): State<'_, M>, first: usize, more: impl Fn(usize) -> u64) -> u128 {
    // The lower word's halves are added apart: no carries. The compiler has it in vectors.
    let (mut low, mut middle, mut high) = (0u64, 0u64, 0u64);
    let mut key = KEY.wrapping_mul(first as u64);
    for (at, ((w, m), v)) in w.iter().zip(m).zip(v).enumerate() {
        let [a, b] = M::bits(*w, *m, *v);
        let [l, h] = mix(key, [a, b | more(at)]);
        low += l & 0xffff_ffff;
        middle += l >> 32;
        high = high.wrapping_add(h);
        key = key.wrapping_add(KEY);
    }
    u128::from(low).wrapping_add(u128::from(middle) << 32).wrapping_add(u128::from(high) << 64)
}

/// The 128-bit wrapping sum of a parameter's mixed elements: weight, both moments and, if there is one, the
/// average: matrices of one shape in host memory, f32, or BF16 for the moments. Panics on others.
pub fn state_sum(state: &[Tensor]) -> u128 {
    if state[1].is_bf16() { sum_of::<Bf16>(state) } else { sum_of::<f32>(state) }
}

fn sum_of<M: Moment>(state: &[Tensor]) -> u128 {
    let ((w, moments), average) = taken_apart::<M>(state);
    wide::run(
        #[inline(always)]
        || {
            let of_block = |from: usize| {
                let at = from..w.len().min(from + BLOCK);
                let block = (&w[at.clone()], moments.map(|x| &x[at.clone()]));
                block_sum(block, average.map(|x| &x[at.clone()]), from)
            };
            (0..w.len()).step_by(BLOCK).map(of_block).fold(0, u128::wrapping_add)
        },
    )
}

/// Weight and moments, and the average if there is one.
fn taken_apart<M: Moment>(state: &[Tensor]) -> (State<'_, M>, Option<&[f32]>) {
    let ([w, m, v], rest) = state.split_first_chunk().expect("a weight and its moments");
    let shape = |t: &Tensor| (t.rows(), t.columns());
    assert!(rest.len() <= 1 && state.iter().all(|x| shape(x) == shape(w)), "parts of a state: {state:?}");
    ((w.f32s(), [M::of(m), M::of(v)]), rest.first().map(Tensor::f32s))
}

/// One step, from a state (as in [`state_sum`]) and the gradient: the next state, stored alike, with the sums of the state
/// that was read and of the next.
pub fn step(state: &[Tensor], g: &[f32], a: &AdamW) -> (Vec<Tensor>, [u128; 2]) {
    if state[1].is_bf16() { stepped::<Bf16>(state, g, a) } else { stepped::<f32>(state, g, a) }
}

fn stepped<M: Moment>(state: &[Tensor], g: &[f32], a: &AdamW) -> (Vec<Tensor>, [u128; 2]) {
    let ((w, [m, v]), average) = taken_apart::<M>(state);
    assert_eq!(average.is_some(), a.ema.is_some(), "an average, if it is kept");
    assert_eq!(g.len(), w.len(), "a gradient of every weight");
    let n = w.len();
    let mut out_w: Vec<f32> = wide::unwritten(n);
    let [mut out_m, mut out_v]: [Vec<M>; 2] = [(); 2].map(|()| wide::unwritten(n));
    let mut averaged = average.map(|_| wide::unwritten(n));
    let mut sums = [0u128; 2];
    let mut moments = [[M::default(); BLOCK]; 2];
    let streams = wide::Streams::new();
    wide::run(
        #[inline(always)]
        || {
            for from in (0..n).step_by(BLOCK) {
                let at = from..n.min(from + BLOCK);
                let [new_m, new_v] = moments.each_mut().map(|block| &mut block[..at.len()]);
                let new_w = &mut out_w[at.clone()];
                let (w, m, v, g) = (&w[at.clone()], &m[at.clone()], &v[at.clone()], &g[at.clone()]);
                let read = block_sum((w, [m, v]), average.map(|old| &old[at.clone()]), from);
                for i in 0..w.len() {
                    let g = g[i] * a.clip;
                    new_m[i] = M::nearest(a.beta1 * m[i].value() + (1.0 - a.beta1) * g);
                    new_v[i] = M::nearest(a.beta2 * v[i].value() + (1.0 - a.beta2) * (g * g));
                    let (first, second) = (new_m[i].value(), new_v[i].value());
                    let update = (first * a.correction1) / ((second * a.correction2).sqrt() + a.eps);
                    new_w[i] = w[i] - a.lr * (update + a.decay * w[i]);
                }
                let kept = averaged.as_mut().zip(average).zip(a.ema).map(|((new, old), keep)| {
                    let new: &mut [f32] = &mut new[at.clone()];
                    average_into(new, &old[at.clone()], new_w, keep);
                    &*new
                });
                let written = block_sum((new_w, [new_m, new_v]), kept, from);
                sums = [sums[0].wrapping_add(read), sums[1].wrapping_add(written)];
                // Hardly anyone reads them before the next step.
                streams.copy(new_m, &mut out_m[at.clone()]);
                streams.copy(new_v, &mut out_v[at]);
            }
        },
    );
    drop(streams);
    let (rows, columns) = (state[0].rows(), state[0].columns());
    let moments = [out_m, out_v].map(|data| M::tensor(rows, columns, Arc::new(data)));
    let average = averaged.map(|data| Tensor::from_vec(rows, columns, data));
    ([Tensor::from_vec(rows, columns, out_w)].into_iter().chain(moments).chain(average).collect(), sums)
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
    use crate::element;
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
        ema: None,
    };

    fn row(data: Vec<f32>) -> Tensor {
        Tensor::from_vec(1, data.len(), data)
    }

    fn low(data: &[f32]) -> Tensor {
        Tensor::bf16(1, data.len(), Arc::new(element::rounded(data)))
    }

    #[test]
    fn agrees_with_the_reference_and_sums_what_it_read_and_wrote() {
        let n = 5003;
        let (w, m, g) = (random(n, 1), random(n, 2), random(n, 3));
        let v: Vec<f32> = random(n, 4).iter().map(|x| x * x).collect();
        let (w0, m0, v0) = (wide(&w), wide(&m), wide(&v));
        let state = [w, m, v].map(row);
        let (next, sums) = step(&state, &g, &STEP);
        let (mut ew, mut em, mut ev) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..n {
            let grad = f64::from(g[i]) * 0.5;
            em.push(0.9 * m0[i] + 0.1 * grad);
            ev.push(0.95 * v0[i] + 0.05 * grad * grad);
            ew.push(w0[i] - 1e-2 * (em[i] * 2.0 / ((ev[i] * 3.0).sqrt() + 1e-8) + 0.1 * w0[i]));
        }
        for (part, (expected, name)) in next.iter().zip([(&ew, "w"), (&em, "m"), (&ev, "v")]) {
            assert_close(part.f32s(), expected, 1e-6, name);
        }
        assert_eq!(sums, [state_sum(&state), state_sum(&next)]);
    }

    /// Moments in BF16 are f32 moments rounded after each step, and the update is made of rounded ones.
    #[test]
    fn low_moments_are_rounded_ones() {
        let n = 1003;
        let (w, g) = (random(n, 1), random(n, 3));
        let zeros = vec![0.0; n];
        let mut state = vec![row(w.clone()), low(&zeros), low(&zeros)];
        let mut expected = (w, zeros.clone(), zeros);
        for _ in 0..3 {
            let (next, sums) = step(&state, &g, &STEP);
            assert!(next[1].is_bf16() && next[2].is_bf16());
            assert_eq!(sums, [state_sum(&state), state_sum(&next)]);
            state = next;
            let (w, m, v) = &mut expected;
            for i in 0..n {
                let g = g[i] * STEP.clip;
                let rounded = |x| Bf16::nearest(x).value();
                m[i] = rounded(STEP.beta1 * m[i] + (1.0 - STEP.beta1) * g);
                v[i] = rounded(STEP.beta2 * v[i] + (1.0 - STEP.beta2) * (g * g));
                let update = (m[i] * STEP.correction1) / ((v[i] * STEP.correction2).sqrt() + STEP.eps);
                w[i] -= STEP.lr * (update + STEP.decay * w[i]);
            }
        }
        for (part, expected) in state.iter().zip([expected.0, expected.1, expected.2]) {
            assert_eq!(*part.values(), expected);
        }
    }

    /// Blocks and vectors do not show: it is a plain sum of mixed elements.
    #[test]
    fn sums_in_blocks_are_plain_sums() {
        let n = 5 * BLOCK + 3;
        let [w, m, v, e] = [8, 9, 10, 11].map(|name| random(n, name));
        let plain = |bits: &dyn Fn(usize) -> [u64; 2]| {
            (0..n).fold(0u128, |sum, i| {
                let [low, high] = mix(KEY.wrapping_mul(i as u64), bits(i));
                sum.wrapping_add(u128::from(high) << 64 | u128::from(low))
            })
        };
        let word = |x: f32, at: u32| u64::from(x.to_bits()) << at;
        let half = |x: f32, at: u32| u64::from(Bf16::nearest(x).0) << at;
        let of_f32 = |i: usize| [word(w[i], 0) | word(m[i], 32), word(v[i], 0)];
        let of_bf16 = |i: usize| [word(w[i], 0) | half(m[i], 32) | half(v[i], 48), 0];
        let with = |[a, b]: [u64; 2], i: usize| [a, b | word(e[i], 32)];
        let of = |parts: &[&Tensor]| state_sum(&parts.iter().map(|t| (*t).clone()).collect::<Vec<_>>());
        let (low_m, low_v) = (low(&m), low(&v));
        let [tw, tm, tv, te] = [&w, &m, &v, &e].map(|x| row(x.clone()));
        assert_eq!(of(&[&tw, &tm, &tv]), plain(&of_f32));
        assert_eq!(of(&[&tw, &tm, &tv, &te]), plain(&|i| with(of_f32(i), i)));
        assert_eq!(of(&[&tw, &low_m, &low_v]), plain(&of_bf16));
        assert_eq!(of(&[&tw, &low_m, &low_v, &te]), plain(&|i| with(of_bf16(i), i)));
    }

    #[test]
    fn a_flipped_bit_or_two_exchanged_elements_change_the_sum() {
        let state = [5, 6, 7, 12].map(|name| random(100, name));
        let mut seen = std::collections::BTreeSet::new();
        for low_moments in [false, true] {
            let is_low = |part: usize| low_moments && (part == 1 || part == 2);
            // Bits as they are stored, in the upper half of a word if they are BF16's.
            let sum_of = |state: &[Vec<f32>]| {
                let tensor = |(part, data): (usize, &Vec<f32>)| {
                    let upper = || data.iter().map(|x| Bf16((x.to_bits() >> 16) as u16)).collect();
                    if is_low(part) { Tensor::bf16(1, 100, Arc::new(upper())) } else { row(data.clone()) }
                };
                state_sum(&state.iter().enumerate().map(tensor).collect::<Vec<_>>())
            };
            for parts in [3, 4] {
                assert!(seen.insert(sum_of(&state[..parts])));
                for part in 0..parts {
                    let first = if is_low(part) { 16 } else { 0 };
                    let changed = |change: &dyn Fn(&mut Vec<f32>)| {
                        let mut other = state[..parts].to_vec();
                        change(&mut other[part]);
                        sum_of(&other)
                    };
                    let plus = |x: f32, by: i32| f32::from_bits(x.to_bits().wrapping_add_signed(by << first));
                    for bit in first..32 {
                        let sum = changed(&|x| x[17] = f32::from_bits(x[17].to_bits() ^ (1 << bit)));
                        assert!(seen.insert(sum), "bit {bit} of {part}");
                    }
                    assert!(seen.insert(changed(&|x| x.swap(3, 4))), "{part}");
                    // A change that another one undoes, and a part in the place of another.
                    assert!(seen.insert(changed(&|x| (x[8], x[9]) = (plus(x[8], 1), plus(x[9], -1)))), "{part}");
                    let mut other = state[..parts].to_vec();
                    other.rotate_left(part);
                    assert!(part == 0 || seen.insert(sum_of(&other)), "{part}");
                }
            }
        }
    }

    #[test]
    fn an_average_follows_its_weight() {
        let n = 300;
        let [w, m, e, g] = [1, 2, 3, 4].map(|name| random(n, name));
        let mut state = vec![row(w), row(m), row(vec![0.5; n])];
        let (plain, _) = step(&state, &g, &STEP);
        state.push(row(e.clone()));
        let (next, sums) = step(&state, &g, &AdamW { ema: Some(0.75), ..STEP });
        for (with, without) in next.iter().zip(&plain) {
            assert_eq!(with.f32s(), without.f32s(), "it changes nothing else");
        }
        let weight = next[0].f32s();
        let want: Vec<f64> = e.iter().zip(weight).map(|(e, w)| 0.75 * f64::from(*e) + 0.25 * f64::from(*w)).collect();
        assert_close(next[3].f32s(), &want, 1e-7, "average");
        assert_eq!(averaged(&e, weight, 0.75), next[3].f32s());
        assert_eq!(sums, [state_sum(&state), state_sum(&next)]);
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
