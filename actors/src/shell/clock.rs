//! The wall clock, for people: nothing is decided by it. Chaos may step it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds by which it is wrong, and until when.
static STEP: Mutex<Option<(i64, Instant)>> = Mutex::new(None);

/// Milliseconds since 1970.
pub fn milliseconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    let mut step = STEP.lock().unwrap_or_else(PoisonError::into_inner);
    step.take_if(|(_, until)| *until <= Instant::now());
    step.map_or(now, |(by, _)| now.saturating_add_signed(by))
}

/// It goes wrong by so much, for so long.
pub(super) fn step(by: i64, lasts: Duration) {
    *STEP.lock().unwrap_or_else(PoisonError::into_inner) = Some((by, Instant::now() + lasts));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_over_after_its_time() {
        let before = milliseconds();
        step(-3_600_000, Duration::from_millis(50));
        assert!(milliseconds() < before - 3_000_000);
        std::thread::sleep(Duration::from_millis(60));
        assert!(milliseconds() >= before);
    }
}
