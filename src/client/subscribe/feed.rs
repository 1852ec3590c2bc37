//! Feeds a subscription: from its source, through the filter, into the queue.
//!
//! While the queue has no room the source is not asked, so that the server
//! holds back. For longer than [`PATIENCE`] its watch is closed, because what
//! lies unread on one stream counts against all streams of its connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::Filter;
use super::feeds::Source;
use super::queue::Unit;
use super::subscription::{Shared, count};
use crate::client::{MirrorUpdate, WatchBatch};
use crate::telemetry;
use crate::types::{Event, EventKind, KeyValue, Revision, Space};

/// How long a full queue leaves the watch open.
const PATIENCE: Duration = Duration::from_secs(5);

/// Feeds until the source ends with an error, which goes to the owner.
pub(super) async fn run(source: Source, filter: Filter, shared: Arc<Shared>) {
    let mut feeder = Feeder { source, filter, shared: shared.clone(), resumes: 0 };
    loop {
        let update = match feeder.source.next().await {
            Ok(update) => update,
            Err(error) => {
                tracing::debug!(%error, "a subscription ends");
                return shared.end(Some(error));
            }
        };
        let known = feeder.source.known();
        // Before it is queued: who waits for room goes on after it, and it is in hand.
        feeder.source.took(&update);
        match &*update {
            MirrorUpdate::Snapshot { revision, kvs } => feeder.snapshot(*revision, kvs).await,
            MirrorUpdate::Changes(batch) => feeder.changes(batch, known).await,
        }
    }
}

struct Feeder {
    source: Source,
    filter: Filter,
    shared: Arc<Shared>,
    /// Of the source, as last counted.
    resumes: u64,
}

impl Feeder {
    async fn snapshot(&mut self, revision: Revision, kvs: &[KeyValue]) {
        let since = Instant::now();
        let set =
            |kv: &KeyValue| Event { space: Space::User, kind: EventKind::Put, kv: kv.clone(), prev: None };
        let mut events: Vec<Event> =
            kvs.iter().filter(|kv| self.filter.matches_key(&kv.key)).map(set).collect();
        tracing::debug!(%revision, keys = events.len(), "a subscription got a snapshot");
        metrics::counter!(telemetry::CLIENT_SUBSCRIPTION_SNAPSHOTS).increment(1);
        self.received(revision, kvs.len() - events.len());
        self.shared.note(|state| state.stats.snapshots += 1);
        while let Some(back) = self.shared.feed(|state| state.queue.offer_snapshot(revision, events, since)) {
            events = back;
            self.wait_for_room().await;
        }
    }

    /// Takes in what is above `known`: a shared watch may begin further back.
    async fn changes(&mut self, batch: &WatchBatch, known: Revision) {
        let since = Instant::now();
        let new = || batch.events.iter().filter(|event| event.kv.mod_revision > known);
        let events: Vec<&Event> = new().filter(|event| self.filter.matches(event)).collect();
        self.received(batch.revision, new().count() - events.len());
        let mut units = events.chunk_by(|a, b| a.kv.mod_revision == b.kv.mod_revision).map(|events| Unit {
            revision: events[0].kv.mod_revision,
            events: events.iter().copied().cloned().collect(),
            since,
        });
        let mut waiting = units.next();
        while let Some(unit) = self.shared.feed(|state| {
            while let Some(unit) = waiting.take() {
                if let Some(back) = state.offer(unit) {
                    return Some(back);
                }
                waiting = units.next();
            }
            state.queue.advance(batch.revision);
            None
        }) {
            waiting = Some(unit);
            self.wait_for_room().await;
        }
    }

    fn received(&mut self, revision: Revision, filtered_out: usize) {
        count(telemetry::CLIENT_SUBSCRIPTION_FILTERED, filtered_out as u64);
        self.shared.note(|state| {
            state.stats.filtered_out += filtered_out as u64;
            state.stats.received_revision = revision;
        });
        self.count_resumes();
    }

    fn count_resumes(&mut self) {
        let resumes = self.source.resumes();
        if resumes > self.resumes {
            count(telemetry::CLIENT_SUBSCRIPTION_RESUMES, resumes - self.resumes);
            self.resumes = resumes;
            self.shared.note(|state| state.stats.resumes = resumes);
        }
    }

    async fn wait_for_room(&mut self) {
        if timeout(PATIENCE, self.shared.room()).await.is_err() {
            tracing::debug!(after = %self.source.known(), "a subscription's queue stays full; it lets its watch go");
            self.source.leave();
            self.count_resumes();
            self.shared.room().await;
        }
    }
}
