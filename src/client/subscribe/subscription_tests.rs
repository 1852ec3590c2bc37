//! Delivery in paused time, fed by hand.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::StreamExt;

use super::*;
use crate::client::Overflow;
use crate::client::subscribe::queue::Unit;
use crate::types::{Event, EventKind, KeyValue, LeaseId, Space};

const SECOND: Duration = Duration::from_secs(1);

fn begun(options: SubscribeOptions) -> Begun<impl Future<Output = ()> + Send + 'static> {
    let shared = Arc::new(Shared::new(&options));
    Begun { feed: std::future::pending(), shared, options }
}

fn subscription(options: SubscribeOptions) -> Subscription {
    Subscription::start(begun(options))
}

fn change(shared: &Shared, revision: i64) {
    let kv = KeyValue {
        key: Bytes::from(format!("k{}", revision % 3)),
        create_revision: Revision(revision),
        mod_revision: Revision(revision),
        version: 1,
        lease: LeaseId::NONE,
        value: Bytes::new(),
    };
    let events = vec![Event { space: Space::User, kind: EventKind::Put, kv, prev: None }];
    let unit = Unit { revision: Revision(revision), events, since: Instant::now() };
    shared.feed(|state| assert!(state.queue.offer(unit).1.is_none(), "there is room"));
}

async fn revisions(subscription: &mut Subscription) -> Vec<i64> {
    let batch = subscription.next().await.expect("no end").expect("no error");
    batch.events.iter().map(|event| event.kv.mod_revision.0).collect()
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_full_by_count_or_by_time() {
    let options = SubscribeOptions { batch_events_max: 3, batch_wait: SECOND, ..Default::default() };
    let mut subscription = subscription(options);
    let shared = subscription.shared.clone();
    let began = Instant::now();
    (2..=5).for_each(|revision| change(&shared, revision));
    assert_eq!(revisions(&mut subscription).await, [2, 3, 4]);
    assert_eq!(began.elapsed(), Duration::ZERO, "full by count");
    assert_eq!(revisions(&mut subscription).await, [5]);
    assert_eq!(began.elapsed(), SECOND, "full by time, from its first event on");
}

#[tokio::test(start_paused = true)]
async fn without_a_wait_what_is_there_goes_out() {
    let mut subscription = subscription(SubscribeOptions::default());
    let shared = subscription.shared.clone();
    let feeder = tokio::spawn(async move {
        tokio::time::sleep(SECOND).await;
        change(&shared, 2);
    });
    let began = Instant::now();
    assert_eq!(revisions(&mut subscription).await, [2]);
    assert_eq!(began.elapsed(), SECOND);
    feeder.await.expect("it feeds");
}

#[tokio::test(start_paused = true)]
async fn the_rate_is_kept_over_any_time() {
    let options = SubscribeOptions { events_per_second_max: Some(10), ..Default::default() };
    let mut subscription = subscription(options);
    let shared = subscription.shared.clone();
    (2..102).for_each(|revision| change(&shared, revision));
    let began = Instant::now();
    let mut seen = Vec::new();
    while seen.len() < 100 {
        let batch = revisions(&mut subscription).await;
        assert!(batch.len() <= 10, "one second's worth");
        seen.extend(batch);
        assert!(seen.len() as f64 <= 10.0 * (began.elapsed().as_secs_f64() + 1.0));
    }
    assert_eq!(seen, (2..102).collect::<Vec<_>>());
    assert_eq!(began.elapsed(), 9 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_pause_holds_back_and_a_cancel_ends_after_what_is_queued() {
    let mut subscription = subscription(SubscribeOptions::default());
    let (shared, handle) = (subscription.shared.clone(), subscription.handle());
    handle.pause();
    change(&shared, 2);
    let waited = tokio::time::timeout(SECOND, subscription.next()).await;
    assert!(waited.is_err(), "nothing while it is paused");
    let stats = handle.stats();
    assert_eq!((stats.queued, stats.lag, stats.paused), (1, SECOND, true));
    handle.resume();
    assert_eq!(revisions(&mut subscription).await, [2]);
    handle.pause();
    change(&shared, 3);
    handle.cancel();
    assert_eq!(revisions(&mut subscription).await, [3]);
    assert!(subscription.next().await.is_none() && subscription.next().await.is_none());
    let stats = subscription.stats();
    assert_eq!((stats.delivered, stats.batches, stats.delivered_revision), (2, 2, Revision(3)));
}

#[tokio::test(start_paused = true)]
async fn an_error_comes_after_what_is_queued_and_is_the_last() {
    let subscription = subscription(SubscribeOptions::default());
    change(&subscription.shared, 2);
    subscription.shared.end(Some(ClientError::WatchCanceled { reason: "no".into() }));
    let all: Vec<_> = subscription.into_stream().collect().await;
    assert!(matches!(&all[..], [Ok(_), Err(ClientError::WatchCanceled { .. })]), "{all:?}");
}

#[tokio::test(start_paused = true)]
async fn a_callback_that_panics_is_called_again() {
    let options = SubscribeOptions { batch_events_max: 1, ..Default::default() };
    let begun = begun(options);
    let (shared, calls) = (begun.shared.clone(), Arc::new(AtomicU64::new(0)));
    let counted = calls.clone();
    let delivery = Delivery::start(begun, move |batch| {
        counted.fetch_add(1, Ordering::Relaxed);
        assert_ne!(batch.revision, Revision(2), "a panic of the call itself");
        async move { assert_ne!(batch.revision, Revision(3), "a panic of its future") }
    });
    (2..=4).for_each(|revision| change(&shared, revision));
    let handle = delivery.handle().clone();
    while calls.load(Ordering::Relaxed) < 3 {
        tokio::task::yield_now().await;
    }
    handle.cancel();
    assert!(delivery.ended().await.is_ok());
    let stats = handle.stats();
    assert_eq!((stats.panics, stats.delivered), (2, 3));
}

#[tokio::test(start_paused = true)]
async fn the_queue_goes_on_filling_while_the_callback_waits() {
    let options = SubscribeOptions::default();
    let shared = Arc::new(Shared::new(&options));
    let fed = shared.clone();
    let feed = async move {
        for revision in 2..=5 {
            change(&fed, revision);
            tokio::time::sleep(SECOND).await;
        }
    };
    let delivery = Delivery::start(Begun { feed, shared, options }, |_| tokio::time::sleep(100 * SECOND));
    tokio::time::sleep(10 * SECOND).await;
    let stats = delivery.handle().stats();
    assert_eq!((stats.delivered, stats.queued), (1, 3));
    delivery.handle().cancel();
    let began = Instant::now();
    assert!(delivery.ended().await.is_ok());
    assert_eq!(began.elapsed(), 190 * SECOND, "what was queued is delivered, and its callbacks awaited");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_gives_up_waiting_loses_nothing() {
    let options =
        SubscribeOptions { queue_events_max: 2, overflow: Overflow::DropOldest, ..Default::default() };
    let mut subscription = subscription(options);
    let shared = subscription.shared.clone();
    for revision in 2..50 {
        let impatient = tokio::time::timeout(Duration::ZERO, subscription.next());
        assert!(impatient.await.is_err());
        change(&shared, revision);
        assert_eq!(revisions(&mut subscription).await, [revision]);
    }
    assert_eq!(subscription.stats().dropped, 0);
}
