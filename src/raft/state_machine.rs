//! The state machine as openraft sees it: gathers committed entries into
//! chunks, takes snapshots, installs them.
//!
//! What `applied_state` reports is on disk: it is what the state said when it
//! was opened, after a crash the exact prefix of the log that a flush had
//! reached, or what an installed snapshot brought. An error never goes back to
//! openraft as if it could go on: the node is ended first.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use parking_lot::Mutex;

use super::applier::{Applier, Chunk, Ended};
use super::fatal::Fatal;
use super::receiver::{applied_id, snapshot_meta};
use super::record;
use super::types::{Entry, EntryPayload, LogId, SnapshotMeta, StoredMembership, TypeConfig};
use crate::machine;
use crate::storage::layout::{AppliedRecord, Family, LogPosition, meta};
use crate::storage::snapshot::{Received, SnapshotStore, StoredSnapshot};
use crate::storage::{DataDir, Read, StateDb, StateOptions, StorageError, WeakStateDb, codec};
use crate::telemetry;

/// The most entries applied at a time.
const CHUNK_ENTRIES_MAX: usize = 4096;
/// The most bytes of entries applied at a time, give or take the last entry.
const CHUNK_BYTES_MAX: u64 = 4 << 20;
/// What an entry counts beside its body.
const ENTRY_BYTES: u64 = 64;

/// A snapshot as openraft carries it between us and us.
#[derive(Debug)]
pub enum SnapshotData {
    /// One of this node's own, to be sent.
    Stored(Arc<StoredSnapshot>),
    /// One that has just arrived, to be installed.
    Received(Received),
}

/// A snapshot with what openraft knows of it.
pub(super) type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// What a [`StateMachine`] is made of.
pub(super) struct StateMachineParts {
    pub applier: Applier,
    pub db: StateDb,
    pub db_dir: PathBuf,
    pub db_options: StateOptions,
    pub snapshots: Arc<SnapshotStore>,
    pub home: Arc<DataDir>,
    pub fatal: Fatal,
}

/// The adapter between openraft and the machine.
pub struct StateMachine {
    applier: Applier,
    state: Live,
    db_options: StateOptions,
    snapshots: Arc<SnapshotStore>,
    home: Arc<DataDir>,
    fatal: Fatal,
    applied: Option<LogId>,
    membership: StoredMembership,
    /// Replaced states that somebody may still read.
    retired: Vec<(WeakStateDb, PathBuf)>,
}

/// The live state. Shared with the handle that takes snapshots for operators.
#[derive(Clone)]
struct Live {
    db: StateDb,
    dir: PathBuf,
    shared: Arc<Mutex<StateDb>>,
}

/// The live state database, whichever it is by now.
#[derive(Clone)]
pub struct LiveState {
    shared: Arc<Mutex<StateDb>>,
}

impl LiveState {
    /// The database at this moment.
    pub fn db(&self) -> StateDb {
        self.shared.lock().clone()
    }
}

impl StateMachine {
    /// # Errors
    /// [`StorageError`] when what the state says of itself is damaged.
    pub(super) fn new(parts: StateMachineParts) -> Result<StateMachine, StorageError> {
        let StateMachineParts { applier, db, db_dir, db_options, snapshots, home, fatal } = parts;
        let (applied, membership) = read_applied(&db)?;
        let shared = Arc::new(Mutex::new(db.clone()));
        let state = Live { db, dir: db_dir, shared };
        let retired = Vec::new();
        Ok(StateMachine { applier, state, db_options, snapshots, home, fatal, applied, membership, retired })
    }

    pub(super) fn live(&self) -> LiveState {
        LiveState { shared: self.state.shared.clone() }
    }

    /// Gathers what is ready, up to a chunk's limits. Waits only for the first.
    async fn gather<S>(&self, entries: &mut S) -> io::Result<Chunk>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin,
    {
        let mut chunk = Chunk::default();
        let mut next = entries.next().await;
        while let Some(item) = next {
            let (entry, responder) = item?;
            if let Some(responder) = responder {
                chunk.responders.push((chunk.entries.len(), responder));
            }
            let (entry, bytes) = convert(entry);
            chunk.entries.push(entry);
            chunk.bytes += bytes;
            if chunk.entries.len() >= CHUNK_ENTRIES_MAX || chunk.bytes >= CHUNK_BYTES_MAX {
                break;
            }
            next = entries.next().now_or_never().flatten();
        }
        Ok(chunk)
    }

    /// Puts a snapshot in the place of the state. Every step leaves behind
    /// either the old state or the new one, whole; the switch decides.
    async fn install(&mut self, meta: &SnapshotMeta, data: SnapshotData) -> Result<(), StorageError> {
        self.sweep_retired();
        let dir = self.home.next_state_path()?;
        let (place, options) = (dir.clone(), self.db_options.clone());
        let (db, found) = self
            .on_disk(move || {
                // Kept first: a crash from here on leaves a snapshot newer than
                // the state, which the next start installs.
                let snapshot = match data {
                    SnapshotData::Stored(snapshot) => snapshot,
                    SnapshotData::Received(received) => received.keep()?,
                };
                snapshot.place(&place)?;
                let db = StateDb::open(&place, &options)?;
                let found = read_applied(&db)?;
                Ok((db, found))
            })
            .await?;
        if found.0 != meta.last_log_id {
            let reason = format!("the snapshot {meta} holds a state applied up to {:?}", found.0);
            return Err(StorageError::Corrupt { what: "snapshot".to_owned(), reason });
        }
        let home = self.home.clone();
        self.on_disk(move || home.switch_state()).await?;
        self.applier.replace(db.clone()).await.map_err(|ended| StorageError::Refused(ended.to_string()))?;
        let old = std::mem::replace(&mut self.state.db, db.clone());
        let old_dir = std::mem::replace(&mut self.state.dir, dir);
        *self.state.shared.lock() = db;
        self.retired.push((old.downgrade(), old_dir));
        drop(old);
        (self.applied, self.membership) = found;
        self.sweep_retired();
        Ok(())
    }

    /// Removes replaced states that nobody reads any more. What is left when
    /// the node ends is removed at its next start.
    fn sweep_retired(&mut self) {
        self.retired.retain(|(db, dir)| {
            if !db.is_closed() {
                return true;
            }
            if let Err(error) = std::fs::remove_dir_all(dir) {
                tracing::warn!(dir = %dir.display(), %error, "a replaced state could not be removed");
            }
            false
        });
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, StorageError> {
        match self.applier.is_inline() {
            true => work(),
            false => off_thread(work).await,
        }
    }

    fn end(&self, what: &str, error: impl std::fmt::Display) -> io::Error {
        self.fatal.raise(format_args!("{what}: {error}"));
        io::Error::other(format!("{what}: {error}"))
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + Send,
    {
        let stopped = |ended: Ended| io::Error::other(ended);
        let mut entries = entries.fuse();
        // One chunk is applied while the next is gathered.
        let mut before = None;
        loop {
            let chunk =
                self.gather(&mut entries).await.map_err(|error| self.end("the log cannot be read", error))?;
            if chunk.entries.is_empty() {
                break;
            }
            let pending = self.applier.apply(chunk).await.map_err(stopped)?;
            if let Some(before) = before.replace(pending) {
                before.done().await.map_err(stopped)?;
            }
        }
        match before {
            Some(last) => last.done().await.map_err(stopped),
            None => Ok(()),
        }
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        self.sweep_retired();
        SnapshotBuilder {
            db: self.state.db.clone(),
            snapshots: self.snapshots.clone(),
            fatal: self.fatal.clone(),
            inline: self.applier.is_inline(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: SnapshotData) -> io::Result<()> {
        let installed = self.install(meta, data).await;
        installed.map_err(|error| self.end("a snapshot could not be installed", error))?;
        metrics::counter!(telemetry::SNAPSHOTS_INSTALLED).increment(1);
        tracing::info!(%meta, "installed a snapshot");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let Some(snapshot) = self.snapshots.newest() else { return Ok(None) };
        let snapshot = as_openraft(snapshot);
        snapshot.map(Some).map_err(|error| self.end("the newest snapshot is unusable", error))
    }
}

/// Takes a snapshot beside the thread that applies.
pub struct SnapshotBuilder {
    db: StateDb,
    snapshots: Arc<SnapshotStore>,
    fatal: Fatal,
    inline: bool,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let (db, snapshots) = (self.db.clone(), self.snapshots.clone());
        let build = move || snapshots.build(&db);
        let built = match self.inline {
            true => build(),
            false => off_thread(build).await,
        };
        if built.is_ok() {
            metrics::counter!(telemetry::SNAPSHOTS_BUILT).increment(1);
        }
        built.and_then(as_openraft).map_err(|error| {
            // A flush or a table failed: the state's own disk is not to be trusted.
            self.fatal.raise(format_args!("a snapshot could not be taken: {error}"));
            io::Error::other(error)
        })
    }
}

fn as_openraft(snapshot: Arc<StoredSnapshot>) -> Result<Snapshot, StorageError> {
    let meta = snapshot_meta(snapshot.manifest())?;
    Ok(Snapshot { meta, snapshot: SnapshotData::Stored(snapshot) })
}

/// The last applied entry and the last membership, as the state has them.
fn read_applied(db: &StateDb) -> Result<(Option<LogId>, StoredMembership), StorageError> {
    let position = match db.get(Family::Meta, meta::APPLIED)? {
        Some(bytes) => codec::decode::<AppliedRecord>("applied position", &bytes)?,
        None => LogPosition::default(),
    };
    let membership = match db.get(Family::Meta, meta::MEMBERSHIP)? {
        Some(bytes) => record::decode_stored_membership(&bytes)?,
        None => StoredMembership::default(),
    };
    Ok((applied_id(position), membership))
}

/// An entry as the machine takes it, and what it counts in bytes.
fn convert(entry: Entry) -> (machine::Entry, u64) {
    let position = LogPosition::from(&entry.log_id);
    let (time_ms, payload, bytes) = match entry.payload {
        EntryPayload::Blank => (0, machine::Payload::Blank, 0),
        EntryPayload::Normal(proposal) => {
            let bytes = proposal.body.len() as u64;
            (proposal.time_ms, machine::Payload::Command(proposal.body), bytes)
        }
        EntryPayload::Membership(membership) => {
            let stored = StoredMembership::new(Some(entry.log_id), membership);
            let encoded = record::encode_stored_membership(&stored);
            let bytes = encoded.len() as u64;
            (0, machine::Payload::Membership(encoded.into()), bytes)
        }
    };
    (machine::Entry { position, time_ms, payload }, bytes + ENTRY_BYTES)
}

async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(StorageError::Refused(format!("the disk's thread ended: {error}"))),
    }
}
