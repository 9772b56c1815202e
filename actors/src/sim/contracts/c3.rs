//! C3, exactly once: steps are reported once each and in order, and at the end all of them are. That every sample is in them
//! once is checked before each commit by the commit core, whose refusal ends the job, which is a violation here.

use super::Broken;
use crate::ids::Step;

/// A step is reported after so many others.
pub(in crate::sim) fn in_order(step: Step, before: Step) -> Result<(), Broken> {
    if step == before + 1 { Ok(()) } else { Err(("C3", format!("step {step} was reported after step {before}"))) }
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
    }
}
