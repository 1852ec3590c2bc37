//! Watches: many watchers of the same changes, many that see none, and some that begin in the past.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use mainstay::load::{self, Audience, Plan, Until, WatchFrom, catch_up, value, watch_all};

use super::{BOTH, Bound, Goal, LIMIT, Row, cpu, ops};
use crate::bench::{Bench, KEYS, Meter, VALUE_BYTES, connections, figures, foreign, keys};
use crate::figures::Figures;

const WATCHERS: usize = 1_000;
/// Few enough that neither side nor the client is at its end: a delay then is the server's.
const WRITES_PER_S: f64 = 20.0;
const STREAMS: usize = 10_000;
const OLD_EVENTS: usize = 1_000_000;
const LATE_WATCHERS: usize = 10;
/// etcd reads the whole rest of the history for each thousand revisions of a watcher, which may take it
/// an hour; the rate shows long before.
const LATE_LIMIT: Duration = Duration::from_secs(60);

pub const ROWS: &[Row] = &[
    Row {
        name: "watch-fan-out",
        load: "1,000 watchers of one prefix on 100 connections, 20 puts of 256 B per second; per event delivered",
        sides: BOTH,
        goals: &[cpu(0.2), Goal { metric: "p99_ms", bound: Bound::AtMostOfEtcd(0.5) }],
        limit: LIMIT,
        run: |bench| Box::pin(fan_out(bench)),
    },
    Row {
        name: "watch-idle",
        load: "10,000 streams on 10 connections, no event; growth of all nodes' memory per stream",
        sides: BOTH,
        goals: &[Goal { metric: "kib_per_stream", bound: Bound::AtMostOfEtcd(0.35) }],
        limit: LIMIT,
        run: |bench| Box::pin(idle(bench)),
    },
    Row {
        name: "watch-catch-up",
        load: "10 watchers from revision 1 on, 1,000,000 events of 256 B each, for 60 s at the most; per event delivered",
        sides: BOTH,
        goals: &[ops(3.0), Goal { metric: "peak_growth_mib", bound: Bound::AtMost(100.0) }],
        limit: Duration::from_secs(900),
        run: |bench| Box::pin(late(bench)),
    },
];

async fn fan_out(bench: &Bench) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3)).await;
    let stores = foreign(connections(&cluster, 100).await);
    let audience = Audience::come(&stores, bench.scaled(WATCHERS), &keys(KEYS), &Arc::default()).await;
    let audience = audience.context("opening the watches")?;
    let plan = |time| Plan { rate: Some(WRITES_PER_S), until: Until::Time(time) };
    let value = value(VALUE_BYTES);
    audience.watch(&stores, 16, &value, &plan(bench.warm_up())).await;
    let meter = Meter::start(&cluster);
    let outcome = audience.watch(&stores, 16, &value, &plan(bench.time())).await;
    figures(&outcome, &meter, &cluster)
}

async fn idle(bench: &Bench) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3)).await;
    let stores = foreign(connections(&cluster, 10).await);
    let (key, end) = keys(KEYS).range();
    let from = WatchFrom { key, end, revision: 0 };
    let streams = bench.scaled(STREAMS);
    // The connections are there before the memory is looked at.
    let few = watch_all(&stores, stores.len(), &from).await.context("the first watches")?;
    let settle = tokio::time::sleep(Duration::from_secs(if bench.smoke { 1 } else { 3 }));
    settle.await;
    let meter = Meter::start(&cluster);
    let many = watch_all(&stores, streams, &from).await.context("opening the watches")?;
    let opening = meter.cpu(&cluster);
    let quiet = Meter::start(&cluster);
    tokio::time::sleep(bench.time()).await;
    let growth_kib = meter.growth_mib(&cluster) * 1024.0;
    let all = few.len() + many.len();
    Ok(Figures { rss_mib: Some(crate::bench::rss_mib(&cluster)), ..Figures::default() }
        .with("kib_per_stream", growth_kib / streams as f64)
        .with("streams", all as f64)
        .with("open_cpu_us", opening.as_secs_f64() * 1e6 / streams as f64)
        .with("idle_cpu_ms_per_s", quiet.cpu(&cluster).as_secs_f64() * 1e3 / bench.time().as_secs_f64()))
}

async fn late(bench: &Bench) -> Result<Figures> {
    /// Few enough that etcd's batch of a thousand revisions stays a message of usual size.
    const PUTS_PER_TXN: u64 = 10;
    let cluster = bench.cluster(bench.spec(3)).await;
    let stores = foreign(connections(&cluster, LATE_WATCHERS).await);
    let (keys, events) = (keys(KEYS), bench.scaled(OLD_EVENTS) as u64);
    load::fill(&stores, &keys, &value(VALUE_BYTES), 0..events, PUTS_PER_TXN).await.context("filling")?;
    // What the writing has left to do is not the reading's.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (key, end) = keys.range();
    let from = WatchFrom { key, end, revision: 1 };
    let meter = Meter::start(&cluster);
    let reading = catch_up(&stores, LATE_WATCHERS, &from, events, LATE_LIMIT);
    let (caught, peak) = with_peak(&meter, &cluster, reading).await;
    let (took, came) = caught.context("catching up")?;
    let used = meter.figures(&cluster, came)?;
    Ok(Figures { ops_per_s: Some(came as f64 / took.as_secs_f64()), ..used }
        .with("peak_growth_mib", peak)
        .with("delivered_percent", 100.0 * came as f64 / (events * LATE_WATCHERS as u64) as f64))
}

/// Waits for something, and says how far the nodes' memory grew meanwhile at most, in MiB.
async fn with_peak<T>(
    meter: &Meter,
    cluster: &crate::cluster::Cluster,
    work: impl Future<Output = T>,
) -> (T, f64) {
    let mut look = tokio::time::interval(Duration::from_millis(20));
    let (mut work, mut peak) = (std::pin::pin!(work), 0.0_f64);
    loop {
        tokio::select! {
            done = &mut work => return (done, peak.max(meter.growth_mib(cluster))),
            _ = look.tick() => peak = peak.max(meter.growth_mib(cluster)),
        }
    }
}
