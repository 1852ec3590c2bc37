//! A machine with one node on it: a runtime with a clock of its own, a wall
//! clock that can jump, a disk that outlives crashes.
//!
//! Every node has its own single-threaded runtime, so that a crash is the end of
//! all its tasks at one point between two of their steps, whatever they were
//! doing, and a pause is a node that gets no turn while time goes on.

use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay::env::Env;
use mainstay::node::{AutoCompaction, Bootstrap, ExitReason, Node, NodeError, NodeOptions, NodeParts};
use mainstay::raft::Fatal;
use mainstay::storage::log::FatalHook;
use mainstay::storage::{DataDirOptions, StateOptions, StorageError};
use mainstay::watch::HubOptions;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::Instant;

use crate::chance::Chance;
use crate::disk::{Disk, Speed, Survives, TappedLog};
use crate::network::{Network, Peer};
use crate::trace::Trace;
use crate::transport::{Link, url};

/// The wall clock at the beginning of every run: 2026-01-01.
const WALL_MS: u64 = 1_767_225_600_000;

/// A node's clocks and numbers.
pub struct SimEnv {
    /// The beginning of the runtime's clock.
    start: Instant,
    /// What the node's clock showed last: for calls from outside its runtime.
    last_ms: AtomicU64,
    /// How far the monotonic clock was when this runtime began.
    before: Duration,
    wall_offset_ms: Arc<AtomicI64>,
    chance: Mutex<Chance>,
}

impl Env for SimEnv {
    fn monotonic(&self) -> Duration {
        if Handle::try_current().is_ok() {
            let now = self.start.elapsed();
            self.last_ms.fetch_max(now.as_millis() as u64, Ordering::Relaxed);
            return self.before + now;
        }
        self.before + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }

    fn wall_ms(&self) -> u64 {
        let wall = WALL_MS + self.monotonic().as_millis() as u64;
        wall.saturating_add_signed(self.wall_offset_ms.load(Ordering::Relaxed))
    }

    fn random_u64(&self) -> u64 {
        self.chance.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    fn blocks_in_place(&self) -> bool {
        true
    }
}

/// What a run is tuned to, the same for all its nodes.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    pub heartbeat_ms: u64,
    pub election_ms: u64,
    pub snapshot_count: u64,
    pub log_retained: u64,
    pub record_cache_bytes: usize,
    pub ring_bytes: usize,
    pub catch_up_bytes: usize,
    pub compact_every_ms: u64,
    pub lease_reads: bool,
}

/// How a node stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It does not run.
    Down,
    /// It has begun to start.
    Starting,
    /// It runs.
    Up,
    /// Its start was refused.
    Refused(String),
}

/// What others see of a host. Shared with the tasks that use it.
pub struct Face {
    pub standing: Standing,
    pub node: Option<Node>,
    pub handle: Option<Handle>,
    /// Grows with every start.
    pub incarnation: u64,
    pub bootstrap: Bootstrap,
    /// Its disk holds something, or it was told to start.
    pub in_use: bool,
    /// It was told that it is no member any more.
    pub removed: bool,
    pub paused_until_ms: u64,
    /// Why the node ended itself.
    pub fatal: Option<String>,
    pub disk_failed: bool,
    /// It is no fault when the cluster will not have it.
    pub may_be_refused: bool,
    pub speed: Speed,
    /// How quick the disk is when nobody slows it down.
    pub usual_speed: Speed,
    pub wall_offset_ms: Arc<AtomicI64>,
}

/// The faces of all hosts.
pub type Faces = Arc<Mutex<Vec<Face>>>;

/// All faces, for a moment.
pub fn faces(all: &Faces) -> MutexGuard<'_, Vec<Face>> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine.
pub struct Host {
    pub place: usize,
    root: PathBuf,
    disks: u64,
    pub disk: Disk,
    runtime: Option<Runtime>,
    clock: Option<Instant>,
    /// Virtual time when the runtime began, and how much of it the runtime has seen.
    began_ms: u64,
    seen_ms: u64,
    stopping: Option<tokio::sync::oneshot::Receiver<()>>,
    faces: Faces,
    network: Arc<Network>,
    trace: Arc<Trace>,
    seed: u64,
    tuning: Tuning,
    /// Entries up to here were looked at in this incarnation.
    pub looked_at: Option<u64>,
}

/// What all hosts are made with.
#[derive(Clone)]
pub struct Surroundings {
    pub root: PathBuf,
    pub faces: Faces,
    pub network: Arc<Network>,
    pub trace: Arc<Trace>,
    pub seed: u64,
    pub tuning: Tuning,
}

fn hook(faces_of: &Faces, place: usize) -> FatalHook {
    let all = faces_of.clone();
    Arc::new(move |_: &StorageError| faces(&all)[place].disk_failed = true)
}

impl Host {
    /// A machine with an empty disk.
    pub fn new(place: usize, of: &Surroundings) -> Host {
        let root = of.root.join(format!("n{}", place + 1));
        let Surroundings { faces, network, trace, seed, tuning, .. } = of.clone();
        let chance = Chance::new(seed, &format!("disk {place}"));
        Host {
            disk: Disk::new(root.join("0"), chance, hook(&faces, place)),
            place,
            root,
            disks: 0,
            runtime: None,
            clock: None,
            began_ms: 0,
            seen_ms: 0,
            stopping: None,
            faces,
            network,
            trace,
            seed,
            tuning,
            looked_at: None,
        }
    }

    /// Puts an empty disk in.
    pub fn wipe(&mut self) {
        assert!(self.runtime.is_none(), "a disk is changed while the node is down");
        let _ = std::fs::remove_dir_all(self.root.join(self.disks.to_string()));
        self.disks += 1;
        let chance = Chance::new(self.seed, &format!("disk {} {}", self.place, self.disks));
        let root = self.root.join(self.disks.to_string());
        self.disk = Disk::new(root, chance, hook(&self.faces, self.place));
        let mut faces = faces(&self.faces);
        let face = &mut faces[self.place];
        (face.in_use, face.removed, face.standing) = (false, false, Standing::Down);
    }

    fn options(&self, bootstrap: Bootstrap) -> NodeOptions {
        let tuning = self.tuning;
        NodeOptions {
            name: format!("n{}", self.place + 1),
            data_dir: self.disk.path(),
            peer_urls: vec![url(self.place)],
            client_urls: vec![format!("{}-clients", url(self.place))],
            bootstrap,
            heartbeat_interval: Duration::from_millis(tuning.heartbeat_ms),
            election_timeout: Duration::from_millis(tuning.election_ms),
            request_timeout: None,
            quota_bytes: 0,
            disk_reserve_bytes: 0,
            auto_compaction: match tuning.compact_every_ms {
                0 => AutoCompaction::Off,
                every => AutoCompaction::Periodic(Duration::from_millis(every)),
            },
            snapshot_count: tuning.snapshot_count,
            log_retained_entries: tuning.log_retained,
            lease_reads: tuning.lease_reads,
            state: StateOptions {
                block_cache_bytes: 1 << 20,
                record_cache_bytes: tuning.record_cache_bytes,
                write_buffer_bytes: 64 << 20,
            },
            ..NodeOptions::default()
        }
    }

    /// Starts the node on whatever its disk holds.
    pub fn start(&mut self, now_ms: u64) {
        assert!(self.runtime.is_none(), "it runs already");
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime needs nothing that could be missing");
        let (bootstrap, incarnation, wall_offset_ms) = {
            let mut faces = faces(&self.faces);
            let face = &mut faces[self.place];
            face.standing = Standing::Starting;
            face.in_use = true;
            face.incarnation += 1;
            face.handle = Some(runtime.handle().clone());
            (face.bootstrap.clone(), face.incarnation, face.wall_offset_ms.clone())
        };
        let start = {
            let _inside = runtime.enter();
            Instant::now()
        };
        let purpose = format!("node {} {incarnation}", self.place);
        let env = SimEnv {
            start,
            last_ms: AtomicU64::new(0),
            before: Duration::from_millis(now_ms),
            wall_offset_ms,
            chance: Mutex::new(Chance::new(self.seed, &purpose)),
        };
        let link = Link { network: self.network.clone(), from: self.place };
        let (all, place) = (self.faces.clone(), self.place);
        let parts = NodeParts {
            options: self.options(bootstrap),
            env: Arc::new(env),
            fatal: Fatal::new(move |reason| {
                faces(&all)[place].fatal.get_or_insert(reason.to_owned());
            }),
            transport: Box::new({
                let link = link.clone();
                move |_| Arc::new(link)
            }),
            dialer: Arc::new(link),
            watch: HubOptions {
                ring_bytes_max: self.tuning.ring_bytes,
                progress_interval: Duration::from_millis(1500),
                message_bytes: self.tuning.catch_up_bytes,
                fragment_bytes: 2048,
                inline_reads: true,
                ..HubOptions::default()
            },
            data_dir: DataDirOptions { ballast_bytes: 0 },
            inline: true,
            log: Some(self.disk.log().clone()),
        };
        let (all, network, handle) = (self.faces.clone(), self.network.clone(), runtime.handle().clone());
        runtime.spawn(async move {
            match Node::start(parts).await {
                Ok(node) => {
                    network.attach(place, Peer { node: node.clone(), handle });
                    node.run();
                    let mut faces = faces(&all);
                    (faces[place].standing, faces[place].node) = (Standing::Up, Some(node));
                }
                Err(error) => {
                    let removed =
                        matches!(&error, NodeError::NotAdmitted(why) if why.contains("was removed"));
                    let mut faces = faces(&all);
                    faces[place].removed |= removed;
                    faces[place].standing = Standing::Refused(error.to_string());
                }
            }
        });
        (self.clock, self.began_ms, self.seen_ms) = (Some(start), now_ms, 0);
        self.runtime = Some(runtime);
        self.looked_at = None;
    }

    /// Whether there is a process, in whatever state.
    pub fn runs(&self) -> bool {
        self.runtime.is_some()
    }

    /// Lets the node live until `now_ms`, unless it is paused.
    pub fn live(&mut self, now_ms: u64) {
        let (Some(runtime), Some(clock)) = (&self.runtime, self.clock) else { return };
        let (paused_until_ms, speed) = {
            let faces = faces(&self.faces);
            (faces[self.place].paused_until_ms, faces[self.place].speed)
        };
        {
            // The machine's disk goes on while the process is stopped.
            let _inside = runtime.enter();
            self.disk.work(now_ms, speed);
        }
        if paused_until_ms > now_ms {
            return;
        }
        let until_ms = now_ms - self.began_ms;
        let behind_ms = until_ms - self.seen_ms;
        self.seen_ms = until_ms;
        let until = clock + Duration::from_millis(until_ms);
        runtime.block_on(async move {
            if behind_ms > 50 {
                // It was stopped: its clock jumps, and everything is late at once.
                tokio::time::advance(Duration::from_millis(behind_ms)).await;
            }
            tokio::time::sleep_until(until).await;
        });
    }

    /// Ends the process as a crash does.
    pub fn crash(&mut self, survives: Survives) {
        let Some(runtime) = self.runtime.take() else { return };
        let lost = match self.disk.crash(survives) {
            Ok(lost) => lost,
            Err(error) => return self.trace.violation(format_args!("no image of a disk: {error}")),
        };
        if lost > 0 {
            self.trace.count("crashes that lost unsynced writes");
        }
        self.trace.line(format_args!("n{} crashed, {survives:?} survives, {lost} lost", self.place + 1));
        self.leave(runtime);
        self.disk.sweep();
    }

    /// Begins an orderly end; [`Host::live`] brings it about.
    pub fn stop(&mut self) {
        let (Some(runtime), None) = (&self.runtime, &self.stopping) else { return };
        let node = faces(&self.faces)[self.place].node.clone();
        let Some(node) = node else { return };
        let (tell, told) = tokio::sync::oneshot::channel();
        runtime.spawn(async move {
            node.stop().await;
            let _ = tell.send(());
        });
        self.stopping = Some(told);
    }

    /// Ends the process if it was asked to stop and has done so.
    pub fn reap(&mut self) {
        let Some(stopping) = &mut self.stopping else { return };
        if matches!(stopping.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Empty)) {
            return;
        }
        let Some(runtime) = self.runtime.take() else { return };
        self.trace.line(format_args!("n{} stopped", self.place + 1));
        self.leave(runtime);
        self.disk.reopen();
    }

    /// The disk fails under the running node, which must notice and end itself.
    pub fn fail_disk(&self) {
        let Some(runtime) = &self.runtime else { return };
        let _inside = runtime.enter();
        self.disk.fail();
    }

    /// Whether it is on its way to an orderly end.
    pub fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }

    fn leave(&mut self, runtime: Runtime) {
        let inside = runtime.enter();
        let peer = self.network.detach(self.place, self.stopping.is_none());
        let node = {
            let mut faces = faces(&self.faces);
            let face = &mut faces[self.place];
            face.standing = Standing::Down;
            face.handle = None;
            face.paused_until_ms = 0;
            (face.fatal, face.disk_failed) = (None, false);
            face.node.take()
        };
        drop((peer, node));
        drop(inside);
        drop(runtime);
        self.stopping = None;
        self.looked_at = None;
    }

    /// Why the node has ended itself, if it has.
    pub fn exit(&self) -> Option<ExitReason> {
        faces(&self.faces)[self.place].node.as_ref().and_then(|node| node.exit().reason())
    }

    /// The log as it is now.
    pub fn log(&self) -> &Arc<TappedLog> {
        self.disk.log()
    }
}
