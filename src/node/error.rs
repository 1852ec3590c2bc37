//! Why a node could not do what it was asked. Messages are etcd's where etcd
//! has one, because its clients compare them.
//!
//! A member sends these to the member that asked on a client's behalf, so
//! variants are appended, never reordered or removed.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::types::ApplyError;

/// Why a request got no answer.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum NodeError {
    /// The state machine refused it; nothing changed.
    #[error(transparent)]
    Refused(#[from] ApplyError),
    /// The request is larger than `--max-request-bytes`.
    #[error("etcdserver: request is too large")]
    RequestTooLarge,
    /// Too much is in flight; nothing was proposed.
    #[error("etcdserver: too many requests")]
    TooManyRequests,
    /// There is no leader; nothing was proposed.
    #[error("etcdserver: no leader")]
    NoLeader,
    /// The leader changed under the request. It may have happened.
    #[error("etcdserver: leader changed")]
    LeaderChanged,
    /// The time ran out. It may have happened.
    #[error("etcdserver: request timed out")]
    Timeout,
    /// This node is stopping.
    #[error("etcdserver: server stopped")]
    Stopped,
    /// A learner serves only what is not linearizable; observers and voters serve everything.
    #[error("etcdserver: rpc not supported for learner")]
    NotSupportedForLearner,
    /// No member has this id.
    #[error("etcdserver: member not found")]
    MemberNotFound,
    /// A member has one of these peer URLs.
    #[error("etcdserver: Peer URLs already exists")]
    PeerUrlExists,
    /// A member has this id.
    #[error("etcdserver: member ID already exist")]
    MemberExists,
    /// The change would leave too few started members for a quorum.
    #[error("etcdserver: re-configuration failed due to not enough started members")]
    NotEnoughStarted,
    /// The change would lose the quorum.
    #[error("etcdserver: unhealthy cluster")]
    Unhealthy,
    /// Promotion of a member that is not a learner.
    #[error("etcdserver: can only promote a learner member")]
    NotLearner,
    /// Promotion of a learner that has not caught up.
    #[error("etcdserver: can only promote a learner member which is in sync with leader")]
    LearnerNotReady,
    /// The leader cannot be moved there.
    #[error("etcdserver: bad leader transferee")]
    BadTransferee,
    /// The leader could not be moved in time.
    #[error("etcdserver: request timed out, leader transfer took too long")]
    TransferTimeout,
    /// The request is malformed; the message names the field and the fix.
    #[error("{0}")]
    Invalid(String),
    /// Something this node cannot go on from; it is stopping.
    #[error("mainstay: internal error: {0}")]
    Internal(String),
    /// Only the leader does this.
    #[error("etcdserver: not leader")]
    NotLeader,
    /// The lease is longer than etcd allows.
    #[error("etcdserver: too large lease TTL")]
    LeaseTtlTooLarge,
    /// The command is newer than a member of the cluster understands.
    #[error(
        "mainstay: the cluster runs version {cluster} and this needs {needed}; upgrade every member first"
    )]
    ClusterTooOld {
        /// The cluster's version.
        cluster: String,
        /// The version that introduced the command.
        needed: String,
    },
    /// The node may not come into the cluster as it asked; the message says what to do.
    #[error("{0}")]
    NotAdmitted(String),
}

impl NodeError {
    /// Whether the same request may succeed later without anybody's help.
    pub fn may_retry(&self) -> bool {
        matches!(
            self,
            NodeError::TooManyRequests
                | NodeError::NoLeader
                | NodeError::LeaderChanged
                | NodeError::Timeout
                | NodeError::Stopped
                | NodeError::NotLeader
                | NodeError::LearnerNotReady
                | NodeError::Unhealthy
                | NodeError::TransferTimeout
        )
    }

    /// Whether the request may have been carried out all the same.
    pub fn may_have_happened(&self) -> bool {
        matches!(
            self,
            NodeError::LeaderChanged
                | NodeError::Timeout
                | NodeError::TransferTimeout
                | NodeError::Internal(_)
                | NodeError::Stopped
        )
    }
}
