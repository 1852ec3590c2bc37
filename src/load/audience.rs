//! Watchers: how long an event takes to reach all of them, and how fast the past does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::keys::Draw;
use super::{Failure, Keys, Outcome, Plan, Store, Tally, Watch, WatchFrom, Work, drive};

/// How long the last events may take after the last write.
const DELIVERY_LIMIT: Duration = Duration::from_secs(10);
/// A value begins with when it was written: microseconds since the audience came.
const STAMP_BYTES: usize = 8;

/// Watchers of all the keys. Each takes the time of every event; dropping it ends them.
#[derive(Debug)]
pub struct Audience {
    shared: Arc<Shared>,
    keys: Keys,
    watchers: usize,
    readers: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    begun: Instant,
    delays: Arc<Tally>,
    /// Events that have reached somebody.
    delivered: AtomicU64,
    more: Notify,
}

impl Audience {
    /// `watchers` watches over the connections, each on a stream of its own, all in place on return.
    /// What they see is counted by `delays`.
    ///
    /// # Errors
    /// The first failure.
    pub async fn come<S: Store>(
        connections: &[S],
        watchers: usize,
        keys: &Keys,
        delays: &Arc<Tally>,
    ) -> Result<Audience, Failure> {
        let shared = Arc::new(Shared {
            begun: Instant::now(),
            delays: delays.clone(),
            delivered: AtomicU64::new(0),
            more: Notify::new(),
        });
        let (key, end) = keys.range();
        let from = WatchFrom { key, end, revision: 0 };
        let mut readers = JoinSet::new();
        for (number, watch) in watch_all(connections, watchers, &from).await?.into_iter().enumerate() {
            readers.spawn(read(watch, number, shared.clone()));
        }
        Ok(Audience { shared, keys: keys.clone(), watchers, readers })
    }

    /// Has `writers` clients write to the keys by the plan, and waits until everyone has seen it all.
    /// Operations are events seen by a watcher, latencies are from the write's beginning until then;
    /// an event that never came is a failure.
    pub async fn watch<S: Store>(
        &self,
        connections: &[S],
        writers: usize,
        value: &Bytes,
        plan: &Plan,
    ) -> Outcome {
        let stores = connections.iter().cycle().take(writers).enumerate();
        let writers: Vec<_> = stores
            .map(|(number, store)| Stamped {
                store: store.clone(),
                keys: self.keys.clone(),
                value: value.clone(),
                begun: self.shared.begun,
                draw: Draw::new(number as u64),
            })
            .collect();
        let before = self.shared.delivered.load(Ordering::Relaxed);
        let begun = Instant::now();
        let (written, _) = drive(writers, plan, &Arc::default()).await;
        let wanted = before + written.ops() * self.watchers as u64;
        let everyone = timeout(DELIVERY_LIMIT, self.delivered(wanted)).await;
        let mut outcome = self.shared.delays.take(begun.elapsed());
        outcome.late = written.late;
        outcome.failures.extend(written.failures);
        if everyone.is_err() {
            let missing = wanted.saturating_sub(self.shared.delivered.load(Ordering::Relaxed));
            outcome.failures.insert("events that did not come".to_owned(), missing);
        }
        outcome
    }

    async fn delivered(&self, wanted: u64) {
        loop {
            let more = self.shared.more.notified();
            if self.shared.delivered.load(Ordering::Relaxed) >= wanted || self.readers.is_empty() {
                return;
            }
            // A reader that has failed tells nobody, hence the second way to wake.
            let _ = timeout(Duration::from_millis(50), more).await;
        }
    }
}

async fn read<W: Watch>(mut watch: W, number: usize, shared: Arc<Shared>) {
    let mut events = 0;
    let failure = loop {
        let read = watch
            .next(&mut |value| {
                let stamp = value.first_chunk::<STAMP_BYTES>().map(|stamp| u64::from_le_bytes(*stamp));
                let written = Duration::from_micros(stamp.unwrap_or(0));
                shared.delays.succeeded(number, shared.begun.elapsed().saturating_sub(written));
                events += 1;
            })
            .await;
        shared.delivered.fetch_add(std::mem::take(&mut events), Ordering::Relaxed);
        shared.more.notify_one();
        if let Err(failure) = read {
            break failure;
        }
    };
    shared.delays.failed(&failure);
}

/// A client that writes down when it writes.
struct Stamped<S> {
    store: S,
    keys: Keys,
    value: Bytes,
    begun: Instant,
    draw: Draw,
}

impl<S: Store> Work for Stamped<S> {
    async fn once(&mut self) -> Result<(), Failure> {
        let mut value = BytesMut::with_capacity(self.value.len().max(STAMP_BYTES));
        value.put_u64_le(u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX));
        value.extend_from_slice(self.value.get(STAMP_BYTES..).unwrap_or_default());
        let key = self.keys.key(self.draw.below(self.keys.count()));
        self.store.put(key, value.freeze()).await
    }
}

/// Opens `count` watches, a stream each, several at a time.
///
/// # Errors
/// The first failure.
pub async fn watch_all<S: Store>(
    connections: &[S],
    count: usize,
    from: &WatchFrom,
) -> Result<Vec<S::Watch>, Failure> {
    let mut tasks = JoinSet::new();
    for (first, store) in (0..connections.len().min(count)).zip(connections) {
        let (mut store, from) = (store.clone(), from.clone());
        let own = (first..count).step_by(connections.len()).len();
        tasks.spawn(async move {
            let mut watches = Vec::with_capacity(own);
            for _ in 0..own {
                watches.push(store.watch(from.clone()).await?);
            }
            Ok(watches)
        });
    }
    let watches: Result<Vec<_>, Failure> = tasks.join_all().await.into_iter().collect();
    Ok(watches?.into_iter().flatten().collect())
}

/// Has `watchers` watches begin in the past, at `from.revision`, and each read `events` events, for no
/// longer than `limit`. Returns how long it took, and how many events came in all.
///
/// # Errors
/// The first failure.
pub async fn catch_up<S: Store>(
    connections: &[S],
    watchers: usize,
    from: &WatchFrom,
    events: u64,
    limit: Duration,
) -> Result<(Duration, u64), Failure> {
    let begun = Instant::now();
    let all = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for store in connections.iter().cycle().take(watchers) {
        let (mut store, from, all) = (store.clone(), from.clone(), all.clone());
        tasks.spawn(async move {
            let (mut watch, mut seen) = (store.watch(from).await?, 0);
            while seen < events {
                let before = seen;
                watch.next(&mut |_| seen += 1).await?;
                all.fetch_add(seen - before, Ordering::Relaxed);
            }
            Ok(())
        });
    }
    // Who is not done by then is let go of, with the tasks.
    if let Ok(done) = timeout(limit, tasks.join_all()).await {
        done.into_iter().collect::<Result<(), Failure>>()?;
    }
    Ok((begun.elapsed(), all.load(Ordering::Relaxed)))
}
