//! Which copies a shard has: a pure function of where they are now.
//!
//! A copy whose node is to leave, or that shares a domain with another while a domain without one has room, stays until
//! others have the state: then it is retired, and its number is not used again. A copy whose node died keeps its number for
//! its next life.
//! - CP-1: a copy on a node that lives is retired only if as many copies as are wanted are in sync elsewhere (contract C2).
//! - CP-2: a shard has as many copies as the configuration says, or as there are nodes; more only while some leave.
//! - CP-3: a number that was retired is never given again.

/// Where a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    /// On a node that works.
    Working {
        /// It has the newest committed state.
        in_sync: bool,
    },
    /// On a node that lives, and not to stay there: the node is to be empty, or the copy is to be in another domain.
    Leaving,
    /// Nowhere: its node died.
    Gone,
}

/// What becomes of a shard's copies. Those that are not named stay where they are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Copies {
    /// That end for good.
    pub(super) retired: Vec<u32>,
    /// That are to be placed: without a home, or new.
    pub(super) placed: Vec<u32>,
}

/// Of one shard. `working` nodes may have copies; `given` numbers have been given so far; what is to leave
/// stays if it may not be retired yet.
pub(super) fn of_shard(present: &[(u32, Home)], working: usize, mirrors: u32, given: u32, may_retire: bool) -> Copies {
    let full = mirrors as usize + 1;
    let wanted = full.min(working);
    let count = |which: fn(&Home) -> bool| present.iter().filter(|(_, home)| which(home)).count();
    let settled = count(|home| matches!(home, Home::Working { .. }));
    let in_sync = count(|home| matches!(home, Home::Working { in_sync: true }));
    let mut copies = Copies::default();
    if may_retire && in_sync >= wanted {
        copies.retired.extend(present.iter().filter(|(_, home)| *home == Home::Leaving).map(|(n, _)| *n));
    }
    let gone: Vec<u32> = present.iter().filter(|(_, home)| *home == Home::Gone).map(|(n, _)| *n).collect();
    let vacant = gone.len().min(full.saturating_sub(settled));
    copies.retired.extend(&gone[vacant..]);
    let missing = wanted.saturating_sub(settled);
    let numbers = gone[..vacant].iter().copied().chain(given..);
    copies.placed.extend(numbers.take(missing));
    copies
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAFE: Home = Home::Working { in_sync: true };
    const NEW: Home = Home::Working { in_sync: false };

    fn copies(retired: &[u32], placed: &[u32]) -> Copies {
        Copies { retired: retired.to_vec(), placed: placed.to_vec() }
    }

    #[test]
    fn a_job_begins_and_a_dead_copy_gets_its_next_life() {
        assert_eq!(of_shard(&[], 3, 1, 0, true), copies(&[], &[0, 1]));
        assert_eq!(of_shard(&[], 1, 1, 0, true), copies(&[], &[0]));
        assert_eq!(of_shard(&[(0, SAFE)], 2, 1, 1, true), copies(&[], &[1]));
        assert_eq!(of_shard(&[(0, Home::Gone), (1, SAFE)], 2, 1, 2, true), copies(&[], &[0]));
        // Without a node for it, it waits for one.
        assert_eq!(of_shard(&[(0, Home::Gone), (1, SAFE)], 1, 1, 2, true), copies(&[], &[]));
    }

    /// CP-1, CP-3.
    #[test]
    fn a_copy_leaves_when_others_have_the_state() {
        assert_eq!(of_shard(&[(0, Home::Leaving), (1, SAFE)], 2, 1, 2, true), copies(&[], &[2]));
        assert_eq!(of_shard(&[(0, Home::Leaving), (1, SAFE), (2, NEW)], 2, 1, 3, true), copies(&[], &[]));
        assert_eq!(of_shard(&[(0, Home::Leaving), (1, SAFE), (2, SAFE)], 2, 1, 3, true), copies(&[0], &[]));
        // Its node dies on the way: there is one more than is wanted.
        assert_eq!(of_shard(&[(0, Home::Gone), (1, SAFE), (2, NEW)], 2, 1, 3, true), copies(&[0], &[]));
        // No mirrors: the only copy waits for its successor.
        assert_eq!(of_shard(&[(0, Home::Leaving)], 1, 0, 1, true), copies(&[], &[1]));
        assert_eq!(of_shard(&[(0, Home::Leaving), (1, NEW)], 1, 0, 2, true), copies(&[], &[]));
        assert_eq!(of_shard(&[(0, Home::Leaving), (1, SAFE)], 1, 0, 2, true), copies(&[0], &[]));
        // Fewer nodes than copies.
        assert_eq!(of_shard(&[(0, Home::Leaving), (1, SAFE)], 1, 1, 2, true), copies(&[0], &[]));
        // A step would wait for it.
        assert_eq!(of_shard(&[(0, Home::Leaving), (1, SAFE)], 1, 1, 2, false), copies(&[], &[]));
    }

    /// CP-1, CP-2: over every state of four copies.
    #[test]
    fn there_are_never_fewer_than_wanted_nor_more_than_needed() {
        let homes = [SAFE, NEW, Home::Leaving, Home::Gone];
        for mirrors in 0..3u32 {
            for working in 0..5usize {
                for state in 0..256usize {
                    let at = |n: usize| homes[(state >> (2 * n)) & 3];
                    let present: Vec<(u32, Home)> = (0..4).map(|n| (n as u32, at(n))).collect();
                    let settled = |home: &Home| matches!(home, Home::Working { .. });
                    let before = present.iter().filter(|(_, h)| settled(h)).count();
                    if before > working {
                        continue;
                    }
                    let got = of_shard(&present, working, mirrors, 4, true);
                    let wanted = (mirrors as usize + 1).min(working);
                    let after = before + got.placed.len();
                    assert_eq!(after, wanted.max(before), "{present:?}, {working} working: {got:?}");
                    let safe = present.iter().filter(|(_, h)| *h == SAFE).count();
                    for n in &got.retired {
                        let home = present[*n as usize].1;
                        assert!(!settled(&home) && (home == Home::Gone || safe >= wanted), "{present:?}: {got:?}");
                        assert!(!got.placed.contains(n));
                    }
                    assert!(got.placed.iter().all(|n| *n >= 4 || present[*n as usize].1 == Home::Gone));
                }
            }
        }
    }
}
