//! Which bytes a micro-batch consists of: a pure function of (seed, step, lane, micro-batch).
//!
//! The corpus is cut into sequences; their order in an epoch is a seeded permutation that is computed
//! for one index at a time (a Feistel network, walked until it lands inside), so it can be entered
//! anywhere and nothing about it is stored.

use crate::ids::Step;
use crate::spec::JobSpec;
use everstep_kernels::Philox;
use std::sync::Arc;

const PURPOSE_ORDER: u32 = 2;

/// The bytes that a job trains on.
#[derive(Debug, Clone)]
pub struct Corpus {
    bytes: Arc<Vec<u8>>,
}

/// The text is too short for a single sequence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the text has {got} bytes, but one sequence needs {need}")]
pub struct TooShort {
    /// Bytes there are.
    pub got: usize,
    /// Bytes of a sequence and the target of its last position.
    pub need: usize,
}

/// A seeded permutation of `0..n`.
fn permute(n: u64, seed: u64, epoch: u64, index: u64) -> u64 {
    if n <= 1 {
        return 0;
    }
    let half = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..4u32 {
            let words = Philox::new(seed, PURPOSE_ORDER, round).words(epoch << 40 ^ right);
            (left, right) = (right, left ^ (u64::from(words[0]) & mask));
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

impl Corpus {
    /// A corpus of these bytes, if a sequence of `spec` fits.
    pub fn new(bytes: Arc<Vec<u8>>, spec: &JobSpec) -> Result<Self, TooShort> {
        let need = spec.model.sequence + 1;
        if bytes.len() < need {
            return Err(TooShort { got: bytes.len(), need });
        }
        Ok(Self { bytes })
    }

    /// Sequences of an epoch.
    fn sequences(&self, spec: &JobSpec) -> u64 {
        ((self.bytes.len() - 1) / spec.model.sequence) as u64
    }

    /// Numbers of a micro-batch's samples, counted from the start of the job.
    pub fn samples(spec: &JobSpec, step: Step, lane: u32, micro_batch: u32) -> std::ops::Range<u64> {
        let before = spec.micro_batches.before(step) * u64::from(spec.lanes);
        let of_step = u64::from(lane) * u64::from(spec.micro_batches.at(step)) + u64::from(micro_batch);
        let first = (before + of_step) * u64::from(spec.sequences);
        first..first + u64::from(spec.sequences)
    }

    /// Tokens and targets of a micro-batch, each `sequences x sequence` long.
    pub fn micro_batch(&self, spec: &JobSpec, step: Step, lane: u32, micro_batch: u32) -> (Vec<u32>, Vec<u32>) {
        let (n, length) = (self.sequences(spec), spec.model.sequence);
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for sample in Self::samples(spec, step, lane, micro_batch) {
            let at = permute(n, spec.seed, sample / n, sample % n) as usize * length;
            let bytes = &self.bytes[at..=at + length];
            tokens.extend(bytes[..length].iter().map(|b| u32::from(*b)));
            targets.extend(bytes[1..].iter().map(|b| u32::from(*b)));
        }
        (tokens, targets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_order_is_a_permutation_of_each_epoch() {
        for n in [1, 2, 3, 17, 64, 1000] {
            for epoch in 0..3 {
                let all: BTreeSet<u64> = (0..n).map(|i| permute(n, 9, epoch, i)).collect();
                assert_eq!(all.len() as u64, n);
                assert_eq!(all.last(), Some(&(n - 1)));
            }
        }
        let order = |seed, epoch| (0..50).map(|i| permute(50, seed, epoch, i)).collect::<Vec<_>>();
        assert_ne!(order(1, 0), order(2, 0));
        assert_ne!(order(1, 0), order(1, 1));
    }
}
