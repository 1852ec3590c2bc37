//! The log in RocksDB: one writer thread that owns every write.
//!
//! The thread drains its queue, makes one batch, syncs once if the batch has an
//! append or a vote in it, and calls back in order. So the sync is shared by
//! everyone who waits, and nothing overtakes.
//!
//! | family | key | value |
//! |---|---|---|
//! | `log` | index u64, big endian | the record |
//! | `meta` | `vote`, `committed` | the caller's bytes |
//! | `meta` | `purged` | `codec`: index and the caller's bytes |
//!
//! After a crash a torn record at the end of the WAL is dropped: it was never
//! acknowledged. Damage before the end, an older WAL or a table file that is
//! missing or cut, and a hole in the indexes are errors at open. (The newest WAL
//! cannot be told from one that was never written: its loss is seen only by the
//! marker of the data directory, if the whole log went with it.) A flipped byte in a table is an
//! error when its block is read: at open above the applied index, later below.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::Mutex;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRawIterator,
    DBRecoveryMode, Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::{
    Change, Done, Extent, FatalHook, HeldBytes, LogEngine, LogOp, Recovered, VerifyRecord, corrupt,
    first_after,
};
use crate::env::EnvRef;
use crate::mutant::{self, Mutant};
use crate::storage::{StorageError, codec};
use crate::telemetry;

const FAMILY_LOG: &str = "log";
const FAMILY_META: &str = "meta";
const KEY_VOTE: &[u8] = b"vote";
const KEY_COMMITTED: &[u8] = b"committed";
const KEY_PURGED: &[u8] = b"purged";

/// Operations that may wait for the writer: two full batches. Who submits one
/// more waits until the writer has taken the next batch; none is ever dropped.
/// Bytes are what runs out first, and `raft::LogStore` bounds those.
const QUEUE_OPERATIONS_MAX: usize = 8192;
/// One batch takes no more than this many operations: who waits behind them
/// waits for one write, not for a flood.
const BATCH_OPERATIONS_MAX: usize = 4096;
/// Nor does it go on once it has this many bytes.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// Purged records stay on disk until there are this many of them,
const SWEEP_ENTRIES: u64 = 10_000;
/// or this many bytes: deleting costs a sync and a tombstone that every
/// compaction carries, and the writer thread pays for it.
const SWEEP_BYTES: u64 = 64 << 20;

/// What the operator may tune of the log.
#[derive(Clone, Debug)]
pub struct RocksLogOptions {
    /// Bytes of records in memory before they are written to a table.
    pub write_buffer_bytes: usize,
    /// Bytes of the block cache. Followers far behind are all that reads through it.
    pub block_cache_bytes: usize,
}

impl Default for RocksLogOptions {
    fn default() -> Self {
        RocksLogOptions { write_buffer_bytes: 32 << 20, block_cache_bytes: 8 << 20 }
    }
}

/// The log in RocksDB. Dropping it writes what is queued, and stops the thread.
pub struct RocksLog {
    db: Arc<DB>,
    held: Arc<Mutex<HeldBytes>>,
    queue: Option<SyncSender<LogOp>>,
    writer: Option<JoinHandle<()>>,
}

impl RocksLog {
    /// Opens the log in `path`, creating it when it is absent, and starts its
    /// writer thread. `fatal` is called on that thread when a write has failed.
    ///
    /// # Errors
    /// [`StorageError::Engine`] when a file is missing, damaged or locked by
    /// another process; [`StorageError::Corrupt`] when the marks cannot be read.
    pub fn open(
        path: &Path,
        options: &RocksLogOptions,
        env: EnvRef,
        fatal: FatalHook,
    ) -> Result<RocksLog, StorageError> {
        let db = Arc::new(open_db(path, options)?);
        let purged = read_purged(&db)?.map(|(index, _)| index);
        let last = read_last(&db, first_after(purged))?.map(|(index, _)| index);
        let held = Arc::new(Mutex::new(HeldBytes::default()));
        if let Some(last) = last {
            held.lock().adopt(first_after(purged)..last + 1, estimate_bytes(&db));
        }
        let (queue, operations) = mpsc::sync_channel(QUEUE_OPERATIONS_MAX);
        let writer = Writer {
            db: db.clone(),
            env,
            fatal,
            held: held.clone(),
            extent: Extent { purged, last },
            swept: None,
            unswept_bytes: 0,
            failed: None,
        };
        let writer = std::thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || writer.run(&operations))
            .map_err(|source| StorageError::Io { path: path.to_owned(), source })?;
        Ok(RocksLog { db, held, queue: Some(queue), writer: Some(writer) })
    }
}

impl Drop for RocksLog {
    fn drop(&mut self) {
        drop(self.queue.take());
        let Some(writer) = self.writer.take() else { return };
        // A callback may own the last handle: a thread cannot wait for itself.
        if writer.thread().id() != std::thread::current().id() && writer.join().is_err() {
            tracing::error!("the log's writer thread had panicked");
        }
    }
}

impl LogEngine for RocksLog {
    fn recover(&self, verify_from: u64, verify: VerifyRecord<'_>) -> Result<Recovered, StorageError> {
        let purged = read_purged(&self.db)?;
        let first = first_after(purged.as_ref().map(|(index, _)| *index));
        let last = read_last(&self.db, first)?;
        if let Some((last, _)) = last {
            check_begins_at(&self.db, first)?;
            let verified = verify_from.max(first)..last.saturating_add(1);
            let mut expected = verified.start;
            for_each_record(&self.db, verified.clone(), |index, record| {
                verify(index, record)?;
                expected = index + 1;
                Ok(true)
            })?;
            if !verified.is_empty() && expected != verified.end {
                return Err(corrupt(format!("records {expected} to {last} are missing")));
            }
        }
        Ok(Recovered {
            last,
            purged,
            vote: read_meta(&self.db, KEY_VOTE)?,
            committed: read_meta(&self.db, KEY_COMMITTED)?,
        })
    }

    fn submit(&self, op: LogOp) {
        let refused = match &self.queue {
            Some(queue) => queue.send(op).err().map(|refused| refused.0),
            None => Some(op),
        };
        // The thread ends early only by a panic. Nobody may wait forever for it.
        if let Some((_, Some(done))) = refused.map(LogOp::split) {
            let reason = "the log's writer thread has stopped";
            done(Err(Arc::new(corrupt(reason.to_owned()))));
        }
    }

    fn read(&self, range: Range<u64>, limit_bytes: usize) -> Result<Vec<(u64, Bytes)>, StorageError> {
        let mut bytes = 0;
        let mut records = Vec::new();
        for_each_record(&self.db, range, |index, record| {
            bytes += record.len();
            records.push((index, Bytes::copy_from_slice(record)));
            Ok(bytes < limit_bytes)
        })?;
        Ok(records)
    }

    fn read_may_block(&self) -> bool {
        true
    }

    fn held_bytes(&self) -> u64 {
        self.held.lock().total
    }

    fn first_index_within(&self, keep_bytes: u64) -> Option<u64> {
        self.held.lock().first_index_within(keep_bytes)
    }
}

/// The one that writes. Owned by its thread.
struct Writer {
    db: Arc<DB>,
    env: EnvRef,
    fatal: FatalHook,
    held: Arc<Mutex<HeldBytes>>,
    extent: Extent,
    /// Up to where this process has deleted purged records from the disk.
    swept: Option<u64>,
    /// Bytes purged and not deleted yet, approximately.
    unswept_bytes: u64,
    /// Set by the first failure, and never unset.
    failed: Option<Arc<StorageError>>,
}

/// What one write consists of.
#[derive(Default)]
struct Plan {
    batch: WriteBatch,
    sync: bool,
    /// Delete the table files up to here once the batch is durable.
    sweep: Option<u64>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<LogOp>) {
        while let Ok(first) = queue.recv() {
            let (changes, callbacks) = drain(first, queue);
            if self.failed.is_none()
                && let Err(error) = self.write(changes)
            {
                tracing::error!(%error, "a write of the log failed; this node must stop");
                (self.fatal)(&error);
                // After a failed fsync nobody knows what the disk holds: another
                // try could succeed and prove nothing.
                self.failed = Some(Arc::new(error));
            }
            for done in callbacks {
                done(self.failed.clone().map_or(Ok(()), Err));
            }
        }
    }

    fn write(&mut self, changes: Vec<Change>) -> Result<(), StorageError> {
        let operations = changes.len();
        let mut plan = Plan::default();
        for change in changes {
            self.plan(change, &mut plan)?;
        }
        let bytes = plan.batch.size_in_bytes();
        let mut options = WriteOptions::default();
        options.set_sync(plan.sync);
        let started = self.env.monotonic();
        self.db.write_opt(plan.batch, &options)?;
        if plan.sync {
            let elapsed = self.env.monotonic().saturating_sub(started);
            metrics::histogram!(telemetry::LOG_FSYNC_SECONDS).record(elapsed.as_secs_f64());
        }
        metrics::histogram!(telemetry::LOG_BATCH_ENTRIES).record(operations as f64);
        metrics::histogram!(telemetry::LOG_BATCH_BYTES).record(bytes as f64);
        if let Some(upto) = plan.sweep {
            self.db.delete_file_in_range_cf(log_family(&self.db), key(0), key(upto))?;
            self.swept = Some(upto);
            self.unswept_bytes = 0;
        }
        Ok(())
    }

    fn plan(&mut self, change: Change, plan: &mut Plan) -> Result<(), StorageError> {
        let (log, meta) = (log_family(&self.db), meta_family(&self.db));
        match change {
            Change::Append(records) => {
                self.extent.append(&records)?;
                let mut held = self.held.lock();
                for (index, record) in records {
                    plan.batch.put_cf(log, key(index), &record);
                    held.append(index, record.len() as u64);
                }
                plan.sync |= !mutant::is(Mutant::LogNotSynced);
            }
            Change::Vote(vote) if mutant::is(Mutant::VoteNotSynced) => {
                let mut in_memory = WriteOptions::default();
                in_memory.disable_wal(true);
                self.db.put_cf_opt(meta, KEY_VOTE, &vote, &in_memory)?;
            }
            Change::Vote(vote) => {
                plan.batch.put_cf(meta, KEY_VOTE, &vote);
                plan.sync = true;
            }
            Change::Truncate(keep) => {
                // Key by key: a range tombstone up to the end of the log would
                // be in the way of the records that are appended there next.
                let dropped = self.extent.truncate(keep);
                if !dropped.is_empty() {
                    self.held.lock().truncate_from(dropped.start);
                }
                dropped.for_each(|index| plan.batch.delete_cf(log, key(index)));
            }
            Change::Purge(upto, position) => self.plan_purge(upto, &position, plan),
            Change::Committed(position) => plan.batch.put_cf(meta, KEY_COMMITTED, &position),
        }
        Ok(())
    }

    fn plan_purge(&mut self, upto: u64, position: &Bytes, plan: &mut Plan) {
        if !self.extent.purge(upto) {
            return;
        }
        {
            let mut held = self.held.lock();
            let before = held.total;
            held.purge(upto);
            self.unswept_bytes += before - held.total;
        }
        // The mark alone takes the records out of sight: reads begin above it.
        let mark = codec::encode(&(upto, position));
        plan.batch.put_cf(meta_family(&self.db), KEY_PURGED, mark);
        let unswept = upto - self.swept.unwrap_or(0);
        if unswept >= SWEEP_ENTRIES || self.unswept_bytes >= SWEEP_BYTES {
            // From 0, so that one tombstone swallows the older ones.
            plan.batch.delete_range_cf(log_family(&self.db), key(0), key(upto.saturating_add(1)));
            // Files vanish at once; the mark must not be lost after them, or
            // the next start would find a log without its beginning.
            plan.sync = true;
            plan.sweep = Some(upto);
        }
    }
}

/// Everything that waits, up to the limits of one batch.
fn drain(first: LogOp, queue: &Receiver<LogOp>) -> (Vec<Change>, Vec<Done>) {
    let mut changes = Vec::new();
    let mut callbacks = Vec::new();
    let mut bytes = 0;
    let mut next = Some(first);
    while let Some(op) = next {
        let (change, done) = op.split();
        if let Change::Append(records) = &change {
            bytes += records.iter().map(|(_, record)| record.len()).sum::<usize>();
        }
        changes.push(change);
        callbacks.extend(done);
        let full = changes.len() >= BATCH_OPERATIONS_MAX || bytes >= BATCH_BYTES_MAX;
        next = if full { None } else { queue.try_recv().ok() };
    }
    (changes, callbacks)
}

fn open_db(path: &Path, options: &RocksLogOptions) -> Result<DB, StorageError> {
    let mut db_options = Options::default();
    db_options.create_if_missing(true);
    db_options.create_missing_column_families(true);
    // A torn tail is what a crash leaves. Recycled files could show an older
    // record where the tail ends, and would make damage look like such a tail.
    db_options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    db_options.set_recycle_log_file_num(0);
    // So that a whole WAL, or the end of an older one, cannot go missing unseen.
    db_options.set_track_and_verify_wals_in_manifest(true);
    db_options.set_paranoid_checks(true);
    // `meta` is small and would keep every WAL alive; and start-up replays them.
    db_options.set_max_total_wal_size(4 * options.write_buffer_bytes as u64);
    db_options.set_max_background_jobs(2);
    db_options.set_max_open_files(256);
    db_options.set_keep_log_file_num(2);
    db_options.set_max_log_file_size(4 << 20);
    let cache = Cache::new_lru_cache(options.block_cache_bytes);
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&cache);
    table.set_format_version(6);
    table.set_block_size(32 << 10);
    let mut log_options = Options::default();
    log_options.set_block_based_table_factory(&table);
    log_options.set_write_buffer_size(options.write_buffer_bytes);
    log_options.set_compression_type(DBCompressionType::Lz4);
    let mut meta_options = Options::default();
    meta_options.set_block_based_table_factory(&table);
    meta_options.set_write_buffer_size(1 << 20);
    let families = [
        ColumnFamilyDescriptor::new(FAMILY_LOG, log_options),
        ColumnFamilyDescriptor::new(FAMILY_META, meta_options),
    ];
    Ok(DB::open_cf_descriptors(&db_options, path, families)?)
}

fn log_family(db: &DB) -> &ColumnFamily {
    db.cf_handle(FAMILY_LOG).expect("both families are created at open")
}

fn meta_family(db: &DB) -> &ColumnFamily {
    db.cf_handle(FAMILY_META).expect("both families are created at open")
}

fn key(index: u64) -> [u8; 8] {
    index.to_be_bytes()
}

fn index_of(key: &[u8]) -> Result<u64, StorageError> {
    let key = <[u8; 8]>::try_from(key).map_err(|_| corrupt(format!("a key of {} bytes", key.len())))?;
    Ok(u64::from_be_bytes(key))
}

fn read_meta(db: &DB, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
    Ok(db.get_cf(meta_family(db), key)?.map(Bytes::from))
}

fn read_purged(db: &DB) -> Result<Option<(u64, Bytes)>, StorageError> {
    let mark = read_meta(db, KEY_PURGED)?;
    mark.map(|mark| codec::decode("purge mark of the log", &mark)).transpose()
}

fn records_from(db: &DB, first: u64) -> DBRawIterator<'_> {
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(key(first));
    db.raw_iterator_cf_opt(log_family(db), options)
}

fn read_last(db: &DB, first: u64) -> Result<Option<(u64, Bytes)>, StorageError> {
    let mut records = records_from(db, first);
    records.seek_to_last();
    let last = match records.item() {
        Some((key, record)) => Some((index_of(key)?, Bytes::copy_from_slice(record))),
        None => None,
    };
    records.status()?;
    Ok(last)
}

fn check_begins_at(db: &DB, first: u64) -> Result<(), StorageError> {
    let mut records = records_from(db, first);
    records.seek_to_first();
    let found = records.key().map(index_of).transpose()?;
    records.status()?;
    match found {
        Some(found) if found == first => Ok(()),
        found => Err(corrupt(format!("it should begin at {first}, but the first record is {found:?}"))),
    }
}

/// Hands the records of `range` out in order, until it is told to stop or the
/// log ends. A record that is missing before one that is there is an error.
fn for_each_record(
    db: &DB,
    range: Range<u64>,
    mut each: impl FnMut(u64, &[u8]) -> Result<bool, StorageError>,
) -> Result<(), StorageError> {
    if range.is_empty() {
        return Ok(());
    }
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(key(range.start));
    options.set_iterate_upper_bound(key(range.end));
    let mut records = db.raw_iterator_cf_opt(log_family(db), options);
    records.seek_to_first();
    for expected in range {
        let Some((key, record)) = records.item() else { break };
        let index = index_of(key)?;
        if index != expected {
            return Err(corrupt(format!("record {expected} is missing; the next one is {index}")));
        }
        if !each(index, record)? {
            return Ok(());
        }
        records.next();
    }
    Ok(records.status()?)
}

/// Bytes on disk and in memory of the records, for want of a count.
fn estimate_bytes(db: &DB) -> u64 {
    let property = |name| db.property_int_value_cf(log_family(db), name).ok().flatten().unwrap_or_default();
    property("rocksdb.estimate-live-data-size") + property("rocksdb.cur-size-all-mem-tables")
}
