//! The hub: takes changes from the applying thread, finds out whom they concern
//! and wakes their streams.
//!
//! [`Hub::publish`] moves changes into the ring and returns. Matching them with
//! the watchers is the work of [`Hub::run`], one task of the node.
//!
//! How a watcher turns live without a gap: before it matches a batch, the task
//! raises `matching` to the batch's last revision; then it tells each stream,
//! under the stream's lock, what concerns it. A watcher may turn live, under
//! the same lock, only if its cursor is above `matching`. So every revision
//! is either below the cursor of a live watcher, or will be matched with it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use metrics::{Counter, Gauge};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};

use super::HubOptions;
use super::cursor::{StreamShared, Watcher};
use super::history::{Chunks, History};
use super::index::Index;
use super::ring::{Entry, Ring};
use super::stream::WatchStream;
use crate::mutant::{self, Mutant};
use crate::mvcc::{Published, View};
use crate::storage::StorageError;
use crate::telemetry;
use crate::types::{KeyRange, Revision, RevisionEvents, Space};

/// Revisions matched before others may take the index: a new watcher waits for
/// no more than these.
const MATCH_BATCH_REVISIONS: usize = 16;
/// The progress interval is measured in this many ticks, so a progress message
/// comes at most an eighth of the interval late.
pub(super) const TICKS_PER_INTERVAL: u64 = 8;

/// Takes events in revision order from the applying thread and never blocks it.
pub struct Hub {
    pub(super) options: HubOptions,
    pub(super) history: Arc<dyn History>,
    pub(super) ring: Mutex<Ring>,
    registry: Mutex<Registry>,
    /// The last revision of the batch being matched, or matched last.
    matching: AtomicI64,
    /// The last revision that every watcher's stream was told of.
    matched: watch::Sender<Revision>,
    /// There may be changes to match, or a reason to stop.
    work: Notify,
    tick: AtomicU64,
    closed: AtomicBool,
    failure: Mutex<Option<StorageError>>,
    /// Turns at reading the past, first come, first served.
    pub(super) reads: Arc<Semaphore>,
    pub(super) chunks: Chunks,
    pub(super) gauges: Gauges,
}

/// Handles of the metrics.
pub(super) struct Gauges {
    pub(super) watchers: Gauge,
    pub(super) slow: Gauge,
    pub(super) streams: Gauge,
    pub(super) events_sent: Counter,
    pub(super) catch_up_reads: Counter,
    ring_bytes: Gauge,
}

/// All streams and watchers.
#[derive(Default)]
struct Registry {
    user: Index<Arc<Watcher>>,
    system: Index<Arc<Watcher>>,
    streams: BTreeMap<u64, Weak<StreamShared>>,
    /// Watchers that want progress, by the tick at which they are due.
    progress: BTreeMap<(u64, u64), Arc<Watcher>>,
    /// Numbers streams and watchers.
    next_number: u64,
}

impl Registry {
    fn index(&mut self, space: Space) -> &mut Index<Arc<Watcher>> {
        match space {
            Space::User => &mut self.user,
            Space::System => &mut self.system,
        }
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }
}

impl Hub {
    /// A hub over the published state. Nothing reaches a watcher until
    /// [`Hub::run`] runs.
    pub fn new(published: Arc<Published>, options: HubOptions) -> Arc<Hub> {
        Hub::over(published, options)
    }

    /// A hub over any past.
    pub(super) fn over(history: Arc<dyn History>, options: HubOptions) -> Arc<Hub> {
        let head = history.position(Space::User).revision;
        let (matched, _) = watch::channel(head);
        Arc::new(Hub {
            ring: Mutex::new(Ring::new(head, options.ring_bytes_max)),
            registry: Mutex::default(),
            matching: AtomicI64::new(head.0),
            matched,
            work: Notify::new(),
            tick: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            failure: Mutex::new(None),
            reads: Arc::new(Semaphore::new(options.catch_up_reads_max.max(1))),
            chunks: Chunks::default(),
            gauges: Gauges {
                watchers: metrics::gauge!(telemetry::WATCHERS),
                slow: metrics::gauge!(telemetry::WATCHERS_SLOW),
                streams: metrics::gauge!(telemetry::WATCH_STREAMS),
                events_sent: metrics::counter!(telemetry::WATCH_EVENTS),
                catch_up_reads: metrics::counter!(telemetry::WATCH_CATCH_UPS),
                ring_bytes: metrics::gauge!(telemetry::WATCH_RING_BYTES),
            },
            history,
            options,
        })
    }

    /// Takes the events of an applied chunk, after its view was published. Called
    /// by the applying thread; takes one lock that is never held for long.
    pub fn publish(&self, _view: &Arc<View>, events: Vec<Arc<RevisionEvents>>) {
        self.accept(&events);
    }

    pub(super) fn accept(&self, revisions: &[Arc<RevisionEvents>]) {
        if revisions.is_empty() {
            return;
        }
        let entries: Vec<_> =
            revisions.iter().map(|revision| Entry::new(revision.revision, &revision.events)).collect();
        let bytes = {
            let mut ring = self.ring.lock();
            entries.into_iter().for_each(|entry| ring.push(entry));
            ring.bytes()
        };
        self.gauges.ring_bytes.set(bytes as f64);
        self.work.notify_one();
    }

    /// The state was replaced by a snapshot, and its view is published: the ring
    /// is emptied, and every watcher that has not seen all of the new state's
    /// past reads it from disk. Called by the applying thread.
    pub fn reset(&self) {
        let head = self.history.position(Space::User).revision;
        self.ring.lock().reset(head);
        if mutant::is(Mutant::SnapshotInstallSilent) {
            self.matching.store(head.0, Ordering::SeqCst);
            self.matched.send_replace(head);
        }
        self.chunks.clear();
        self.gauges.ring_bytes.set(0.0);
        self.work.notify_one();
    }

    /// A stream without watchers.
    pub fn stream(self: &Arc<Self>) -> WatchStream {
        let shared = Arc::new(StreamShared::default());
        let mut registry = self.registry.lock();
        let number = registry.number();
        registry.streams.insert(number, Arc::downgrade(&shared));
        self.gauges.streams.increment(1.0);
        WatchStream::new(self.clone(), number, shared)
    }

    /// Matches changes with watchers, and keeps the time for progress messages,
    /// until [`Hub::close`]. One task of the node runs it.
    ///
    /// # Errors
    /// When a watcher's read of the past failed: the disk fails or is damaged,
    /// and the node must stop.
    pub async fn run(self: Arc<Self>) -> Result<(), StorageError> {
        let period = self.options.progress_interval / TICKS_PER_INTERVAL as u32;
        let period = period.max(std::time::Duration::from_millis(1));
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if let Some(error) = self.failure.lock().take() {
                return Err(error);
            }
            if self.is_closed() {
                return Ok(());
            }
            if self.match_batch() {
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                biased;
                () = self.work.notified() => {}
                _ = ticks.tick() => self.on_tick(),
            }
        }
    }

    /// Ends every stream and [`Hub::run`]. Streams and watchers created later
    /// end at once.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let streams: Vec<_> = self.registry.lock().streams.values().filter_map(Weak::upgrade).collect();
        streams.iter().for_each(|stream| stream.wake());
        self.work.notify_one();
    }

    /// Whether the hub was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Ends everything, and makes [`Hub::run`] return `error`.
    pub(super) fn fail(&self, error: StorageError) {
        self.failure.lock().get_or_insert(error);
        self.close();
    }

    /// Tells the streams whom the next few revisions concern. False when there is
    /// nothing to match.
    pub(super) fn match_batch(&self) -> bool {
        let matched = *self.matched.borrow();
        let (batch, head) = {
            let ring = self.ring.lock();
            (ring.slice(matched.next(), MATCH_BATCH_REVISIONS), ring.head())
        };
        let Some(batch) = batch else {
            self.skip(matched, head);
            return true;
        };
        let Some(last) = batch.last() else { return false };
        let last = last.revision;
        let registry = self.registry.lock();
        self.matching.store(last.0, Ordering::SeqCst);
        // Woken at the end, so that a connection with many streams has all of them
        // to serve when it begins.
        let mut told: Vec<&Arc<Watcher>> = Vec::new();
        for entry in &batch {
            for event in &entry.events {
                let event = event.event();
                let index = match event.space {
                    Space::User => &registry.user,
                    Space::System => &registry.system,
                };
                index.visit(&event.kv.key, |watcher| {
                    if watcher.stream.offer(self, watcher, entry.revision, event.kind) {
                        told.push(watcher);
                    }
                });
            }
        }
        told.iter().for_each(|watcher| watcher.stream.wake());
        drop(registry);
        self.matched.send_replace(last);
        true
    }

    /// The ring no longer holds what follows `matched`: every live watcher reads
    /// it from disk. Matching goes on after `head`.
    fn skip(&self, matched: Revision, head: Revision) {
        let registry = self.registry.lock();
        self.matching.store(head.0, Ordering::SeqCst);
        for stream in registry.streams.values().filter_map(Weak::upgrade) {
            stream.fall_behind(self, matched.next(), head);
        }
        drop(registry);
        self.matched.send_replace(head);
    }

    /// Marks the watchers that have heard nothing for the interval.
    pub(super) fn on_tick(&self) {
        let tick = self.tick.fetch_add(1, Ordering::SeqCst) + 1;
        let mut registry = self.registry.lock();
        while let Some(due) = registry.progress.first_entry().filter(|due| due.key().0 <= tick) {
            let watcher = due.remove();
            let heard = watcher.stream.progress_due(&watcher, tick);
            let due = heard + TICKS_PER_INTERVAL;
            watcher.due_tick.store(due, Ordering::SeqCst);
            registry.progress.insert((due, watcher.number), watcher);
        }
    }

    /// The present tick of the progress clock.
    pub(super) fn tick(&self) -> u64 {
        self.tick.load(Ordering::SeqCst)
    }

    /// The last revision that may have been matched already.
    pub(super) fn matching(&self) -> Revision {
        Revision(self.matching.load(Ordering::SeqCst))
    }

    /// The last revision that every stream was told of, and its changes.
    pub(super) fn matched(&self) -> &watch::Sender<Revision> {
        &self.matched
    }

    /// Lets `make` build a watcher of a fresh number, and puts it in the index.
    pub(super) fn register(&self, progress: bool, make: impl FnOnce(u64) -> Watcher) -> Arc<Watcher> {
        let mut registry = self.registry.lock();
        let watcher = Arc::new(make(registry.number()));
        let (space, range) = (watcher.space(), watcher.range());
        registry.index(space).insert(range, watcher.number, watcher.clone());
        if progress {
            let due = self.tick() + TICKS_PER_INTERVAL;
            watcher.due_tick.store(due, Ordering::SeqCst);
            registry.progress.insert((due, watcher.number), watcher.clone());
        }
        watcher
    }

    /// Takes watchers out of the index; they hear nothing more.
    pub(super) fn unregister<'a>(&self, watchers: impl IntoIterator<Item = &'a Arc<Watcher>>) {
        let mut registry = self.registry.lock();
        for watcher in watchers {
            let range: &KeyRange = watcher.range();
            registry.index(watcher.space()).remove(range, watcher.number);
            registry.progress.remove(&(watcher.due_tick.load(Ordering::SeqCst), watcher.number));
        }
    }

    /// Forgets a stream, whose watchers were unregistered.
    pub(super) fn forget(&self, stream: u64) {
        self.registry.lock().streams.remove(&stream);
        self.gauges.streams.decrement(1.0);
    }
}
