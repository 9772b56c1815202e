//! C5, bounded: no queue is longer than its bound. Checked whenever something is put into one.

use super::Broken;

/// What a session keeps: a window of each lane, and what waits behind it.
pub(in crate::sim) const SESSION: usize = 4096 + 1024;
/// What an actor's mailbox holds.
pub(in crate::sim) const MAILBOX: usize = 2000;

/// A queue and its length.
pub(in crate::sim) fn bounded(what: impl Fn() -> String, length: usize, bound: usize) -> Result<(), Broken> {
    if length <= bound { Ok(()) } else { Err(("C5", format!("{} holds {length}, more than {bound}", what()))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_bound_is_seen() {
        let length = |n| bounded(|| "a queue".to_owned(), n, 10);
        assert!(length(10).is_ok());
        assert_eq!(length(11), Err(("C5", "a queue holds 11, more than 10".to_owned())));
    }
}
