//! All sessions of a process: dials, accepts, reconnects, and hands messages over.
//!
//! - HU-1: a session outlives its links: it is ended by [`Hub::close`] alone.
//! - HU-2: sending never waits. A session holds one window of each lane and [`SEND_QUEUE`] messages behind
//!   it; a sender beyond that is out of step with its protocol, and loses the session (an event says so).
//! - HU-3: a message is taken from the peer's grant when the receiver takes its event, so a process that
//!   does not keep up slows its peers.

use crate::calls::{self, Call, Caller};
use crate::credentials::Credentials;
use crate::disturb::{Disturbance, Disturbances};
use crate::link::Link;
use crate::message::{Assembler, Fragment, Message};
use crate::quic::{self, Greeting, HANDSHAKE, Peer, QuicError, Shaking, explain};
use crate::session::{Lane, Session, SessionEffect};
use quinn::Endpoint;
use ring::rand::SecureRandom;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};

/// Messages that one session may be given and not have sent yet.
pub const SEND_QUEUE: usize = 65_536;
/// Messages that wait for the process to take them.
const EVENTS: usize = 1024;
/// Links that may wait to be taken by a session.
const LINK_QUEUE: usize = 16;
const REDIAL: Duration = Duration::from_millis(50);

/// What happened.
#[derive(Debug)]
pub enum HubEvent {
    /// A link to a peer is there.
    Up(Peer),
    /// The link to a peer is gone; the session goes on when there is another.
    Down(Peer),
    /// A message of a peer.
    Message(Peer, Message),
    /// The session with a peer is over: one of the two broke the protocol.
    Broken(Peer, String),
    /// A process that is not of this job tried to connect.
    Refused(String),
}

/// What a session's task is told about its links.
enum Command {
    /// A new link is being made: the old one ends; answered with what the session has.
    Prepare(oneshot::Sender<(u64, Greeting)>),
    /// It is there, of that attempt. An attempt that another one has overtaken is not taken up.
    Up(Link, u64, Greeting),
}

/// A session's task, seen from outside.
#[derive(Clone)]
struct Handle {
    commands: mpsc::Sender<Command>,
    /// Messages by lane: a full lane does not hold up the other.
    messages: [mpsc::Sender<Message>; 2],
    linked: watch::Receiver<bool>,
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
    sessions: Mutex<BTreeMap<Peer, Handle>>,
    events: mpsc::Sender<HubEvent>,
    disturbances: Disturbances,
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
        let disturbances = Disturbances::default();
        let (endpoint, caller) = quic::open(bind, credentials, disturbances.clone())?;
        let (events, receiver) = mpsc::channel(EVENTS);
        let (calls, open) = (OnceLock::new(), AtomicBool::new(true));
        let sessions = Mutex::default();
        let hub = Self(Arc::new(Shared { endpoint, caller, calls, open, me, sessions, events, disturbances }));
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

    /// Whether others may begin sessions with this process from now on; at first they may.
    pub fn take_sessions(&self, open: bool) {
        self.0.open.store(open, Ordering::Relaxed);
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

    /// The session with a peer; a new one if there is none.
    fn session(&self, peer: Peer) -> Handle {
        let start = || {
            let (commands, queue) = mpsc::channel(LINK_QUEUE);
            let (control, control_queue) = mpsc::channel(SEND_QUEUE);
            let (bulk, bulk_queue) = mpsc::channel(SEND_QUEUE);
            let (links, linked) = watch::channel(false);
            let task = SessionTask {
                hub: self.clone(),
                peer,
                session: Session::new(),
                name: random_name(),
                other: 0,
                attempt: 0,
                link: None,
                links,
                assemblers: Default::default(),
            };
            tokio::spawn(task.run(queue, [control_queue, bulk_queue]));
            Handle { commands, messages: [control, bulk], linked }
        };
        self.sessions().entry(peer).or_insert_with(start).clone()
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<Peer, Handle>> {
        self.0.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends to a peer, now or when there is a link. Never waits.
    pub fn send(&self, peer: Peer, lane: Lane, message: Message) {
        if let Err(error) = self.session(peer).messages[at(lane)].try_send(message) {
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
    }

    /// Dials once. Gives the name of who answered.
    pub async fn dial(&self, address: SocketAddr) -> Result<Peer, QuicError> {
        let unreachable = QuicError::Unreachable { address, reason: "no answer".to_owned() };
        tokio::time::timeout(HANDSHAKE, self.dial_unbounded(address)).await.unwrap_or(Err(unreachable))
    }

    async fn dial_unbounded(&self, address: SocketAddr) -> Result<Peer, QuicError> {
        let (mut shaking, peer, theirs) = Shaking::dial(&self.0.endpoint, address, self.0.me).await?;
        let session = self.session(peer);
        let ended = || QuicError::Unreachable { address, reason: "the session has ended".to_owned() };
        let (attempt, ours) = session.prepare().await.ok_or_else(ended)?;
        shaking.confirm(ours).await?;
        session.commands.send(Command::Up(shaking.into_link(), attempt, theirs)).await.map_err(|_| ended())?;
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

    /// Links two hubs of one process without a network.
    pub async fn link_in_memory(&self, other: &Self) {
        let (ours, theirs) = Link::memory();
        let (mine, their) = (self.session(other.me()), other.session(self.me()));
        if let (Some((mine_attempt, a)), Some((their_attempt, b))) = (mine.prepare().await, their.prepare().await) {
            // A session that ended meanwhile needs no link.
            let _ = mine.commands.send(Command::Up(ours, mine_attempt, b)).await;
            let _ = their.commands.send(Command::Up(theirs, their_attempt, a)).await;
        }
    }

    /// Closes the endpoint.
    pub fn shut_down(&self) {
        self.sessions().clear();
        self.0.endpoint.close(quinn::VarInt::from_u32(0), b"the process ends");
    }
}

impl Handle {
    /// Ends the present link, if any, and tells what the session has.
    async fn prepare(&self) -> Option<(u64, Greeting)> {
        let (answer, resume) = oneshot::channel();
        self.commands.send(Command::Prepare(answer)).await.ok()?;
        resume.await.ok()
    }
}

/// Accepts connections until the endpoint closes.
async fn accept(hub: Hub) {
    while let Some(incoming) = hub.0.endpoint.accept().await {
        let hub = hub.clone();
        let address = incoming.remote_address();
        tokio::spawn(async move {
            let late = QuicError::Unreachable { address, reason: "the handshake took too long".to_owned() };
            let result = tokio::time::timeout(HANDSHAKE, admit(&hub, incoming)).await.unwrap_or(Err(late));
            if let Err(error @ (QuicError::ForeignJob { .. } | QuicError::Expired { .. })) = result {
                let _ = hub.0.events.send(HubEvent::Refused(error.to_string())).await;
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
    let (mut shaking, peer) = Shaking::accept(connection).await?;
    let session = hub.session(peer);
    let ended = || QuicError::Unreachable { address, reason: "the session has ended".to_owned() };
    let (attempt, ours) = session.prepare().await.ok_or_else(ended)?;
    let theirs = shaking.answer(hub.me(), ours).await?;
    session.commands.send(Command::Up(shaking.into_link(), attempt, theirs)).await.map_err(|_| ended())
}

fn random_name() -> u64 {
    let mut bytes = [0; 8];
    ring::rand::SystemRandom::new().fill(&mut bytes).expect("the system has random numbers");
    // 0 stands for "not known".
    u64::from_le_bytes(bytes).max(1)
}

fn at(lane: Lane) -> usize {
    usize::from(lane == Lane::Bulk)
}

/// One session: the pure core between commands, a link and the process.
struct SessionTask {
    hub: Hub,
    peer: Peer,
    session: Session<Fragment>,
    /// The random name of this half of the session.
    name: u64,
    /// That of the other half; 0 until the first link.
    other: u64,
    /// Counts the links that were being made.
    attempt: u64,
    link: Option<Link>,
    links: watch::Sender<bool>,
    assemblers: [Assembler; 2],
}

impl SessionTask {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, messages: [mpsc::Receiver<Message>; 2]) {
        let [mut control, mut bulk] = messages;
        loop {
            // A session that holds a window takes no more of a lane: what waits is bounded by SEND_QUEUE.
            let room = Lane::ALL.map(|lane| self.session.has_room(lane));
            let incoming = async {
                match &mut self.link {
                    Some(link) => link.incoming.recv().await,
                    None => std::future::pending().await,
                }
            };
            let result = tokio::select! {
                // Frames first: they bring the grants that sending waits for. Then what must not wait.
                biased;
                frame = incoming => match frame {
                    Some(frame) => match self.session.on_frame(frame) {
                        Ok(effects) => self.perform(effects).await,
                        Err(error) => Err(error.to_string()),
                    },
                    None => {
                        self.unlink().await;
                        Ok(())
                    }
                },
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return,
                },
                Some(message) = control.recv(), if room[0] => self.send(Lane::Control, message).await,
                Some(message) = bulk.recv(), if room[1] => self.send(Lane::Bulk, message).await,
            };
            if let Err(reason) = result {
                self.hub.close(self.peer);
                let _ = self.hub.0.events.send(HubEvent::Broken(self.peer, reason)).await;
                return;
            }
        }
    }

    async fn send(&mut self, lane: Lane, message: Message) -> Result<(), String> {
        for fragment in message.fragments() {
            let effects = self.session.send(lane, fragment);
            self.perform(effects).await?;
        }
        Ok(())
    }

    async fn command(&mut self, command: Command) -> Result<(), String> {
        match command {
            Command::Prepare(answer) => {
                self.unlink().await;
                let [control, bulk] = self.session.resume();
                self.attempt += 1;
                let _ = answer.send((self.attempt, [control, bulk, self.name, self.other]));
                Ok(())
            }
            Command::Up(_, attempt, _) if attempt != self.attempt => Ok(()),
            Command::Up(link, _, [control, bulk, name, known]) => {
                // A half that one side has forgotten cannot be resumed: what was in it would come twice.
                let forgotten = (self.other != 0 && self.other != name) || (known != 0 && known != self.name);
                if forgotten {
                    return Err("one side has forgotten the session".to_owned());
                }
                self.other = name;
                self.link = Some(link);
                let effects = self.session.link_up([control, bulk]).map_err(|e| e.to_string())?;
                let _ = self.links.send(true);
                let _ = self.hub.0.events.send(HubEvent::Up(self.peer)).await;
                self.perform(effects).await
            }
        }
    }

    async fn unlink(&mut self) {
        if self.link.take().is_some() {
            self.session.link_down();
            let _ = self.links.send(false);
            let _ = self.hub.0.events.send(HubEvent::Down(self.peer)).await;
        }
    }

    async fn perform(&mut self, effects: Vec<SessionEffect<Fragment>>) -> Result<(), String> {
        let mut queue = std::collections::VecDeque::from(effects);
        while let Some(effect) = queue.pop_front() {
            match effect {
                SessionEffect::Transmit(frame) => {
                    let failed = self.link.as_ref().is_some_and(|link| link.transmit(frame).is_err());
                    if failed {
                        self.unlink().await;
                    }
                }
                SessionEffect::Deliver(lane, fragment) => {
                    let message = self.assemblers[at(lane)].push(&fragment).map_err(|e| e.to_string())?;
                    if let Some(message) = message
                        && self.hub.0.events.send(HubEvent::Message(self.peer, message)).await.is_err()
                    {
                        return Err("the process takes no more messages".to_owned());
                    }
                    queue.extend(self.session.consumed(lane));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
