//! Puts the node together and takes it apart.
//!
//! The order matters: who this node is comes before its log is opened, the
//! marker on the disk comes before Raft may speak for it, and Raft speaks only
//! after [`Node::run`], when peers can reach it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::storage::{RaftLogReader, RaftLogStorage};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::ask::Desk;
use super::bootstrap::{self, Place};
use super::carrier::PeerCarrier;
use super::control::{Dialer, ForwardEnd};
use super::core::{Core, CoreParts, internal};
use super::lessor::Lessor;
use super::maintenance::{self, Gauges};
use super::membership::Membership;
use super::options::{Bootstrap, NodeOptions};
use super::propose::Proposer;
use super::read::Reads;
use super::renewals::Renewals;
use super::tasks::{Exit, ExitReason, Tasks};
use super::{Node, NodeError, NodeStatus, forward, keeper, sweeper};
use crate::env::{EnvRef, off_thread};
use crate::machine::{Effect, Machine, Observer};
use crate::mvcc::{Published, View};
use crate::raft::{
    Directory, Fatal, Local, LogId, LogStore, LogStoreOptions, PeerTimeouts, Peers, RaftHandle, RaftOptions,
    ReplayLimits, SnapshotTimeouts, StartParts, Transport,
};
use crate::storage::archive::Packing;
use crate::storage::log::{LogEngine, SegmentLog, SegmentLogOptions};
use crate::storage::snapshot::SnapshotStore;
use crate::storage::{CacheCounts, DataDir, DataDirOptions, Standing, StateDb, StorageError};
use crate::types::RevisionEvents;
use crate::watch::{Hub, HubOptions};

/// Log index of the membership that let this node in; absent for first members.
const JOINED_FILE: &str = "JOINED";
/// Says that this member was removed and must not start again.
const REMOVED_FILE: &str = "REMOVED";

/// Makes the transport over the directory of the members.
pub type MakeTransport = Box<dyn FnOnce(Arc<Directory>) -> Arc<dyn Transport> + Send + Sync>;

/// What a node is put together from.
pub struct NodeParts {
    /// What the operator set.
    pub options: NodeOptions,
    /// The clock and the random source.
    pub env: EnvRef,
    /// How the node ends when it cannot go on.
    pub fatal: Fatal,
    /// The way to other members.
    pub transport: MakeTransport,
    /// The way to nodes of which only an address is known.
    pub dialer: Arc<dyn Dialer>,
    /// What may be tuned of the watches.
    pub watch: HubOptions,
    /// What may be tuned of the data directory.
    pub data_dir: DataDirOptions,
    /// Apply inside openraft's task and not on a thread: for simulations.
    pub inline: bool,
    /// The log, where it is not the data directory's own: for simulations.
    pub log: Option<Arc<dyn LogEngine>>,
}

/// Everything of a running node.
pub(super) struct Inner {
    pub core: Arc<Core>,
    pub desk: Arc<Desk>,
    pub renewals: Arc<Renewals>,
    /// What serves reads: by a quorum, or by the leader's lease where that was chosen.
    pub reads: Arc<Reads>,
    pub hub: Arc<Hub>,
    pub forward_ends: mpsc::Sender<ForwardEnd>,
    /// The log or the state held something when the node started.
    pub had_state: bool,
    raft: RaftHandle,
    gauges: Arc<dyn Gauges>,
    tasks: Tasks,
    /// What only [`Node::run`] starts.
    run_once: parking_lot::Mutex<Option<RunParts>>,
    stopped: AtomicBool,
    data_dir: Arc<DataDir>,
}

struct RunParts {
    place: Place,
    ears: Arc<Ears>,
}

/// Passes on what apply made.
pub(super) struct Ears {
    hub: Arc<Hub>,
    lessor: Arc<Lessor>,
    /// There is a new compact mark, or another state.
    pub compacted: Notify,
}

impl Observer for Ears {
    fn on_chunk(&self, view: &Arc<View>, events: Vec<Arc<RevisionEvents>>, effects: Vec<Effect>) {
        if effects.contains(&Effect::Replaced) {
            self.hub.reset();
        }
        if !events.is_empty() {
            self.hub.publish(view, events);
        }
        if effects.iter().any(|effect| matches!(effect, Effect::Compacted(..) | Effect::Replaced)) {
            self.compacted.notify_one();
        }
        self.lessor.on_effects(&effects);
    }
}

struct StoreGauges {
    raft: crate::raft::LiveState,
    log: Arc<dyn LogEngine>,
    data_dir: Arc<DataDir>,
}

impl Gauges for StoreGauges {
    fn store_bytes(&self) -> u64 {
        self.raft.db().size_bytes()
    }

    fn live_bytes(&self) -> u64 {
        self.raft.db().live_size_bytes()
    }

    fn cache(&self) -> CacheCounts {
        self.raft.db().cache_counts()
    }

    fn log_bytes(&self) -> u64 {
        self.log.held_bytes()
    }

    fn space_is_back(&self) {
        if let Err(error) = self.data_dir.restore_ballast() {
            tracing::warn!(%error, "no space could be set aside for a full disk");
        }
    }
}

/// What the disk gave.
struct Stores {
    engine: Arc<dyn LogEngine>,
    log_store: LogStore,
    db: StateDb,
    snapshots: Arc<SnapshotStore>,
    machine: Machine,
    published: Arc<Published>,
    had_state: bool,
}

impl Node {
    /// Opens the data directory, finds out who this node is (which may mean
    /// asking a running cluster to be let in) and puts everything together. The
    /// node answers its peers' questions from here on, but takes no part before
    /// [`Node::run`].
    ///
    /// # Errors
    /// [`NodeError::Invalid`] for options, [`NodeError::NotAdmitted`] for a node
    /// that may not come in as it is, [`NodeError::Internal`] when the disk fails.
    pub async fn start(mut parts: NodeParts) -> Result<Node, NodeError> {
        parts.options.check()?;
        let (path, dir_options, env) =
            (parts.options.data_dir.clone(), parts.data_dir.clone(), parts.env.clone());
        let opening = env.clone();
        let data_dir = on_disk(&env, move || DataDir::open(&path, dir_options, &opening)).await?;
        let data_dir = Arc::new(data_dir);
        parts.fatal = freeing_ballast(parts.fatal, data_dir.clone());
        let place = place(&parts, &data_dir).await?;
        let stores = open(&parts, &data_dir, place).await.inspect_err(|error| {
            release_if_full(&data_dir, &error.to_string());
        })?;
        // From here on the log must be there at every start.
        let member = Standing::Member { cluster: place.cluster_id, node: place.node_id };
        data_dir.set_standing(member).map_err(refused)?;
        let inner = assemble(parts, data_dir, place, stores).await?;
        Ok(Node { inner: Arc::new(inner) })
    }

    /// Takes part in the cluster and starts every task. To be called once, when
    /// peers can reach this node.
    pub fn run(&self) {
        let inner = &self.inner;
        let Some(parts) = inner.run_once.lock().take() else { return };
        inner.raft.run();
        inner.start_tasks(parts);
    }

    /// Where the calls of Raft from peers end.
    pub fn raft_receiver(&self) -> &Arc<crate::raft::Receiver> {
        self.inner.raft.receiver()
    }

    /// The other members: their breakers, for the metrics and `doctor`.
    pub fn peers(&self) -> &Arc<Peers> {
        self.inner.raft.peers()
    }
}

/// Who this node is: as the disk says, or as it has to find out.
async fn place(parts: &NodeParts, data_dir: &DataDir) -> Result<Place, NodeError> {
    if data_dir.path().join(REMOVED_FILE).exists() {
        return Err(NodeError::NotAdmitted(format!(
            "this member was removed from its cluster; its data in {} belongs to no cluster any more: \
             move it away and start with --join to come in as a new member",
            data_dir.path().display()
        )));
    }
    let identity = data_dir.identity();
    if let Some((cluster_id, node_id)) = identity.ids() {
        let joined_index = read_joined(data_dir.path())?;
        return Ok(Place { cluster_id, node_id, joined_index });
    }
    let place = bootstrap::enter(&parts.options, parts.dialer.as_ref(), &parts.env, identity.disk).await?;
    if place.joined_index > 0 {
        let text = place.joined_index.to_string();
        write_durably(&data_dir.path().join(JOINED_FILE), text.as_bytes())?;
        let joining = Standing::Joining { cluster: place.cluster_id, node: place.node_id };
        data_dir.set_standing(joining).map_err(refused)?;
    }
    Ok(place)
}

/// The same end, after the ballast was given back if the disk is full: so that
/// the node can start again and be read.
fn freeing_ballast(fatal: Fatal, data_dir: Arc<DataDir>) -> Fatal {
    Fatal::new(move |reason| {
        release_if_full(&data_dir, reason);
        fatal.raise(reason);
    })
}

fn release_if_full(data_dir: &DataDir, reason: &str) {
    // RocksDB tells of ENOSPC in words only.
    if reason.contains("No space left on device") {
        match data_dir.release_ballast() {
            Ok(bytes) => tracing::warn!(bytes, "the disk is full; the ballast was given back"),
            Err(error) => tracing::warn!(%error, "the disk is full, and the ballast cannot be given back"),
        }
    }
}

fn read_joined(path: &Path) -> Result<u64, NodeError> {
    match std::fs::read_to_string(path.join(JOINED_FILE)) {
        Ok(text) => text.trim().parse().map_err(|_| internal(format!("{JOINED_FILE} holds no number"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(internal(error)),
    }
}

/// Writes a small file so that it is there, whole, after a crash.
fn write_durably(path: &Path, content: &[u8]) -> Result<(), NodeError> {
    let write = || -> std::io::Result<()> {
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, content)?;
        std::fs::File::open(&temporary)?.sync_all()?;
        std::fs::rename(&temporary, path)?;
        match path.parent() {
            Some(parent) => std::fs::File::open(parent)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|error| internal(format!("{}: {error}", path.display())))
}

async fn open(parts: &NodeParts, data_dir: &Arc<DataDir>, place: Place) -> Result<Stores, NodeError> {
    let (env, fatal, options) = (parts.env.clone(), parts.fatal.clone(), parts.options.clone());
    let (data_dir, given) = (data_dir.clone(), parts.log.clone());
    let mut stores = on_disk(&parts.env, move || {
        let hook = Arc::new(move |error: &StorageError| fatal.raise(error));
        let db = StateDb::open(&data_dir.state_path(), &options.state)?;
        let machine = Machine::open(db.clone())?;
        let published = machine.published();
        let applied = machine.applied();
        let engine: Arc<dyn LogEngine> = match given {
            Some(engine) => engine,
            None => {
                let (path, log_options) = (data_dir.raft_path(), SegmentLogOptions::default());
                Arc::new(SegmentLog::open(&path, &log_options, env, hook)?)
            }
        };
        let applied_index = (applied.index > 0).then_some(applied.index);
        let log_store = LogStore::open(engine.clone(), &LogStoreOptions::default(), applied_index)?;
        let snapshots = Arc::new(SnapshotStore::open(&data_dir.snapshots_path(), place.cluster_id)?);
        let had_state = applied.index > 0;
        Ok(Stores { engine, log_store, db, snapshots, machine, published, had_state })
    })
    .await?;
    let log = stores.log_store.get_log_state().await.map_err(internal)?;
    let vote = stores.log_store.get_log_reader().await.read_vote().await.map_err(internal)?;
    stores.had_state |= log.last_log_id.is_some() || vote.is_some();
    if vote.is_none() && stores.published.view().applied.index > 0 {
        return Err(NodeError::NotAdmitted(format!(
            "the state in {} goes up to entry {}, but its log has never been written: the raft directory was \
             lost, and with it what this member voted; restore it, or remove the member and add it again",
            parts.options.data_dir.display(),
            stores.published.view().applied.index
        )));
    }
    Ok(stores)
}

async fn on_disk<T: Send + 'static>(
    env: &EnvRef,
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, NodeError> {
    off_thread(env, work).await.map_err(internal)?.map_err(refused)
}

/// A disk that is refused is for the operator to look at; the rest is damage.
fn refused(error: StorageError) -> NodeError {
    match error {
        StorageError::Refused(reason) => NodeError::NotAdmitted(reason),
        other => internal(other),
    }
}

fn raft_options(options: &NodeOptions) -> RaftOptions {
    RaftOptions {
        heartbeat_interval: options.heartbeat_interval,
        election_timeout: options.election_timeout,
        snapshot_count: options.snapshot_count,
        log_entries_kept: options.log_retained_entries,
        ..RaftOptions::default()
    }
}

async fn assemble(
    parts: NodeParts,
    data_dir: Arc<DataDir>,
    place: Place,
    stores: Stores,
) -> Result<Inner, NodeError> {
    let NodeParts { options, env, fatal, transport, dialer, watch, inline, .. } = parts;
    let Stores { engine, log_store, db, snapshots, mut machine, published, had_state } = stores;
    let options = Arc::new(options);
    let exit = Exit::default();
    let disk = data_dir.identity().disk;
    let local = Local { cluster: place.cluster_id, node: place.node_id, disk };
    let raft_options = raft_options(&options);
    let directory = Arc::new(Directory::default());
    let timeouts = PeerTimeouts {
        append: raft_options.append_timeout,
        snapshot: SnapshotTimeouts {
            idle: raft_options.snapshot_idle_timeout,
            install: raft_options.snapshot_install_timeout,
        },
    };
    let peers = Peers::new(local, directory.clone(), transport(directory), env.clone(), timeouts);
    let hub = Hub::new(published.clone(), watch);
    let lessor = Lessor::new(env.clone());
    let ears = Arc::new(Ears { hub: hub.clone(), lessor: lessor.clone(), compacted: Notify::new() });
    machine.observe(ears.clone());
    let raft = crate::raft::start(StartParts {
        options: raft_options,
        env: env.clone(),
        fatal: fatal.clone(),
        log_store,
        machine: Box::new(machine),
        db,
        db_options: options.state.clone(),
        data_dir: data_dir.clone(),
        snapshots,
        peers: peers.clone(),
        replay: ReplayLimits::default(),
        inline,
    })
    .await
    .map_err(internal)?;
    let core = Core::new(CoreParts {
        options,
        env,
        id: place.node_id,
        cluster_id: place.cluster_id,
        disk,
        raft: raft.raft().clone(),
        published,
        carrier: Arc::new(PeerCarrier::new(peers)),
        dialer,
        exit: exit.clone(),
        fatal,
    });
    let tasks = Tasks::new(exit);
    let follow = core.clone();
    tasks.start("leadership", |stop| follow.follow_metrics(stop));
    let strict = Reads::start(&core, &tasks);
    let reads = if core.options.lease_reads { Reads::start_by_lease(&core, &tasks) } else { strict.clone() };
    let proposer = Proposer::start(&core, &tasks);
    let membership = Membership::new(core.clone(), strict.clone());
    let (forward_ends, ends) = mpsc::channel(forward::ACCEPT_QUEUE);
    let (own, accepting) = (core.clone(), proposer.clone());
    tasks.start("forward-accept", |stop| forward::accept(own, accepting, ends, stop));
    let desk = Arc::new(Desk { core: core.clone(), reads: strict, proposer, lessor, membership });
    let renewals = Renewals::start(&desk, &tasks);
    let gauges = Arc::new(StoreGauges { raft: raft.live().clone(), log: engine, data_dir: data_dir.clone() });
    let run_once = parking_lot::Mutex::new(Some(RunParts { place, ears }));
    Ok(Inner {
        core,
        desk,
        renewals,
        reads,
        hub,
        forward_ends,
        had_state,
        raft,
        gauges,
        tasks,
        run_once,
        stopped: AtomicBool::new(false),
        data_dir,
    })
}

impl Inner {
    fn start_tasks(&self, parts: RunParts) {
        let RunParts { place, ears } = parts;
        let (core, desk, tasks) = (&self.core, &self.desk, &self.tasks);
        let (hub, failing) = (self.hub.clone(), core.clone());
        tasks.start("watch-hub", |stop| async move {
            let closing = hub.clone();
            tokio::select! {
                ran = hub.run() => if let Err(error) = ran { failing.fail(error); },
                () = stop.cancelled() => closing.close(),
            }
        });
        desk.lessor.start(core, &desk.reads, &desk.proposer, tasks);
        maintenance::start(core, &desk.proposer, &self.gauges, tasks);
        sweeper::start(core, self.raft.live(), ears, tasks);
        let removed: PathBuf = self.data_dir.path().join(REMOVED_FILE);
        keeper::start(desk, tasks, place.joined_index, move || {
            if let Err(error) = write_durably(&removed, b"removed from the cluster\n") {
                tracing::warn!(%error, "the removal is not remembered; the next start finds it out again");
            }
        });
        if let Bootstrap::Initial { members, token } = &core.options.bootstrap
            && place.joined_index == 0
            && !self.had_state
        {
            let (own, members, token) = (core.clone(), members.clone(), token.clone());
            tasks.start("bootstrap", |stop| bootstrap::form(own, members, token, stop));
        }
    }

    pub fn status(&self) -> NodeStatus {
        let (last, committed) = {
            let metrics = self.core.raft.metrics();
            let metrics = metrics.borrow_watched();
            let committed = metrics.local_committed.as_ref().map_or(0, |id: &LogId| id.index);
            (metrics.last_log_index.unwrap_or(0), committed)
        };
        let leadership = self.core.leadership();
        let roster = self.core.committed_roster();
        let votes = roster.members.get(&self.core.id).is_some_and(|view| view.is_voter);
        let first = matches!(self.core.options.bootstrap, Bootstrap::Initial { .. });
        NodeStatus {
            leader: leadership.leader,
            term: leadership.term,
            last_log_index: last,
            committed_index: committed,
            applied_index: self.core.view().applied.index,
            // Who was let in by others is none of the first voters, even before
            // it knows of the membership.
            is_learner: !votes && (roster.version() > 0 || !first),
            db_size_bytes: self.gauges.store_bytes(),
            db_live_bytes: self.gauges.live_bytes(),
            quota_bytes: self.core.options.quota_bytes,
            log_bytes: self.gauges.log_bytes(),
        }
    }

    pub async fn defragment(&self) -> Result<(), NodeError> {
        let live = self.raft.live().clone();
        off_thread(&self.core.env, move || live.db().compact()).await.map_err(internal)
    }

    pub async fn snapshot_file(&self) -> Result<Packing, NodeError> {
        self.raft.snapshot_file().await.map_err(internal)
    }

    pub async fn stop(&self, hand_over_max: Duration) {
        if self.stopped.swap(true, Ordering::AcqRel) {
            return;
        }
        let failed = !matches!(self.core.exit.reason(), Some(ExitReason::Stopped | ExitReason::Removed));
        if !failed && let Err(error) = self.desk.membership.hand_over(Instant::now() + hand_over_max).await {
            tracing::info!(%error, "leadership was not handed over; the others elect by themselves");
        }
        self.hub.close();
        self.tasks.stop().await;
        self.raft.stop().await;
    }
}
