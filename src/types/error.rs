//! Why a command was refused. Every replica refuses it for the same reason.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A deterministic refusal: the state did not change, on any replica. The
/// messages are etcd's, because its clients compare them.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum ApplyError {
    /// A revision below the compact mark was asked for.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// A revision that does not exist yet was asked for.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRevision,
    /// `ignore_value` or `ignore_lease` on a key that does not exist.
    #[error("etcdserver: key not found")]
    KeyNotFound,
    /// The lease does not exist.
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    /// The lease id is taken.
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    /// The store is full; see the alarm.
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    /// Members disagree; writes and reads are refused.
    #[error("etcdserver: corrupt cluster")]
    Corrupt,
    /// The session of the request id does not exist or has expired.
    #[error("mainstay: session {session} is unknown or has expired; open a new one")]
    SessionNotFound {
        /// The session.
        session: u64,
    },
    /// The client said before that this sequence will not be retried.
    #[error("mainstay: sequence {sequence} was acknowledged before and cannot be used again")]
    SequenceAcknowledged {
        /// The sequence.
        sequence: u64,
    },
    /// The same request id came with another content.
    #[error("mainstay: sequence {sequence} was used before with another request")]
    SequenceReused {
        /// The sequence.
        sequence: u64,
    },
    /// Too many sessions, or too many unacknowledged writes in one.
    #[error("mainstay: too many {what}; the limit is {limit}")]
    SessionLimit {
        /// What there is too much of.
        what: std::borrow::Cow<'static, str>,
        /// The limit.
        limit: u64,
    },
    /// The answer would have more than one request may return: in a range inside a
    /// transaction, or in previous records.
    #[error(
        "mainstay: the answer would have more than {limit_bytes} bytes; set a limit, or ask for less at once"
    )]
    ReplyTooLarge {
        /// The limit in bytes.
        limit_bytes: u64,
    },
}
