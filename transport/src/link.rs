//! A link: what carries a session's frames until it breaks.
//!
//! To a session a link is three queues of frames; what is behind them (tasks that move frames over QUIC or
//! RDMA, another process's queues in memory) does not show. A fragment's number is
//! its grant by the session: the receiver has room for it. A link with registered memory grants places in that beside it.

use crate::message::Fragment;
use crate::session::{Frame, Lane};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// A session's end of a link. Dropping it closes the link; a closed `incoming` says that it is broken.
#[derive(Debug)]
pub struct Link {
    /// Grants and small messages.
    pub control: mpsc::Sender<Frame<Fragment>>,
    /// Fragments of tensors.
    pub bulk: mpsc::Sender<Frame<Fragment>>,
    /// Both, as they come.
    pub incoming: mpsc::Receiver<Frame<Fragment>>,
}

/// Frames that may wait in a link's queue: the windows, and grants beside them.
pub(crate) const QUEUE: usize = 8192;

impl Link {
    /// Two ends of a link in memory.
    pub fn memory() -> (Self, Self) {
        let ((to_b, from_a), (to_a, from_b)) = (mpsc::channel(QUEUE), mpsc::channel(QUEUE));
        let end = |to: mpsc::Sender<_>, incoming| Self { control: to.clone(), bulk: to, incoming };
        (end(to_b, from_b), end(to_a, from_a))
    }

    /// Puts a frame into its queue. A full queue means that the windows were not kept, and a closed one
    /// that the link is broken.
    pub(crate) fn transmit(&self, frame: Frame<Fragment>) -> Result<(), TransmitError> {
        match frame {
            Frame::Data { lane: Lane::Bulk, sequence, unit } => self.send_bulk(Grant { sequence }, unit),
            frame @ (Frame::Data { lane: Lane::Control, .. } | Frame::Grant { .. }) => {
                self.control.try_send(frame).map_err(TransmitError::from)
            }
        }
    }

    /// Puts regions of memory into the place that the peer granted for them. They are lent, not copied:
    /// the session keeps them until the peer has them.
    fn send_bulk(&self, grant: Grant, regions: Fragment) -> Result<(), TransmitError> {
        let frame = Frame::Data { lane: Lane::Bulk, sequence: grant.sequence, unit: regions };
        self.bulk.try_send(frame).map_err(TransmitError::from)
    }
}

/// The right to send one fragment: the receiver's session has room for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Grant {
    sequence: u64,
}

/// A frame could not be put into its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransmitError {
    /// The link is broken.
    Closed,
    /// More waits than the windows allow.
    Full,
}

impl<T> From<TrySendError<T>> for TransmitError {
    fn from(error: TrySendError<T>) -> Self {
        match error {
            TrySendError::Closed(_) => Self::Closed,
            TrySendError::Full(_) => Self::Full,
        }
    }
}
