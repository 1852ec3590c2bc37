//! openraft's network, on top of the peers: one client per target and purpose.
//!
//! Nothing here connects or waits when a client is made, because openraft makes
//! them inside its core. Pre-vote and leader transfer are real: openraft's
//! defaults would grant every pre-vote and lose every transfer.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use openraft::StorageError;
use openraft::alias::ErrorSourceOf;
use openraft::errors::{
    ErrorSource as _, NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption, RPCTypes,
    RaftNetworkFactory,
};
use openraft::raft::{SnapshotResponse, TransferLeaderResponse};
use parking_lot::Mutex;

use super::peers::Peers;
use super::state_machine::{Snapshot, SnapshotData};
use super::transport::{
    AppendRequest, AppendResult, BoxFuture, PeerError, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use super::types::{TypeConfig, Vote};
use crate::resilience::{self, BackoffOptions};
use crate::types::{Member, NodeId};

/// Between two attempts to replicate to a peer that is away, beside [`PAUSE_MIN`].
const BACKOFF: BackoffOptions =
    BackoffOptions::exponential(Duration::from_millis(50), Duration::from_millis(500));
/// Jitter may draw a wait of nothing; an attempt costs openraft's core a message.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// Makes openraft's clients.
pub(super) struct NetworkFactory {
    pub peers: Arc<Peers>,
}

/// What a client is for; each purpose has its own connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Replicate,
    Heartbeat,
}

/// One of openraft's clients.
pub(super) struct Network {
    peers: Arc<Peers>,
    target: NodeId,
    purpose: Purpose,
}

impl NetworkFactory {
    fn client(&self, target: NodeId, member: &Member, purpose: Purpose) -> Network {
        self.peers.directory().update(target, member);
        Network { peers: self.peers.clone(), target, purpose }
    }
}

impl RaftNetworkFactory<TypeConfig> for NetworkFactory {
    type Network = Network;

    async fn new_client(&mut self, target: NodeId, member: &Member) -> Network {
        self.client(target, member, Purpose::Replicate)
    }

    async fn new_heartbeat_client(&mut self, target: NodeId, member: &Member) -> Network {
        self.client(target, member, Purpose::Heartbeat)
    }
}

type Answers<'s> = BoxStream<'s, Result<AppendResult, RPCError<TypeConfig>>>;

impl NetStreamAppend<TypeConfig> for Network {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<Answers<'s>, RPCError<TypeConfig>>>
    where
        S: Stream<Item = AppendRequest> + Send + Unpin + 'static,
    {
        match self.purpose {
            Purpose::Heartbeat => std::future::ready(Ok(self.heartbeats(input, option.soft_ttl()))).boxed(),
            Purpose::Replicate => self.pipeline(input).boxed(),
        }
    }
}

impl Network {
    /// Each request as a call of its own.
    fn heartbeats<'s, S>(&'s self, input: S, timeout: Duration) -> Answers<'s>
    where
        S: Stream<Item = AppendRequest> + Send + Unpin + 'static,
    {
        let answers = stream::unfold(Some(input), move |input| async move {
            let mut input = input?;
            let request = input.next().await?;
            let answer = self.peers.heartbeat(self.target, request, timeout).await;
            let more = matches!(answer, Ok(Ok(_))).then_some(input);
            Some((answer.map_err(|error| self.rpc_error(RPCTypes::AppendEntries, error)), more))
        });
        answers.boxed()
    }

    /// Requests go out as they come; answers come back in their order. openraft
    /// sets no limit to such a stream and offers three quarters of a heartbeat
    /// interval as a hint, which one slow fsync would break; so an answer may
    /// take as long as the peers' timeout, and an idle stream may live on.
    ///
    /// The first request is taken before anything can fail: openraft waits its
    /// backoff out where it makes a request and nowhere else, so a stream that
    /// could not be opened would be tried again at once, for ever.
    async fn pipeline<'s, S>(&'s mut self, mut input: S) -> Result<Answers<'s>, RPCError<TypeConfig>>
    where
        S: Stream<Item = AppendRequest> + Send + Unpin + 'static,
    {
        let Some(first) = input.next().await else { return Ok(stream::empty().boxed()) };
        let input = stream::iter([first]).chain(input);
        let sent_at = Arc::new(Mutex::new(VecDeque::new()));
        let (sending, env) = (sent_at.clone(), self.peers.env().clone());
        let requests = input.inspect(move |_| sending.lock().push_back(env.monotonic())).boxed();
        #[cfg(not(feature = "mutants"))]
        let opened = self.peers.append(self.target, requests).await;
        #[cfg(feature = "mutants")]
        let opened = super::early::append(&self.peers, self.target, requests).await;
        let answers = opened.map_err(|error| self.rpc_error(RPCTypes::AppendEntries, error))?;
        let this = &*self;
        let answers = stream::unfold(Some(answers), move |answers| {
            let sent_at = sent_at.clone();
            async move {
                let mut answers = answers?;
                let answer = this.next_answer(&mut answers, &sent_at).await?;
                let more = matches!(answer, Ok(Ok(_))).then_some(answers);
                if answer.is_err() {
                    this.peers.note(this.target, &answer);
                }
                Some((answer.map_err(|error| this.rpc_error(RPCTypes::AppendEntries, error)), more))
            }
        });
        Ok(answers.boxed())
    }

    /// The next answer, or a timeout when a request waits for too long.
    async fn next_answer(
        &self,
        answers: &mut super::transport::BoxStream<Result<AppendResult, PeerError>>,
        sent_at: &Mutex<VecDeque<Duration>>,
    ) -> Option<Result<AppendResult, PeerError>> {
        let limit = self.peers.timeouts().append;
        loop {
            // Looking four times per limit finds a stalled stream soon after it.
            if let Ok(answer) = tokio::time::timeout(limit / 4, answers.next()).await {
                sent_at.lock().pop_front();
                return answer;
            }
            let oldest = sent_at.lock().front().copied();
            let now = self.peers.env().monotonic();
            if oldest.is_some_and(|oldest| now.saturating_sub(oldest) >= limit) {
                return Some(Err(PeerError::Timeout(limit)));
            }
        }
    }

    fn rpc_error(&self, action: RPCTypes, error: PeerError) -> RPCError<TypeConfig> {
        match error {
            PeerError::Timeout(timeout) => {
                let (id, target) = (self.peers.local().node, self.target);
                RPCError::Timeout(Timeout { action, id, target, timeout })
            }
            PeerError::Lost(_) => RPCError::Network(NetworkError::new(&error)),
            _ => RPCError::Unreachable(Unreachable::new(&error)),
        }
    }
}

impl NetVote<TypeConfig> for Network {
    async fn vote(
        &mut self,
        request: VoteRequest,
        option: RPCOption,
    ) -> Result<VoteResponse, RPCError<TypeConfig>> {
        let answer = self.peers.vote(self.target, request, false, option.soft_ttl()).await;
        answer.map_err(|error| self.rpc_error(RPCTypes::Vote, error))
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest,
        option: RPCOption,
    ) -> Result<VoteResponse, RPCError<TypeConfig>> {
        let answer = self.peers.vote(self.target, request, true, option.soft_ttl()).await;
        answer.map_err(|error| self.rpc_error(RPCTypes::Vote, error))
    }
}

impl NetTransferLeader<TypeConfig> for Network {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let answer = self.peers.transfer_leader(self.target, request, option.soft_ttl()).await;
        answer.map_err(|error| self.rpc_error(RPCTypes::TransferLeader, error))
    }
}

impl NetSnapshot<TypeConfig> for Network {
    type SnapshotData = SnapshotData;

    async fn full_snapshot(
        &mut self,
        leader: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let signature = snapshot.meta.signature();
        let SnapshotData::Stored(stored) = snapshot.snapshot else {
            let reason = "only a snapshot of this node's own can be sent";
            return Err(StreamingError::Unreachable(Unreachable::from_string(reason)));
        };
        let sent = tokio::select! {
            sent = self.peers.snapshot(self.target, leader, stored) => sent,
            closed = cancel => return Err(StreamingError::Closed(closed)),
        };
        match sent {
            Ok(vote) => Ok(SnapshotResponse::new(vote)),
            // This node's own snapshot is damaged: the end of it, not of the peer.
            Err(error @ PeerError::Disk(_)) => {
                let source = ErrorSourceOf::<TypeConfig>::from_error(&error);
                Err(StreamingError::StorageError(StorageError::read_snapshot(Some(signature), source)))
            }
            // An immediate second attempt would only find the same peer.
            Err(error @ (PeerError::Lost(_) | PeerError::Failed(_))) => {
                Err(StreamingError::Unreachable(Unreachable::new(&error)))
            }
            Err(error) => Err(self.rpc_error(RPCTypes::InstallSnapshot, error).into()),
        }
    }
}

impl NetBackoff<TypeConfig> for Network {
    fn backoff(&self) -> Option<Backoff> {
        let env = self.peers.env().clone();
        let mut backoff = resilience::Backoff::new(BACKOFF);
        let waits = std::iter::from_fn(move || Some(PAUSE_MIN + backoff.next_wait(env.random_u64())));
        Some(Backoff::new(waits))
    }
}
