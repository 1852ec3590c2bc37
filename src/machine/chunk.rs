//! What a chunk of entries has changed but not written yet, and reads through it.
//!
//! Point reads see the chunk's changes over the disk; so do scans of live keys.
//! Other families are read from disk alone, so whoever scans them writes the
//! chunk out first (`Machine::write_out`).

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;

use super::{Effect, REPLY_BYTES_MAX};
use crate::mvcc::{self, Found, Keys, ReadError, Visit};
use crate::storage::layout::{self, Change, Family, Record, VersionRef};
use crate::storage::{Batch, Read, StateDb, StorageError};
use crate::types::{
    ApplyError, Event, EventKind, KeyRange, KeyValue, LeaseId, Revision, RevisionEvents, Space,
};

/// What a kept record takes beside its key and value.
const RECENT_ENTRY_BYTES: usize = 256;

/// Bytes of records that are forgotten at once, beyond those that have to be: whoever writes waits for it.
const FORGOTTEN_BYTES_MAX: usize = 1 << 20;

/// A batch starts with as much room as the last one took, but with no more than this.
const BATCH_BYTES_KEPT: usize = 1 << 20;

/// The unwritten part of the state.
#[derive(Default)]
pub(super) struct Chunk {
    pub batch: Batch,
    pub events: Vec<Arc<RevisionEvents>>,
    pub effects: Vec<Effect>,
    /// Live keys as the chunk leaves them, by their key in `current`; `None` is removed.
    /// What was written stays for a while, because whoever writes a key soon
    /// writes it again, and would look it up on disk first.
    current: BTreeMap<Vec<u8>, Known>,
    /// About how many bytes `current` has.
    current_bytes: usize,
    /// Up to where `current` was cleared the last time.
    forgotten: Vec<u8>,
    /// What the chunk removed, by its key in `current`.
    removed: Vec<Vec<u8>>,
    /// Whether a transaction has changed `current` and may yet be abandoned.
    is_open: bool,
}

impl Chunk {
    /// Takes out what is to be written; events and effects stay until they are published.
    pub fn take_writes(&mut self) -> Batch {
        assert!(!self.is_open, "a transaction is open");
        let room_bytes = self.batch.size_bytes().min(BATCH_BYTES_KEPT);
        std::mem::replace(&mut self.batch, Batch::with_capacity(room_bytes))
    }

    /// Forgets what was removed, which scans would step over for ever; and records until those left take no
    /// more than this, or somewhat less, so that it is not for each one: in the order of their keys, because
    /// which will be written again nobody knows.
    pub fn forget(&mut self, bytes_max: usize) {
        assert!(!self.is_open, "a transaction is open");
        for place in std::mem::take(&mut self.removed) {
            if self.current.get(&place).is_some_and(Option::is_none) {
                self.replace(&place, None);
            }
        }
        if self.current_bytes <= bytes_max {
            return;
        }
        let enough = bytes_max - (bytes_max / 64).min(FORGOTTEN_BYTES_MAX);
        while self.current_bytes > enough {
            let from = std::mem::take(&mut self.forgotten);
            let mut gone = self.current.extract_if(from.., |_, _| true);
            while self.current_bytes > enough {
                // At the end it goes on from the beginning.
                let Some((place, known)) = gone.next() else { break };
                self.current_bytes -= footprint(&place, &known);
                self.forgotten = place;
            }
        }
    }

    /// Replaces what is known of a live key, and returns what was.
    fn replace(&mut self, place: &[u8], known: Option<Known>) -> Option<Known> {
        let bytes = |known: &Known| footprint(place, known);
        self.current_bytes += known.as_ref().map_or(0, bytes);
        let before = match (known, self.current.get_mut(place)) {
            (Some(known), Some(stands)) => Some(std::mem::replace(stands, known)),
            (Some(known), None) => self.current.insert(place.to_vec(), known),
            (None, _) => self.current.remove(place),
        };
        self.current_bytes -= before.as_ref().map_or(0, bytes);
        before
    }
}

/// What is known of a live key: its record, or that there is none.
type Known = Option<Record>;

/// About how many bytes it takes to remember it.
fn footprint(place: &[u8], known: &Known) -> usize {
    RECENT_ENTRY_BYTES + place.len() + known.as_ref().map_or(0, |record| record.value.len())
}

/// The changes of one revision while it is being made. They reach the chunk's
/// batch only when the whole transaction is known to succeed.
pub(super) struct Transaction {
    pub revision: Revision,
    pub actor: Option<Arc<str>>,
    pub time_ms: u64,
    /// What its answer may still grow by.
    pub reply_bytes_left: usize,
    changes: Vec<Made>,
}

/// One change of a transaction.
struct Made {
    space: Space,
    key: Bytes,
    /// The key in `current`.
    place: Vec<u8>,
    record: Option<Record>,
    prev: Option<Record>,
    /// What the chunk knew before, to undo the change.
    before: Option<Known>,
}

impl Transaction {
    pub fn new(revision: Revision, actor: Option<Arc<str>>, time_ms: u64) -> Transaction {
        Transaction { revision, actor, time_ms, reply_bytes_left: REPLY_BYTES_MAX, changes: Vec::new() }
    }

    /// Counts records that the answer will have.
    ///
    /// # Errors
    /// `ReplyTooLarge` when they are more than one answer may have.
    pub fn returns(&mut self, kvs: &[KeyValue]) -> Result<(), ApplyError> {
        let bytes = kvs.iter().map(KeyValue::footprint).sum();
        let left = self.reply_bytes_left.checked_sub(bytes);
        self.reply_bytes_left =
            left.ok_or(ApplyError::ReplyTooLarge { limit_bytes: REPLY_BYTES_MAX as u64 })?;
        Ok(())
    }

    /// Sets or removes a key that stood as `prev`.
    pub fn change(
        &mut self,
        chunk: &mut Chunk,
        space: Space,
        key: Bytes,
        record: Option<Record>,
        prev: Option<Record>,
    ) {
        let place = layout::current(space, &key);
        let before = chunk.replace(&place, Some(record.clone()));
        chunk.is_open = true;
        self.changes.push(Made { space, key, place, record, prev, before });
    }

    /// Whether the transaction changed nothing, and so has no revision.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Puts everything back as it was before the transaction.
    pub fn abandon(self, chunk: &mut Chunk) {
        for made in self.changes.into_iter().rev() {
            chunk.replace(&made.place, made.before);
        }
        chunk.is_open = false;
    }

    /// Makes the changes part of the chunk.
    pub fn commit(self, db: &StateDb, chunk: &mut Chunk) {
        chunk.is_open = false;
        let mut events = Vec::with_capacity(self.changes.len());
        for (sub, made) in self.changes.into_iter().enumerate() {
            let sub = u32::try_from(sub).expect("a transaction is far smaller than 4 G changes");
            let Made { space, key, place, record, prev, .. } = made;
            let batch = &mut chunk.batch;
            match &record {
                Some(record) => batch.put_encoded(db, Family::Current, &place, record),
                None => {
                    batch.delete(db, Family::Current, &place);
                    chunk.removed.push(place);
                }
            }
            move_attachment(db, batch, space, &key, prev.as_ref(), record.as_ref());
            let version = VersionRef {
                sub,
                tombstone: record.is_none(),
                digest: record.as_ref().map_or(0, mvcc::digest),
            };
            let version_key = layout::version(space, &key, self.revision);
            batch.put_encoded(db, Family::Versions, &version_key, &version);
            let kind = if record.is_some() { EventKind::Put } else { EventKind::Delete };
            let change = Change {
                space,
                kind,
                key: key.clone(),
                record: record.clone(),
                actor: self.actor.clone(),
                time_ms: self.time_ms,
            };
            batch.put_encoded(db, Family::History, &layout::history(self.revision, sub), &change);
            let kv = match record {
                Some(record) => key_value(key.clone(), record),
                None => mvcc::tombstone(key.clone(), self.revision),
            };
            let prev = prev.map(|prev| key_value(key, prev));
            events.push(Arc::new(Event { space, kind, kv, prev }));
        }
        chunk.events.push(Arc::new(RevisionEvents { revision: self.revision, events }));
    }
}

/// Keeps the lease's list of keys in step with the key's record.
fn move_attachment(
    db: &StateDb,
    batch: &mut Batch,
    space: Space,
    key: &[u8],
    prev: Option<&Record>,
    now: Option<&Record>,
) {
    let lease_of = |record: Option<&Record>| record.map_or(LeaseId::NONE, |record| record.lease);
    let (before, after) = (lease_of(prev), lease_of(now));
    if before == after {
        return;
    }
    if before.is_some() {
        batch.delete(db, Family::Lease, &layout::lease_key(before, space, key));
    }
    if after.is_some() {
        batch.put(db, Family::Lease, &layout::lease_key(after, space, key), b"");
    }
}

/// A key and its record as clients see them, sharing the key's bytes.
pub(super) fn key_value(key: Bytes, record: Record) -> KeyValue {
    KeyValue {
        key,
        create_revision: record.create,
        mod_revision: record.modified,
        version: record.version,
        lease: record.lease,
        value: record.value,
    }
}

/// The live keys as the chunk leaves them: its changes over the disk.
pub(super) struct Layers<'a> {
    pub db: &'a StateDb,
    pub chunk: &'a Chunk,
}

impl Keys for Layers<'_> {
    fn record(&self, space: Space, key: &[u8]) -> Result<Option<Record>, StorageError> {
        match self.chunk.current.get(&layout::current(space, key)) {
            Some(record) => Ok(record.clone()),
            None => self.db.record(space, key),
        }
    }

    fn visit(&self, space: Space, range: &KeyRange, visit: &mut Visit<'_>) -> Result<(), ReadError> {
        if let KeyRange::Single(key) = range {
            // What transactions compare and read, nearly always: no cursor is needed for it.
            if let Some(record) = self.record(space, key)? {
                let _only_key = visit(key, Found::Decoded(&record))?;
            }
            return Ok(());
        }
        if range.is_empty() {
            return Ok(());
        }
        let (lower, upper) = mvcc::range_bounds(space, range);
        let mut changed = self.chunk.current.range(lower.clone()..upper.clone()).peekable();
        let mut cursor = self.db.scan(Family::Current, &lower, Some(&upper));
        cursor.seek_to_first();
        loop {
            let stored = cursor.item()?;
            let change = changed.peek().copied();
            let stored_is_first = match (stored, change) {
                (None, None) => return Ok(()),
                (Some((place, _)), Some((changed, _))) => place < &changed[..],
                (stored, None) => stored.is_some(),
                (None, Some(_)) => false,
            };
            let flow = match (stored, change) {
                (Some((place, value)), _) if stored_is_first => {
                    let flow = visit(&place[1..], Found::Encoded(value))?;
                    cursor.next();
                    flow
                }
                (stored, Some((place, record))) => {
                    changed.next();
                    if stored.is_some_and(|(hidden, _)| hidden == &place[..]) {
                        cursor.next();
                    }
                    match record {
                        Some(record) => visit(&place[1..], Found::Decoded(record))?,
                        None => ControlFlow::Continue(()),
                    }
                }
                (_, None) => return Ok(()),
            };
            if flow.is_break() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_goes_round_and_is_counted() {
        let mut chunk = Chunk::default();
        let place = |n: u8| vec![n];
        let one = footprint(&place(0), &None);
        (0..100).for_each(|n| drop(chunk.replace(&place(n), Some(None))));
        assert_eq!(chunk.current_bytes, 100 * one);
        chunk.forget(100 * one);
        assert_eq!(chunk.current.len(), 100, "there is room for all");
        chunk.forget(64 * one);
        assert_eq!(
            chunk.current.keys().next(),
            Some(&place(37)),
            "the first, and one so that it is not each time"
        );
        (0..37).for_each(|n| drop(chunk.replace(&place(n), Some(None))));
        chunk.forget(32 * one);
        let left: Vec<u8> = chunk.current.keys().map(|place| place[0]).collect();
        assert_eq!(left, (5..36).collect::<Vec<_>>(), "from there to the end, and on from the beginning");
        assert_eq!(chunk.current_bytes, 31 * one);
        chunk.forget(0);
        assert_eq!((chunk.current.len(), chunk.current_bytes), (0, 0));
    }

    #[test]
    fn what_is_removed_is_not_remembered_once_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let db = StateDb::open(dir.path(), &crate::storage::StateOptions::default()).unwrap();
        let mut chunk = Chunk::default();
        let one = Record {
            create: Revision(2),
            modified: Revision(2),
            version: 1,
            lease: LeaseId::NONE,
            value: Bytes::new(),
        };
        let some = || Some(one.clone());
        let change = |chunk: &mut Chunk, revision, key: &'static [u8], record: Option<Record>| {
            let mut transaction = Transaction::new(Revision(revision), None, 0);
            transaction.change(chunk, Space::User, Bytes::from_static(key), record, None);
            transaction.commit(&db, chunk);
        };
        change(&mut chunk, 2, b"stays", some());
        change(&mut chunk, 3, b"goes", some());
        change(&mut chunk, 4, b"goes", None);
        change(&mut chunk, 5, b"comes back", None);
        change(&mut chunk, 6, b"comes back", some());
        assert_eq!(chunk.current.len(), 3, "nothing is on the disk yet");
        chunk.forget(usize::MAX);
        let left: Vec<_> = chunk.current.keys().cloned().collect();
        assert_eq!(left, [&b"comes back"[..], b"stays"].map(|key| layout::current(Space::User, key)));
        chunk.forget(0);
        assert_eq!(chunk.current_bytes, 0);
    }
}
