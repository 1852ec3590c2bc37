//! Which revision belongs to a time, by the stamps in history.
//!
//! Stamps never go back from one revision to the next, so the answer is found
//! by halving. Revisions may be missing where the other space was compacted
//! further; a look at a missing one sees the next that is there.

use super::{Marks, ReadError};
use crate::storage::layout::{self, Change, Family};
use crate::storage::{Read, StorageError, codec};
use crate::types::Revision;

/// The revision of a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RevisionAt {
    /// The first one above the compact mark that is stamped at the time or
    /// later; the one after the newest when there is none.
    pub revision: Revision,
    /// Whether one at or below the mark may be, too.
    pub compacted: bool,
}

/// Finds the first revision stamped at `time_ms` (milliseconds since 1970) or later.
///
/// # Errors
/// Storage errors.
pub fn revision_at<R: Read>(data: &R, marks: Marks, time_ms: u64) -> Result<RevisionAt, ReadError> {
    let end = marks.revision.next();
    let mut found = end;
    // Everything below `low` is older; `high` and everything above it is not.
    let (mut low, mut high) = (marks.compacted.next(), end);
    while low < high {
        let middle = Revision(low.0 + (high.0 - low.0) / 2);
        match stamp(data, middle, high)? {
            Some((revision, stamp_ms)) if stamp_ms < time_ms => low = revision.next(),
            Some((revision, _)) => (found, high) = (revision, middle),
            None => high = middle,
        }
    }
    // Below the mark rows are gone. What is known to be older speaks for all before it.
    let older = |from, end| -> Result<bool, ReadError> {
        Ok(stamp(data, from, end)?.is_some_and(|(_, stamp_ms)| stamp_ms < time_ms))
    };
    let mark = marks.compacted;
    let compacted = mark.0 > 0 && !older(mark, mark.next())? && !older(mark.next(), end)?;
    Ok(RevisionAt { revision: found, compacted })
}

/// The first revision from `from` on that is there, below `end`, and its stamp.
fn stamp<R: Read>(data: &R, from: Revision, end: Revision) -> Result<Option<(Revision, u64)>, ReadError> {
    let (lower, upper) = (layout::history(from, 0), layout::history(end, 0));
    let mut cursor = data.scan(Family::History, &lower, Some(&upper));
    cursor.seek_to_first();
    let Some((key, value)) = cursor.item()? else { return Ok(None) };
    let (revision, _) = layout::parse_history(key).ok_or_else(|| StorageError::Corrupt {
        what: "history".to_owned(),
        reason: format!("key {key:02x?} is not one of the catalogue"),
    })?;
    let change: Change = codec::decode("history", value)?;
    Ok(Some((revision, change.time_ms)))
}
