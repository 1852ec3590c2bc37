//! What keys, versions and history mean: reads at any revision, the events of
//! a span of history, forgetting, the hash that all members agree on, and the
//! published view that all reads take.
//!
//! Synchronous and deterministic. Nothing here decides when to compact or who
//! is told of a change; writing belongs to `machine`, which calls in here for
//! its own reads.
//!
//! Invariants of the data read here: `current` holds the newest record of each
//! live key; each change stands once in `history` and once in `versions`; below
//! the compact mark only the newest version of each key is promised to exist.

mod events;
mod hash;
mod range;
mod sweep;
mod time;
mod view;

pub use events::{EventQuery, events, tombstone};
pub use hash::{KvHash, digest, hash_kv};
pub use range::{Found, Keys, Visit, range, range_at_head, range_bounds, range_if_short, range_piece};
pub use sweep::{SweepProgress, Walked, sweep};
pub use time::{RevisionAt, revision_at};
pub use view::{Published, View};

use crate::storage::{Read, StorageError, codec, layout};
use crate::types::{ApplyError, KeyValue, Revision, Space};

/// Where a state stands: its newest revision, and the mark below which history
/// is gone (the mark itself stays readable).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// The newest revision.
    pub revision: Revision,
    /// The compact mark of the space read; 0 when it was never compacted.
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

/// A key and its record as clients see them.
pub fn key_value(key: &[u8], record: layout::Record) -> KeyValue {
    KeyValue {
        key: bytes::Bytes::copy_from_slice(key),
        create_revision: record.create,
        mod_revision: record.modified,
        version: record.version,
        lease: record.lease,
        value: record.value,
    }
}

/// The change at a place in history, which must exist.
fn change_at<R: Read>(data: &R, revision: Revision, sub: u32) -> Result<layout::Change, StorageError> {
    let key = layout::history(revision, sub);
    match data.get(layout::Family::History, &key)? {
        Some(bytes) => codec::decode("history", &bytes),
        None => Err(StorageError::Corrupt {
            what: format!("history at revision {revision}, sub {sub}"),
            reason: "a version refers to it, but it is not there".to_owned(),
        }),
    }
}

/// The record of a version that is a put.
fn record_at<R: Read>(data: &R, revision: Revision, sub: u32) -> Result<layout::Record, StorageError> {
    change_at(data, revision, sub)?.record.ok_or_else(|| StorageError::Corrupt {
        what: format!("history at revision {revision}, sub {sub}"),
        reason: "it is a removal, but its version says it is a put".to_owned(),
    })
}

/// The newest version of `key` at or before `revision`: where it is, and its reference.
fn version_at<R: Read>(
    data: &R,
    space: Space,
    key: &[u8],
    revision: Revision,
) -> Result<Option<(Revision, layout::VersionRef)>, StorageError> {
    let lower = layout::version(space, key, revision);
    let mut upper = layout::versions_prefix(space, key);
    upper.extend_from_slice(&[0xff; 8]);
    let mut cursor = data.scan(layout::Family::Versions, &lower, Some(&upper));
    cursor.seek_to_first();
    match cursor.item()? {
        Some((found, value)) => Ok(Some((parse_version(found)?.1, codec::decode("version", value)?))),
        None => Ok(None),
    }
}

/// Key and revision of a `versions` key.
fn parse_version(bytes: &[u8]) -> Result<(Vec<u8>, Revision), StorageError> {
    match layout::parse_version(bytes) {
        Some((_, key, revision)) => Ok((key, revision)),
        None => Err(StorageError::Corrupt {
            what: "versions".to_owned(),
            reason: format!("key {bytes:02x?} is not one of the catalogue"),
        }),
    }
}
