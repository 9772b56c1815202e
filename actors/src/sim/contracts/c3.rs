//! C3, exactly once: steps are reported once each and in order, with as many samples as are in them, and at the end all of them are.
//! That each sum has every sample once is in its bits (C1).

use super::Broken;
use crate::ids::Step;
use crate::spec::JobSpec;

/// A step is reported after so many others.
pub(in crate::sim) fn in_order(step: Step, before: Step) -> Result<(), Broken> {
    if step == before + 1 { Ok(()) } else { Err(("C3", format!("step {step} was reported after step {before}"))) }
}

/// A step is reported with so many samples.
pub(in crate::sim) fn all_samples(step: Step, samples: u64, spec: &JobSpec) -> Result<(), Broken> {
    let expected = spec.samples_of_step(step);
    let what = || format!("step {step} was reported with {samples} samples, expected {expected}");
    if samples == expected { Ok(()) } else { Err(("C3", what())) }
}

/// The job is over.
pub(in crate::sim) fn all_reported(reported: Step, steps: Step) -> Result<(), Broken> {
    if reported == steps { Ok(()) } else { Err(("C3", format!("{reported} of {steps} steps were reported"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_are_left_out_or_come_again_are_seen() {
        assert!(in_order(4, 3).is_ok() && in_order(5, 3).is_err() && in_order(3, 3).is_err());
        assert!(all_reported(6, 6).is_ok() && all_reported(5, 6).is_err());
        let spec = crate::sim::spec(0);
        assert!(all_samples(1, 1, &spec).is_ok() && all_samples(1, 2, &spec).is_err());
        assert!(all_samples(4, 2, &spec).is_ok(), "its batch grows");
    }
}
