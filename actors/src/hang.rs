//! Tells a thread that hangs from one that is busy.
//!
//! A hung thread (a device that never answers, a lock that nobody frees) cannot be stopped from outside: the process has to
//! end, and the job goes on without it.
//! - HA-1: a thread hangs if it is at one job for [`LONGER`] times as long as that many multiply-adds took so far on the
//!   average, and for [`LEAST`] at least; for [`FIRST`] as long as nothing is known of the speed, or if the job is not one of
//!   multiply-adds.
//! - HA-2: time is counted in looks: a process that was stopped itself has not looked, so its threads did not hang.

/// See HA-1.
const LONGER: f64 = 20.0;
/// Looks: a minute, at twenty a second.
const LEAST: u32 = 1200;
/// Looks: ten minutes.
const FIRST: u32 = 10 * LEAST;

/// What a thread is at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct At {
    /// The number of the job, 0 for none.
    pub(crate) job: u64,
    /// Its multiply-adds, as planned; 0 if it does other things.
    pub(crate) cost: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Hang {
    /// Of each thread: the job that it was at, and looks since.
    threads: Vec<(At, u32)>,
    /// Looks that jobs took so far, and their multiply-adds.
    looks: u64,
    cost: u64,
}

impl Hang {
    /// A look at what threads are at. Gives a thread that hangs.
    pub(crate) fn look(&mut self, threads: impl Iterator<Item = At>) -> Option<usize> {
        let mut hung = None;
        for (n, now) in threads.enumerate() {
            if self.threads.len() == n {
                self.threads.push((At::default(), 0));
            }
            let (before, looks) = self.threads[n];
            if before != now {
                if before.job != 0 && before.cost > 0 {
                    self.looks += u64::from(looks);
                    self.cost += before.cost;
                }
                self.threads[n] = (now, 0);
            } else if now.job != 0 {
                self.threads[n].1 += 1;
                if looks >= self.allowed(now.cost) {
                    hung = hung.or(Some(n));
                }
            }
        }
        hung
    }

    fn allowed(&self, cost: u64) -> u32 {
        if self.cost == 0 || cost == 0 {
            return FIRST;
        }
        let usual = cost as f64 * self.looks as f64 / self.cost as f64;
        LEAST.max((LONGER * usual).min(f64::from(u32::MAX)) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(job: u64, cost: u64) -> [At; 2] {
        [At::default(), At { job, cost }]
    }

    /// Looks until a thread at one job is said to hang.
    fn until(hang: &mut Hang, job: u64, cost: u64) -> u32 {
        (1..).find(|_| hang.look(at(job, cost).into_iter()) == Some(1)).expect("it hangs")
    }

    /// HA-1.
    #[test]
    fn only_what_takes_far_longer_than_usual_hangs() {
        let mut hang = Hang::default();
        assert_eq!(until(&mut hang, 7, 100), FIRST + 2, "the first job may take long");
        let mut hang = Hang::default();
        (0..100_000).for_each(|_| assert_eq!(hang.look(at(0, 0).into_iter()), None, "an idle thread"));
        (0..201).for_each(|_| assert_eq!(hang.look(at(5, 1000).into_iter()), None));
        assert_eq!(until(&mut hang, 6, 1000), 200 * 20 + 2, "ten seconds are usual for so much");
        let mut hang = Hang::default();
        (0..201).for_each(|_| assert_eq!(hang.look(at(5, 1000).into_iter()), None));
        assert_eq!(until(&mut hang, 6, 1), LEAST + 2);
        let mut hang = Hang::default();
        (0..201).for_each(|_| assert_eq!(hang.look(at(5, 1000).into_iter()), None));
        assert_eq!(until(&mut hang, 6, 90_000), 90 * 200 * 20 + 2, "a much larger job takes longer");
        let mut hang = Hang::default();
        (0..201).for_each(|_| assert_eq!(hang.look(at(5, 1000).into_iter()), None));
        (0..5000).for_each(|_| assert_eq!(hang.look(at(6, 0).into_iter()), None, "it says nothing of the speed"));
        assert_eq!(until(&mut hang, 7, 1000), 200 * 20 + 2);
        assert_eq!(until(&mut hang, 8, 0), FIRST + 2);
    }

    /// HA-2: many jobs, however long all of them take, are no hang.
    #[test]
    fn a_thread_that_gets_on_does_not_hang() {
        let mut hang = Hang::default();
        for n in 1..100_000u64 {
            assert_eq!(hang.look([At { job: n / 1000 + 1, cost: 10 }].into_iter()), None);
        }
    }
}
