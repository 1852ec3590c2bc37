//! The harness: starts a real cluster on hosts of its own, drives it with
//! clients, breaks it, and judges what it saw.

mod client;
mod context;
mod faults;
mod full_history;
mod hosts;
mod judge;
mod probe;
mod watcher;
mod workloads;

fn main() -> anyhow::Result<()> {
    Ok(())
}
