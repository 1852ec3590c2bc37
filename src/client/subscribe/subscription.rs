//! A subscription as its owner holds it: waiting for batches, pausing, numbers,
//! and the task that calls back.
//!
//! The one who fills the queue and the one who empties it share a lock that is
//! held for moving events only, and wake each other.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{AbortHandle, Either, abortable, select};
use futures_util::{FutureExt, Stream, stream};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::queue::{Made, Queue, Unit};
use super::{Batch, SubscribeOptions};
use crate::client::ClientError;
use crate::telemetry;
use crate::types::Revision;

/// What a subscription has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubscriptionStats {
    /// Events handed out.
    pub delivered: u64,
    /// Batches handed out.
    pub batches: u64,
    /// Events that came from the server and did not match.
    pub filtered_out: u64,
    /// Events replaced by newer ones of their keys while they were queued.
    pub merged: u64,
    /// Events dropped because the queue was full.
    pub dropped: u64,
    /// How often the watch was begun again where it was.
    pub resumes: u64,
    /// Snapshots that came.
    pub snapshots: u64,
    /// Callbacks that panicked.
    pub panics: u64,
    /// Events that are queued.
    pub queued: u64,
    /// Everything up to this revision has come from the server.
    pub received_revision: Revision,
    /// The revision of the last batch handed out.
    pub delivered_revision: Revision,
    /// How long the oldest queued event has waited; zero when none is queued.
    pub lag: Duration,
    /// Whether it is paused.
    pub paused: bool,
}

/// A subscription that nobody runs yet.
pub(super) struct Begun<F> {
    /// Fills the queue in `shared` until the source ends.
    pub(super) feed: F,
    pub(super) shared: Arc<Shared>,
    pub(super) options: SubscribeOptions,
}

/// What the feeding task and the owner share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// There may be something to hand out.
    ready: Notify,
    /// There may be room.
    room: Notify,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) queue: Queue,
    pub(super) stats: SubscriptionStats,
    /// Why nothing more will come; given to the owner after what is queued.
    error: Option<ClientError>,
    ended: bool,
    /// The rate allows the next batch from then on.
    paced: Instant,
}

/// What the owner finds.
enum Found {
    Batch(Batch),
    Ended(Option<ClientError>),
    /// Nothing before this moment, or before it is woken.
    Wait(Option<Instant>),
}

impl Shared {
    pub(super) fn new(options: &SubscribeOptions) -> Shared {
        metrics::gauge!(telemetry::CLIENT_SUBSCRIPTIONS).increment(1.0);
        let state = State {
            queue: Queue::new(options.queue_events_max, options.overflow),
            stats: SubscriptionStats::default(),
            error: None,
            ended: false,
            paced: Instant::now(),
        };
        Shared { state: Mutex::new(state), ready: Notify::new(), room: Notify::new() }
    }

    /// Changes the state for the feeding task, and wakes the owner.
    pub(super) fn feed<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let made = change(&mut self.state.lock());
        self.ready.notify_one();
        made
    }

    /// Changes what is only told, not handed out.
    pub(super) fn note(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
    }

    /// Waits until something was taken out.
    pub(super) async fn room(&self) {
        self.room.notified().await;
    }

    /// Waits for the next batch: see [`Subscription::next`].
    async fn next(&self, options: &SubscribeOptions) -> Option<Result<Batch, ClientError>> {
        loop {
            let wait = match self.find(options) {
                Found::Batch(batch) => return Some(Ok(batch)),
                Found::Ended(error) => return error.map(Err),
                Found::Wait(until) => until,
            };
            let ready = self.ready.notified();
            match wait {
                None => ready.await,
                Some(until) => drop(tokio::time::timeout_at(until, ready).await),
            }
        }
    }

    /// Nothing more will come; what is queued still goes out.
    pub(super) fn end(&self, error: Option<ClientError>) {
        self.feed(|state| {
            state.error = error;
            state.ended = true;
        });
    }

    fn find(&self, options: &SubscribeOptions) -> Found {
        let now = Instant::now();
        let limit = options.batch_limit();
        let mut state = self.state.lock();
        if state.stats.paused && !state.ended {
            return Found::Wait(None);
        }
        let Some(oldest) = state.queue.oldest() else {
            return match state.ended {
                true => Found::Ended(state.error.take()),
                false => Found::Wait(None),
            };
        };
        let filled = match state.ended || state.queue.is_due(limit) {
            true => now,
            false => oldest + options.batch_wait,
        };
        let at = filled.max(state.paced);
        if at > now {
            return Found::Wait(Some(at));
        }
        let Some(batch) = state.queue.take(limit) else { return Found::Wait(None) };
        if let Some(rate) = options.events_per_second_max {
            let took = Duration::from_secs(1).mul_f64(batch.events.len() as f64 / f64::from(rate));
            state.paced = now + took;
        }
        state.handed_out(&batch);
        drop(state);
        self.room.notify_one();
        Found::Batch(batch)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        metrics::gauge!(telemetry::CLIENT_SUBSCRIPTIONS).decrement(1.0);
    }
}

impl State {
    /// Queues the changes of a revision, or gives them back: see [`Queue::offer`].
    pub(super) fn offer(&mut self, unit: Unit) -> Option<Unit> {
        let (Made { merged, dropped }, back) = self.queue.offer(unit);
        self.stats.merged += merged;
        self.stats.dropped += dropped;
        count(telemetry::CLIENT_SUBSCRIPTION_MERGED, merged);
        count(telemetry::CLIENT_SUBSCRIPTION_DROPPED, dropped);
        back
    }

    fn handed_out(&mut self, batch: &Batch) {
        let events = batch.events.len() as u64;
        self.stats.batches += 1;
        self.stats.delivered += events;
        if batch.snapshot.is_none_or(|part| part.last) {
            self.stats.delivered_revision = batch.revision;
        }
        metrics::counter!(telemetry::CLIENT_SUBSCRIPTION_DELIVERED).increment(events);
        metrics::histogram!(telemetry::CLIENT_SUBSCRIPTION_BATCH).record(events as f64);
    }
}

/// Looking a metric up costs more than a change does, and most changes add nothing to most of them.
pub(super) fn count(metric: &'static str, more: u64) {
    if more > 0 {
        metrics::counter!(metric).increment(more);
    }
}

/// Changes that match a filter. Dropping it ends the watch.
#[derive(Debug)]
pub struct Subscription {
    shared: Arc<Shared>,
    options: SubscribeOptions,
    feed: AbortHandle,
}

impl Subscription {
    pub(super) fn start(begun: Begun<impl Future<Output = ()> + Send + 'static>) -> Subscription {
        let Begun { feed, shared, options } = begun;
        let (run, feed) = abortable(feed);
        tokio::spawn(run);
        Subscription { shared, options, feed }
    }

    /// Waits for the next batch. An error is the last thing that comes before
    /// the end, which is `None`. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<Batch, ClientError>> {
        self.shared.next(&self.options).await
    }

    /// The subscription as a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<Batch, ClientError>> + Send {
        stream::unfold(self, |mut subscription| async move {
            let batch = subscription.next().await?;
            Some((batch, subscription))
        })
    }

    /// What it has done so far.
    pub fn stats(&self) -> SubscriptionStats {
        self.handle().stats()
    }

    /// A handle that pauses it, ends it and tells its numbers from elsewhere.
    pub fn handle(&self) -> SubscriptionHandle {
        SubscriptionHandle { shared: self.shared.clone(), feed: self.feed.clone() }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.feed.abort();
    }
}

/// Steers a subscription that another task reads. It does not keep it alive.
#[derive(Clone, Debug)]
pub struct SubscriptionHandle {
    shared: Arc<Shared>,
    feed: AbortHandle,
}

impl SubscriptionHandle {
    /// Hands nothing out until [`SubscriptionHandle::resume`]. Changes go on
    /// coming into the queue, and when it is full its policy holds: see
    /// [`Overflow`](super::Overflow).
    pub fn pause(&self) {
        self.shared.state.lock().stats.paused = true;
    }

    /// Hands out again, beginning with what was queued meanwhile.
    pub fn resume(&self) {
        self.shared.feed(|state| state.stats.paused = false);
    }

    /// Ends it: what is queued is still handed out, also when it is paused, and
    /// then the end.
    pub fn cancel(&self) {
        self.feed.abort();
        self.shared.end(None);
    }

    /// What it has done so far.
    pub fn stats(&self) -> SubscriptionStats {
        let state = self.shared.state.lock();
        let lag = state.queue.oldest().map(|oldest| oldest.elapsed()).unwrap_or_default();
        SubscriptionStats { queued: state.queue.len() as u64, lag, ..state.stats }
    }
}

/// A subscription whose batches a callback gets. Dropping it ends both.
#[derive(Debug)]
pub struct Delivery {
    handle: SubscriptionHandle,
    task: JoinHandle<Result<(), ClientError>>,
}

impl Delivery {
    /// One task fills the queue and empties it, so that a change wakes one; it goes on filling while
    /// the callback waits.
    pub(super) fn start<F, R>(
        begun: Begun<impl Future<Output = ()> + Send + 'static>,
        callback: F,
    ) -> Delivery
    where
        F: FnMut(Batch) -> R + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let Begun { feed, shared, options } = begun;
        let (run, feed) = abortable(feed);
        let handle = SubscriptionHandle { shared: shared.clone(), feed };
        let task = tokio::spawn(async move {
            let run = pin!(run);
            let deliver = pin!(deliver(&shared, &options, callback));
            match select(run, deliver).await {
                Either::Left((_, deliver)) => deliver.await,
                Either::Right((ended, _)) => ended,
            }
        });
        Delivery { handle, task }
    }

    /// Pauses it, ends it, and tells its numbers.
    pub fn handle(&self) -> &SubscriptionHandle {
        &self.handle
    }

    /// Waits until it has ended: after [`SubscriptionHandle::cancel`], when what
    /// was queued has been delivered, or for an error.
    ///
    /// # Errors
    /// What ended it, unless it was canceled.
    pub async fn ended(mut self) -> Result<(), ClientError> {
        // The task catches the callback's panics and is aborted only on drop.
        (&mut self.task).await.unwrap_or(Ok(()))
    }
}

async fn deliver<F, R>(
    shared: &Shared,
    options: &SubscribeOptions,
    mut callback: F,
) -> Result<(), ClientError>
where
    F: FnMut(Batch) -> R,
    R: Future<Output = ()>,
{
    while let Some(batch) = shared.next(options).await {
        let batch = batch?;
        let revision = batch.revision;
        // The call itself may panic as well as the future that it returns.
        let called = AssertUnwindSafe(async { callback(batch).await });
        if called.catch_unwind().await.is_err() {
            tracing::error!(%revision, "a subscription's callback panicked; it goes on with the next batch");
            metrics::counter!(telemetry::CLIENT_SUBSCRIPTION_PANICS).increment(1);
            shared.note(|state| state.stats.panics += 1);
        }
    }
    Ok(())
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
#[path = "subscription_tests.rs"]
mod tests;
