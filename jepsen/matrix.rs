//! The matrix of workloads and single faults, filled over many sittings: what
//! `make jepsen-long` does.
//!
//! Each run carries every workload under one fault. The fault whose cells have
//! the fewest seconds is next, so that a stopped matrix goes on where it was.

use std::time::{Duration, Instant};

use crate::args::Args;
use crate::faults::catalogue;
use crate::results::{self, Line};
use crate::run::Plan;
use crate::suite;
use crate::workloads;

/// Seconds of one run; enough for a few rounds of any fault.
const DRIVEN: Duration = Duration::from_secs(40);
/// How long setting up, healing and judging may take besides.
const BESIDES: Duration = Duration::from_secs(60);
/// Power failures of all nodes at once that must be on record.
const POWER_ALL_MIN: usize = 100;

/// Runs until the time is over, or every cell is full and power has failed often enough.
pub async fn run(args: &Args) -> anyhow::Result<bool> {
    let began = Instant::now();
    let limit = Duration::from_secs(args.minutes * 60);
    let mut passed = true;
    let names: Vec<&'static str> = catalogue::FAULTS.iter().map(|entry| entry.name).collect();
    let mut tried: Vec<&str> = Vec::new();
    while began.elapsed() + DRIVEN + BESIDES < limit {
        let Some(nemesis) = next(&results::read()?, &names, &tried) else { break };
        tried.push(nemesis);
        let seed = u64::from(rand::random::<u32>());
        let plan = Plan {
            workloads: workloads::NAMES.to_vec(),
            nemesis: nemesis.to_owned(),
            time: DRIVEN,
            seed,
            members: catalogue::members(nemesis).max(args.nodes),
            rate: args.rate,
            binary: args.binary.clone(),
            mutant: None,
            out: args.out(&format!("matrix-{nemesis}-{seed}")),
        };
        let report = plan.run().await?;
        let line = Line::of(&report, plan.members);
        line.append()?;
        passed &= line.passed;
        suite::print_run(&line, &plan, &report.text());
        results::render(&names, workloads::NAMES)?;
    }
    Ok(passed)
}

/// The fault to run next; one that was tried in this sitting waits until every other was.
fn next<'a>(lines: &[Line], faults: &[&'a str], tried: &[&str]) -> Option<&'a str> {
    let cells = results::cells(lines);
    let least = |fault: &str| {
        let seconds = workloads::NAMES.iter().map(|workload| {
            cells.get(&(fault.to_owned(), (*workload).to_owned())).copied().unwrap_or_default()
        });
        seconds.fold(f64::INFINITY, f64::min)
    };
    let power_all: usize = lines
        .iter()
        .filter(|line| line.passed)
        .filter_map(|line| line.faults.get("power-all"))
        .map(|time| time.times)
        .sum();
    let wanting = faults.iter().filter(|fault| {
        least(fault) < results::CELL_SECONDS_MIN || (**fault == "power-all" && power_all < POWER_ALL_MIN)
    });
    let times_tried = |fault: &str| tried.iter().filter(|name| **name == fault).count();
    wanting.min_by(|a, b| times_tried(a).cmp(&times_tried(b)).then(least(a).total_cmp(&least(b)))).copied()
}
