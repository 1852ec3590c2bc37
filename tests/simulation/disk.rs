//! What a node keeps through its crashes: a directory in memory, and the log's
//! twin, which loses what was not synced.
//!
//! A crash is an image: the directory's files as they are at that moment, taken
//! before the process goes, because a database that is closed in order writes
//! out what a crash would lose. Tables are linked, the rest is copied.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay::mutant::{self, Mutant};
use mainstay::storage::StorageError;
use mainstay::storage::log::{FatalHook, LogEngine, LogOp, LogResult, MemoryLog, Recovered, VerifyRecord};

use crate::chance::Chance;

/// How quickly a disk syncs, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    pub sync_ms_min: u64,
    pub sync_ms_max: u64,
}

/// What a crash leaves of what was written and not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// All of it: the process died and the machine did not.
    Everything,
    /// A beginning of it: the power went.
    Some,
    /// None of it.
    Nothing,
}

/// The log's twin, and every record that was ever written to it and not taken
/// back: the checks need entries for longer than the node does.
pub struct TappedLog {
    log: MemoryLog,
    records: Mutex<BTreeMap<u64, Bytes>>,
}

impl TappedLog {
    fn over(log: MemoryLog, records: BTreeMap<u64, Bytes>) -> Arc<TappedLog> {
        log.sync_when_told();
        Arc::new(TappedLog { log, records: Mutex::new(records) })
    }

    fn records(&self) -> MutexGuard<'_, BTreeMap<u64, Bytes>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The record of an index, if this log was ever given it.
    pub fn record(&self, index: u64) -> Option<Bytes> {
        self.records().get(&index).cloned()
    }
}

impl LogEngine for TappedLog {
    fn recover(&self, verify_from: u64, verify: VerifyRecord<'_>) -> Result<Recovered, StorageError> {
        self.log.recover(verify_from, verify)
    }

    fn submit(&self, op: LogOp) {
        let op = lie(op);
        match &op {
            LogOp::Append { records, .. } => self.records().extend(records.iter().cloned()),
            LogOp::TruncateAfter { last } => {
                self.records().split_off(&last.map_or(0, |last| last + 1));
            }
            // Beyond the end: a snapshot came, and what stood here may never have been chosen.
            LogOp::Purge { upto, .. } => {
                let mut records = self.records();
                if records.last_key_value().is_none_or(|(last, _)| last < upto) {
                    records.clear();
                }
            }
            LogOp::SaveVote { .. } | LogOp::SaveCommitted { .. } => {}
        }
        self.log.submit(op);
    }

    fn read(&self, range: Range<u64>, limit_bytes: usize) -> Result<Vec<(u64, Bytes)>, StorageError> {
        self.log.read(range, limit_bytes)
    }

    fn read_may_block(&self) -> bool {
        false
    }

    fn held_bytes(&self) -> u64 {
        self.log.held_bytes()
    }

    fn first_index_within(&self, keep_bytes: u64) -> Option<u64> {
        self.log.first_index_within(keep_bytes)
    }
}

/// The two deliberate bugs that stand in the product's own log: this twin has
/// them, too, so that the checks can be seen to find them.
fn lie(op: LogOp) -> LogOp {
    let nobody = || Box::new(|_: LogResult| {});
    match op {
        LogOp::Append { records, done } if mutant::is(Mutant::LogNotSynced) => {
            done(Ok(()));
            LogOp::Append { records, done: nobody() }
        }
        LogOp::SaveVote { vote, done } if mutant::is(Mutant::VoteNotSynced) => {
            done(Ok(()));
            LogOp::SaveVote { vote, done: nobody() }
        }
        op => op,
    }
}

/// One node's disk.
pub struct Disk {
    root: PathBuf,
    generation: u64,
    log: Arc<TappedLog>,
    chance: Chance,
    /// Operations that the sync in flight covers, and when it ends.
    syncing: Option<(usize, u64)>,
}

impl Disk {
    /// An empty disk below `root`, which does not exist yet.
    pub fn new(root: PathBuf, chance: Chance, fatal: FatalHook) -> Disk {
        let log = TappedLog::over(MemoryLog::new(fatal), BTreeMap::new());
        Disk { root, generation: 0, log, chance, syncing: None }
    }

    /// The data directory as the next start finds it.
    pub fn path(&self) -> PathBuf {
        self.root.join(self.generation.to_string())
    }

    /// The log as the next start finds it.
    pub fn log(&self) -> &Arc<TappedLog> {
        &self.log
    }

    /// Lets the disk work: at most one sync is in flight, and it covers what
    /// waited when it began. To be called inside the node's runtime, which the
    /// callbacks wake.
    pub fn work(&mut self, now_ms: u64, speed: Speed) {
        match self.syncing {
            Some((_, until)) if until > now_ms => {}
            Some((operations, _)) => {
                self.syncing = None;
                self.log.log.sync(operations);
            }
            None => {
                let waiting = self.log.log.unsynced();
                if waiting > 0 {
                    let takes = self.chance.between(speed.sync_ms_min, speed.sync_ms_max);
                    self.syncing = Some((waiting, now_ms + takes));
                    if takes == 0 {
                        self.syncing = None;
                        self.log.log.sync(waiting);
                    }
                }
            }
        }
    }

    /// The disk fails: the node must notice and stop.
    pub fn fail(&self) {
        let source = std::io::Error::other("the disk was made to fail");
        self.log.log.fail(StorageError::Io { path: self.path(), source });
    }

    /// Goes on as after a crash. Says how many operations were lost.
    pub fn crash(&mut self, survives: Survives) -> std::io::Result<usize> {
        let waiting = self.log.log.unsynced();
        let surviving = match survives {
            Survives::Everything => waiting,
            Survives::Some => self.chance.below(waiting as u64 + 1) as usize,
            Survives::Nothing => 0,
        };
        self.syncing = None;
        let log = self.log.log.crash(surviving);
        let mut records = self.log.records().clone();
        let recovered = log.recover(u64::MAX, &|_, _| Ok(())).expect("the twin holds no hole");
        let first = recovered.first_index();
        let end = recovered.last.as_ref().map_or(first, |(last, _)| last + 1);
        // What was appended or truncated and not synced is not so any more.
        records.split_off(&first);
        records.extend(log.read(first..end, usize::MAX).expect("the twin holds no hole"));
        self.log = TappedLog::over(log, records);
        let from = self.path();
        self.generation += 1;
        take_image(&from, &self.path())?;
        Ok(waiting - surviving)
    }

    /// Goes on as after an orderly end: nothing is lost, in the same directory.
    pub fn reopen(&mut self) {
        self.syncing = None;
        let records = self.log.records().clone();
        let log = self.log.log.crash(usize::MAX);
        self.log = TappedLog::over(log, records);
        mark_log(&self.path());
    }

    /// Removes what earlier generations left. Errors leave it to the end of the run.
    pub fn sweep(&self) {
        for generation in 0..self.generation {
            let _ = fs::remove_dir_all(self.root.join(generation.to_string()));
        }
    }
}

/// A member's data directory must show a log; here the log is elsewhere.
fn mark_log(path: &Path) {
    let raft = path.join("raft");
    if raft.is_dir() {
        let _ = fs::write(raft.join("0000000000000001.log"), "the log is in memory\n");
    }
}

/// Takes an image of a directory that a database may be rewriting in the
/// background: it is whole when the database's manifests did not change
/// meanwhile.
fn take_image(from: &Path, to: &Path) -> std::io::Result<()> {
    for _ in 0..1000 {
        let before = manifests(from)?;
        let _ = fs::remove_dir_all(to);
        let copied = copy_tree(from, to);
        if copied.is_ok() && manifests(from)? == before {
            mark_log(to);
            return Ok(());
        }
    }
    Err(std::io::Error::other(format!("{} does not come to rest", from.display())))
}

fn manifests(dir: &Path) -> std::io::Result<BTreeMap<PathBuf, u64>> {
    let mut found = BTreeMap::new();
    let Ok(entries) = fs::read_dir(dir) else { return Ok(found) };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if path.is_dir() {
            found.extend(manifests(&path)?);
        } else if name.starts_with("MANIFEST") || name == "CURRENT" {
            let size = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            found.insert(path, size);
        }
    }
    Ok(found)
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    // Manifests first: the tables that they name stay until they change.
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<_>>()?;
    paths.sort_by_key(|path| (path.extension().is_some_and(|ending| ending == "sst"), path.clone()));
    for path in paths {
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        let target = to.join(&name);
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else if name.ends_with(".sst") {
            fs::hard_link(&path, &target)?;
        } else if !name.starts_with("LOG") && name != "LOCK" {
            fs::copy(&path, &target)?;
        }
    }
    Ok(())
}
