//! The matrix of workloads and single faults, filled over many sittings: what
//! `make jepsen-long` does.
//!
//! Each run carries every workload under one fault. The fault whose cells have
//! the fewest seconds is next, so that a stopped matrix goes on where it was.

use std::time::Duration;

use tokio::time::Instant;

use crate::args::{Args, run_folder};
use crate::faults::catalogue;
use crate::results::{self, Line};
use crate::suite;
use crate::workloads;

/// Seconds of one run; enough for a few rounds of any fault.
const DRIVEN: Duration = Duration::from_secs(40);
/// How long setting up, healing and judging may take besides.
const BESIDES: Duration = Duration::from_secs(60);
/// Power failures of all nodes at once that must be on record.
const POWER_ALL_MIN: usize = 100;

/// Runs until the time is over, or every cell is full and power has failed often enough. With no time at all it
/// only writes the tables anew.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let began = Instant::now();
    let limit = Duration::from_secs(args.minutes * 60);
    let mut passed = true;
    let mut tried: Vec<&str> = Vec::new();
    while began.elapsed() + DRIVEN + BESIDES < limit {
        let Some(nemesis) = next(&results::read()?, &tried) else { break };
        tried.push(nemesis);
        let mut plan = args.plan()?;
        plan.workloads = workloads::names();
        plan.nemesis = nemesis.to_owned();
        plan.time = DRIVEN;
        plan.seed = rand::random::<u32>().into();
        plan.members = catalogue::find(nemesis)?.needs.members.max(args.nodes);
        plan.out = run_folder(&args.out(), nemesis, plan.seed);
        let line = suite::start(&plan)?;
        line.append()?;
        passed &= line.passed;
    }
    results::render(catalogue::NAMES, &workloads::names())?;
    Ok(passed)
}

/// The fault to run next; one that was tried in this sitting waits until every other was.
fn next(lines: &[Line], tried: &[&str]) -> Option<&'static str> {
    let cells = results::cells(lines);
    let least = |fault: &str| {
        let seconds = workloads::names()
            .into_iter()
            .map(|workload| cells.get(&(fault.to_owned(), workload.to_owned())).copied().unwrap_or_default());
        seconds.fold(f64::INFINITY, f64::min)
    };
    let power_all = results::power_failures_of_all(lines);
    let wanting = catalogue::NAMES.iter().filter(|fault| {
        least(fault) < results::CELL_SECONDS_MIN || (**fault == "power-all" && power_all < POWER_ALL_MIN)
    });
    let times_tried = |fault: &str| tried.iter().filter(|name| **name == fault).count();
    wanting.copied().min_by(|a, b| times_tried(a).cmp(&times_tried(b)).then(least(a).total_cmp(&least(b))))
}
