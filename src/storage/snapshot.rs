//! Snapshots of the state: a checkpoint of the database beside a manifest that
//! names every file with its size and SHA-256.
//!
//! A snapshot lives in `snapshots/<index>/`: `data/` holds the checkpoint,
//! `MANIFEST` what it is. The newest one is kept; an older one goes when its
//! last reader lets go of it. A directory under this name is complete and
//! durable: everything is built under a name that ends with `.tmp`, synced, and
//! renamed. What the manifest says of the state was read *from the
//! checkpoint*, so it cannot be ahead of the data or behind it.
//!
//! This file moves bytes and checks them. Which snapshot to take, send or
//! install, and when, is the raft room's to say; it never opens a socket.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

pub use super::content::{FileEntry, Manifest};
use super::content::{FileSink, OpenFile, corrupt, digest, io, mismatch, sync};
use super::layout::{AppliedRecord, Family, LogPosition, meta};
use super::{Read, StateDb, StateOptions, StorageError, codec};
use crate::env::EnvRef;
use crate::types::{ClusterId, Revision};

/// The rest after so much work on an operator's copy: twice as long, because nobody waits for a copy as for
/// their own requests; but no longer than a second, in case the machine stood still.
pub fn rest_after(work: Duration) -> Duration {
    (work * 2).min(Duration::from_secs(1))
}

/// Name of the manifest in a snapshot's directory.
const MANIFEST: &str = "MANIFEST";
/// Name of the checkpoint in a snapshot's directory.
const DATA: &str = "data";
/// What names of unfinished directories end with.
const UNFINISHED: &str = ".tmp";
/// Bytes read or written at a time; also the most one chunk of a transfer holds.
pub const CHUNK_BYTES: usize = 1 << 20;

/// A complete, durable snapshot. Its directory stays for as long as anyone
/// holds it, even after a newer one has taken its place.
#[derive(Debug)]
pub struct StoredSnapshot {
    dir: PathBuf,
    manifest: Manifest,
    /// Set when nobody but the holders needs the directory any more.
    obsolete: AtomicBool,
}

impl StoredSnapshot {
    /// What it holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Reads its content from the beginning, checking every file against the manifest on the way: what
    /// has rotted here is not sent elsewhere.
    pub fn reader(self: &Arc<Self>) -> SnapshotReader {
        SnapshotReader { snapshot: self.clone(), file: 0, open: None, checks: true }
    }

    /// The same without checking: for a snapshot whose files were all read for its manifest just now.
    pub(super) fn unchecked_reader(self: &Arc<Self>) -> SnapshotReader {
        SnapshotReader { checks: false, ..self.reader() }
    }

    /// Makes a database directory of it in `target`, which must not exist:
    /// tables are linked, because they never change, and the rest is copied.
    /// Durable on return.
    ///
    /// # Errors
    /// [`StorageError::Io`]; `target` is then left incomplete.
    pub fn place(&self, target: &Path) -> Result<(), StorageError> {
        fs::create_dir(target).map_err(|error| io(target, error))?;
        for file in &self.manifest.files {
            let (from, to) = (self.data().join(&file.name), target.join(&file.name));
            if file.name.ends_with(".sst") || file.name.ends_with(".blob") {
                fs::hard_link(&from, &to).map_err(|error| io(&to, error))?;
            } else {
                fs::copy(&from, &to).map_err(|error| io(&to, error))?;
                sync(&to)?;
            }
        }
        sync(target)?;
        target.parent().map_or(Ok(()), sync)
    }

    fn data(&self) -> PathBuf {
        self.dir.join(DATA)
    }
}

impl Drop for StoredSnapshot {
    fn drop(&mut self) {
        if self.obsolete.load(Ordering::Acquire)
            && let Err(error) = fs::remove_dir_all(&self.dir)
        {
            tracing::warn!(dir = %self.dir.display(), %error, "an old snapshot could not be removed");
        }
    }
}

/// The snapshots of one node.
#[derive(Debug)]
pub struct SnapshotStore {
    root: PathBuf,
    cluster: ClusterId,
    newest: Mutex<Option<Arc<StoredSnapshot>>>,
    sequence: AtomicU64,
}

impl SnapshotStore {
    /// Opens the snapshots under `root`, creating the directory, and removes
    /// what a crash left unfinished. A snapshot whose manifest cannot be read
    /// is removed as well: the state itself is elsewhere, and a new one is made
    /// of it when it is needed.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the directory cannot be read or changed.
    pub fn open(root: &Path, cluster: ClusterId) -> Result<SnapshotStore, StorageError> {
        fs::create_dir_all(root).map_err(|error| io(root, error))?;
        let mut newest: Option<StoredSnapshot> = None;
        for entry in fs::read_dir(root).map_err(|error| io(root, error))? {
            let dir = entry.map_err(|error| io(root, error))?.path();
            let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let found = if name.ends_with(UNFINISHED) {
                None
            } else {
                match load(&dir, cluster) {
                    Ok(snapshot) => Some(snapshot),
                    Err(error) => {
                        tracing::warn!(dir = %dir.display(), %error, "a snapshot is unusable and is removed");
                        None
                    }
                }
            };
            let loser = match (found, &newest) {
                (None, _) => Some(dir),
                (Some(found), Some(kept)) if found.manifest.last.index <= kept.manifest.last.index => {
                    Some(found.dir.clone())
                }
                (Some(found), _) => newest.replace(found).map(|older| older.dir.clone()),
            };
            if let Some(loser) = loser {
                fs::remove_dir_all(&loser).map_err(|error| io(&loser, error))?;
            }
        }
        sync(root)?;
        Ok(SnapshotStore {
            root: root.to_owned(),
            cluster,
            newest: Mutex::new(newest.map(Arc::new)),
            sequence: AtomicU64::new(0),
        })
    }

    /// The newest snapshot.
    pub fn newest(&self) -> Option<Arc<StoredSnapshot>> {
        self.newest.lock().clone()
    }

    /// Takes a snapshot of `db`, which others may go on writing to, and keeps
    /// it as the newest. Durable on return, and with it everything in `db` up
    /// to its last entry, because a checkpoint flushes.
    ///
    /// # Errors
    /// [`StorageError`] when the disk fails; nothing is left behind.
    pub fn build(&self, db: &StateDb) -> Result<Arc<StoredSnapshot>, StorageError> {
        let scratch = self.scratch()?;
        let manifest = self.checkpoint(db, &scratch.dir, Known::Believed, &mut || ())?;
        self.keep(scratch, manifest)
    }

    /// Takes a snapshot that is gone when the last holder drops it, for
    /// somebody who wants to carry the state away. All of it is read, with rests ([`rest_after`]).
    ///
    /// # Errors
    /// As [`SnapshotStore::build`].
    pub fn build_transient(&self, db: &StateDb, env: &EnvRef) -> Result<Arc<StoredSnapshot>, StorageError> {
        let scratch = self.scratch()?;
        let manifest = self.checkpoint(db, &scratch.dir, Known::Checked, &mut resting(env))?;
        Ok(Arc::new(scratch.into_transient(manifest)))
    }

    /// Begins to receive a snapshot with this manifest.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] when it is another cluster's;
    /// [`StorageError::Io`] when the disk fails.
    pub fn receive(self: &Arc<Self>, manifest: Manifest) -> Result<Incoming, StorageError> {
        if manifest.cluster != self.cluster {
            let (theirs, ours) = (manifest.cluster, self.cluster);
            return Err(corrupt(format!("it is of cluster {theirs:x}, and this is cluster {ours:x}")));
        }
        let scratch = self.scratch()?;
        let data = scratch.dir.join(DATA);
        fs::create_dir(&data).map_err(|error| io(&data, error))?;
        let sink = FileSink::new(data, manifest.files.clone());
        Ok(Incoming { scratch, sink, manifest, store: self.clone() })
    }

    fn scratch(&self) -> Result<Scratch, StorageError> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let dir = self.root.join(format!("{sequence}{UNFINISHED}"));
        fs::create_dir(&dir).map_err(|error| io(&dir, error))?;
        Ok(Scratch { dir, armed: true })
    }

    fn checkpoint(
        &self,
        db: &StateDb,
        dir: &Path,
        known: Known,
        rest: &mut dyn FnMut(),
    ) -> Result<Manifest, StorageError> {
        let data = dir.join(DATA);
        db.checkpoint(&data)?;
        let mut manifest = describe_state(&data, self.cluster)?;
        manifest.files = self.describe_files(&data, known, rest)?;
        for file in &manifest.files {
            sync(&data.join(&file.name))?;
        }
        seal(dir, &manifest)?;
        Ok(manifest)
    }

    /// Names, sizes and digests of the files in `data`. Of a table that the newest
    /// snapshot links as well (the same inode) the digest is known: tables never
    /// change, so it still says what was written.
    fn describe_files(
        &self,
        data: &Path,
        trust: Known,
        rest: &mut dyn FnMut(),
    ) -> Result<Vec<FileEntry>, StorageError> {
        let mut known: HashMap<(u64, u64, u64), [u8; 32]> = HashMap::new();
        if let Some(newest) = self.newest() {
            for file in newest.manifest.files.iter().filter(|file| file.name.ends_with(".sst")) {
                let path = newest.data().join(&file.name);
                let found = fs::metadata(&path).map_err(|error| io(&path, error))?;
                known.insert((found.dev(), found.ino(), file.size_bytes), file.sha256);
            }
        }
        let mut files = Vec::new();
        for entry in fs::read_dir(data).map_err(|error| io(data, error))? {
            let entry = entry.map_err(|error| io(data, error))?;
            let path = entry.path();
            let name = entry.file_name().into_string().map_err(|name| {
                corrupt(format!("the engine made a file named {name:?}, which is not text"))
            })?;
            let found = entry.metadata().map_err(|error| io(&path, error))?;
            let known = known.get(&(found.dev(), found.ino(), found.len()));
            let sha256 = match (known, trust) {
                (Some(known), Known::Believed) => *known,
                _ => digest(&path, rest)?,
            };
            if known.is_some_and(|known| *known != sha256) {
                return Err(mismatch(&path));
            }
            files.push(FileEntry { name, size_bytes: found.len(), sha256 });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }

    /// Renames a complete directory to its final name and makes it the newest,
    /// unless a newer one came first: then it lives until it is dropped.
    fn keep(&self, scratch: Scratch, manifest: Manifest) -> Result<Arc<StoredSnapshot>, StorageError> {
        let mut newest = self.newest.lock();
        if let Some(kept) = newest.as_ref() {
            if kept.manifest.last == manifest.last {
                return Ok(kept.clone());
            }
            if kept.manifest.last.index >= manifest.last.index {
                return Ok(Arc::new(scratch.into_transient(manifest)));
            }
        }
        let dir = self.root.join(manifest.last.index.to_string());
        fs::rename(&scratch.dir, &dir).map_err(|error| io(&dir, error))?;
        scratch.disarm();
        sync(&self.root)?;
        let snapshot = Arc::new(StoredSnapshot { dir, manifest, obsolete: AtomicBool::new(false) });
        if let Some(older) = newest.replace(snapshot.clone()) {
            older.obsolete.store(true, Ordering::Release);
        }
        Ok(snapshot)
    }
}

/// Rests for as long as is due for the work since the last rest.
#[expect(clippy::disallowed_methods, reason = "on a thread for what blocks")]
fn resting(env: &EnvRef) -> impl FnMut() {
    let mut since = env.monotonic();
    move || {
        std::thread::sleep(rest_after(env.monotonic().saturating_sub(since)));
        since = env.monotonic();
    }
}

/// What a digest that is known already is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// The file need not be read.
    Believed,
    /// The file must still have it.
    Checked,
}

/// A directory that is removed unless it becomes a snapshot.
#[derive(Debug)]
struct Scratch {
    dir: PathBuf,
    armed: bool,
}

impl Scratch {
    fn disarm(mut self) {
        self.armed = false;
    }

    fn into_transient(self, manifest: Manifest) -> StoredSnapshot {
        let dir = self.dir.clone();
        self.disarm();
        StoredSnapshot { dir, manifest, obsolete: AtomicBool::new(true) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = fs::remove_dir_all(&self.dir)
        {
            tracing::warn!(dir = %self.dir.display(), %error, "an unfinished snapshot could not be removed");
        }
    }
}

/// A snapshot on its way in. Dropped unfinished, it leaves nothing behind.
pub struct Incoming {
    scratch: Scratch,
    sink: FileSink,
    manifest: Manifest,
    store: Arc<SnapshotStore>,
}

impl Incoming {
    /// Takes the next bytes of the content.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] when a file is not what the manifest says, or
    /// more comes than it names; [`StorageError::Io`] when the disk fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.sink.write(bytes)
    }

    /// Ends the snapshot: everything has arrived, is what the manifest says,
    /// and is durable. It is not the newest before [`Received::keep`].
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] when something is missing or does not match;
    /// [`StorageError::Io`] when the disk fails.
    pub fn finish(self) -> Result<Received, StorageError> {
        let Incoming { scratch, sink, manifest, store } = self;
        sink.finish()?;
        let found = describe_state(&scratch.dir.join(DATA), manifest.cluster)?;
        if (found.last, &found.membership, found.revision)
            != (manifest.last, &manifest.membership, manifest.revision)
        {
            return Err(corrupt(format!(
                "its data ends at {:?}, revision {}, and its manifest says {:?}, revision {}",
                found.last, found.revision, manifest.last, manifest.revision
            )));
        }
        seal(&scratch.dir, &manifest)?;
        Ok(Received { scratch, manifest, store })
    }
}

/// A snapshot that has arrived whole. Dropped, it leaves nothing behind.
#[derive(Debug)]
pub struct Received {
    scratch: Scratch,
    manifest: Manifest,
    store: Arc<SnapshotStore>,
}

impl Received {
    /// What it holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Makes it the newest snapshot, unless a newer one is there.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the disk fails.
    pub fn keep(self) -> Result<Arc<StoredSnapshot>, StorageError> {
        self.store.keep(self.scratch, self.manifest)
    }
}

/// Reads a snapshot's content in order.
pub struct SnapshotReader {
    snapshot: Arc<StoredSnapshot>,
    file: usize,
    open: Option<OpenFile>,
    /// Whether every file is compared with the manifest.
    checks: bool,
}

impl SnapshotReader {
    /// The next bytes, at most [`CHUNK_BYTES`]; `None` at the end.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] when a file is not what the manifest says,
    /// [`StorageError::Io`] when it cannot be read: the node must stop, because
    /// its own tables are the same files.
    #[allow(clippy::should_implement_trait, reason = "an iterator's end and its errors read worse here")]
    pub fn next(&mut self) -> Result<Option<Bytes>, StorageError> {
        while let Some(entry) = self.snapshot.manifest.files.get(self.file) {
            let path = self.snapshot.data().join(&entry.name);
            let open = match &mut self.open {
                Some(open) => open,
                None => {
                    let file = File::open(&path).map_err(|error| io(&path, error))?;
                    self.open.insert(OpenFile { file, hasher: Sha256::new(), left: entry.size_bytes })
                }
            };
            let mut chunk = vec![0; open.left.min(CHUNK_BYTES as u64) as usize];
            open.file.read_exact(&mut chunk).map_err(|error| io(&path, error))?;
            if self.checks {
                open.hasher.update(&chunk);
            }
            open.left -= chunk.len() as u64;
            if open.left == 0 {
                let found: [u8; 32] = std::mem::take(&mut open.hasher).finalize().into();
                if self.checks && found != entry.sha256 {
                    return Err(mismatch(&path));
                }
                self.open = None;
                self.file += 1;
            }
            if !chunk.is_empty() {
                return Ok(Some(chunk.into()));
            }
        }
        Ok(None)
    }
}

/// Reads what a database directory holds, without changing a file of it. The
/// manifest's files are left empty.
pub(super) fn describe_state(data: &Path, cluster: ClusterId) -> Result<Manifest, StorageError> {
    let db =
        StateDb::open_read_only(data, &StateOptions { block_cache_bytes: 1 << 20, ..Default::default() })?;
    let last = match db.get(Family::Meta, meta::APPLIED)? {
        Some(bytes) => codec::decode::<AppliedRecord>("applied position", &bytes)?,
        None => LogPosition::default(),
    };
    let membership = match db.get(Family::Meta, meta::MEMBERSHIP)? {
        Some(bytes) => Bytes::copy_from_slice(&bytes),
        None => Bytes::new(),
    };
    let revision = match db.get(Family::Meta, meta::REVISION)? {
        Some(bytes) => codec::decode("revision", &bytes)?,
        None => Revision::FIRST,
    };
    drop(db);
    // Opening leaves the engine's own log file behind, which is no part of the state.
    for entry in fs::read_dir(data).map_err(|error| io(data, error))? {
        let path = entry.map_err(|error| io(data, error))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("LOG") || name == "LOCK" {
            fs::remove_file(&path).map_err(|error| io(&path, error))?;
        }
    }
    Ok(Manifest { cluster, last, membership, revision, files: Vec::new() })
}

/// Writes the manifest and makes the directory's own entries durable.
fn seal(dir: &Path, manifest: &Manifest) -> Result<(), StorageError> {
    let path = dir.join(MANIFEST);
    let mut file = File::create_new(&path).map_err(|error| io(&path, error))?;
    file.write_all(&manifest.encode()).map_err(|error| io(&path, error))?;
    file.sync_all().map_err(|error| io(&path, error))?;
    sync(&dir.join(DATA))?;
    sync(dir)
}

/// Reads a snapshot's manifest and sees that its files are there. Their content
/// is checked when it is read.
fn load(dir: &Path, cluster: ClusterId) -> Result<StoredSnapshot, StorageError> {
    let path = dir.join(MANIFEST);
    let manifest = Manifest::decode(&fs::read(&path).map_err(|error| io(&path, error))?)?;
    if manifest.cluster != cluster {
        return Err(corrupt(format!("it is of cluster {:x}, and this is {cluster:x}", manifest.cluster)));
    }
    for file in &manifest.files {
        let path = dir.join(DATA).join(&file.name);
        let found = fs::metadata(&path).map_err(|error| io(&path, error))?.len();
        if found != file.size_bytes {
            return Err(corrupt(format!("{} has {found} bytes, not {}", file.name, file.size_bytes)));
        }
    }
    Ok(StoredSnapshot { dir: dir.to_owned(), manifest, obsolete: AtomicBool::new(false) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Batch;

    fn state(dir: &Path, index: u64) -> StateDb {
        let db = StateDb::open(dir, &StateOptions::default()).unwrap();
        advance(&db, index);
        db
    }

    fn advance(db: &StateDb, index: u64) {
        let mut batch = Batch::default();
        let position = LogPosition { term: 1, node: 1, index };
        batch.put(db, Family::Meta, meta::APPLIED, &codec::encode(&position));
        batch.put(db, Family::Current, &index.to_be_bytes(), &[7; 3000]);
        db.write(batch).unwrap();
    }

    #[test]
    fn the_newest_stays_and_an_older_one_lives_as_long_as_its_reader() {
        let root = tempfile::tempdir().unwrap();
        let db = state(&root.path().join("db"), 5);
        let store = SnapshotStore::open(&root.path().join("snapshots"), 1).unwrap();
        let older = store.build(&db).unwrap();
        assert_eq!(older.manifest().last.index, 5);
        let mut reader = older.reader();
        drop(older);
        advance(&db, 9);
        store.build(&db).unwrap();
        let mut read = 0;
        while let Some(chunk) = reader.next().unwrap() {
            read += chunk.len();
        }
        assert!(read > 3000);
        drop(reader);
        let names = || std::fs::read_dir(root.path().join("snapshots")).unwrap().count();
        assert_eq!(names(), 1);
        drop(store);
        std::fs::create_dir(root.path().join("snapshots/0.tmp")).unwrap();
        let store = SnapshotStore::open(&root.path().join("snapshots"), 1).unwrap();
        assert_eq!(store.newest().unwrap().manifest().last.index, 9);
        assert_eq!(names(), 1);
    }

    #[test]
    fn a_flipped_byte_of_manifest_or_content_is_found() {
        let root = tempfile::tempdir().unwrap();
        let db = state(&root.path().join("db"), 5);
        let store = Arc::new(SnapshotStore::open(&root.path().join("a"), 1).unwrap());
        let snapshot = store.build(&db).unwrap();
        let manifest = snapshot.manifest().encode();
        for place in 0..manifest.len() {
            let mut damaged = manifest.clone();
            damaged[place] ^= 1;
            assert!(Manifest::decode(&damaged).is_err(), "a flip at {place} went unnoticed");
        }
        let mut content = Vec::new();
        let mut reader = snapshot.reader();
        while let Some(chunk) = reader.next().unwrap() {
            content.extend_from_slice(&chunk);
        }
        let other = Arc::new(SnapshotStore::open(&root.path().join("b"), 1).unwrap());
        let receive = |content: &[u8]| {
            let mut incoming = other.receive(snapshot.manifest().clone())?;
            content.chunks(700).try_for_each(|piece| incoming.write(piece))?;
            incoming.finish()
        };
        for place in (0..content.len()).step_by(content.len() / 23) {
            let mut damaged = content.clone();
            damaged[place] ^= 0x10;
            assert!(receive(&damaged).is_err(), "a flip at {place} went unnoticed");
        }
        assert!(receive(&content[..content.len() - 1]).is_err());
        assert!(receive(&[&content[..], b"x"].concat()).is_err());
        assert_eq!(std::fs::read_dir(root.path().join("b")).unwrap().count(), 0, "nothing is left behind");
        let kept = receive(&content).unwrap().keep().unwrap();
        assert_eq!(kept.manifest(), snapshot.manifest());
        // A file that rots where it lies is not sent on.
        let table = kept.manifest().files.iter().find(|file| file.name.ends_with(".sst")).unwrap();
        let path = kept.data().join(&table.name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[10] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let mut reader = kept.reader();
        let read = std::iter::from_fn(|| reader.next().transpose()).collect::<Result<Vec<_>, _>>();
        assert!(read.is_err());
        // Another cluster's is not taken.
        let foreign = Arc::new(SnapshotStore::open(&root.path().join("c"), 2).unwrap());
        assert!(foreign.receive(snapshot.manifest().clone()).is_err());
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        let entry = |name: &str| FileEntry { name: name.to_owned(), size_bytes: 0, sha256: [0; 32] };
        let manifest = |files| Manifest {
            cluster: 1,
            last: LogPosition::default(),
            membership: Bytes::new(),
            revision: Revision::FIRST,
            files,
        };
        for name in ["", "..", "../x", "a/b", ".hidden", "/etc/passwd"] {
            assert!(Manifest::decode(&manifest(vec![entry(name)]).encode()).is_err(), "{name:?}");
        }
        assert!(Manifest::decode(&manifest(vec![entry("a"), entry("a")]).encode()).is_err());
        assert!(Manifest::decode(&manifest(vec![entry("000012.sst"), entry("CURRENT")]).encode()).is_ok());
    }
}
