//! Caches on real nodes: what a bounded answer may not miss, whatever happens to
//! the nodes; starting without them; a history that was compacted; a disk that is full.

use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use mainstay::client::{Cache, CacheOptions, Client, Consistency, DiskState, GetOptions, Level, Phase};
use mainstay::types::KeyRange;
use rustix::process::Signal;
use tokio::task::JoinHandle;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_own_cluster};
use crate::trouble_disk::SmallDisk;

const MS: Duration = Duration::from_millis(1);

fn options(dir: Option<&Path>) -> CacheOptions {
    CacheOptions {
        dir: dir.map(Path::to_owned),
        prefixes: vec!["a/".into()],
        verify_interval: 100 * MS,
        ..CacheOptions::default()
    }
}

async fn open(c: &Cluster, dir: Option<&Path>) -> Cache {
    let client = Client::connect(c.endpoints()).unwrap();
    Cache::open(&client, options(dir), None).await.unwrap()
}

async fn live(cache: &Cache) {
    let live = cache.wait_for(|state| state.is_live());
    assert!(tokio::time::timeout(SOON, live).await.is_ok(), "it is not live: {:?}", cache.state());
}

async fn text(cache: &Cache, key: &str) -> Option<String> {
    let answer = cache.get(key, Consistency::Eventual).await.unwrap();
    answer.kv.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap())
}

/// Counts a key up; what was acknowledged when.
struct Counter {
    acknowledged: Arc<Mutex<Vec<(u64, Instant)>>>,
    task: JoinHandle<()>,
}

impl Counter {
    fn start(c: &Cluster, key: &'static str) -> Counter {
        let client = Client::connect(c.endpoints()).unwrap();
        let acknowledged: Arc<Mutex<Vec<(u64, Instant)>>> = Arc::default();
        let log = acknowledged.clone();
        let task = tokio::spawn(async move {
            for number in 1.. {
                // A write in doubt may have happened; the next one is larger in any case.
                if client.put(key, number.to_string()).await.is_ok() {
                    log.lock().unwrap().push((number, Instant::now()));
                }
                tokio::time::sleep(5 * MS).await;
            }
        });
        Counter { acknowledged, task }
    }

    /// The largest number that was acknowledged before a moment.
    fn before(&self, moment: Instant) -> u64 {
        let log = self.acknowledged.lock().unwrap();
        log.iter().take_while(|(_, at)| *at <= moment).map(|(number, _)| *number).last().unwrap_or(0)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads within a bound for a while. Every answer has everything that had been
/// acknowledged that long ago, and none goes back. Gives how many came from the
/// cache, from the cluster, and not at all.
async fn judge(cache: &Cache, counter: &Counter, bound: Duration, time: Duration) -> (u64, u64, u64) {
    let (mut cached, mut asked, mut failed, mut last) = (0, 0, 0, 0);
    let end = Instant::now() + time;
    while Instant::now() < end {
        let begun = Instant::now();
        match cache.get("a/counter", Consistency::Bounded(bound)).await {
            Ok(answer) => {
                let number: u64 = answer
                    .kv
                    .as_ref()
                    .map_or(0, |kv| std::str::from_utf8(&kv.value).unwrap().parse().unwrap());
                let least = begun.checked_sub(bound).map_or(0, |moment| counter.before(moment));
                assert!(
                    number >= least,
                    "{number} was handed out, {least} was older than {bound:?}: {answer:?}"
                );
                assert!(number >= last, "{number} after {last}: {answer:?}");
                last = number;
                if answer.level == Level::Server { asked += 1 } else { cached += 1 }
            }
            Err(_) => failed += 1,
        }
        tokio::time::sleep(MS).await;
    }
    (cached, asked, failed)
}

#[test]
fn a_bounded_read_has_what_others_wrote_before_the_bound() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let cache = open(c, None).await;
        live(&cache).await;
        let counter = Counter::start(c, "a/counter");
        let (cached, asked, failed) = judge(&cache, &counter, 300 * MS, Duration::from_secs(4)).await;
        assert!(cached > 10 * asked && failed == 0, "{cached} cached, {asked} asked, {failed} failed");
        assert!(counter.before(Instant::now()) > 10);
    });
}

#[test]
fn stopped_and_lonely_members_do_not_make_bounded_reads_lie() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let cache = open(c, None).await;
        live(&cache).await;
        let counter = Counter::start(c, "a/counter");
        for node in 0..3 {
            c.nodes[node].signal(Signal::STOP);
            judge(&cache, &counter, 200 * MS, Duration::from_secs(2)).await;
            c.nodes[node].signal(Signal::CONT);
            judge(&cache, &counter, 200 * MS, Duration::from_secs(1)).await;
        }
        // A member without the others still answers watches, and proves nothing.
        let client = Client::connect([c.nodes[0].url()]).unwrap();
        let alone = Cache::open(&client, options(None), None).await.unwrap();
        live(&alone).await;
        c.nodes[1].kill();
        c.nodes[2].kill();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let read = alone.get("a/counter", Consistency::Bounded(200 * MS));
        assert!(tokio::time::timeout(Duration::from_secs(30), read).await.is_ok_and(|read| read.is_err()));
        let stale = alone.get("a/counter", Consistency::Eventual).await.unwrap();
        assert!(stale.kv.is_some() && stale.age.unwrap() > 200 * MS, "{stale:?}");
        c.start_all();
        c.wait_ready().await;
        live(&alone).await;
        judge(&alone, &counter, 500 * MS, Duration::from_secs(1)).await;
    });
}

#[test]
fn it_starts_without_a_node_and_catches_up() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let dir = c.root.join("cache");
        let client = Client::connect(c.endpoints()).unwrap();
        for i in 0..200 {
            client.put(format!("a/{i}"), format!("old {i}")).await.unwrap();
        }
        client.put("a/binary", vec![0xff, 0xfe, 0]).await.unwrap();
        let cache = open(c, Some(&dir)).await;
        live(&cache).await;
        cache.close().await;
        client.put("a/1", "new 1").await.unwrap();
        client.delete("a/2").await.unwrap();
        c.kill_all();

        let begun = Instant::now();
        let cache = open(c, Some(&dir)).await;
        let answer = cache.get("a/1", Consistency::Eventual).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(2), "it waited for the cluster: {:?}", begun.elapsed());
        assert_eq!(&answer.kv.as_ref().unwrap().value[..], b"old 1");
        assert!(answer.stale && answer.level == Level::L3 && answer.age.is_some(), "{answer:?}");
        for i in 0..200 {
            assert_eq!(text(&cache, &format!("a/{i}")).await, Some(format!("old {i}")));
        }
        assert_eq!(text(&cache, "a/none").await, None);
        let binary = cache.get("a/binary", Consistency::Eventual).await.unwrap();
        assert_eq!(&binary.kv.unwrap().value[..], [0xff, 0xfe, 0]);
        assert_eq!(cache.state().scopes[0].phase, Phase::Offline);
        let refusal = cache.get("a/1", Consistency::Bounded(3600 * 1000 * MS)).await.unwrap_err();
        assert!(refusal.to_string().contains("the cluster does not answer"), "{refusal}");

        c.start_all();
        c.wait_ready().await;
        live(&cache).await;
        let answer = cache.get("a/1", Consistency::Bounded(1000 * MS)).await.unwrap();
        assert_eq!(&answer.kv.unwrap().value[..], b"new 1");
        assert_eq!(text(&cache, "a/2").await, None);
        assert!(!cache.get("a/3", Consistency::Eventual).await.unwrap().stale);
    });
}

#[test]
fn a_compaction_in_between_is_made_good_by_a_snapshot() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let dir = c.root.join("cache");
        let client = Client::connect(c.endpoints()).unwrap();
        for i in 0..50 {
            client.put(format!("a/{i}"), "old").await.unwrap();
        }
        let cache = open(c, Some(&dir)).await;
        live(&cache).await;
        cache.close().await;
        client.delete_range(KeyRange::prefix("a/1".into()), false).await.unwrap();
        client.put("a/2", "new").await.unwrap();
        let at = client.put("a/50", "new").await.unwrap().revision;
        client.compact(at, false).await.unwrap();
        let cache = open(c, Some(&dir)).await;
        live(&cache).await;
        for i in 0..=50 {
            let key = format!("a/{i}");
            let current = client.range(GetOptions::key(key.clone())).await.unwrap().reply.kvs.pop();
            let answer = cache.get(&key, Consistency::Bounded(10_000 * MS)).await.unwrap();
            assert_eq!(answer.kv, current, "{key}");
        }
    });
}

#[test]
fn a_full_disk_stops_the_disk_level_and_nothing_else() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let Some(disk) = SmallDisk::mount(&c.root.join("disk"), 8) else { return };
        let dir = c.root.join("disk/cache");
        let client = Client::connect(c.endpoints()).unwrap();
        for i in 0..20 {
            client.put(format!("a/{i}"), format!("old {i}")).await.unwrap();
        }
        let cache = open(c, Some(&dir)).await;
        live(&cache).await;
        tokio::time::sleep(500 * MS).await;
        disk.fill_to(64 << 10);
        let noise: Vec<u8> = (0..400_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for i in 0..10 {
            client.put(format!("a/big{i}"), noise.clone()).await.unwrap();
        }
        client.put("a/7", "new 7").await.unwrap();
        let failed = cache.wait_for(|state| matches!(state.disk, DiskState::Failed { .. }));
        assert!(tokio::time::timeout(SOON, failed).await.is_ok(), "{:?}", cache.state());
        let bounded = Consistency::Bounded(1000 * MS);
        for i in 0..20 {
            let answer = cache.get(format!("a/{i}"), bounded).await.unwrap();
            let expected = if i == 7 { "new 7".into() } else { format!("old {i}") };
            assert_eq!(answer.kv.unwrap().value, expected);
        }
        assert_eq!(cache.get("a/big3", bounded).await.unwrap().kv.unwrap().value.len(), noise.len());
        cache.close().await;
        disk.empty();
        let cache = open(c, Some(&dir)).await;
        live(&cache).await;
        assert_eq!(cache.state().disk, DiskState::Working);
        assert_eq!(text(&cache, "a/7").await.as_deref(), Some("new 7"));
        cache.close().await;
        drop(disk);
    });
}
