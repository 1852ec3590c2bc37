//! The harness: starts a real cluster on hosts of its own, drives it with
//! clients, breaks it, and judges what it saw.

mod client;
mod context;
mod faults;
mod full_history;
mod hosts;
mod judge;
mod probe;
mod self_check;
mod watcher;
mod workloads;

use std::process::ExitCode;

use hosts::isolation::{Entered, Inside, enter};

fn main() -> anyhow::Result<ExitCode> {
    let inside = match enter()? {
        Entered::Inside(inside) => inside,
        Entered::Ended(code) => return Ok(code),
    };
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        tokio::select! {
            result = work(&inside, &args) => result,
            () = inside.stop.cancelled() => Err(anyhow::anyhow!("stopped by a signal")),
        }
    });
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn work(inside: &Inside, args: &[String]) -> anyhow::Result<()> {
    match args {
        [flag, rest @ ..] if flag == "--self-check" => self_check::run(inside, rest).await,
        _ => anyhow::bail!("usage: --self-check WHAT"),
    }
}
