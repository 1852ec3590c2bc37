//! A cache without its tasks: where a key's state is looked for, what counts as
//! current enough, and how new knowledge goes to every level.
//!
//! Order of every change: the scope's index with the values at hand, the disk's
//! queue, memory, and only then are the values at hand let go. So a reader finds
//! each value somewhere at every moment, and never an older one.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::RwLock;
use tokio::sync::{Notify, watch};

use super::counts::Counts;
use super::disk::Disk;
use super::file::Content;
use super::flights::Flights;
use super::memory::Memory;
use super::record::{Entry, Moment, own};
use super::scope::{Found, Known, Learned, Scope};
use super::source::CacheSource;
use super::{
    CacheError, CacheOptions, CacheState, Consistency, DiskState, Level, OnTrouble, Phase, ScopeState,
};
use crate::client::{ClientError, MirrorUpdate};
use crate::env::{EnvRef, off_thread};
use crate::types::{KeyValue, Revision};

/// Keys that are taken in before other work of the thread gets its turn.
const KEYS_AT_ONCE: usize = 256;
/// How often a read looks again because the key changed under it.
const LOOKS_MAX: usize = 4;

/// A cache without its tasks.
pub(super) struct Core {
    pub options: CacheOptions,
    pub source: Arc<dyn CacheSource>,
    pub env: EnvRef,
    /// Sorted; none begins with another.
    pub scopes: Vec<Arc<Scope>>,
    pub memory: Memory,
    pub disk: Option<Arc<Disk>>,
    pub counts: Arc<Counts>,
    pub flights: Flights,
    pub opened: Moment,
    /// The highest revision handed out or delivered: a member that is behind it is
    /// not believed.
    pub floor: AtomicI64,
    /// The last linearizable read that told the store's revision, and when it began.
    verified: RwLock<Option<(Revision, Moment)>>,
    pub online: AtomicBool,
    /// 0 while no cluster has answered.
    pub cluster: AtomicU64,
    foreign: AtomicU64,
    pub closed: AtomicBool,
    pub state: watch::Sender<CacheState>,
    /// Wakes the task that verifies.
    pub verify_now: Notify,
    /// Wakes the task that moves the content to another policy.
    pub move_over: Notify,
}

/// What the cache has of a key.
#[derive(Clone, Debug)]
pub(super) struct Local {
    pub kv: Option<KeyValue>,
    pub revision: Revision,
    pub proved: Moment,
    /// What its time to live counts from: the proof, or when it came in.
    pub since: Moment,
    pub level: Level,
    /// The scope's state, or none for a key outside the prefixes.
    pub live: Option<bool>,
}

/// Where to look on.
pub(super) enum Look {
    Hit(Local),
    /// The disk may have it: the value of this revision, or, outside the prefixes, any.
    Disk(Option<Revision>),
    Nothing,
}

impl Core {
    pub async fn open(
        source: Arc<dyn CacheSource>,
        options: CacheOptions,
        cluster: u64,
    ) -> Result<Core, ClientError> {
        options.check()?;
        let env = source.env();
        let counts = Arc::new(Counts::default());
        let (disk, mut content, disk_state) = open_disk(&options, cluster, &env).await?;
        counts.checksum_failures.store(content.damaged, Ordering::Relaxed);
        let opened = micros(env.monotonic());
        let mut prefixes = options.prefixes.clone();
        prefixes.sort();
        let scopes = prefixes.into_iter().map(|prefix| {
            let stored = content.scopes.remove(&prefix);
            let proved = stored.as_ref().map_or(Moment::MIN, |stored| {
                from_wall(stored.proved_wall_ms, env.wall_ms(), opened, opened)
            });
            Arc::new(Scope::new(prefix, stored.unwrap_or_default(), proved))
        });
        let scopes: Vec<Arc<Scope>> = scopes.collect();
        let floor = scopes.iter().map(|scope| scope.revision().0).max().unwrap_or(0);
        if cluster != 0 && content.cluster == 0 {
            disk.iter().for_each(|disk| disk.push_cluster(cluster));
        }
        let cluster = if cluster != 0 { cluster } else { content.cluster };
        let core = Core {
            memory: Memory::new(&options, &counts),
            state: watch::Sender::new(CacheState {
                scopes: Vec::new(),
                disk: disk_state,
                online: false,
                foreign_cluster: None,
            }),
            options,
            source,
            env,
            scopes,
            disk,
            counts,
            flights: Flights::default(),
            opened,
            floor: AtomicI64::new(floor),
            verified: RwLock::new(None),
            online: AtomicBool::new(false),
            cluster: AtomicU64::new(cluster),
            foreign: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            verify_now: Notify::new(),
            move_over: Notify::new(),
        };
        core.tell_state();
        Ok(core)
    }

    pub fn now(&self) -> Moment {
        micros(self.env.monotonic())
    }

    /// The watched prefix that a key lies in.
    pub fn scope_of(&self, key: &[u8]) -> Option<&Arc<Scope>> {
        let after = self.scopes.partition_point(|scope| scope.prefix[..] <= *key);
        let scope = self.scopes.get(after.checked_sub(1)?)?;
        key.starts_with(&scope.prefix).then_some(scope)
    }

    /// What memory has of a key.
    pub fn look(&self, key: &[u8], now: Moment) -> Look {
        let scope = self.scope_of(key);
        let mut unwhole = false;
        if let Some(scope) = scope {
            let known = scope.find(key);
            let local = |kv, revision, level| {
                let live = Some(scope.live.load(Ordering::Relaxed));
                Look::Hit(Local { kv, revision, proved: known.proved, since: known.proved, level, live })
            };
            match known.found {
                Found::Absent => return local(None, known.revision, Level::L1),
                Found::Here(kv) => return local(kv, known.revision, Level::L1),
                Found::At(at) => {
                    if let Some((entry, level)) = self.memory.get(key, now)
                        && let Some(kv) = &entry.kv
                        && kv.mod_revision == at
                    {
                        self.note(key, &entry);
                        return local(Some(kv.clone()), known.revision, level);
                    }
                    return Look::Disk(Some(at));
                }
                // What was read of it before it is whole counts like any other key.
                Found::Unknown => unwhole = known.revision.0 > 0,
            }
        }
        match self.memory.get(key, now) {
            Some((entry, level)) => {
                self.note(key, &entry);
                Look::Hit(self.outside(&entry, level))
            }
            None if unwhole => Look::Nothing,
            None => Look::Disk(None),
        }
    }

    fn outside(&self, entry: &Entry, level: Level) -> Local {
        let proved = self.proved(entry.as_of, entry.proved);
        let since = if proved == Moment::MIN { entry.stored } else { proved };
        Local { kv: entry.kv.clone(), revision: entry.as_of, proved, since, level, live: None }
    }

    /// When what was so at `as_of` is known to have been so still: a read of the
    /// store that found no later revision proves everything.
    pub fn proved(&self, as_of: Revision, proved: Moment) -> Moment {
        match *self.verified.read() {
            Some((revision, begun)) if revision <= as_of => proved.max(begun),
            _ => proved,
        }
    }

    /// What any level has of a key.
    pub async fn find(&self, key: &Bytes) -> Option<Local> {
        for _ in 0..LOOKS_MAX {
            let guard = self.memory.guard(key);
            let at = match self.look(key, self.now()) {
                Look::Hit(local) => return Some(local),
                Look::Nothing => return None,
                Look::Disk(at) => at,
            };
            let entry = self.read_disk(key, at.is_some()).await?;
            let entry = Entry { stored: self.now(), ..entry };
            match at {
                None => {
                    let proved = from_wall(entry.proved, self.env.wall_ms(), self.now(), self.opened);
                    // Nobody knows how long it has been there.
                    let entry = Entry { proved, stored: proved, ..entry };
                    self.memory.put_from_disk(key, entry.clone(), guard);
                    self.note(key, &entry);
                    return Some(self.outside(&entry, Level::L3));
                }
                Some(at) if entry.kv.as_ref().is_some_and(|kv| kv.mod_revision == at) => {
                    let entry = Entry { proved: Moment::MIN, ..entry };
                    self.memory.put_from_disk(key, entry.clone(), guard);
                    let known = self.scope_of(key)?.find(key);
                    if known.found == Found::At(at) {
                        self.note(key, &entry);
                        let live = Some(self.scope_of(key)?.live.load(Ordering::Relaxed));
                        let Entry { kv, .. } = entry;
                        let Known { revision, proved, .. } = known;
                        return Some(Local { kv, revision, proved, since: proved, level: Level::L3, live });
                    }
                }
                // It changed in the meantime, or the disk is behind.
                Some(_) => {}
            }
        }
        None
    }

    async fn read_disk(&self, key: &Bytes, watched: bool) -> Option<Entry> {
        let disk = self.disk.clone()?;
        let key = key.clone();
        match off_thread(&self.env, move || disk.read(&key, watched)).await {
            Ok(Ok(entry)) => entry.map(Arc::unwrap_or_clone),
            _ => {
                self.counts.checksum_failures.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// Whether what is there is current enough to be handed out.
    pub fn suffices(&self, local: &Local, consistency: Consistency, now: Moment) -> bool {
        match consistency {
            Consistency::Strong => false,
            // What was proven in another life of the process was told by another clock.
            Consistency::Bounded(bound) => {
                local.proved >= self.opened && now.saturating_sub(local.proved) <= micros(bound)
            }
            Consistency::Eventual => local.live.is_some() || !self.is_over(local, now),
        }
    }

    /// Whether the time to live of a key outside the prefixes is over.
    pub fn is_over(&self, local: &Local, now: Moment) -> bool {
        let ttl = if local.kv.is_some() { self.options.ttl } else { self.options.absent_ttl };
        now.saturating_sub(local.since) > micros(ttl)
    }

    /// Takes in what the source said of a key, read from `begun` on.
    pub async fn take_in(&self, key: &Bytes, kv: Option<&KeyValue>, as_of: Revision, proved: Moment) {
        self.floor.fetch_max(as_of.0, Ordering::AcqRel);
        let entry = Entry { kv: kv.map(own), as_of, proved, stored: self.now() };
        self.note(key, &entry);
        if let Some(scope) = self.scope_of(key) {
            if scope.learn(key, kv, as_of) == Learned::Keep {
                self.memory.put_from_source(key, entry);
            }
            return;
        }
        if entry.kv.is_none() && self.options.absent_ttl.is_zero() {
            self.memory.forget(key);
        } else {
            if let Some(disk) = &self.disk
                && disk.ready().await
            {
                let proved = to_wall(entry.proved, self.env.wall_ms(), self.now());
                disk.push_other(key, Entry { proved, ..entry.clone() });
            }
            self.memory.put_from_source(key, entry);
        }
    }

    /// Takes in what a watch brought.
    pub async fn apply(&self, scope: &Scope, update: &MirrorUpdate) {
        let Some(mut changes) = scope.plan(update) else { return };
        self.floor.fetch_max(changes.revision.0, Ordering::AcqRel);
        scope.publish(&mut changes);
        let now = self.now();
        let entry = |kv: &Option<KeyValue>| {
            let entry = Entry { kv: kv.clone(), as_of: changes.revision, proved: Moment::MIN, stored: now };
            kv.is_some().then(|| Arc::new(entry))
        };
        let entries: Vec<_> = changes.keys.iter().map(|(key, kv)| (key.clone(), entry(kv))).collect();
        let mark = (changes.revision, to_wall(scope.proved(), self.env.wall_ms(), now));
        let on_disk = self.disk.as_ref().is_some_and(|disk| disk.push_scope(&scope.prefix, &entries, mark));
        for (i, (key, entry)) in entries.into_iter().enumerate() {
            match entry.map(Arc::unwrap_or_clone) {
                // What nobody reads need not push out what somebody does.
                Some(entry) if on_disk => self.memory.refresh(&key, entry),
                Some(entry) => self.memory.put(&key, entry),
                None => self.memory.forget(&key),
            }
            if i % KEYS_AT_ONCE == KEYS_AT_ONCE - 1 {
                tokio::task::yield_now().await;
            }
        }
        scope.settle();
    }

    /// Asks the store for its revision, which proves what is here. False if it did
    /// not answer, or another did.
    pub async fn verify(&self, limit: Duration) -> bool {
        let begun = self.now();
        let key = self.scopes.first().map_or(Bytes::new(), |scope| scope.prefix.clone());
        let key = if key.is_empty() { Bytes::from_static(&[0]) } else { key };
        let seen = tokio::time::timeout(limit, self.source.read(key, true)).await;
        let online = match &seen {
            Ok(Ok(seen)) => self.is_own(seen.cluster_id),
            _ => false,
        };
        self.online.store(online, Ordering::Release);
        if let Ok(Ok(seen)) = seen
            && online
        {
            self.floor.fetch_max(seen.revision.0, Ordering::AcqRel);
            *self.verified.write() = Some((seen.revision, begun));
            for scope in &self.scopes {
                scope.verified(seen.revision, begun);
            }
        }
        self.tell_state();
        online
    }

    /// Whether an answer is of the cluster that this cache is of. The first one
    /// decides that, if nothing did before.
    pub fn is_own(&self, cluster: u64) -> bool {
        if cluster == 0 {
            return true;
        }
        let own = match self.cluster.compare_exchange(0, cluster, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                self.disk.iter().for_each(|disk| disk.push_cluster(cluster));
                cluster
            }
            Err(own) => own,
        };
        self.foreign.store(if own == cluster { 0 } else { cluster }, Ordering::Release);
        own == cluster
    }

    /// The refusal of an answer of another cluster.
    pub fn foreign(&self, actual: u64) -> CacheError {
        CacheError::ForeignCluster {
            path: self.options.dir.clone().unwrap_or_default(),
            expected: self.cluster.load(Ordering::Acquire),
            actual,
        }
    }

    fn note(&self, key: &[u8], entry: &Entry) {
        if self.memory.note(key, entry) {
            self.move_over.notify_one();
        }
    }

    /// Writes down as of when the disk's content is proven.
    pub fn mark_proofs(&self) {
        let Some(disk) = &self.disk else { return };
        for scope in &self.scopes {
            if let Some((revision, proved)) = scope.stored().filter(|(revision, _)| revision.0 > 0) {
                let mark = (revision, to_wall(proved, self.env.wall_ms(), self.now()));
                disk.push_scope(&scope.prefix, &[], mark);
            }
        }
    }

    /// Works out what the cache is doing and tells whoever waits for that.
    pub fn tell_state(&self) {
        let online = self.online.load(Ordering::Acquire);
        let now = self.now();
        let patience = 2 * micros(self.options.verify_interval) + 1_000_000;
        let phase = |scope: &Scope| {
            let was_live = scope.live.load(Ordering::Relaxed);
            match scope.waits_since() {
                _ if !online => Phase::Offline,
                _ if scope.revision().0 == 0 => Phase::CatchingUp,
                None => Phase::Live,
                Some(since) if was_live && now - since < patience => Phase::Live,
                Some(_) => Phase::CatchingUp,
            }
        };
        let scopes: Vec<ScopeState> = (self.scopes.iter())
            .map(|scope| {
                let phase = phase(scope);
                let was_live = scope.live.swap(phase == Phase::Live, Ordering::Relaxed);
                let (prefix, revision) = (scope.prefix.clone(), scope.revision());
                match (was_live, phase) {
                    (false, Phase::Live) => tracing::info!(?prefix, %revision, "the cache is up to date"),
                    (true, Phase::Offline | Phase::CatchingUp) => {
                        tracing::warn!(?prefix, %revision, ?phase, "the cache is no longer up to date");
                    }
                    _ => {}
                }
                ScopeState { prefix, phase, revision }
            })
            .collect();
        let failure = self.disk.as_ref().and_then(|disk| disk.failure());
        let foreign = self.foreign.load(Ordering::Acquire);
        self.state.send_if_modified(|state| {
            let disk = failure.map_or(state.disk.clone(), |reason| DiskState::Failed { reason });
            let foreign_cluster = (foreign != 0).then_some(foreign);
            let new = CacheState { scopes, disk, online, foreign_cluster };
            let changed = *state != new;
            *state = new;
            changed
        });
    }
}

/// Opens the durable level, as the options say what is to be done about trouble.
async fn open_disk(
    options: &CacheOptions,
    cluster: u64,
    env: &EnvRef,
) -> Result<(Option<Arc<Disk>>, Content, DiskState), CacheError> {
    let Some(dir) = options.dir.clone() else { return Ok((None, Content::default(), DiskState::Off)) };
    let (prefixes, bytes_max, path) = (options.prefixes.clone(), options.l3_bytes, dir.clone());
    let opened = off_thread(env, move || Disk::open(&path, &prefixes, cluster, bytes_max)).await;
    let opened =
        opened.unwrap_or_else(|error| Err(CacheError::Disk { path: dir.clone(), reason: error.to_string() }));
    match opened {
        Ok((disk, content)) => {
            warn_of(&dir, &content);
            Ok((Some(Arc::new(disk)), content, DiskState::Working))
        }
        Err(error) if options.on_trouble == OnTrouble::MemoryOnly => {
            tracing::warn!(%error, "the cache goes on in memory only");
            Ok((None, Content::default(), DiskState::Failed { reason: error.to_string() }))
        }
        Err(error) => Err(error),
    }
}

fn warn_of(dir: &Path, content: &Content) {
    let dir = dir.display();
    if let Some(reason) = &content.set_aside {
        tracing::warn!(%dir, %reason, "the cache's file could not be used; it was set aside and begun anew");
    }
    if content.damaged > 0 {
        tracing::warn!(%dir, records = content.damaged, "records of the cache's file are damaged and read anew");
    }
}

pub(super) fn micros(duration: Duration) -> Moment {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// A moment as milliseconds since 1970, rounded to the past.
fn to_wall(moment: Moment, wall_ms: u64, now: Moment) -> i64 {
    if moment == Moment::MIN {
        return i64::MIN;
    }
    (wall_ms as i64).saturating_sub((now.saturating_sub(moment)).max(0) / 1000 + 1)
}

/// The moment of a time since 1970 that was written down. Always before this
/// cache was opened, wherever the wall clock stands: it proves nothing here.
fn from_wall(then_ms: i64, wall_ms: u64, now: Moment, opened: Moment) -> Moment {
    if then_ms == i64::MIN {
        return Moment::MIN;
    }
    let ago_ms = (wall_ms as i64).saturating_sub(then_ms).max(0);
    now.saturating_sub(ago_ms.saturating_mul(1000)).min(opened - 1)
}
