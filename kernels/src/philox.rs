//! Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC11): randomness as a function, with no state.
//!
//! Contract C1 wants the same numbers wherever and whenever they are asked for, so a stream is
//! named by (seed, purpose, name) and a number by its index in the stream.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One block: four words from a counter of four and a key of two.
pub(crate) fn block(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(WEYL[0]);
            key[1] = key[1].wrapping_add(WEYL[1]);
        }
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
    }
    counter
}

/// A stream of random numbers, named by a seed, a purpose and a 32-bit name.
#[derive(Debug, Clone, Copy)]
pub struct Philox {
    key: [u32; 2],
    purpose: u32,
    name: u32,
}

impl Philox {
    /// The stream of `seed` for `purpose` (what the numbers are for) and `name` (which one of them).
    pub fn new(seed: u64, purpose: u32, name: u32) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], purpose, name }
    }

    /// The stream of a parameter: its name is hashed into the stream's.
    pub fn named(seed: u64, purpose: u32, name: &str) -> Self {
        let hash = blake3::hash(name.as_bytes());
        let word = u32::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"));
        Self::new(seed, purpose, word)
    }

    /// Four words at `index`.
    pub fn words(&self, index: u64) -> [u32; 4] {
        block([index as u32, (index >> 32) as u32, self.purpose, self.name], self.key)
    }

    /// A number in [0, 1) with 53 bits.
    pub fn uniform(&self, index: u64) -> f64 {
        let w = self.words(index);
        let bits = (u64::from(w[0]) << 32 | u64::from(w[1])) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }

    /// `n` normal numbers of deviation `std` (Box-Muller in f64 with a portable libm).
    pub fn normals(&self, n: usize, std: f64) -> Vec<f32> {
        let mut out = Vec::with_capacity(n + 1);
        for index in 0..n.div_ceil(2) as u64 {
            let w = self.words(index);
            // In (0, 1], so that the logarithm is finite.
            let u = (f64::from(w[0]) + 1.0) / 4_294_967_296.0;
            let angle = std::f64::consts::TAU * (f64::from(w[1]) / 4_294_967_296.0);
            let radius = libm::sqrt(-2.0 * libm::log(u)) * std;
            out.push((radius * libm::cos(angle)) as f32);
            out.push((radius * libm::sin(angle)) as f32);
        }
        out.truncate(n);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the Random123 distribution's kat_vectors.
    #[test]
    fn known_answers() {
        assert_eq!(block([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(block([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            block([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normals_have_the_deviation_and_do_not_depend_on_the_count() {
        let stream = Philox::named(3, 1, "layer.weight");
        let many = stream.normals(10_001, 0.5);
        let mean = many.iter().map(|x| f64::from(*x)).sum::<f64>() / many.len() as f64;
        let var = many.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / many.len() as f64;
        assert!(mean.abs() < 0.02 && (var.sqrt() - 0.5).abs() < 0.02, "{mean} {var}");
        assert_eq!(stream.normals(7, 0.5)[..], many[..7]);
    }
}
