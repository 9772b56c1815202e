//! One session of a hub, as a task: the pure core between commands of its connection, a link, and the process.

use super::{Hub, HubEvent, SEND_QUEUE, at};
use crate::credentials::random;
use crate::link::{Link, TransmitError};
use crate::message::{Assembler, Fragment, Message};
use crate::quic::Peer;
use crate::session::{Effects, Frame, Lane, Session, SessionEffect};
use crate::side::Greeting;
use quinn::{Connection, VarInt};
use tokio::sync::{mpsc, oneshot, watch};

/// Frames, or messages of a lane, between two looks at what else there is.
const BATCH: usize = 64;
/// Links that may wait to be taken by a session.
const LINK_QUEUE: usize = 16;

/// What a session's task is told about its links.
enum Command {
    /// A link is being made, on this connection: the present one ends, if any; answered with the attempt's number and what the
    /// session has.
    Prepare(Option<usize>, oneshot::Sender<(u64, Greeting)>),
    /// It is there, of that attempt, on that connection; the peer has this. Answered when it is taken up: an attempt that another one
    /// has overtaken is not.
    Up(Link, u64, Greeting, Option<Connection>, oneshot::Sender<()>),
    /// A connection is lost. Answered when the session knows.
    Lost(usize, oneshot::Sender<()>),
}

/// A session's task, seen from the hub: it ends when the hub drops this.
#[derive(Clone)]
pub(super) struct Running {
    commands: mpsc::Sender<Command>,
    /// Messages by lane: a full lane does not hold up the other.
    pub(super) messages: [mpsc::Sender<Message>; 2],
    /// Whether there is a way to the peer.
    pub(super) linked: watch::Receiver<bool>,
}

impl Running {
    pub(super) fn handle(&self) -> SessionHandle {
        SessionHandle { commands: self.commands.downgrade(), linked: self.linked.clone() }
    }
}

/// A session's task, seen from its connection, which does not keep it.
pub(crate) struct SessionHandle {
    commands: mpsc::WeakSender<Command>,
    linked: watch::Receiver<bool>,
}

impl SessionHandle {
    /// Lets the session rest for a link on a connection: gives the attempt's number, and what the session has. None: it has ended.
    pub(crate) async fn prepare(&self, connection: Option<&Connection>) -> Option<(u64, Greeting)> {
        let (answer, prepared) = oneshot::channel();
        let command = Command::Prepare(connection.map(Connection::stable_id), answer);
        self.commands.upgrade()?.send(command).await.ok()?;
        prepared.await.ok()
    }

    /// Lets it go on over the link of that attempt, with what the peer has. None: it has ended, or goes over another connection.
    pub(crate) async fn up(&self, link: Link, attempt: u64, peer: Greeting, on: Option<Connection>) -> Option<()> {
        let (answer, taken) = oneshot::channel();
        self.commands.upgrade()?.send(Command::Up(link, attempt, peer, on, answer)).await.ok()?;
        taken.await.ok()
    }

    /// Tells it that a connection is lost.
    pub(crate) async fn lost(&self, connection: &Connection) {
        let (answer, known) = oneshot::channel();
        if let Some(commands) = self.commands.upgrade()
            && commands.send(Command::Lost(connection.stable_id(), answer)).await.is_ok()
        {
            // A session that has ended knows too.
            let _ = known.await;
        }
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) {
        while self.linked.changed().await.is_ok() {}
    }
}

/// Starts a session with a peer.
pub(super) fn start(hub: &Hub, peer: Peer) -> Running {
    let (commands, queue) = mpsc::channel(LINK_QUEUE);
    let (control, control_queue) = mpsc::channel(SEND_QUEUE);
    let (bulk, bulk_queue) = mpsc::channel(SEND_QUEUE);
    let (links, linked) = watch::channel(false);
    let task = SessionTask {
        hub: hub.clone(),
        peer,
        session: Session::new(),
        name: random_name(),
        other: 0,
        attempt: 0,
        link: None,
        connection: None,
        links,
        assemblers: Default::default(),
    };
    tokio::spawn(task.run(queue, [control_queue, bulk_queue]));
    Running { commands, messages: [control, bulk], linked }
}

fn random_name() -> u64 {
    // 0 stands for "not known".
    u64::from_le_bytes(random()).max(1)
}

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
    /// The connection to the peer, whichever way the session takes beside it; none for a link in memory.
    connection: Option<Connection>,
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
                    Some(frame) => self.frames(frame).await,
                    None => {
                        self.on_link_end().await;
                        Ok(())
                    }
                },
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return,
                },
                Some(message) = control.recv(), if room[0] => self.messages(Lane::Control, message, &mut control).await,
                Some(message) = bulk.recv(), if room[1] => self.messages(Lane::Bulk, message, &mut bulk).await,
            };
            if let Err(reason) = result {
                self.hub.close(self.peer);
                let _ = self.hub.events().send(HubEvent::Broken(self.peer, reason)).await;
                return;
            }
        }
    }

    /// Takes a frame, and some of those that came behind it.
    async fn frames(&mut self, first: Frame<Fragment>) -> Result<(), String> {
        let (mut next, mut left) = (Some(first), BATCH);
        while let Some(frame) = next {
            let effects = self.session.on_frame(frame).map_err(|error| error.to_string())?;
            self.perform(effects).await?;
            left -= 1;
            next = self.link.as_mut().filter(|_| left > 0).and_then(|link| link.incoming.try_recv().ok());
        }
        Ok(())
    }

    /// Sends a message, and some of those that wait behind it.
    async fn messages(
        &mut self,
        lane: Lane,
        first: Message,
        queue: &mut mpsc::Receiver<Message>,
    ) -> Result<(), String> {
        let (mut next, mut left) = (Some(first), BATCH);
        while let Some(message) = next {
            self.send(lane, message).await?;
            left -= 1;
            let room = left > 0 && self.session.has_room(lane);
            next = if room { queue.try_recv().ok() } else { None };
        }
        Ok(())
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
            Command::Prepare(on, answer) => {
                // On the connection that there is, it only goes another way.
                if on != self.connection.as_ref().map(Connection::stable_id) {
                    self.lose().await;
                }
                self.rest();
                let [control, bulk] = self.session.resume();
                self.attempt += 1;
                let _ = answer.send((self.attempt, [control, bulk, self.name, self.other]));
                Ok(())
            }
            Command::Up(_, attempt, ..) if attempt != self.attempt => Ok(()),
            Command::Up(link, _, [control, bulk, name, known], connection, answer) => {
                // A half that one side has forgotten cannot be resumed: what was in it would come twice.
                let forgotten = (self.other != 0 && self.other != name) || (known != 0 && known != self.name);
                if forgotten {
                    return Err("one side has forgotten the session".to_owned());
                }
                self.other = name;
                self.link = Some(link);
                self.connection = connection;
                let effects = self.session.link_up([control, bulk]).map_err(|e| e.to_string())?;
                if !self.links.send_replace(true) {
                    let _ = self.hub.events().send(HubEvent::Up(self.peer)).await;
                }
                let _ = answer.send(());
                self.perform(effects).await
            }
            Command::Lost(on, answer) => {
                if self.connection.as_ref().is_some_and(|c| c.stable_id() == on) {
                    self.lose().await;
                }
                let _ = answer.send(());
                Ok(())
            }
        }
    }

    /// Its connection makes another one, or is lost and says so. A link in memory has none.
    async fn on_link_end(&mut self) {
        self.rest();
        if self.connection.is_none() {
            self.lose().await;
        }
    }

    /// Drops the link: there will be another one, or the connection is lost.
    fn rest(&mut self) {
        if self.link.take().is_some() {
            self.session.link_down();
        }
    }

    /// There is no way to the peer any more.
    async fn lose(&mut self) {
        self.rest();
        if let Some(connection) = self.connection.take() {
            connection.close(VarInt::from_u32(0), b"the session has left this connection");
        }
        if self.links.send_replace(false) {
            let _ = self.hub.events().send(HubEvent::Down(self.peer)).await;
        }
    }

    async fn perform(&mut self, effects: Effects<Fragment>) -> Result<(), String> {
        for effect in effects {
            match effect {
                SessionEffect::Transmit(frame) => self.transmit(frame).await,
                SessionEffect::Deliver(lane, fragment) => {
                    let message = self.assemblers[at(lane)].push(&fragment).map_err(|e| e.to_string())?;
                    if let Some(message) = message
                        && self.hub.events().send(HubEvent::Message(self.peer, message)).await.is_err()
                    {
                        return Err("the process takes no more messages".to_owned());
                    }
                    if let Some(grant) = self.session.consumed(lane) {
                        self.transmit(grant).await;
                    }
                }
            }
        }
        Ok(())
    }

    async fn transmit(&mut self, frame: Frame<Fragment>) {
        match self.link.as_ref().map_or(Ok(()), |link| link.transmit(frame)) {
            Ok(()) => {}
            Err(TransmitError::Closed) => self.on_link_end().await,
            // More waits than the windows allow.
            Err(TransmitError::Full) => self.lose().await,
        }
    }
}
