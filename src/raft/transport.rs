//! The seam to the other members: what one node can ask of another, and how it
//! can fail.
//!
//! A [`Transport`] carries; it has no opinion. Deadlines, breakers, retries and
//! openraft's expectations are `peers`' business above it, identity checks and
//! the guard around snapshots are `receiver`'s at the other end. So a simulation
//! that replaces the transport still runs all of those.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
pub use futures_util::future::BoxFuture;
use futures_util::stream;
use openraft::raft::{
    AppendEntriesRequest, StreamAppendResult, TransferLeaderRequest as Transfer, TransferLeaderResponse,
    VoteRequest as Request, VoteResponse as Response,
};

use super::types::{TypeConfig, Vote};
use crate::mutant::{self, Mutant};
use crate::storage::snapshot::StoredSnapshot;
use crate::types::{ClusterId, DiskId, NodeId};

/// A stream that owns what it needs.
pub type BoxStream<T> = stream::BoxStream<'static, T>;
/// Entries for a follower's log, or none as a heartbeat.
pub type AppendRequest = AppendEntriesRequest<TypeConfig>;
/// How far the follower's log matches, or why the entries were not taken.
pub type AppendResult = StreamAppendResult<TypeConfig>;
/// A request for a vote, or the question whether it would be granted.
pub type VoteRequest = Request<TypeConfig>;
/// The answer to a [`VoteRequest`].
pub type VoteResponse = Response<TypeConfig>;
/// A leader tells everyone who shall follow it.
pub type TransferLeaderRequest = Transfer<TypeConfig>;
/// Whether the target of a transfer began its election.
pub type TransferLeaderResult = TransferLeaderResponse<TypeConfig>;

/// Who a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its id.
    pub node: NodeId,
    /// Its data directory.
    pub disk: DiskId,
}

/// Whom a call is meant for, and who makes it. Travels with every call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Envelope {
    /// The caller's cluster.
    pub cluster: ClusterId,
    /// The member that is meant.
    pub target: NodeId,
    /// The data directory that is meant; 0 when the caller does not know it.
    pub target_disk: DiskId,
    /// The caller.
    pub sender: NodeId,
}

/// Why a call was not for the node it reached. Trying again does not help; a
/// person, or a change of the members, must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The node belongs to another cluster.
    #[error("it is a member of another cluster, {actual:x}")]
    WrongCluster {
        /// Its own cluster.
        actual: ClusterId,
    },
    /// The address leads to another member.
    #[error("the address leads to another member, {actual:x}")]
    WrongNode {
        /// The member there.
        actual: NodeId,
    },
    /// The member's data directory is not the one the cluster knows: it was
    /// wiped or replaced, and must not speak for the member.
    #[error("its data directory is {actual:x}, not the one the cluster knows")]
    WrongDisk {
        /// The directory there.
        actual: DiskId,
    },
}

impl Local {
    /// Whether a call with this envelope is for this node.
    ///
    /// # Errors
    /// [`Refusal`] naming what does not match.
    pub fn check(&self, envelope: &Envelope) -> Result<(), Refusal> {
        if envelope.cluster != self.cluster {
            return Err(Refusal::WrongCluster { actual: self.cluster });
        }
        if envelope.target != self.node {
            return Err(Refusal::WrongNode { actual: self.node });
        }
        let other_disk = envelope.target_disk != 0 && envelope.target_disk != self.disk;
        if other_disk && !mutant::is(Mutant::UnsafeMembershipChange) {
            return Err(Refusal::WrongDisk { actual: self.disk });
        }
        Ok(())
    }
}

/// Why a peer gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No connection, or the breaker is open: the call did not leave this node.
    #[error("not sent: {0}")]
    NotSent(String),
    /// The call was refused before anything was done.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The peer cannot serve it now and did nothing.
    #[error("busy: {0}")]
    Busy(String),
    /// The time ran out. It may have happened.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The connection broke. It may have happened.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The peer failed, or one of the two sent something malformed. It may have
    /// happened.
    #[error("peer failed: {0}")]
    Failed(String),
    /// This node's own disk failed while it was sending.
    #[error("own disk: {0}")]
    Disk(String),
}

impl PeerError {
    /// Whether the peer may have acted on the call.
    pub fn may_have_happened(&self) -> bool {
        matches!(self, PeerError::Timeout(_) | PeerError::Lost(_) | PeerError::Failed(_))
    }

    /// Whether the same call may succeed later without anybody's help.
    pub fn may_retry(&self) -> bool {
        !matches!(self, PeerError::Refused(_) | PeerError::Disk(_))
    }

    /// Whether it tells something about the peer's health.
    pub fn is_failure(&self) -> bool {
        matches!(self, PeerError::NotSent(_) | PeerError::Timeout(_) | PeerError::Lost(_))
    }
}

/// How long a snapshot's transfer may take.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotTimeouts {
    /// Without progress.
    pub idle: Duration,
    /// For installing, after everything has arrived.
    pub install: Duration,
}

/// What a call gives, in its own time.
pub type PeerFuture<T> = BoxFuture<'static, Result<T, PeerError>>;

/// Carries calls to the members. Where they are reached it takes from the
/// [`Directory`](super::peers::Directory) at the moment of connecting.
///
/// No method waits before it returns its future, and dropping a future or a
/// stream abandons the call. Each lane (append; heartbeat and votes; snapshot;
/// control) has a connection of its own, so that none delays another.
pub trait Transport: Send + Sync + 'static {
    /// Opens a stream of appends. Answers come in the order of the requests;
    /// the stream ends after the first that is an error of either kind.
    /// Opening fails after `timeout`; keeping the stream moving is the caller's.
    fn append(
        &self,
        to: Envelope,
        requests: BoxStream<AppendRequest>,
        timeout: Duration,
    ) -> PeerFuture<BoxStream<Result<AppendResult, PeerError>>>;

    /// Sends one append without entries.
    fn heartbeat(&self, to: Envelope, request: AppendRequest, timeout: Duration) -> PeerFuture<AppendResult>;

    /// Asks for a vote.
    fn vote(&self, to: Envelope, request: VoteRequest, timeout: Duration) -> PeerFuture<VoteResponse>;

    /// Asks whether a vote would be granted.
    fn pre_vote(&self, to: Envelope, request: VoteRequest, timeout: Duration) -> PeerFuture<VoteResponse>;

    /// Announces a transfer of leadership.
    fn transfer_leader(
        &self,
        to: Envelope,
        request: TransferLeaderRequest,
        timeout: Duration,
    ) -> PeerFuture<TransferLeaderResult>;

    /// Sends a snapshot and waits until it is installed; returns the vote that
    /// the peer holds then.
    fn snapshot(
        &self,
        to: Envelope,
        leader: Vote,
        snapshot: Arc<StoredSnapshot>,
        timeouts: SnapshotTimeouts,
    ) -> PeerFuture<Vote>;

    /// One control call: `path` is the method's full gRPC path, `body` and the
    /// answer its encoded messages.
    fn call(&self, to: Envelope, path: &'static str, body: Bytes, timeout: Duration) -> PeerFuture<Bytes>;

    /// One control stream, both ways. Opening fails after `timeout`.
    fn call_stream(
        &self,
        to: Envelope,
        path: &'static str,
        bodies: BoxStream<Bytes>,
        timeout: Duration,
    ) -> PeerFuture<BoxStream<Result<Bytes, PeerError>>>;
}
