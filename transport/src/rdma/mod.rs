//! Links over RDMA: reliable connections of libibverbs, made by librdmacm (RoCE, InfiniBand and iWARP).
//!
//! Two processes that have a session over QUIC agree there on an address and a secret of one use; who dials says the secret, and who
//! listens takes nobody else. Then each proves the path to the other with a probe. What goes over RDMA is not encrypted: it is for a
//! network of the job's own, as RDMA's networks are.
//!
//! [`protocol`] decides, [`packet`] is what its decisions are as bytes, [`link`] carries them out, [`sys`] calls the libraries.

mod link;
#[cfg(test)]
mod on_a_device;
mod packet;
mod protocol;
mod sys;

use crate::connection::Trial;
use crate::hub::Refusals;
use crate::message::FRAGMENT_MAX;
use crate::side::Token;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use sys::{CmEventKind, CmId, QueuePair};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

/// Asking the network for an address or a route takes no longer.
const RESOLVE_MS: i32 = 1000;
/// A connection must be there by then.
const CONNECT: Duration = Duration::from_secs(2);
/// After so long without a connection another address is tried beside those before.
const NEXT_ADDRESS: Duration = Duration::from_millis(100);
/// An error of the listener may be there again at once.
const AFTER_ERROR: Duration = Duration::from_millis(50);
/// How soon the thread ends when nobody needs it.
const LOOK: Duration = Duration::from_secs(1);
/// Requests for connections that may wait.
const BACKLOG: i32 = 64;

/// Who waits for a connection, by the secret that it must come with.
type Waiting = Mutex<BTreeMap<Token, oneshot::Sender<CmId>>>;

/// This process's RDMA: a thread of its own, on which calls may take their time, and a listener.
pub(crate) struct Rdma {
    runtime: Handle,
    /// Where it listens.
    addresses: Vec<SocketAddr>,
    waiting: Arc<Waiting>,
    breaks: watch::Sender<()>,
    refusals: Refusals,
}

fn locked(waiting: &Waiting) -> MutexGuard<'_, BTreeMap<Token, oneshot::Sender<CmId>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rdma {
    /// Listens on every RDMA device of this machine, until the last clone of the pointer is dropped. An error says why there is none.
    pub(crate) fn start(refusals: Refusals) -> io::Result<Arc<Self>> {
        let of_devices = sys::addresses()?;
        if of_devices.is_empty() {
            return Err(io::Error::other("no address of this machine belongs to an RDMA device"));
        }
        let listener = CmId::new()?;
        let any = if of_devices.iter().any(IpAddr::is_ipv6) {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        listener.bind(SocketAddr::new(any, 0))?;
        let port = listener.listen(BACKLOG)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let waiting = Arc::new(Waiting::default());
        let rdma = Arc::new(Self {
            runtime: runtime.handle().clone(),
            addresses: of_devices.into_iter().map(|ip| SocketAddr::new(ip, port)).collect(),
            waiting: Arc::clone(&waiting),
            breaks: watch::Sender::new(()),
            refusals: refusals.clone(),
        });
        let owner = Arc::downgrade(&rdma);
        std::thread::Builder::new().name("rdma".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::spawn(listen(listener, waiting, refusals));
                let mut look = tokio::time::interval(LOOK);
                while owner.strong_count() > 0 {
                    look.tick().await;
                }
            });
        })?;
        Ok(rdma)
    }

    /// Where others find it.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Makes all links fail, as their devices would (chaos).
    pub(crate) fn break_links(&self) {
        self.breaks.send_replace(());
    }

    /// Waits from now on for whoever comes with the secret.
    pub(crate) fn expect(&self, token: Token) -> impl Future<Output = io::Result<Trial>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        locked(&self.waiting).insert(token, sender);
        // Whoever gives up waiting takes the secret back.
        let expected = Expected { waiting: Arc::clone(&self.waiting), token };
        let (breaks, refusals) = (self.breaks.subscribe(), self.refusals.clone());
        self.on_thread(async move {
            let asked = receiver.await.map_err(|_| io::Error::other("nobody came"))?;
            let token = expected.token;
            drop(expected);
            let pair = QueuePair::new(asked)?;
            pair.id().accept()?;
            until(pair.id(), CmEventKind::Established).await?;
            link::start(pair, token, breaks, refusals)
        })
    }

    /// Connects to one of the addresses, with the secret.
    pub(crate) fn connect(
        &self,
        addresses: Vec<SocketAddr>,
        token: Token,
    ) -> impl Future<Output = io::Result<Trial>> + Send + use<> {
        let (breaks, refusals) = (self.breaks.subscribe(), self.refusals.clone());
        self.on_thread(async move { link::start(dial_one_of(addresses, token).await?, token, breaks, refusals) })
    }

    /// Does it on RDMA's thread, in bounded time. Whoever drops the future ends it.
    fn on_thread<W>(&self, work: W) -> impl Future<Output = io::Result<Trial>> + Send + use<W>
    where
        W: Future<Output = io::Result<Trial>> + Send + 'static,
    {
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn_on(
            async move {
                let late = || Err(io::Error::other(format!("no connection in {CONNECT:?}")));
                tokio::time::timeout(CONNECT, work).await.unwrap_or_else(|_| late())
            },
            &self.runtime,
        );
        async move {
            let ended = || Err(io::Error::other("RDMA's thread has ended"));
            tasks
                .join_next()
                .await
                .map_or_else(ended, |joined| joined.unwrap_or_else(|error| Err(io::Error::other(error))))
        }
    }
}

/// Takes its secret back when it is dropped.
struct Expected {
    waiting: Arc<Waiting>,
    token: Token,
}

impl Drop for Expected {
    fn drop(&mut self) {
        locked(&self.waiting).remove(&self.token);
    }
}

/// Hands those who come with a secret that is waited for to who waits, once; refuses all others.
async fn listen(listener: CmId, waiting: Arc<Waiting>, refusals: Refusals) {
    loop {
        let event = match next(&listener).await {
            Ok(Some(event)) => event,
            Ok(None) => continue,
            // Who asked is not let in; others may be.
            Err(error) => {
                tracing::warn!(%error, "a connection over RDMA was not let in");
                tokio::time::sleep(AFTER_ERROR).await;
                continue;
            }
        };
        let Some(asking) = event.asking else { continue };
        let token = event.said.first_chunk::<32>().copied();
        let waits = token.and_then(|token| locked(&waiting).remove(&token));
        // Whoever waited may have given up.
        let stranger = match waits {
            Some(waits) => waits.send(asking).err(),
            None => Some(asking),
        };
        if let Some(stranger) = stranger {
            stranger.reject();
            refusals.add("a connection over RDMA: nobody waits for its secret".to_owned());
        }
    }
}

/// The first that answers; none waits for one before it that does not.
async fn dial_one_of(addresses: Vec<SocketAddr>, token: Token) -> io::Result<QueuePair> {
    let mut failure = io::Error::other("the other side has no address");
    let (mut addresses, mut dials) = (addresses.into_iter().peekable(), tokio::task::JoinSet::new());
    loop {
        if let Some(address) = addresses.next() {
            dials.spawn(async move {
                dial(address, &token).await.map_err(|error| io::Error::other(format!("{address}: {error}")))
            });
        }
        tokio::select! {
            dialled = dials.join_next() => match dialled.transpose()? {
                Some(Ok(pair)) => return Ok(pair),
                Some(Err(error)) => failure = error,
                None => return Err(failure),
            },
            () = tokio::time::sleep(NEXT_ADDRESS), if addresses.peek().is_some() => {}
        }
    }
}

async fn dial(address: SocketAddr, token: &Token) -> io::Result<QueuePair> {
    let id = CmId::new()?;
    id.resolve_address(address, RESOLVE_MS)?;
    until(&id, CmEventKind::AddressResolved).await?;
    id.resolve_route(RESOLVE_MS)?;
    until(&id, CmEventKind::RouteResolved).await?;
    let pair = QueuePair::new(id)?;
    pair.id().connect(token)?;
    until(pair.id(), CmEventKind::Established).await?;
    Ok(pair)
}

async fn until(id: &CmId, kind: CmEventKind) -> io::Result<()> {
    loop {
        match next(id).await?.map(|event| event.kind) {
            Some(CmEventKind::Ended(why)) => return Err(io::Error::other(why)),
            Some(got) if got == kind => return Ok(()),
            _ => {}
        }
    }
}

/// The next event, or none if it was not there yet.
async fn next(id: &CmId) -> io::Result<Option<sys::CmEvent>> {
    if let Some(event) = id.event()? {
        return Ok(Some(event));
    }
    id.watch()?.readable().await?;
    id.event()
}

/// What is written to prove a path: as long as a fragment can be, and different for each secret.
fn probe(token: &Token) -> Bytes {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, token);
    let blocks = (0..(FRAGMENT_MAX / 32) as u32).map(|n| ring::hmac::sign(&key, &n.to_le_bytes()));
    blocks.flat_map(|block| block.as_ref().to_vec()).collect::<Vec<u8>>().into()
}

/// Packets and words of a peer for a link: how long each is, and whether it is a word, comes before it.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Some((kind, mut rest)) = bytes.split_first() else { return };
    let mut core = protocol::Core::new(kind & 1 == 0, FRAGMENT_MAX as u32);
    for slot in 0..packet::SLOTS as u8 {
        core.grant(packet::SlotGrant { slot, address: 0, key: 0 });
    }
    core.flush();
    if kind & 2 == 0 {
        core.proven();
        core.begin(0);
    }
    while let Some((length, more)) = rest.split_first() {
        let (piece, more) = more.split_at(more.len().min(usize::from(length >> 1)));
        rest = more;
        let effects = match piece.first_chunk() {
            Some(word) if length & 1 == 1 => core.on_write(u32::from_le_bytes(*word)).map(|effect| vec![effect]),
            _ => core.on_packet(piece),
        };
        let Ok(effects) = effects else { return };
        for effect in effects {
            match effect {
                protocol::Effect::DeliverSlot(_, slot, length, _) | protocol::Effect::Check(slot, length) => {
                    assert!(usize::from(slot) < packet::SLOTS && length as usize <= FRAGMENT_MAX);
                    core.grant(packet::SlotGrant { slot, address: 0, key: 0 });
                }
                protocol::Effect::Deliver(_) => {}
                other => panic!("{other:?} comes of what a peer sends"),
            }
        }
        core.posted();
        core.flush();
    }
}
