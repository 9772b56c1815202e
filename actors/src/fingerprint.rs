//! The fingerprint of a job's state: a hash that does not depend on where the state is (DESIGN 3.6).

use crate::spec::Layout;
use std::collections::BTreeMap;

/// BLAKE3 over (name, shape, type, sum) in order of name, in hexadecimal. `sums` must name every parameter.
pub fn root(layout: &Layout, sums: &BTreeMap<u32, u128>) -> String {
    assert_eq!(sums.len(), layout.parameters.len(), "sums of every parameter");
    let mut hasher = blake3::Hasher::new();
    for (number, parameter) in layout.parameters.iter().enumerate() {
        hasher.update(&(parameter.name.len() as u64).to_le_bytes());
        hasher.update(parameter.name.as_bytes());
        hasher.update(&(parameter.rows as u64).to_le_bytes());
        hasher.update(&(parameter.columns as u64).to_le_bytes());
        hasher.update(b"f32");
        hasher.update(&sums[&(number as u32)].to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
