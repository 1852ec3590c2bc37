//! The SDK measured: how fast each level of a cache answers, and how often each
//! policy hits.
//!
//! The store behind it is a function, so that nothing but the cache is measured.

#![expect(clippy::disallowed_methods, reason = "what is measured takes real time")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hdrhistogram::Histogram;
use mainstay::client::{
    Cache, CacheFeed, CacheOptions, CachePolicy, CacheSource, ClientError, Consistency, Level, Seen,
};
use mainstay::env::{Env, EnvRef};
use mainstay::types::{KeyRange, KeyValue, LeaseId, Revision};

const READERS: usize = 8;
const DAY: Duration = Duration::from_secs(86_400);

/// A store whose keys all exist, with a value made from the key.
struct Made {
    env: EnvRef,
    /// Keys that a scan gives.
    keys: u64,
    value_bytes: usize,
}

impl Made {
    fn kv(&self, key: Bytes) -> KeyValue {
        let mut value = key.to_vec();
        let words = b"{\"enabled\": true, \"limit\": 1000, \"region\": \"eu-central\"}, ";
        value.extend(words.iter().cycle().take(self.value_bytes.saturating_sub(value.len())));
        value.truncate(self.value_bytes);
        KeyValue {
            key,
            create_revision: Revision(1),
            mod_revision: Revision(1),
            version: 1,
            lease: LeaseId(0),
            value: value.into(),
        }
    }
}

fn key(number: u64) -> Bytes {
    Bytes::copy_from_slice(&number.to_be_bytes())
}

impl CacheSource for Made {
    fn read(&self, key: Bytes, _linearizable: bool) -> BoxFuture<'_, Result<Seen, ClientError>> {
        Box::pin(async { Ok(Seen { kv: Some(self.kv(key)), revision: Revision(1), cluster_id: 1 }) })
    }

    fn scan(&self, _range: KeyRange) -> BoxFuture<'_, Result<(Revision, Vec<KeyValue>), ClientError>> {
        Box::pin(async { Ok((Revision(1), (0..self.keys).map(|number| self.kv(key(number))).collect())) })
    }

    fn follow(&self, _range: KeyRange, _known: Revision) -> Box<dyn CacheFeed> {
        unreachable!("no prefix is watched here")
    }

    fn env(&self) -> EnvRef {
        self.env.clone()
    }
}

/// Time that passes with the reads of a trace, or with the machine's clock.
struct Clock {
    started: Instant,
    reads: AtomicU64,
    by_reads: bool,
}

/// What one read of a trace takes.
const READ_TAKES: Duration = Duration::from_micros(10);

impl Clock {
    fn new(by_reads: bool) -> Arc<Clock> {
        Arc::new(Clock { started: Instant::now(), reads: AtomicU64::new(0), by_reads })
    }
}

impl Env for Clock {
    fn monotonic(&self) -> Duration {
        match self.by_reads {
            true => READ_TAKES * self.reads.load(Ordering::Relaxed) as u32,
            false => self.started.elapsed(),
        }
    }

    fn wall_ms(&self) -> u64 {
        1_700_000_000_000 + self.monotonic().as_millis() as u64
    }

    fn random_u64(&self) -> u64 {
        4
    }
}

/// Numbers that repeat from run to run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below_one(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Runs it.
pub fn run() {
    latencies();
    hit_rates();
}

fn base() -> CacheOptions {
    CacheOptions { ttl: DAY, verify_interval: Duration::from_secs(60), ..CacheOptions::default() }
}

fn latencies() {
    println!("| level | values | reads | p50 | p99 | p99.9 |\n|---|---|---|---|---|---|");
    let dir = std::env::temp_dir().join(format!("mainstay-bench-cache-{}", std::process::id()));
    let small = CacheOptions { l1_bytes: 64 << 10, ..base() };
    level(Level::L1, 10_000, 256, 500_000, CacheOptions { l1_bytes: 256 << 20, ..base() });
    level(Level::L2, 20_000, 1024, 50_000, CacheOptions { l2_bytes: 256 << 20, ..small.clone() });
    level(Level::L3, 20_000, 1024, 20_000, CacheOptions { l2_bytes: 0, dir: Some(dir.clone()), ..small });
    let _ = std::fs::remove_dir_all(dir);
    println!();
}

/// Reads random keys with all readers at once; only answers of one level count.
fn level(wanted: Level, keys: u64, value_bytes: usize, reads: usize, options: CacheOptions) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let source = Arc::new(Made { env: Clock::new(false), keys, value_bytes });
    let cache = runtime.block_on(Cache::over(source, options, None)).expect("it opens");
    runtime.block_on(cache.warm("")).expect("it is filled");
    // Lets the levels and the disk take in what they were given.
    runtime.block_on(async { tokio::time::sleep(Duration::from_millis(500)).await });
    let handle = runtime.handle().clone();
    let reader = |seed: usize| {
        let mut random = Random(seed as u64 + 1);
        let _entered = handle.enter();
        let mut times = Histogram::<u64>::new(3).expect("three digits");
        for _ in 0..reads {
            let key = key(random.next() % keys);
            let begun = Instant::now();
            // What memory has is there at the first poll, without a runtime.
            let answer = match cache.get(&key, Consistency::Eventual).now_or_never() {
                Some(answer) => answer,
                // The read that was given up is made again, with its wait.
                None => handle.block_on(cache.get(&key, Consistency::Eventual)),
            };
            let took = begun.elapsed();
            if answer.expect("an answer").level == wanted {
                times.record(took.as_nanos() as u64).expect("it fits");
            }
        }
        times
    };
    let mut all = Histogram::<u64>::new(3).expect("three digits");
    std::thread::scope(|scope| {
        let reader = &reader;
        let threads: Vec<_> = (0..READERS).map(|seed| scope.spawn(move || reader(seed))).collect();
        for thread in threads {
            all.add(thread.join().expect("no panic")).expect("they fit");
        }
    });
    let at = |quantile| Duration::from_nanos(all.value_at_quantile(quantile));
    let count = all.len();
    println!("| {wanted:?} | {value_bytes} B | {count} | {:?} | {:?} | {:?} |", at(0.5), at(0.99), at(0.999));
    runtime.block_on(cache.close());
}

const KEYS: usize = 1_000_000;
const CAPACITY: u64 = KEYS as u64 / 10;
const READS: usize = 2_000_000;

/// Zipf(1.0) over [`KEYS`] keys.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new() -> Zipf {
        let mut sum = 0.0;
        let sums: Vec<f64> = (1..=KEYS)
            .map(|rank| {
                sum += 1.0 / rank as f64;
                sum
            })
            .collect();
        Zipf(sums.into_iter().map(|at| at / sum).collect())
    }

    fn rank(&self, random: &mut Random) -> u64 {
        let at = random.below_one();
        self.0.partition_point(|sum| *sum < at) as u64
    }
}

/// Which key is read, by trace.
fn trace(name: &str, zipf: &Zipf) -> Vec<u64> {
    let mut random = Random(88_172_645_463_325_252);
    let keys = KEYS as u64;
    let mut scanned = 0;
    (0..READS)
        .map(|read| {
            let rank = zipf.rank(&mut random);
            match name {
                // A third of the time somebody walks through keys that nobody reads again.
                "scan-polluted" if read % 150_000 >= 100_000 => {
                    scanned += 1;
                    keys + scanned
                }
                // What is popular moves on by a tenth of the keys, ten times.
                "shifting" => (rank + (read / (READS / 10)) as u64 * (keys / 10)) % keys,
                _ => rank,
            }
        })
        .collect()
}

fn hit_rates() {
    let zipf = Zipf::new();
    let policies = [
        ("LRU", CachePolicy::Lru),
        ("LFU", CachePolicy::Lfu),
        ("TTL", CachePolicy::Ttl(READ_TAKES * (READS as u32 / 4))),
        ("adaptive", CachePolicy::Adaptive),
    ];
    println!("Hit rate in percent over the second half of {READS} reads; {KEYS} keys, {CAPACITY} fit\n");
    println!(
        "| trace | LRU | LFU | TTL | adaptive | against the best | changes |\n|---|---|---|---|---|---|---|"
    );
    for name in ["zipf", "scan-polluted", "shifting"] {
        let trace = trace(name, &zipf);
        let rates = policies.map(|(_, policy)| hit_rate(&trace, policy));
        let best = rates[..3].iter().map(|(rate, _)| *rate).fold(0.0, f64::max);
        let [lru, lfu, ttl, (adaptive, changes)] = rates;
        println!(
            "| {name} | {:.2} | {:.2} | {:.2} | {adaptive:.2} | {:+.2} | {changes} |",
            lru.0,
            lfu.0,
            ttl.0,
            adaptive - best
        );
    }
}

fn hit_rate(trace: &[u64], policy: CachePolicy) -> (f64, u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let options = CacheOptions { l2_bytes: 0, policy, ..base() };
        let weight = entry_weight(options.clone()).await;
        let clock = Clock::new(true);
        let source = Arc::new(Made { env: clock.clone(), keys: 0, value_bytes: 0 });
        let options = CacheOptions { l1_bytes: CAPACITY * weight, ..options };
        let cache = Cache::over(source, options, None).await.expect("it opens");
        cache.wait_for(|state| state.online).await.expect("the store answers");
        let mut before = 0;
        for (i, number) in trace.iter().enumerate() {
            if i == trace.len() / 2 {
                before = cache.stats().l1_hits;
            }
            cache.get(key(*number), Consistency::Eventual).await.expect("an answer");
            clock.reads.fetch_add(1, Ordering::Relaxed);
            if i % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        let stats = cache.stats();
        (200.0 * (stats.l1_hits - before) as f64 / trace.len() as f64, stats.policy_switches)
    })
}

/// What an entry of the traces weighs in the first level.
async fn entry_weight(options: CacheOptions) -> u64 {
    const SAMPLE: u64 = 10_000;
    let source = Arc::new(Made { env: Clock::new(false), keys: SAMPLE, value_bytes: 0 });
    let cache = Cache::over(source, options, None).await.expect("it opens");
    cache.warm("").await.expect("it is filled");
    tokio::time::sleep(Duration::from_millis(400)).await;
    // Reads have the level count what it took in.
    for number in 0..SAMPLE {
        cache.get(key(number), Consistency::Eventual).await.expect("an answer");
    }
    cache.stats().l1_bytes / SAMPLE
}
