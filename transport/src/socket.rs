//! The UDP socket under QUIC, with room in the system for what comes fast, and datagrams as large as a network takes: those of 9 KB
//! of a data centre's, or of 64 KB within a machine, cost a fraction of many small ones.

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, UdpPoller};
use rustix::net::sockopt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

/// Bytes that may wait in the system, each way. A process without the right to so many has the system's limit (`net.core.rmem_max`).
const BUFFER: usize = 16 << 20;
/// With less room large datagrams would be lost: few of them fill it.
const LARGE_NEED: usize = 2 << 20;
/// Bytes of a datagram: the most that IPv4 has, and what is anywhere.
const LARGE: u16 = 65_507;
const SMALL: u16 = 1472;

/// Opens one; gives how large a datagram it takes.
pub(crate) fn open(bind: SocketAddr, runtime: &dyn Runtime) -> io::Result<(Arc<dyn AsyncUdpSocket>, u16)> {
    let socket = UdpSocket::bind(bind)?;
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, BUFFER));
    let _ = sockopt::set_socket_send_buffer_size_force(&socket, BUFFER)
        .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, BUFFER));
    let takes = if sockopt::socket_recv_buffer_size(&socket)? >= LARGE_NEED { LARGE } else { SMALL };
    let inner = runtime.wrap_udp_socket(socket)?;
    Ok((Arc::new(Socket { inner, takes, segment: AtomicUsize::new(1) }), takes))
}

/// Bytes of each datagram of a batch; the last may be shorter.
pub(crate) fn segment(transmit: &Transmit<'_>) -> usize {
    transmit.segment_size.unwrap_or(transmit.contents.len()).max(1)
}

/// The system takes 64 KiB at a time, in whatever segments; quinn gives it so many segments, whatever their size.
#[derive(Debug)]
struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    takes: u16,
    /// Bytes of the largest segment of a batch that was sent.
    segment: AtomicUsize,
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = segment(transmit);
        // Of batches alone: a single one may be a probe, larger than the network takes.
        if transmit.segment_size.is_some() {
            self.segment.fetch_max(segment, Ordering::Relaxed);
        }
        let most = (usize::from(LARGE) / segment).max(1) * segment;
        // More than the system takes only when datagrams have just become larger. If there is no room for the rest, all of them are
        // sent again, and the peer drops those that it has.
        for contents in transmit.contents.chunks(most) {
            let segment_size = (contents.len() > segment).then_some(segment);
            self.inner.try_send(&Transmit { contents, segment_size, ..*transmit })?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let fit = usize::from(LARGE) / self.segment.load(Ordering::Relaxed);
        self.inner.max_transmit_segments().min(fit.max(1))
    }

    /// For how many there is room wherever a datagram is received. The system joins segments to no more than a large one.
    fn max_receive_segments(&self) -> usize {
        if self.takes == LARGE { 1 } else { self.inner.max_receive_segments() }
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn more_than_the_system_takes_at_a_time_goes_in_parts() {
        let to = UdpSocket::bind("127.0.0.1:0").unwrap();
        to.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let (socket, takes) = open("127.0.0.1:0".parse().unwrap(), &quinn::TokioRuntime).unwrap();
        assert!([SMALL, LARGE].contains(&takes));
        let segments = socket.max_transmit_segments();
        for (segment, count) in [(1200, 10), (9000, 10), (65_000, 2), (1200, 3)] {
            let contents: Vec<u8> = (0..segment * count - 7).map(|n| (n / segment) as u8).collect();
            let transmit = Transmit {
                destination: to.local_addr().unwrap(),
                ecn: None,
                contents: &contents,
                segment_size: Some(segment),
                src_ip: None,
            };
            let mut writable = Arc::clone(&socket).create_io_poller();
            std::future::poll_fn(|cx| writable.as_mut().poll_writable(cx)).await.unwrap();
            socket.try_send(&transmit).unwrap();
            let mut buffer = vec![0; 1 << 16];
            for n in 0..count {
                let length = to.recv(&mut buffer).unwrap();
                let expected = if n + 1 < count { segment } else { segment - 7 };
                assert!(length == expected && buffer[..length].iter().all(|byte| usize::from(*byte) == n));
            }
            assert!(socket.max_transmit_segments() <= segments.min((usize::from(LARGE) / segment).max(1)));
        }
        assert_eq!(socket.max_transmit_segments(), 1);
    }
}
