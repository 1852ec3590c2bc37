//! The harness: starts a real cluster on hosts of its own, drives it with
//! clients, breaks it, and judges what it saw.
//!
//! `args` is the command line, `run` one run, `suite` the runs behind `make
//! jepsen`, `matrix` those behind `make jepsen-long`, `mutant_runs` those behind
//! `make jepsen-mutants`. Hosts, faults and workloads are below folders of their
//! names; `judge` decides.

mod args;
mod client;
mod context;
mod faults;
mod full_history;
mod hosts;
#[allow(
    unused_imports,
    dead_code,
    reason = "without libtest's harness, unit tests vanish and leave what they used"
)]
mod judge;
mod matrix;
mod mutant_runs;
mod nemesis;
mod probe;
mod report;
mod results;
mod run;
mod self_check;
mod suite;
mod watcher;
mod workloads;

use std::process::ExitCode;

use clap::Parser;

use args::Args;
use hosts::isolation::{Entered, Inside, enter};

/// Calls that `--judge-speed` judges, and the time that it may take for them.
const SPEED_CALLS: usize = 1_000_000;
const SPEED_SECONDS_MAX: f64 = 10.0;

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if args.judge_speed {
        return Ok(pass(judge_speed()));
    }
    // These start a run each as a process of its own.
    if args.suite {
        return suite::run(&args).map(pass);
    }
    if args.matrix {
        return matrix::run(&args).map(pass);
    }
    if args.mutants {
        return mutant_runs::run(&args).map(pass);
    }
    match enter()? {
        Entered::Ended(code) => Ok(code),
        Entered::Inside(inside) => inside_namespaces(&inside, &args),
    }
}

fn inside_namespaces(inside: &Inside, args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(async {
        tokio::select! {
            result = perform(inside, args) => result,
            () = inside.stop.cancelled() => Err(anyhow::anyhow!("stopped by a signal")),
        }
    });
    runtime.shutdown_background();
    result.map(pass)
}

async fn perform(inside: &Inside, args: &Args) -> anyhow::Result<bool> {
    if !args.self_check.is_empty() {
        return self_check::run(inside, &args.self_check).await.map(|()| true);
    }
    let plan = args.plan()?;
    let report = plan.run(inside).await?;
    print!("{}", report.text());
    println!("page and histories: {}", plan.out.display());
    Ok(report.objections().is_empty())
}

fn judge_speed() -> bool {
    let (took, verdict) = judge::linearizable::speed(SPEED_CALLS);
    println!("{SPEED_CALLS} calls judged in {:.2} s: {:?}", took.as_secs_f64(), verdict.outcome);
    verdict.held() && took.as_secs_f64() < SPEED_SECONDS_MAX
}

fn pass(passed: bool) -> ExitCode {
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
