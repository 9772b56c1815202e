//! Tells a thread that hangs from one that is busy.
//!
//! A hung thread (a device that never answers, a lock that nobody frees) cannot be stopped from outside: the process has to
//! end, and the job goes on without it.
//! - HA-1: a thread hangs if it was at one job for [`LONGER`] times as long as any job before took, and for [`LEAST`] at least.
//! - HA-2: time is counted in looks: a process that was stopped itself has not looked, so its threads did not hang.

/// See HA-1.
const LONGER: u32 = 20;
/// Looks: a minute, at twenty a second.
const LEAST: u32 = 1200;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Hang {
    /// Of each thread: the job that it was at, and looks since.
    threads: Vec<(u64, u32)>,
    /// Looks that a job took at most.
    longest: u32,
}

impl Hang {
    /// A look at what threads are at: a number of the job, 0 for none. Gives a thread that hangs.
    pub(crate) fn look(&mut self, jobs: impl Iterator<Item = u64>) -> Option<usize> {
        let mut hung = None;
        for (n, job) in jobs.enumerate() {
            if self.threads.len() == n {
                self.threads.push((0, 0));
            }
            let (at, looks) = &mut self.threads[n];
            if *at != job {
                if *at != 0 {
                    self.longest = self.longest.max(*looks);
                }
                (*at, *looks) = (job, 0);
            } else if job != 0 {
                *looks += 1;
                if *looks > LEAST.max(self.longest.saturating_mul(LONGER)) {
                    hung = hung.or(Some(n));
                }
            }
        }
        hung
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks until a thread at one job is said to hang.
    fn until(hang: &mut Hang, job: u64) -> u32 {
        (1..).find(|_| hang.look([0, job].into_iter()) == Some(1)).expect("it hangs")
    }

    /// HA-1.
    #[test]
    fn only_what_takes_longer_than_ever_hangs() {
        let mut hang = Hang::default();
        assert_eq!(until(&mut hang, 7), LEAST + 2);
        let mut hang = Hang::default();
        (0..100_000).for_each(|_| assert_eq!(hang.look([0].into_iter()), None, "an idle thread"));
        (0..200).for_each(|_| assert_eq!(hang.look([0, 5].into_iter()), None));
        assert_eq!(until(&mut hang, 6), 199 * LONGER + 2, "jobs of ten seconds are usual here");
    }

    /// HA-2: many jobs, however long all of them take, are no hang.
    #[test]
    fn a_thread_that_gets_on_does_not_hang() {
        let mut hang = Hang::default();
        for n in 1..100_000u64 {
            assert_eq!(hang.look([n / 1000 + 1].into_iter()), None);
        }
    }
}
