//! Watches over processes of this machine: the kernel tells when one ends, sooner than its silence does.

use super::machine;
use super::supervisor::Msg;
use crate::table::NodeInfo;
use ractor::ActorRef;
use rustix::event::{PollFd, PollFlags, poll};

/// Watches a node's process if it is on this machine: the kernel tells at once when it ends.
pub(super) fn watch(myself: &ActorRef<Msg>, info: &NodeInfo) {
    let ours = machine();
    if ours.is_empty() || info.machine != ours {
        return;
    }
    let Some(pid) = i32::try_from(info.pid).ok().and_then(rustix::process::Pid::from_raw) else { return };
    let peer = info.peer;
    match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK) {
        Err(rustix::io::Errno::SRCH) => {
            let _ = myself.cast(Msg::ProcessEnded(peer));
        }
        // Without this watch there are still its beats.
        Err(error) => tracing::warn!(%error, pid = info.pid, "a node's process cannot be watched"),
        Ok(fd) => {
            let myself = myself.clone();
            // A thread for each node of this machine, asleep until the node's process ends.
            let wait = move || {
                let mut fds = [PollFd::new(&fd, PollFlags::IN)];
                while poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
                let _ = myself.cast(Msg::ProcessEnded(peer));
            };
            if let Err(error) = std::thread::Builder::new().name("watch".to_owned()).spawn(wait) {
                tracing::warn!(%error, pid = info.pid, "a node's process cannot be watched");
            }
        }
    }
}
