//! What each consistency promises, one situation at a time.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::store::{Store, eventually};
use crate::client::ClientError;
use crate::client::cache::{
    Answer, Cache, CacheError, CacheOptions, CachePolicy, Consistency, Level, Phase, Unproven,
};
use crate::types::Revision;

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

fn watched() -> CacheOptions {
    CacheOptions { prefixes: vec!["a/".into()], verify_interval: 10 * SECOND, ..CacheOptions::default() }
}

fn plain() -> CacheOptions {
    CacheOptions { verify_interval: 1000 * SECOND, ..CacheOptions::default() }
}

fn value(answer: &Answer) -> Option<&str> {
    answer.kv.as_ref().map(|kv| std::str::from_utf8(&kv.value).unwrap())
}

async fn live(cache: &Cache) {
    cache.wait_for(|state| state.is_live()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn strong_reads_always_ask() {
    let store = Store::new();
    store.put("a/x", "1");
    let cache = store.open(watched()).await;
    live(&cache).await;
    let before = store.reads();
    for _ in 0..3 {
        assert_eq!(cache.get("a/x", Consistency::Strong).await.unwrap().level, Level::Server);
    }
    assert_eq!(store.reads(), before + 3);
    store.with(|store| store.down = true);
    assert!(cache.get("a/x", Consistency::Strong).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_watched_prefix_answers_from_memory_absence_too() {
    let store = Store::new();
    store.put("a/x", "1");
    let cache = store.open(watched()).await;
    live(&cache).await;
    let before = store.reads();
    let answer = cache.get("a/x", Consistency::Eventual).await.unwrap();
    assert_eq!((value(&answer), answer.level, answer.stale), (Some("1"), Level::L1, false));
    let answer = cache.get("a/nothing", Consistency::Eventual).await.unwrap();
    assert_eq!((value(&answer), answer.level, answer.revision), (None, Level::L1, Revision(2)));
    store.put("a/x", "2");
    store.set("a/nothing", Some("now".into()));
    tokio::time::sleep(MS).await;
    assert_eq!(value(&cache.get("a/x", Consistency::Eventual).await.unwrap()), Some("2"));
    assert_eq!(value(&cache.get("a/nothing", Consistency::Eventual).await.unwrap()), Some("now"));
    assert_eq!(store.reads(), before, "nobody was asked");
}

#[tokio::test(start_paused = true)]
async fn a_bounded_answer_is_proven_by_a_read_that_the_watch_has_reached() {
    let store = Store::new();
    store.put("a/x", "1");
    let cache = store.open(watched()).await;
    live(&cache).await;
    let bounded = Consistency::Bounded(SECOND);
    assert_eq!(cache.get("a/x", bounded).await.unwrap().level, Level::L1);
    // The watch goes quiet at a member that is cut off: it still says how far it is.
    store.with(|store| store.cut_off_at = Some(store.revision));
    store.put("a/x", "2");
    tokio::time::sleep(2 * SECOND).await;
    for _ in 0..5 {
        let answer = cache.get("a/x", bounded).await.unwrap();
        assert_eq!((value(&answer), answer.level), (Some("2"), Level::Server));
        tokio::time::sleep(100 * MS).await;
    }
    // Nor does an eventual read fall back behind what was handed out.
    assert_eq!(value(&cache.get("a/x", Consistency::Eventual).await.unwrap()), Some("2"));
    store.with(|store| store.cut_off_at = None);
    tokio::time::sleep(SECOND).await;
    cache.get("a/x", bounded).await.unwrap();
    tokio::time::sleep(200 * MS).await;
    let answer = cache.get("a/x", bounded).await.unwrap();
    assert_eq!((value(&answer), answer.level), (Some("2"), Level::L1));
    assert!(answer.age.unwrap() <= SECOND);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_proven_is_refused_and_says_why() {
    let store = Store::new();
    store.put("a/x", "1");
    let cache = store.open(CacheOptions { unproven: Unproven::Refuse, ..watched() }).await;
    live(&cache).await;
    store.with(|store| store.silent = true);
    store.put("a/y", "1");
    tokio::time::sleep(11 * SECOND).await;
    let before = store.reads();
    let refusal = cache.get("a/x", Consistency::Bounded(SECOND)).await.unwrap_err();
    assert!(
        matches!(&refusal, ClientError::Cache(CacheError::NotProven { age: Some(age), .. }) if *age > SECOND),
        "{refusal}"
    );
    assert_eq!(store.reads(), before, "the read itself asked nobody");

    store.with(|store| store.down = true);
    let cache = store.open(watched()).await;
    let refusal = cache.get("a/x", Consistency::Bounded(SECOND)).await.unwrap_err();
    assert!(refusal.to_string().contains("the cluster does not answer: the store is down"), "{refusal}");
    assert!(refusal.may_retry());
}

#[tokio::test(start_paused = true)]
async fn a_quiet_store_proves_everything_at_once() {
    let store = Store::new();
    store.put("k", "1");
    let cache = store.open(CacheOptions { verify_interval: SECOND, ..plain() }).await;
    cache.get("k", Consistency::Eventual).await.unwrap();
    tokio::time::sleep(30 * SECOND).await;
    let answer = cache.get("k", Consistency::Bounded(2 * SECOND)).await.unwrap();
    assert_eq!(answer.level, Level::L1, "no revision since it was read");
    store.put("other", "1");
    tokio::time::sleep(3 * SECOND).await;
    let answer = cache.get("k", Consistency::Bounded(2 * SECOND)).await.unwrap();
    assert_eq!(answer.level, Level::Server, "anything may have changed");
}

#[tokio::test(start_paused = true)]
async fn other_keys_live_as_long_as_they_may_and_longer_while_the_cluster_is_away() {
    let store = Store::new();
    store.put("k", "1");
    let options = CacheOptions { ttl: 10 * SECOND, absent_ttl: 2 * SECOND, ..plain() };
    let cache = store.open(CacheOptions { verify_interval: SECOND, ..options }).await;
    let level = async |key: &str| cache.get(key, Consistency::Eventual).await.unwrap().level;
    assert_eq!((level("k").await, level("none").await), (Level::Server, Level::Server));
    store.put("other", "1");
    tokio::time::sleep(SECOND).await;
    assert_eq!((level("k").await, level("none").await), (Level::L1, Level::L1));
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!((level("k").await, level("none").await), (Level::L1, Level::Server));
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(level("k").await, Level::Server);
    store.put("other", "2");
    store.with(|store| store.down = true);
    tokio::time::sleep(60 * SECOND).await;
    let answer = cache.get("k", Consistency::Eventual).await.unwrap();
    assert!(answer.stale && answer.age.unwrap() >= 60 * SECOND, "{answer:?}");
    assert!(cache.get("never-read", Consistency::Eventual).await.is_err());
    store.with(|store| store.down = false);
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(level("k").await, Level::Server);
}

#[tokio::test(start_paused = true)]
async fn a_member_that_is_behind_is_not_believed() {
    let store = Store::new();
    let old = store.put("k", "1");
    let new = store.put("k", "2");
    let cache = store.open(CacheOptions { ttl: MS, ..plain() }).await;
    assert_eq!(value(&cache.get("k", Consistency::Strong).await.unwrap()), Some("2"));
    store.with(|store| store.lagging_at = Some(old));
    tokio::time::sleep(SECOND).await;
    let answer = cache.get("k", Consistency::Eventual).await.unwrap();
    assert_eq!((value(&answer), answer.revision), (Some("2"), Revision(new)));
}

#[tokio::test(start_paused = true)]
async fn many_who_miss_ask_once() {
    let store = Store::new();
    store.put("k", "1");
    let cache = store.open(plain()).await;
    eventually("it is online", || cache.state().online).await;
    store.with(|store| store.delay = 100 * MS);
    for consistency in [Consistency::Eventual, Consistency::Bounded(SECOND)] {
        store.put("k", "2");
        tokio::time::sleep(100 * SECOND).await;
        let before = store.reads();
        let all = (0..50).map(|_| cache.get("k", consistency));
        for answer in futures_util::future::join_all(all).await {
            assert_eq!(value(&answer.unwrap()), Some("2"));
        }
        // A bounded read also has the next proof brought forward.
        assert!(store.reads() - before <= 2, "{} reads", store.reads() - before);
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_who_gives_up_takes_nobody_along() {
    let store = Store::new();
    store.put("k", "1");
    let cache = store.open(plain()).await;
    store.with(|store| store.delay = 100 * MS);
    let first = tokio::time::timeout(50 * MS, cache.get("k", Consistency::Eventual));
    let second = cache.get("k", Consistency::Eventual);
    let (first, second) = tokio::join!(first, second);
    assert!(first.is_err());
    assert_eq!(value(&second.unwrap()), Some("1"));
}

#[tokio::test(start_paused = true)]
async fn a_read_on_its_way_is_shared_only_if_it_is_young_enough() {
    let store = Store::new();
    store.put("k", "1");
    let cache = store.open(plain()).await;
    eventually("it is online", || cache.state().online).await;
    store.with(|store| store.delay = SECOND);
    let slow = {
        let cache = cache.clone();
        tokio::spawn(async move { cache.get("k", Consistency::Bounded(10 * SECOND)).await })
    };
    tokio::time::sleep(500 * MS).await;
    let before = store.reads();
    cache.get("k", Consistency::Bounded(100 * MS)).await.unwrap();
    assert!(store.reads() > before, "the read on its way is half a second old");
    slow.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_state_says_offline_catching_up_and_live() {
    let store = Store::new();
    store.with(|store| store.down = true);
    let cache = store.open(CacheOptions { verify_interval: SECOND, ..watched() }).await;
    let phase = || cache.state().scopes[0].phase;
    tokio::time::sleep(SECOND).await;
    assert_eq!(phase(), Phase::Offline);
    store.with(|store| (store.down, store.silent) = (false, true));
    eventually("it catches up", || phase() == Phase::CatchingUp).await;
    store.with(|store| store.silent = false);
    eventually("it is live", || phase() == Phase::Live).await;
    store.with(|store| store.silent = true);
    store.put("a/x", "1");
    eventually("it notices silence", || phase() == Phase::CatchingUp).await;
    assert!(cache.get("a/x", Consistency::Eventual).await.unwrap().stale);
    store.with(|store| store.down = true);
    eventually("it notices absence", || phase() == Phase::Offline).await;
}

#[tokio::test(start_paused = true)]
async fn after_a_compaction_it_is_whole_again() {
    let store = Store::new();
    for i in 0..50 {
        store.put(&format!("a/{i}"), "old");
    }
    let cache = store.open(watched()).await;
    live(&cache).await;
    store.with(|store| store.silent = true);
    for i in 0..10 {
        store.set(&format!("a/{i}"), None);
        store.put(&format!("a/{}", 10 + i), "new");
    }
    store.with(|store| store.compacted = store.revision);
    // From now on a key that stayed must never read as absent.
    let reader = {
        let cache = cache.clone();
        tokio::spawn(async move {
            for _ in 0..2000 {
                for key in ["a/10", "a/49"] {
                    assert!(cache.get(key, Consistency::Eventual).await.unwrap().kv.is_some(), "{key}");
                }
                tokio::task::yield_now().await;
            }
        })
    };
    store.with(|store| store.silent = false);
    reader.await.unwrap();
    eventually("it has read it anew", || store.inner.lock().snapshots == 2).await;
    tokio::time::sleep(MS).await;
    let read = async |key: &str| cache.get(key, Consistency::Eventual).await.unwrap();
    assert_eq!(value(&read("a/3").await), None);
    assert_eq!(value(&read("a/13").await), Some("new"));
    assert_eq!(value(&read("a/33").await), Some("old"));
}

#[tokio::test(start_paused = true)]
async fn the_second_level_takes_over_and_gives_back() {
    let store = Store::new();
    let text = "compressible ".repeat(300);
    for i in 0..100 {
        store.put(&format!("a/{i}"), &text);
    }
    let options = CacheOptions { l1_bytes: 64 << 10, policy: CachePolicy::Lru, ..watched() };
    let cache = store.open(options).await;
    live(&cache).await;
    cache.core().memory.settle();
    let before = store.reads();
    let mut levels = std::collections::HashMap::new();
    for i in 0..100 {
        let answer = cache.get(format!("a/{i}"), Consistency::Eventual).await.unwrap();
        assert_eq!(value(&answer), Some(&text[..]));
        *levels.entry(answer.level).or_insert(0) += 1;
        cache.core().memory.settle();
    }
    assert_eq!(store.reads(), before, "{levels:?}");
    assert!(levels[&Level::L2] > 80, "{levels:?}");
    let stats = cache.stats();
    assert!(stats.demotions > 80 && stats.promotions > 80, "{stats:?}");
    assert!(stats.l1_bytes <= 64 << 10, "{stats:?}");

    cache.core().memory.damage_second();
    for i in 0..100 {
        let answer = cache.get(format!("a/{i}"), Consistency::Eventual).await.unwrap();
        assert_eq!(value(&answer), Some(&text[..]), "never a wrong value");
    }
    assert!(cache.stats().checksum_failures > 50);
}

#[tokio::test(start_paused = true)]
async fn the_ttl_policy_drops_by_age() {
    let store = Store::new();
    store.put("a/x", "1");
    let cache = store.open(CacheOptions { policy: CachePolicy::Ttl(SECOND), l2_bytes: 0, ..watched() }).await;
    live(&cache).await;
    assert_eq!(cache.get("a/x", Consistency::Eventual).await.unwrap().level, Level::L1);
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(cache.get("a/x", Consistency::Eventual).await.unwrap().level, Level::Server);
    assert_eq!(cache.get("a/x", Consistency::Eventual).await.unwrap().level, Level::L1);
}

#[tokio::test(start_paused = true)]
async fn the_adaptive_policy_changes_over_without_losing_anything() {
    let store = Store::new();
    for i in 0..300 {
        store.put(&format!("a/{i}"), &"x".repeat(100));
    }
    let options = CacheOptions { l1_bytes: 64 << 10, l2_bytes: 1 << 20, ..watched() };
    let cache = store.open(options).await;
    live(&cache).await;
    assert_eq!(cache.stats().policy, CachePolicy::Lfu);
    let before = store.reads();
    // Bursts over a slowly moving window: recency is everything.
    for i in 0..60_000u32 {
        let key = format!("a/{}", (i / 100 + (i % 7) * (i % 5)) % 300);
        assert!(cache.get(&key, Consistency::Eventual).await.unwrap().kv.is_some());
    }
    let stats = cache.stats();
    assert_eq!(store.reads(), before, "{stats:?}");
    assert_eq!(stats.policy == CachePolicy::Lru, stats.policy_switches % 2 == 1, "{stats:?}");
}

#[tokio::test(start_paused = true)]
async fn warming_brings_a_prefix_in() {
    let store = Store::new();
    for i in 0..20 {
        store.put(&format!("b/{i}"), "1");
    }
    let cache = store.open(plain()).await;
    assert_eq!(cache.warm("b/").await.unwrap(), 20);
    let before = store.reads();
    assert_eq!(cache.get("b/7", Consistency::Eventual).await.unwrap().level, Level::L1);
    assert_eq!(store.reads(), before);
}

#[tokio::test(start_paused = true)]
async fn a_closed_cache_says_so() {
    let store = Store::new();
    let cache = store.open(watched()).await;
    cache.close().await;
    let error = cache.get("a/x", Consistency::Eventual).await.unwrap_err();
    assert!(matches!(error, ClientError::Cache(CacheError::Closed)));
    assert!(cache.wait_for(|_| false).await.is_err());
    assert!(cache.core().closed.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn answers_of_another_cluster_are_not_taken_in() {
    let store = Store::new();
    store.put("a/x", "1");
    let cache = store.open(CacheOptions { verify_interval: SECOND, ..watched() }).await;
    live(&cache).await;
    store.with(|store| store.cluster = 8);
    store.put("b", "other");
    let error = cache.get("b", Consistency::Strong).await.unwrap_err();
    assert!(error.to_string().contains("of cluster 7, and the endpoints are of cluster 8"), "{error}");
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(cache.state().foreign_cluster, Some(8));
    assert!(cache.get("a/x", Consistency::Eventual).await.unwrap().stale);
}
