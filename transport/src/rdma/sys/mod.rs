//! libibverbs and librdmacm, as safe Rust: everything unsafe of RDMA is in this folder.
//!
//! What makes it safe: memory that a device may read or write belongs to its queue pair until the completion of the request, or the end
//! of the queue pair, and nobody else can name it meanwhile; memory that a peer may write can be read here only after its key is revoked;
//! what was made first ends last: a key before its domain, a domain before its connection, that before its channel of events.

mod cm;
mod memory;
mod queue;

pub(super) use cm::{CmEvent, CmEventKind, CmId, addresses};
pub(super) use memory::{Granted, Memory};
pub(super) use queue::{Done, QueuePair};

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A file that something comes to, to be waited for.
pub(super) struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// A descriptor of its own for the same file, which its owner has open.
    fn new(fd: RawFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open: its owner calls.
        let own = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        // SAFETY: it owns the descriptor, and names no other.
        let registered = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) };
        Ok(Self(registered.map_err(io::Error::from)?))
    }

    /// Waits until there may be something.
    pub(super) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}

/// The result of a call that says -1 and sets `errno`.
fn checked(result: i32, what: &str) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(last(what)) }
}

/// The result of a call that gives an error's number.
fn numbered(result: i32, what: &str) -> io::Result<()> {
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::from_raw_os_error(result.abs());
    Err(io::Error::new(error.kind(), format!("{what}: {error}")))
}

/// The result of a call that gives a pointer, or none and sets `errno`.
fn pointer<T>(result: *mut T, what: &str) -> io::Result<*mut T> {
    if result.is_null() { Err(last(what)) } else { Ok(result) }
}

fn last(what: &str) -> io::Error {
    let error = io::Error::last_os_error();
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor is open: its owner calls.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}
