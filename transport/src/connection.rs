//! A connection between two processes, and the way that their session takes: streams of the connection, or RDMA beside it.
//!
//! The connection stays as long as the session has a peer to talk to, whichever way that is: it is the way back. On it: one stream
//! for what the ends say about the way ([`crate::side`]), then two for each link of the session over QUIC.

use crate::choice::{Choice, Effect, Event};
use crate::credentials::{NAME, random};
use crate::hub::{Hub, Refusals, SessionHandle};
use crate::link::Link;
use crate::liveness;
use crate::quic::{self, HANDSHAKE, Peer, QuicError, broken, explain};
use crate::side::{GREETING, Greeting, HEAD, Said, SaidError, greeting, greeting_bytes};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

/// What the other end said and this one has not looked at.
const HEARD: usize = 16;
/// Whoever does not answer a dialler by then is dialled again.
const ANSWER: Duration = Duration::from_secs(1);

/// A link over RDMA that is being made.
type Making = Pin<Box<dyn Future<Output = io::Result<Trial>> + Send + Sync>>;

/// A link over RDMA beside the connection, that is being proven, or in use.
pub(crate) struct Trial {
    /// The session's end, until it is taken.
    pub(crate) link: Option<Link>,
    /// Comes when the link is proven.
    pub(crate) proven: Option<oneshot::Receiver<()>>,
    /// Says that the session will come this way, with the number of the next fragment that this end lacks.
    pub(crate) begin: Option<oneshot::Sender<u64>>,
    /// Comes when the link has ended: why.
    pub(crate) ended: Option<oneshot::Receiver<String>>,
    /// The device's name.
    pub(crate) device: String,
}

impl Trial {
    /// That it is proven, then that it has ended; each once.
    pub(crate) async fn event(&mut self) -> Event {
        if let Some(proven) = &mut self.proven {
            let is_proven = proven.await.is_ok();
            self.proven = None;
            if is_proven {
                return Event::Proven(self.device.clone());
            }
        }
        let Some(ended) = &mut self.ended else { return std::future::pending().await };
        let why = ended.await.unwrap_or_else(|_| "its task has ended".to_owned());
        self.ended = None;
        Event::Failed(why)
    }
}

/// Two streams of a link, before its session takes them.
struct Streams {
    control: (SendStream, RecvStream),
    bulk: (SendStream, RecvStream),
}

/// A connection on which both ends know each other.
pub(crate) struct PeerConnection {
    connection: Connection,
    hub: Hub,
    peer: Peer,
    session: SessionHandle,
    say: SendStream,
    hear: Option<RecvStream>,
    dials: bool,
    /// Whether this end looks for the other when that has become silent: who accepted does, since who dialled may not know of it.
    looks_back: bool,
    /// No way was found back from RDMA: the connection is as silent as that was.
    gave_up: bool,
    /// Gives whether the other end has become silent.
    watch: JoinHandle<bool>,
    choice: Choice,
    began: Instant,
    making: Option<Making>,
    trial: Option<Trial>,
    /// The attempt for which the session rests.
    attempt: u64,
    /// Told whenever something is sent.
    written: Arc<Notify>,
}

impl PeerConnection {
    /// Dials, learns who answers, and gives the session its first link. `sought`: that peer alone, if its session lacks a link still.
    pub(crate) async fn dial(
        hub: &Hub,
        endpoint: &Endpoint,
        address: SocketAddr,
        sought: Option<Peer>,
    ) -> Result<Self, QuicError> {
        let unreachable = |e: &dyn std::fmt::Display| QuicError::Unreachable { address, reason: e.to_string() };
        let connecting = endpoint.connect(address, NAME);
        let connecting = timeout(ANSWER, connecting.map_err(|e| unreachable(&e))?).await;
        let connection = connecting.map_err(|_| unreachable(&"no answer"))?.map_err(|e| explain(address, &e))?;
        let (mut say, mut hear) = connection.open_bi().await.map_err(|e| explain(address, &e))?;
        say.write_all(&hub.me().to_le_bytes()).await.map_err(|e| broken(&connection, e))?;
        // Another life of who is sought is not to make room for a link: it is asked for its name first.
        let (streams, peer) = if sought.is_some() {
            let peer = read_word(&connection, &mut hear).await?;
            if sought != Some(peer) || !hub.lacks(peer) {
                return Err(QuicError::NotSought { address });
            }
            (Streams::open(&connection).await?, peer)
        } else {
            let streams = Streams::open(&connection).await?;
            (streams, read_word(&connection, &mut hear).await?)
        };
        let mut this = Self::new(hub, connection, peer, (say, hear), true);
        this.looks_back = sought.is_some();
        this.link(streams).await?;
        Ok(this)
    }

    /// Accepts, learns who dials, and gives the session its first link.
    pub(crate) async fn accept(hub: &Hub, connection: Connection) -> Result<Self, QuicError> {
        let address = connection.remote_address();
        let (mut say, mut hear) = connection.accept_bi().await.map_err(|e| explain(address, &e))?;
        let peer = read_word(&connection, &mut hear).await?;
        say.write_all(&hub.me().to_le_bytes()).await.map_err(|e| broken(&connection, e))?;
        let mut this = Self::new(hub, connection, peer, (say, hear), false);
        let control = this.connection.accept_bi().await.map_err(|e| explain(address, &e))?;
        this.accept_link(control).await?;
        Ok(this)
    }

    fn new(hub: &Hub, connection: Connection, peer: Peer, side: (SendStream, RecvStream), dials: bool) -> Self {
        let written = Arc::new(Notify::new());
        let watch = tokio::spawn(liveness::watch(connection.clone(), Arc::clone(&written)));
        Self {
            connection,
            hub: hub.clone(),
            peer,
            session: hub.session_of(peer),
            say: side.0,
            hear: Some(side.1),
            dials,
            looks_back: !dials,
            gave_up: false,
            watch,
            choice: Choice::new(dials, hub.rdma().as_ref().err().cloned()),
            began: Instant::now(),
            making: None,
            trial: None,
            attempt: 0,
            written,
        }
    }

    /// Who is at the other end.
    pub(crate) fn peer(&self) -> Peer {
        self.peer
    }

    fn ended(&self) -> QuicError {
        broken(&self.connection, "the session has ended, or goes over another connection")
    }

    fn late(&self) -> QuicError {
        broken(&self.connection, "no answer")
    }

    async fn rest(&mut self) -> Result<Greeting, QuicError> {
        let (attempt, greeting) = self.session.prepare(Some(&self.connection)).await.ok_or_else(|| self.ended())?;
        self.attempt = attempt;
        Ok(greeting)
    }

    async fn up(&self, link: Link, theirs: Greeting) -> Result<(), QuicError> {
        let up = self.session.up(link, self.attempt, theirs, Some(self.connection.clone())).await;
        up.ok_or_else(|| self.ended())
    }

    /// The dialler's end of a link over new streams.
    async fn link(&mut self, streams: Streams) -> Result<(), QuicError> {
        let late = self.late();
        self.written.notify_one();
        timeout(HANDSHAKE, self.link_unbounded(streams)).await.unwrap_or(Err(late))
    }

    async fn link_unbounded(&mut self, mut streams: Streams) -> Result<(), QuicError> {
        let theirs = read_greeting(&self.connection, &mut streams.control.1).await?;
        let ours = self.rest().await?;
        streams.greet(&self.connection, ours).await?;
        self.up(streams.into_link(&self.connection, &self.written, self.hub.refusals()), theirs).await
    }

    /// The other end's.
    async fn accept_link(&mut self, control: (SendStream, RecvStream)) -> Result<(), QuicError> {
        let late = self.late();
        self.written.notify_one();
        timeout(HANDSHAKE, self.accept_link_unbounded(control)).await.unwrap_or(Err(late))
    }

    async fn accept_link_unbounded(&mut self, mut control: (SendStream, RecvStream)) -> Result<(), QuicError> {
        read_mark(&self.connection, &mut control.1).await?;
        let accepted = self.connection.accept_bi().await;
        let mut bulk = accepted.map_err(|e| explain(self.connection.remote_address(), &e))?;
        read_mark(&self.connection, &mut bulk.1).await?;
        let mut streams = Streams { control, bulk };
        let ours = self.rest().await?;
        streams.greet(&self.connection, ours).await?;
        let theirs = read_greeting(&self.connection, &mut streams.control.1).await?;
        self.up(streams.into_link(&self.connection, &self.written, self.hub.refusals()), theirs).await
    }

    /// Chooses the session's way until the connection or the session ends; then the session has no link.
    pub(crate) async fn run(mut self) {
        let (sender, mut heard) = mpsc::channel(HEARD);
        if let Some(hear) = self.hear.take() {
            tokio::spawn(listen(hear, sender));
        }
        let mut event = Event::Linked;
        let why = loop {
            let next = async {
                self.on(event).await?;
                self.next(&mut heard).await
            };
            match next.await {
                Ok(next) => event = next,
                Err(why) => break why,
            }
        };
        tracing::debug!(peer = self.peer, %why, "a connection has ended");
        self.hub.on_way_lost(self.peer, self.attempt);
        self.session.lost(&self.connection).await;
        self.close();
        let silent = (&mut self.watch).await.unwrap_or(false) || self.gave_up;
        if silent && self.looks_back {
            self.hub.look_for(self.peer, self.connection.remote_address());
        }
    }

    fn close(&self) {
        self.connection.close(VarInt::from_u32(0), b"this end of the connection has ended");
    }

    /// What happens next. An error: the connection is of no use any more.
    async fn next(&mut self, heard: &mut mpsc::Receiver<Result<(u32, Said), SaidError>>) -> Result<Event, QuicError> {
        let connection = self.connection.clone();
        let closed = || broken(&connection, "the connection has closed");
        loop {
            let at = self.choice.deadline().map(|at| self.began + at);
            let (making, trial) = (&mut self.making, &mut self.trial);
            tokio::select! {
                _ = self.connection.closed() => return Err(closed()),
                () = self.session.ended() => return Err(self.ended()),
                said = heard.recv() => match said.ok_or_else(closed)? {
                    Ok((round, said)) => return Ok(Event::Said(round, said)),
                    Err(error) => {
                        self.hub.refusals().add(quic::garbage(&self.connection, &error));
                        return Err(broken(&self.connection, error));
                    }
                },
                control = self.connection.accept_bi(), if !self.dials => {
                    self.accept_link(control.map_err(|_| closed())?).await?;
                    return Ok(Event::Linked);
                }
                made = async { making.as_mut().expect("looked at").await }, if making.is_some() => {
                    self.making = None;
                    match made {
                        Ok(trial) => self.trial = Some(trial),
                        Err(error) => return Ok(Event::Failed(error.to_string())),
                    }
                }
                event = async { trial.as_mut().expect("looked at").event().await }, if trial.is_some() => return Ok(event),
                () = async { sleep_until(at.expect("looked at")).await }, if at.is_some() => return Ok(Event::Tick),
            }
        }
    }

    async fn on(&mut self, event: Event) -> Result<(), QuicError> {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for effect in self.choice.on(self.began.elapsed(), event) {
                events.extend(self.perform(effect).await?);
            }
        }
        Ok(())
    }

    async fn perform(&mut self, effect: Effect) -> Result<Option<Event>, QuicError> {
        match effect {
            Effect::Say(round, said) => self.say(round, &said).await?,
            Effect::Listen(round) => {
                if let Ok(rdma) = self.hub.rdma() {
                    let token = random();
                    let said = Said::Listen(token, rdma.addresses().to_vec());
                    self.making = Some(Box::pin(rdma.expect(token)));
                    self.say(round, &said).await?;
                }
            }
            Effect::Dial(addresses, token) => {
                if let Ok(rdma) = self.hub.rdma() {
                    self.making = Some(Box::pin(rdma.connect(addresses, token)));
                }
            }
            Effect::Rest => {
                let greeting = self.rest().await?;
                // The link may have ended meanwhile: its end says so.
                if let Some(begin) = self.trial.as_mut().and_then(|trial| trial.begin.take()) {
                    let _ = begin.send(greeting[1]);
                }
                return Ok(Some(Event::Rests(greeting)));
            }
            Effect::Take(theirs) => {
                let link = self.trial.as_mut().and_then(|trial| trial.link.take());
                let Some(link) = link else { return Ok(Some(Event::Failed("it has ended".to_owned()))) };
                self.up(link, theirs).await?;
            }
            Effect::Drop => (self.making, self.trial) = (None, None),
            Effect::Return => {
                let late = self.late();
                let opened = timeout(HANDSHAKE, Streams::open(&self.connection)).await;
                self.link(opened.unwrap_or(Err(late))?).await?;
                return Ok(Some(Event::Linked));
            }
            Effect::Close => {
                self.gave_up = true;
                return Err(broken(&self.connection, "no way was found"));
            }
            Effect::Tell(way) => self.hub.on_way(self.peer, self.attempt, way).await,
        }
        Ok(None)
    }

    async fn say(&mut self, round: u32, said: &Said) -> Result<(), QuicError> {
        self.written.notify_one();
        self.say.write_all(&said.encode(round)).await.map_err(|e| broken(&self.connection, e))
    }
}

impl Drop for PeerConnection {
    fn drop(&mut self) {
        // Whoever watches it would keep it.
        self.close();
    }
}

impl Streams {
    async fn open(connection: &Connection) -> Result<Self, QuicError> {
        let address = connection.remote_address();
        let mut control = connection.open_bi().await.map_err(|e| explain(address, &e))?;
        let mut bulk = connection.open_bi().await.map_err(|e| explain(address, &e))?;
        // A stream is there for the other end when something comes on it.
        for send in [&mut control.0, &mut bulk.0] {
            send.write_all(&[1]).await.map_err(|e| broken(connection, e))?;
        }
        Ok(Self { control, bulk })
    }

    async fn greet(&mut self, connection: &Connection, greeting: Greeting) -> Result<(), QuicError> {
        self.control.0.write_all(&greeting_bytes(greeting)).await.map_err(|e| broken(connection, e))
    }

    fn into_link(self, connection: &Connection, written: &Arc<Notify>, refusals: &Refusals) -> Link {
        quic::link(connection, self.control, self.bulk, written, refusals)
    }
}

async fn listen(mut hear: RecvStream, heard: mpsc::Sender<Result<(u32, Said), SaidError>>) {
    loop {
        let mut head = [0; HEAD];
        if hear.read_exact(&mut head).await.is_err() {
            return;
        }
        let said = match Said::head(&head) {
            Ok((kind, length, round)) => {
                let mut rest = vec![0; length];
                if hear.read_exact(&mut rest).await.is_err() {
                    return;
                }
                Said::decode(kind, &rest).map(|said| (round, said))
            }
            Err(error) => Err(error),
        };
        if heard.send(said).await.is_err() {
            return;
        }
    }
}

async fn read_word(connection: &Connection, stream: &mut RecvStream) -> Result<u64, QuicError> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).await.map_err(|e| broken(connection, e))?;
    Ok(u64::from_le_bytes(bytes))
}

async fn read_greeting(connection: &Connection, stream: &mut RecvStream) -> Result<Greeting, QuicError> {
    let mut bytes = [0; GREETING];
    stream.read_exact(&mut bytes).await.map_err(|e| broken(connection, e))?;
    Ok(greeting(&bytes))
}

async fn read_mark(connection: &Connection, stream: &mut RecvStream) -> Result<(), QuicError> {
    let mut mark = [0];
    stream.read_exact(&mut mark).await.map_err(|e| broken(connection, e))
}
