//! The past, for watchers behind the ring: bounded reads of history, shared by
//! the watchers that stand at the same place.
//!
//! A read takes one view, and compact mark and events come from that view. No
//! view outlives the read.

use std::collections::VecDeque;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::ring::WatchEvent;
use crate::mvcc::{self, EventQuery, Marks, Published, ReadError};
use crate::storage::StorageError;
use crate::types::{ApplyError, KeyRange, Revision, RevisionEvents, Space};

/// Changes one read may look at, so that a range with few events in a long
/// history holds no view for long.
const CHANGES_PER_READ: usize = 10_000;
/// Reads kept for others. With the reads' own bound this bounds the memory;
/// the oldest is dropped first.
const CHUNKS_KEPT: usize = 16;

/// Where the store stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Position {
    pub(super) revision: Revision,
    pub(super) compacted: Revision,
}

/// One read of the past.
#[derive(Clone, Debug)]
pub(super) struct PastQuery {
    pub(super) space: Space,
    pub(super) range: KeyRange,
    pub(super) from: Revision,
    pub(super) prev: bool,
    pub(super) budget_bytes: usize,
}

/// What a read of the past gave.
#[derive(Debug)]
pub(super) enum Past {
    /// Whole revisions in order, and the next revision to ask for.
    Events(Vec<RevisionEvents>, Revision),
    /// The start of the read lies below this compact mark.
    Compacted(Revision),
}

/// Where the past is read; `Published` in a node, a list in tests.
pub(super) trait History: Send + Sync + 'static {
    /// The newest revision and the compact mark of a space.
    fn position(&self, space: Space) -> Position;

    /// Events from `query.from` on, up to the newest revision at most. Blocks on
    /// the disk. The next revision is greater than `query.from`, or equal when
    /// `query.from` is in the future.
    ///
    /// # Errors
    /// When the disk fails or a record is damaged; the node must stop.
    fn read(&self, query: &PastQuery) -> Result<Past, StorageError>;
}

impl History for Published {
    fn position(&self, space: Space) -> Position {
        let view = self.view();
        Position { revision: view.revision, compacted: view.compacted(space) }
    }

    fn read(&self, query: &PastQuery) -> Result<Past, StorageError> {
        let view = self.view();
        let marks = Marks { revision: view.revision, compacted: view.compacted(query.space) };
        if query.from < marks.compacted {
            return Ok(Past::Compacted(marks.compacted));
        }
        if query.from > marks.revision {
            return Ok(Past::Events(Vec::new(), query.from));
        }
        let wanted = EventQuery {
            space: query.space,
            range: &query.range,
            from: query.from,
            to: marks.revision,
            prev: query.prev,
            budget_bytes: query.budget_bytes,
            budget_changes: CHANGES_PER_READ,
        };
        match mvcc::events(&view.data, marks, &wanted) {
            Ok((events, next)) if next > query.from => Ok(Past::Events(events, next)),
            Ok((_, next)) => Err(unexpected(query, format!("the read went from it to {next}"))),
            Err(ReadError::Refused(ApplyError::Compacted)) => Ok(Past::Compacted(marks.compacted)),
            Err(ReadError::Refused(refusal)) => Err(unexpected(query, refusal.to_string())),
            Err(ReadError::Storage(error)) => Err(error),
        }
    }
}

/// A read that can only fail on a damaged store was refused.
fn unexpected(query: &PastQuery, reason: String) -> StorageError {
    StorageError::Corrupt { what: format!("history at revision {}", query.from), reason }
}

/// Consecutive revisions of a whole space, searchable by key.
pub(super) struct Chunk {
    space: Space,
    from: Revision,
    /// The revision after the last it covers.
    pub(super) next: Revision,
    /// In order.
    events: Vec<(Revision, Arc<WatchEvent>)>,
    /// Places in `events`, by key and then place.
    by_key: Vec<u32>,
}

impl Chunk {
    /// A chunk of the events of `from..next`.
    pub(super) fn new(space: Space, from: Revision, next: Revision, revisions: &[RevisionEvents]) -> Chunk {
        let mut events = Vec::new();
        for revision in revisions {
            let wrap = |event| (revision.revision, Arc::new(WatchEvent::new(Arc::clone(event))));
            events.extend(revision.events.iter().map(wrap));
        }
        let mut by_key: Vec<u32> = (0..events.len() as u32).collect();
        by_key.sort_by(|a, b| key_at(&events, *a).cmp(key_at(&events, *b)));
        Chunk { space, from, next, events, by_key }
    }

    /// Events of `range` from revision `from` on, in order: what a scan of the
    /// chunk would give, for the price of what it finds.
    pub(super) fn select(&self, range: &KeyRange, from: Revision) -> Vec<Arc<WatchEvent>> {
        let begin = self.by_key.partition_point(|place| key_at(&self.events, *place) < range.start());
        let end = self.by_key.partition_point(|place| match range.end() {
            Bound::Included(end) => &key_at(&self.events, *place)[..] <= end,
            Bound::Excluded(end) => &key_at(&self.events, *place)[..] < end,
            Bound::Unbounded => true,
        });
        let mut places = self.by_key.get(begin..end).unwrap_or_default().to_vec();
        places.sort_unstable();
        let found = places.into_iter().map(|place| &self.events[place as usize]);
        found.filter(|(revision, _)| *revision >= from).map(|(_, event)| event.clone()).collect()
    }
}

fn key_at(events: &[(Revision, Arc<WatchEvent>)], place: u32) -> &Bytes {
    &events[place as usize].1.event().kv.key
}

/// The newest chunks read, so that many watchers at one place cost one scan.
#[derive(Default)]
pub(super) struct Chunks {
    kept: Mutex<VecDeque<Arc<Chunk>>>,
}

impl Chunks {
    /// The chunk of `space` that holds `revision`, if one is kept.
    pub(super) fn find(&self, space: Space, revision: Revision) -> Option<Arc<Chunk>> {
        let kept = self.kept.lock();
        let holds =
            |chunk: &&Arc<Chunk>| chunk.space == space && chunk.from <= revision && revision < chunk.next;
        kept.iter().rev().find(holds).cloned()
    }

    /// Keeps a chunk for others.
    pub(super) fn keep(&self, chunk: Arc<Chunk>) {
        let mut kept = self.kept.lock();
        kept.push_back(chunk);
        if kept.len() > CHUNKS_KEPT {
            kept.pop_front();
        }
    }

    /// Forgets all chunks.
    pub(super) fn clear(&self) {
        self.kept.lock().clear();
    }
}
