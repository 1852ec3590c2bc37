//! The values every room speaks of: keys, ranges, revisions, commands and the
//! events they cause.
//!
//! Nothing here does anything: no I/O, no clock, no lock. What is written to
//! the log (`command`) is encoded by `storage::codec`; its enums are
//! append-only, because a record written today is read by every later version.

mod command;
mod error;
mod event;
mod id;
mod key;
mod member;
mod nesting;
mod query;

pub use command::{
    Alarm, AlarmAction, AlarmKind, Command, DeleteRange, Operation, Outcome, Put, Reply, RequestId,
    SequenceOutcome, Txn, TxnOp, TxnOpReply, TxnReply,
};
pub use error::ApplyError;
pub use event::{Event, EventKind, RevisionEvents};
pub use id::{ClusterId, DiskId, LeaseId, NodeId, Revision};
pub use key::{KeyRange, Space};
pub use member::{Member, MemberKind};
pub use query::{Compare, CompareOp, CompareTarget, KeyValue, RangeQuery, RangeReply, SortOrder, SortTarget};
