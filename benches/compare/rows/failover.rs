//! For how long nothing is acknowledged after the leader was killed.
//!
//! A new put begins every few milliseconds at the members that survive, whether earlier ones were
//! answered or not: a put that waits for a dead leader must not hide that a later one would succeed.
//! The gap is the longest time between two acknowledgements around the kill.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::Client;
use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::{BOTH, Bound, Goal, Row};
use crate::bench::{Bench, key};
use crate::cluster::Cluster;
use crate::figures::Figures;

/// Kills in one measurement.
const KILLS: usize = 7;
const PUT_INTERVAL: Duration = Duration::from_millis(4);
/// Steady load before a kill.
const BEFORE: Duration = Duration::from_secs(2);
/// A gap that lasts longer fails the row.
const GAP_LIMIT: Duration = Duration::from_secs(30);
/// Acknowledgements go on for as long before the gap is over: one stray answer does not end it.
const AFTER: Duration = Duration::from_secs(1);
const KEYS: usize = 1000;
const VALUE_BYTES: usize = 256;

pub const ROWS: &[Row] = &[Row {
    name: "fail-over",
    load: "kill -9 of the leader under 250 puts per second at the other two",
    sides: BOTH,
    goals: &[Goal { metric: "gap_ms", bound: Bound::AtMostOfEtcd(1.0) }],
    limit: Duration::from_secs(300),
    run: |bench| Box::pin(fail_over(bench)),
}];

async fn fail_over(bench: &Bench) -> Result<Figures> {
    let mut cluster = bench.cluster(bench.spec(3)).await;
    let mut gaps = Vec::new();
    for _ in 0..if bench.smoke { 1 } else { KILLS } {
        gaps.push(gap(&mut cluster).await?.as_secs_f64() * 1000.0);
        cluster.start_all();
        cluster.wait_ready().await;
    }
    gaps.sort_by(f64::total_cmp);
    let worst = gaps[gaps.len() - 1];
    Ok(Figures::default()
        .with("gap_ms", gaps[gaps.len() / 2])
        .with("gap_worst_ms", worst)
        .with("gap_best_ms", gaps[0])
        .with("kills", gaps.len() as f64))
}

/// Kills the leader once.
async fn gap(cluster: &mut Cluster) -> Result<Duration> {
    let leader = cluster.leader().await;
    let mut survivors = Vec::new();
    for i in (0..cluster.nodes.len()).filter(|i| *i != leader) {
        survivors.push(cluster.client(i).await);
    }
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let load = tokio::spawn(puts(survivors, acknowledged.clone()));
    tokio::time::sleep(BEFORE).await;
    let killed = Instant::now();
    cluster.nodes[leader].kill();
    let gap = loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let times = acknowledged.lock().clone();
        ensure!(killed.elapsed() < GAP_LIMIT, "nothing was acknowledged in {GAP_LIMIT:?} after the kill");
        let late = times.iter().filter(|at| **at > killed + Duration::from_millis(100));
        if late.min().is_some_and(|first| first.elapsed() > AFTER) {
            break longest(times, killed);
        }
    };
    load.abort();
    gap
}

/// The longest time between two acknowledgements, of which the later one is after the kill.
fn longest(mut times: Vec<Instant>, killed: Instant) -> Result<Duration> {
    times.sort();
    let pairs = times.windows(2).filter(|pair| pair[1] > killed);
    let gap = pairs.map(|pair| pair[1] - pair[0]).max();
    gap.ok_or_else(|| anyhow::anyhow!("no put was acknowledged before the kill"))
}

/// Begins a put every [`PUT_INTERVAL`], at each member in turn, until it is dropped.
async fn puts(members: Vec<Client>, acknowledged: Arc<Mutex<Vec<Instant>>>) {
    let mut running = JoinSet::new();
    let mut tick = tokio::time::interval(PUT_INTERVAL);
    for i in 0.. {
        tick.tick().await;
        let mut client = members[i % members.len()].clone();
        let acknowledged = acknowledged.clone();
        running.spawn(async move {
            if client.put(key(i % KEYS), [b'v'; VALUE_BYTES].as_slice(), None).await.is_ok() {
                acknowledged.lock().push(Instant::now());
            }
        });
        while running.try_join_next().is_some() {}
    }
}
