//! What members say to each other beside the Raft protocol, and the seam over
//! which they say it.
//!
//! Only values and traits: gRPC is one way to carry them, a test's channels
//! another. `Ask` and `Answer` travel as `storage::codec` encodes them, so
//! their variants are appended, never reordered or removed.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;

use super::{MemberView, NodeError};
use crate::types::{ClusterId, DiskId, LeaseId, Member, MemberKind, NodeId};

/// Batches that may wait on either side of a [`ForwardLink`]; the sender waits
/// beyond it.
pub const FORWARD_LINK_BATCHES: usize = 64;

/// Why a message got no answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ControlError {
    /// It was certainly not received.
    #[error("{to}: {reason}")]
    Unreachable {
        /// Who was tried.
        to: String,
        /// What went wrong.
        reason: String,
    },
    /// It may have been received and acted on.
    #[error("{to}: no answer: {reason}")]
    Lost {
        /// Who was asked.
        to: String,
        /// What went wrong.
        reason: String,
    },
    /// The other side is somebody else, or does not know us. Nothing was done.
    #[error("{to}: refused: {reason}")]
    Refused {
        /// Who was asked.
        to: String,
        /// Its reason.
        reason: String,
    },
}

/// "What are you?", from a node that may not belong to any cluster yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeRequest {
    /// The asker's id, 0 for none.
    pub node_id: NodeId,
    /// The asker's data directory.
    pub disk_id: DiskId,
    /// Where the asker is reached.
    pub peer_urls: Vec<String>,
}

/// The answer to a [`ProbeRequest`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeReply {
    /// The cluster of the asked.
    pub cluster_id: ClusterId,
    /// Its node id.
    pub node_id: NodeId,
    /// Its data directory.
    pub disk_id: DiskId,
    /// Its name.
    pub name: String,
    /// Whether its log holds anything.
    pub initialised: bool,
    /// Its version, `major << 16 | minor`.
    pub version: u32,
    /// The leader it follows; 0 for none.
    pub leader: NodeId,
    /// One above the log index of the newest committed membership it knows; 0 for none.
    pub membership_version: u64,
    /// Whether the asker's node id is in that membership.
    pub asker_known: bool,
    /// The disk recorded for the asker's node id there; 0 for none.
    pub asker_disk: DiskId,
    /// Where clients reach it.
    pub client_urls: Vec<String>,
}

/// A new node's wish to become a member, or an added member's first start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The data directory that the new member will hold its vote in.
    pub disk_id: DiskId,
    /// Its name.
    pub name: String,
    /// Where peers reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it.
    pub client_urls: Vec<String>,
    /// What it wants to be.
    pub kind: MemberKind,
    /// Only claim a record with these peer URLs; never add one.
    pub claim: bool,
}

/// The answer to a [`JoinRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinReply {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The record of the new member.
    pub member: Member,
    /// Log index of the membership that holds it.
    pub membership_index: u64,
}

/// Why a node was not let in.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct JoinRefused {
    /// The reason, in words for an operator.
    pub reason: String,
    /// Whether asking again later may help.
    pub may_retry: bool,
}

/// One question to the leader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// The index that holds everything acknowledged before now.
    ReadIndex,
    /// Renew leases.
    LeaseKeepAlive {
        /// The leases.
        ids: Vec<LeaseId>,
    },
    /// How long a lease still has.
    LeaseTimeToLive {
        /// The lease.
        id: LeaseId,
    },
    /// Change the membership.
    Member(MemberChange),
}

/// One change of the membership.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberChange {
    /// Add a member that has not started yet.
    Add {
        /// Where peers will reach it.
        peer_urls: Vec<String>,
        /// What it is to become.
        kind: MemberKind,
    },
    /// Remove a member.
    Remove {
        /// The member.
        id: NodeId,
    },
    /// Change where peers reach a member.
    Update {
        /// The member.
        id: NodeId,
        /// The new URLs.
        peer_urls: Vec<String>,
    },
    /// Make a learner a voter.
    Promote {
        /// The learner.
        id: NodeId,
    },
    /// Record a started member's name and client URLs.
    Publish {
        /// The member.
        id: NodeId,
        /// Its data directory, which must be the recorded one.
        disk: DiskId,
        /// Its name.
        name: String,
        /// Where clients reach it.
        client_urls: Vec<String>,
    },
    /// Let a node in.
    Join(JoinRequest),
}

/// What a change of the membership gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberChanged {
    /// The record that was added or changed; `None` after a removal.
    pub member: Option<Member>,
    /// The members after the change.
    pub members: Vec<MemberView>,
    /// Log index of the membership after the change.
    pub index: u64,
}

/// The leader's answer to an [`Ask`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The asked is not the leader; nothing was done.
    NotLeader {
        /// Where the leader may be; 0 for unknown.
        leader: NodeId,
    },
    /// To `ReadIndex`.
    ReadIndex {
        /// The index.
        index: u64,
    },
    /// To `LeaseKeepAlive`, in its order.
    LeaseKeptAlive {
        /// The TTLs in seconds; 0 when the lease does not exist or has expired.
        ttls_s: Vec<i64>,
    },
    /// To `LeaseTimeToLive`.
    LeaseTimeToLive {
        /// Remaining seconds; -1 when the lease does not exist.
        ttl_s: i64,
        /// Granted seconds; 0 when the lease does not exist.
        granted_ttl_s: i64,
    },
    /// To `Member`.
    Member(MemberChanged),
    /// It could not be done.
    Failed(NodeError),
}

/// One proposal on its way to the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardItem {
    /// Names the item in its result; used once on a link.
    pub sequence: u64,
    /// The command, encoded as it goes into the log.
    pub body: Bytes,
}

/// What became of one forwarded proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardResult {
    /// The item.
    pub sequence: u64,
    /// What became of it.
    pub outcome: ForwardOutcome,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForwardOutcome {
    /// It was applied.
    Applied {
        /// Its log index.
        index: u64,
        /// The `types::Reply`, encoded.
        reply: Bytes,
    },
    /// It is certainly in no log.
    Rejected {
        /// Where the leader may be; 0 for unknown.
        leader: NodeId,
        /// The leader has too much in flight.
        too_many: bool,
    },
    /// It may have been applied, or may yet be.
    Unknown,
}

/// The follower's end of a stream of proposals. When `results` ends, every item
/// without a result is in doubt.
pub struct ForwardLink {
    /// Proposals to the leader.
    pub items: mpsc::Sender<Vec<ForwardItem>>,
    /// What became of them, in any order.
    pub results: BoxStream<'static, Vec<ForwardResult>>,
}

/// The leader's end of a [`ForwardLink`].
pub struct ForwardEnd {
    /// Proposals of a follower; ends when the follower closes.
    pub items: BoxStream<'static, Vec<ForwardItem>>,
    /// What became of them.
    pub results: mpsc::Sender<Vec<ForwardResult>>,
}

/// Reaches nodes by an address alone, before any id is known.
pub trait Dialer: Send + Sync + 'static {
    /// Asks whoever listens at `url`, a peer URL.
    fn probe<'a>(
        &'a self,
        url: &'a str,
        request: ProbeRequest,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<ProbeReply, ControlError>>;

    /// Asks to be let in at `url`: any member's peer URL or client URL.
    fn join<'a>(
        &'a self,
        url: &'a str,
        request: JoinRequest,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Result<JoinReply, JoinRefused>, ControlError>>;
}

/// Carries control messages to members by their ids. Every call ends within its
/// timeout; a call that the peer's breaker stops is [`ControlError::Unreachable`].
pub(super) trait Carrier: Send + Sync + 'static {
    /// Asks one member.
    fn ask(&self, to: NodeId, ask: Ask, timeout: Duration) -> BoxFuture<'_, Result<Answer, ControlError>>;

    /// Opens a stream of proposals. Closing `items` ends it.
    fn forward(&self, to: NodeId) -> BoxFuture<'_, Result<ForwardLink, ControlError>>;

    /// The members are these now.
    fn take_members(&self, members: &[MemberView]);
}
