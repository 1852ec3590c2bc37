//! The task behind a binding: takes updates in, reads the keys anew, swaps.
//!
//! Invariant: the keys held are those at `status.known`, whole; the value
//! loaded is what they made the last time they made one.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::tree::{Place, Tree};
use super::{BindError, BindStatus, Binding, Format, Task};
use crate::client::{ClientError, Mirror, MirrorUpdate};
use crate::env::EnvRef;
use crate::resilience::{Backoff, BackoffOptions};
use crate::telemetry;
use crate::types::{EventKind, KeyValue, Revision};

/// The shortest and the longest time between two questions how far the keys
/// are known. Asking interrupts whatever the source is about, making a new
/// connection for example, so the time doubles until an answer comes.
const ASK_GAP: Duration = Duration::from_millis(20);
const ASK_GAP_MAX: Duration = Duration::from_secs(10);

/// How long the cluster has to answer before a binding begins with what a cache has.
const OFFLINE_AFTER: Duration = Duration::from_secs(1);

/// What a binding hears of its keys from.
pub(super) trait Source: Send + 'static {
    /// The next update, the first of them a snapshot. Dropping the future loses
    /// nothing; after an error it may be called again.
    fn next(&mut self) -> impl Future<Output = Result<MirrorUpdate, ClientError>> + Send;

    /// Asks for an update that says how far the keys are known.
    fn request_progress(&mut self);
}

impl Source for Mirror {
    fn next(&mut self) -> impl Future<Output = Result<MirrorUpdate, ClientError>> + Send {
        Mirror::next(self)
    }

    fn request_progress(&mut self) {
        Mirror::request_progress(self);
    }
}

/// Says whether a value is acceptable.
pub(super) type Check<T> = Box<dyn Fn(&T) -> Result<(), String> + Send + Sync>;

/// How keys become a `T`.
pub(super) struct Reader<T> {
    pub place: Place,
    pub format: Format,
    pub default: Option<fn() -> T>,
    pub check: Option<Check<T>>,
    pub reads: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Reader<T> {
    /// Reads and checks. A panic in the type's own code is a refusal.
    pub(super) fn read(&self, kvs: &BTreeMap<Bytes, Bytes>) -> Result<T, BindError> {
        // Nothing that a panic could leave half done outlives it.
        catch_unwind(AssertUnwindSafe(|| self.read_unguarded(kvs))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(BindError::Panicked { reason: text.unwrap_or_default() })
        })
    }

    fn read_unguarded(&self, kvs: &BTreeMap<Bytes, Bytes>) -> Result<T, BindError> {
        let tree = Tree::build(&self.place, self.format, kvs)?;
        let value = match (tree.is_empty(), self.default) {
            (true, Some(default)) => default(),
            (true, None) => return Err(BindError::Absent { prefix: self.place.start.clone() }),
            (false, _) => tree.read()?,
        };
        match self.check.as_ref().map_or(Ok(()), |check| check(&value)) {
            Ok(()) => Ok(value),
            Err(reason) => Err(BindError::Refused { reason }),
        }
    }
}

/// What a binding and its task share.
pub(super) struct Shared<T> {
    pub loaded: ArcSwap<Loaded<T>>,
    /// Somebody wants to know how far the keys are known.
    pub ask: Notify,
}

/// A good value, and the revision at which it became one.
pub(super) struct Loaded<T> {
    pub value: Arc<T>,
    pub revision: Revision,
}

/// What a cache has of the keys, whole as of one revision.
pub(super) type LastGood = BoxFuture<'static, Option<(Revision, Vec<KeyValue>)>>;

/// Begins a binding with the first update, or with the last good keys of a cache
/// if none comes.
pub(super) async fn start<T, S>(
    mut source: S,
    last_good: Option<LastGood>,
    reader: Reader<T>,
    limit: Duration,
    env: EnvRef,
) -> Result<Binding<T>, BindError>
where
    T: DeserializeOwned + Send + Sync + 'static,
    S: Source,
{
    let first_limit = if last_good.is_some() { OFFLINE_AFTER.min(limit) } else { limit };
    let mut update = first(&mut source, &reader, first_limit).await;
    let mut is_stale = false;
    if let (Err(BindError::Read { source: reason, .. }), Some(last_good)) = (&update, last_good)
        && reason.may_retry()
    {
        update = match last_good.await {
            Some((revision, kvs)) => {
                is_stale = true;
                Ok(MirrorUpdate::Snapshot { revision, kvs })
            }
            None => first(&mut source, &reader, limit.saturating_sub(first_limit)).await,
        };
    }
    let update = update?;
    let revision = update.revision();
    let mut kvs = BTreeMap::new();
    take(&mut kvs, update);
    let value = Arc::new(reader.read(&kvs)?);
    if is_stale {
        let prefix = &reader.place.start;
        tracing::warn!(prefix, revision = revision.0, "a binding begins offline, with what the cache has");
    }
    let loaded = ArcSwap::from_pointee(Loaded { value, revision });
    let shared = Arc::new(Shared { loaded, ask: Notify::new() });
    let status =
        BindStatus { known: revision, loaded: revision, loads: 1, refusals: 0, problem: None, is_stale };
    metrics::counter!(telemetry::CLIENT_BIND_LOADS).increment(1);
    let (told, status) = watch::channel(status);
    let follower = Follower { source, reader, kvs, shared: shared.clone(), told, env };
    let task = Arc::new(Task(tokio::spawn(follower.run())));
    Ok(Binding { shared, status, judged: 1, task })
}

/// The first update, if it comes in time.
async fn first<T, S: Source>(
    source: &mut S,
    reader: &Reader<T>,
    limit: Duration,
) -> Result<MirrorUpdate, BindError> {
    let update = tokio::time::timeout(limit, source.next()).await;
    update
        .unwrap_or_else(|_| Err(ClientError::timeout(limit, false)))
        .map_err(|error| BindError::Read { prefix: reader.place.start.clone(), source: Arc::new(error) })
}

/// Applies an update; whether it changed anything.
fn take(kvs: &mut BTreeMap<Bytes, Bytes>, update: MirrorUpdate) -> bool {
    match update {
        MirrorUpdate::Snapshot { kvs: all, .. } => {
            let new: BTreeMap<Bytes, Bytes> = all.into_iter().map(|kv| (kv.key, kv.value)).collect();
            let before = std::mem::replace(kvs, new);
            before != *kvs
        }
        MirrorUpdate::Changes(batch) => {
            let changed = !batch.events.is_empty();
            for event in batch.events {
                match event.kind {
                    EventKind::Put => kvs.insert(event.kv.key, event.kv.value),
                    EventKind::Delete => kvs.remove(&event.kv.key),
                };
            }
            changed
        }
    }
}

struct Follower<T, S> {
    source: S,
    reader: Reader<T>,
    kvs: BTreeMap<Bytes, Bytes>,
    shared: Arc<Shared<T>>,
    told: watch::Sender<BindStatus>,
    env: EnvRef,
}

impl<T, S> Drop for Follower<T, S> {
    fn drop(&mut self) {
        if self.told.borrow().problem.is_some() {
            metrics::gauge!(telemetry::CLIENT_BINDINGS_BEHIND).decrement(1.0);
        }
    }
}

impl<T, S> Follower<T, S>
where
    T: DeserializeOwned + Send + Sync + 'static,
    S: Source,
{
    async fn run(mut self) {
        let mut backoff = Backoff::new(BackoffOptions::default());
        let (mut ask_gap, mut ask_at) = (ASK_GAP, Instant::now());
        loop {
            let asked = async {
                self.shared.ask.notified().await;
                tokio::time::sleep_until(ask_at).await;
            };
            let update = tokio::select! {
                biased;
                update = self.source.next() => update,
                () = asked => {
                    self.source.request_progress();
                    ask_at = Instant::now() + ask_gap;
                    ask_gap = (ask_gap * 2).min(ASK_GAP_MAX);
                    continue;
                }
            };
            match update {
                Ok(update) => {
                    (ask_gap, ask_at) = (ASK_GAP, Instant::now());
                    backoff.reset();
                    self.on_update(update);
                }
                Err(error) => {
                    let prefix = self.reader.place.start.clone();
                    let known = self.told.borrow().known;
                    self.refuse(BindError::Read { prefix, source: Arc::new(error) }, known);
                    tokio::time::sleep(backoff.next_wait(self.env.random_u64()).max(ASK_GAP)).await;
                }
            }
        }
    }

    fn on_update(&mut self, update: MirrorUpdate) {
        let was_stale = self.told.borrow().is_stale;
        self.take_in(update);
        if was_stale {
            tracing::info!(prefix = self.reader.place.start, "a binding that began offline is current again");
        }
    }

    fn take_in(&mut self, update: MirrorUpdate) {
        let revision = update.revision();
        let could_not_read = matches!(self.told.borrow().problem, Some(BindError::Read { .. }));
        let changed = take(&mut self.kvs, update);
        if !changed && !could_not_read {
            self.told.send_modify(|status| {
                status.is_stale = false;
                status.known = status.known.max(revision);
                if status.problem.is_none() {
                    status.loaded = status.known;
                }
            });
            return;
        }
        let read = self.reader.read(&self.kvs);
        match read {
            Ok(value) => self.load(value, revision),
            Err(problem) => self.refuse(problem, revision),
        }
    }

    fn load(&self, value: T, revision: Revision) {
        self.shared.loaded.store(Arc::new(Loaded { value: Arc::new(value), revision }));
        metrics::counter!(telemetry::CLIENT_BIND_LOADS).increment(1);
        let mut was_bad = false;
        self.told.send_modify(|status| {
            was_bad = status.problem.take().is_some();
            status.is_stale = false;
            status.known = revision;
            status.loaded = revision;
            status.loads += 1;
        });
        if was_bad {
            metrics::gauge!(telemetry::CLIENT_BINDINGS_BEHIND).decrement(1.0);
            let prefix = &self.reader.place.start;
            tracing::info!(prefix, revision = revision.0, "a binding's keys are good again");
        }
    }

    /// Keeps what is loaded, and says why.
    fn refuse(&self, problem: BindError, revision: Revision) {
        let (prefix, kept) = (&self.reader.place.start, self.told.borrow().loaded.0);
        tracing::warn!(prefix, kept, key = problem.key(), %problem, "a binding keeps its last good value");
        metrics::counter!(telemetry::CLIENT_BIND_REFUSALS).increment(1);
        self.told.send_modify(|status| {
            if status.problem.is_none() {
                metrics::gauge!(telemetry::CLIENT_BINDINGS_BEHIND).increment(1.0);
            }
            status.is_stale = false;
            status.known = revision;
            status.refusals += 1;
            status.problem = Some(problem);
        });
    }
}
