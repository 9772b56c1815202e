//! Ends that break the rules, on devices: these tests fail where there is none. `make rdma` runs them where there are two.

use super::packet::{Immediate, Packet, SlotGrant};
use super::sys::Done;
use super::*;
use crate::hub::HubEvent;
use smallvec::smallvec;
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(10);

struct Machine {
    rdma: Arc<Rdma>,
    refusals: Refusals,
    events: mpsc::Receiver<HubEvent>,
}

fn machine() -> Machine {
    let (sender, events) = mpsc::channel(16);
    let refusals = Refusals::new(sender);
    let rdma = Rdma::start(refusals.clone()).expect("a machine with RDMA devices");
    Machine { rdma, refusals, events }
}

/// An end as it should be, and one that does what it is told.
async fn ends(machine: &Machine, address: SocketAddr, token: Token) -> (Trial, QueuePair) {
    let expecting = tokio::spawn(machine.rdma.expect(token));
    let pair = dial(address, &token).await.unwrap();
    (expecting.await.unwrap().unwrap(), pair)
}

async fn done(pair: &mut QueuePair) -> io::Result<Done> {
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        match pair.done()? {
            Some(done) => return Ok(done),
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
        assert!(tokio::time::Instant::now() < until, "nothing ends");
    }
}

async fn packet(pair: &mut QueuePair) -> Packet {
    loop {
        if let Done::Received(buffer, length) = done(pair).await.unwrap() {
            return Packet::read(pair.packet(buffer, length)).unwrap();
        }
    }
}

/// Says that a slot was written, with the write or behind it.
fn write(pair: &mut QueuePair, grant: SlotGrant, bytes: Bytes, said: Immediate) {
    let with_words = pair.has_words();
    pair.write(grant, smallvec![bytes], with_words.then(|| said.into())).unwrap();
    if !with_words {
        let packet = Packet { words: vec![said.into()], ..Packet::default() };
        pair.send(|buffer| packet.write(buffer)).unwrap();
    }
}

async fn why(mut trial: Trial) -> String {
    let ended = trial.ended.take().expect("it is there once");
    tokio::time::timeout(PATIENCE, ended).await.expect("the link ends").unwrap()
}

/// Until what the end asked for has failed.
async fn fails(pair: &mut QueuePair) -> String {
    loop {
        if let Err(error) = done(pair).await {
            return error.to_string();
        }
    }
}

/// A secret is of one use, and nobody comes in without.
#[tokio::test]
async fn who_has_no_secret_is_refused_and_counted() {
    let mut machine = machine();
    for (round, address) in (0..).zip(machine.rdma.addresses().to_vec()) {
        let (_trial, _pair) = ends(&machine, address, [1; 32]).await;
        assert!(dial(address, &[1; 32]).await.is_err(), "it is used up");
        assert!(dial(address, &[2; 32]).await.is_err(), "nobody waits for it");
        assert_eq!(machine.refusals.count(), 2 * round + 2);
        for _ in 0..2 {
            assert!(matches!(machine.events.try_recv(), Ok(HubEvent::Refused(why)) if why.contains("RDMA")));
        }
    }
}

/// Memory is written with the key that was granted for it, once: the device refuses another key, and the one that was revoked.
#[tokio::test]
async fn a_wrong_key_and_a_revoked_one_write_nothing() {
    let machine = machine();
    for address in machine.rdma.addresses().to_vec() {
        let (trial, mut pair) = ends(&machine, address, [3; 32]).await;
        let grant = packet(&mut pair).await.grants[0];
        pair.write(SlotGrant { key: grant.key ^ 1, ..grant }, smallvec![Bytes::from(vec![1; 100])], None).unwrap();
        let (ours, theirs) = (fails(&mut pair).await, why(trial).await);
        println!("{address}: another key: {ours}; {theirs}");

        let (trial, mut pair) = ends(&machine, address, [4; 32]).await;
        let grant = packet(&mut pair).await.grants[0];
        let said = Immediate { slot: grant.slot, length: FRAGMENT_MAX as u32, last: true, probe: true };
        write(&mut pair, grant, probe(&[4; 32]), said);
        let again = loop {
            let granted = packet(&mut pair).await.grants;
            if let Some(again) = granted.into_iter().find(|g| g.slot == grant.slot) {
                break again;
            }
        };
        assert_ne!(again.key, grant.key, "a key for each write");
        pair.write(grant, smallvec![Bytes::from(vec![1; 100])], None).unwrap();
        let (ours, theirs) = (fails(&mut pair).await, why(trial).await);
        println!("{address}: a revoked key: {ours}; {theirs}");
    }
}

/// What is no packet, and a word of a slot that was not granted, end the link, and count.
#[tokio::test]
async fn garbage_ends_the_link_and_is_counted() {
    let machine = machine();
    for (round, address) in (1..).zip(machine.rdma.addresses().to_vec()) {
        let (trial, mut pair) = ends(&machine, address, [5; 32]).await;
        pair.send(|buffer| {
            buffer[..100].fill(0xFF);
            100
        })
        .unwrap();
        let told = why(trial).await;
        assert!(told.contains("claims 255 grants"), "{told}");

        let (trial, mut pair) = ends(&machine, address, [6; 32]).await;
        let grant = packet(&mut pair).await.grants[0];
        let said = Immediate { slot: grant.slot, length: 100, last: true, probe: false };
        write(&mut pair, grant, Bytes::from(vec![1; 100]), said);
        let told = why(trial).await;
        assert!(told.contains("before the path is proven"), "{told}");
        assert_eq!(machine.refusals.count(), 2 * round);
    }
}
