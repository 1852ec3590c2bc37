//! What a row is given: clusters of its side, clients, a meter of what the servers use, and how long
//! to measure. It starts and measures; what is loaded is the row's business.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use mainstay::load::{self, Keys, Outcome, Plan, Work};

use crate::cluster::{Cluster, Permit, Spec, connect};
use crate::figures::Figures;
use crate::foreign::Foreign;
use crate::process::Process;
use crate::target::Target;
use crate::usage::{cpu_time, resident_bytes};

/// Keys that most rows use.
pub const KEYS: u64 = 10_000;
/// Size of the values that most rows use.
pub const VALUE_BYTES: usize = 256;

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

/// The neutral client's connections as stores that can be loaded.
pub fn foreign(clients: Vec<Client>) -> Vec<Foreign> {
    clients.into_iter().map(Foreign).collect()
}

/// The first `count` keys of the space that every row uses: what one writes another could read.
pub fn keys(count: u64) -> Keys {
    Keys::new("bench/", "bench/00000000".len(), count).expect("eight digits are enough for any row")
}

/// The key of this number.
pub fn key(i: usize) -> String {
    format!("bench/{i:08}")
}

/// Writes the keys 0 to `keys` with values of this size, several at a time, many in one transaction.
pub async fn fill(clients: &[Client], keys: usize, value_bytes: usize) -> Result<()> {
    let stores = foreign(clients.to_vec());
    let (space, value) = (self::keys(keys as u64), load::value(value_bytes));
    load::fill(&stores, &space, &value, 0..keys as u64, 100).await.context("filling")
}

/// Lets the workers warm up, and measures them for the time of a figure.
pub async fn measure<W: Work>(bench: &Bench, servers: &impl Servers, workers: Vec<W>) -> Result<Figures> {
    let tally = Arc::default();
    let (_, workers) = load::drive(workers, &Plan::for_time(bench.warm_up()), &tally).await;
    let (meter, client) = (Meter::start(servers), cpu_time(std::process::id()));
    let (outcome, _) = load::drive(workers, &Plan::for_time(bench.time()), &tally).await;
    let client = cpu_time(std::process::id()) - client;
    let per_op = client.as_secs_f64() * 1e6 / outcome.ops().max(1) as f64;
    Ok(figures(&outcome, &meter, servers)?.with("client_cpu_us_per_op", per_op))
}

/// An outcome, and what the servers used for it.
///
/// # Errors
/// When more than one operation in a hundred failed: then it is no measurement.
pub fn figures(outcome: &Outcome, meter: &Meter, servers: &impl Servers) -> Result<Figures> {
    let used = meter.figures(servers, outcome.ops())?;
    Ok(Figures { cpu_us_per_op: used.cpu_us_per_op, rss_mib: used.rss_mib, ..felt(outcome)? })
}

/// An outcome as the clients saw it.
///
/// # Errors
/// When more than one operation in a hundred failed: then it is no measurement.
pub fn felt(outcome: &Outcome) -> Result<Figures> {
    let failures = || {
        let worst = outcome.failures.iter().max_by_key(|(_, times)| **times);
        worst.map_or("nothing was done".to_owned(), |(what, times)| format!("{times} times: {what}"))
    };
    ensure!(
        outcome.ops() > 100 * outcome.errors(),
        "{} of {} failed; {}",
        outcome.errors(),
        outcome.ops() + outcome.errors(),
        failures()
    );
    Ok(Figures {
        ops_per_s: Some(outcome.ops_per_s()),
        p50_ms: Some(outcome.quantile_ms(0.5)),
        p99_ms: Some(outcome.quantile_ms(0.99)),
        p999_ms: Some(outcome.quantile_ms(0.999)),
        errors: outcome.errors(),
        ..Figures::default()
    })
}

/// Processes that are measured together.
pub trait Servers {
    /// Those that run.
    fn pids(&self) -> Vec<u32>;
}

impl Servers for Cluster {
    fn pids(&self) -> Vec<u32> {
        self.nodes.iter().filter_map(|node| node.process.as_ref()).map(Process::pid).collect()
    }
}

impl Servers for Process {
    fn pids(&self) -> Vec<u32> {
        vec![self.pid()]
    }
}

/// What the servers use from now on.
#[derive(Debug)]
pub struct Meter {
    cpu: Duration,
    rss: u64,
}

impl Meter {
    /// Begins.
    pub fn start(servers: &impl Servers) -> Meter {
        Meter { cpu: cpu(servers), rss: rss(servers) }
    }

    /// CPU time of all nodes since the beginning.
    pub fn cpu(&self, servers: &impl Servers) -> Duration {
        cpu(servers).saturating_sub(self.cpu)
    }

    /// By how many MiB the nodes' memory has grown; below zero if it has shrunk.
    pub fn growth_mib(&self, servers: &impl Servers) -> f64 {
        mib(rss(servers)) - mib(self.rss)
    }

    /// CPU per operation and memory, of `ops` operations since the beginning.
    pub fn figures(&self, servers: &impl Servers, ops: u64) -> Result<Figures> {
        ensure!(ops > 0, "not one operation succeeded");
        Ok(Figures {
            cpu_us_per_op: Some(self.cpu(servers).as_secs_f64() * 1e6 / ops as f64),
            rss_mib: Some(rss_mib(servers)),
            ..Figures::default()
        })
    }
}

/// Resident memory of all nodes that run, in MiB.
pub fn rss_mib(servers: &impl Servers) -> f64 {
    mib(rss(servers))
}

fn rss(servers: &impl Servers) -> u64 {
    servers.pids().into_iter().map(resident_bytes).sum()
}

fn cpu(servers: &impl Servers) -> Duration {
    servers.pids().into_iter().map(cpu_time).sum()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
