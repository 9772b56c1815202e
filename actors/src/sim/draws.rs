//! Random numbers of a simulated world: a function of the seed and of how many were drawn before.

use everstep_kernels::Philox;

/// See the module.
#[derive(Debug)]
pub(super) struct Draws {
    random: Philox,
    drawn: u64,
}

impl Draws {
    /// Of a seed, for one purpose.
    pub(super) fn new(seed: u64, purpose: u32) -> Self {
        Self { random: Philox::new(seed, purpose, 0), drawn: 0 }
    }

    /// The next one.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        let words = self.random.words(self.drawn);
        (u64::from(words[0]) << 32 | u64::from(words[1])) % bound
    }
}
