//! Several runs in a row, one family of faults each: what `make jepsen` does.

use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

use crate::args::{Args, run_folder};
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
/// How long each run is driven; with setting up and judging, eight take ten minutes.
const DRIVEN: Duration = Duration::from_secs(60);
/// What the suite as a whole must have reached to count.
const CALLS_MIN: usize = 120_000;
const FAULTS_MIN: usize = 60;

/// Runs the suite; whether everything passed.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let began = Instant::now();
    let seed = args.seed.unwrap_or_else(|| rand::random::<u32>().into());
    println!("seed {seed}");
    let (mut calls, mut faults, mut failures) = (0, 0, 0);
    for (index, nemesis) in RUNS.iter().enumerate() {
        let mut plan = args.plan()?;
        plan.workloads = workloads::names();
        plan.nemesis = (*nemesis).to_owned();
        plan.time = DRIVEN;
        plan.seed = seed + index as u64;
        plan.out = run_folder(&args.out(), nemesis, plan.seed);
        let line = start(&plan)?;
        calls += line.ok + line.failed + line.unknown;
        faults += line.fault_times();
        failures += usize::from(!line.passed);
    }
    let took = began.elapsed().as_secs();
    println!(
        "\n{} runs in {took} s: {failures} failed; {calls} calls, {faults} faults took effect",
        RUNS.len()
    );
    let enough = calls >= CALLS_MIN && faults >= FAULTS_MIN;
    if !enough {
        println!("that is too little to count: at least {CALLS_MIN} calls and {FAULTS_MIN} faults");
    }
    Ok(failures == 0 && enough)
}

/// Does the run as a process of its own, so that nothing of one run reaches the
/// next, and tells how it went in a line.
///
/// # Errors
/// When it left no result.
pub fn start(plan: &Plan) -> anyhow::Result<Line> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(plan.arguments()).stdout(Stdio::null());
    command.status()?;
    let line = Line::load(&plan.out)?;
    let Line { nemesis, seed, ok, failed, unknown, .. } = &line;
    let word = if line.passed { "passed" } else { "FAILED" };
    let faults = line.fault_times();
    println!("{word}  {nemesis} (seed {seed}): {ok} ok, {failed} failed, {unknown} unknown; {faults} faults");
    for objection in &line.objections {
        println!("        {objection}");
    }
    if !line.passed {
        println!("        page, histories and logs: {}", plan.out.display());
    }
    Ok(line)
}
