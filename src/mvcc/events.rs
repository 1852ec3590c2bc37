//! The events of a span of history, for watchers that are behind.

use std::sync::Arc;

use super::{Marks, ReadError, change_at, key_value, parse_version, record_at, version_at};
use crate::storage::layout::{self, Change, Family, VersionRef};
use crate::storage::{Read, StorageError, codec};
use crate::types::{ApplyError, Event, KeyRange, KeyValue, LeaseId, Revision, RevisionEvents, Space};

/// Which events are wanted.
#[derive(Clone, Debug)]
pub struct EventQuery<'a> {
    /// The space.
    pub space: Space,
    /// The keys.
    pub range: &'a KeyRange,
    /// The first revision.
    pub from: Revision,
    /// The last revision; at most the state's own.
    pub to: Revision,
    /// Fill in `Event::prev`, where it was not compacted away.
    pub prev: bool,
    /// About how many bytes of events to return. At least one revision is
    /// returned when there is one.
    pub budget_bytes: usize,
    /// How many changes to look at, so that a step over a long history in which
    /// nothing matches ends too.
    pub budget_changes: usize,
}

/// The events asked for, in order and never splitting a revision, and the
/// revision to go on from: everything before it was seen.
///
/// # Errors
/// `Compacted` when `from` is below the compact mark; storage errors.
pub fn events<R: Read>(
    data: &R,
    marks: Marks,
    query: &EventQuery<'_>,
) -> Result<(Vec<RevisionEvents>, Revision), ReadError> {
    if query.from < marks.compacted {
        return Err(ApplyError::Compacted.into());
    }
    let to = query.to.min(marks.revision);
    let mut gathered = Gathered::default();
    let next = match query.range {
        KeyRange::Single(key) => by_versions(data, marks, query, key, to, &mut gathered)?,
        _ => by_history(data, marks, query, to, &mut gathered)?,
    };
    Ok((gathered.revisions, next))
}

/// Follows one key from version to version, so that a quiet key in a busy
/// store costs nothing.
fn by_versions<R: Read>(
    data: &R,
    marks: Marks,
    query: &EventQuery<'_>,
    key: &[u8],
    to: Revision,
    gathered: &mut Gathered,
) -> Result<Revision, ReadError> {
    // Newer versions sort first, so the cursor runs backwards.
    let lower = layout::version(query.space, key, to);
    let mut upper = layout::version(query.space, key, query.from);
    upper.push(0);
    let mut cursor = data.scan(Family::Versions, &lower, Some(&upper));
    cursor.seek_to_last();
    let mut looked_at = 0;
    while let Some((found, value)) = cursor.item()? {
        let (_, revision) = parse_version(found)?;
        if gathered.bytes >= query.budget_bytes || looked_at >= query.budget_changes {
            return Ok(revision);
        }
        let version: VersionRef = codec::decode("version", value)?;
        let change = change_at(data, revision, version.sub)?;
        gathered.push(revision, event(data, marks, query, revision, change)?);
        looked_at += 1;
        cursor.prev();
    }
    Ok(to.next().max(query.from))
}

/// Reads every change in order and keeps those in the range.
fn by_history<R: Read>(
    data: &R,
    marks: Marks,
    query: &EventQuery<'_>,
    to: Revision,
    gathered: &mut Gathered,
) -> Result<Revision, ReadError> {
    let lower = layout::history(query.from, 0);
    let upper = layout::history(to.next(), 0);
    let mut cursor = data.scan(Family::History, &lower, Some(&upper));
    cursor.seek_to_first();
    let mut last = None;
    let mut looked_at = 0;
    while let Some((found, value)) = cursor.item()? {
        let (revision, _) = layout::parse_history(found).ok_or_else(|| StorageError::Corrupt {
            what: "history".to_owned(),
            reason: format!("key {found:02x?} is not one of the catalogue"),
        })?;
        // Budgets end a step only between revisions.
        if last != Some(revision)
            && last.is_some()
            && (gathered.bytes >= query.budget_bytes || looked_at >= query.budget_changes)
        {
            return Ok(revision);
        }
        last = Some(revision);
        looked_at += 1;
        let change: Change = codec::decode("history", value)?;
        // The scan may meet versions at or below the mark that are kept only
        // because they are the newest of their key; `from` is above those.
        if change.space == query.space && query.range.contains(&change.key) {
            gathered.push(revision, event(data, marks, query, revision, change)?);
        }
        cursor.next();
    }
    Ok(to.next().max(query.from))
}

/// The event a change is, with the key before it when that is wanted and known.
fn event<R: Read>(
    data: &R,
    marks: Marks,
    query: &EventQuery<'_>,
    revision: Revision,
    change: Change,
) -> Result<Event, ReadError> {
    let prev = match query.prev && revision.prev() >= marks.compacted {
        true => previous(data, query.space, &change.key, revision)?,
        false => None,
    };
    let kv = match change.record {
        Some(record) => key_value(&change.key, record),
        None => tombstone(change.key, revision),
    };
    Ok(Event { space: change.space, kind: change.kind, kv, prev })
}

/// The key and value that stood just before `revision`.
fn previous<R: Read>(
    data: &R,
    space: Space,
    key: &[u8],
    revision: Revision,
) -> Result<Option<KeyValue>, ReadError> {
    let Some((at, version)) = version_at(data, space, key, revision.prev())? else { return Ok(None) };
    if version.tombstone {
        return Ok(None);
    }
    Ok(Some(key_value(key, record_at(data, at, version.sub)?)))
}

/// The key-value of a removal: only key and mod revision are set.
pub fn tombstone(key: bytes::Bytes, revision: Revision) -> KeyValue {
    KeyValue {
        key,
        create_revision: Revision(0),
        mod_revision: revision,
        version: 0,
        lease: LeaseId::NONE,
        value: bytes::Bytes::new(),
    }
}

/// Events by revision, and about how many bytes they are.
#[derive(Default)]
struct Gathered {
    revisions: Vec<RevisionEvents>,
    bytes: usize,
}

impl Gathered {
    fn push(&mut self, revision: Revision, event: Event) {
        let size = |kv: &KeyValue| kv.key.len() + kv.value.len() + size_of::<KeyValue>();
        self.bytes += size(&event.kv) + event.prev.as_ref().map_or(0, size);
        match self.revisions.last_mut() {
            Some(last) if last.revision == revision => last.events.push(Arc::new(event)),
            _ => self.revisions.push(RevisionEvents { revision, events: vec![Arc::new(event)] }),
        }
    }
}
