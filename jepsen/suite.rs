//! Several runs in a row, one family of faults each: what `make jepsen` does.

use std::time::{Duration, Instant};

use crate::args::Args;
use crate::results::Line;
use crate::run::Plan;
use crate::workloads;

/// The faults of each run, in turn. Every run carries every workload.
const RUNS: [&str; 8] = [
    "kill-one,kill-majority,kill-all,rolling-restart",
    "power-one,power-majority,power-all,torn-tail,bit-flip",
    "partition-leader-alone,partition-leader-majority,partition-halves,partition-one-way-in,\
     partition-one-way-out,partition-clients",
    "pause-leader,pause-majority,leader-transfer,cut-connections",
    "delay,jitter,loss,bandwidth",
    "disk-slow,disk-hung,disk-full,fsync-fails",
    "grow-shrink,replace-node,remove-leader",
    "clock-jump,clock-rate,compact,snapshot-behind",
];
/// Seconds that each run is driven; with setting up and judging, eight take ten minutes.
const DRIVEN: Duration = Duration::from_secs(60);
/// What the suite as a whole must have reached to count.
const CALLS_MIN: usize = 120_000;
const FAULTS_MIN: usize = 60;

/// Runs the suite; whether everything passed.
pub async fn run(args: &Args) -> anyhow::Result<bool> {
    let began = Instant::now();
    let seed = args.seed.unwrap_or_else(rand::random::<u32>().into());
    println!("seed {seed}");
    let (mut calls, mut faults, mut failures) = (0, 0, 0);
    for (index, nemesis) in RUNS.iter().enumerate() {
        let seed = seed + index as u64;
        let plan = Plan {
            workloads: workloads::NAMES.to_vec(),
            nemesis: (*nemesis).to_owned(),
            time: DRIVEN,
            seed,
            members: 3,
            rate: args.rate,
            binary: args.binary.clone(),
            mutant: None,
            out: args.out(&format!("suite-{index}-{seed}")),
        };
        let report = plan.run().await?;
        let line = Line::of(&report, plan.members);
        calls += line.ok + line.failed + line.unknown;
        faults += line.faults.values().map(|time| time.times).sum::<usize>();
        failures += usize::from(!line.passed);
        print_run(&line, &plan, &report.text());
    }
    let took = began.elapsed().as_secs();
    println!("\n{} runs in {took} s: {failures} failed; {calls} calls, {faults} faults took effect", RUNS.len());
    let enough = calls >= CALLS_MIN && faults >= FAULTS_MIN;
    if !enough {
        println!("that is too little to count: at least {CALLS_MIN} calls and {FAULTS_MIN} faults");
    }
    Ok(failures == 0 && enough)
}

/// A line for a run that passed, the whole page for one that did not.
pub fn print_run(line: &Line, plan: &Plan, page: &str) {
    let faults: usize = line.faults.values().map(|time| time.times).sum();
    let Line { nemesis, seed, ok, failed, unknown, .. } = line;
    let word = if line.passed { "passed" } else { "FAILED" };
    println!("{word}  {nemesis} (seed {seed}): {ok} ok, {failed} failed, {unknown} unknown; {faults} faults");
    if !line.passed {
        println!("{page}\npage, histories and logs: {}", plan.out.display());
    }
}
