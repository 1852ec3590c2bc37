//! Writing single keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use etcd_client::Client;
use hdrhistogram::Histogram;

use super::{BOTH, LIMIT, Row, cpu, ops};
use crate::bench::{Bench, Meter, connections, fill, key};
use crate::figures::Figures;

const KEYS: usize = 10_000;
const VALUE_BYTES: usize = 256;

pub const ROWS: &[Row] = &[Row {
    name: "put",
    load: "256 clients, 100 connections, 256 B, 10,000 keys",
    sides: BOTH,
    goals: &[cpu(0.33), ops(1.8)],
    limit: LIMIT,
    run: |bench| Box::pin(put(bench, 256, 100)),
}];

async fn put(bench: &Bench, clients: usize, conns: usize) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3)).await;
    let connections = connections(&cluster, conns).await;
    fill(&connections, KEYS, VALUE_BYTES).await?;
    load(&connections, clients, bench.warm_up()).await;
    let meter = Meter::start(&cluster);
    let (histogram, errors, took) = load(&connections, clients, bench.time()).await;
    let ms = |q| Some(histogram.value_at_quantile(q) as f64 / 1000.0);
    Ok(Figures {
        ops_per_s: Some(histogram.len() as f64 / took.as_secs_f64()),
        p50_ms: ms(0.5),
        p99_ms: ms(0.99),
        p999_ms: ms(0.999),
        errors,
        ..meter.figures(&cluster, histogram.len())?
    })
}

async fn load(connections: &[Client], clients: usize, time: Duration) -> (Histogram<u64>, u64, Duration) {
    let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let value: Arc<Vec<u8>> = Arc::new((0..VALUE_BYTES).map(|_| rand::random()).collect());
    let started = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|i| {
            let mut client = connections[i % connections.len()].clone();
            let (stop, next, value) = (stop.clone(), next.clone(), value.clone());
            tokio::spawn(async move {
                let mut histogram = Histogram::<u64>::new(3).expect("three digits are allowed");
                let mut errors = 0;
                while !stop.load(Ordering::Relaxed) {
                    let key = key(next.fetch_add(1, Ordering::Relaxed).wrapping_mul(7919) % KEYS);
                    let since = Instant::now();
                    match client.put(key, value.as_slice(), None).await {
                        Ok(_) => histogram.saturating_record(since.elapsed().as_micros() as u64),
                        Err(_) => errors += 1,
                    }
                }
                (histogram, errors)
            })
        })
        .collect();
    tokio::time::sleep(time).await;
    stop.store(true, Ordering::Relaxed);
    let mut all = Histogram::<u64>::new(3).expect("three digits are allowed");
    let mut errors = 0;
    for task in tasks {
        let (histogram, failed) = task.await.expect("the load does not panic");
        all.add(histogram).expect("same shape");
        errors += failed;
    }
    (all, errors, started.elapsed())
}
