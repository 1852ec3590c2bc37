//! Simulation: the nodes' own logic on virtual time, with a network, disks and
//! clocks that misbehave as a seed says.
//!
//! Everything of a node runs as it does in production (Raft, applying, watches,
//! leases, snapshots, membership, forwarding) but for what it stands on: one
//! thread, a clock that is moved, messages that are lost, late, repeated and
//! overtaken, a log that loses what was not synced. The same seed gives the same
//! run, to the last message; a failure says how to see it again.
//!
//!     cargo test --release --test simulation                        the fixed seeds, as in `make test`
//!     cargo test --release --test simulation -- --seeds 1..1000     these
//!     cargo test --release --test simulation -- --minutes 10        new ones for as long
//!     cargo test --release --test simulation -- --seed 42 --trace   one, and all that happens in it
//!
//! With `--trace`, `RUST_LOG=mainstay=debug` shows what the nodes log besides.
#![expect(clippy::disallowed_methods, reason = "runs are given real time to end in")]

mod chance;
mod clients;
mod director;
mod disk;
mod fleet;
mod host;
mod members;
mod model;
mod network;
mod oracle;
mod scenarios;
mod trace;
mod transport;
mod watchers;
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wants = match fleet::Wants::parse(&arguments) {
        Ok(wants) => wants,
        Err(error) => {
            eprintln!("simulation: {error}");
            return ExitCode::from(2);
        }
    };
    match wants {
        fleet::Wants::Nothing => ExitCode::SUCCESS,
        fleet::Wants::One { seed, scenario, trace } => one(seed, scenario, trace),
        fleet::Wants::Many(many) => fleet::run(&many),
    }
}

/// Runs one seed in this process.
fn one(seed: u64, scenario: Option<String>, print: bool) -> ExitCode {
    if let Err(error) = mainstay::mutant::choose() {
        eprintln!("simulation: {error}");
        return ExitCode::from(2);
    }
    chance::seed_system(seed);
    if print && std::env::var_os("RUST_LOG").is_some() {
        let lines = tracing_subscriber::fmt().without_time().with_ansi(false).with_writer(std::io::stdout);
        lines.with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    }
    let root = root_of(std::process::id());
    let _ = std::fs::remove_dir_all(&root);
    let panicked = std::sync::Arc::new(std::sync::Mutex::new(None::<String>));
    let (first, before) = (panicked.clone(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        before(panic);
        first.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(panic.to_string());
    }));
    let began = std::time::Instant::now();
    // A thread of its own: what this one has drawn so far, for logging and the
    // like, does not show in the run.
    let place = root.clone();
    let running = std::thread::spawn(move || {
        chance::seed_system(seed);
        world::run(seed, scenario, place, print)
    });
    let ran = match running.join() {
        Ok(ran) => ran,
        Err(_) => {
            let _ = std::fs::remove_dir_all(&root);
            println!("violation the run ended in a panic");
            return ExitCode::FAILURE;
        }
    };
    let _ = std::fs::remove_dir_all(&root);
    if let Some(panic) = panicked.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        ran.trace.violation(format_args!("a panic: {panic}"));
    }
    if chance::asked() == 0 {
        ran.trace.violation("the system's random numbers do not come from the seed");
    }
    for (what, count) in ran.trace.coverage() {
        println!("reached {count} {what}");
    }
    let (digest, lines) = ran.trace.digest();
    println!("digest {digest:016x}");
    let real_ms = began.elapsed().as_millis();
    println!(
        "ran {} virtual ms in {real_ms} ms, {} operations, {lines} lines",
        ran.virtual_ms, ran.operations
    );
    match ran.trace.failed() {
        None => ExitCode::SUCCESS,
        Some(violation) => {
            println!("violation {}", violation.replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// Where the disks of a process are.
fn root_of(process: u32) -> std::path::PathBuf {
    scratch().join(format!("mainstay-simulation-{process}"))
}

/// Room that two runs do not come near to.
const SCRATCH_BYTES_MIN: u64 = 1 << 30;

/// Where disks are simulated: in memory, where the machine has room for that.
fn scratch() -> std::path::PathBuf {
    let memory = std::path::Path::new("/dev/shm");
    let free = rustix::fs::statvfs(memory).map_or(0, |stats| stats.f_bavail.saturating_mul(stats.f_frsize));
    if free >= SCRATCH_BYTES_MIN { memory.to_owned() } else { std::env::temp_dir() }
}
