//! etcd and Mainstay side by side: the same load by the same foreign client on
//! three nodes each, in turn, on the same machine in one run.
//!
//! The load client shares the machine's cores, so throughput is capped by it;
//! server CPU per operation, over all three nodes, is the figure to compare.
//! It measures and prints; it fails only when something does not work.
//!
//! `cargo bench --bench compare -- [--seconds 15] [--rounds 1] [--etcd PATH] [--only etcd|mainstay]`
#![expect(
    clippy::disallowed_methods,
    reason = "the time that real processes take is measured on the real clock"
)]

#[path = "../../tests/e2e/cluster.rs"]
#[allow(dead_code)]
mod cluster;
#[path = "../../tests/e2e/process.rs"]
#[allow(dead_code)]
mod process;
#[path = "../../tests/e2e/target.rs"]
#[allow(dead_code)]
mod target;
#[path = "../usage.rs"]
#[allow(dead_code)]
mod usage;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::Client;
use hdrhistogram::Histogram;

use cluster::{Cluster, Permit, Spec, connect};
use target::Target;
use usage::{cpu_time, resident_bytes};

const CONNECTIONS: usize = 100;
const CLIENTS: usize = 256;
const KEYS: usize = 10_000;
const VALUE_BYTES: usize = 256;

/// Mainstay's figure must be at most (CPU) or at least (throughput) this part of etcd's.
const FLOORS: [(&str, f64, f64); 2] = [("put", 0.6, 1.3), ("get", 0.35, 1.5)];

#[derive(Clone, Copy, Debug)]
enum Op {
    Put,
    Get,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Put => "put",
            Op::Get => "get",
        }
    }
}

#[derive(Clone, Debug)]
struct Figures {
    ops_per_s: f64,
    p50_ms: f64,
    p99_ms: f64,
    cpu_us_per_op: f64,
    rss_mib: f64,
    errors: u64,
}

struct Options {
    seconds: u64,
    rounds: usize,
    etcd: String,
    only: Option<String>,
}

fn options() -> Options {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)).cloned();
    Options {
        seconds: value("--seconds").and_then(|v| v.parse().ok()).unwrap_or(15),
        rounds: value("--rounds").and_then(|v| v.parse().ok()).unwrap_or(1),
        etcd: value("--etcd").unwrap_or_else(|| "etcd".into()),
        only: value("--only"),
    }
}

fn key(i: usize) -> String {
    format!("bench/{:08}", i % KEYS)
}

async fn load(clients: &[Client], op: Op, time: Duration) -> (Histogram<u64>, u64, Duration) {
    let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let value: Arc<Vec<u8>> = Arc::new((0..VALUE_BYTES).map(|_| rand::random()).collect());
    let started = Instant::now();
    let tasks: Vec<_> = (0..CLIENTS)
        .map(|i| {
            let mut client = clients[i % clients.len()].clone();
            let (stop, next, value) = (stop.clone(), next.clone(), value.clone());
            tokio::spawn(async move {
                let mut histogram = Histogram::<u64>::new(3).expect("three digits are allowed");
                let mut errors = 0;
                while !stop.load(Ordering::Relaxed) {
                    let key = key(next.fetch_add(1, Ordering::Relaxed).wrapping_mul(7919));
                    let since = Instant::now();
                    let ok = match op {
                        Op::Put => client.put(key, value.as_slice(), None).await.is_ok(),
                        Op::Get => client.get(key, None).await.is_ok(),
                    };
                    histogram.record(since.elapsed().as_micros() as u64).expect("it grows as needed");
                    errors += u64::from(!ok);
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

async fn measure(cluster: &Cluster, clients: &[Client], op: Op, seconds: u64) -> Figures {
    // Warm up, so that connections, caches and files are there.
    load(clients, op, Duration::from_secs(seconds.div_ceil(5))).await;
    let cpu = || cluster.nodes.iter().map(|node| cpu_time(node.pid())).sum::<Duration>();
    let before = cpu();
    let (histogram, errors, took) = load(clients, op, Duration::from_secs(seconds)).await;
    let used = cpu() - before;
    let rss: u64 = cluster.nodes.iter().map(|node| resident_bytes(node.pid())).sum();
    Figures {
        ops_per_s: histogram.len() as f64 / took.as_secs_f64(),
        p50_ms: histogram.value_at_quantile(0.5) as f64 / 1000.0,
        p99_ms: histogram.value_at_quantile(0.99) as f64 / 1000.0,
        cpu_us_per_op: used.as_micros() as f64 / histogram.len().max(1) as f64,
        rss_mib: rss as f64 / f64::from(1 << 20),
        errors,
    }
}

async fn run(target: Target, seconds: u64) -> Vec<Figures> {
    let mut cluster = Cluster::prepare(Spec { target, ..Spec::nodes(3) }, Permit::take());
    cluster.start_all();
    cluster.wait_ready().await;
    let mut clients = Vec::new();
    for i in 0..CONNECTIONS {
        clients.push(connect(&[cluster.nodes[i % 3].url()]).await);
    }
    let filled: Vec<_> = (0..KEYS).collect();
    let tasks: Vec<_> = filled
        .chunks(KEYS / 50)
        .enumerate()
        .map(|(i, keys)| {
            let (mut client, keys) = (clients[i % CONNECTIONS].clone(), keys.to_vec());
            tokio::spawn(async move {
                for i in keys {
                    client.put(key(i), vec![b'v'; VALUE_BYTES], None).await.expect("the filling succeeds");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("the filling succeeds");
    }
    let mut figures = Vec::new();
    for op in [Op::Put, Op::Get] {
        figures.push(measure(&cluster, &clients, op, seconds).await);
    }
    figures
}

fn show(name: &str, op: Op, f: &Figures) {
    println!(
        "{name:<10} {:<4} {:>9.0} ops/s  p50 {:>7.2} ms  p99 {:>7.2} ms  server CPU {:>7.1} us/op  RSS {:>6.0} MiB{}",
        op.name(),
        f.ops_per_s,
        f.p50_ms,
        f.p99_ms,
        f.cpu_us_per_op,
        f.rss_mib,
        if f.errors > 0 { format!("  {} ERRORS", f.errors) } else { String::new() },
    );
}

/// The run in the middle by CPU per operation.
fn median(mut runs: Vec<Figures>) -> Figures {
    runs.sort_by(|a, b| a.cpu_us_per_op.total_cmp(&b.cpu_us_per_op));
    runs.swap_remove(runs.len() / 2)
}

fn main() {
    let options = options();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    println!(
        "three nodes each, {CONNECTIONS} connections, {CLIENTS} clients, {KEYS} keys, {VALUE_BYTES}-byte values, \
         {} s per figure, {} round(s), {} cores shared with the load",
        options.seconds,
        options.rounds,
        std::thread::available_parallelism().map_or(0, |n| n.get()),
    );
    let mut by_target: Vec<(&str, Vec<Vec<Figures>>)> = vec![("etcd", Vec::new()), ("mainstay", Vec::new())];
    for _ in 0..options.rounds {
        for (name, runs) in by_target.iter_mut().filter(|(name, _)| wanted(name)) {
            let target = if *name == "etcd" { Target::etcd(&options.etcd) } else { Target::mainstay() };
            let figures = runtime.block_on(run(target, options.seconds));
            for (op, figures) in [Op::Put, Op::Get].into_iter().zip(&figures) {
                show(name, op, figures);
            }
            runs.push(figures);
        }
    }
    if options.only.is_some() {
        return;
    }
    println!("\nmainstay / etcd");
    for (i, (op, cpu_floor, ops_floor)) in FLOORS.into_iter().enumerate() {
        let pick = |n: usize| median(by_target[n].1.iter().map(|figures| figures[i].clone()).collect());
        let (etcd, ours) = (pick(0), pick(1));
        let (cpu, ops) = (ours.cpu_us_per_op / etcd.cpu_us_per_op, ours.ops_per_s / etcd.ops_per_s);
        let verdict = |met: bool| if met { "met" } else { "NOT MET" };
        println!(
            "{op:<4} CPU/op {cpu:.2} (floor {cpu_floor}, {})  ops/s {ops:.2} (floor {ops_floor}, {})  \
             p50 {:.2}  p99 {:.2}  RSS {:.2}",
            verdict(cpu <= cpu_floor),
            verdict(ops >= ops_floor),
            ours.p50_ms / etcd.p50_ms,
            ours.p99_ms / etcd.p99_ms,
            ours.rss_mib / etcd.rss_mib,
        );
    }
}
