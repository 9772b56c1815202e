//! A node's heartbeats, from a thread of their own: a full mailbox or a busy runtime is not taken for
//! death. Each carries the work that the node's jobs have done, and the nodes that it does not reach. A process with a thread that
//! hangs ends.

use super::pool::Pool;
use super::tell;
use crate::control::Control;
use crate::hang::Hang;
use crate::ids::NodeId;
use everstep_transport::{Hub, Peer};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

const HEARTBEAT: Duration = Duration::from_millis(50);

/// See the module. The thread ends with it.
#[derive(Debug)]
pub(super) struct Pulse(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// 0 until the supervisor has welcomed the node.
    node: AtomicU64,
    supervisor: AtomicU64,
    /// Nodes of the table to which there is no link.
    down: Mutex<BTreeSet<NodeId>>,
}

impl Pulse {
    pub(super) fn start(hub: Hub, supervisor: Peer, pool: Pool) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            node: AtomicU64::new(0),
            supervisor: AtomicU64::new(supervisor),
            down: Mutex::default(),
        });
        let weak = Arc::downgrade(&shared);
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new().name("pulse".to_owned()).spawn(move || {
            let _guard = runtime.enter();
            beat(&weak, &hub, &pool);
        })?;
        Ok(Self(shared))
    }

    /// The supervisor has given the node its number.
    pub(super) fn welcome(&self, node: NodeId) {
        self.0.node.store(node.0, Ordering::Relaxed);
    }

    /// There is a link to a node, or there is none.
    pub(super) fn link(&self, node: NodeId, up: bool) {
        let mut down = self.0.down.lock().unwrap_or_else(PoisonError::into_inner);
        if up {
            down.remove(&node);
        } else {
            down.insert(node);
        }
    }

    /// The supervisor has another life.
    pub(super) fn talk_to(&self, supervisor: Peer) {
        self.0.supervisor.store(supervisor, Ordering::Relaxed);
    }
}

fn beat(shared: &Weak<Shared>, hub: &Hub, pool: &Pool) {
    let mut hang = Hang::default();
    loop {
        std::thread::sleep(HEARTBEAT);
        if let Some(thread) = hang.look(pool.at()) {
            // Nothing else stops a thread that hangs; the kernel tells the supervisor.
            tracing::error!(thread, "a compute thread hangs: the process ends");
            std::process::abort();
        }
        let Some(shared) = shared.upgrade() else { return };
        let node = shared.node.load(Ordering::Relaxed);
        if node > 0 {
            let down = shared.down.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
            let (operations, rates) = (pool.operations(), pool.rates());
            let beat = Control::Heartbeat { node: NodeId(node), operations, rates, down };
            tell(hub, shared.supervisor.load(Ordering::Relaxed), beat);
        }
    }
}
