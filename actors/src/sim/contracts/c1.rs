//! C1, same bits: the fingerprint of every committed step is that of the undisturbed run. Checked at every report.

use super::Broken;
use crate::ids::Step;

/// Of a step's report.
pub(in crate::sim) fn same_bits(step: Step, fingerprint: &str, reference: &[String]) -> Result<(), Broken> {
    match reference.get(step as usize - 1) {
        Some(expected) if *expected == fingerprint => Ok(()),
        expected => Err(("C1", format!("step {step} has fingerprint {fingerprint}, expected {expected:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_fingerprint_or_another_step_is_seen() {
        let reference = ["a".to_owned(), "b".to_owned()];
        assert!(same_bits(2, "b", &reference).is_ok());
        for (step, fingerprint) in [(2, "a"), (1, "b"), (3, "b")] {
            assert_eq!(same_bits(step, fingerprint, &reference).unwrap_err().0, "C1");
        }
    }
}
