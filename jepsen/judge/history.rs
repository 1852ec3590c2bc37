//! What happened: calls with their outcomes, watch streams with what they
//! carried, faults with whether they took effect.
//!
//! It is data only. Times are nanoseconds since the run began, from one
//! monotonic clock. It knows neither the product nor the wire, so that the
//! checkers share no code with what they judge.

/// A revision of the store; 0 stands for "now" in requests.
pub type Revision = i64;

/// One key as the store returned it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Kv {
    pub key: String,
    pub value: String,
    pub create_revision: Revision,
    pub mod_revision: Revision,
    pub version: i64,
    pub lease: i64,
}

/// A key alone, or every key from `key` up to but not including `end`. An
/// `end` of `"\0"` means "to the last key", as on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Span {
    pub key: String,
    pub end: Option<String>,
}

/// What a comparison looks at, with the value it is held against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operand {
    Value(String),
    Version(i64),
    CreateRevision(Revision),
    ModRevision(Revision),
    Lease(i64),
}

/// How a comparison's left side must stand to its right side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    Equal,
    NotEqual,
    Greater,
    Less,
}

/// One comparison of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compare {
    pub key: String,
    pub relation: Relation,
    pub operand: Operand,
}

/// One step of a transaction, or a call of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `limit` 0 means all; `revision` 0 means now.
    Range {
        span: Span,
        revision: Revision,
        limit: i64,
    },
    /// `prev_kv` asks for the record that was replaced.
    Put {
        key: String,
        value: String,
        lease: i64,
        prev_kv: bool,
    },
    Delete {
        span: Span,
        prev_kv: bool,
    },
}

/// A transaction: the first list is done when all comparisons hold, the second
/// otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub success: Vec<Action>,
    pub failure: Vec<Action>,
}

/// What a client asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// One action. `serializable` only means something to a range.
    Single {
        action: Action,
        serializable: bool,
    },
    Txn(Txn),
    Compact {
        revision: Revision,
    },
    LeaseGrant {
        id: i64,
        ttl_s: i64,
    },
    LeaseKeepAlive {
        id: i64,
    },
    LeaseRevoke {
        id: i64,
    },
    LeaseTimeToLive {
        id: i64,
    },
    Lock {
        name: String,
        lease: i64,
    },
    Unlock {
        key: String,
    },
    /// The hash of everything at `revision` (0: now) on the node that is asked.
    HashKv {
        revision: Revision,
    },
    MemberList,
    /// Takes the node of host `node` out of the cluster.
    MemberRemove {
        node: usize,
    },
    /// Lets the node of host `node` join, in whatever way.
    MemberAdd {
        node: usize,
    },
}

/// The answer to one [`Action`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ActionReply {
    Range { kvs: Vec<Kv>, count: i64, more: bool },
    Put { prev: Option<Kv> },
    Delete { deleted: i64, prev: Vec<Kv> },
}

/// The body of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Single(ActionReply),
    Txn {
        succeeded: bool,
        replies: Vec<ActionReply>,
    },
    Compact,
    /// Of a grant, a keep-alive and a time-to-live; `ttl_s` is 0 or less when the lease is gone.
    Lease {
        id: i64,
        ttl_s: i64,
        granted_ttl_s: i64,
        keys: Vec<String>,
    },
    LeaseRevoked,
    Locked {
        key: String,
    },
    Unlocked,
    HashKv {
        hash: u32,
        hash_revision: Revision,
        compact_revision: Revision,
    },
    /// Of a list, an addition and a removal.
    Members {
        names: Vec<String>,
    },
}

/// An answer: the header's revision and the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub revision: Revision,
    pub body: Body,
}

/// How a call ended. Doubt is never flattened into failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok(Reply),
    /// It certainly had no effect and never will.
    Failed(String),
    /// It may have happened, or may yet happen.
    Unknown(String),
}

/// One call of one client. A process has one call in flight at a time; after an
/// unknown outcome its number is retired and the client goes on under a new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    pub process: u64,
    /// The index of the node that was asked.
    pub node: usize,
    pub workload: &'static str,
    pub call: Call,
    /// The id that makes retries of a write one write, when the client sent one.
    pub request_id: Option<String>,
    pub invoked_ns: u64,
    /// When the client had the answer, or gave up.
    pub returned_ns: u64,
    pub outcome: Outcome,
}

/// What an event says happened to its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    Put,
    Delete,
}

/// One change, as a watch told it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Event {
    pub kind: EventKind,
    /// Of a deletion only `key` and `mod_revision` mean something.
    pub kv: Kv,
    pub prev: Option<Kv>,
}

/// One response of a watch stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchItem {
    pub at_ns: u64,
    /// The revision in the response's header.
    pub revision: Revision,
    pub body: WatchBody,
}

/// What a watch response carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchBody {
    Created,
    /// `fragment` says that the revision's events go on in the next response.
    Events {
        events: Vec<Event>,
        fragment: bool,
    },
    /// Everything up to the header's revision was sent.
    Progress,
    Canceled {
        compact_revision: Revision,
        reason: String,
    },
}

/// The watcher of everything from revision 1 on, which the order of revisions is taken from. Without
/// compaction it may be recorded when the run ends; with compaction it runs live, across reconnects.
pub const FULL_HISTORY: u64 = u64::MAX;

/// One watch on one connection. A watcher that reconnects opens another with
/// the same `watcher` number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchStream {
    pub watcher: u64,
    pub node: usize,
    pub workload: &'static str,
    pub span: Span,
    /// As requested; 0 means from the moment of creation.
    pub start_revision: Revision,
    pub prev_kv: bool,
    /// Whether it asked to be told of no puts.
    pub no_put: bool,
    /// Whether it asked to be told of no deletions.
    pub no_delete: bool,
    /// Whether a large revision may come in several responses.
    pub fragment: bool,
    pub opened_ns: u64,
    pub items: Vec<WatchItem>,
    /// Why it ended when the server did not cancel it.
    pub ended: String,
}

/// One fault of the schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultRecord {
    pub name: &'static str,
    pub started_ns: u64,
    pub healed_ns: u64,
    /// Whom it hit and how it was seen to have taken effect, or why it was not.
    pub effect: Result<String, String>,
    /// Why healing did not work, when it did not.
    pub heal_error: Option<String>,
}

/// Everything that one run saw.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub seed: u64,
    pub ops: Vec<Op>,
    pub watches: Vec<WatchStream>,
    pub faults: Vec<FaultRecord>,
}

impl Op {
    /// The reply of a call that succeeded.
    pub fn reply(&self) -> Option<&Reply> {
        match &self.outcome {
            Outcome::Ok(reply) => Some(reply),
            Outcome::Failed(_) | Outcome::Unknown(_) => None,
        }
    }
}

impl Span {
    /// One key.
    pub fn key(key: impl Into<String>) -> Span {
        Span { key: key.into(), end: None }
    }

    /// Every key that begins with `prefix`, which must not be empty nor end in the highest character.
    pub fn prefix(prefix: &str) -> Span {
        let mut end = prefix.as_bytes().to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Span { key: prefix.to_owned(), end: String::from_utf8(end).ok() }
    }

    /// Whether `key` lies in it.
    pub fn contains(&self, key: &str) -> bool {
        match self.end.as_deref() {
            None => key == self.key,
            Some("\0") => key >= self.key.as_str(),
            Some(end) => key >= self.key.as_str() && key < end,
        }
    }
}
