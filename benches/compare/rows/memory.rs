//! A store that is larger than the memory its node may use: what random reads cost against the same
//! node with memory for all of it.
//!
//! The kernel holds the limit (a control group): the page cache counts, the load's own memory does
//! not. Without the right to make such a group the row is skipped, and says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{BOTH, Bound, Goal, Row};
use crate::bench::{Bench, connections, key};
use crate::cluster::Cluster;
use crate::figures::Figures;
use crate::kept::{self, Content};
use crate::limit::{MemoryLimit, forget, warm};

/// 4 GB, in values of the size of a larger settings file.
const CONTENT: Content = Content { name: "large", keys: 1_000_000, value_bytes: 4096, per_txn: 16 };
const LIMIT_BYTES: u64 = 1 << 30;
/// etcd reads its whole store when it starts.
const READY_LIMIT: Duration = Duration::from_secs(240);
/// How long reads may take to fill the memory.
const FULL_LIMIT: Duration = Duration::from_secs(30);
const CONNECTIONS: usize = 100;
const CLIENTS: usize = 256;

pub const ROWS: &[Row] = &[Row {
    name: "larger-than-memory",
    load: "random reads of 4 GB by 256 clients, one node limited to 1 GiB",
    sides: BOTH,
    goals: &[Goal { metric: "of_cached_rate", bound: Bound::AtLeast(0.5) }],
    limit: Duration::from_secs(900),
    run: |bench| Box::pin(measure(bench)),
}];

async fn measure(bench: &Bench) -> Result<Figures> {
    // Below this a node does not even start.
    let limit_bytes = (bench.scaled(LIMIT_BYTES as usize) as u64).max(256 << 20);
    let limit = match MemoryLimit::new(limit_bytes) {
        Ok(limit) => limit,
        Err(error) => {
            eprintln!(
                "######## SKIPPED: larger-than-memory needs a memory control group: {error:#} ########"
            );
            return Ok(Figures::default());
        }
    };
    let content = Content { keys: bench.scaled(CONTENT.keys), ..CONTENT };
    let mut node = kept::cluster(bench, content).await?;
    warm(&node.nodes[0].data_dir)?;
    node.start_all();
    wait_ready(&mut node).await?;
    warm(&node.nodes[0].data_dir)?;
    let cached = reads(bench, &node, content.keys, &|| true).await;
    node.kill_all();
    forget(&node.nodes[0].data_dir)?;
    let started = Instant::now();
    node.start_all();
    limit.take(node.nodes[0].pid())?;
    let ready = wait_ready(&mut node).await;
    let ready_s = started.elapsed().as_secs_f64();
    // Not to come up is an answer too; why is said here, and not to be guessed from a zero.
    let limited = match &ready {
        Ok(()) => reads(bench, &node, content.keys, &|| limit.peak_bytes() > limit_bytes / 10 * 9).await,
        Err(error) => {
            eprintln!("larger-than-memory, {}: with the limit, {error:#}", bench.side.name());
            Reads::default()
        }
    };
    ensure!(cached.done > 0, "not one read succeeded");
    Ok(Figures {
        ops_per_s: Some(limited.rate),
        errors: cached.errors + limited.errors,
        ..Figures::default()
    }
    .with("cached_ops_per_s", cached.rate)
    .with("of_cached_rate", limited.rate / cached.rate)
    .with("ready_s", if ready.is_ok() { ready_s } else { f64::NAN })
    .with("not_ready", f64::from(u8::from(ready.is_err())))
    .with("peak_mib", limit.peak_bytes() as f64 / f64::from(1 << 20))
    .with("killed_for_memory", limit.kills() as f64))
}

async fn wait_ready(node: &mut Cluster) -> Result<()> {
    let until = Instant::now() + READY_LIMIT;
    let mut client = node.client(0).await;
    loop {
        let running = node.nodes[0].process.as_mut().is_some_and(|process| process.is_running());
        ensure!(running, "the node has ended:\n{}", crate::cluster::tail(&node.nodes[0].log_text(), 10));
        if client.get(key(0), None).await.is_ok() {
            return Ok(());
        }
        ensure!(Instant::now() < until, "the node is not ready after {READY_LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[derive(Debug, Default)]
struct Reads {
    done: u64,
    rate: f64,
    errors: u64,
}

/// Random reads of all keys by all clients. They are measured from when the node's memory is `full`: before
/// that every read is the first one of its block.
async fn reads(bench: &Bench, node: &Cluster, keys: usize, full: &dyn Fn() -> bool) -> Reads {
    let clients = connections(node, CONNECTIONS).await;
    let (done, errors) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..CLIENTS {
        let mut client = clients[i % clients.len()].clone();
        let (done, errors) = (done.clone(), errors.clone());
        tasks.spawn(async move {
            loop {
                let ok = client.get(key(rand::random_range(0..keys)), None).await.is_ok();
                let count = if ok { &done } else { &errors };
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let begun = Instant::now();
    while begun.elapsed() < bench.warm_up() || (!full() && begun.elapsed() < FULL_LIMIT) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (before, failed_before, since) =
        (done.load(Ordering::Relaxed), errors.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(bench.time()).await;
    let done = done.load(Ordering::Relaxed) - before;
    let rate = done as f64 / since.elapsed().as_secs_f64();
    tasks.shutdown().await;
    Reads { done, rate, errors: errors.load(Ordering::Relaxed) - failed_before }
}
