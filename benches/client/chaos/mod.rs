//! A cluster under kill -9: every five seconds a random node dies and comes
//! back, while clients read at three consistencies, write with request ids, and
//! hold subscriptions. It prints what happened and ends with code 1 if any
//! promise was broken.
//!
//! `cargo bench --bench client -- chaos [--seconds=180] [--reads=500] [--writes=50] [--seed=N]`

mod judge;
mod sdk;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use mainstay::client::ClientError;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::cluster::{Cluster, Permit, Spec};
use judge::{Book, Kind};
use sdk::{Sdk, Subscriber};

/// Between two kills.
const KILL_EVERY: Duration = Duration::from_secs(5);
/// The longest time that a killed node stays away.
const AWAY_MAX_MS: u64 = 2_000;
/// SDK clients that share the load.
const CLIENTS: usize = 3;
/// Keys that are written and read.
const LANES: usize = 64;
/// How old a bounded read may be.
pub(crate) const BOUND: Duration = Duration::from_secs(2);
/// A call without an answer for so long is lost.
const LOST_AFTER: Duration = Duration::from_secs(60);
/// Calls under way at most; past it the load waits, and says so.
const CALLS_MAX: usize = 4_000;
/// The part of strong reads, bounded reads and writes that may fail.
const FAILED_MAX: f64 = 0.005;

struct Options {
    seconds: u64,
    reads_per_s: u64,
    writes_per_s: u64,
    seed: u64,
}

fn options() -> Options {
    let value = |name: &str| {
        let prefix = format!("--{name}=");
        std::env::args().find_map(|arg| arg.strip_prefix(&prefix).and_then(|text| text.parse().ok()))
    };
    Options {
        seconds: value("seconds").unwrap_or(180),
        reads_per_s: value("reads").unwrap_or(500).max(1),
        writes_per_s: value("writes").unwrap_or(50).max(1),
        seed: value("seed").unwrap_or_else(rand::random),
    }
}

/// How the calls of one kind went.
struct Tally {
    done: u64,
    /// By class: how many, and the first one's words.
    failed: BTreeMap<&'static str, (u64, String)>,
    latency_us: Histogram<u64>,
    /// Where answers came from, as the client says.
    levels: BTreeMap<&'static str, u64>,
}

impl Tally {
    fn new() -> Tally {
        let latency_us = Histogram::new_with_bounds(1, 120_000_000, 2).expect("bounds in order");
        Tally { done: 0, failed: BTreeMap::new(), latency_us, levels: BTreeMap::new() }
    }

    fn fail(&mut self, error: &ClientError) {
        self.failed.entry(error.class().name()).or_insert_with(|| (0, error.to_string())).0 += 1;
    }

    fn failed(&self) -> u64 {
        self.failed.values().map(|(count, _)| count).sum()
    }
}

/// What all calls share.
struct Load {
    sdks: Vec<Sdk>,
    book: Book,
    tallies: BTreeMap<Kind, Mutex<Tally>>,
    calls: Arc<Semaphore>,
    /// Calls that had to wait because too many were under way.
    held_up: AtomicU64,
}

impl Load {
    async fn read(&self, kind: Kind, client: usize, lane: usize) {
        let expected = self.book.begin_read(kind, client, lane);
        let began = Instant::now();
        let answer = tokio::time::timeout(LOST_AFTER, self.sdks[client].read(expected.key(), kind)).await;
        let mut tally = self.tallies[&kind].lock();
        let _ = tally.latency_us.record(began.elapsed().as_micros() as u64);
        tally.done += 1;
        match answer {
            Err(_) => self.book.broken(format!("a {kind:?} read of {} got no answer", expected.key())),
            Ok(Err(error)) => tally.fail(&error),
            Ok(Ok(seen)) => {
                *tally.levels.entry(seen.level).or_default() += 1;
                self.book.end_read(expected, seen.kv.as_ref());
            }
        }
    }

    async fn write(&self, client: usize, lane: usize) {
        // A lane that is being written is left to that write: one writer at a time.
        let Some(write) = self.book.begin_write(lane) else { return };
        let began = Instant::now();
        let call = self.sdks[client].write(write.key(), write.value());
        let answer = tokio::time::timeout(LOST_AFTER, call).await;
        let mut tally = self.tallies[&Kind::Write].lock();
        let _ = tally.latency_us.record(began.elapsed().as_micros() as u64);
        tally.done += 1;
        match answer {
            Ok(Ok(revision)) => self.book.wrote(write, revision),
            Ok(Err(error)) => {
                tally.fail(&error);
                self.book.did_not_write(write, error.may_have_happened());
            }
            Err(_) => {
                self.book.broken(format!("a write of {} got no answer", write.key()));
                self.book.did_not_write(write, true);
            }
        }
    }

    /// Makes calls at a steady rate, whatever becomes of them, until told to stop.
    async fn drive(self: Arc<Self>, per_s: u64, stop: Arc<AtomicBool>, seed: u64, is_writing: bool) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut tick = tokio::time::interval(Duration::from_nanos(1_000_000_000 / per_s));
        let mut calls = JoinSet::new();
        let mut n = 0;
        while !stop.load(Ordering::Relaxed) {
            tick.tick().await;
            while let Some(ended) = calls.try_join_next() {
                self.check_end(ended);
            }
            if self.calls.available_permits() == 0 {
                self.held_up.fetch_add(1, Ordering::Relaxed);
            }
            let Ok(permit) = self.calls.clone().acquire_owned().await else { return };
            let (load, client, lane) =
                (self.clone(), rng.random_range(0..CLIENTS), rng.random_range(0..LANES));
            n += 1;
            calls.spawn(async move {
                match is_writing {
                    true => load.write(client, lane).await,
                    false => load.read(Kind::READS[n % Kind::READS.len()], client, lane).await,
                }
                drop(permit);
            });
        }
        while let Some(ended) = calls.join_next().await {
            self.check_end(ended);
        }
    }

    fn check_end(&self, ended: Result<(), tokio::task::JoinError>) {
        if let Err(error) = ended {
            self.book.broken(format!("a call did not come to its end: {error}"));
        }
    }
}

/// Kills a random node again and again; each comes back. Gives the kills, those of a leader among them.
async fn kill(cluster: &mut Cluster, time: Duration, seed: u64) -> (u32, u32) {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x6b69_6c6c);
    let end = Instant::now() + time;
    let (mut kills, mut leaders) = (0, 0);
    let mut next = Instant::now() + KILL_EVERY;
    while next < end {
        tokio::time::sleep_until(next).await;
        // A second node down at once would be an outage, which is another test.
        cluster.wait_ready().await;
        let late = Instant::now().duration_since(next);
        if late > Duration::from_secs(1) {
            println!("a kill came {late:.1?} late: the node before was not back");
        }
        next = Instant::now() + KILL_EVERY;
        let node = rng.random_range(0..cluster.nodes.len());
        leaders += u32::from(cluster.leader().await == node);
        kills += 1;
        cluster.nodes[node].kill();
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..AWAY_MAX_MS))).await;
        cluster.nodes[node].start();
    }
    tokio::time::sleep_until(end).await;
    cluster.start_all();
    cluster.wait_ready().await;
    (kills, leaders)
}

async fn chaos(options: &Options) -> bool {
    println!(
        "{} s, {} reads/s, {} writes/s, a kill every {KILL_EVERY:?}, seed {} (replay: --seed={})\n",
        options.seconds, options.reads_per_s, options.writes_per_s, options.seed, options.seed
    );
    let mut cluster = Cluster::prepare(Spec::nodes(3), Permit::take());
    cluster.start_all();
    cluster.wait_ready().await;

    let mut sdks = Vec::new();
    for i in 0..CLIENTS {
        // One of them keeps its cache on disk as well.
        let dir = (i == 0).then(|| cluster.root.join("cache"));
        sdks.push(Sdk::connect(&cluster.endpoints(), dir).await.expect("the cluster is ready"));
    }
    let book = Book::new(LANES, CLIENTS);
    let start = sdks[0].revision().await.expect("the cluster is ready");
    let mut subscribers = Vec::new();
    for (i, filter) in sdk::filters().into_iter().enumerate() {
        subscribers.push(Subscriber::open(&sdks[i % CLIENTS], filter, start).await.expect("a subscription"));
    }
    let tallies = Kind::ALL.into_iter().map(|kind| (kind, Mutex::new(Tally::new()))).collect();
    let calls = Arc::new(Semaphore::new(CALLS_MAX));
    let load = Arc::new(Load { sdks, book, tallies, calls, held_up: AtomicU64::new(0) });
    let stop = Arc::new(AtomicBool::new(false));
    let reads = tokio::spawn(load.clone().drive(options.reads_per_s, stop.clone(), options.seed, false));
    let writes = tokio::spawn(load.clone().drive(options.writes_per_s, stop.clone(), options.seed + 1, true));
    let (kills, leaders) = kill(&mut cluster, Duration::from_secs(options.seconds), options.seed).await;
    stop.store(true, Ordering::Relaxed);
    reads.await.expect("no read panics");
    writes.await.expect("no write panics");

    let end = load.sdks[0].revision().await.expect("all nodes are back");
    let history = sdk::history(&cluster.endpoints(), start, end).await;
    load.book.judge_history(&history);
    println!("{kills} kills, {leaders} of them of the leader; {} changes in history", history.len());
    let held_up = load.held_up.load(Ordering::Relaxed);
    if held_up > 0 {
        println!("{held_up} calls came late because {CALLS_MAX} were under way");
    }
    let mut is_kept = print_calls(&load);
    println!("\n| subscription | batches | events | wanted | resumes | |\n|---|---|---|---|---|---|");
    for subscriber in subscribers {
        let last = history.iter().rfind(|event| subscriber.filter().matches(event));
        let last = last.map_or(start, |event| event.kv.mod_revision);
        let (name, told) = subscriber.finish(last).await;
        let verdict = judge::compare(&told.events, &history, &told.filter);
        let wanted = history.iter().filter(|event| told.filter.matches(event)).count();
        is_kept &= verdict.is_ok();
        println!(
            "| {name} | {} | {} | {wanted} | {} | {} |",
            told.batches,
            told.events.len(),
            told.resumes,
            verdict.err().unwrap_or_else(|| "whole".to_owned()),
        );
    }
    let broken = load.book.verdict();
    println!("\n{} answers judged, {} wrong or lost", load.book.judged(), broken.len());
    for words in broken.iter().take(20) {
        println!("- {words}");
    }
    is_kept && broken.is_empty()
}

/// Prints how the calls went; whether few enough failed.
fn print_calls(load: &Load) -> bool {
    let mut is_kept = true;
    println!(
        "\n| calls | done | failed | limit | p50 ms | p99 ms | max ms | from |\n|---|---|---|---|---|---|---|---|"
    );
    for (kind, tally) in &load.tallies {
        let tally = tally.lock();
        let part = tally.failed() as f64 / tally.done.max(1) as f64;
        let limit = if *kind == Kind::Eventual { 0.0 } else { FAILED_MAX };
        let is_good = tally.done > 0 && (part < limit || tally.failed() == 0);
        is_kept &= is_good;
        let ms = |quantile| tally.latency_us.value_at_quantile(quantile) as f64 / 1000.0;
        let levels: Vec<String> = tally.levels.iter().map(|(level, n)| format!("{level} {n}")).collect();
        println!(
            "| {kind:?} | {} | {} ({:.3} %){} | {:.1} % | {:.2} | {:.1} | {:.0} | {} |",
            tally.done,
            tally.failed(),
            part * 100.0,
            if is_good { "" } else { " MISSED" },
            limit * 100.0,
            ms(0.5),
            ms(0.99),
            ms(1.0),
            levels.join(", "),
        );
    }
    for (kind, tally) in &load.tallies {
        for (class, (count, error)) in &tally.lock().failed {
            println!("- {count} {kind:?}: {class}, the first one: {error}");
        }
    }
    is_kept
}

/// Runs it; ends the process with code 1 if a promise was broken.
#[expect(clippy::disallowed_methods, reason = "the one way to tell cargo that a bench failed")]
pub fn run() {
    judge::prove();
    let options = options();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let is_kept = runtime.block_on(chaos(&options));
    runtime.shutdown_timeout(Duration::from_secs(2));
    println!("\n{}", if is_kept { "every promise was kept" } else { "A PROMISE WAS BROKEN" });
    if !is_kept {
        std::process::exit(1);
    }
}
