//! etcd and Mainstay side by side: the same load by the same foreign client on the same machine, in
//! turn, row by row.
//!
//! The load client shares the machine's cores and caps throughput; server CPU per operation, over
//! all nodes, is the figure to judge by first. It measures and reports, and fails only when a row
//! does not work. What is measured already is not measured again (`results.rs`).
//!
//! `cargo bench --profile release --bench compare -- --help` lists the arguments.
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

mod bench;
mod chart;
mod curves;
mod figures;
mod foreign;
mod kept;
mod limit;
mod machine;
mod report;
mod results;
mod rows;

// The client's own work is part of what the machine can do; the servers bring theirs.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Parser;

use bench::{Bench, Side};
use figures::{Figures, number};
use results::{Line, Results, Setting};
use rows::Row;
use target::Target;

/// etcd and Mainstay side by side. Measures what the results file does not have yet.
#[derive(Debug, Parser)]
#[command(name = "compare", max_term_width = 110)]
struct Arguments {
    /// Only these rows.
    #[arg(long, value_name = "ROW,...", value_delimiter = ',')]
    only: Vec<String>,
    /// Only this side: etcd, mainstay or bare.
    #[arg(long, value_name = "SIDE", value_parser = |name: &str| Side::of(name).ok_or("no such side"))]
    side: Option<Side>,
    /// How long one figure is measured, in seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// How many times each figure is measured; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// The etcd to compare with.
    #[arg(long, default_value = "etcd", value_name = "PATH")]
    etcd: String,
    /// The Mainstay to measure; the one built with this program when left out.
    #[arg(long, value_name = "PATH")]
    mainstay: Option<PathBuf>,
    /// Only see that every row works: one round, a second each, less data, nothing is kept.
    #[arg(long)]
    smoke: bool,
    /// Measure how cost grows with keys, watchers and nodes, instead of the table's rows.
    #[arg(long)]
    curves: bool,
    /// Measure again what the results file has already.
    #[arg(long)]
    again: bool,
    /// The results file.
    #[arg(long, value_name = "FILE", default_value = "benches/results.jsonl")]
    results: PathBuf,
    /// Serve what answers a constant, on this port: the program that the row `bare` measures.
    #[arg(long, hide = true, value_name = "PORT")]
    serve_bare: Option<u16>,
    /// Only write the report (RESULTS.md and charts beside the results file), from what is measured.
    #[arg(long)]
    report: bool,
    /// Print the rows and what they have to reach.
    #[arg(long)]
    list: bool,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    fn rows(&self) -> Result<Vec<Row>> {
        let rows = if self.curves { curves::points() } else { rows::all() };
        for name in &self.only {
            let known = || rows.iter().map(|row| row.name).collect::<Vec<_>>().join(", ");
            ensure!(rows.iter().any(|row| row.name == name), "no row `{name}`; there are {}", known());
        }
        let wanted = |row: &Row| self.only.is_empty() || self.only.iter().any(|name| name == row.name);
        Ok(rows.into_iter().filter(wanted).collect())
    }

    fn target(&self, side: Side) -> Target {
        match (side, &self.mainstay) {
            (Side::Etcd, _) => Target::etcd(&self.etcd),
            (_, Some(path)) => Target::Mainstay(path.clone()),
            (_, None) => Target::mainstay(),
        }
    }

    fn bench(&self, side: Side) -> Bench {
        let seconds = if self.smoke { 1 } else { self.seconds };
        Bench { side, seconds, smoke: self.smoke, target: self.target(side) }
    }
}

/// Measures a row once, on a runtime and a thread of its own, so that a panic or a hang is this
/// row's failure and nobody else's.
fn measure(row: &Row, bench: &Bench) -> Result<Figures> {
    let (run, bench) = (row.run, bench.clone());
    let limit = row.limit + 8 * bench.time();
    let thread = std::thread::Builder::new().name(row.name.to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let figures = runtime.block_on(async { tokio::time::timeout(limit, run(&bench)).await });
        runtime.shutdown_timeout(Duration::from_secs(5));
        figures.map_err(|_| anyhow!("not done after {limit:?}"))?
    })?;
    match thread.join() {
        Ok(figures) => figures,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            bail!("{}", text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked"))
        }
    }
}

fn show(row: &Row, side: Side, round: u64, figures: &Figures, note: &str) {
    let all: Vec<String> =
        figures.all().into_iter().map(|(name, value)| format!("{name} {}", number(value))).collect();
    let errors = if figures.errors > 0 { format!("  {} ERRORS", figures.errors) } else { String::new() };
    println!("{:<22} {:<9} {round}  {}{errors}{note}", row.name, side.name(), all.join("  "));
}

/// Measures what is missing; returns how many measurements failed.
fn measure_all(arguments: &Arguments, setting: &Setting, results: &mut Results) -> Result<usize> {
    let mut failed = 0;
    let rows = arguments.rows()?;
    for round in 1..=if arguments.smoke { 1 } else { arguments.rounds } {
        for row in &rows {
            for side in row.sides.iter().filter(|side| arguments.side.is_none_or(|only| only == **side)) {
                let known = results.find(row.name, side.name(), round as usize, setting);
                if let Some(line) = known.filter(|_| !arguments.again && !arguments.smoke) {
                    show(row, *side, round, &line.figures, "  (measured before)");
                    continue;
                }
                match measure(row, &arguments.bench(*side)) {
                    Err(error) => {
                        failed += 1;
                        println!("{:<22} {:<9} {round}  FAILED: {error:#}", row.name, side.name());
                    }
                    Ok(figures) => {
                        show(row, *side, round, &figures, "");
                        if !arguments.smoke {
                            results.add(line(row, *side, round, setting, figures))?;
                        }
                    }
                }
            }
        }
    }
    Ok(failed)
}

fn line(row: &Row, side: Side, round: u64, setting: &Setting, figures: Figures) -> Line {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Line {
        row: row.name.to_owned(),
        side: side.name().to_owned(),
        round: round as usize,
        setting: setting.clone(),
        at: now.as_secs(),
        figures,
    }
}

fn list() {
    for row in rows::all() {
        println!("{:<22} {}", row.name, row.load);
        for goal in row.goals {
            println!("{:<22}   {} {}", "", goal.metric, goal.bound);
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.list {
        list();
        return Ok(());
    }
    if let Some(port) = arguments.serve_bare {
        return rows::serve_bare(port);
    }
    let directory = arguments.results.parent().unwrap_or(Path::new("."));
    if arguments.report {
        return report::write(&Results::open(&arguments.results)?, directory);
    }
    let program = |side| match arguments.target(side) {
        Target::Mainstay(path) | Target::Etcd(path, _) => path,
    };
    let setting = Setting {
        etcd: machine::version(&program(Side::Etcd))?,
        mainstay: machine::version_and_hash(&program(Side::Mainstay))?,
        seconds: arguments.seconds,
        machine: machine::machine(),
    };
    println!("{} | {} | {}", setting.etcd, setting.mainstay, setting.machine);
    std::fs::create_dir_all(directory).context("making the directory of the results")?;
    let mut results = Results::open(&arguments.results)?;
    let measured = measure_all(&arguments, &setting, &mut results);
    kept::remove();
    let failed = measured?;
    if !arguments.smoke {
        report::write(&results, directory)?;
    }
    ensure!(failed == 0, "{failed} measurements failed");
    Ok(())
}
