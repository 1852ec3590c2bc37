//! The state database: written without a WAL, one atomic batch per applied
//! chunk, read through snapshots that own their handle.
//!
//! Invariants: every batch carries `meta/applied`, so that after a crash the
//! content is exactly the prefix of the log that `applied` names (the families
//! are flushed together, `atomic_flush`); nothing here is durable before
//! [`StateDb::flush`] returns.

use std::path::Path;
use std::sync::{Arc, Weak};

use rocksdb::statistics::{StatsLevel, Ticker};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBPinnableSlice,
    DBRawIterator, Options, ReadOptions, WriteBatch, WriteOptions,
};
use self_cell::self_cell;
use serde::Serialize;

use super::layout::Family;
use super::{StorageError, codec};

/// What the operator may tune of the state database.
#[derive(Clone, Debug)]
pub struct StateOptions {
    /// Bytes of the block cache, shared by all families.
    pub block_cache_bytes: usize,
    /// Bytes of records kept decoded, because whoever writes a key soon writes it again.
    pub record_cache_bytes: usize,
    /// Bytes of unflushed writes, over all families, before a flush begins.
    pub write_buffer_bytes: usize,
}

impl Default for StateOptions {
    fn default() -> Self {
        StateOptions {
            block_cache_bytes: 64 << 20,
            record_cache_bytes: 64 << 20,
            write_buffer_bytes: 32 << 20,
        }
    }
}

/// The state database. Clones share it.
#[derive(Clone)]
pub struct StateDb {
    db: Arc<DB>,
    /// The engine's numbers of the families.
    numbers: [u32; Family::ALL.len()],
    /// The options it was opened with, which hold its counters.
    counters: Arc<Options>,
    record_cache_bytes: usize,
}

/// How the cache of the state's blocks does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Blocks found in it since the database was opened.
    pub hits: u64,
    /// Blocks that had to be read.
    pub misses: u64,
    /// Bytes in it.
    pub size_bytes: u64,
}

/// Does not keep a database open, but knows whether somebody does.
pub struct WeakStateDb {
    db: Weak<DB>,
}

impl WeakStateDb {
    /// Whether every handle and every snapshot of the database is gone.
    pub fn is_closed(&self) -> bool {
        self.db.strong_count() == 0
    }
}

/// Reads that a database, a snapshot of it, and an overlay over it all answer.
pub trait Read {
    /// The value of `key`.
    ///
    /// # Errors
    /// [`StorageError::Engine`] when the disk fails or a block's checksum is wrong.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<DBPinnableSlice<'_>>, StorageError>;

    /// A cursor over `lower <= key < upper`, not yet placed. No `upper` is no end.
    fn scan(&self, family: Family, lower: &[u8], upper: Option<&[u8]>) -> Cursor<'_>;
}

/// A cursor over one family. Place it with a `seek` before reading.
pub struct Cursor<'a> {
    inner: DBRawIterator<'a>,
}

impl Cursor<'_> {
    /// To the first key of the range.
    pub fn seek_to_first(&mut self) {
        self.inner.seek_to_first();
    }

    /// To the last key of the range.
    pub fn seek_to_last(&mut self) {
        self.inner.seek_to_last();
    }

    /// To the first key at or after `key`.
    pub fn seek(&mut self, key: &[u8]) {
        self.inner.seek(key);
    }

    /// To the last key at or before `key`.
    pub fn seek_for_prev(&mut self, key: &[u8]) {
        self.inner.seek_for_prev(key);
    }

    /// One key on.
    pub fn next(&mut self) {
        self.inner.next();
    }

    /// One key back.
    pub fn prev(&mut self) {
        self.inner.prev();
    }

    /// The key and value here, or `None` past the end.
    ///
    /// # Errors
    /// [`StorageError::Engine`] when the cursor stopped for damage or a failing
    /// disk, and not for having reached its end.
    pub fn item(&self) -> Result<Option<Item<'_>>, StorageError> {
        match self.inner.item() {
            Some(item) => Ok(Some(item)),
            None => {
                self.inner.status()?;
                Ok(None)
            }
        }
    }
}

/// A key and its value, where a cursor stands.
pub type Item<'a> = (&'a [u8], &'a [u8]);

/// Changes that become visible together.
///
/// They are laid out here as the engine lays out its own batches, which saves a call and several copies
/// for each; `family_numbers` has the engine confirm the layout.
#[derive(Default)]
pub struct Batch {
    /// Empty, or a header and the changes: each a tag, the family's number, the key and, in a put, the value.
    layout: Vec<u8>,
    changes: u32,
    /// Where a value is encoded before its length is known.
    value: Vec<u8>,
}

/// A sequence, which the engine fills in, and the number of changes.
const BATCH_HEADER_BYTES: usize = 12;
/// Tag of the removal of a key.
const TAG_DELETE: u8 = 4;
/// Tag of a put.
const TAG_PUT: u8 = 5;

impl Batch {
    /// An empty batch with room for `bytes`.
    pub fn with_capacity(bytes: usize) -> Batch {
        Batch { layout: Vec::with_capacity(bytes), ..Batch::default() }
    }

    /// Sets a key. `db` names the families.
    pub fn put(&mut self, db: &StateDb, family: Family, key: &[u8], value: &[u8]) {
        self.change(TAG_PUT, db.numbers[family as usize], key);
        put_slice(&mut self.layout, value);
    }

    /// Sets a key to a value, as `codec` encodes it.
    pub fn put_encoded<T: Serialize>(&mut self, db: &StateDb, family: Family, key: &[u8], value: &T) {
        self.change(TAG_PUT, db.numbers[family as usize], key);
        self.value.clear();
        codec::encode_into(value, &mut self.value);
        put_slice(&mut self.layout, &self.value);
    }

    /// Removes a key.
    pub fn delete(&mut self, db: &StateDb, family: Family, key: &[u8]) {
        self.change(TAG_DELETE, db.numbers[family as usize], key);
    }

    fn change(&mut self, tag: u8, family: u32, key: &[u8]) {
        if self.changes == 0 {
            self.layout.resize(BATCH_HEADER_BYTES, 0);
        }
        self.changes += 1;
        self.layout.push(tag);
        put_number(&mut self.layout, family);
        put_slice(&mut self.layout, key);
    }

    /// Bytes of the batch.
    pub fn size_bytes(&self) -> usize {
        self.layout.len()
    }

    /// Whether nothing was put or deleted.
    pub fn is_empty(&self) -> bool {
        self.changes == 0
    }

    /// As the engine takes it.
    fn finish(mut self) -> WriteBatch {
        if self.is_empty() {
            return WriteBatch::default();
        }
        self.layout[8..BATCH_HEADER_BYTES].copy_from_slice(&self.changes.to_le_bytes());
        WriteBatch::from_data(&self.layout)
    }
}

fn put_slice(out: &mut Vec<u8>, slice: &[u8]) {
    put_number(out, u32::try_from(slice.len()).expect("keys and values are far below 4 GiB"));
    out.extend_from_slice(slice);
}

/// Seven bits a byte, the lowest first; all but the last byte have the highest bit set.
fn put_number(out: &mut Vec<u8>, mut number: u32) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// The engine's numbers of the families, as its own batches show them.
///
/// # Panics
/// When the engine lays out a batch in another way than [`Batch`] does.
fn family_numbers(db: &DB) -> [u32; Family::ALL.len()] {
    let (key, value) = (&[7; 300][..], &[9; 20_000][..]);
    Family::ALL.map(|family| {
        let mut theirs = WriteBatch::default();
        theirs.put_cf(family_of(db, family), key, value);
        theirs.delete_cf(family_of(db, family), key);
        // The only byte after the tag; families are few.
        let number = u32::from(theirs.data()[BATCH_HEADER_BYTES + 1]);
        let mut ours = Batch::default();
        ours.change(TAG_PUT, number, key);
        put_slice(&mut ours.layout, value);
        ours.change(TAG_DELETE, number, key);
        assert_eq!(ours.finish().data(), theirs.data(), "the engine's batches are not what they were");
        number
    })
}

impl StateDb {
    /// Opens the database in `path`, creating it when it is absent.
    ///
    /// # Errors
    /// [`StorageError::Engine`] when a file is missing, damaged or locked by
    /// another process.
    pub fn open(path: &Path, options: &StateOptions) -> Result<StateDb, StorageError> {
        // Without locks, and sized by itself to what its entries are.
        let cache = Cache::new_hyper_clock_cache(options.block_cache_bytes, 0);
        let mut db_options = Options::default();
        db_options.create_if_missing(true);
        db_options.create_missing_column_families(true);
        db_options.set_atomic_flush(true);
        db_options.set_db_write_buffer_size(options.write_buffer_bytes);
        db_options.set_max_background_jobs(2);
        db_options.set_max_open_files(512);
        db_options.set_keep_log_file_num(2);
        db_options.set_max_log_file_size(4 << 20);
        db_options.set_paranoid_checks(true);
        // Counters only; timing every read would cost more than the read.
        db_options.enable_statistics();
        db_options.set_statistics_level(StatsLevel::ExceptHistogramOrTimers);
        let families = Family::ALL.map(|family| {
            ColumnFamilyDescriptor::new(family.name(), family_options(family, options, &cache))
        });
        let db = DB::open_cf_descriptors(&db_options, path, families)?;
        Ok(StateDb::of(db, db_options, options))
    }

    fn of(db: DB, db_options: Options, options: &StateOptions) -> StateDb {
        StateDb {
            numbers: family_numbers(&db),
            db: Arc::new(db),
            counters: Arc::new(db_options),
            record_cache_bytes: options.record_cache_bytes,
        }
    }

    /// What [`StateOptions::record_cache_bytes`] says.
    pub fn record_cache_bytes(&self) -> usize {
        self.record_cache_bytes
    }

    /// Opens the database in `path` for reading, without changing its content.
    /// The engine leaves a log file of its own behind.
    ///
    /// # Errors
    /// [`StorageError::Engine`] when it is absent or damaged.
    pub fn open_read_only(path: &Path, options: &StateOptions) -> Result<StateDb, StorageError> {
        let cache = Cache::new_lru_cache(options.block_cache_bytes);
        let mut db_options = Options::default();
        db_options.set_max_open_files(64);
        db_options.set_paranoid_checks(true);
        let families = Family::ALL.map(|family| {
            ColumnFamilyDescriptor::new(family.name(), family_options(family, options, &cache))
        });
        let db = DB::open_cf_descriptors_read_only(&db_options, path, families, false)?;
        Ok(StateDb::of(db, db_options, options))
    }

    /// Tells later whether this database is still open, without keeping it so.
    pub fn downgrade(&self) -> WeakStateDb {
        WeakStateDb { db: Arc::downgrade(&self.db) }
    }

    /// Writes a batch into memory: visible to every later read and snapshot,
    /// durable at the next flush.
    ///
    /// # Errors
    /// [`StorageError::Engine`]; the node must stop, because the memory of the
    /// state machine is ahead of its disk.
    pub fn write(&self, batch: Batch) -> Result<(), StorageError> {
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        Ok(self.db.write_opt(batch.finish(), &options)?)
    }

    /// Makes everything written so far durable, all families together.
    ///
    /// # Errors
    /// [`StorageError::Engine`] when the disk fails.
    pub fn flush(&self) -> Result<(), StorageError> {
        let families = Family::ALL.map(|family| self.family(family));
        Ok(self.db.flush_cfs_opt(&families, &rocksdb::FlushOptions::default())?)
    }

    /// A view of this moment that stays as it is, and keeps the database open.
    pub fn snapshot(&self) -> Snapshot {
        let cell = SnapshotCell::new(self.db.clone(), |db| db.snapshot());
        Snapshot { cell }
    }

    /// Makes a consistent copy in `path` (hard links where the file system has
    /// them), flushed first. `path` must not exist.
    ///
    /// # Errors
    /// [`StorageError::Engine`] when the disk fails.
    pub fn checkpoint(&self, path: &Path) -> Result<(), StorageError> {
        Ok(rocksdb::checkpoint::Checkpoint::new(&self.db)?.create_checkpoint(path)?)
    }

    /// Rewrites every file of every family, dropping what was deleted.
    pub fn compact(&self) {
        for family in Family::ALL {
            self.db.compact_range_cf(self.family(family), None::<&[u8]>, None::<&[u8]>);
        }
    }

    /// Bytes of tables and memtables: what the store uses of its quota.
    pub fn size_bytes(&self) -> u64 {
        self.property("rocksdb.total-sst-files-size") + self.property("rocksdb.cur-size-all-mem-tables")
    }

    /// How the block cache does. Counts nothing for a database opened for reading.
    pub fn cache_counts(&self) -> CacheCounts {
        let usage = self.db.property_int_value_cf(self.family(Family::Current), "rocksdb.block-cache-usage");
        CacheCounts {
            hits: self.counters.get_ticker_count(Ticker::BlockCacheHit),
            misses: self.counters.get_ticker_count(Ticker::BlockCacheMiss),
            size_bytes: usage.ok().flatten().unwrap_or_default(),
        }
    }

    /// Estimated bytes of the data itself, without what compaction will drop:
    /// live data in tables, and everything in memtables, whose versions nobody
    /// can tell apart yet. Never above [`StateDb::size_bytes`].
    pub fn live_size_bytes(&self) -> u64 {
        let tables = self.property("rocksdb.estimate-live-data-size");
        let memtables = self.property("rocksdb.cur-size-all-mem-tables");
        (tables + memtables).min(self.size_bytes())
    }

    /// A property of all families together.
    fn property(&self, name: &str) -> u64 {
        let of = |family| self.db.property_int_value_cf(self.family(family), name).ok().flatten();
        Family::ALL.into_iter().filter_map(of).sum()
    }

    fn family(&self, family: Family) -> &ColumnFamily {
        family_of(&self.db, family)
    }
}

impl Read for StateDb {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<DBPinnableSlice<'_>>, StorageError> {
        Ok(self.db.get_pinned_cf(self.family(family), key)?)
    }

    fn scan(&self, family: Family, lower: &[u8], upper: Option<&[u8]>) -> Cursor<'_> {
        let options = bounds(family, lower, upper);
        Cursor { inner: self.db.raw_iterator_cf_opt(self.family(family), options) }
    }
}

type EngineSnapshot<'a> = rocksdb::Snapshot<'a>;

self_cell! {
    struct SnapshotCell {
        owner: Arc<DB>,
        #[covariant]
        dependent: EngineSnapshot,
    }
}

/// A view of the database at one moment. It owns its handle, so that it may
/// outlive the switch to another database when a snapshot is installed.
pub struct Snapshot {
    cell: SnapshotCell,
}

impl Read for Snapshot {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<DBPinnableSlice<'_>>, StorageError> {
        let family = family_of(self.cell.borrow_owner(), family);
        Ok(self.cell.borrow_dependent().get_pinned_cf(family, key)?)
    }

    fn scan(&self, family: Family, lower: &[u8], upper: Option<&[u8]>) -> Cursor<'_> {
        let options = bounds(family, lower, upper);
        let family = family_of(self.cell.borrow_owner(), family);
        Cursor { inner: self.cell.borrow_dependent().raw_iterator_cf_opt(family, options) }
    }
}

fn family_of(db: &DB, family: Family) -> &ColumnFamily {
    db.cf_handle(family.name()).expect("every family is created at open")
}

fn bounds(family: Family, lower: &[u8], upper: Option<&[u8]>) -> ReadOptions {
    let mut options = ReadOptions::default();
    // Who scans history goes through it once, and would push out what others read again.
    options.fill_cache(family != Family::History);
    options.set_iterate_lower_bound(lower);
    if let Some(upper) = upper {
        options.set_iterate_upper_bound(upper);
    }
    options
}

fn family_options(family: Family, options: &StateOptions, cache: &Cache) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_format_version(6);
    // Single keys are read from `current`, and a whole block with each that no cache has.
    table.set_block_size(if family == Family::Current { 4 << 10 } else { 8 << 10 });
    if matches!(family, Family::Current | Family::Lease | Family::Session) {
        // Every put looks its key up first; most lookups of new keys end here.
        table.set_bloom_filter(10.0, false);
    }
    let mut family_options = Options::default();
    family_options.set_block_based_table_factory(&table);
    family_options.set_write_buffer_size(options.write_buffer_bytes / 2);
    // At the bottom too: nearly every rewrite ends there, and zstd was half of what it cost.
    family_options.set_compression_type(DBCompressionType::Lz4);
    family_options.set_level_compaction_dynamic_level_bytes(true);
    family_options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_counts_before_it_is_flushed_and_is_never_more_than_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let db = StateDb::open(dir.path(), &StateOptions::default()).unwrap();
        let put = |value: u8| {
            let mut batch = Batch::default();
            batch.put(&db, Family::Current, b"k", &vec![value; 100_000]);
            db.write(batch).unwrap();
        };
        put(1);
        assert!(db.live_size_bytes() >= 100_000);
        for value in 0..20 {
            put(value);
            assert!(db.live_size_bytes() <= db.size_bytes());
            if value % 10 == 9 {
                db.flush().unwrap();
                assert!(db.live_size_bytes() <= db.size_bytes());
            }
        }
    }

    #[test]
    fn a_snapshot_stays_as_it_was_and_keeps_the_database_open() {
        let dir = tempfile::tempdir().unwrap();
        let db = StateDb::open(dir.path(), &StateOptions::default()).unwrap();
        let mut batch = Batch::default();
        batch.put(&db, Family::Meta, b"k", b"1");
        db.write(batch).unwrap();
        let snapshot = db.snapshot();
        let mut batch = Batch::default();
        batch.put(&db, Family::Meta, b"k", b"2");
        db.write(batch).unwrap();
        assert_eq!(&db.get(Family::Meta, b"k").unwrap().unwrap()[..], b"2");
        drop(db);
        assert_eq!(&snapshot.get(Family::Meta, b"k").unwrap().unwrap()[..], b"1");
        let mut cursor = snapshot.scan(Family::Meta, b"", None);
        cursor.seek_to_first();
        assert_eq!(cursor.item().unwrap(), Some((&b"k"[..], &b"1"[..])));
    }
}
