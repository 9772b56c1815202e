//! Which tokens a micro-batch consists of: a pure function of (seed, step, lane, micro-batch).
//!
//! Samples are numbered from the start of the job. A block of [`BLOCK`] of them gives each source a fixed
//! number of places, by its weight, in a seeded order; so a sample names its source and its index there
//! without counting what was before. A source is cut into sequences; their order in an epoch is a seeded
//! permutation that is computed for one index at a time (a Feistel network, walked until it lands
//! inside). So the data can be entered anywhere, for any number of nodes, and nothing about it is stored.

use crate::ids::Step;
use crate::spec::JobSpec;
use crate::tokens::Tokens;
use everstep_kernels::Philox;

const PURPOSE_ORDER: u32 = 2;
const PURPOSE_MIX: u32 = 6;

/// Samples in which the sources' shares are exact.
const BLOCK: u64 = 1024;

/// One source and its share of the samples.
#[derive(Debug, Clone)]
struct Source {
    tokens: Tokens,
    /// Its places in a block.
    places: u64,
    /// Names its permutations: its place among the sources.
    name: u32,
}

/// The tokens that a job trains on.
#[derive(Debug, Clone)]
pub struct Corpus {
    sources: Vec<Source>,
}

/// A source is too short for a single sequence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("source {source_number} has {got} tokens, but one sequence needs {need}")]
pub struct TooShort {
    /// Which source, from 0 on.
    pub source_number: usize,
    /// Tokens there are.
    pub got: usize,
    /// Tokens of a sequence and the target of its last position.
    pub need: usize,
}

/// A seeded permutation of `0..n`; `purpose` and `name` tell permutations of one seed apart.
fn permute(n: u64, key: (u64, u32, u32), epoch: u64, index: u64) -> u64 {
    if n <= 1 {
        return 0;
    }
    let (seed, purpose, name) = key;
    let half = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..4u32 {
            let words = Philox::new(seed, purpose, name ^ round << 30).words(epoch << 40 ^ right);
            (left, right) = (right, left ^ (u64::from(words[0]) & mask));
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

/// Places of a block by weight: the integer parts first, then one more for the largest remainders; every
/// source has at least one.
fn places(weights: &[f64]) -> Vec<u64> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| w / total * BLOCK as f64).collect();
    let mut places: Vec<u64> = exact.iter().map(|x| (*x as u64).max(1)).collect();
    while places.iter().sum::<u64>() != BLOCK {
        let missing = places.iter().sum::<u64>() < BLOCK;
        let lack = |n: &usize| exact[*n] - places[*n] as f64;
        let all = 0..places.len();
        if missing {
            let most = all.max_by(|a, b| lack(a).total_cmp(&lack(b)).then(b.cmp(a)));
            places[most.expect("there is a source")] += 1;
        } else {
            let least = all.filter(|n| places[*n] > 1).min_by(|a, b| lack(a).total_cmp(&lack(b)).then(a.cmp(b)));
            places[least.expect("there are fewer sources than places")] -= 1;
        }
    }
    places
}

impl Corpus {
    /// A corpus of these sources, in the order of the configuration, if a sequence of `spec` fits in each.
    pub fn new(sources: Vec<Tokens>, spec: &JobSpec) -> Result<Self, TooShort> {
        let need = spec.model.sequence + 1;
        for (source_number, tokens) in sources.iter().enumerate() {
            if tokens.len() < need {
                return Err(TooShort { source_number, got: tokens.len(), need });
            }
        }
        let weights = if sources.len() == 1 { &[1.0][..] } else { &spec.source_weights };
        assert_eq!(weights.len(), sources.len(), "a weight for each source");
        let source = |(n, (tokens, places))| Source { tokens, places, name: n as u32 };
        Ok(Self { sources: sources.into_iter().zip(places(weights)).enumerate().map(source).collect() })
    }

    /// Numbers of a micro-batch's samples, counted from the start of the job.
    pub fn samples(spec: &JobSpec, step: Step, lane: u32, micro_batch: u32) -> std::ops::Range<u64> {
        let before = spec.micro_batches.before(step) * u64::from(spec.lanes);
        let of_step = u64::from(lane) * u64::from(spec.micro_batches.at(step)) + u64::from(micro_batch);
        let first = (before + of_step) * u64::from(spec.sequences);
        first..first + u64::from(spec.sequences)
    }

    /// The source of a sample, and its index among that source's samples.
    fn source_of(&self, seed: u64, sample: u64) -> (&Source, u64) {
        let (block, slot) = (sample / BLOCK, sample % BLOCK);
        let mut rank = permute(BLOCK, (seed, PURPOSE_MIX, 0), block, slot);
        for source in &self.sources {
            if rank < source.places {
                return (source, block * source.places + rank);
            }
            rank -= source.places;
        }
        unreachable!("places fill the block")
    }

    /// Tokens and targets of a micro-batch, each `sequences x sequence` long.
    pub fn micro_batch(&self, spec: &JobSpec, step: Step, lane: u32, micro_batch: u32) -> (Vec<u32>, Vec<u32>) {
        let length = spec.model.sequence;
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for sample in Self::samples(spec, step, lane, micro_batch) {
            let (source, index) = self.source_of(spec.seed, sample);
            let n = ((source.tokens.len() - 1) / length) as u64;
            let at = permute(n, (spec.seed, PURPOSE_ORDER, source.name), index / n, index % n) as usize * length;
            let window = source.tokens.read(at..at + length + 1);
            tokens.extend(&window[..length]);
            targets.extend(&window[1..]);
        }
        (tokens, targets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;

    const KEY: (u64, u32, u32) = (9, PURPOSE_ORDER, 0);

    #[test]
    fn the_order_is_a_permutation_of_each_epoch() {
        for n in [1, 2, 3, 17, 64, 1000] {
            for epoch in 0..3 {
                let all: BTreeSet<u64> = (0..n).map(|i| permute(n, KEY, epoch, i)).collect();
                assert_eq!(all.len() as u64, n);
                assert_eq!(all.last(), Some(&(n - 1)));
            }
        }
        let order = |key, epoch| (0..50).map(|i| permute(50, key, epoch, i)).collect::<Vec<_>>();
        let others = [order((2, PURPOSE_ORDER, 0), 0), order(KEY, 1), order((9, PURPOSE_ORDER, 1), 0)];
        assert!(others.iter().all(|o| *o != order(KEY, 0)));
    }

    #[test]
    fn places_follow_the_weights_and_fill_the_block() {
        assert_eq!(places(&[1.0]), [1024]);
        assert_eq!(places(&[3.0, 1.0]), [768, 256]);
        assert_eq!(places(&[1.0, 1.0, 1.0]), [342, 341, 341]);
        assert_eq!(places(&[1e9, 1e-9, 1.0]), [1022, 1, 1]);
        assert_eq!(places(&vec![1.0; 1024]), vec![1; 1024]);
    }

    /// Each source gives its share, and each of its sequences comes once in each of its epochs.
    #[test]
    fn mixing_counts_every_sequence_of_every_source_once_an_epoch() {
        let mut spec = crate::sim::spec(0);
        spec.source_weights = vec![2.0, 1.0, 1.0];
        let sizes = [100usize, 60, 33];
        let length = spec.model.sequence;
        let source = |(n, size): (usize, &usize)| {
            let bytes: Vec<u8> = (0..*size as u32).flat_map(|i| (n as u32 * 1000 + i).to_le_bytes()).collect();
            Tokens::new(Arc::new(bytes), 4)
        };
        let corpus = Corpus::new(sizes.iter().enumerate().map(source).collect(), &spec).unwrap();
        let mut seen: [BTreeMap<u64, Vec<u64>>; 3] = Default::default();
        for sample in 0..4 * BLOCK {
            let (source, index) = corpus.source_of(spec.seed, sample);
            seen[source.name as usize].entry(index).or_default().push(sample);
        }
        for (of, share) in seen.iter().zip([2048, 1024, 1024]) {
            assert_eq!(of.len(), share, "indices from 0 on, each once");
            assert!(of.values().all(|v| v.len() == 1) && of.keys().next_back() == Some(&(share as u64 - 1)));
        }
        let (tokens, targets) = corpus.micro_batch(&spec, 3, 0, 1);
        assert_eq!(tokens.len(), length);
        assert!(tokens.iter().zip(&targets).all(|(a, b)| a + 1 == *b), "a source's own sequence");
    }

    #[test]
    fn a_source_that_is_too_short_is_named() {
        let spec = crate::sim::spec(0);
        let tokens = |n: usize| Tokens::new(Arc::new(vec![0u8; n]), 1);
        let error = Corpus::new(vec![tokens(50), tokens(4)], &spec).unwrap_err();
        assert_eq!(error.to_string(), "source 1 has 4 tokens, but one sequence needs 5");
    }
}
