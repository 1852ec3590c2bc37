//! etcd's Range: at the head from `current`, in the past from `versions`.

use std::cmp::Ordering;
use std::ops::Bound;
use std::ops::ControlFlow;

use super::{Marks, ReadError, key_value, parse_version, record_at};
use crate::storage::layout::{self, Family, Record, VersionRef};
use crate::storage::{Read, StorageError, codec};
use crate::types::{
    ApplyError, KeyRange, KeyValue, RangeQuery, RangeReply, Revision, SortOrder, SortTarget, Space,
};

/// The live keys of a state, whether they come from disk alone or from disk
/// under changes that are not written yet.
pub trait Keys {
    /// The record of one key.
    ///
    /// # Errors
    /// When the disk fails or the record is damaged.
    fn record(&self, space: Space, key: &[u8]) -> Result<Option<Record>, StorageError>;

    /// Calls `visit` with each key of `range` in order, until it breaks.
    ///
    /// # Errors
    /// When the disk fails; or what `visit` returns.
    fn visit(&self, space: Space, range: &KeyRange, visit: &mut Visit<'_>) -> Result<(), ReadError>;
}

/// What is called with each key of a range and its record, until it breaks.
pub type Visit<'a> = dyn FnMut(&[u8], Found<'_>) -> Result<ControlFlow<()>, ReadError> + 'a;

/// A live key's record, decoded only when it is looked at.
pub enum Found<'a> {
    /// As it stands on disk.
    Encoded(&'a [u8]),
    /// As it will be written.
    Decoded(&'a Record),
}

impl Found<'_> {
    /// About how many bytes it takes.
    fn bytes(&self) -> usize {
        match self {
            Found::Encoded(bytes) => bytes.len(),
            Found::Decoded(record) => record.value.len(),
        }
    }

    /// The record.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn record(&self) -> Result<Record, StorageError> {
        match self {
            Found::Encoded(bytes) => codec::decode("current", bytes),
            Found::Decoded(record) => Ok((*record).clone()),
        }
    }
}

/// The bounds of a range among the keys of `current`.
pub fn range_bounds(space: Space, range: &KeyRange) -> (Vec<u8>, Vec<u8>) {
    let lower = layout::current(space, range.start());
    let upper = match range.end() {
        Bound::Included(key) => {
            let mut after = layout::current(space, key);
            after.push(0);
            after
        }
        Bound::Excluded(key) => layout::current(space, key),
        Bound::Unbounded => vec![space.tag() + 1],
    };
    (lower, upper)
}

impl<R: Read> Keys for R {
    fn record(&self, space: Space, key: &[u8]) -> Result<Option<Record>, StorageError> {
        let bytes = self.get(Family::Current, &layout::current(space, key))?;
        bytes.map(|bytes| codec::decode("current", &bytes)).transpose()
    }

    fn visit(&self, space: Space, range: &KeyRange, visit: &mut Visit<'_>) -> Result<(), ReadError> {
        if let KeyRange::Single(key) = range {
            if let Some(bytes) = self.get(Family::Current, &layout::current(space, key))? {
                let _only_key = visit(key, Found::Encoded(&bytes))?;
            }
            return Ok(());
        }
        if range.is_empty() {
            return Ok(());
        }
        let (lower, upper) = range_bounds(space, range);
        let mut cursor = self.scan(Family::Current, &lower, Some(&upper));
        cursor.seek_to_first();
        while let Some((key, value)) = cursor.item()? {
            if visit(&key[1..], Found::Encoded(value))?.is_break() {
                break;
            }
            cursor.next();
        }
        Ok(())
    }
}

/// Answers a range query from one state. At most `budget_bytes` of keys and
/// values are collected.
///
/// # Errors
/// `Compacted` or `FutureRevision` for a revision that cannot be read,
/// `ReplyTooLarge` beyond the budget, and storage errors.
pub fn range<R: Read>(
    data: &R,
    marks: Marks,
    query: &RangeQuery,
    budget_bytes: usize,
) -> Result<RangeReply, ReadError> {
    check_revision(marks, query.revision)?;
    if query.revision.0 <= 0 || query.revision == marks.revision {
        return range_at_head(data, query, budget_bytes);
    }
    let mut collector = Collector::new(query, budget_bytes);
    visit_past(data, query, &mut collector)?;
    Ok(collector.finish())
}

/// How far a walk goes that does not leave the thread of its caller.
const SHORT_KEYS: usize = 512;
/// The same in bytes of keys and values.
const SHORT_BYTES: usize = 256 << 10;

/// Answers a range query as [`range`] does if that is some hundreds of microseconds of work at the
/// most; `None` if it may be more.
///
/// # Errors
/// Those of [`range`].
pub fn range_if_short<R: Read>(
    data: &R,
    marks: Marks,
    query: &RangeQuery,
    budget_bytes: usize,
) -> Result<Option<RangeReply>, ReadError> {
    if matches!(query.range, KeyRange::Single(_)) {
        return range(data, marks, query, budget_bytes).map(Some);
    }
    check_revision(marks, query.revision)?;
    if query.revision.0 > 0 && query.revision != marks.revision {
        return Ok(None);
    }
    let mut collector = Collector::new(query, budget_bytes);
    let (mut keys, mut bytes, mut is_long) = (0, 0, false);
    data.visit(query.space, &query.range, &mut |key, found| {
        keys += 1;
        bytes += found.bytes();
        is_long = keys > SHORT_KEYS || bytes > SHORT_BYTES;
        if is_long {
            return Ok(ControlFlow::Break(()));
        }
        collector.count(key, &found)?;
        Ok(ControlFlow::Continue(()))
    })?;
    Ok((!is_long).then(|| collector.finish()))
}

/// Answers a range query from the newest state, whatever revision it names.
///
/// # Errors
/// `ReplyTooLarge`, and storage errors.
pub fn range_at_head<K: Keys>(
    data: &K,
    query: &RangeQuery,
    budget_bytes: usize,
) -> Result<RangeReply, ReadError> {
    let mut collector = Collector::new(query, budget_bytes);
    data.visit(query.space, &query.range, &mut |key, found| {
        collector.count(key, &found)?;
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(collector.finish())
}

/// One piece of a long range: keys in order from the start of the range, up to
/// the query's limit or about `piece_bytes`, whichever comes first, but at least
/// one. `more` says whether keys are left; nothing is counted. The query must be
/// in key order and without revision filters.
///
/// # Errors
/// `Compacted` or `FutureRevision` for a revision that cannot be read, and
/// storage errors.
pub fn range_piece<R: Read>(
    data: &R,
    marks: Marks,
    query: &RangeQuery,
    piece_bytes: usize,
) -> Result<RangeReply, ReadError> {
    check_revision(marks, query.revision)?;
    let mut collector = Collector { piece: true, ..Collector::new(query, piece_bytes) };
    if query.revision.0 <= 0 || query.revision == marks.revision {
        data.visit(query.space, &query.range, &mut |key, found| {
            collector.take(key_value(key, found.record()?))?;
            Ok(if collector.is_done() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
    } else {
        visit_past(data, query, &mut collector)?;
    }
    Ok(RangeReply { count: 0, ..collector.reply })
}

/// Whether a state can be read at `revision` (0 and below: at its head).
pub(super) fn check_revision(marks: Marks, revision: Revision) -> Result<(), ApplyError> {
    match revision {
        at if at > marks.revision => Err(ApplyError::FutureRevision),
        at if at.0 > 0 && at < marks.compacted => Err(ApplyError::Compacted),
        _ => Ok(()),
    }
}

/// Walks the versions of each key in the range to the newest at the query's revision.
fn visit_past<R: Read>(data: &R, query: &RangeQuery, collector: &mut Collector<'_>) -> Result<(), ReadError> {
    if query.range.is_empty() {
        return Ok(());
    }
    let (space, at) = (query.space, query.revision);
    let lower = layout::versions_prefix(space, query.range.start());
    let upper = match query.range.end() {
        Bound::Included(key) => after_versions(space, key),
        Bound::Excluded(key) => layout::versions_prefix(space, key),
        Bound::Unbounded => vec![space.tag() + 1],
    };
    let mut cursor = data.scan(Family::Versions, &lower, Some(&upper));
    cursor.seek_to_first();
    while let Some((found, value)) = cursor.item()? {
        let (key, revision) = parse_version(found)?;
        if revision > at {
            cursor.seek(&layout::version(space, &key, at));
            continue;
        }
        let version: VersionRef = codec::decode("version", value)?;
        if !version.tombstone {
            if collector.wants() {
                let record = record_at(data, revision, version.sub)?;
                collector.take(key_value(&key, record))?;
                if collector.is_done() {
                    return Ok(());
                }
            }
            collector.reply.count += 1;
        }
        cursor.seek(&after_versions(space, &key));
    }
    Ok(())
}

/// The least `versions` key above all versions of `key`.
fn after_versions(space: Space, key: &[u8]) -> Vec<u8> {
    let mut after = layout::versions_prefix(space, key);
    after.extend_from_slice(&[0xff; 8]);
    after
}

/// Gathers what a query returns, by etcd's rules: the count ignores limit and
/// filters; the limit comes after filters and sorting.
struct Collector<'a> {
    query: &'a RangeQuery,
    reply: RangeReply,
    /// Keys after which nothing more is needed; one above the limit, to know of more.
    enough: usize,
    budget_bytes: usize,
    used_bytes: usize,
    /// Stop, rather than refuse, when the limit or the budget is reached.
    piece: bool,
}

impl<'a> Collector<'a> {
    fn new(query: &'a RangeQuery, budget_bytes: usize) -> Self {
        let sees_all = query.sort_order != SortOrder::None || query.sort_target != SortTarget::Key;
        let enough = match query.limit {
            _ if query.count_only => 0,
            0 => usize::MAX,
            _ if sees_all => usize::MAX,
            limit => usize::try_from(limit).map_or(usize::MAX, |limit| limit.saturating_add(1)),
        };
        Collector { query, reply: RangeReply::default(), enough, budget_bytes, used_bytes: 0, piece: false }
    }

    /// Whether the next key could be part of the answer.
    fn wants(&self) -> bool {
        self.piece || self.reply.kvs.len() < self.enough
    }

    /// Whether a piece is full.
    fn is_done(&self) -> bool {
        self.piece && self.reply.more
    }

    /// Counts a key, and takes it if it could be part of the answer.
    fn count(&mut self, key: &[u8], found: &Found<'_>) -> Result<(), ReadError> {
        if self.wants() {
            self.take(key_value(key, found.record()?))?;
        }
        self.reply.count += 1;
        Ok(())
    }

    fn take(&mut self, mut kv: KeyValue) -> Result<(), ApplyError> {
        let above = |least: Revision, actual: Revision| least.0 <= 0 || actual >= least;
        let below = |most: Revision, actual: Revision| most.0 <= 0 || actual <= most;
        let kept = above(self.query.min_mod_revision, kv.mod_revision)
            && below(self.query.max_mod_revision, kv.mod_revision)
            && above(self.query.min_create_revision, kv.create_revision)
            && below(self.query.max_create_revision, kv.create_revision);
        if !kept {
            return Ok(());
        }
        // A sort by value needs the values even when they are not returned.
        if self.query.keys_only && self.query.sort_target != SortTarget::Value {
            kv.value.clear();
        }
        self.used_bytes += kv.footprint();
        if self.piece {
            let kept = self.reply.kvs.len();
            let limit = usize::try_from(self.query.limit).unwrap_or(usize::MAX);
            let full = (limit > 0 && kept >= limit) || (kept > 0 && self.used_bytes > self.budget_bytes);
            self.reply.more = full;
            if !full {
                self.reply.kvs.push(kv);
            }
            return Ok(());
        }
        if self.used_bytes > self.budget_bytes {
            return Err(ApplyError::ReplyTooLarge { limit_bytes: self.budget_bytes as u64 });
        }
        self.reply.kvs.push(kv);
        Ok(())
    }

    fn finish(mut self) -> RangeReply {
        let query = self.query;
        let by_target = |a: &KeyValue, b: &KeyValue| -> Ordering {
            match query.sort_target {
                SortTarget::Key => a.key.cmp(&b.key),
                SortTarget::Version => a.version.cmp(&b.version),
                SortTarget::Create => a.create_revision.cmp(&b.create_revision),
                SortTarget::Mod => a.mod_revision.cmp(&b.mod_revision),
                SortTarget::Value => a.value.cmp(&b.value),
            }
        };
        match (query.sort_order, query.sort_target) {
            // The keys come in key order already.
            (SortOrder::None | SortOrder::Ascend, SortTarget::Key) => {}
            (SortOrder::None | SortOrder::Ascend, _) => self.reply.kvs.sort_by(by_target),
            (SortOrder::Descend, _) => self.reply.kvs.sort_by(|a, b| by_target(b, a)),
        }
        let limit = usize::try_from(query.limit).unwrap_or(usize::MAX);
        if limit > 0 && self.reply.kvs.len() > limit {
            self.reply.kvs.truncate(limit);
            self.reply.more = true;
        }
        if query.keys_only {
            self.reply.kvs.iter_mut().for_each(|kv| kv.value.clear());
        }
        self.reply
    }
}
