//! openraft's log storage over a `storage::log` engine.
//!
//! Owns the tail: the newest entries, decoded, which replication and apply read
//! so that no entry is decoded twice. It writes nothing itself and has no thread.
//!
//! Invariants:
//! - The tail ends at the last entry, and an entry leaves it only once the engine
//!   has written it: what the tail does not have is found in the engine.
//! - `append` returns with its entries readable; its callback is called when they
//!   are durable, in order.
//! - Purge and truncate take effect here at once, and in the engine in the order
//!   in which they were submitted.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use openraft::storage::{
    IOFlushed, LeaderBoundedStreamError, LeaderBoundedStreamResult, LogState, RaftLogReader, RaftLogStorage,
};
use openraft::type_config::alias::LeaderIdOf;
use openraft::{OptionalSend, errors::LeaderChanged};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot};

use super::record;
use super::types::{Entry, LogId, TypeConfig, Vote};
use crate::storage::StorageError;
use crate::storage::log::{LogEngine, LogOp, LogResult};
use crate::telemetry;

/// A reply to a peer, or a step of a stream, has about this many bytes of entries.
const READ_BYTES: usize = 1 << 20;
/// One permit of the unflushed bytes.
const PERMIT_BYTES: usize = 1 << 10;

/// What the operator may tune.
#[derive(Clone, Debug)]
pub struct LogStoreOptions {
    /// Bytes of written entries that stay decoded in memory.
    pub tail_bytes: usize,
    /// Bytes of entries that may wait for the disk. Beyond, an append waits, and
    /// so does everything behind it: a slow disk must not fill the memory.
    pub unflushed_bytes_max: usize,
}

impl Default for LogStoreOptions {
    fn default() -> Self {
        LogStoreOptions { tail_bytes: 64 << 20, unflushed_bytes_max: 256 << 20 }
    }
}

/// The log as openraft writes it. One per node, because it alone keeps the order.
pub struct LogStore {
    shared: Arc<Shared>,
    unflushed: Arc<Semaphore>,
    permits: usize,
    /// Number of the newest append.
    appends: u64,
    /// What is known to be committed, until the next append takes it along: nothing rests on its
    /// being saved at once, and by itself it would wake the writer once more for each append.
    committed_unsaved: Option<Bytes>,
}

/// The log as replication and apply read it. Clones share it.
#[derive(Clone)]
pub struct LogReader {
    shared: Arc<Shared>,
}

struct Shared {
    engine: Arc<dyn LogEngine>,
    tail_bytes: usize,
    /// Shared with callbacks, which must not keep the engine open.
    log: Arc<Mutex<Log>>,
}

#[derive(Default)]
struct Log {
    purged: Option<LogId>,
    /// Where the log began when it was last appended to while empty.
    begin: u64,
    /// The last entry; `None` when the log has none.
    last: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    tail: VecDeque<Tailed>,
    tail_bytes: usize,
    /// Appends up to this number are in the engine.
    written: u64,
    /// Changes whenever entries are taken away, at either end: a read that went
    /// on outside the lock begins anew.
    removals: u64,
}

struct Tailed {
    entry: Entry,
    bytes: usize,
    append: u64,
}

impl Log {
    fn first_index(&self) -> u64 {
        self.purged.as_ref().map_or(0, |purged| purged.index + 1).max(self.begin)
    }

    /// One above the last index.
    fn end_index(&self) -> u64 {
        self.last.as_ref().map_or_else(|| self.first_index(), |last| last.index + 1)
    }

    /// The first index that the tail has.
    fn tail_index(&self) -> u64 {
        self.tail.front().map_or_else(|| self.end_index(), |front| front.entry.log_id.index)
    }

    fn clamp(&self, range: &Range<u64>) -> Range<u64> {
        range.start.max(self.first_index())..range.end.min(self.end_index())
    }

    /// Lets go of written entries while there are more than `limit` bytes.
    fn evict(&mut self, limit: usize) {
        while self.tail_bytes > limit
            && let Some(front) = self.tail.front()
            && front.append <= self.written
        {
            self.tail_bytes -= front.bytes;
            self.tail.pop_front();
        }
    }

    fn truncate_from(&mut self, index: u64) {
        while let Some(back) = self.tail.back()
            && back.entry.log_id.index >= index
        {
            self.tail_bytes -= back.bytes;
            self.tail.pop_back();
        }
        self.removals += 1;
    }

    fn purge_upto(&mut self, index: u64) {
        while let Some(front) = self.tail.front()
            && front.entry.log_id.index <= index
        {
            self.tail_bytes -= front.bytes;
            self.tail.pop_front();
        }
        self.removals += 1;
    }
}

impl LogStore {
    /// Opens the log that `engine` holds. `applied` is the index up to which the
    /// state machine's disk has the log's effect: entries above it are checked
    /// now, entries below when they are read.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] for damage or a hole; [`StorageError::Engine`]
    /// when the disk fails.
    pub fn open(
        engine: Arc<dyn LogEngine>,
        options: &LogStoreOptions,
        applied: Option<u64>,
    ) -> Result<LogStore, StorageError> {
        let verify_from = applied.map_or(0, |applied| applied.saturating_add(1));
        let recovered = engine.recover(verify_from, &record::verify)?;
        let mut log = Log::default();
        if let Some((index, position)) = &recovered.purged {
            let purged = record::decode_position(position)?;
            let right = purged.as_ref().is_some_and(|purged| purged.index == *index);
            if !right {
                return Err(StorageError::Corrupt {
                    what: "purge mark of the log".to_owned(),
                    reason: format!("it says {purged:?} and {index}"),
                });
            }
            log.purged = purged;
        }
        if let Some((index, bytes)) = &recovered.last {
            record::verify(*index, bytes)?;
            log.last = Some(record::position_of(bytes)?.into());
        }
        log.vote = recovered.vote.as_deref().map(record::decode_vote).transpose()?;
        log.committed = match &recovered.committed {
            Some(position) => record::decode_position(position)?,
            None => None,
        };
        let permits = (options.unflushed_bytes_max / PERMIT_BYTES).clamp(1, Semaphore::MAX_PERMITS / 2);
        let permits = permits.min(u32::MAX as usize);
        let shared = Shared { engine, tail_bytes: options.tail_bytes, log: Arc::new(Mutex::new(log)) };
        Ok(LogStore {
            shared: Arc::new(shared),
            unflushed: Arc::new(Semaphore::new(permits)),
            permits,
            appends: 0,
            committed_unsaved: None,
        })
    }

    fn submit_committed(&mut self) {
        if let Some(position) = self.committed_unsaved.take() {
            self.shared.engine.submit(LogOp::SaveCommitted { position });
        }
    }

    /// A reader of this log.
    pub fn reader(&self) -> LogReader {
        LogReader { shared: self.shared.clone() }
    }
}

impl Drop for LogStore {
    fn drop(&mut self) {
        self.submit_committed();
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let log = self.shared.log.lock();
        let last_log_id = log.last.or(log.purged);
        Ok(LogState { last_purged_log_id: log.purged, last_log_id })
    }

    async fn get_log_reader(&mut self) -> LogReader {
        self.reader()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (tell, told) = oneshot::channel::<LogResult>();
        self.shared.engine.submit(LogOp::SaveVote {
            vote: record::encode_vote(vote).into(),
            done: Box::new(move |result| {
                // Nobody waits any more when the node is stopping.
                let _ = tell.send(result);
            }),
        });
        let result =
            told.await.map_err(|_| io::Error::other("the log has stopped before the vote was saved"))?;
        result.map_err(io::Error::other)?;
        self.shared.log.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.committed_unsaved = Some(record::encode_position(committed.as_ref()).into());
        self.shared.log.lock().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let log = self.shared.log.lock();
        // After a crash the state machine may have been told of more than the
        // disk still holds, and openraft applies up to here when it starts.
        let last = log.last.or(log.purged);
        Ok(log.committed.and_then(|committed| match last {
            Some(last) if committed.index > last.index => Some(last),
            Some(_) => Some(committed),
            None => None,
        }))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encoded = entries.into_iter().map(|entry| (record::encode_entry(&entry), entry));
        let encoded: Vec<(Bytes, Entry)> = encoded.collect();
        let bytes: usize = encoded.iter().map(|(record, _)| record.len()).sum();
        let permits = bytes.div_ceil(PERMIT_BYTES).min(self.permits) as u32;
        let permit = self.unflushed.clone().acquire_many_owned(permits).await;
        let permit = permit.map_err(io::Error::other)?;

        metrics::counter!(telemetry::LOG_APPENDED).increment(encoded.len() as u64);
        metrics::counter!(telemetry::LOG_APPENDED_BYTES).increment(bytes as u64);
        self.appends += 1;
        let append = self.appends;
        let mut records = Vec::with_capacity(encoded.len());
        {
            let mut log = self.shared.log.lock();
            for (record, entry) in encoded {
                records.push((entry.log_id.index, record.clone()));
                if log.last.is_none() {
                    log.begin = entry.log_id.index;
                }
                log.last = Some(entry.log_id);
                log.tail_bytes += record.len();
                log.tail.push_back(Tailed { entry, bytes: record.len(), append });
            }
        }
        let (log, tail_bytes) = (self.shared.log.clone(), self.shared.tail_bytes);
        let done = Box::new(move |result: LogResult| {
            if result.is_ok() {
                let mut log = log.lock();
                log.written = append;
                log.evict(tail_bytes);
            }
            drop(permit);
            callback.io_completed(result.map_err(io::Error::other));
        });
        self.submit_committed();
        self.shared.engine.submit(LogOp::Append { records, done });
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let keep = last_log_id.as_ref().map(|id| id.index);
        {
            let mut log = self.shared.log.lock();
            let from = keep.map_or(0, |keep| keep + 1).max(log.first_index());
            if from < log.end_index() {
                log.truncate_from(from);
                let first = log.first_index();
                log.last = last_log_id.filter(|id| id.index >= first);
            }
        }
        self.shared.engine.submit(LogOp::TruncateAfter { last: keep });
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let upto = log_id.index;
        let position = record::encode_position(Some(&log_id)).into();
        {
            let mut log = self.shared.log.lock();
            if log.purged.as_ref().is_some_and(|purged| upto <= purged.index) {
                return Ok(());
            }
            log.purge_upto(upto);
            log.purged = Some(log_id);
            log.last = log.last.take().filter(|last| last.index > upto);
        }
        self.shared.engine.submit(LogOp::Purge { upto, position });
        Ok(())
    }
}

impl LogReader {
    /// Entries of `range` as far as the log has them, from one moment of it: at
    /// least the first, and not many more than `limit_bytes`.
    async fn read(&self, range: Range<u64>, limit_bytes: usize) -> Result<Vec<Entry>, io::Error> {
        'anew: loop {
            let mut entries = Vec::new();
            let mut bytes = 0;
            let (mut at, removals) = {
                let log = self.shared.log.lock();
                (log.clamp(&range).start, log.removals)
            };
            loop {
                let before_tail = {
                    let log = self.shared.log.lock();
                    if log.removals != removals {
                        continue 'anew;
                    }
                    let end = log.clamp(&range).end;
                    if at >= end || bytes >= limit_bytes {
                        return Ok(entries);
                    }
                    let tail = log.tail_index();
                    if at >= tail {
                        metrics::counter!(telemetry::LOG_TAIL_HITS).increment(1);
                        let skip = (at - tail) as usize;
                        for tailed in log.tail.range(skip..skip + (end - at) as usize) {
                            entries.push(tailed.entry.clone());
                            bytes += tailed.bytes;
                            if bytes >= limit_bytes {
                                break;
                            }
                        }
                        return Ok(entries);
                    }
                    at..tail.min(end)
                };
                metrics::counter!(telemetry::LOG_TAIL_MISSES).increment(1);
                let limit = (limit_bytes - bytes).min(READ_BYTES);
                let records = self.read_engine(before_tail, limit).await;
                if self.shared.log.lock().removals != removals {
                    continue 'anew;
                }
                for (index, record) in records.map_err(io::Error::other)? {
                    let entry = record::decode_entry(&record).map_err(io::Error::other)?;
                    if index != at || entry.log_id.index != at {
                        let id = entry.log_id;
                        return Err(io::Error::other(format!(
                            "log record {index} holds {id}, not entry {at}"
                        )));
                    }
                    bytes += record.len();
                    at += 1;
                    entries.push(entry);
                }
            }
        }
    }

    async fn read_engine(
        &self,
        range: Range<u64>,
        limit_bytes: usize,
    ) -> Result<Vec<(u64, Bytes)>, StorageError> {
        let start = range.start;
        let records = if self.shared.engine.read_may_block() {
            let engine = self.shared.engine.clone();
            let read = tokio::task::spawn_blocking(move || engine.read(range, limit_bytes));
            read.await.map_err(|error| StorageError::Corrupt {
                what: format!("log record {start}"),
                reason: format!("reading it was not finished: {error}"),
            })?
        } else {
            self.shared.engine.read(range, limit_bytes)
        }?;
        if records.is_empty() {
            return Err(StorageError::Corrupt {
                what: format!("log record {start}"),
                reason: "it is missing, though the log reaches beyond it".to_owned(),
            });
        }
        Ok(records)
    }

    fn leads(&self, leader: &LeaderIdOf<TypeConfig>) -> Result<(), LeaderChanged<TypeConfig>> {
        let vote = self.shared.log.lock().vote;
        match vote {
            Some(vote) if vote.leader_id() == leader && vote.is_committed() => Ok(()),
            vote => Err(LeaderChanged::new(*leader, vote)),
        }
    }

    /// The entries of `range` in steps of bounded size, each checked by `check`
    /// after it was read: what a leader wrote is taken away only after the vote
    /// has changed.
    fn steps<E, F>(self, range: Range<u64>, check: F) -> impl Stream<Item = Result<Entry, E>> + Send
    where
        E: From<io::Error> + Send,
        F: Fn(&LogReader) -> Result<(), E> + Send,
    {
        let start = Some(range.start);
        let steps = stream::unfold((self, start, check), move |(reader, at, check)| async move {
            let at = at?;
            let read = reader.read(at..range.end, READ_BYTES).await;
            let step = check(&reader).and_then(|()| read.map_err(E::from));
            let next = match &step {
                Ok(entries) => entries.last().map(|entry| entry.log_id.index + 1),
                Err(_) => None,
            };
            let items: Vec<Result<Entry, E>> = match step {
                Ok(entries) => entries.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            Some((stream::iter(items), (reader, next.filter(|next| *next < range.end), check)))
        });
        steps.flatten()
    }
}

impl RaftLogReader<TypeConfig> for LogReader {
    async fn leader_bounded_stream<RB>(
        &mut self,
        leader: LeaderIdOf<TypeConfig>,
        range: RB,
    ) -> impl Stream<Item = LeaderBoundedStreamResult<TypeConfig>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let check = move |reader: &LogReader| reader.leads(&leader).map_err(LeaderBoundedStreamError::from);
        self.clone().steps(half_open(&range), check).boxed()
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.clone().steps(half_open(&range), |_: &LogReader| Ok(())).boxed()
    }

    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.read(half_open(&range), usize::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared.log.lock().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read(start..end, READ_BYTES).await
    }
}

fn half_open(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

#[cfg(test)]
mod tests;
