//! A socket that loses or delays datagrams when it is told to (chaos): whatever is above it meets a bad wire. Undisturbed it
//! costs a look at a flag.

use crate::socket::segment;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// What is wrong with the wire, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Disturbance {
    /// With whom; none: with all.
    pub with: Option<SocketAddr>,
    /// Of a hundred datagrams that are sent so many are lost.
    pub lost_percent: u8,
    /// What comes is lost in the same way.
    pub both_ways: bool,
    /// What is sent takes so much longer.
    pub delay: Duration,
    /// Then all is well again.
    pub lasts: Duration,
}

/// The disturbances of a socket. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Disturbances(Arc<State>);

#[derive(Default)]
struct State {
    any: AtomicBool,
    all: Mutex<Vec<(Disturbance, Instant)>>,
    /// Counts what was decided by chance.
    decided: AtomicU64,
}

impl fmt::Debug for Disturbances {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Disturbances({})", self.0.any.load(Ordering::Relaxed))
    }
}

impl Disturbances {
    /// Begins another one.
    pub(crate) fn add(&self, disturbance: Disturbance) {
        let mut all = self.0.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.push((disturbance, Instant::now() + disturbance.lasts));
        self.0.any.store(true, Ordering::Release);
    }

    /// The share that is lost, in per cent, and the delay of what is sent to, or comes from, an address.
    fn of(&self, address: SocketAddr, sent: bool) -> (u8, Duration) {
        if !self.0.any.load(Ordering::Acquire) {
            return (0, Duration::ZERO);
        }
        let mut all = self.0.all.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        all.retain(|(_, until)| *until > now);
        self.0.any.store(!all.is_empty(), Ordering::Release);
        let meant = |d: &&Disturbance| (sent || d.both_ways) && d.with.is_none_or(|with| with == address);
        let mut found = (0, Duration::ZERO);
        for disturbance in all.iter().map(|(d, _)| d).filter(meant) {
            found.0 = found.0.max(disturbance.lost_percent);
            found.1 = found.1.max(if sent { disturbance.delay } else { Duration::ZERO });
        }
        found
    }

    fn is_lost(&self, percent: u8) -> bool {
        // The finaliser of SplitMix64 over a counter (Steele, Lea and Flood, 2014).
        let mut x = self.0.decided.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % 100 < u64::from(percent)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct DisturbedSocket {
    pub(crate) inner: Arc<dyn AsyncUdpSocket>,
    pub(crate) disturbances: Disturbances,
}

impl DisturbedSocket {
    /// One datagram. What the system does not take at once is lost too.
    fn send_late(&self, transmit: &Transmit<'_>, delay: Duration) {
        let (inner, contents) = (Arc::clone(&self.inner), transmit.contents.to_vec());
        let Transmit { destination, ecn, src_ip, .. } = *transmit;
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = inner.try_send(&Transmit { destination, ecn, contents: &contents, segment_size: None, src_ip });
        });
    }
}

impl AsyncUdpSocket for DisturbedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let (lost, delay) = self.disturbances.of(transmit.destination, true);
        if (lost, delay) == (0, Duration::ZERO) {
            return self.inner.try_send(transmit);
        }
        // One by one: each is lost or delayed by itself.
        for contents in transmit.contents.chunks(segment(transmit)) {
            if !self.disturbances.is_lost(lost) {
                self.send_late(&Transmit { contents, ..*transmit }, delay);
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = self.inner.poll_recv(cx, bufs, meta);
        if let Poll::Ready(Ok(count)) = received {
            for one in &mut meta[..count] {
                let (lost, _) = self.disturbances.of(one.addr, false);
                if lost > 0 && self.disturbances.is_lost(lost) {
                    // An empty one is passed over.
                    one.len = 0;
                }
            }
        }
        received
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
