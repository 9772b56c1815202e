//! C5, bounded: no queue is longer than its bound, which is that of a step or two of these small jobs, whatever fails. Checked
//! whenever something is put into one, or taken out of it. `Coverage` tells how long each became.

use super::Broken;

/// Units that a session keeps until they are acknowledged: small ones are once there are so many.
pub(in crate::sim) const SESSION: usize = 1024 + 400;
/// Events in an actor's mailbox.
pub(in crate::sim) const MAILBOX: usize = 200;
/// Messages of lives that a process has not heard of.
pub(in crate::sim) const EARLY: usize = 200;
/// Records and lines that the supervisor decided on and that are not on disk.
pub(in crate::sim) const LINES: usize = 64;
/// What the store is to be given.
pub(in crate::sim) const WRITES: usize = 32;
/// Messages that an actor keeps for its receivers' next lives.
pub(in crate::sim) const OUTBOX: usize = 64;

/// A queue and its length.
pub(in crate::sim) fn bounded(what: &str, length: usize, bound: usize) -> Result<(), Broken> {
    if length <= bound { Ok(()) } else { Err(("C5", format!("{what}: {length}, more than {bound}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_bound_is_seen() {
        let length = |n| bounded("a queue", n, 10);
        assert!(length(10).is_ok());
        assert_eq!(length(11), Err(("C5", "a queue: 11, more than 10".to_owned())));
    }
}
