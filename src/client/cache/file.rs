//! The durable level's file: its format, opening it, and one transaction on it.
//!
//! Invariant: at every commit the keys of a watched prefix are exactly those that
//! were there at the revision which the same commit wrote beside them. A file that
//! cannot be read, or is of another format, is set aside and begun anew; a file of
//! another cluster is refused.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, Table, TableDefinition,
    WriteTransaction,
};

use super::CacheError;
use super::record::{Entry, mod_revision, pack, unpack};
use crate::types::{KeyRange, Revision};

/// `format` and `cluster`.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// By prefix: the revision its keys are of, and when that was last proven current,
/// in milliseconds since 1970.
const SCOPES: TableDefinition<&[u8], (i64, i64)> = TableDefinition::new("scopes");
/// Packed records of keys in watched prefixes.
const KEYS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("keys");
/// Packed records of other keys, whose proofs are milliseconds since 1970.
const OTHERS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("others");

type Records<'txn> = Table<'txn, &'static [u8], &'static [u8]>;

/// Counts up with every change of the tables or of the records in them.
const FORMAT: u64 = 1;
const FILE: &str = "cache.redb";
/// Memory for pages; the records that matter are in the levels above.
const PAGES_BYTES: usize = 8 << 20;
/// How full the file is after room was made in it, in percent.
const ROOM_PERCENT: u64 = 90;

/// An open file.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    db: Option<Database>,
}

/// What a file held when it was opened.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// The cluster; 0 if none has answered yet.
    pub cluster: u64,
    /// By prefix.
    pub scopes: HashMap<Bytes, StoredScope>,
    /// Bytes of all records and their keys.
    pub bytes: u64,
    /// Records that failed their checksum.
    pub damaged: u64,
    /// What stood in the way of an older file, which was set aside.
    pub set_aside: Option<String>,
}

/// A watched prefix as it lay on disk.
#[derive(Debug, Default)]
pub(super) struct StoredScope {
    /// Its keys; 0 for one whose record is damaged.
    pub index: HashMap<Bytes, Revision>,
    pub revision: Revision,
    pub proved_wall_ms: i64,
    /// Whether a record is damaged, so that the prefix has to be read anew.
    pub damaged: bool,
}

/// What one transaction writes.
#[derive(Clone, Debug, Default)]
pub(super) struct Batch {
    pub cluster: Option<u64>,
    /// By prefix: revision and time of proof.
    pub scopes: HashMap<Bytes, (Revision, i64)>,
    /// Keys of watched prefixes; `None` for one that is gone.
    pub keys: HashMap<Bytes, Option<Arc<Entry>>>,
    pub others: HashMap<Bytes, Arc<Entry>>,
    /// Bytes of the entries.
    pub weight: usize,
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.cluster.is_none() && self.scopes.is_empty() && self.keys.is_empty() && self.others.is_empty()
    }
}

/// Why a file cannot be used as it is.
enum Refusal {
    /// Not with this directory.
    Final(CacheError),
    /// With an empty file in its place.
    Unreadable(String),
}

impl File {
    /// Opens the file of a directory, or makes it. `prefixes` are what is watched;
    /// what the file has of others is dropped. `cluster` is the cluster that is
    /// spoken to, 0 if that is not known yet.
    pub fn open(dir: &Path, prefixes: &[Bytes], cluster: u64) -> Result<(File, Content), CacheError> {
        let disk =
            |error: &dyn std::fmt::Display| CacheError::Disk { path: dir.into(), reason: error.to_string() };
        std::fs::create_dir_all(dir).map_err(|error| disk(&error))?;
        let path = dir.join(FILE);
        // A damaged file can bring the library to panic in the middle of a read.
        let attempt = || -> Result<(File, Content), Refusal> {
            let open = || File::try_open(dir, &path, prefixes, cluster);
            catch_unwind(AssertUnwindSafe(open))
                .unwrap_or_else(|_| Err(Refusal::Unreadable("it is damaged".into())))
        };
        let reason = match attempt() {
            Ok(opened) => return Ok(opened),
            Err(Refusal::Final(error)) => return Err(error),
            Err(Refusal::Unreadable(reason)) => reason,
        };
        let aside = dir.join(format!("{FILE}.aside"));
        std::fs::rename(&path, &aside).map_err(|error| disk(&error))?;
        match attempt() {
            Ok((file, content)) => Ok((file, Content { set_aside: Some(reason), ..content })),
            Err(Refusal::Final(error)) => Err(error),
            Err(Refusal::Unreadable(reason)) => Err(disk(&reason)),
        }
    }

    fn try_open(
        dir: &Path,
        path: &Path,
        prefixes: &[Bytes],
        cluster: u64,
    ) -> Result<(File, Content), Refusal> {
        let existed = path.metadata().is_ok_and(|file| file.len() > 0);
        let mut db = database(path).map_err(|error| refusal(dir, error))?;
        if existed {
            // Pages have checksums too, which are looked at only when asked: without
            // that a part of the file could be missing and nobody would know.
            db.check_integrity().map_err(|error| refusal(dir, error))?;
        }
        let unreadable = |error: redb::Error| match error {
            redb::Error::Io(error) => refusal(dir, DatabaseError::Storage(StorageError::Io(error))),
            other => Refusal::Unreadable(other.to_string()),
        };
        let own = prepare(&db, prefixes, cluster).map_err(unreadable)?;
        match own {
            Prepared::Format(found) => {
                let reason = format!("it is of format {found}, and this version reads {FORMAT}");
                return Err(Refusal::Unreadable(reason));
            }
            Prepared::Cluster(expected) => {
                let foreign = CacheError::ForeignCluster { path: dir.into(), expected, actual: cluster };
                return Err(Refusal::Final(foreign));
            }
            Prepared::Ready => {}
        }
        let content = load(&db).map_err(unreadable)?;
        Ok((File { path: path.into(), db: Some(db) }, content))
    }

    /// Reads a record; `Err` if it is damaged or the file fails.
    pub fn read(&self, key: &[u8], watched: bool) -> Result<Option<Entry>, ()> {
        let Some(db) = &self.db else { return Err(()) };
        let table = if watched { KEYS } else { OTHERS };
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            let table = db.begin_read()?.open_table(table)?;
            Ok(table.get(key)?.map(|record| record.value().to_vec()))
        };
        let record = catch_unwind(AssertUnwindSafe(read)).map_err(|_| ())?.map_err(|_| ())?;
        record.map(|record| unpack(key, &record).ok_or(())).transpose()
    }

    /// Writes a batch, all of it or nothing; durable on return. Makes room by
    /// dropping other keys, in no particular order, when there would be more than
    /// `bytes_max`. Gives how many bytes there are.
    pub fn commit(&self, batch: &Batch, bytes: u64, bytes_max: u64) -> Result<u64, String> {
        let Some(db) = &self.db else { return Err("the file is closed".into()) };
        let write = || -> Result<u64, String> {
            let words = |error: redb::Error| error.to_string();
            let txn = db.begin_write().map_err(|error| error.to_string())?;
            let mut bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            bytes += write_batch(&txn, batch).map_err(words)?;
            let max = i64::try_from(bytes_max).unwrap_or(i64::MAX);
            if bytes > max {
                bytes -= make_room(&txn, bytes - max / 100 * ROOM_PERCENT as i64).map_err(words)?;
            }
            if bytes > max {
                return Err(format!("the watched prefixes take {bytes} bytes, and l3_bytes is {bytes_max}"));
            }
            txn.commit().map_err(|error| error.to_string())?;
            Ok(u64::try_from(bytes).unwrap_or(0))
        };
        catch_unwind(AssertUnwindSafe(write)).unwrap_or_else(|_| Err("the file is damaged".into()))
    }

    /// After a failed write the library reads nothing more: opens the file anew, at
    /// its last commit. What cannot be opened stays closed.
    pub fn reopen(&mut self) {
        self.db = None;
        let path = &self.path;
        self.db = catch_unwind(AssertUnwindSafe(|| database(path).ok())).unwrap_or(None);
    }

    /// Closes the file, so that another can open it.
    pub fn close(&mut self) {
        self.db = None;
    }
}

fn database(path: &Path) -> Result<Database, DatabaseError> {
    Database::builder().set_cache_size(PAGES_BYTES).create(path)
}

fn refusal(dir: &Path, error: DatabaseError) -> Refusal {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    match error {
        DatabaseError::DatabaseAlreadyOpen => Refusal::Final(CacheError::InUse { path: dir.into() }),
        // Not the disk's trouble: the file has not the form, or the length, it should have.
        DatabaseError::Storage(StorageError::Io(error))
            if !matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof) =>
        {
            Refusal::Final(CacheError::Disk { path: dir.into(), reason: error.to_string() })
        }
        other => Refusal::Unreadable(other.to_string()),
    }
}

enum Prepared {
    Ready,
    Format(u64),
    Cluster(u64),
}

/// Checks what the file is, and drops what nobody watches any more.
fn prepare(db: &Database, prefixes: &[Bytes], cluster: u64) -> Result<Prepared, redb::Error> {
    let txn = db.begin_write()?;
    {
        let mut meta = txn.open_table(META)?;
        let format = meta.get("format")?.map(|format| format.value());
        let stored = meta.get("cluster")?.map_or(0, |id| id.value());
        match format {
            None => drop(meta.insert("format", FORMAT)?),
            Some(FORMAT) => {}
            Some(other) => return Ok(Prepared::Format(other)),
        }
        if stored != 0 && cluster != 0 && stored != cluster {
            return Ok(Prepared::Cluster(stored));
        }
        let mut scopes = txn.open_table(SCOPES)?;
        let mut keys = txn.open_table(KEYS)?;
        txn.open_table(OTHERS)?;
        let mut gone = Vec::new();
        for scope in scopes.iter()? {
            let prefix = Bytes::copy_from_slice(scope?.0.value());
            if !prefixes.contains(&prefix) {
                gone.push(prefix);
            }
        }
        for prefix in gone {
            let range = KeyRange::prefix(prefix.clone());
            keys.retain(|key, _| !range.contains(key))?;
            scopes.remove(&prefix[..])?;
        }
    }
    txn.commit()?;
    Ok(Prepared::Ready)
}

fn load(db: &Database) -> Result<Content, redb::Error> {
    let txn = db.begin_read()?;
    let mut content = Content {
        cluster: txn.open_table(META)?.get("cluster")?.map_or(0, |id| id.value()),
        ..Content::default()
    };
    for scope in txn.open_table(SCOPES)?.iter()? {
        let (prefix, mark) = scope?;
        let (revision, proved_wall_ms) = mark.value();
        let stored = StoredScope { revision: Revision(revision), proved_wall_ms, ..StoredScope::default() };
        content.scopes.insert(Bytes::copy_from_slice(prefix.value()), stored);
    }
    for record in txn.open_table(KEYS)?.iter()? {
        let (key, record) = record?;
        let (key, record) = (key.value(), record.value());
        content.bytes += (key.len() + record.len()) as u64;
        let scope = content.scopes.iter_mut().find(|(prefix, _)| key.starts_with(prefix));
        let Some((_, scope)) = scope else { continue };
        let at = mod_revision(key, record);
        if at.is_none() {
            content.damaged += 1;
            scope.damaged = true;
        }
        scope.index.insert(Bytes::copy_from_slice(key), at.unwrap_or(Revision(0)));
    }
    for record in txn.open_table(OTHERS)?.iter()? {
        let (key, record) = record?;
        content.bytes += (key.value().len() + record.value().len()) as u64;
    }
    Ok(content)
}

/// Writes a batch into a transaction; gives by how many bytes the file grew.
fn write_batch(txn: &WriteTransaction, batch: &Batch) -> Result<i64, redb::Error> {
    let mut grown = 0;
    if let Some(cluster) = batch.cluster {
        txn.open_table(META)?.insert("cluster", cluster)?;
    }
    let mut keys = txn.open_table(KEYS)?;
    for (key, entry) in &batch.keys {
        grown += match entry {
            Some(entry) => put(&mut keys, key, &pack(key, entry))?,
            None => remove(&mut keys, key)?,
        };
    }
    let mut others = txn.open_table(OTHERS)?;
    for (key, entry) in &batch.others {
        let known = others.get(&key[..])?.and_then(|record| unpack(key, record.value()));
        let entry = known.map_or((**entry).clone(), |known| (**entry).clone().merge(&known));
        grown += put(&mut others, key, &pack(key, &entry))?;
    }
    let mut scopes = txn.open_table(SCOPES)?;
    for (prefix, (revision, proved)) in &batch.scopes {
        scopes.insert(&prefix[..], (revision.0, *proved))?;
    }
    Ok(grown)
}

fn put(table: &mut Records<'_>, key: &[u8], record: &[u8]) -> Result<i64, redb::Error> {
    let before = table.insert(key, record)?.map_or(0, |before| key.len() + before.value().len());
    Ok((key.len() + record.len()) as i64 - before as i64)
}

fn remove(table: &mut Records<'_>, key: &[u8]) -> Result<i64, redb::Error> {
    Ok(-(table.remove(key)?.map_or(0, |before| key.len() + before.value().len()) as i64))
}

/// Drops records of other keys, `bytes` of them if there are as many; gives how many.
fn make_room(txn: &WriteTransaction, bytes: i64) -> Result<i64, redb::Error> {
    let mut others = txn.open_table(OTHERS)?;
    let mut freed = 0;
    while freed < bytes {
        let Some((key, record)) = others.pop_first()? else { break };
        freed += (key.value().len() + record.value().len()) as i64;
    }
    Ok(freed)
}
