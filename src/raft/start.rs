//! Puts the parts of Raft together, watches over them, and takes them apart.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use openraft::storage::RaftLogStorage;
use parking_lot::Mutex;
use tokio::sync::mpsc::WeakSender;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Raft;
use super::applier::{Applier, ApplierParts, Apply, Job, ReplayLimits};
use super::config::{OptionsError, RaftOptions};
use super::fatal::Fatal;
use super::peers::Peers;
use super::receiver::Receiver;
use super::replication::NetworkFactory;
use super::state_machine::{LiveState, StateMachine, StateMachineParts};
use super::types::TypeConfig;
use crate::env::{EnvRef, off_thread};
use crate::storage::archive::Packing;
use crate::storage::snapshot::SnapshotStore;
use crate::storage::{DataDir, StateDb, StateOptions, StorageError};

/// How often the core of Raft is asked whether it lives.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// What Raft is put together from.
pub struct StartParts<L> {
    /// What the operator set.
    pub options: RaftOptions,
    /// The clock and the random source.
    pub env: EnvRef,
    /// How the node ends when it cannot go on.
    pub fatal: Fatal,
    /// The log.
    pub log_store: L,
    /// What applies entries, over `db`.
    pub machine: Box<dyn Apply>,
    /// The live state, opened from `data_dir`'s state path.
    pub db: StateDb,
    /// How a state that a snapshot brings is opened.
    pub db_options: StateOptions,
    /// The data directory.
    pub data_dir: Arc<DataDir>,
    /// The snapshots.
    pub snapshots: Arc<SnapshotStore>,
    /// The other members.
    pub peers: Arc<Peers>,
    /// How much may have to be applied again after a crash.
    pub replay: ReplayLimits,
    /// Apply inside openraft's task and not on a thread: for simulations.
    pub inline: bool,
}

/// Why Raft did not start. The node must not go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The options do not fit each other.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The state cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// No thread could be made.
    #[error("the thread that applies could not be started: {0}")]
    Thread(#[from] io::Error),
    /// openraft found what it stored contradictory.
    #[error("raft could not start: {0}")]
    Raft(Box<openraft::errors::Fatal<TypeConfig>>),
}

/// Raft of one node. It stands still until [`RaftHandle::run`].
pub struct RaftHandle {
    raft: Raft,
    receiver: Arc<Receiver>,
    peers: Arc<Peers>,
    live: LiveState,
    snapshots: Arc<SnapshotStore>,
    fatal: Fatal,
    ticker: Option<WeakSender<Job>>,
    apply_thread: Mutex<Option<thread::JoinHandle<()>>>,
    watch: Mutex<Option<JoinHandle<()>>>,
    stopping: CancellationToken,
}

/// Recovers the node's Raft state and puts everything together. What was
/// committed and is not in the state is applied before this returns.
///
/// # Errors
/// [`StartError`].
pub async fn start<L>(parts: StartParts<L>) -> Result<RaftHandle, StartError>
where
    L: RaftLogStorage<TypeConfig>,
{
    let StartParts { options, env, fatal, machine, db, snapshots, peers, .. } = parts;
    let local = peers.local();
    let config = Arc::new(options.openraft(local.cluster)?);
    let applier_parts =
        ApplierParts { machine, db: db.clone(), env, fatal: fatal.clone(), limits: parts.replay };
    let (applier, apply_thread) = match parts.inline {
        true => (Applier::inline(applier_parts), None),
        false => {
            let (applier, thread) = Applier::thread(applier_parts)?;
            (applier, Some(thread))
        }
    };
    let ticker = applier.ticker();
    let state_machine = StateMachine::new(StateMachineParts {
        applier,
        db,
        db_dir: parts.data_dir.state_path(),
        db_options: parts.db_options,
        snapshots: snapshots.clone(),
        home: parts.data_dir,
        fatal: fatal.clone(),
    })?;
    let live = state_machine.live();
    let network = NetworkFactory { peers: peers.clone() };
    let raft = Raft::build(local.node, config, network, parts.log_store, state_machine).await;
    let raft = raft.map_err(|error| StartError::Raft(Box::new(error)))?;
    let receiver = Arc::new(Receiver::new(raft.clone(), snapshots.clone(), peers.clone()));
    Ok(RaftHandle {
        raft,
        receiver,
        peers,
        live,
        snapshots,
        fatal,
        ticker,
        apply_thread: Mutex::new(apply_thread),
        watch: Mutex::default(),
        stopping: CancellationToken::new(),
    })
}

impl RaftHandle {
    /// Takes part: from here on this node may vote, follow and lead. To be
    /// called once its peers can reach it.
    pub fn run(&self) {
        self.raft.run();
        let watch = watch(self.raft.clone(), self.fatal.clone(), self.ticker.clone(), self.stopping.clone());
        *self.watch.lock() = Some(tokio::spawn(watch));
    }

    /// openraft itself, for `node/`.
    pub fn raft(&self) -> &Raft {
        &self.raft
    }

    /// Where calls of peers end.
    pub fn receiver(&self) -> &Arc<Receiver> {
        &self.receiver
    }

    /// The other members.
    pub fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// The live state database.
    pub fn live(&self) -> &LiveState {
        &self.live
    }

    /// The state of this moment as one file, to be read piece by piece. It keeps its tables on the disk
    /// for as long as it lives.
    ///
    /// # Errors
    /// [`StorageError`] when the disk fails or is full.
    pub async fn snapshot_file(&self) -> Result<Packing, StorageError> {
        let (snapshots, db) = (self.snapshots.clone(), self.live.db());
        let env = self.peers.env().clone();
        let work = move || snapshots.build_transient(&db, &env).map(|snapshot| Packing::new(&snapshot));
        match off_thread(self.peers.env(), work).await {
            Ok(done) => done,
            Err(error) => Err(StorageError::Refused(format!("the disk's thread ended: {error}"))),
        }
    }

    /// Stops taking part and flushes the state, so that the next start has
    /// nothing to apply again. Leadership is to be handed over before.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.receiver.stopping().cancel();
        let watch = self.watch.lock().take();
        if let Some(watch) = watch {
            let _ = watch.await;
        }
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "raft did not shut down cleanly");
        }
        self.receiver.stop().await;
        let thread = self.apply_thread.lock().take();
        let live = self.live.clone();
        let flushed = off_thread(self.peers.env(), move || match thread {
            // It flushes last thing. A panic in it has ended the node by its hook.
            Some(thread) => thread.join().map_err(|_| "the thread that applies has panicked".to_owned()),
            None => live.db().flush().map_err(|error| error.to_string()),
        });
        match flushed.await {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => tracing::warn!(reason, "the state was not flushed; the log holds the rest"),
            Err(error) => tracing::warn!(%error, "the state was not flushed; the log holds the rest"),
        }
    }
}

/// Asks the core of Raft for a sign of life, because openraft's metrics still
/// say that it runs after it has panicked; and lets the applier look at its
/// clock.
async fn watch(raft: Raft, fatal: Fatal, ticker: Option<WeakSender<Job>>, stopping: CancellationToken) {
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            () = tokio::time::sleep(WATCH_INTERVAL) => {}
        }
        if let Some(jobs) = ticker.as_ref().and_then(WeakSender::upgrade) {
            // A full queue looks at the clock by itself.
            let _ = jobs.try_send(Job::Tick);
        }
        let alive = tokio::select! {
            () = stopping.cancelled() => return,
            alive = raft.with_raft_state(|_| ()) => alive,
        };
        match alive {
            Ok(()) => {}
            Err(openraft::errors::Fatal::Stopped) => return,
            Err(error) => {
                fatal.raise(format_args!("raft has ended: {error}"));
                return;
            }
        }
    }
}
