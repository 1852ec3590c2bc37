//! What a row is given: clusters of its side, clients, a meter of what the servers use, and how long
//! to measure. It starts and measures; what is loaded is the row's business.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::Client;

use crate::cluster::{Cluster, Permit, Spec, connect};
use crate::figures::Figures;
use crate::target::Target;
use crate::usage::{cpu_time, resident_bytes};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// etcd.
    Etcd,
    /// Mainstay.
    Mainstay,
    /// A server that does nothing, for what a call costs at least.
    Bare,
}

impl Side {
    /// The word for it in arguments, results and charts.
    pub fn name(self) -> &'static str {
        match self {
            Side::Etcd => "etcd",
            Side::Mainstay => "mainstay",
            Side::Bare => "bare",
        }
    }

    /// The side of this name.
    pub fn of(name: &str) -> Option<Side> {
        [Side::Etcd, Side::Mainstay, Side::Bare].into_iter().find(|side| side.name() == name)
    }
}

/// One measurement of one row on one side.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Who is measured.
    pub side: Side,
    /// How long one figure is measured.
    pub seconds: u64,
    /// Whether this only shows that everything works.
    pub smoke: bool,
    /// The program of the side; of the bare side, Mainstay's.
    pub target: Target,
}

impl Bench {
    /// How long one figure is measured.
    pub fn time(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// How long the load runs unmeasured first, so that connections, caches and files are there.
    pub fn warm_up(&self) -> Duration {
        self.time() / 5
    }

    /// `full`, or a fiftieth of it (at least one) when this only shows that everything works.
    pub fn scaled(&self, full: usize) -> usize {
        if self.smoke { full.div_ceil(50) } else { full }
    }

    /// Settings for a cluster of the side; the row may add flags.
    pub fn spec(&self, nodes: usize) -> Spec {
        Spec { target: self.target.clone(), ..Spec::nodes(nodes) }
    }

    /// A new cluster that serves.
    pub async fn cluster(&self, spec: Spec) -> Cluster {
        let mut cluster = Cluster::prepare(spec, Permit::uncounted());
        cluster.start_all();
        cluster.wait_ready().await;
        cluster
    }
}

/// `count` connections, spread evenly over the nodes.
pub async fn connections(cluster: &Cluster, count: usize) -> Vec<Client> {
    let mut clients = Vec::with_capacity(count);
    for i in 0..count {
        clients.push(connect(&[cluster.nodes[i % cluster.nodes.len()].url()]).await);
    }
    clients
}

/// The key of this number. Every row that reads finds what [`fill`] wrote.
pub fn key(i: usize) -> String {
    format!("bench/{i:08}")
}

/// Writes the keys 0 to `keys` with values of this size, several at a time, many in one transaction.
pub async fn fill(clients: &[Client], keys: usize, value_bytes: usize) -> Result<()> {
    const AT_ONCE: usize = 16;
    const PER_TXN: usize = 100;
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..AT_ONCE {
        let mut client = clients[worker % clients.len()].clone();
        tasks.spawn(async move {
            let value: Vec<u8> = (0..value_bytes).map(|_| rand::random()).collect();
            for first in (worker * PER_TXN..keys).step_by(AT_ONCE * PER_TXN) {
                let puts = (first..keys.min(first + PER_TXN))
                    .map(|i| etcd_client::TxnOp::put(key(i), value.clone(), None))
                    .collect::<Vec<_>>();
                client.txn(etcd_client::Txn::new().and_then(puts)).await.context("filling")?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

/// What the servers use from now on.
#[derive(Debug)]
pub struct Meter {
    cpu: Duration,
    rss: u64,
}

impl Meter {
    /// Begins.
    pub fn start(cluster: &Cluster) -> Meter {
        Meter { cpu: cpu(cluster), rss: rss(cluster) }
    }

    /// CPU time of all nodes since the beginning.
    pub fn cpu(&self, cluster: &Cluster) -> Duration {
        cpu(cluster).saturating_sub(self.cpu)
    }

    /// By how many MiB the nodes' memory has grown; below zero if it has shrunk.
    pub fn growth_mib(&self, cluster: &Cluster) -> f64 {
        mib(rss(cluster)) - mib(self.rss)
    }

    /// CPU per operation and memory, of `ops` operations since the beginning.
    pub fn figures(&self, cluster: &Cluster, ops: u64) -> Result<Figures> {
        ensure!(ops > 0, "not one operation succeeded");
        Ok(Figures {
            cpu_us_per_op: Some(self.cpu(cluster).as_secs_f64() * 1e6 / ops as f64),
            rss_mib: Some(rss_mib(cluster)),
            ..Figures::default()
        })
    }
}

/// Resident memory of all nodes that run, in MiB.
pub fn rss_mib(cluster: &Cluster) -> f64 {
    mib(rss(cluster))
}

fn rss(cluster: &Cluster) -> u64 {
    running(cluster).map(resident_bytes).sum()
}

fn cpu(cluster: &Cluster) -> Duration {
    running(cluster).map(cpu_time).sum()
}

fn running(cluster: &Cluster) -> impl Iterator<Item = u32> + '_ {
    cluster.nodes.iter().filter_map(|node| node.process.as_ref()).map(|process| process.pid())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
