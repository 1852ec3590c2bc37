//! What goes through the log, and what comes back from applying it.
//!
//! `Command` is stored and sent as the bytes `storage::codec` makes of it, once,
//! where it is proposed. Variants are appended, never reordered or removed.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    ApplyError, Compare, KeyRange, KeyValue, LeaseId, NodeId, RangeQuery, RangeReply, Revision, Space,
};

/// One entry of the log, less the time stamp that the leader adds beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Makes a repeated write apply once.
    pub request: Option<RequestId>,
    /// Who asked, for history and audit. Decides nothing.
    pub actor: Option<Arc<str>>,
    /// What to do.
    pub operation: Operation,
}

impl Command {
    /// A command of the cluster itself, without a request id.
    pub fn internal(operation: Operation) -> Command {
        Command { request: None, actor: None, operation }
    }
}

/// Names one write of one session, so that a retry is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestId {
    /// The session, opened through the log.
    pub session: u64,
    /// The write's number in the session; each is used once.
    pub sequence: u64,
    /// Every sequence up to this one has been answered and will not be retried.
    pub acknowledged: u64,
}

/// What the log can ask of the state machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Set a key.
    Put(Put),
    /// Remove keys.
    DeleteRange(DeleteRange),
    /// Compare, then do one of two lists of operations.
    Txn(Txn),
    /// Forget the history of a space up to and including a revision.
    Compact {
        /// The space.
        space: Space,
        /// The revision, which stays readable.
        revision: Revision,
    },
    /// Create a lease.
    LeaseGrant {
        /// Its id, not zero.
        id: LeaseId,
        /// Its time to live in seconds, at least 1.
        ttl_s: i64,
    },
    /// Remove a lease and its keys, as a client asks.
    LeaseRevoke {
        /// The lease.
        id: LeaseId,
    },
    /// Remove leases whose time has run out. Dropped unless `term` is the
    /// entry's own term: a deposed leader's expiry does nothing.
    LeaseExpire {
        /// The term of the leader that saw them expire.
        term: u64,
        /// The leases.
        ids: Vec<LeaseId>,
    },
    /// Record how long leases still have, so that a new leader does not start
    /// a long one again from its full time. Dropped in another term.
    LeaseCheckpoint {
        /// The term of the leader that measured.
        term: u64,
        /// Each lease with its remaining seconds.
        remaining: Vec<(LeaseId, i64)>,
    },
    /// Open a session for request ids; its id is in the reply.
    SessionOpen {
        /// How long it lives without being renewed, in seconds.
        ttl_s: u64,
    },
    /// Keep a session alive.
    SessionRenew {
        /// The session.
        session: u64,
    },
    /// Forget sessions that were not renewed. Dropped in another term.
    SessionExpire {
        /// The term of the leader that saw them expire.
        term: u64,
        /// Each session with the log index of the renewal that ran out; a later
        /// renewal wins.
        sessions: Vec<(u64, u64)>,
    },
    /// Raise or clear an alarm.
    Alarm {
        /// Raise or clear.
        action: AlarmAction,
        /// Which alarm, of which member (0 when clearing: of all).
        alarm: Alarm,
    },
    /// Let the cluster use the commands of this version. Only ever rises.
    ClusterVersion {
        /// The version, as `major << 16 | minor`.
        version: u32,
    },
}

/// Set one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Put {
    /// The space.
    pub space: Space,
    /// The key, not empty.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
    /// The lease to attach to, or none.
    pub lease: LeaseId,
    /// Return what was there before.
    pub prev_kv: bool,
    /// Keep the value that is there; the key must exist.
    pub ignore_value: bool,
    /// Keep the lease that is there; the key must exist.
    pub ignore_lease: bool,
}

/// Remove every key in a range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteRange {
    /// The space.
    pub space: Space,
    /// The keys.
    pub range: KeyRange,
    /// Return what was there before.
    pub prev_kv: bool,
}

/// A transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Txn {
    /// All must hold for `success` to be done.
    pub compare: Vec<Compare>,
    /// Done when every comparison holds.
    pub success: Vec<TxnOp>,
    /// Done otherwise.
    pub failure: Vec<TxnOp>,
}

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TxnOp {
    /// Read.
    Range(RangeQuery),
    /// Set a key.
    Put(Put),
    /// Remove keys.
    DeleteRange(DeleteRange),
    /// A transaction inside; its comparisons see the state before the outer one.
    Txn(#[serde(deserialize_with = "super::nesting::read")] Txn),
}

/// Raise or clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AlarmAction {
    /// Raise.
    Activate,
    /// Clear.
    Deactivate,
}

/// What an alarm is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AlarmKind {
    /// The quota is used up or a member's disk is nearly full.
    NoSpace,
    /// Members disagree on the content.
    Corrupt,
}

/// One raised alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Alarm {
    /// The member it is about.
    pub member: NodeId,
    /// What it is about.
    pub kind: AlarmKind,
}

/// What applying a command gave. Equal on every replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The store's revision after the command; of a retry, after it was applied.
    pub revision: Revision,
    /// What it gave, or why nothing was changed.
    pub outcome: Result<Outcome, ApplyError>,
}

/// What a command gave when it was not refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Nothing to say.
    Done,
    /// A put, with what was there before if that was asked for.
    Put {
        /// The key before.
        prev: Option<KeyValue>,
    },
    /// A delete.
    DeleteRange {
        /// How many keys were removed.
        deleted: u64,
        /// The keys before, if that was asked for.
        prev: Vec<KeyValue>,
    },
    /// A transaction.
    Txn(TxnReply),
    /// A granted lease.
    LeaseGrant {
        /// Its id.
        id: LeaseId,
        /// Its time to live in seconds, as granted.
        ttl_s: i64,
    },
    /// An opened session.
    Session {
        /// Its id.
        id: u64,
    },
    /// The alarms that the command raised or cleared.
    Alarms(Vec<Alarm>),
    /// The command was a retry of one applied before, whose reply is no longer
    /// kept because it was too large.
    AppliedBefore(SequenceOutcome),
}

/// What is kept of a reply that was too large to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceOutcome {
    /// The revision at which the write was applied.
    pub revision: Revision,
}

/// What a transaction gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TxnReply {
    /// Whether the comparisons held.
    pub succeeded: bool,
    /// One for each step of the branch that was done.
    pub responses: Vec<TxnOpReply>,
}

/// What one step of a transaction gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TxnOpReply {
    /// A read.
    Range(RangeReply),
    /// A put.
    Put {
        /// The key before, if that was asked for.
        prev: Option<KeyValue>,
    },
    /// A delete.
    DeleteRange {
        /// How many keys were removed.
        deleted: u64,
        /// The keys before, if that was asked for.
        prev: Vec<KeyValue>,
    },
    /// A transaction inside.
    Txn(#[serde(deserialize_with = "super::nesting::read")] TxnReply),
}
