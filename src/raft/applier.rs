//! The thread that applies: takes chunks of committed entries, gives them to
//! the state machine, answers who waits, and sees that replay stays short.
//!
//! Applying is synchronous. In production it has an OS thread of its own; a
//! simulation runs it inline. Nothing here is tried twice: an error means that
//! this replica can no longer follow the others, and ends the node.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use openraft::storage::ApplyResponder;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::fatal::Fatal;
use super::types::TypeConfig;
use crate::env::EnvRef;
use crate::machine;
use crate::storage::layout::LogPosition;
use crate::storage::{StateDb, StorageError};
use crate::telemetry;
use crate::types::Reply;

/// Chunks waiting for the thread. Two keep it busy while the next is gathered;
/// beyond, the gatherer waits, and openraft behind it.
const QUEUED_CHUNKS: usize = 2;

/// What applies entries; the state machine in production.
pub trait Apply: Send + 'static {
    /// Applies consecutive entries and publishes the result; one reply each.
    ///
    /// # Errors
    /// Anything that not every replica would meet.
    fn apply(&mut self, entries: Vec<machine::Entry>) -> Result<Vec<Reply>, StorageError>;

    /// Goes on from another state, that of an installed snapshot, and publishes
    /// it.
    ///
    /// # Errors
    /// When that state cannot be read.
    fn replace(&mut self, db: StateDb) -> Result<(), StorageError>;
}

impl Apply for machine::Machine {
    fn apply(&mut self, entries: Vec<machine::Entry>) -> Result<Vec<Reply>, StorageError> {
        machine::Machine::apply(self, entries)
    }

    fn replace(&mut self, db: StateDb) -> Result<(), StorageError> {
        machine::Machine::replace(self, db)
    }
}

/// How much may have to be applied again after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayLimits {
    /// Entries.
    pub entries: u64,
    /// Bytes of entries.
    pub bytes: u64,
    /// Time since the first entry that is not flushed.
    pub age: Duration,
}

impl Default for ReplayLimits {
    fn default() -> Self {
        ReplayLimits { entries: 200_000, bytes: 64 << 20, age: Duration::from_secs(60) }
    }
}

/// Committed entries on their way to the state machine.
#[derive(Default)]
pub(super) struct Chunk {
    pub entries: Vec<machine::Entry>,
    /// Who waits for the entry with this place in `entries`, in order.
    pub responders: Vec<(usize, ApplyResponder<TypeConfig>)>,
    pub bytes: u64,
}

/// Counts what a crash would make us apply again.
#[derive(Debug)]
struct ReplayDebt {
    limits: ReplayLimits,
    entries: u64,
    bytes: u64,
    since: Option<Duration>,
}

impl ReplayDebt {
    fn add(&mut self, entries: u64, bytes: u64, now: Duration) {
        self.entries += entries;
        self.bytes += bytes;
        self.since.get_or_insert(now);
    }

    fn is_due(&self, now: Duration) -> bool {
        let aged = self.since.is_some_and(|since| now.saturating_sub(since) >= self.limits.age);
        self.entries >= self.limits.entries || self.bytes >= self.limits.bytes || aged
    }

    fn settle(&mut self) {
        (self.entries, self.bytes, self.since) = (0, 0, None);
    }
}

/// Owns the state machine.
pub(super) struct Worker {
    machine: Box<dyn Apply>,
    db: StateDb,
    env: EnvRef,
    fatal: Fatal,
    debt: ReplayDebt,
    flusher: Flusher,
}

impl Worker {
    fn apply(&mut self, chunk: Chunk) -> Result<(), ()> {
        let Chunk { entries, responders, bytes } = chunk;
        let count = entries.len();
        let last = entries.last().map(|entry| entry.position).unwrap_or_default();
        let started = self.env.monotonic();
        let replies = match self.machine.apply(entries) {
            Ok(replies) if replies.len() == count => replies,
            Ok(replies) => return self.end(last, format!("{} replies for {count} entries", replies.len())),
            Err(error) => return self.end(last, error),
        };
        let now = self.env.monotonic();
        metrics::histogram!(telemetry::APPLY_SECONDS).record(now.saturating_sub(started));
        metrics::histogram!(telemetry::APPLY_CHUNK_ENTRIES).record(count as f64);
        metrics::counter!(telemetry::APPLIED).increment(count as u64);
        let mut replies = replies.into_iter().enumerate();
        for (place, responder) in responders {
            // Both go up, so that one pass over the replies finds them all.
            let Some((_, reply)) = replies.find(|(at, _)| *at == place) else { continue };
            responder.send(reply);
        }
        self.debt.add(count as u64, bytes, now);
        self.flush_if_due(now);
        Ok(())
    }

    fn replace(&mut self, db: StateDb) -> Result<(), ()> {
        if let Err(error) = self.machine.replace(db.clone()) {
            return self.end(LogPosition::default(), error);
        }
        self.db = db;
        self.debt.settle();
        Ok(())
    }

    fn flush_if_due(&mut self, now: Duration) {
        if self.debt.is_due(now) && self.flusher.begin(&self.db, &self.fatal) {
            self.debt.settle();
        }
    }

    fn end(&self, at: LogPosition, reason: impl std::fmt::Display) -> Result<(), ()> {
        self.fatal.raise(format_args!("applying up to {at:?} failed: {reason}"));
        Err(())
    }
}

/// Flushes where it holds nobody up.
enum Flusher {
    Inline,
    /// One request fits; while it waits the next is not needed.
    Thread(Option<(SyncSender<StateDb>, JoinHandle<()>)>),
}

impl Flusher {
    fn thread(fatal: Fatal) -> std::io::Result<Flusher> {
        let (requests, queue) = sync_channel::<StateDb>(1);
        let thread = std::thread::Builder::new().name("state-flush".to_owned()).spawn(move || {
            for db in queue {
                flush(&db, &fatal);
            }
        })?;
        Ok(Flusher::Thread(Some((requests, thread))))
    }

    /// Whether a flush of everything up to now is done or will be.
    fn begin(&self, db: &StateDb, fatal: &Fatal) -> bool {
        match self {
            Flusher::Inline => {
                flush(db, fatal);
                true
            }
            Flusher::Thread(Some((requests, _))) => {
                !matches!(requests.try_send(db.clone()), Err(TrySendError::Full(_)))
            }
            Flusher::Thread(None) => true,
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        if let Flusher::Thread(thread) = self
            && let Some((requests, thread)) = thread.take()
        {
            drop(requests);
            // A panic in it has ended the node through its hook already.
            let _ = thread.join();
        }
    }
}

fn flush(db: &StateDb, fatal: &Fatal) {
    if let Err(error) = db.flush() {
        fatal.raise(format_args!("the state could not be flushed: {error}"));
    }
}

/// What the thread is asked.
pub(super) enum Job {
    Apply(Chunk, oneshot::Sender<()>),
    Replace(StateDb, oneshot::Sender<()>),
    /// Look whether a flush is due although nothing is applied.
    Tick,
}

/// The state machine, behind its thread or inline.
pub(super) enum Applier {
    /// The lock is never contended: it makes the applier shareable, as openraft asks.
    Inline(Box<Mutex<Worker>>),
    Thread(mpsc::Sender<Job>),
}

/// Something that was asked of the applier and is not done yet.
pub(super) struct Pending(Option<oneshot::Receiver<()>>);

/// The applier failed; the node is ending.
#[derive(Debug, thiserror::Error)]
#[error("the state machine has stopped")]
pub(super) struct Ended;

impl Pending {
    pub(super) async fn done(self) -> Result<(), Ended> {
        match self.0 {
            None => Ok(()),
            Some(done) => done.await.map_err(|_| Ended),
        }
    }
}

/// What an [`Applier`] is made of.
pub(super) struct ApplierParts {
    pub machine: Box<dyn Apply>,
    pub db: StateDb,
    pub env: EnvRef,
    pub fatal: Fatal,
    pub limits: ReplayLimits,
}

impl Applier {
    /// An applier that works where it is called.
    pub(super) fn inline(parts: ApplierParts) -> Applier {
        Applier::Inline(Box::new(Mutex::new(worker(parts, Flusher::Inline))))
    }

    /// An applier with a thread of its own. The thread ends, after a last
    /// flush, when the applier is dropped.
    pub(super) fn thread(parts: ApplierParts) -> std::io::Result<(Applier, JoinHandle<()>)> {
        let flusher = Flusher::thread(parts.fatal.clone())?;
        let worker = worker(parts, flusher);
        let (jobs, queue) = mpsc::channel(QUEUED_CHUNKS);
        let thread =
            std::thread::Builder::new().name("apply".to_owned()).spawn(move || run(worker, queue))?;
        Ok((Applier::Thread(jobs), thread))
    }

    pub(super) async fn apply(&mut self, chunk: Chunk) -> Result<Pending, Ended> {
        match self {
            Applier::Inline(worker) => {
                worker.get_mut().apply(chunk).map(|()| Pending(None)).map_err(|()| Ended)
            }
            Applier::Thread(jobs) => ask(jobs, |done| Job::Apply(chunk, done)).await,
        }
    }

    pub(super) async fn replace(&mut self, db: StateDb) -> Result<(), Ended> {
        match self {
            Applier::Inline(worker) => worker.get_mut().replace(db).map_err(|()| Ended),
            Applier::Thread(jobs) => ask(jobs, |done| Job::Replace(db, done)).await?.done().await,
        }
    }

    /// What to send [`Job::Tick`] with, now and then; it keeps nothing alive.
    pub(super) fn ticker(&self) -> Option<mpsc::WeakSender<Job>> {
        match self {
            Applier::Inline(_) => None,
            Applier::Thread(jobs) => Some(jobs.downgrade()),
        }
    }

    pub(super) fn is_inline(&self) -> bool {
        matches!(self, Applier::Inline(_))
    }
}

async fn ask(
    jobs: &mpsc::Sender<Job>,
    job: impl FnOnce(oneshot::Sender<()>) -> Job,
) -> Result<Pending, Ended> {
    let (done, pending) = oneshot::channel();
    jobs.send(job(done)).await.map_err(|_| Ended)?;
    Ok(Pending(Some(pending)))
}

fn worker(parts: ApplierParts, flusher: Flusher) -> Worker {
    let ApplierParts { machine, db, env, fatal, limits } = parts;
    let debt = ReplayDebt { limits, entries: 0, bytes: 0, since: None };
    Worker { machine, db, env, fatal, debt, flusher }
}

fn run(mut worker: Worker, mut queue: mpsc::Receiver<Job>) {
    while let Some(job) = queue.blocking_recv() {
        // Dropping `done` unanswered is how a failure is told.
        let (result, done) = match job {
            Job::Apply(chunk, done) => (worker.apply(chunk), done),
            Job::Replace(db, done) => (worker.replace(db), done),
            Job::Tick => {
                worker.flush_if_due(worker.env.monotonic());
                continue;
            }
        };
        if result.is_err() {
            return;
        }
        let _ = done.send(());
    }
    flush(&worker.db, &worker.fatal);
}
