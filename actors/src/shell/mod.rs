//! The thin shells: ractor actors and threads that carry out what the cores decide.

mod checkpoints;
mod clock;
mod control_log;
mod join;
mod node;
mod operators;
mod plane;
mod pool;
mod pulse;
mod replicated;
mod restore;
mod run_folder;
mod scribe;
mod supervise;
mod supervisor;
mod tail;
mod watch;
mod worker;

pub use clock::milliseconds;
pub use join::{NodeEnd, NodeOptions, find as find_supervisor, run_node};
pub use plane::{ControlPlane, Took};
pub use replicated::Seat;
pub use run_folder::{MetricsLine, RunFolder, RunIdentity, verify_tokens};
pub use supervise::{SupervisorOptions, run_supervisor};
pub use supervisor::SupervisorEnd;

use crate::control::Control;
use crate::wire::Unit;
use everstep_transport::{Hub, HubEvent, Peer};
use ractor::ActorRef;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// An error of any kind, with its words.
pub type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Events of the hub that may wait in an actor's mailbox, which has no bound of its own: the hub's
/// grants to peers depend on it.
const HUB_EVENTS: usize = 256;

/// Gives an actor the hub's events until it says how it ended: `None` if it failed without a word.
async fn pump<M: ractor::Message, E>(
    events: &mut mpsc::Receiver<HubEvent>,
    actor: &ActorRef<M>,
    message: fn(HubEvent, OwnedSemaphorePermit) -> M,
    ended: &mut mpsc::Receiver<E>,
) -> Result<Option<E>, AnyError> {
    let places = Arc::new(Semaphore::new(HUB_EVENTS));
    loop {
        tokio::select! {
            event = events.recv() => {
                let event = event.ok_or("the endpoint closed")?;
                let place = Arc::clone(&places).acquire_owned().await?;
                // An actor that has ended takes no more; the other branch says so.
                let _ = actor.cast(message(event, place));
            }
            end = ended.recv() => return Ok(end),
        }
    }
}

/// Says something to a process.
fn tell(hub: &Hub, peer: Peer, control: Control) {
    send(hub, peer, Unit::Control(control));
}

fn send(hub: &Hub, peer: Peer, unit: Unit) {
    let lane = unit.lane();
    hub.send(peer, lane, unit.encode());
}

/// BLAKE3 of some bytes, in hexadecimal: how a run names its text.
pub fn hash_hex(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// A random name for this life of the process.
pub fn new_name() -> Peer {
    use std::hash::{BuildHasher, Hasher};
    // Seeded by the system for every process; names are never part of a result.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// This machine's boot and the namespace of its process numbers: processes with the same can watch each
/// other. Empty if that cannot be known.
pub fn machine() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let namespace = std::fs::read_link("/proc/self/ns/pid");
    match (boot, namespace) {
        (Ok(boot), Ok(namespace)) => format!("{} {}", boot.trim(), namespace.display()),
        _ => String::new(),
    }
}
