//! The task of a subscription: from the mirror, through the filter, into the
//! queue.
//!
//! While the queue has no room the mirror is not asked, so that the server
//! holds back. For longer than [`PATIENCE`] its watch is closed, because what
//! lies unread on one stream counts against all streams of its connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::Filter;
use super::queue::{Made, Unit};
use super::subscription::Shared;
use crate::client::{Mirror, MirrorUpdate, WatchBatch};
use crate::telemetry;
use crate::types::{Event, EventKind, KeyValue, Revision, Space};

/// How long a full queue leaves the watch open.
const PATIENCE: Duration = Duration::from_secs(5);

/// Feeds until the mirror ends with an error, which goes to the owner.
pub(super) async fn run(mirror: Mirror, filter: Filter, shared: Arc<Shared>) {
    let mut feed = Feed { mirror, filter, shared: shared.clone(), resumes: 0 };
    loop {
        match feed.mirror.next().await {
            Ok(MirrorUpdate::Snapshot { revision, kvs }) => feed.snapshot(revision, kvs).await,
            Ok(MirrorUpdate::Changes(batch)) => feed.changes(batch).await,
            Err(error) => {
                tracing::debug!(%error, "a subscription ends");
                return shared.end(Some(error));
            }
        }
    }
}

struct Feed {
    mirror: Mirror,
    filter: Filter,
    shared: Arc<Shared>,
    /// Of the mirror, as last counted.
    resumes: u64,
}

impl Feed {
    async fn snapshot(&mut self, revision: Revision, kvs: Vec<KeyValue>) {
        let since = Instant::now();
        let came = kvs.len();
        let set = |kv| Event { space: Space::User, kind: EventKind::Put, kv, prev: None };
        let mut events: Vec<Event> =
            kvs.into_iter().filter(|kv| self.filter.matches_key(&kv.key)).map(set).collect();
        tracing::debug!(%revision, keys = events.len(), "a subscription got a snapshot");
        metrics::counter!(telemetry::CLIENT_SUBSCRIPTION_SNAPSHOTS).increment(1);
        self.received(revision, came - events.len());
        self.shared.feed(|state| state.stats.snapshots += 1);
        while let Some(back) = self.shared.feed(|state| state.queue.offer_snapshot(revision, events, since)) {
            events = back;
            self.wait_for_room().await;
        }
    }

    async fn changes(&mut self, batch: WatchBatch) {
        let since = Instant::now();
        let came = batch.events.len();
        let events: Vec<Event> =
            batch.events.into_iter().filter(|event| self.filter.matches(event)).collect();
        self.received(batch.revision, came - events.len());
        let mut events = events.into_iter().peekable();
        while let Some(first) = events.next() {
            let revision = first.kv.mod_revision;
            let mut unit = Unit { revision, events: vec![first], since };
            while let Some(event) = events.next_if(|event| event.kv.mod_revision == revision) {
                unit.events.push(event);
            }
            while let Some(back) = self.offer(unit) {
                unit = back;
                self.wait_for_room().await;
            }
        }
        self.shared.feed(|state| state.queue.advance(batch.revision));
    }

    fn offer(&self, unit: Unit) -> Option<Unit> {
        let (Made { merged, dropped }, back) = self.shared.feed(|state| {
            let (made, back) = state.queue.offer(unit);
            state.stats.merged += made.merged;
            state.stats.dropped += made.dropped;
            (made, back)
        });
        metrics::counter!(telemetry::CLIENT_SUBSCRIPTION_MERGED).increment(merged);
        metrics::counter!(telemetry::CLIENT_SUBSCRIPTION_DROPPED).increment(dropped);
        back
    }

    fn received(&mut self, revision: Revision, filtered_out: usize) {
        metrics::counter!(telemetry::CLIENT_SUBSCRIPTION_FILTERED).increment(filtered_out as u64);
        self.shared.feed(|state| {
            state.stats.filtered_out += filtered_out as u64;
            state.stats.received_revision = revision;
        });
        self.count_resumes();
    }

    fn count_resumes(&mut self) {
        let resumes = self.mirror.resumes();
        metrics::counter!(telemetry::CLIENT_SUBSCRIPTION_RESUMES).increment(resumes - self.resumes);
        self.resumes = resumes;
        self.shared.feed(|state| state.stats.resumes = resumes);
    }

    async fn wait_for_room(&mut self) {
        if timeout(PATIENCE, self.shared.room()).await.is_err() {
            tracing::debug!(revision = %self.mirror.revision(), "a subscription's queue stays full; its watch is closed");
            self.mirror.suspend();
            self.count_resumes();
            self.shared.room().await;
        }
    }
}
