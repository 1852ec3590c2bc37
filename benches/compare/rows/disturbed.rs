//! Puts while the store does something large besides: what is lost of their rate.
//!
//! Quiet stretches and disturbed ones take turns on one cluster, and a disturbed one lasts exactly as
//! long as the work does: a compaction until the node that was asked has deleted the old revisions
//! (`physical`), a snapshot until its last byte has arrived. So a store that works longer is disturbed
//! for longer, and how long is a figure of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, CompactionOptions};
use hdrhistogram::Histogram;

use super::{BOTH, Bound, Goal, Row};
use crate::bench::{Bench, connections, key};
use crate::cluster::connect_patient;
use crate::figures::Figures;
use crate::kept::{Content, fill};

const CONNECTIONS: usize = 100;
const CLIENTS: usize = 256;
const VALUE_BYTES: usize = 256;
/// Pairs of a quiet and a disturbed stretch.
const PAIRS: usize = 3;
/// A disturbed stretch ends here even if the work has not: it is measured, and goes on in the background.
const STRETCH_MAX: Duration = Duration::from_secs(60);
/// Keys that are overwritten, and how often before each compaction.
const COMPACTED_KEYS: usize = 10_000;
const OVERWRITES: usize = 20;
/// What is saved: some 500 MB.
const SAVED_KEYS: usize = 120_000;
const SAVED_VALUE_BYTES: usize = 4096;
/// The quota is no part of this.
const QUOTA_BYTES: u64 = 16 << 30;

pub const ROWS: &[Row] = &[
    Row {
        name: "compaction",
        load: "puts by 256 clients while 200,000 old revisions are compacted",
        sides: BOTH,
        goals: &[Goal { metric: "drop_percent", bound: Bound::AtMost(10.0) }],
        limit: Duration::from_secs(600),
        run: |bench| Box::pin(compaction(bench)),
    },
    Row {
        name: "snapshot-save",
        load: "puts by 256 clients while the leader sends a snapshot of 500 MB",
        sides: BOTH,
        goals: &[Goal { metric: "drop_percent", bound: Bound::AtMost(15.0) }],
        limit: Duration::from_secs(600),
        run: |bench| Box::pin(snapshot_save(bench)),
    },
];

async fn compaction(bench: &Bench) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3).flag("quota-backend-bytes", QUOTA_BYTES)).await;
    let mut asked = connect_patient(&[cluster.nodes[cluster.leader().await].url()]).await;
    let content = Content {
        keys: bench.scaled(COMPACTED_KEYS),
        value_bytes: VALUE_BYTES,
        per_txn: 100,
        ..Content::default()
    };
    let connections = connections(&cluster, CONNECTIONS).await;
    let mut rates = Rates::default();
    for _ in 0..PAIRS {
        for _ in 0..OVERWRITES {
            fill(&connections, content).await?;
        }
        let load = Load::start(&connections, content.keys);
        tokio::time::sleep(bench.warm_up()).await;
        rates.quiet(&load, tokio::time::sleep(bench.time() / 2)).await;
        let revision = asked.status().await?.header().context("every answer has a header")?.revision();
        let physical = CompactionOptions::new().with_physical();
        rates.disturbed(&load, async { asked.compact(revision, Some(physical)).await.map(|_| ()) }).await?;
        rates.errors += load.stop().await;
    }
    rates.figures()
}

async fn snapshot_save(bench: &Bench) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3).flag("quota-backend-bytes", QUOTA_BYTES)).await;
    let mut leader = connect_patient(&[cluster.nodes[cluster.leader().await].url()]).await;
    let content = Content {
        keys: bench.scaled(SAVED_KEYS),
        value_bytes: SAVED_VALUE_BYTES,
        per_txn: 16,
        ..Content::default()
    };
    let connections = connections(&cluster, CONNECTIONS).await;
    fill(&connections, content).await?;
    let load = Load::start(&connections, bench.scaled(COMPACTED_KEYS));
    tokio::time::sleep(bench.warm_up()).await;
    let (mut rates, mut bytes) = (Rates::default(), 0);
    for _ in 0..PAIRS {
        rates.quiet(&load, tokio::time::sleep(bench.time() / 2)).await;
        let save = async {
            let mut pieces = leader.snapshot().await?;
            while let Some(piece) = pieces.message().await? {
                bytes += piece.blob().len();
            }
            Ok(())
        };
        rates.disturbed(&load, save).await?;
    }
    rates.errors += load.stop().await;
    Ok(rates.figures()?.with("saved_mib", bytes as f64 / PAIRS as f64 / f64::from(1 << 20)))
}

/// Puts by all clients until it is stopped.
struct Load {
    shared: Arc<Shared>,
    tasks: Vec<tokio::task::JoinHandle<u64>>,
}

struct Shared {
    stop: AtomicBool,
    done: AtomicUsize,
    latencies: parking_lot::Mutex<Histogram<u64>>,
}

impl Load {
    fn start(connections: &[Client], keys: usize) -> Load {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            done: AtomicUsize::new(0),
            latencies: parking_lot::Mutex::new(latencies()),
        });
        let value: Arc<Vec<u8>> = Arc::new((0..VALUE_BYTES).map(|_| rand::random()).collect());
        let puts = |i: usize| {
            let mut client = connections[i % connections.len()].clone();
            let (shared, value) = (shared.clone(), value.clone());
            tokio::spawn(async move {
                let mut errors = 0;
                while !shared.stop.load(Ordering::Relaxed) {
                    let since = Instant::now();
                    let key = key(rand::random_range(0..keys));
                    match client.put(key, value.as_slice(), None).await {
                        Ok(_) => {
                            shared.done.fetch_add(1, Ordering::Relaxed);
                            shared.latencies.lock().saturating_record(since.elapsed().as_micros() as u64);
                        }
                        Err(_) => errors += 1,
                    }
                }
                errors
            })
        };
        Load { tasks: (0..CLIENTS).map(puts).collect(), shared }
    }

    /// Ends it; how many puts failed.
    async fn stop(self) -> u64 {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut errors = 0;
        for task in self.tasks {
            errors += task.await.unwrap_or(1);
        }
        errors
    }
}

fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("up to a minute in microseconds")
}

/// What was done in the stretches of each kind.
#[derive(Default)]
struct Rates {
    quiet: Stretches,
    disturbed: Stretches,
    /// Stretches that ended before their work did.
    unfinished: u32,
    errors: u64,
}

#[derive(Default)]
struct Stretches {
    time: Duration,
    puts: usize,
    latencies: Option<Histogram<u64>>,
}

impl Stretches {
    async fn during<T>(&mut self, load: &Load, work: impl Future<Output = T>) -> T {
        *load.shared.latencies.lock() = latencies();
        let (since, before) = (Instant::now(), load.shared.done.load(Ordering::Relaxed));
        let result = work.await;
        self.puts += load.shared.done.load(Ordering::Relaxed) - before;
        self.time += since.elapsed();
        let of_stretch = std::mem::replace(&mut *load.shared.latencies.lock(), latencies());
        self.latencies.get_or_insert_with(latencies).add(of_stretch).expect("same shape");
        result
    }

    fn rate(&self) -> f64 {
        self.puts as f64 / self.time.as_secs_f64()
    }

    fn ms(&self, quantile: f64) -> Option<f64> {
        self.latencies.as_ref().map(|latencies| latencies.value_at_quantile(quantile) as f64 / 1000.0)
    }
}

impl Rates {
    async fn quiet(&mut self, load: &Load, work: impl Future<Output = ()>) {
        self.quiet.during(load, work).await;
    }

    async fn disturbed(
        &mut self,
        load: &Load,
        work: impl Future<Output = Result<(), etcd_client::Error>>,
    ) -> Result<()> {
        match self.disturbed.during(load, tokio::time::timeout(STRETCH_MAX, work)).await {
            Ok(done) => done?,
            Err(_) => self.unfinished += 1,
        }
        Ok(())
    }

    /// The latencies are those of the disturbed stretches.
    fn figures(&self) -> Result<Figures> {
        ensure!(self.quiet.puts > 0 && self.disturbed.puts > 0, "no put succeeded");
        let (quiet, disturbed) = (self.quiet.rate(), self.disturbed.rate());
        let figures = Figures {
            ops_per_s: Some(disturbed),
            p50_ms: self.disturbed.ms(0.5),
            p99_ms: self.disturbed.ms(0.99),
            p999_ms: self.disturbed.ms(0.999),
            errors: self.errors,
            ..Figures::default()
        };
        Ok(figures
            .with("drop_percent", 100.0 * (1.0 - disturbed / quiet))
            .with("quiet_ops_per_s", quiet)
            .with("unfinished", f64::from(self.unfinished))
            .with("quiet_p99_ms", self.quiet.ms(0.99).unwrap_or(f64::NAN))
            .with("work_s", self.disturbed.time.as_secs_f64() / PAIRS as f64))
    }
}
