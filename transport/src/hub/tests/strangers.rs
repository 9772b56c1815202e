//! What a process refuses, counts and tells, and outlives.

use super::*;
use crate::credentials::NAME;
use crate::disturb::Disturbances;
use quinn::{Connection, RecvStream, SendStream};

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_job_is_refused_and_both_sides_say_so() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    Credentials::create(ours.path()).unwrap();
    Credentials::create(theirs.path()).unwrap();
    let (a, _a_events) = hub(theirs.path(), 1);
    let (b, mut b_events) = hub(ours.path(), 2);
    let error = a.dial(b.address().unwrap()).await.unwrap_err();
    assert!(matches!(error, QuicError::ForeignJob { .. }), "{error}");
    assert!(matches!(b_events.recv().await, Some(HubEvent::Refused(_))));
}

/// A certificate of the job's own authority that has expired, at either end.
#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_refused_and_both_sides_say_so() {
    let (good, old) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    crate::credentials::with_expired(good.path(), old.path());
    let (a, mut a_events) = hub(old.path(), 1);
    let (b, mut b_events) = hub(good.path(), 2);
    for (from, to, events) in [(&a, &b, &mut b_events), (&b, &a, &mut a_events)] {
        let error = from.dial(to.address().unwrap()).await.unwrap_err();
        assert!(matches!(error, QuicError::Expired { .. }), "{error}");
        let refused = tokio::time::timeout(Duration::from_secs(5), events.recv()).await.unwrap();
        assert!(matches!(&refused, Some(HubEvent::Refused(why)) if why.contains("expired")), "{refused:?}");
    }
}

async fn refusal(events: &mut mpsc::Receiver<HubEvent>) -> String {
    loop {
        match tokio::time::timeout(Duration::from_secs(5), events.recv()).await.expect("somebody is refused") {
            Some(HubEvent::Refused(why)) => return why,
            Some(_) => {}
            None => panic!("the hub has ended"),
        }
    }
}

/// Whether a process takes sessions, and a message of one.
async fn serves(folder: &std::path::Path, address: SocketAddr, events: &mut mpsc::Receiver<HubEvent>) {
    static NAMES: AtomicU64 = AtomicU64::new(100);
    let name = NAMES.fetch_add(1, Ordering::Relaxed);
    let (other, _other_events) = hub(folder, name);
    other.dial(address).await.unwrap();
    other.send(2, Lane::Control, Message::small(b"still there?".to_vec()));
    let wait = async {
        loop {
            if let Some(HubEvent::Message(from, message)) = events.recv().await
                && from == name
            {
                assert_eq!(message.header[..], b"still there?"[..]);
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), wait).await.expect("it serves others");
}

/// All that a member sent to begin a session, and then, comes again from elsewhere: no session begins, and no message comes again.
#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_is_replayed_begins_nothing() {
    let folder = tempfile::tempdir().unwrap();
    Credentials::create(folder.path()).unwrap();
    let (a, _a_events) = hub(folder.path(), 1);
    let (b, mut b_events) = hub(folder.path(), 2);
    let address = b.address().unwrap();
    let recorded = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&recorded);
    let through = relay(address, move |to, bytes| {
        if to {
            record.lock().unwrap().push(bytes.to_vec());
        }
    });
    a.dial(through.await).await.unwrap();
    a.send(2, Lane::Control, Message::small(b"once".to_vec()));
    assert_eq!(next_message(&mut b_events).await.header[..], b"once"[..]);
    a.shut_down();
    while b.is_linked(1) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    while b_events.try_recv().is_ok() {}

    let all = recorded.lock().unwrap().clone();
    let replaying = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut answers = 0;
    for datagram in &all {
        replaying.send_to(datagram, address).await.unwrap();
        let mut answer = [0; 1 << 16];
        let wait = tokio::time::timeout(Duration::from_millis(20), replaying.recv_from(&mut answer));
        answers += usize::from(wait.await.is_ok());
    }
    assert!(answers > 0, "the handshake's begin is answered, with a fresh half");
    serves(folder.path(), address, &mut b_events).await;
    assert!(!b.is_linked(1), "nobody is taken for the first");
}

/// Datagrams that nobody's QUIC makes.
#[tokio::test(flavor = "multi_thread")]
async fn datagrams_of_garbage_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    Credentials::create(folder.path()).unwrap();
    let (b, mut b_events) = hub(folder.path(), 2);
    let address = b.address().unwrap();
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for n in 0..2000usize {
        let bytes: Vec<u8> = (0..n % 1400 + 1).map(|i| (i * 31 + n * 7 + i * i * n) as u8).collect();
        socket.send_to(&bytes, address).await.unwrap();
    }
    serves(folder.path(), address, &mut b_events).await;
}

/// A member's connection, with its streams, as far as its first link.
async fn member(folder: &std::path::Path, to: SocketAddr) -> (Connection, [(SendStream, RecvStream); 3]) {
    let credentials = Credentials::load(folder).unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let (endpoint, _) = quic::open(any, &credentials, Disturbances::default()).unwrap();
    let connection = endpoint.connect(to, NAME).unwrap().await.unwrap();
    let mut streams = Vec::new();
    for first in [&9u64.to_le_bytes()[..], &[1], &[1]] {
        let mut stream = connection.open_bi().await.unwrap();
        stream.0.write_all(first).await.unwrap();
        streams.push(stream);
    }
    let mut greeting = [0; 32];
    streams[1].1.read_exact(&mut greeting).await.unwrap();
    streams[1].0.write_all(&[0; 32]).await.unwrap();
    (connection, streams.try_into().expect("three"))
}

/// A member that sends garbage on any stream loses its connection; that is counted and told, and others are served.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_of_a_member_ends_its_connection() {
    let folder = tempfile::tempdir().unwrap();
    Credentials::create(folder.path()).unwrap();
    let (b, mut b_events) = hub(folder.path(), 2);
    let address = b.address().unwrap();
    // A fragment of 4 GiB, by its length.
    let mut oversize = [1; 15];
    oversize[11..].fill(0xFF);
    let no_kind = [9; 15];
    let cases: [(usize, &[u8], &str); 4] = [
        (0, &no_kind, "kind 9"),
        (0, &[1, 0xFF, 0xFF, 0, 0, 0, 0], "65535 bytes"),
        (1, &no_kind, "starts with 9"),
        (2, &oversize, "4294967295 bytes"),
    ];
    for (refused, (stream, bytes, why)) in (1..).zip(cases) {
        let (connection, mut streams) = member(folder.path(), address).await;
        streams[stream].0.write_all(bytes).await.unwrap();
        let told = refusal(&mut b_events).await;
        assert!(told.contains("garbage") && told.contains(why), "{told}");
        tokio::time::timeout(Duration::from_secs(5), connection.closed()).await.expect("it is closed");
        assert_eq!(b.refused(), refused);
        serves(folder.path(), address, &mut b_events).await;
    }
}
