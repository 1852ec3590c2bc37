//! The one table from everything that can go wrong to gRPC codes and messages.
//!
//! etcd's clients compare the message first and the code second, so both are
//! etcd's wherever etcd has the case (`api/v3rpc/rpctypes/error.go`). No other
//! file of this room makes a `Status`.

use thiserror::Error;
use tonic::{Code, Status};

use crate::mvcc::ReadError;
use crate::node::{ExitReason, Node, NodeError};
use crate::telemetry;
use crate::types::ApplyError;
use crate::wire::{InvalidRequest, UnexpectedOutcome};

/// Why a request got no answer.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The node could not do it.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The request means nothing; the message is etcd's.
    #[error(transparent)]
    Request(#[from] InvalidRequest),
    /// The reply cannot be told, or is not one to the request.
    #[error(transparent)]
    Outcome(#[from] UnexpectedOutcome),
    /// The client's own deadline is over.
    #[error("etcdserver: context deadline exceeded")]
    DeadlineExceeded,
    /// Metadata of the request that cannot be used; the message names it.
    #[error("mainstay: metadata {name}: {reason}")]
    Metadata {
        /// The name of the metadata.
        name: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// URLs of a member that no peer could dial.
    #[error("etcdserver: given member URLs are invalid")]
    MemberBadUrls,
    /// `isLearner` and the metadata `mainstay-member-kind` contradict each other.
    #[error("mainstay: isLearner and mainstay-member-kind {kind} contradict each other; give one of them")]
    MemberKindConflict {
        /// What the metadata says.
        kind: String,
    },
    /// Auth is off.
    #[error("etcdserver: authentication is not enabled")]
    AuthNotEnabled,
    /// Auth cannot be turned on.
    #[error("mainstay: {what} is not supported yet")]
    NotSupported {
        /// What was asked for.
        what: &'static str,
    },
    /// There is no downgrade to cancel.
    #[error("etcdserver: no inflight downgrade job")]
    NoInflightDowngrade,
    /// Nobody has been elected.
    #[error("election: no leader")]
    ElectionNoLeader,
    /// The key that made the caller leader is gone or is another's.
    #[error("election: not leader")]
    ElectionNotLeader,
    /// Proclaim and Resign need the key that Campaign gave.
    #[error("\"leader\" field must be provided")]
    MissingLeaderKey,
    /// The lease ran out while waiting for a lock.
    #[error("mutex: session is expired")]
    LockSessionExpired,
    /// The lease ran out while waiting to be elected.
    #[error("election: session is expired")]
    ElectionSessionExpired,
    /// A joining node was not let in.
    #[error("{reason}")]
    JoinRefused {
        /// The reason.
        reason: String,
        /// Whether asking again may help.
        may_retry: bool,
    },
}

impl From<ApplyError> for ServeError {
    fn from(error: ApplyError) -> ServeError {
        ServeError::Node(NodeError::Refused(error))
    }
}

impl ServeError {
    /// A read's failure. One of the disk's also ends the node: a damaged record
    /// must not be served a second time.
    pub(crate) fn of_read(node: &Node, error: ReadError) -> ServeError {
        match error {
            ReadError::Refused(refused) => {
                if matches!(refused, ApplyError::ReplyTooLarge { .. }) {
                    metrics::counter!(telemetry::RANGES_TOO_LARGE).increment(1);
                }
                refused.into()
            }
            ReadError::Storage(error) => {
                let why = error.to_string();
                tracing::error!(error = %why, "a read met a damaged or failing disk; the node stops");
                node.exit().announce(ExitReason::Failed(why.clone()));
                NodeError::Internal(why).into()
            }
        }
    }

    /// A task that served a request died.
    pub(crate) fn of_join(error: tokio::task::JoinError) -> ServeError {
        match error.is_cancelled() {
            true => NodeError::Stopped.into(),
            false => NodeError::Internal(format!("a task that served a request panicked: {error}")).into(),
        }
    }

    /// The gRPC code.
    pub(crate) fn code(&self) -> Code {
        match self {
            ServeError::Node(error) => node_code(error),
            ServeError::Request(error) if error.is_unimplemented() => Code::Unimplemented,
            ServeError::Request(_)
            | ServeError::Metadata { .. }
            | ServeError::MemberBadUrls
            | ServeError::MemberKindConflict { .. } => Code::InvalidArgument,
            // It was applied: not a failure that a client may retry.
            ServeError::Outcome(UnexpectedOutcome::AppliedBefore { .. }) => Code::AlreadyExists,
            ServeError::Outcome(UnexpectedOutcome::Mismatch { .. }) => Code::Internal,
            ServeError::NotSupported { .. } => Code::Unimplemented,
            ServeError::DeadlineExceeded => Code::DeadlineExceeded,
            ServeError::AuthNotEnabled | ServeError::NoInflightDowngrade => Code::FailedPrecondition,
            // etcd gives these no code of their own.
            ServeError::ElectionNoLeader
            | ServeError::ElectionNotLeader
            | ServeError::MissingLeaderKey
            | ServeError::LockSessionExpired
            | ServeError::ElectionSessionExpired => Code::Unknown,
            ServeError::JoinRefused { may_retry: true, .. } => Code::Unavailable,
            ServeError::JoinRefused { may_retry: false, .. } => Code::FailedPrecondition,
        }
    }
}

fn node_code(error: &NodeError) -> Code {
    match error {
        NodeError::Refused(error) => apply_code(error),
        NodeError::RequestTooLarge | NodeError::Invalid(_) => Code::InvalidArgument,
        NodeError::TooManyRequests => Code::ResourceExhausted,
        NodeError::NoLeader
        | NodeError::LeaderChanged
        | NodeError::Timeout
        | NodeError::TransferTimeout
        | NodeError::Stopped
        | NodeError::Unhealthy => Code::Unavailable,
        NodeError::MemberNotFound => Code::NotFound,
        NodeError::LeaseTtlTooLarge => Code::OutOfRange,
        NodeError::NotSupportedForLearner
        | NodeError::PeerUrlExists
        | NodeError::MemberExists
        | NodeError::NotEnoughStarted
        | NodeError::NotLearner
        | NodeError::LearnerNotReady
        | NodeError::BadTransferee
        | NodeError::NotLeader
        | NodeError::ClusterTooOld { .. }
        | NodeError::NotAdmitted(_) => Code::FailedPrecondition,
        NodeError::Internal(_) => Code::Internal,
    }
}

fn apply_code(error: &ApplyError) -> Code {
    match error {
        ApplyError::Compacted | ApplyError::FutureRevision => Code::OutOfRange,
        ApplyError::KeyNotFound | ApplyError::SequenceReused { .. } => Code::InvalidArgument,
        ApplyError::LeaseNotFound => Code::NotFound,
        ApplyError::LeaseExists
        | ApplyError::SessionNotFound { .. }
        | ApplyError::SequenceAcknowledged { .. } => Code::FailedPrecondition,
        ApplyError::NoSpace | ApplyError::SessionLimit { .. } | ApplyError::ReplyTooLarge { .. } => {
            Code::ResourceExhausted
        }
        ApplyError::Corrupt => Code::DataLoss,
    }
}

impl From<ServeError> for Status {
    fn from(error: ServeError) -> Status {
        Status::new(error.code(), error.to_string())
    }
}

/// A gRPC request for a method that no service has.
pub(crate) fn unknown_method(path: &str) -> Status {
    Status::unimplemented(format!("{path} is not served"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What clients of etcd branch on, as `rpctypes/error.go` has it.
    #[test]
    fn codes_and_messages_are_etcds() {
        let cases: Vec<(ServeError, Code, &str)> = vec![
            (
                ApplyError::Compacted.into(),
                Code::OutOfRange,
                "etcdserver: mvcc: required revision has been compacted",
            ),
            (
                ApplyError::FutureRevision.into(),
                Code::OutOfRange,
                "etcdserver: mvcc: required revision is a future revision",
            ),
            (
                ApplyError::NoSpace.into(),
                Code::ResourceExhausted,
                "etcdserver: mvcc: database space exceeded",
            ),
            (ApplyError::KeyNotFound.into(), Code::InvalidArgument, "etcdserver: key not found"),
            (ApplyError::LeaseNotFound.into(), Code::NotFound, "etcdserver: requested lease not found"),
            (ApplyError::LeaseExists.into(), Code::FailedPrecondition, "etcdserver: lease already exists"),
            (ApplyError::Corrupt.into(), Code::DataLoss, "etcdserver: corrupt cluster"),
            (NodeError::TooManyRequests.into(), Code::ResourceExhausted, "etcdserver: too many requests"),
            (NodeError::RequestTooLarge.into(), Code::InvalidArgument, "etcdserver: request is too large"),
            (NodeError::NoLeader.into(), Code::Unavailable, "etcdserver: no leader"),
            (NodeError::LeaderChanged.into(), Code::Unavailable, "etcdserver: leader changed"),
            (NodeError::Timeout.into(), Code::Unavailable, "etcdserver: request timed out"),
            (NodeError::Stopped.into(), Code::Unavailable, "etcdserver: server stopped"),
            (NodeError::NotLeader.into(), Code::FailedPrecondition, "etcdserver: not leader"),
            (
                NodeError::NotSupportedForLearner.into(),
                Code::FailedPrecondition,
                "etcdserver: rpc not supported for learner",
            ),
            (NodeError::MemberNotFound.into(), Code::NotFound, "etcdserver: member not found"),
            (NodeError::LeaseTtlTooLarge.into(), Code::OutOfRange, "etcdserver: too large lease TTL"),
            (
                ServeError::AuthNotEnabled,
                Code::FailedPrecondition,
                "etcdserver: authentication is not enabled",
            ),
            (ServeError::MemberBadUrls, Code::InvalidArgument, "etcdserver: given member URLs are invalid"),
            (ServeError::ElectionNoLeader, Code::Unknown, "election: no leader"),
        ];
        for (error, code, message) in cases {
            let status = Status::from(error);
            assert_eq!((status.code(), status.message()), (code, message));
        }
    }
}
