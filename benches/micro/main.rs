//! What applying, the log, the codec and the watch hub cost by themselves, so that a regression shows
//! without a cluster. Each measured thing is a value that both ways of measuring drive.
//!
//! - `make bench-micro`: times, by criterion; `-- FILTER` after the cargo command chooses.
//! - `make bench-counts`: instructions, by callgrind, against `counts.toml` (see `counts`). They are the same
//!   on a busy machine.
//!
//! Loads nothing and starts no process but valgrind; what a cluster makes of all this is for `compare` to say.

mod apply;
mod codec;
mod counts;
mod log;
mod puts;
mod watch;

use std::process::ExitCode;
use std::time::Duration;

use criterion::Criterion;

use counts::Workload;

// The product's allocator, for its instructions are counted too.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What is counted. The log is not: its writer is a thread, and most of its time is the disk's.
const WORKLOADS: [Workload; 4] = [apply::PUT, apply::TXN, codec::WORKLOAD, watch::WORKLOAD];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    if let Some(flag) = args.iter().position(|arg| arg == "--count") {
        return counts::count(&WORKLOADS, args.get(flag + 1).map(String::as_str));
    }
    if has("--counts") {
        return counts::compare(&WORKLOADS, has("--update"));
    }
    let mut criterion =
        Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    criterion = criterion.sample_size(20).configure_from_args();
    codec::times(&mut criterion);
    apply::times(&mut criterion);
    watch::times(&mut criterion);
    log::times(&mut criterion);
    criterion.final_summary();
    ExitCode::SUCCESS
}
