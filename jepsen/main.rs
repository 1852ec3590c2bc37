//! The harness: starts a real cluster on hosts of its own, drives it with
//! clients, breaks it, and judges what it saw.
//!
//! `args` is the command line, `run` one run, `suite` the runs behind `make
//! jepsen`, `matrix` those behind `make jepsen-long`. Hosts, faults and
//! workloads are below folders of their names; `judge` decides.

mod args;
mod client;
mod context;
mod faults;
mod full_history;
mod hosts;
mod judge;
mod matrix;
mod nemesis;
mod probe;
mod report;
mod run;
mod suite;
mod watcher;
mod workloads;

use std::process::ExitCode;

use clap::Parser;

use args::Args;

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if args.judge_speed {
        return Ok(pass(judge::linearizable::speed()));
    }
    // Before any thread exists: what is entered holds for the threads that come after.
    hosts::isolation::enter()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(perform(args)).map(pass)
}

async fn perform(args: Args) -> anyhow::Result<bool> {
    if let Some(what) = &args.self_check {
        return hosts::self_check(what, &args).await;
    }
    if args.suite {
        return suite::run(&args).await;
    }
    if args.matrix {
        return matrix::run(&args).await;
    }
    let plan = args.plan()?;
    let report = plan.run().await?;
    print!("{}", report.text());
    println!("page and histories: {}", plan.out.display());
    Ok(report.objections().is_empty())
}

fn pass(passed: bool) -> ExitCode {
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
