//! Calls: one request and one answer between processes of a job, beside its sessions. They are for protocols that repeat
//! what was lost by themselves: a call that fails may have arrived or not.
//!
//! - CA-1: a request and an answer have at most [`CALL_MAX`] bytes; who sends more loses the connection.
//! - CA-2: at most [`QUEUE`] calls wait for whoever answers; further ones wait unread in their streams. One whose request does not come in
//!   [`READ`] ends.

use crate::credentials::NAME;
use crate::quic::{QuicError, explain};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Bytes of a request or an answer.
pub const CALL_MAX: usize = 64 << 20;
/// Calls that may wait to be answered.
pub(crate) const QUEUE: usize = 64;

/// Until a request has come.
const READ: Duration = Duration::from_secs(10);

/// A request of another process.
#[derive(Debug)]
pub struct Call {
    /// What it asks.
    pub request: Vec<u8>,
    answer: oneshot::Sender<Vec<u8>>,
}

impl Call {
    /// Answers it. Who asked may not wait any more.
    pub fn answer(self, answer: Vec<u8>) {
        let _ = self.answer.send(answer);
    }
}

/// Calls one process, over one connection as long as it holds.
pub struct Caller {
    endpoint: Endpoint,
    config: quinn::ClientConfig,
    address: SocketAddr,
    connection: Option<Connection>,
    /// A connection that is being made: it goes on when a call is given up.
    making: Option<JoinHandle<Result<Connection, QuicError>>>,
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Caller({})", self.address)
    }
}

impl Caller {
    pub(crate) fn new(endpoint: Endpoint, config: quinn::ClientConfig, address: SocketAddr) -> Self {
        Self { endpoint, config, address, connection: None, making: None }
    }

    /// Asks and waits for the answer; how long is the caller's business.
    pub async fn call(&mut self, request: &[u8]) -> Result<Vec<u8>, QuicError> {
        let address = self.address;
        let unreachable = |reason: String| QuicError::Unreachable { address, reason };
        let connection = self.connected().await?;
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| explain(address, &e))?;
        send.write_all(request).await.map_err(|e| unreachable(e.to_string()))?;
        let _ = send.finish();
        receive.read_to_end(CALL_MAX).await.map_err(|e| unreachable(e.to_string()))
    }

    async fn connected(&mut self) -> Result<Connection, QuicError> {
        if let Some(connection) = self.connection.as_ref().filter(|c| c.close_reason().is_none()) {
            return Ok(connection.clone());
        }
        let (endpoint, config, address) = (&self.endpoint, &self.config, self.address);
        let making = self.making.get_or_insert_with(|| {
            let connecting = endpoint.connect_with(config.clone(), address, NAME);
            tokio::spawn(async move {
                let unreachable = |reason: String| QuicError::Unreachable { address, reason };
                connecting.map_err(|e| unreachable(e.to_string()))?.await.map_err(|e| explain(address, &e))
            })
        });
        let made = making.await;
        self.making = None;
        let connection = made.map_err(|e| QuicError::Unreachable { address, reason: e.to_string() })??;
        self.connection = Some(connection.clone());
        Ok(connection)
    }
}

/// Hands a connection's calls on until it ends.
pub(crate) async fn serve(connection: Connection, calls: mpsc::Sender<Call>) {
    while let Ok((send, receive)) = connection.accept_bi().await {
        let (connection, calls) = (connection.clone(), calls.clone());
        tokio::spawn(async move {
            if let Err(why) = pass(send, receive, &calls).await {
                connection.close(VarInt::from_u32(1), why.as_bytes());
            }
        });
    }
}

async fn pass(mut send: SendStream, mut receive: RecvStream, calls: &mpsc::Sender<Call>) -> Result<(), String> {
    let place = calls.reserve().await.map_err(|_| "nobody answers any more".to_owned())?;
    let read = tokio::time::timeout(READ, receive.read_to_end(CALL_MAX)).await;
    let request = read.map_err(|_| format!("a request took longer than {READ:?}"))?.map_err(|e| e.to_string())?;
    let (answer, answered) = oneshot::channel();
    place.send(Call { request, answer });
    let Ok(answer) = answered.await else {
        // It is not answered: the caller's stream ends without one.
        let _ = send.reset(VarInt::from_u32(0));
        return Ok(());
    };
    // A caller that has gone needs no answer.
    let _ = send.write_all(&answer).await;
    let _ = send.finish();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::tests::hubs;

    #[tokio::test]
    async fn calls_are_answered_in_any_order_and_again_after_a_lost_connection() {
        let [(a, _), (b, _)] = hubs();
        let mut calls = b.answer_calls();
        tokio::spawn(async move {
            while let Some(call) = calls.recv().await {
                let answer = call.request.iter().rev().copied().collect();
                call.answer(answer);
            }
        });
        let mut caller = a.caller(b.address().unwrap());
        for length in [0, 1, 3, 1 << 20] {
            let request: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let expected: Vec<u8> = request.iter().rev().copied().collect();
            assert_eq!(caller.call(&request).await.unwrap(), expected);
        }
        caller.connection.as_ref().unwrap().close(VarInt::from_u32(0), b"a test");
        assert_eq!(caller.call(b"ab").await.unwrap(), b"ba");
    }

    /// CA-1, CA-2: what is too long fails, what nobody answers fails, and sessions may be refused meanwhile.
    #[tokio::test]
    async fn what_cannot_be_answered_fails() {
        let [(a, _), (b, _events)] = hubs();
        let address = b.address().unwrap();
        assert!(a.caller(address).call(b"early").await.is_err(), "nobody answers yet");
        let mut calls = b.answer_calls();
        let answering = tokio::spawn(async move {
            let first: Call = calls.recv().await.unwrap();
            drop(first);
            for _ in 0..QUEUE {
                calls.recv().await.unwrap().answer(Vec::new());
            }
        });
        assert!(a.caller(address).call(b"dropped").await.is_err());
        assert!(a.caller(address).call(&vec![0; CALL_MAX + 1]).await.is_err());
        let calling = (0..QUEUE).map(|_| {
            let mut caller = a.caller(address);
            tokio::spawn(async move { caller.call(b"x").await.unwrap() })
        });
        for call in calling.collect::<Vec<_>>() {
            assert_eq!(call.await.unwrap(), b"");
        }
        answering.await.unwrap();
    }
}
