//! Sessions over real links: QUIC on loopback, and memory.

mod strangers;

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

fn hub(folder: &std::path::Path, me: Peer) -> (Hub, mpsc::Receiver<HubEvent>) {
    let credentials = Credentials::load(folder).unwrap();
    Hub::open("127.0.0.1:0".parse().unwrap(), &credentials, me).unwrap()
}

/// Two hubs of a job, named 1 and 2.
pub(crate) fn hubs() -> [(Hub, mpsc::Receiver<HubEvent>); 2] {
    let folder = tempfile::tempdir().unwrap();
    Credentials::create(folder.path()).unwrap();
    [1, 2].map(|me| hub(folder.path(), me))
}

async fn next_message(events: &mut mpsc::Receiver<HubEvent>) -> Message {
    loop {
        match events.recv().await.expect("the hub lives") {
            HubEvent::Message(_, message) => return message,
            HubEvent::Up(_) | HubEvent::Down(_) | HubEvent::Way(..) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// HU-4.
#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_was_opened_for_calls_has_no_session_before_it_takes_them() {
    let folder = tempfile::tempdir().unwrap();
    Credentials::create(folder.path()).unwrap();
    let (a, _a_events) = hub(folder.path(), 1);
    let credentials = Credentials::load(folder.path()).unwrap();
    let (b, mut b_events) = Hub::open_for_calls("127.0.0.1:0".parse().unwrap(), &credentials, 2).unwrap();
    let address = b.address().unwrap();
    let early = (0..20).map(|_| {
        let a = a.clone();
        tokio::spawn(async move { a.dial(address).await })
    });
    for dialled in early.collect::<Vec<_>>() {
        let said = dialled.await.unwrap().unwrap_err().to_string();
        assert!(said.contains("takes no sessions now"), "{said}");
    }
    assert!(b_events.try_recv().is_err() && b.ways().is_empty());
    b.take_sessions();
    assert_eq!(a.dial(address).await.unwrap(), 2);
    assert!(matches!(b_events.recv().await, Some(HubEvent::Up(1))));
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_arrive_whole_and_small_messages_pass_them() {
    let [(a, _a_events), (b, mut b_events)] = hubs();
    let address = b.address().unwrap();
    assert_eq!(a.dial(address).await.unwrap(), 2);
    let region = Arc::new((0..10_000_000).map(|i| i as f32).collect::<Vec<f32>>());
    a.send(2, Lane::Bulk, Message { header: b"big".to_vec().into(), regions: vec![Arc::clone(&region)] });
    a.send(2, Lane::Control, Message::small(b"small".to_vec()));
    assert_eq!(next_message(&mut b_events).await.header[..], b"small"[..], "40 MB must not delay a control message");
    let big = next_message(&mut b_events).await;
    assert!(big.header[..] == b"big"[..] && big.regions == [region]);
}

/// HU-1.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_survives_its_links() {
    let [(a, mut a_events), (b, mut b_events)] = hubs();
    let address = b.address().unwrap();
    tokio::spawn(async move { while a_events.recv().await.is_some() {} });
    for n in 0..200u32 {
        if n.is_multiple_of(20) {
            // A new link ends the one before, with whatever is on its way.
            a.dial(address).await.unwrap();
        }
        let region = Arc::new(vec![n as f32; 100_000]);
        a.send(2, Lane::Bulk, Message { header: n.to_le_bytes().to_vec().into(), regions: vec![region] });
    }
    a.keep(2, address);
    for n in 0..200u32 {
        let message = next_message(&mut b_events).await;
        assert_eq!(message.header[..], n.to_le_bytes());
        assert_eq!(*message.regions[0], vec![n as f32; 100_000]);
    }
}

/// HU-1: a wire that loses, delays and is cut for a while costs time, and no message.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_wire_loses_no_message() {
    let [(a, mut a_events), (b, mut b_events)] = hubs();
    let address = b.address().unwrap();
    a.keep(2, address);
    let broken = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&broken);
    tokio::spawn(async move {
        while let Some(event) = a_events.recv().await {
            count.fetch_add(u64::from(matches!(event, HubEvent::Down(_))), Ordering::Relaxed);
        }
    });
    let bad = Disturbance {
        with: None,
        lost_percent: 0,
        both_ways: true,
        delay: Duration::ZERO,
        lasts: Duration::from_millis(700),
    };
    let of = move |n: u32| match n {
        20 => Some(Disturbance { lost_percent: 20, ..bad }),
        60 => Some(Disturbance { delay: Duration::from_millis(30), ..bad }),
        // One way, with one other: longer than a link may be silent.
        100 => Some(Disturbance { lost_percent: 100, both_ways: false, with: Some(address), ..bad }),
        140 => Some(Disturbance { lost_percent: 100, ..bad }),
        _ => None,
    };
    let sender = a.clone();
    tokio::spawn(async move {
        for n in 0..200u32 {
            if let Some(disturbance) = of(n) {
                sender.disturb(disturbance);
            }
            let region = Arc::new(vec![n as f32; 10_000]);
            sender.send(2, Lane::Bulk, Message { header: n.to_le_bytes().to_vec().into(), regions: vec![region] });
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    for n in 0..200u32 {
        let message = tokio::time::timeout(Duration::from_secs(20), next_message(&mut b_events)).await.unwrap();
        assert_eq!((&message.header[..], message.regions[0][0]), (&n.to_le_bytes()[..], n as f32));
    }
    assert!(broken.load(Ordering::Relaxed) > 0, "a cut wire breaks its link");
}

/// HU-1: a wire is cut while who dialled has nothing to say: the other end notices, and need not wait until that one does.
#[tokio::test(flavor = "multi_thread")]
async fn who_accepted_looks_for_who_does_not_know_that_the_wire_was_cut() {
    let [(a, mut a_events), (b, mut b_events)] = hubs();
    a.keep(2, b.address().unwrap());
    a.send(2, Lane::Control, Message::small(b"first".to_vec()));
    assert_eq!(next_message(&mut b_events).await.header[..], b"first"[..]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let lasts = Duration::from_secs(1);
    b.disturb(Disturbance { with: None, lost_percent: 100, both_ways: true, delay: Duration::ZERO, lasts });
    b.send(1, Lane::Control, Message::small(b"second".to_vec()));
    let second = tokio::time::timeout(Duration::from_secs(5), next_message(&mut a_events)).await;
    assert_eq!(second.expect("before who dialled asks").header[..], b"second"[..]);
    a.send(2, Lane::Control, Message::small(b"third".to_vec()));
    assert_eq!(next_message(&mut b_events).await.header[..], b"third"[..]);
}

/// HU-1: who looks for a peer takes nothing from somebody else at its address.
#[tokio::test(flavor = "multi_thread")]
async fn another_life_at_the_address_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    Credentials::create(folder.path()).unwrap();
    let [(a, _a_events), (b, mut b_events)] = [1, 2].map(|me| hub(folder.path(), me));
    let address = a.address().unwrap();
    a.keep(2, b.address().unwrap());
    a.send(2, Lane::Control, Message::small(b"first".to_vec()));
    next_message(&mut b_events).await;
    let lasts = Duration::from_secs(1);
    b.disturb(Disturbance { with: None, lost_percent: 100, both_ways: true, delay: Duration::ZERO, lasts });
    b.send(1, Lane::Control, Message::small(b"second".to_vec()));
    a.shut_down();
    drop(a);
    let credentials = Credentials::load(folder.path()).unwrap();
    let again = async {
        loop {
            match Hub::open(address, &credentials, 3) {
                Ok(opened) => return opened,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let (c, mut c_events) = tokio::time::timeout(Duration::from_secs(5), again).await.expect("the port is free");
    while !matches!(b_events.recv().await, Some(HubEvent::Down(1))) {}
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(c_events.try_recv().is_err() && !b.is_linked(3) && c.ways().is_empty());
}

#[test]
fn of_many_handshakes_those_go_on_whose_address_is_proven_and_of_too_many_none() {
    let [few, most] = HANDSHAKES;
    assert_eq!([(few - 1, false), (few, true)].map(|(taken, proven)| door(taken, proven)), [Door::Open, Door::Open]);
    assert_eq!([door(few, false), door(most, true), door(most, false)], [Door::Retry, Door::Shut, Door::Shut]);
}

/// Passes datagrams between whoever sends some here and `to`, and shows each before: whether it is one for `to`, and its bytes.
async fn relay(to: SocketAddr, mut see: impl FnMut(bool, &mut [u8]) + Send + 'static) -> SocketAddr {
    let near = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let far = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = near.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut there, mut back, mut client) = ([0; 1 << 16], [0; 1 << 16], None);
        loop {
            // A datagram that cannot be passed on is lost, as datagrams are.
            let _ = tokio::select! {
                got = near.recv_from(&mut there) => {
                    let (length, from) = got.unwrap();
                    client = Some(from);
                    see(true, &mut there[..length]);
                    far.send_to(&there[..length], to).await
                }
                got = far.recv_from(&mut back) => {
                    let (length, _) = got.unwrap();
                    see(false, &mut back[..length]);
                    near.send_to(&back[..length], client.unwrap()).await
                }
            };
        }
    });
    address
}

/// HU-1: a flipped bit on the wire is a lost datagram, never another message.
#[tokio::test(flavor = "multi_thread")]
async fn bits_that_flip_on_the_wire_change_nothing() {
    let [(a, mut a_events), (b, mut b_events)] = hubs();
    tokio::spawn(async move { while a_events.recv().await.is_some() {} });
    let garbled = Arc::new(AtomicU64::new(0));
    let (count, mut n) = (Arc::clone(&garbled), 0usize);
    let flip_one_of_ten = move |_, bytes: &mut [u8]| {
        n += 1;
        if n.is_multiple_of(10) {
            bytes[n % bytes.len()] ^= 1 << (n % 8);
            count.fetch_add(1, Ordering::Relaxed);
        }
    };
    a.keep(2, relay(b.address().unwrap(), flip_one_of_ten).await);
    for n in 0..100u32 {
        let region = Arc::new((0..250_000).map(|i| (n * 250_000 + i) as f32).collect::<Vec<f32>>());
        a.send(2, Lane::Bulk, Message { header: n.to_le_bytes().to_vec().into(), regions: vec![region] });
    }
    for n in 0..100u32 {
        let message = next_message(&mut b_events).await;
        assert_eq!(message.header[..], n.to_le_bytes());
        assert!(message.regions[0].iter().enumerate().all(|(i, x)| *x == (n * 250_000 + i as u32) as f32));
    }
    assert!(garbled.load(Ordering::Relaxed) > 100);
}

/// LI-2: a session without messages costs few packets, and holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_at_rest_is_quiet() {
    let [(a, mut a_events), (b, mut b_events)] = hubs();
    let packets = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&packets);
    let counts = move |_, _: &mut [u8]| {
        count.fetch_add(1, Ordering::Relaxed);
    };
    a.keep(2, relay(b.address().unwrap(), counts).await);
    b.send(1, Lane::Control, Message::small(b"one".to_vec()));
    assert_eq!(next_message(&mut a_events).await.header[..], *b"one");
    // The search for how large datagrams may be ends meanwhile.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = packets.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(11)).await;
    let took = packets.load(Ordering::Relaxed) - before;
    assert!((2..=12).contains(&took), "{took} packets in 11 s");
    a.send(2, Lane::Control, Message::small(b"two".to_vec()));
    assert_eq!(next_message(&mut b_events).await.header[..], *b"two");
}

/// HU-1: a session that one side has closed is not taken up again as if nothing had been said.
#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_session_is_broken_on_both_sides() {
    let [(a, mut a_events), (b, mut b_events)] = hubs();
    let address = b.address().unwrap();
    a.dial(address).await.unwrap();
    a.send(2, Lane::Control, Message::small(b"once".to_vec()));
    assert_eq!(next_message(&mut b_events).await.header[..], b"once"[..]);
    b.close(1);
    while !matches!(a_events.recv().await, Some(HubEvent::Down(2))) {}
    // Far fewer messages than a window: nothing was acknowledged yet.
    let _ = a.dial(address).await;
    let broken = async {
        loop {
            match a_events.recv().await.unwrap() {
                HubEvent::Broken(2, _) => return,
                HubEvent::Up(_) | HubEvent::Down(_) | HubEvent::Way(..) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), broken).await.unwrap();
    while let Ok(event) = b_events.try_recv() {
        assert!(!matches!(event, HubEvent::Message(..)), "said once, heard twice");
    }
}

/// A session may go from one kind of link to another in the middle of a message.
#[tokio::test(flavor = "multi_thread")]
async fn memory_and_quic_carry_one_session() {
    let [(a, mut a_events), (b, mut b_events)] = hubs();
    tokio::spawn(async move { while a_events.recv().await.is_some() {} });
    for n in 0..60u32 {
        match n % 20 {
            0 => a.link_in_memory(&b).await,
            10 => {
                a.dial(b.address().unwrap()).await.unwrap();
            }
            _ => {}
        }
        let region = Arc::new(vec![n as f32; 300_000]);
        a.send(2, Lane::Bulk, Message { header: n.to_le_bytes().to_vec().into(), regions: vec![region] });
    }
    for n in 0..60u32 {
        let message = next_message(&mut b_events).await;
        assert_eq!((&message.header[..], message.regions[0][0]), (&n.to_le_bytes()[..], n as f32));
    }
}

/// HU-2, HU-3: a receiver that takes nothing stops its sender's session, not the call that sends.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_receiver_slows_its_sender_and_loses_nothing() {
    let [(a, _a_events), (b, mut b_events)] = hubs();
    a.dial(b.address().unwrap()).await.unwrap();
    let count = 3 * EVENTS;
    for n in 0..count {
        a.send(2, Lane::Bulk, Message::small((n as u32).to_le_bytes().to_vec()));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    // On their way are the receiver's events, what its session and the links hold, and one window.
    let waiting = SEND_QUEUE - a.session(2).messages[at(Lane::Bulk)].capacity();
    assert!(waiting > count - EVENTS - 600, "only {waiting} of {count} still wait at the sender");
    for n in 0..count {
        assert_eq!(next_message(&mut b_events).await.header[..], (n as u32).to_le_bytes());
    }
}

/// HU-2: beyond the bound the session ends, and an event says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_out_of_step_loses_the_session() {
    let folder = tempfile::tempdir().unwrap();
    Credentials::create(folder.path()).unwrap();
    let (a, mut a_events) = hub(folder.path(), 1);
    for _ in 0..SEND_QUEUE + 200 {
        a.send(9, Lane::Bulk, Message::small(Vec::new()));
    }
    assert!(matches!(a_events.recv().await, Some(HubEvent::Broken(9, _))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named() {
    let folder = tempfile::tempdir().unwrap();
    Credentials::create(folder.path()).unwrap();
    let (a, _events) = hub(folder.path(), 1);
    let credentials = Credentials::load(folder.path()).unwrap();
    let error = Hub::open(a.address().unwrap(), &credentials, 2).unwrap_err();
    assert!(error.to_string().contains(&a.address().unwrap().to_string()), "{error}");
}
