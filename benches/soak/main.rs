//! Ten minutes at full write rate, with a follower paused again and again
//! until it needs a snapshot, and leaders that change while it installs one.
//!
//! At the end three live nodes that never restarted, flat memory, equal
//! hashes; then the fail-over gap and the memory of an idle node. Ends with
//! code 1 if any of that does not hold.
//!
//! `cargo bench --bench soak -- [--minutes 10] [--value-bytes 1024] [--etcd PATH]`
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

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use cluster::{Cluster, Permit, Spec, connect};
use target::Target;
use usage::resident_bytes;

const WRITERS: usize = 64;
const KEYS: u64 = 10_000;
/// Entries between snapshots and kept in the log: small, so that a pause outlasts them.
const RETENTION: u64 = 20_000;
const IDLE_LIMIT_MIB: f64 = 64.0;
/// What an idle node's caches may take beside that, as configured below.
const CACHES_MIB: f64 = 64.0 + 64.0;

struct Options {
    minutes: f64,
    value_bytes: usize,
    etcd: Option<String>,
}

fn options() -> Options {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)).cloned();
    Options {
        minutes: value("--minutes").and_then(|v| v.parse().ok()).unwrap_or(10.0),
        value_bytes: value("--value-bytes").and_then(|v| v.parse().ok()).unwrap_or(1024),
        etcd: value("--etcd"),
    }
}

fn spec(target: &Target) -> Spec {
    let spec = Spec { target: target.clone(), ..Spec::nodes(3) }
        .flag("snapshot-count", RETENTION)
        .flag("quota-backend-bytes", 8u64 << 30)
        .flag("auto-compaction-mode", "revision")
        .flag("auto-compaction-retention", 50_000);
    match target {
        Target::Mainstay(_) => spec.flag("log-retention-entries", RETENTION),
        Target::Etcd(..) => spec,
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

async fn write(
    endpoint: String,
    writer: u64,
    value: Arc<Vec<u8>>,
    stop: Arc<AtomicBool>,
    counts: Arc<[AtomicU64; 2]>,
) {
    let mut client = connect(&[endpoint]).await;
    let mut i = writer;
    while !stop.load(Ordering::Relaxed) {
        i += WRITERS as u64;
        let call = client.put(format!("soak/{:06}", i % KEYS), value.as_slice(), None);
        let ok = matches!(tokio::time::timeout(Duration::from_secs(10), call).await, Ok(Ok(_)));
        counts[usize::from(!ok)].fetch_add(1, Ordering::Relaxed);
        if !ok {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn index(cluster: &Cluster, node: usize) -> Option<u64> {
    let call = async { cluster.client(node).await.status().await };
    match tokio::time::timeout(Duration::from_secs(3), call).await {
        Ok(Ok(status)) => Some(status.raft_applied_index()),
        _ => None,
    }
}

/// Pauses a follower until the log it needs is gone, lets the leader change while it catches up, and
/// waits until it has. Gives how long catching up took.
async fn pause_round(cluster: &mut Cluster, round: u64, time_left: Duration) -> Option<Duration> {
    let follower = cluster.follower().await;
    let leader = cluster.leader().await;
    let from = index(cluster, leader).await?;
    cluster.nodes[follower].signal(Signal::STOP);
    let limit = Instant::now() + time_left.min(Duration::from_secs(60));
    while Instant::now() < limit
        && index(cluster, leader).await.is_none_or(|now| now < from + RETENTION * 5 / 2)
    {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    cluster.nodes[follower].signal(Signal::CONT);
    let since = Instant::now();
    if round % 2 == 1 {
        // A leader change while the snapshot is on its way, which is where libraries have broken.
        tokio::time::sleep(Duration::from_millis(300 * (round % 5))).await;
        let other = (0..3).find(|i| *i != follower && *i != leader).expect("three nodes");
        let id = cluster.member_id(other).await;
        let _ = cluster.client(leader).await.move_leader(id).await;
    }
    let limit = Instant::now() + Duration::from_secs(180);
    loop {
        let (mine, head) = (index(cluster, follower).await, index(cluster, cluster.leader().await).await);
        if let (Some(mine), Some(head)) = (mine, head)
            && mine + RETENTION / 4 > head
        {
            return Some(since.elapsed());
        }
        assert!(Instant::now() < limit, "the paused follower never catches up: {mine:?} of {head:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn soak(options: &Options, target: &Target, failures: &mut Vec<String>) {
    let mut cluster = Cluster::prepare(spec(target), Permit::take());
    cluster.start_all();
    cluster.wait_ready().await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    for node in &cluster.nodes {
        let idle = mib(resident_bytes(node.pid()));
        println!("idle {}: {idle:.0} MiB resident", node.name);
        if idle > IDLE_LIMIT_MIB + CACHES_MIB {
            failures.push(format!("{} takes {idle:.0} MiB idle", node.name));
        }
    }
    let pids: Vec<u32> = cluster.nodes.iter().map(|node| node.pid()).collect();
    let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new([AtomicU64::new(0), AtomicU64::new(0)]));
    let value: Arc<Vec<u8>> = Arc::new((0..options.value_bytes).map(|_| rand::random()).collect());
    let writers: Vec<_> = (0..WRITERS)
        .map(|i| {
            let endpoint = cluster.nodes[i % 3].url();
            tokio::spawn(write(endpoint, i as u64, value.clone(), stop.clone(), counts.clone()))
        })
        .collect();
    let time = Duration::from_secs_f64(options.minutes * 60.0);
    let (began, mut round, mut samples) = (Instant::now(), 0, Vec::new());
    while began.elapsed() < time {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let caught_up = pause_round(&mut cluster, round, time.saturating_sub(began.elapsed())).await;
        round += 1;
        let rss: Vec<f64> = pids.iter().map(|pid| mib(resident_bytes(*pid))).collect();
        println!(
            "{:>4.0} s: round {round}, {} written, {} failed, caught up in {caught_up:?}, RSS {rss:.0?} MiB",
            began.elapsed().as_secs_f64(),
            counts[0].load(Ordering::Relaxed),
            counts[1].load(Ordering::Relaxed),
        );
        samples.push((began.elapsed(), rss.iter().copied().fold(0.0, f64::max)));
        for (i, pid) in pids.iter().enumerate() {
            if cluster.nodes[i]
                .process
                .as_mut()
                .is_none_or(|process| !process.is_running() || process.pid() != *pid)
            {
                failures.push(format!("{} died in round {round}", cluster.nodes[i].name));
                cluster.print_logs();
                return;
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("a writer does not panic");
    }
    println!(
        "{:.0} writes/s over {:?}",
        counts[0].load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64(),
        began.elapsed()
    );
    memory_is_flat(&samples, time, failures);
    hashes_are_equal(&cluster, failures).await;
    fail_over(&mut cluster, target, failures).await;
}

/// The last third may not need much more than the second: the first fills caches.
fn memory_is_flat(samples: &[(Duration, f64)], time: Duration, failures: &mut Vec<String>) {
    let peak = |from: f64, to: f64| {
        let inside =
            samples.iter().filter(|(at, _)| (from..to).contains(&(at.as_secs_f64() / time.as_secs_f64())));
        inside.map(|(_, rss)| *rss).fold(0.0, f64::max)
    };
    let (middle, last) = (peak(0.33, 0.66), peak(0.66, f64::MAX));
    println!("memory: peak {middle:.0} MiB in the second third, {last:.0} MiB in the last");
    if middle > 0.0 && last > middle * 1.2 + 16.0 {
        failures.push(format!("memory grows: {middle:.0} to {last:.0} MiB"));
    }
}

async fn hashes_are_equal(cluster: &Cluster, failures: &mut Vec<String>) {
    let mut revisions = Vec::new();
    for i in 0..3 {
        let got = cluster.client(i).await.get("soak/000000", None).await.expect("the node answers");
        revisions.push(got.header().expect("every answer has one").revision());
    }
    let mut hashes = Vec::new();
    for i in 0..3 {
        let hash = cluster.client(i).await.hash_kv(revisions[0]).await.expect("the node answers");
        hashes.push((hash.hash(), hash.compact_version()));
    }
    println!("hashes at revision {}: {hashes:x?}", revisions[0]);
    if hashes.iter().any(|hash| *hash != hashes[0]) {
        failures.push(format!("hashes differ: {hashes:x?}"));
    }
}

async fn fail_over(cluster: &mut Cluster, target: &Target, failures: &mut Vec<String>) {
    let mut gaps = Vec::new();
    for _ in 0..3 {
        let leader = cluster.leader().await;
        let mut client = cluster.client((leader + 1) % 3).await;
        let since = Instant::now();
        cluster.nodes[leader].kill();
        loop {
            let call = client.put("gap", "v", None);
            if matches!(tokio::time::timeout(Duration::from_millis(500), call).await, Ok(Ok(_))) {
                break;
            }
            assert!(since.elapsed() < Duration::from_secs(60), "no fail-over");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        gaps.push(since.elapsed());
        cluster.start_all();
        cluster.wait_ready().await;
    }
    println!("fail-over gaps: {gaps:?}");
    gaps.sort();
    if gaps[1] > Duration::from_secs(2) && matches!(target, Target::Mainstay(_)) {
        failures.push(format!("fail-over takes {:?}", gaps[1]));
    }
}

fn main() -> ExitCode {
    let options = options();
    let target = options.etcd.as_deref().map_or_else(Target::mainstay, Target::etcd);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let mut failures = Vec::new();
    runtime.block_on(soak(&options, &target, &mut failures));
    for failure in &failures {
        println!("FAILED: {failure}");
    }
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
