//! Whether whoever is at the other end of a connection still answers. It is asked while something goes on, and now and then. QUIC's
//! own signs of life come always as fast, and a job has many sessions on which nothing goes on.
//!
//! - LI-1: a connection ends when [`QUESTIONS`] in a row have no answer, half a second after the last sign of life of a peer that
//!   something was sent to. Whoever did not run meanwhile asks before it judges.
//! - LI-2: where nothing goes on, there is one question in [`REST`].

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

/// What one end of a connection knows of the other.
#[derive(Debug, Default)]
struct Liveness {
    /// Packets that were sent and that came, at the last look.
    sent: u64,
    heard: u64,
    /// When something had come, at a look.
    heard_at: Duration,
    /// Questions without an answer, in a row.
    unanswered: u32,
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
    /// A look at how many packets were sent and came so far.
    fn on(&mut self, now: Duration, sent: u64, heard: u64) -> Next {
        let (is_busy, is_answered) = (sent != self.sent, heard != self.heard);
        (self.sent, self.heard) = (sent, heard);
        if is_answered {
            (self.heard_at, self.unanswered) = (now, 0);
        }
        let is_waiting = self.unanswered > 0;
        let is_due = !is_answered && (is_busy || now >= self.heard_at + REST);
        if self.unanswered == QUESTIONS {
            return Next::Silent;
        }
        if is_waiting || is_due {
            self.unanswered += 1;
            // The question is a packet, and no sign that something goes on.
            self.sent += 1;
            return Next::Look { ask: true, at: now + BEAT };
        }
        if is_busy { Next::Look { ask: false, at: now + BEAT } } else { Next::Rest { until: self.heard_at + REST } }
    }
}

/// Closes a connection whose other end has become silent; ends when it is closed. `written`: something is sent on it.
pub(crate) async fn watch(connection: Connection, written: Arc<Notify>) {
    let (began, mut liveness) = (Instant::now(), Liveness::default());
    loop {
        let stats = connection.stats();
        let (at, rests) = match liveness.on(began.elapsed(), stats.udp_tx.datagrams, stats.udp_rx.datagrams) {
            Next::Look { ask, at } => {
                if ask {
                    // QUIC acknowledges any datagram; nobody reads it. A closed connection takes none, which is seen below.
                    let _ = connection.send_datagram(Bytes::from_static(&[0]));
                }
                (at, false)
            }
            Next::Rest { until } => (until, true),
            Next::Silent => return connection.close(VarInt::from_u32(0), b"the other end has become silent"),
        };
        tokio::select! {
            _ = connection.closed() => return,
            () = sleep_until(began + at) => {}
            // What was written is on its way at the next look.
            () = written.notified(), if rests => tokio::time::sleep(BEAT).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks as it says until `end`; a peer that answers does so at once. What is sent when, in milliseconds, by whom: `true` for us.
    fn run(packets: &[(u64, bool)], answers_until: u64, end: u64) -> (Vec<u64>, Option<u64>) {
        let (mut liveness, mut asked, mut sent, mut heard, mut now) = (Liveness::default(), vec![], 0, 0, 0);
        let written =
            |now: u64| packets.iter().find(|(at, ours)| *ours && *at >= now).map_or(u64::MAX, |(at, _)| at + 100);
        let mut packets = packets.iter().peekable();
        let mut count = |until: u64, sent: &mut u64, heard: &mut u64| {
            while let Some((at, ours)) = packets.next_if(|(at, _)| *at < until) {
                *sent += u64::from(*ours || *at < answers_until);
                *heard += u64::from(!ours || *at < answers_until);
            }
        };
        while now < end {
            count(now, &mut sent, &mut heard);
            match liveness.on(Duration::from_millis(now), sent, heard) {
                Next::Look { ask, at } => {
                    if ask {
                        asked.push(now);
                        sent += 1;
                        heard += u64::from(now < answers_until);
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

    /// LI-1: of a peer that dies while something goes on, and while nothing does.
    #[test]
    fn a_silent_peer_is_given_up() {
        for died in [1000, 1030, 1090] {
            let traffic: Vec<(u64, bool)> = (0..600).map(|n| (n * 10, true)).collect();
            let (_, silent) = run(&traffic, died, 60_000);
            let took = silent.unwrap() - died;
            assert!((400..=650).contains(&took), "{took}");
        }
        let (asked, silent) = run(&[], 25_000, 60_000);
        assert_eq!(silent.unwrap(), asked[asked.len() - QUESTIONS as usize] + 400);
    }

    /// LI-1: a pause of the whole process is nobody's silence.
    #[test]
    fn whoever_did_not_run_asks_before_it_judges() {
        let mut liveness = Liveness::default();
        let asks = |next| matches!(next, Next::Look { ask: true, .. });
        assert!(asks(liveness.on(Duration::from_millis(0), 5, 0)));
        assert!(asks(liveness.on(Duration::from_secs(30), 6, 0)));
        assert_eq!(
            liveness.on(Duration::from_millis(30_100), 7, 1),
            Next::Rest { until: Duration::from_millis(40_100) }
        );
    }
}
