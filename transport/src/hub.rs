//! All sessions of a process: dials, accepts, reconnects, and hands messages over.
//!
//! - HU-1: a session outlives its links: it is ended by [`Hub::close`] alone.
//! - HU-2: sending never waits. A session holds one window of each lane and [`SEND_QUEUE`] messages behind
//!   it; a sender beyond that is out of step with its protocol, and loses the session (an event says so).
//! - HU-3: a message is taken from the peer's grant when the receiver takes its event, so a process that
//!   does not keep up slows its peers.
//! - HU-4: a hub that was opened for calls has no session, from its first moment until [`Hub::take_sessions`]: what a peer
//!   said before somebody listens would be lost, and the peer would wait for an answer.

mod refusals;
mod task;

pub(crate) use refusals::Refusals;
pub(crate) use task::SessionHandle;

use crate::calls::{self, Call, Caller};
use crate::choice::Way;
use crate::connection::PeerConnection;
use crate::credentials::Credentials;
use crate::disturb::{Disturbance, Disturbances};
use crate::link::Link;
use crate::message::Message;
use crate::quic::{self, HANDSHAKE, Peer, QuicError, explain};
use crate::rdma::Rdma;
use crate::session::Lane;
use quinn::Endpoint;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use task::Running;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc};

/// Messages that one session may be given and not have sent yet.
pub const SEND_QUEUE: usize = 65_536;
/// Messages that wait for the process to take them.
const EVENTS: usize = 1024;
const REDIAL: Duration = Duration::from_millis(50);
/// Between two dials of who is looked for, at most.
const LOOK_MAX: Duration = Duration::from_secs(1);
/// Handshakes at one time: more than the first are asked to come again, more than the second are refused.
const HANDSHAKES: [usize; 2] = [64, 1024];

/// What happened.
#[derive(Debug)]
pub enum HubEvent {
    /// There is a way to a peer.
    Up(Peer),
    /// There is none any more; the session goes on when there is another.
    Down(Peer),
    /// A message of a peer.
    Message(Peer, Message),
    /// The session with a peer is over: one of the two broke the protocol.
    Broken(Peer, String),
    /// A process that is not of this job tried to connect, or a member sent what no correct one sends.
    Refused(String),
    /// The session with a peer takes this way from now on.
    Way(Peer, Way),
}

struct Shared {
    endpoint: Endpoint,
    /// How calls are dialled.
    caller: quinn::ClientConfig,
    /// Who answers calls, if anybody does.
    calls: OnceLock<mpsc::Sender<Call>>,
    /// Whether others may begin sessions.
    open: AtomicBool,
    me: Peer,
    sessions: Mutex<BTreeMap<Peer, Running>>,
    events: mpsc::Sender<HubEvent>,
    disturbances: Disturbances,
    refusals: Refusals,
    /// The ways of sessions that have one, and by which attempt at a link they were chosen.
    ways: Mutex<BTreeMap<Peer, (u64, Way)>>,
    /// RDMA of this process, or why there is none.
    rdma: Result<Arc<Rdma>, String>,
}

/// See the module. Clones are handles of the same hub.
#[derive(Clone)]
pub struct Hub(Arc<Shared>);

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hub({:x})", self.0.me)
    }
}

impl Hub {
    /// Opens an endpoint at `bind` for the process named `me`.
    pub fn open(
        bind: SocketAddr,
        credentials: &Credentials,
        me: Peer,
    ) -> Result<(Self, mpsc::Receiver<HubEvent>), QuicError> {
        Self::start(bind, credentials, me, true)
    }

    /// As [`Hub::open`]; it only answers calls until [`Hub::take_sessions`] (HU-4).
    pub fn open_for_calls(
        bind: SocketAddr,
        credentials: &Credentials,
        me: Peer,
    ) -> Result<(Self, mpsc::Receiver<HubEvent>), QuicError> {
        Self::start(bind, credentials, me, false)
    }

    fn start(
        bind: SocketAddr,
        credentials: &Credentials,
        me: Peer,
        open: bool,
    ) -> Result<(Self, mpsc::Receiver<HubEvent>), QuicError> {
        let disturbances = Disturbances::default();
        let (endpoint, caller) = quic::open(bind, credentials, disturbances.clone())?;
        let (events, receiver) = mpsc::channel(EVENTS);
        let (calls, open) = (OnceLock::new(), AtomicBool::new(open));
        let (sessions, ways) = (Mutex::default(), Mutex::default());
        let refusals = Refusals::new(events.clone());
        let rdma = Rdma::start(refusals.clone()).map_err(|error| error.to_string());
        let hub = Self(Arc::new(Shared {
            endpoint,
            caller,
            calls,
            open,
            me,
            sessions,
            events,
            disturbances,
            refusals,
            ways,
            rdma,
        }));
        tokio::spawn(accept(hub.clone()));
        Ok((hub, receiver))
    }

    /// Where the endpoint listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.0.endpoint.local_addr()
    }

    /// This process's name.
    pub fn me(&self) -> Peer {
        self.0.me
    }

    /// Makes the wire bad for a while (chaos).
    pub fn disturb(&self, disturbance: Disturbance) {
        self.0.disturbances.add(disturbance);
    }

    /// Others may begin sessions with this process from now on.
    pub fn take_sessions(&self) {
        self.0.open.store(true, Ordering::Relaxed);
    }

    /// Calls of others from now on. Whoever asks first answers them; before, and without, they are refused.
    pub fn answer_calls(&self) -> mpsc::Receiver<Call> {
        let (sender, calls) = mpsc::channel(calls::QUEUE);
        let _ = self.0.calls.set(sender);
        calls
    }

    /// For calls to a process.
    pub fn caller(&self, address: SocketAddr) -> Caller {
        Caller::new(self.0.endpoint.clone(), self.0.caller.clone(), address)
    }

    /// How often something was refused ([`HubEvent::Refused`]).
    pub fn refused(&self) -> u64 {
        self.0.refusals.count()
    }

    pub(crate) fn refusals(&self) -> &Refusals {
        &self.0.refusals
    }

    /// RDMA of this process, or why there is none.
    pub(crate) fn rdma(&self) -> &Result<Arc<Rdma>, String> {
        &self.0.rdma
    }

    /// Makes all links over RDMA fail, as their devices would (chaos).
    pub fn break_rdma(&self) {
        if let Ok(rdma) = &self.0.rdma {
            rdma.break_links();
        }
    }

    /// The ways of the sessions that have one.
    pub fn ways(&self) -> BTreeMap<Peer, Way> {
        self.lock_ways().iter().map(|(peer, (_, way))| (*peer, way.clone())).collect()
    }

    fn lock_ways(&self) -> MutexGuard<'_, BTreeMap<Peer, (u64, Way)>> {
        self.0.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session has taken a way, by that attempt at a link; not if a later one has.
    pub(crate) async fn on_way(&self, peer: Peer, attempt: u64, way: Way) {
        if self.note_way(peer, attempt, &way) {
            let _ = self.0.events.send(HubEvent::Way(peer, way)).await;
        }
    }

    fn note_way(&self, peer: Peer, attempt: u64, way: &Way) -> bool {
        let mut ways = self.lock_ways();
        let is_last = ways.get(&peer).is_none_or(|(last, _)| *last <= attempt);
        if is_last {
            ways.insert(peer, (attempt, way.clone()));
        }
        is_last
    }

    /// The connection of that attempt is lost, and the way that was chosen on it.
    pub(crate) fn on_way_lost(&self, peer: Peer, attempt: u64) {
        let mut ways = self.lock_ways();
        if ways.get(&peer).is_some_and(|(last, _)| *last <= attempt) {
            ways.remove(&peer);
        }
    }

    /// Where events go.
    pub(crate) fn events(&self) -> &mpsc::Sender<HubEvent> {
        &self.0.events
    }

    /// The session with a peer, for a connection; a new one if there is none.
    pub(crate) fn session_of(&self, peer: Peer) -> SessionHandle {
        self.session(peer).handle()
    }

    /// The session with a peer; a new one if there is none.
    fn session(&self, peer: Peer) -> Running {
        self.sessions().entry(peer).or_insert_with(|| task::start(self, peer)).clone()
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<Peer, Running>> {
        self.0.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends to a peer, now or when there is a link. Never waits.
    pub fn send(&self, peer: Peer, lane: Lane, message: Message) {
        let start = || task::start(self, peer);
        let sent = self.sessions().entry(peer).or_insert_with(start).messages[at(lane)].try_send(message);
        if let Err(error) = sent {
            let why = match error {
                TrySendError::Full(_) => format!("{SEND_QUEUE} messages wait for its link"),
                TrySendError::Closed(_) => "it has ended".to_owned(),
            };
            self.close(peer);
            let events = self.0.events.clone();
            tokio::spawn(async move { events.send(HubEvent::Broken(peer, why)).await });
        }
    }

    /// Ends the session with a peer.
    pub fn close(&self, peer: Peer) {
        self.sessions().remove(&peer);
        self.lock_ways().remove(&peer);
    }

    /// Dials once. Gives the name of who answered.
    pub async fn dial(&self, address: SocketAddr) -> Result<Peer, QuicError> {
        self.dial_for(address, None).await
    }

    async fn dial_for(&self, address: SocketAddr, sought: Option<Peer>) -> Result<Peer, QuicError> {
        let late = QuicError::Unreachable { address, reason: "no answer".to_owned() };
        let dialling = PeerConnection::dial(self, &self.0.endpoint, address, sought);
        let connection = tokio::time::timeout(HANDSHAKE, dialling).await.unwrap_or(Err(late))?;
        let peer = connection.peer();
        tokio::spawn(connection.run());
        Ok(peer)
    }

    /// Whether there is a link to a peer now.
    pub fn is_linked(&self, peer: Peer) -> bool {
        self.sessions().get(&peer).is_some_and(|session| *session.linked.borrow())
    }

    /// Keeps a link to a peer until the session is closed or another life answers. Call once for each peer.
    pub fn keep(&self, peer: Peer, address: SocketAddr) {
        let hub = self.clone();
        let mut linked = self.session(peer).linked;
        tokio::spawn(async move {
            while hub.sessions().contains_key(&peer) {
                match hub.dial(address).await {
                    Ok(answered) if answered == peer => {
                        // The link may be up and down again before this task sees it: then it dials again.
                        let _ = tokio::time::timeout(REDIAL, linked.wait_for(|up| *up)).await;
                        if linked.wait_for(|up| !*up).await.is_err() {
                            return;
                        }
                    }
                    Ok(_) => return,
                    Err(_) => tokio::time::sleep(REDIAL).await,
                }
            }
        });
    }

    /// Whether there is a session with a peer that has no link.
    pub(crate) fn lacks(&self, peer: Peer) -> bool {
        self.sessions().get(&peer).is_some_and(|session| !*session.linked.borrow())
    }

    /// Dials who dialled before and may not know that the connection is lost, until the session has a link or is closed, or somebody
    /// else answers.
    pub(crate) fn look_for(&self, peer: Peer, address: SocketAddr) {
        let hub = self.clone();
        tokio::spawn(async move {
            // Who knows of it has dialled again by then.
            let mut again = 2 * REDIAL;
            loop {
                tokio::time::sleep(again).await;
                again = (2 * again).min(LOOK_MAX);
                let unreachable =
                    |result: Result<Peer, QuicError>| matches!(result, Err(QuicError::Unreachable { .. }));
                if !hub.lacks(peer) || !unreachable(hub.dial_for(address, Some(peer)).await) {
                    return;
                }
            }
        });
    }

    /// Links two hubs of one process without a network.
    pub async fn link_in_memory(&self, other: &Self) {
        let (ours, theirs) = Link::memory();
        let (mine, their) = (self.session_of(other.me()), other.session_of(self.me()));
        if let (Some((my_attempt, a)), Some((their_attempt, b))) = (mine.prepare(None).await, their.prepare(None).await)
        {
            // A session that ended meanwhile needs no link.
            let _ = mine.up(ours, my_attempt, b, None).await;
            let _ = their.up(theirs, their_attempt, a, None).await;
        }
    }

    /// Closes the endpoint.
    pub fn shut_down(&self) {
        self.sessions().clear();
        self.0.endpoint.close(quinn::VarInt::from_u32(0), b"the process ends");
    }
}

/// What becomes of a handshake beside so many others.
#[derive(Debug, PartialEq, Eq)]
enum Door {
    Open,
    /// It is to come again with a proof that its address is its own.
    Retry,
    Shut,
}

fn door(taken: usize, is_proven: bool) -> Door {
    let [few, most] = HANDSHAKES;
    match taken {
        _ if taken >= most => Door::Shut,
        _ if taken >= few && !is_proven => Door::Retry,
        _ => Door::Open,
    }
}

/// Accepts connections until the endpoint closes. Handshakes are bounded: of many at once only those go on whose address is shown to be
/// theirs, and of too many none.
async fn accept(hub: Hub) {
    let places = Arc::new(Semaphore::new(HANDSHAKES[1]));
    while let Some(incoming) = hub.0.endpoint.accept().await {
        let taken = HANDSHAKES[1] - places.available_permits();
        match door(taken, incoming.remote_address_validated()) {
            Door::Open => {}
            Door::Retry => {
                // One that may not be asked has been.
                let _ = incoming.retry();
                continue;
            }
            Door::Shut => {
                incoming.refuse();
                continue;
            }
        }
        let place = Arc::clone(&places).try_acquire_owned();
        let hub = hub.clone();
        let address = incoming.remote_address();
        tokio::spawn(async move {
            let _place = place;
            let late = QuicError::Unreachable { address, reason: "the handshake took too long".to_owned() };
            let result = tokio::time::timeout(HANDSHAKE, admit(&hub, incoming)).await.unwrap_or(Err(late));
            if let Err(error @ (QuicError::ForeignJob { .. } | QuicError::Expired { .. })) = result {
                hub.0.refusals.add(error.to_string());
            }
        });
    }
}

async fn admit(hub: &Hub, incoming: quinn::Incoming) -> Result<(), QuicError> {
    let address = incoming.remote_address();
    let connection = incoming.await.map_err(|e| explain(address, &e))?;
    if quic::is_for_calls(&connection) {
        if let Some(sender) = hub.0.calls.get() {
            tokio::spawn(calls::serve(connection, sender.clone()));
        }
        return Ok(());
    }
    if !hub.0.open.load(Ordering::Relaxed) {
        connection.close(quinn::VarInt::from_u32(0), b"this process takes no sessions now");
        return Ok(());
    }
    tokio::spawn(PeerConnection::accept(hub, connection).await?.run());
    Ok(())
}

fn at(lane: Lane) -> usize {
    usize::from(lane == Lane::Bulk)
}

#[cfg(test)]
pub(crate) mod tests;
