//! The harness: starts a real cluster on hosts of its own, drives it with
//! clients, breaks it, and judges what it saw.

mod client;
mod context;
mod faults;
mod full_history;
mod hosts;
mod judge;
mod nemesis;
mod probe;
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
            result = self_check(&inside, &args) => result,
            () = inside.stop.cancelled() => Err(anyhow::anyhow!("stopped by a signal")),
        }
    });
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn self_check(inside: &Inside, args: &[String]) -> anyhow::Result<()> {
    let binary = std::env::var_os("MAINSTAY_TEST_BINARY").unwrap_or(env!("CARGO_BIN_EXE_mainstay").into());
    match args {
        [flag, what] if flag == "--self-check" && what == "hosts" => {
            hosts::check::run(inside, binary.into()).await
        }
        [flag, what, words @ ..] if flag == "--self-check" && what == "faults" => {
            faults::check::run(inside, binary.into(), words).await
        }
        _ => anyhow::bail!("usage: --self-check hosts | faults [PLAN] [MEMBERS]"),
    }
}
