//! Many seeds: one process for each, as many at a time as there are processors,
//! and what all of them together have reached.
//!
//! A process for each because a seed must not feel what ran before it; and so a
//! run that hangs or dies is only its own failure.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::ops::Range;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::scenarios;

/// The seeds of every test run. The first is run twice, to see that it repeats.
const FIXED: Range<u64> = 1..17;
/// Real time that one seed may take.
const SEED_MAX: Duration = Duration::from_secs(600);

/// What the fixed seeds must reach together: a fault that never happens proves
/// nothing.
const REACHED: &[&str] = &[
    "all crashed",
    "appends repeated",
    "compactions",
    "connections cut",
    "crashes",
    "crashes that lost unsynced writes",
    "disks failed",
    "disks slowed",
    "leaders",
    "leadership moved",
    "leases expired",
    "leases granted",
    "leases kept alive",
    "leases revoked",
    "linearizable reads",
    "majorities crashed",
    "members joined",
    "members removed",
    "members replaced",
    "messages lost",
    "messages repeated",
    "operations acknowledged",
    "operations refused",
    "operations unknown",
    "orderly restarts",
    "partitions",
    "pauses",
    "removals noticed",
    "retries recognised",
    "serializable reads",
    "sessions expired",
    "snapshots installed",
    "streams broken",
    "wall clocks jumped",
    "watch fragments",
    "watch messages",
    "watch progress",
    "watches compacted",
    "watches resumed",
];

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Wants {
    /// Nothing of this test.
    Nothing,
    /// One seed, in this process.
    One { seed: u64, scenario: Option<String>, trace: bool },
    /// Many seeds.
    Many(Many),
}

/// Many seeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Many {
    seeds: Range<u64>,
    until: Option<Duration>,
    /// The fixed set: it must repeat, and reach everything.
    fixed: bool,
}

impl Wants {
    /// Reads the command line. What the test runner passes to every test binary
    /// is understood as far as it concerns this one.
    pub fn parse(arguments: &[String]) -> Result<Wants, String> {
        let (mut seeds, mut minutes, mut seed, mut scenario, mut trace) = (None, None, None, None, false);
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let mut value = || rest.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--seed" => seed = Some(number(value()?)?),
                "--scenario" => scenario = Some(value()?.clone()),
                "--trace" => trace = true,
                "--seeds" => {
                    let text = value()?;
                    let (from, to) = text.split_once("..").ok_or(format!("{text} is not FROM..TO"))?;
                    seeds = Some(number(from)?..number(to)?);
                }
                "--minutes" => minutes = Some(number(value()?)?),
                "--list" => return Ok(Wants::Nothing),
                "--test-threads" | "--skip" | "--format" | "--color" => drop(value()?),
                flag if flag.starts_with('-') => {}
                filter if !"simulation".contains(filter) => return Ok(Wants::Nothing),
                _ => {}
            }
        }
        if seed.is_some() || scenario.is_some() {
            return Ok(Wants::One { seed: seed.unwrap_or(1), scenario, trace });
        }
        let fixed = seeds.is_none() && minutes.is_none();
        let from = if minutes.is_some() { drawn() } else { FIXED.start };
        let seeds = seeds.unwrap_or(from..if fixed { FIXED.end } else { u64::MAX });
        let until = minutes.map(|minutes: u64| Duration::from_secs(60 * minutes));
        Ok(Wants::Many(Many { seeds, until, fixed }))
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|error| format!("{text:?}: {error}"))
}

/// Seeds that were probably not run before.
fn drawn() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_secs() * 1000
}

/// What one process had to say.
#[derive(Debug, Default)]
struct Report {
    digest: Option<String>,
    reached: BTreeMap<String, u64>,
    ran: String,
    failure: Option<String>,
}

/// Runs many seeds. Fails if any of them does.
pub fn run(many: &Many) -> ExitCode {
    let began = Instant::now();
    let next = AtomicU64::new(many.seeds.start);
    let stop = AtomicBool::new(false);
    let all: Mutex<(u64, u64, BTreeMap<String, u64>)> = Mutex::default();
    if many.fixed {
        for scenario in scenarios::ALL {
            let arguments = ["--scenario".to_owned(), (*scenario).to_owned()];
            settle(&arguments, run_one(&arguments), &all);
        }
    }
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let in_time = many.until.is_none_or(|until| began.elapsed() < until);
                    if seed >= many.seeds.end || !in_time {
                        return;
                    }
                    let arguments = ["--seed".to_owned(), seed.to_string()];
                    let mut report = run_one(&arguments);
                    if many.fixed && seed == many.seeds.start && report.failure.is_none() {
                        let again = run_one(&arguments);
                        if again.digest != report.digest {
                            let (one, other) = (&report.digest, &again.digest);
                            report.failure = Some(format!("two runs differ: {one:?} and {other:?}"));
                        }
                    }
                    settle(&arguments, report, &all);
                }
            });
        }
    });
    let (seeds, failed, reached) = all.into_inner().unwrap_or_default();
    let took = began.elapsed().as_secs();
    println!("{seeds} runs in {took} s, {failed} failed; together they reached:");
    for (what, count) in &reached {
        println!("  {count:>8} {what}");
    }
    let missing: Vec<&&str> = REACHED.iter().filter(|what| !reached.contains_key(**what)).collect();
    if many.fixed && !missing.is_empty() {
        println!("FAILED: the fixed seeds never reach {missing:?}");
        return ExitCode::FAILURE;
    }
    if failed > 0 || seeds == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn settle(arguments: &[String], report: Report, all: &Mutex<(u64, u64, BTreeMap<String, u64>)>) {
    let mut all = all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    all.0 += 1;
    for (what, count) in report.reached {
        *all.2.entry(what).or_default() += count;
    }
    let digest = report.digest.unwrap_or_default();
    let what = arguments.join(" ");
    let what = what.trim_start_matches('-');
    match report.failure {
        None => println!("{what}: ok, {}, digest {digest}", report.ran),
        Some(failure) => {
            all.1 += 1;
            println!("{what}: FAILED: {failure}");
            println!("  replay: cargo test --release --test simulation -- --{what} --trace");
        }
    }
}

/// Runs one seed or scenario in a process of its own.
fn run_one(arguments: &[String]) -> Report {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return failed(format!("this program cannot be found: {error}")),
    };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    match command.spawn() {
        Ok(child) => wait(child),
        Err(error) => failed(format!("no process: {error}")),
    }
}

fn failed(failure: String) -> Report {
    Report { failure: Some(failure), ..Report::default() }
}

fn wait(mut child: Child) -> Report {
    let mut out = child.stdout.take().expect("it is piped");
    let mut err = child.stderr.take().expect("it is piped");
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        out.read_to_string(&mut text).map(|_| text)
    });
    let complaints = std::thread::spawn(move || {
        let mut text = String::new();
        err.read_to_string(&mut text).map(|_| text)
    });
    let until = Instant::now() + SEED_MAX;
    let process = child.id();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if Instant::now() >= until => {
                let _ = child.kill();
                let _ = child.wait();
                break Err(format!("no end within {SEED_MAX:?}"));
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => break Err(error.to_string()),
        }
    };
    // What a run that was killed has left.
    let _ = std::fs::remove_dir_all(crate::root_of(process));
    let text = reading.join().ok().and_then(Result::ok).unwrap_or_default();
    let complaints = complaints.join().ok().and_then(Result::ok).unwrap_or_default();
    let mut report = parse(&text);
    match status {
        Ok(status) if status.success() && report.digest.is_some() => {}
        Ok(status) => {
            let last: Vec<&str> = complaints.lines().rev().take(3).collect();
            report.failure.get_or_insert(format!("{status}; {}", last.join(" | ")));
        }
        Err(error) => {
            report.failure.get_or_insert(error);
        }
    }
    report
}

fn parse(text: &str) -> Report {
    let mut report = Report::default();
    for line in text.lines() {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        match first {
            "digest" => report.digest = Some(rest.to_owned()),
            "ran" => report.ran = rest.to_owned(),
            "violation" => report.failure = Some(rest.to_owned()),
            "reached" => {
                if let Some((count, what)) = rest.split_once(' ') {
                    report.reached.insert(what.to_owned(), count.parse().unwrap_or(0));
                }
            }
            _ => {}
        }
    }
    report
}
