//! (scaffold) What keys, versions and history mean: reads at any revision.

use std::sync::Arc;

use crate::storage::{Read, StorageError};
use crate::types::{ApplyError, Event, KeyRange, RangeQuery, RangeReply, Revision, RevisionEvents, Space};

/// Where a state stands: its newest revision and the mark below which history is gone.
#[derive(Clone, Copy, Debug)]
pub struct Marks {
    /// The newest revision.
    pub revision: Revision,
    /// The compact mark of the space read.
    pub compacted: Revision,
}

/// Why a read gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The question cannot be answered; the same on every replica.
    #[error(transparent)]
    Refused(#[from] ApplyError),
    /// The disk failed or a record is damaged; the node must stop.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// etcd's Range. At most `budget_bytes` of keys and values are collected;
/// beyond it the read is refused with `RangeTooLarge`.
pub fn range<R: Read>(
    _data: &R,
    _marks: Marks,
    _query: &RangeQuery,
    _budget_bytes: usize,
) -> Result<RangeReply, ReadError> {
    todo!("scaffold")
}

/// Events of `range` in `from..=to`, in order, at most about `budget_bytes` of
/// them, never splitting a revision. Returns the events and the next revision to
/// ask for. `prev` fills `Event::prev` (absent when compacted away).
/// Exact keys go by `versions`, spans scan `history`.
pub fn events<R: Read>(
    _data: &R,
    _marks: Marks,
    _space: Space,
    _range: &KeyRange,
    _from: Revision,
    _to: Revision,
    _prev: bool,
    _budget_bytes: usize,
) -> Result<(Vec<RevisionEvents>, Revision), ReadError> {
    todo!("scaffold")
}

/// The state of `key` just before `revision`, for `prev_kv` of an event.
pub fn previous<R: Read>(
    _data: &R,
    _marks: Marks,
    _event: &Event,
    _revision: Revision,
) -> Result<Option<Arc<Event>>, ReadError> {
    todo!("scaffold")
}
