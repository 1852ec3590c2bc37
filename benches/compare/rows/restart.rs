//! How long a node that holds a million keys takes from its start to its first answer.
//!
//! It is killed, not stopped, so that it has to recover what it had not written to its tables; and
//! stopped, for comparison. Its files are in the page cache on both sides: after a crash of the
//! process, not of the machine.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::{Client, GetOptions};
use rustix::process::Signal;

use super::{BOTH, Bound, Goal, Row};
use crate::bench::{Bench, connections, key};
use crate::cluster::Cluster;
use crate::figures::Figures;
use crate::kept::{self, Content};
use crate::limit::warm;
use crate::usage::cpu_time;

const CONTENT: Content = Content { name: "million", keys: 1_000_000, value_bytes: 256, per_txn: 100 };
/// Single puts before each end, so that there is something to recover.
const RECENT: Content = Content { name: "recent", keys: 20_000, value_bytes: 256, per_txn: 1 };
const REPEATS: usize = 5;
const STOP_LIMIT: Duration = Duration::from_secs(60);
const READY_LIMIT: Duration = Duration::from_secs(120);

pub const ROWS: &[Row] = &[Row {
    name: "restart",
    load: "one node with 1 M keys of 256 B, from kill -9 to its first linearizable answer",
    sides: BOTH,
    goals: &[Goal { metric: "ready_ms", bound: Bound::AtMostOfEtcd(0.2) }],
    limit: Duration::from_secs(600),
    run: |bench| Box::pin(restart(bench)),
}];

async fn restart(bench: &Bench) -> Result<Figures> {
    let content = Content { keys: bench.scaled(CONTENT.keys), ..CONTENT };
    let mut node = kept::cluster(bench, content).await?;
    let (mut killed, mut stopped, mut stale, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    start(&mut node, content.keys).await?;
    for _ in 0..if bench.smoke { 1 } else { REPEATS } {
        write_recent(bench, &node).await?;
        node.kill_all();
        warm(&node.nodes[0].data_dir)?;
        let ready = start(&mut node, content.keys).await?;
        killed.push(ready.linearizable);
        stale.push(ready.serializable);
        cpu.push(cpu_time(node.nodes[0].pid()).as_secs_f64() * 1000.0);
        write_recent(bench, &node).await?;
        node.nodes[0].signal(Signal::TERM);
        node.nodes[0].wait_exit(STOP_LIMIT).await;
        stopped.push(start(&mut node, content.keys).await?.linearizable);
    }
    Ok(Figures::default()
        .with("ready_ms", median(killed))
        .with("serializable_ready_ms", median(stale))
        .with("ready_after_stop_ms", median(stopped))
        .with("start_cpu_ms", median(cpu)))
}

async fn write_recent(bench: &Bench, node: &Cluster) -> Result<()> {
    let clients = connections(node, 4).await;
    kept::fill(&clients, Content { keys: bench.scaled(RECENT.keys), ..RECENT }).await
}

struct Ready {
    serializable: f64,
    linearizable: f64,
}

/// Starts the node; how many milliseconds it took until it answered reads of either kind.
async fn start(node: &mut Cluster, keys: usize) -> Result<Ready> {
    let since = Instant::now();
    node.start_all();
    let mut client = node.client(0).await;
    let mut answered = async |options: Option<GetOptions>| {
        while !has_all(&mut client, keys, options.clone()).await {
            let running = node.nodes[0].process.as_mut().is_some_and(|process| process.is_running());
            ensure!(running, "the node has ended:\n{}", crate::cluster::tail(&node.nodes[0].log_text(), 10));
            ensure!(since.elapsed() < READY_LIMIT, "the node is not ready after {READY_LIMIT:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(since.elapsed().as_secs_f64() * 1000.0)
    };
    let serializable = answered(Some(GetOptions::new().with_serializable())).await?;
    Ok(Ready { serializable, linearizable: answered(None).await? })
}

/// Whether the last key is there. A node that answers before it has its data is not ready.
async fn has_all(client: &mut Client, keys: usize, options: Option<GetOptions>) -> bool {
    client.get(key(keys - 1), options).await.is_ok_and(|answer| answer.kvs().len() == 1)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
