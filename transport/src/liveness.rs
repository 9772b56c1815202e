//! Whether whoever is at the other end of a connection still answers. It is asked while something goes on, and now and then. QUIC's
//! own signs of life come always as fast, and a job has many sessions on which nothing goes on.
//!
//! - LI-1: a connection ends when [`QUESTIONS`] in a row have no answer, half a second after the last sign of life of a peer with whom
//!   something went on. Whoever did not run meanwhile asks before it judges.
//! - LI-2: where nothing goes on, there is one question in [`REST`]; a silent peer is known after twice that.

use bytes::Bytes;
use quinn::{Connection, VarInt};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// Between two looks, or two questions.
const BEAT: Duration = Duration::from_millis(100);
const QUESTIONS: u32 = 4;
const REST: Duration = Duration::from_secs(10);

/// What one end of a connection has counted so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    /// Frames of streams, both ways: what goes on. Acknowledgements and questions are none.
    frames: u64,
    /// Packets that came.
    heard: u64,
}

/// What it knows of the other.
#[derive(Debug, Default)]
struct Liveness {
    counts: Counts,
    /// Whether something went on at the last look.
    goes_on: bool,
    /// When something had come, at a look.
    heard_at: Duration,
    /// Questions without an answer, in a row, and when the last one was asked.
    unanswered: u32,
    asked_at: Duration,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Look again then: something goes on. Ask now, if so.
    Look { ask: bool, at: Duration },
    /// Look again then, or when something is sent.
    Rest { until: Duration },
    /// Give it up.
    Silent,
}

impl Liveness {
    /// A look. `beat`: between two looks, or two questions.
    fn on(&mut self, now: Duration, beat: Duration, counts: Counts) -> Next {
        let (is_busy, is_answered) = (counts.frames != self.counts.frames, counts.heard != self.counts.heard);
        self.counts = counts;
        // What was sent before the last thing came may have arrived or not: at the end of all that goes on there is a question.
        let goes_on = std::mem::replace(&mut self.goes_on, is_busy);
        if is_answered {
            (self.heard_at, self.unanswered) = (now, 0);
        }
        let is_due = !is_answered && (is_busy || goes_on || now >= self.heard_at + REST);
        if self.unanswered == 0 && !is_due {
            return if is_busy {
                Next::Look { ask: false, at: now + beat }
            } else {
                Next::Rest { until: self.heard_at + REST }
            };
        }
        if self.unanswered == QUESTIONS && now < self.asked_at + 2 * beat {
            return Next::Silent;
        }
        self.unanswered = (self.unanswered + 1).min(QUESTIONS);
        self.asked_at = now;
        Next::Look { ask: true, at: now + beat }
    }
}

/// Closes a connection whose other end has become silent; ends when it is closed, and gives whether that was why. `written`:
/// something is sent on it.
pub(crate) async fn watch(connection: Connection, written: Arc<Notify>) -> bool {
    let (began, mut liveness) = (Instant::now(), Liveness::default());
    loop {
        let stats = connection.stats();
        let counts = Counts { frames: stats.frame_tx.stream + stats.frame_rx.stream, heard: stats.udp_rx.datagrams };
        // A wire may be so slow that no answer comes within a beat.
        let (at, rests) = match liveness.on(began.elapsed(), BEAT.max(2 * stats.path.rtt), counts) {
            Next::Look { ask, at } => {
                if ask {
                    // QUIC acknowledges any datagram; nobody reads it. A closed connection takes none, which is seen below.
                    let _ = connection.send_datagram(Bytes::from_static(&[0]));
                }
                (at, false)
            }
            Next::Rest { until } => (until, true),
            Next::Silent => {
                connection.close(VarInt::from_u32(0), b"the other end has become silent");
                return true;
            }
        };
        tokio::select! {
            biased;
            _ = connection.closed() => return false,
            () = sleep_until(began + at) => {}
            // What was written is on its way at the next look.
            () = written.notified(), if rests => tokio::time::sleep(BEAT).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Looks as it says until `end`, and when something is written. Each frame, by when it goes and whether it is ours, is acknowledged
    /// at once, and so is a question, until the peer dies. Gives when it asked, and when it gave the peer up.
    fn run(frames: &[(u64, bool)], dies: u64, end: u64) -> (Vec<u64>, Option<u64>) {
        let (mut liveness, mut asked, mut counts, mut now) = (Liveness::default(), vec![], Counts::default(), 0);
        let written =
            |now: u64| frames.iter().find(|(at, ours)| *ours && *at >= now).map_or(u64::MAX, |(at, _)| at + 100);
        let mut coming = frames.iter().filter(|(at, ours)| *ours || *at < dies).peekable();
        while now < end {
            while let Some((at, _)) = coming.next_if(|(at, _)| *at < now) {
                counts.frames += 1;
                counts.heard += u64::from(*at < dies);
            }
            match liveness.on(ms(now), BEAT, counts) {
                Next::Look { ask, at } => {
                    if ask {
                        asked.push(now);
                        counts.heard += u64::from(now < dies);
                    }
                    now = at.as_millis() as u64;
                }
                Next::Rest { until } => now = written(now).min(until.as_millis() as u64),
                Next::Silent => return (asked, Some(now)),
            }
        }
        (asked, None)
    }

    /// LI-2.
    #[test]
    fn where_nothing_goes_on_there_are_few_questions() {
        let (asked, silent) = run(&[], u64::MAX, 600_000);
        assert!(silent.is_none() && (55..=60).contains(&asked.len()), "{asked:?}");
        let traffic: Vec<(u64, bool)> = (0..600).map(|n| (n * 100 + 50, n % 2 == 0)).collect();
        assert_eq!(run(&traffic, u64::MAX, 60_000), (vec![], None));
    }

    /// LI-1: of a peer that dies while something goes on, at its end, and while nothing does.
    #[test]
    fn a_silent_peer_is_given_up() {
        for dies in [1000, 1030, 1090] {
            let traffic: Vec<(u64, bool)> = (0..600).map(|n| (n * 10, true)).collect();
            let (_, silent) = run(&traffic, dies, 60_000);
            let took = silent.unwrap() - dies;
            assert!((400..=650).contains(&took), "{took}");
        }
        for ours in [true, false] {
            let (_, silent) = run(&[(20, true), (50, ours), (70, ours)], 60, 60_000);
            assert!((400..=700).contains(&silent.unwrap()), "{silent:?}");
        }
        let (asked, silent) = run(&[], 25_000, 60_000);
        assert_eq!(silent.unwrap(), asked[asked.len() - QUESTIONS as usize] + 400);
    }

    /// LI-1: a pause of the whole process is nobody's silence.
    #[test]
    fn whoever_did_not_run_asks_before_it_judges() {
        let mut liveness = Liveness::default();
        let mut look = |now, heard| liveness.on(ms(now), BEAT, Counts { frames: 1, heard });
        for n in 0..4 {
            assert_eq!(look(100 * n, 0), Next::Look { ask: true, at: ms(100 * n + 100) });
        }
        assert_eq!(look(30_000, 0), Next::Look { ask: true, at: ms(30_100) });
        assert_eq!(look(30_100, 1), Next::Rest { until: ms(40_100) });
    }
}
