//! Subscriptions: changes that match a filter, in batches, through a bounded
//! queue with a stated policy for when it is full.
//!
//! Subscriptions of one client to the same range share one watch. One task per
//! subscription filters what comes and fills the queue; whoever calls
//! [`Subscription::next`], or the task that calls back, empties it. Invariant:
//! what a subscription hands out, it hands out in the order of revisions, each
//! once; what is missing was merged or dropped by the policy and is counted in
//! the batch where it is missing, or was compacted before it was seen, and then
//! a snapshot stands in its place.

mod feed;
mod feeds;
mod filter;
mod glob;
mod queue;
mod subscription;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(super) use feeds::Feeds;
pub use filter::{Filter, FilterError};
pub use subscription::{Delivery, Subscription, SubscriptionHandle, SubscriptionStats};

use feeds::{Source, Wanted};
use subscription::{Begun, Shared};

use super::call::Call;
use super::{Client, ClientError, GetOptions};
use crate::types::{Event, EventKind, KeyRange, Revision};
use crate::wire::mainstay_v1::RevisionAtRequest;
use crate::wire::mainstay_v1::history_client::HistoryClient;

/// Where a subscription begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// With the first change after it was opened.
    #[default]
    Now,
    /// With a snapshot of what there is, then its changes.
    Snapshot,
    /// With the changes of this revision, at least 1. If they were compacted,
    /// with a snapshot.
    Revision(Revision),
    /// With the first change stamped at this time or later. If it may have been
    /// compacted, with a snapshot. Only Mainstay knows the times of changes:
    /// with etcd, opening fails with [`ClientError::Unsupported`].
    Time(SystemTime),
}

/// What happens to a change that finds the queue full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// It waits, and the server holds back what comes after it. Nothing is lost.
    /// After five seconds the watch is closed until there is room, so that it
    /// does not hold back others on its connection; then it goes on where it
    /// was, or with a snapshot if that was compacted meanwhile.
    #[default]
    Block,
    /// A change takes the place of an older one of its key that is still queued,
    /// full or not, so that the newest state arrives however slow the reader
    /// is. Many different keys wait as with [`Overflow::Block`].
    CoalescePerKey,
    /// The oldest queued changes make room. Their number comes with the next
    /// batch. Snapshots are never dropped; what follows one waits for it.
    DropOldest,
}

/// How a subscription delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscribeOptions {
    /// Where it begins.
    pub start: Start,
    /// Tell with each event how its key was before. After a merge this is the
    /// state before the newest change, which nobody may have been told.
    pub prev_kv: bool,
    /// How many events make a batch full; 1 to 100,000. The events of one
    /// revision are never torn apart, so that the last revision may exceed it.
    pub batch_events_max: usize,
    /// How long an event waits for a batch to fill; up to one hour. Zero hands
    /// out at once what there is.
    pub batch_wait: Duration,
    /// The most events per second, at least 1; a batch then has at most those of
    /// one second.
    pub events_per_second_max: Option<u32>,
    /// How many events are queued; 1 to 10,000,000. A larger revision is let in
    /// alone.
    pub queue_events_max: usize,
    /// What happens when the queue is full.
    pub overflow: Overflow,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        SubscribeOptions {
            start: Start::Now,
            prev_kv: false,
            batch_events_max: 256,
            batch_wait: Duration::ZERO,
            events_per_second_max: None,
            queue_events_max: 4_096,
            overflow: Overflow::Block,
        }
    }
}

impl SubscribeOptions {
    /// Whether a subscription can be had with these options.
    ///
    /// # Errors
    /// [`ClientError::BadOption`] names the field and what it may be.
    pub fn check(&self) -> Result<(), ClientError> {
        let bad = |option, reason: &str| Err(ClientError::BadOption { option, reason: reason.to_owned() });
        if !(1..=100_000).contains(&self.batch_events_max) {
            return bad("batch_events_max", "give 1 to 100,000 events");
        }
        if self.batch_wait > Duration::from_secs(3600) {
            return bad("batch_wait", "give at most one hour");
        }
        if self.events_per_second_max == Some(0) {
            return bad("events_per_second_max", "give at least 1; to stop delivery, pause the subscription");
        }
        if !(1..=10_000_000).contains(&self.queue_events_max) {
            return bad("queue_events_max", "give 1 to 10,000,000 events");
        }
        match self.start {
            Start::Revision(Revision(..=0)) => {
                bad("start", "revisions count from 1; to begin with the next change, give Start::Now")
            }
            Start::Time(time) if time < UNIX_EPOCH => bad("start", "the time is before 1970"),
            _ => Ok(()),
        }
    }

    /// The most events in one batch.
    fn batch_limit(&self) -> usize {
        let rate = self.events_per_second_max.map_or(usize::MAX, |rate| rate as usize);
        self.batch_events_max.min(rate)
    }
}

/// Which part of a snapshot a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotPart {
    /// With this part everything known before is void: what is not in the
    /// snapshot does not exist.
    pub first: bool,
    /// The snapshot is complete with this part.
    pub last: bool,
}

/// What a subscription hands out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// With this batch everything up to this revision was handed out, and a
    /// later subscription may start after it. In a snapshot: the revision that
    /// it shows, reached with the last part.
    pub revision: Revision,
    /// The events, in the order of revisions; in a snapshot, the keys that
    /// there are, as if each was just set, in the order of keys.
    pub events: Vec<Event>,
    /// Whether this is a snapshot, or a part of one.
    pub snapshot: Option<SnapshotPart>,
    /// How many events were replaced by newer ones of their keys since the batch before.
    pub merged: u64,
    /// How many events were dropped since the batch before. Unless it is 0, the
    /// sequence has a gap before this batch.
    pub dropped: u64,
}

/// Puts a subscription together: see [`Client::subscribe`].
#[derive(Clone, Debug)]
#[must_use = "a subscription begins with `open` or `deliver`"]
pub struct SubscribeBuilder {
    client: Client,
    filter: Filter,
    options: SubscribeOptions,
}

impl Client {
    /// Subscribes to the changes that match a filter. It goes on over lost
    /// connections, nodes and leaders without gap or repeat.
    ///
    /// ```no_run
    /// # use mainstay::client::{Client, ClientError, Filter, Overflow, Start};
    /// # async fn example(client: Client) -> Result<(), ClientError> {
    /// let filter = Filter::prefix("svc/") & Filter::suffix("/limit")?;
    /// let builder = client.subscribe(filter).start(Start::Snapshot).queue(1_000, Overflow::CoalescePerKey);
    /// let mut subscription = builder.open().await?;
    /// while let Some(batch) = subscription.next().await {
    ///     for event in batch?.events {
    ///         println!("{:?} {:?}", event.kind, event.kv.key);
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn subscribe(&self, filter: Filter) -> SubscribeBuilder {
        SubscribeBuilder { client: self.clone(), filter, options: SubscribeOptions::default() }
    }

    /// The first revision stamped at `time` or later, and whether all of history
    /// from that time on is still there. The revision after the newest if
    /// nothing was changed since.
    ///
    /// # Errors
    /// [`ClientError::Unsupported`] by a server that is not Mainstay; others as
    /// in [`ClientError`].
    pub async fn revision_at(&self, time: SystemTime) -> Result<(Revision, bool), ClientError> {
        let since_1970 = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
        let call =
            self.calls.call(Call::read(None), RevisionAtRequest { time_ms }, |channel, request| async move {
                HistoryClient::new(channel).revision_at(request).await
            });
        match call.await {
            Ok(found) => Ok((Revision(found.revision), !found.compacted)),
            Err(ClientError::Refused { code: tonic::Code::Unimplemented, .. }) => {
                Err(ClientError::Unsupported { what: "finding the revision of a time" })
            }
            Err(error) => Err(error),
        }
    }
}

impl SubscribeBuilder {
    /// Sets all options.
    pub fn options(mut self, options: SubscribeOptions) -> SubscribeBuilder {
        self.options = options;
        self
    }

    /// Sets where it begins.
    pub fn start(mut self, start: Start) -> SubscribeBuilder {
        self.options.start = start;
        self
    }

    /// Has events tell how their key was before.
    pub fn prev_kv(mut self) -> SubscribeBuilder {
        self.options.prev_kv = true;
        self
    }

    /// Sets how many events make a batch full, and how long one waits for that.
    pub fn batches(mut self, events_max: usize, wait: Duration) -> SubscribeBuilder {
        self.options.batch_events_max = events_max;
        self.options.batch_wait = wait;
        self
    }

    /// Sets the most events per second.
    pub fn events_per_second(mut self, max: u32) -> SubscribeBuilder {
        self.options.events_per_second_max = Some(max);
        self
    }

    /// Sets how many events are queued, and what happens to more.
    pub fn queue(mut self, events_max: usize, overflow: Overflow) -> SubscribeBuilder {
        self.options.queue_events_max = events_max;
        self.options.overflow = overflow;
        self
    }

    /// Opens the subscription. Every change after the return is in it.
    ///
    /// # Errors
    /// [`ClientError::BadOption`] for options that cannot be, and for a filter
    /// that no key can match; [`ClientError::Unsupported`] for a start by time
    /// with etcd; others as in [`ClientError`].
    pub async fn open(self) -> Result<Subscription, ClientError> {
        Ok(Subscription::start(self.begin().await?))
    }

    async fn begin(self) -> Result<Begun<impl Future<Output = ()> + Send + 'static>, ClientError> {
        let SubscribeBuilder { client, filter, options } = self;
        options.check()?;
        let nothing =
            || ClientError::BadOption { option: "filter", reason: "no change can match it".to_owned() };
        let range = filter.covering_range().ok_or_else(nothing)?;
        let (puts, deletes) = (filter.wants(EventKind::Put), filter.wants(EventKind::Delete));
        if !puts && !deletes {
            return Err(nothing());
        }
        let known = known_revision(&client, &range, options.start).await?;
        let wanted = Wanted { range, prev_kv: options.prev_kv, kinds: (puts, deletes) };
        let source = Source::new(client, wanted, known, options.start == Start::Now);
        let shared = Arc::new(Shared::new(&options));
        let feed = feed::run(source, filter, shared.clone());
        Ok(Begun { feed, shared, options })
    }

    /// Opens the subscription and calls `callback` with each batch, one after
    /// the other, in a task that ends with the returned value. A callback that
    /// panics is counted and called again with the next batch.
    ///
    /// # Errors
    /// Those of [`SubscribeBuilder::open`].
    pub async fn deliver<F, R>(self, callback: F) -> Result<Delivery, ClientError>
    where
        F: FnMut(Batch) -> R + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        Ok(Delivery::start(self.begin().await?, callback))
    }
}

/// What a mirror is to take as known: 0 has it begin with a snapshot.
async fn known_revision(client: &Client, range: &KeyRange, start: Start) -> Result<Revision, ClientError> {
    // Nothing ever changed at revision 1.
    let before = |first: Revision| first.prev().max(Revision::FIRST);
    match start {
        Start::Snapshot => Ok(Revision(0)),
        Start::Revision(first) => Ok(before(first)),
        Start::Now => {
            let one = GetOptions::keys(range.clone()).keys_only().limit(1);
            Ok(client.range(one).await?.revision)
        }
        Start::Time(time) => match client.revision_at(time).await? {
            (first, true) => Ok(before(first)),
            (_, false) => Ok(Revision(0)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_refused_by_name() {
        let options = SubscribeOptions::default;
        assert!(options().check().is_ok());
        let refused = |options: SubscribeOptions| match options.check() {
            Err(ClientError::BadOption { option, .. }) => option,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(SubscribeOptions { batch_events_max: 0, ..options() }), "batch_events_max");
        let hours = Duration::from_secs(7200);
        assert_eq!(refused(SubscribeOptions { batch_wait: hours, ..options() }), "batch_wait");
        let none = SubscribeOptions { events_per_second_max: Some(0), ..options() };
        assert_eq!(refused(none), "events_per_second_max");
        assert_eq!(refused(SubscribeOptions { queue_events_max: 0, ..options() }), "queue_events_max");
        for start in [Start::Revision(Revision(0)), Start::Time(UNIX_EPOCH - Duration::from_secs(1))] {
            assert_eq!(refused(SubscribeOptions { start, ..options() }), "start");
        }
    }

    #[tokio::test]
    async fn a_filter_that_nothing_matches_is_refused() {
        let client = Client::connect(["a:1"]).expect("an address");
        for nothing in [Filter::prefix("a") & Filter::prefix("b"), Filter::puts() & !Filter::puts()] {
            let refused = client.subscribe(nothing).open().await;
            assert!(matches!(refused, Err(ClientError::BadOption { option: "filter", .. })), "{refused:?}");
        }
    }
}
