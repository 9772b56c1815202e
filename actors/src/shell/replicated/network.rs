//! Raft's messages between supervisors: calls of the transport.

use super::{Raft, Types, decode, encode};
use everstep_transport::{Call, Caller, Hub};
use openraft::error::{
    InstallSnapshotError, NetworkError, PayloadTooLarge, RPCError, RaftError, RemoteError, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use openraft::{AnyError, BasicNode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;

/// A supervisor that does not answer is asked again after so long.
const AGAIN: Duration = Duration::from_millis(50);

/// Bytes of entries in one message, unless it is one entry: Raft gives each message the time of a sign of life.
const APPEND_MAX: usize = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Append(AppendEntriesRequest<Types>),
    Vote(VoteRequest<u64>),
    Snapshot(InstallSnapshotRequest<Types>),
}

/// Answers the other supervisors' calls until the process ends.
pub(super) async fn answer(raft: Raft, mut calls: mpsc::Receiver<Call>) {
    while let Some(call) = calls.recv().await {
        let raft = raft.clone();
        tokio::spawn(async move {
            let answer = match decode(&call.request) {
                Ok(Request::Append(request)) => encode(&raft.append_entries(request).await),
                Ok(Request::Vote(request)) => encode(&raft.vote(request).await),
                Ok(Request::Snapshot(request)) => encode(&raft.install_snapshot(request).await),
                Err(why) => {
                    tracing::warn!(why, "garbage from another supervisor");
                    return;
                }
            };
            call.answer(answer);
        });
    }
}

/// Makes a caller for each supervisor. Where they are is told anew to every life: a run may go on elsewhere.
#[derive(Debug)]
pub(super) struct Network {
    pub(super) hub: Hub,
    /// By number, from 1.
    pub(super) addresses: Vec<SocketAddr>,
}

/// Calls one supervisor.
#[derive(Debug)]
pub(super) struct Remote {
    number: u64,
    /// None: it is none of those that this life was told of.
    caller: Option<Caller>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Remote;

    async fn new_client(&mut self, number: u64, _: &BasicNode) -> Remote {
        let address = usize::try_from(number).ok().and_then(|n| self.addresses.get(n.checked_sub(1)?));
        Remote { number, caller: address.map(|address| self.hub.caller(*address)) }
    }
}

type Failure<E> = RPCError<u64, BasicNode, E>;

impl Remote {
    async fn ask<A, E>(&mut self, request: &[u8], option: &RPCOption) -> Result<A, Failure<E>>
    where
        A: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        let unreachable = |why: String| RPCError::Unreachable(Unreachable::new(&AnyError::error(why)));
        let caller = self.caller.as_mut().ok_or_else(|| unreachable("it has no address".to_owned()))?;
        let answer = tokio::time::timeout(option.hard_ttl(), caller.call(request)).await;
        let answer = answer.map_err(|late| unreachable(late.to_string()))?.map_err(|e| unreachable(e.to_string()))?;
        let answer: Result<A, E> =
            decode(&answer).map_err(|why| RPCError::Network(NetworkError::new(&AnyError::error(why))))?;
        answer.map_err(|e| RPCError::RemoteError(RemoteError::new(self.number, e)))
    }
}

impl RaftNetwork<Types> for Remote {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failure<RaftError<u64>>> {
        let entries = request.entries.len() as u64;
        let request = encode(&Request::Append(request));
        if request.len() > APPEND_MAX && entries > 1 {
            return Err(RPCError::PayloadTooLarge(PayloadTooLarge::new_entries_hint(entries / 2)));
        }
        self.ask(&request, &option).await
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<Types>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failure<RaftError<u64, InstallSnapshotError>>> {
        self.ask(&encode(&Request::Snapshot(request)), &option).await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, Failure<RaftError<u64>>> {
        self.ask(&encode(&Request::Vote(request)), &option).await
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(AGAIN))
    }
}
