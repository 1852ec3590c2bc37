//! What is counted while load runs: latencies, failures by what they said, and what came of it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;

use super::Failure;

/// How many kinds of failures are told apart; the rest are counted together.
const KINDS_MAX: usize = 16;
/// Latencies are kept to three digits, in microseconds.
const DIGITS: u8 = 3;
/// So that a nonsensical latency does not make a histogram of every size.
const LATENCY_MAX: Duration = Duration::from_secs(3600);

/// Counts while load runs. Whoever measures shares it.
#[derive(Debug)]
pub struct Tally {
    done: AtomicU64,
    failed: AtomicU64,
    /// Several, so that threads do not wait for each other. Not one for each client: a thousand would
    /// be more memory than any cache holds.
    shards: Vec<Mutex<Histogram<u64>>>,
    failures: Mutex<BTreeMap<String, u64>>,
}

impl Default for Tally {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Tally {
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            shards: (0..2 * threads).map(|_| Mutex::new(histogram())).collect(),
            failures: Mutex::new(BTreeMap::new()),
        }
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new(DIGITS).expect("three digits are allowed")
}

impl Tally {
    /// Counts an operation of client number `client` that succeeded.
    pub fn succeeded(&self, client: usize, took: Duration) {
        let micros = took.min(LATENCY_MAX).as_micros() as u64;
        self.shards[client % self.shards.len()].lock().record(micros).expect("it grows as it needs to");
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an operation that failed.
    pub fn failed(&self, failure: &Failure) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut failures = self.failures.lock();
        let known = failures.len() < KINDS_MAX || failures.contains_key(&failure.0);
        let kind = if known { failure.0.clone() } else { "others".to_owned() };
        *failures.entry(kind).or_default() += 1;
    }

    /// How many operations have succeeded so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// How many operations have failed so far.
    pub fn errors(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// The latency so far that this part of all operations stayed below.
    pub fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.histogram().value_at_quantile(quantile))
    }

    fn histogram(&self) -> Histogram<u64> {
        let mut all = histogram();
        for shard in &self.shards {
            all.add(&*shard.lock()).expect("they grow as they need to");
        }
        all
    }

    /// What came of it, and begins anew.
    pub fn take(&self, took: Duration) -> Outcome {
        let latencies = self.histogram();
        self.shards.iter().for_each(|shard| shard.lock().reset());
        self.done.store(0, Ordering::Relaxed);
        self.failed.store(0, Ordering::Relaxed);
        Outcome { latencies, failures: std::mem::take(&mut *self.failures.lock()), took, late: 0 }
    }
}

/// What came of a load.
#[derive(Clone, Debug)]
pub struct Outcome {
    latencies: Histogram<u64>,
    /// How often each reason for a failure was given.
    pub failures: BTreeMap<String, u64>,
    /// How long it took.
    pub took: Duration,
    /// Operations that a fixed rate asked for and that were never begun, because nobody was free.
    pub late: u64,
}

impl Outcome {
    /// Operations that succeeded.
    pub fn ops(&self) -> u64 {
        self.latencies.len()
    }

    /// Operations that failed.
    pub fn errors(&self) -> u64 {
        self.failures.values().sum()
    }

    /// Operations that succeeded, per second.
    pub fn ops_per_s(&self) -> f64 {
        self.ops() as f64 / self.took.as_secs_f64().max(1e-9)
    }

    /// The latency in milliseconds that this part (0 to 1) of the operations stayed below.
    pub fn quantile_ms(&self, quantile: f64) -> f64 {
        self.latencies.value_at_quantile(quantile) as f64 / 1000.0
    }

    /// The least latency in milliseconds.
    pub fn min_ms(&self) -> f64 {
        self.latencies.min() as f64 / 1000.0
    }

    /// The mean latency in milliseconds.
    pub fn mean_ms(&self) -> f64 {
        self.latencies.mean() / 1000.0
    }

    /// The greatest latency in milliseconds.
    pub fn max_ms(&self) -> f64 {
        self.latencies.max() as f64 / 1000.0
    }

    /// How many operations took how long: pairs of an upper bound in milliseconds and the number of
    /// operations up to it and above the bound before. Bounds double.
    pub fn doubling(&self) -> Vec<(f64, u64)> {
        let first = (self.latencies.min().max(1)).next_power_of_two();
        let steps = self.latencies.iter_log(first, 2.0);
        steps
            .map(|step| (step.value_iterated_to() as f64 / 1000.0, step.count_since_last_iteration()))
            .collect()
    }
}
