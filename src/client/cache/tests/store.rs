//! A store in memory with a history, and everything that can go wrong on the way to it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::client::cache::{Cache, CacheFeed, CacheOptions, CacheSource, Seen};
use crate::client::{ClientError, ErrorClass, MirrorUpdate, WatchBatch};
use crate::env::{Env, EnvRef};
use crate::types::{Event, EventKind, KeyRange, KeyValue, LeaseId, Revision, Space};

pub const CLUSTER: u64 = 7;

/// Time as the paused clock tells it, the time of day too.
struct Paused(tokio::time::Instant);

impl Env for Paused {
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }

    fn wall_ms(&self) -> u64 {
        1_700_000_000_000 + self.monotonic().as_millis() as u64
    }

    fn random_u64(&self) -> u64 {
        4
    }

    fn blocks_in_place(&self) -> bool {
        true
    }
}

/// The store. Its history is kept whole, for the tests to look at.
pub struct Store {
    pub env: EnvRef,
    pub inner: Mutex<Inner>,
    changed: Notify,
}

pub struct Inner {
    pub revision: i64,
    /// By key: revision, moment and state of every change.
    pub history: BTreeMap<Bytes, Vec<(i64, Duration, Option<KeyValue>)>>,
    pub compacted: i64,
    /// No read is answered.
    pub down: bool,
    /// Watches bring nothing, and say nothing.
    pub silent: bool,
    /// Watches bring nothing beyond this revision, but say how far they are: a
    /// member that is cut off from the others.
    pub cut_off_at: Option<i64>,
    /// Reads that are not linearizable are answered as of this revision.
    pub lagging_at: Option<i64>,
    pub delay: Duration,
    pub reads: u64,
    pub cluster: u64,
    /// Snapshots that were taken.
    pub snapshots: u64,
}

impl Store {
    pub fn new() -> Arc<Store> {
        let inner = Inner {
            revision: 1,
            history: BTreeMap::new(),
            compacted: 0,
            down: false,
            silent: false,
            cut_off_at: None,
            lagging_at: None,
            delay: Duration::ZERO,
            reads: 0,
            cluster: CLUSTER,
            snapshots: 0,
        };
        Arc::new(Store {
            env: Arc::new(Paused(tokio::time::Instant::now())),
            inner: Mutex::new(inner),
            changed: Notify::new(),
        })
    }

    /// Sets a key, or removes it; gives the revision.
    pub fn set(&self, key: &str, value: Option<Bytes>) -> i64 {
        let mut inner = self.inner.lock();
        let key = Bytes::copy_from_slice(key.as_bytes());
        let before = inner.state(&key, i64::MAX);
        if value.is_none() && before.is_none() {
            return inner.revision;
        }
        inner.revision += 1;
        let revision = Revision(inner.revision);
        let kv = value.map(|value| KeyValue {
            key: key.clone(),
            create_revision: before.as_ref().map_or(revision, |kv| kv.create_revision),
            mod_revision: revision,
            version: before.as_ref().map_or(1, |kv| kv.version + 1),
            lease: LeaseId(0),
            value,
        });
        let now = self.env.monotonic();
        inner.history.entry(key).or_default().push((revision.0, now, kv));
        drop(inner);
        self.changed.notify_waiters();
        revision.0
    }

    pub fn put(&self, key: &str, value: &str) -> i64 {
        self.set(key, Some(Bytes::copy_from_slice(value.as_bytes())))
    }

    /// Changes what goes wrong.
    pub fn with(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.lock());
        self.changed.notify_waiters();
    }

    pub fn reads(&self) -> u64 {
        self.inner.lock().reads
    }

    pub async fn open(self: &Arc<Store>, options: CacheOptions) -> Cache {
        Cache::over(Arc::new(self.clone()), options, None).await.expect("it opens")
    }
}

impl Inner {
    /// A key as of a revision.
    pub fn state(&self, key: &[u8], revision: i64) -> Option<KeyValue> {
        let changes = self.history.get(key)?;
        changes.iter().rev().find(|(at, ..)| *at <= revision)?.2.clone()
    }

    /// All keys of a range.
    fn all(&self, range: &KeyRange) -> Vec<KeyValue> {
        let keys = self.history.keys().filter(|key| range.contains(key));
        keys.filter_map(|key| self.state(key, i64::MAX)).collect()
    }

    /// When the state that a key had at a revision ended, if it did.
    pub fn ended(&self, key: &[u8], revision: i64) -> Option<Duration> {
        self.history.get(key)?.iter().find(|(at, ..)| *at > revision).map(|(_, when, _)| *when)
    }
}

/// The store as the cache sees it.
impl CacheSource for Arc<Store> {
    fn read(&self, key: Bytes, linearizable: bool) -> BoxFuture<'_, Result<Seen, ClientError>> {
        Box::pin(async move {
            let delay = {
                let mut inner = self.inner.lock();
                inner.reads += 1;
                inner.delay
            };
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let inner = self.inner.lock();
            if inner.down {
                return Err(down());
            }
            let at = inner.lagging_at.filter(|_| !linearizable).unwrap_or(inner.revision);
            Ok(Seen { kv: inner.state(&key, at), revision: Revision(at), cluster_id: inner.cluster })
        })
    }

    fn scan(&self, range: KeyRange) -> BoxFuture<'_, Result<(Revision, Vec<KeyValue>), ClientError>> {
        Box::pin(async move {
            let inner = self.inner.lock();
            if inner.down {
                return Err(down());
            }
            Ok((Revision(inner.revision), inner.all(&range)))
        })
    }

    fn follow(&self, range: KeyRange, known: Revision) -> Box<dyn CacheFeed> {
        Box::new(Feed { store: self.clone(), range, known: known.0, asked: AtomicU64::new(0) })
    }

    fn env(&self) -> EnvRef {
        self.env.clone()
    }
}

fn down() -> ClientError {
    ClientError::NotDone { message: "the store is down".into(), class: ErrorClass::Network }
}

struct Feed {
    store: Arc<Store>,
    range: KeyRange,
    known: i64,
    asked: AtomicU64,
}

impl Feed {
    fn update(&mut self) -> Option<MirrorUpdate> {
        let mut inner = self.store.inner.lock();
        if inner.down || inner.silent {
            return None;
        }
        let reach = inner.cut_off_at.unwrap_or(inner.revision).min(inner.revision);
        if self.known == 0 || self.known < inner.compacted {
            self.known = inner.revision;
            inner.snapshots += 1;
            let kvs = inner.all(&self.range);
            return Some(MirrorUpdate::Snapshot { revision: Revision(inner.revision), kvs });
        }
        let mut events: Vec<Event> = (inner.history.iter())
            .filter(|(key, _)| self.range.contains(key))
            .flat_map(|(key, changes)| changes.iter().map(move |change| (key, change)))
            .filter(|(_, (at, ..))| *at > self.known && *at <= reach)
            .map(|(key, (at, _, kv))| event(key, *at, kv.as_ref()))
            .collect();
        events.sort_by_key(|event| event.kv.mod_revision);
        let asked = self.asked.swap(0, Ordering::Relaxed) > 0;
        let revision = match events.last() {
            Some(last) => last.kv.mod_revision,
            None if asked => Revision(reach.max(self.known)),
            None => return None,
        };
        self.known = revision.0;
        Some(MirrorUpdate::Changes(WatchBatch { revision, events }))
    }
}

fn event(key: &Bytes, at: i64, kv: Option<&KeyValue>) -> Event {
    let gone = KeyValue {
        key: key.clone(),
        create_revision: Revision(0),
        mod_revision: Revision(at),
        version: 0,
        lease: LeaseId(0),
        value: Bytes::new(),
    };
    let kind = if kv.is_some() { EventKind::Put } else { EventKind::Delete };
    Event { space: Space::User, kind, kv: kv.cloned().unwrap_or(gone), prev: None }
}

impl CacheFeed for Feed {
    fn next(&mut self) -> BoxFuture<'_, Result<MirrorUpdate, ClientError>> {
        Box::pin(async move {
            loop {
                let store = self.store.clone();
                let changed = store.changed.notified();
                if let Some(update) = self.update() {
                    return Ok(update);
                }
                changed.await;
            }
        })
    }

    fn request_progress(&mut self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
    }
}

/// A directory that is removed with it.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new() -> Dir {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("mainstay-cache-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Dir(std::env::temp_dir().join(name))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self) -> PathBuf {
        self.0.join("cache.redb")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Waits, in paused time, until something holds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}
