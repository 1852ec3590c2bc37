//! The seam behind which the replicated log lives, and what both of its
//! implementations share.
//!
//! A log is a run of records without holes, beside a vote and two marks. This
//! file knows indexes and bytes; what a record means, and how damage in one is
//! told, is the caller's to say (`raft::record`).
//!
//! Invariants, for every implementation:
//! - Operations take effect in the order of [`LogEngine::submit`], and no later
//!   one is durable before an earlier one.
//! - The records are `first..=last` without a hole, `first` being one above the
//!   purge mark, or 0 when nothing was ever purged.
//! - A write that failed is not tried again, and nothing is written after it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::StorageError;

mod memory;
mod segments;

pub use memory::MemoryLog;
pub use segments::{SegmentLog, SegmentLogOptions, is_log};

/// How an operation ended. The error is shared by everyone it concerns.
pub type LogResult = Result<(), Arc<StorageError>>;

/// Called once, on the thread that wrote: with `Ok` when the operation and every
/// one before it are durable. Must not block, nor panic.
pub type Done = Box<dyn FnOnce(LogResult) + Send>;

/// Called when a write failed, before the callbacks are: the node must stop.
pub type FatalHook = Arc<dyn Fn(&StorageError) + Send + Sync>;

/// Says whether bytes are the undamaged record of an index.
pub type VerifyRecord<'a> = &'a dyn Fn(u64, &[u8]) -> Result<(), StorageError>;

/// One change to the log.
pub enum LogOp {
    /// Add records after the last one. Synced before `done` is called.
    Append {
        /// Consecutive indexes, each with its record.
        records: Vec<(u64, Bytes)>,
        /// Called when they are durable.
        done: Done,
    },
    /// Replace the vote. Synced before `done` is called.
    SaveVote {
        /// The vote's bytes.
        vote: Bytes,
        /// Called when it is durable.
        done: Done,
    },
    /// Remove every record after this index; `None` removes all.
    TruncateAfter {
        /// The last index to stay.
        last: Option<u64>,
    },
    /// Remove every record up to and including `upto`, which may lie beyond the
    /// end of the log: the log is then empty and goes on at `upto + 1`.
    Purge {
        /// The new purge mark. Never goes back.
        upto: u64,
        /// Bytes that say which entry stood there.
        position: Bytes,
    },
    /// Record what is known to be committed. Never durable before the records
    /// that were appended before it.
    SaveCommitted {
        /// Bytes that say which entry.
        position: Bytes,
    },
}

/// What a log holds when it is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Index and record of the last entry; `None` when there is none.
    pub last: Option<(u64, Bytes)>,
    /// The purge mark: its index and position.
    pub purged: Option<(u64, Bytes)>,
    /// The vote.
    pub vote: Option<Bytes>,
    /// What was known to be committed. May lie beyond `last` after a crash.
    pub committed: Option<Bytes>,
}

impl Recovered {
    /// The index at which the log begins, or would.
    pub fn first_index(&self) -> u64 {
        first_after(self.purged.as_ref().map(|(index, _)| *index))
    }
}

/// A log. Shared; every method may be called from any thread.
pub trait LogEngine: Send + Sync + 'static {
    /// What the log holds. To be called before the first `submit`.
    ///
    /// Records from `verify_from` on are read and given to `verify`, because
    /// the state machine does not hold their effect yet and nobody else would
    /// notice that one is missing. Older ones are only ever read by followers,
    /// and are checked then: opening a large log stays quick.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] for a hole or a damaged record,
    /// [`StorageError::Io`] when the disk fails.
    fn recover(&self, verify_from: u64, verify: VerifyRecord<'_>) -> Result<Recovered, StorageError>;

    /// Queues one operation, and returns without waiting for the disk unless
    /// thousands wait already. Whoever appends bounds the bytes that wait here
    /// (`raft::LogStore` does): the queue itself refuses nothing.
    fn submit(&self, op: LogOp);

    /// Records of `range`, from its start, without a hole, as far as they were
    /// written: at least one if the first is there, and not many more than
    /// `limit_bytes`. What is queued and not yet written is not seen.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] for a hole or damage, [`StorageError::Io`] for a
    /// failing disk.
    fn read(&self, range: Range<u64>, limit_bytes: usize) -> Result<Vec<(u64, Bytes)>, StorageError>;

    /// Whether [`LogEngine::read`] may wait for a disk.
    fn read_may_block(&self) -> bool;

    /// Bytes of the records held, approximately.
    fn held_bytes(&self) -> u64;

    /// The lowest index from which on the log holds at most `keep_bytes`,
    /// approximately; `None` when all of it is within. Purging up to just below
    /// it brings the log back to that size.
    fn first_index_within(&self, keep_bytes: u64) -> Option<u64>;
}

/// An operation without its callback.
#[derive(Clone)]
enum Change {
    Append(Vec<(u64, Bytes)>),
    Vote(Bytes),
    Truncate(Option<u64>),
    Purge(u64, Bytes),
    Committed(Bytes),
}

impl LogOp {
    fn split(self) -> (Change, Option<Done>) {
        match self {
            LogOp::Append { records, done } => (Change::Append(records), Some(done)),
            LogOp::SaveVote { vote, done } => (Change::Vote(vote), Some(done)),
            LogOp::TruncateAfter { last } => (Change::Truncate(last), None),
            LogOp::Purge { upto, position } => (Change::Purge(upto, position), None),
            LogOp::SaveCommitted { position } => (Change::Committed(position), None),
        }
    }
}

fn first_after(purged: Option<u64>) -> u64 {
    purged.map_or(0, |index| index.saturating_add(1))
}

fn corrupt(reason: String) -> StorageError {
    StorageError::Corrupt { what: "log".to_owned(), reason }
}

/// Where the log stands, and the rules by which an operation may move it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Extent {
    purged: Option<u64>,
    last: Option<u64>,
}

impl Extent {
    /// Moves the end past `records`.
    ///
    /// An append that would leave a hole is a bug above this file, and would be
    /// found only at the next start, when it is too late: so it fails here.
    fn append(&mut self, records: &[(u64, Bytes)]) -> Result<(), StorageError> {
        let Some((start, _)) = records.first() else {
            return Ok(());
        };
        let consecutive = records.iter().zip(*start..).all(|((index, _), expected)| *index == expected);
        if !consecutive {
            return Err(corrupt(format!("the records appended at {start} are not consecutive")));
        }
        self.extend(*start..start + records.len() as u64)
    }

    /// Moves the end past records of these indexes.
    fn extend(&mut self, indexes: Range<u64>) -> Result<(), StorageError> {
        if indexes.is_empty() {
            return Ok(());
        }
        let expected = match self.last {
            Some(last) => Some(last + 1),
            None => self.purged.map(|purged| purged.saturating_add(1)),
        };
        if expected.is_some_and(|expected| expected != indexes.start) {
            return Err(corrupt(format!("an append at {} would leave a hole after {self:?}", indexes.start)));
        }
        self.last = Some(indexes.end - 1);
        Ok(())
    }

    /// Moves the end back to `keep`. The indexes that fall away.
    fn truncate(&mut self, keep: Option<u64>) -> Range<u64> {
        let first = first_after(self.purged);
        let from = keep.map_or(first, |keep| keep.saturating_add(1)).max(first);
        let Some(last) = self.last.filter(|last| *last >= from) else {
            return 0..0;
        };
        self.last = from.checked_sub(1).filter(|end| *end >= first);
        from..last + 1
    }

    /// Moves the beginning to just above `upto`. Whether that changed anything.
    fn purge(&mut self, upto: u64) -> bool {
        if self.purged.is_some_and(|purged| purged >= upto) {
            return false;
        }
        self.purged = Some(upto);
        self.last = self.last.filter(|last| *last > upto);
        true
    }
}

/// Bytes held, by stretches of the log: enough to say where to purge to.
#[derive(Debug, Default)]
struct HeldBytes {
    stretches: VecDeque<Stretch>,
    total: u64,
}

#[derive(Debug)]
struct Stretch {
    indexes: Range<u64>,
    bytes: u64,
}

/// A stretch is closed when it has this many bytes: 4 GiB are 4,096 stretches.
const STRETCH_BYTES: u64 = 1 << 20;

impl HeldBytes {
    fn append(&mut self, index: u64, bytes: u64) {
        self.append_all(index..index + 1, bytes);
    }

    /// Takes note of consecutive records that have so many bytes together.
    fn append_all(&mut self, indexes: Range<u64>, bytes: u64) {
        self.total += bytes;
        match self.stretches.back_mut() {
            Some(back) if back.bytes < STRETCH_BYTES && back.indexes.end == indexes.start => {
                back.indexes.end = indexes.end;
                back.bytes += bytes;
            }
            _ => self.stretches.push_back(Stretch { indexes, bytes }),
        }
    }

    fn truncate_from(&mut self, from: u64) {
        while let Some(back) = self.stretches.back_mut() {
            if back.indexes.end <= from {
                break;
            }
            let end = from.max(back.indexes.start);
            let dropped = back.share(end..back.indexes.end);
            back.indexes.end = end;
            back.bytes -= dropped;
            self.total -= dropped;
            if back.indexes.is_empty() {
                self.total -= back.bytes;
                self.stretches.pop_back();
            }
        }
    }

    fn purge(&mut self, upto: u64) {
        while let Some(front) = self.stretches.front_mut() {
            if front.indexes.start > upto {
                break;
            }
            let end = front.indexes.end.min(upto.saturating_add(1));
            let dropped = front.share(front.indexes.start..end);
            front.indexes.start = end;
            front.bytes -= dropped;
            self.total -= dropped;
            if front.indexes.is_empty() {
                self.total -= front.bytes;
                self.stretches.pop_front();
            }
        }
    }

    fn first_index_within(&self, keep_bytes: u64) -> Option<u64> {
        let mut excess = self.total.checked_sub(keep_bytes).filter(|excess| *excess > 0)?;
        for stretch in &self.stretches {
            if stretch.bytes < excess {
                excess -= stretch.bytes;
                continue;
            }
            let entries = stretch.indexes.end - stretch.indexes.start;
            let share = (u128::from(entries) * u128::from(excess)).div_ceil(u128::from(stretch.bytes.max(1)));
            return Some(stretch.indexes.start + share as u64);
        }
        self.stretches.back().map(|back| back.indexes.end)
    }
}

impl Stretch {
    /// The bytes of a part of it, taking every record for equally large.
    fn share(&self, part: Range<u64>) -> u64 {
        let entries = u128::from((self.indexes.end - self.indexes.start).max(1));
        (u128::from(self.bytes) * u128::from(part.end - part.start) / entries) as u64
    }
}

#[cfg(test)]
mod tests;
