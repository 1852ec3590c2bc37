//! Every decoder that meets bytes from a disk or from the network, given bytes
//! that nobody meant to write.
//!
//! `cargo test --release --test fuzz` replays the kept corpus and runs each
//! target for a second; `-- --target NAME --minutes N --seed S` runs one for as
//! long as asked, and `make fuzz` all of them in a build that counts what was
//! reached. README.md beside this file says how the parts work together and
//! keeps the results of the long runs. It judges decoders only: what a cluster
//! makes of what they let through is other tests' to say.

#![expect(
    clippy::disallowed_methods,
    reason = "a decoder's time is measured on the real clock, by a process that has no runtime"
)]

mod coverage;
mod draw;
mod engine;
mod memory;
mod mutate;
mod scratch;
mod self_check;
mod supervise;
mod targets;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use engine::{Current, Job, Outcome};
use supervise::{STANDSTILL, Worker};
use targets::{Input, TARGETS, Target};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// The stack of the thread that runs inputs: as much as tokio's threads have.
const STACK_BYTES: usize = 2 << 20;
/// The seed of a run that names none.
const SEED: u64 = 1;
/// Targets that run at a time, unless `--jobs` says otherwise.
const JOBS: usize = 2;
/// The most inputs of a target that `--keep` keeps with the sources.
const KEPT_MAX: usize = 24;

/// What the command line asks for.
#[derive(Default)]
struct Asked {
    targets: Vec<String>,
    filters: Vec<String>,
    seed: Option<u64>,
    duration: Option<Duration>,
    jobs: Option<usize>,
    replay: Vec<PathBuf>,
    worker: Option<String>,
    scratch: Option<PathBuf>,
    keep: bool,
    list: bool,
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)).and_then(run) {
        Ok(code) => code,
        Err(text) => {
            eprintln!("fuzz: {text}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Asked, String> {
    let mut asked = Asked::default();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        let number = |text: String| text.parse::<f64>().map_err(|error| format!("{text:?}: {error}"));
        match arg.as_str() {
            "--target" => asked.targets.push(value()?),
            "--seed" => asked.seed = Some(number(value()?)? as u64),
            "--minutes" => asked.duration = Some(Duration::from_secs_f64(number(value()?)? * 60.0)),
            "--seconds" => asked.duration = Some(Duration::from_secs_f64(number(value()?)?)),
            "--jobs" => asked.jobs = Some((number(value()?)? as usize).max(1)),
            "--replay" => asked.replay.push(value()?.into()),
            "--worker" => asked.worker = Some(value()?),
            "--scratch" => asked.scratch = Some(value()?.into()),
            "--keep" => asked.keep = true,
            "--list" => asked.list = true,
            // What the test harness of other test programs understands, `cargo test` hands to this one too.
            "--test-threads" | "--skip" | "--color" | "--format" => drop(value()?),
            flag if flag.starts_with('-') => {}
            filter => asked.filters.push(filter.to_owned()),
        }
    }
    Ok(asked)
}

fn run(asked: Asked) -> Result<ExitCode, String> {
    let chosen = choose(&asked)?;
    if asked.list {
        // As the usual harness lists tests, one in a line.
        chosen.iter().for_each(|target| println!("{}: test", target.name));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(name) = &asked.worker {
        let target = find(name)?;
        return on_small_stack(move || work(target, &asked));
    }
    if !asked.keep && asked.replay.is_empty() {
        return orchestrate(&chosen, &asked);
    }
    let dir = scratch::new_dir().map_err(|error| error.to_string())?;
    scratch::set_scratch(dir.path());
    if asked.keep {
        return on_small_stack(move || keep(&chosen));
    }
    let [target] = chosen[..] else { return Err("--replay needs one --target".to_owned()) };
    on_small_stack(move || replay(target, &asked.replay))
}

fn find(name: &str) -> Result<&'static Target, String> {
    let wrong = self_check::WRONG.iter().map(|(target, _)| target);
    let names = || TARGETS.iter().map(|target| target.name).collect::<Vec<_>>().join(", ");
    TARGETS
        .iter()
        .chain(wrong)
        .find(|target| target.name == name)
        .ok_or_else(|| format!("no target {name:?}; there are {}", names()))
}

fn choose(asked: &Asked) -> Result<Vec<&'static Target>, String> {
    if !asked.targets.is_empty() {
        return asked.targets.iter().map(|name| find(name)).collect();
    }
    let wanted = |target: &&Target| {
        asked.filters.is_empty()
            || asked.filters.iter().any(|filter| format!("fuzz::{}", target.name).contains(filter))
    };
    Ok(TARGETS.iter().filter(wanted).collect())
}

fn on_small_stack(
    work: impl FnOnce() -> Result<ExitCode, String> + Send + 'static,
) -> Result<ExitCode, String> {
    let thread = std::thread::Builder::new().name("fuzz".to_owned()).stack_size(STACK_BYTES).spawn(work);
    thread.map_err(|error| error.to_string())?.join().map_err(|_| "the fuzzing thread panicked".to_owned())?
}

/// Runs the chosen targets, some at a time, and says what came of each.
fn orchestrate(chosen: &[&'static Target], asked: &Asked) -> Result<ExitCode, String> {
    let seed = asked.seed.unwrap_or(SEED);
    let duration = asked.duration.unwrap_or(Duration::from_secs(1));
    let failed = |error: std::io::Error| error.to_string();
    let jobs = asked.jobs.unwrap_or(JOBS);
    if asked.targets.is_empty() && asked.filters.is_empty() {
        let unnoticed = self_check::unnoticed(jobs).map_err(failed)?;
        if !unnoticed.is_empty() {
            return Err(format!("decoders that are wrong on purpose went unnoticed: {unnoticed:#?}"));
        }
        println!("{} decoders that are wrong on purpose were caught", self_check::WRONG.len());
        if let Some(bare) =
            chosen.iter().find(|target| engine::inputs_in(&engine::kept_dir(target)).is_empty())
        {
            return Err(format!("{} has no corpus; tests/fuzz/README.md says how to make one", bare.name));
        }
    }
    let mut waiting = chosen.iter();
    let mut running: Vec<Worker> = Vec::new();
    let mut failures = 0;
    println!("fuzzing {} targets, {duration:?} each, seed {seed}", chosen.len());
    loop {
        while running.len() < jobs
            && let Some(target) = waiting.next()
        {
            running.push(Worker::start(target, seed, duration, STANDSTILL, false).map_err(failed)?);
        }
        if running.is_empty() {
            break;
        }
        let mut still = Vec::new();
        for mut worker in running {
            let Some(report) = worker.poll().map_err(failed)? else {
                still.push(worker);
                continue;
            };
            println!("{:<16} {}", report.target.name, report.figures);
            if let Some((path, reason)) = report.failure {
                failures += 1;
                println!("{:<16} FAILED ({}): {reason}", report.target.name, report.target.what);
                println!("  the input is {}", path.display());
                println!(
                    "  see it again: cargo test --release --test fuzz -- --target {} --replay {}",
                    report.target.name,
                    path.display()
                );
                println!("  found with seed {seed}");
            }
        }
        running = still;
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("{} targets, {failures} failed", chosen.len());
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A worker's process: one target. Prints its figures, then what failed.
fn work(target: &'static Target, asked: &Asked) -> Result<ExitCode, String> {
    let dir = asked.scratch.as_ref().ok_or("a worker needs --scratch")?;
    scratch::set_scratch(dir);
    let current = Current::open(&dir.join(supervise::CURRENT)).map_err(|error| error.to_string())?;
    let work_dir = supervise::work_dir(target.name).join("corpus");
    std::fs::create_dir_all(&work_dir).map_err(|error| error.to_string())?;
    let (seed, duration) = (asked.seed.unwrap_or(SEED), asked.duration.unwrap_or_default());
    let outcome = engine::fuzz(&Job { target, seed, duration, work_dir: &work_dir, current: &current });
    println!("{}", figures(&outcome));
    match outcome.failure {
        None => Ok(ExitCode::SUCCESS),
        Some(reason) => {
            println!("{}", reason.replace('\n', " "));
            Ok(ExitCode::FAILURE)
        }
    }
}

fn figures(outcome: &Outcome) -> String {
    let reached = match outcome.counting {
        true => format!("{} edges, ", outcome.edges),
        false => String::new(),
    };
    format!(
        "{} inputs, {} accepted, {reached}corpus {}, slowest {:?}, at most {} KiB held",
        outcome.executions,
        outcome.accepted,
        outcome.corpus,
        outcome.slowest,
        outcome.peak_bytes >> 10
    )
}

/// Runs files, saying what each does.
fn replay(target: &Target, paths: &[PathBuf]) -> Result<ExitCode, String> {
    let mut failures = 0;
    for path in paths {
        let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let seen = engine::judge(target, &Input { bytes, is_whole: false });
        failures += usize::from(seen.failure.is_some());
        let what = match (&seen.failure, seen.accepted) {
            (Some(reason), _) => reason,
            (None, true) => "accepted",
            (None, false) => "refused",
        };
        println!("{}: {what}, {:?}, {} bytes held", path.display(), seen.took, seen.peak_bytes);
    }
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Adds the best of what was found to the corpus beside the sources: as much as
/// makes it reach everything, [`KEPT_MAX`] inputs at most. What is there stays.
fn keep(chosen: &[&'static Target]) -> Result<ExitCode, String> {
    let [target] = chosen else { return Err("--keep needs one --target".to_owned()) };
    let kept_dir = engine::kept_dir(target);
    std::fs::create_dir_all(&kept_dir).map_err(|error| error.to_string())?;
    let kept = engine::inputs_in(&kept_dir);
    let mut rng = mutate::Rng::new(SEED);
    let drawn = (0..200).map(|_| (target.draw)(&mut rng).bytes);
    let found = engine::inputs_in(&supervise::work_dir(target.name).join("corpus"));
    let candidates = drawn.chain(found).filter(|bytes| bytes.len() <= 4096).collect();
    let room = KEPT_MAX.saturating_sub(kept.len());
    let best = engine::smallest_corpus(target, candidates, room);
    for bytes in &best {
        let path = kept_dir.join(engine::name_of(bytes));
        std::fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    println!("{}: {} kept, {} added", target.name, kept.len(), best.len());
    Ok(ExitCode::SUCCESS)
}
