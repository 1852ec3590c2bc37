//! The faults' check of themselves, on real nodes under a light load:
//! `--self-check faults [PLAN] [MEMBERS]`.
//!
//! It proves the machinery, not the store: each fault is injected once, is seen
//! to take effect, is healed, and the cluster serves again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use tokio::task::JoinSet;

use super::catalogue;
use crate::client::Client;
use crate::context::Context;
use crate::hosts::isolation::Inside;
use crate::hosts::{Hosts, Shape};
use crate::judge::history::{Action, Call, FaultRecord, Outcome};
use crate::nemesis::{self, Plan};
use crate::probe;

/// How long each fault stays.
const HOLD: Duration = Duration::from_secs(2);
/// Between two writes of a client.
const WRITE_INTERVAL: Duration = Duration::from_millis(10);
const SPARES: usize = 2;

/// Runs it.
///
/// # Errors
/// When a fault took no effect or was not healed, or a node ended by itself.
pub async fn run(inside: &Inside, binary: PathBuf, words: &[String]) -> anyhow::Result<()> {
    let names = words.first().map_or_else(|| catalogue::NAMES.join(","), |names| names.replace('+', ","));
    let members = words.get(1).map_or(Ok(3), |members| members.parse())?;
    let (plan, _) = Plan::parse(&names)?.fitted(members, SPARES)?;
    let mut shape = Shape::new(&inside.run, members, SPARES, binary.clone());
    if let Some(logs) = std::env::var_os("MAINSTAY_TEST_LOGS") {
        shape.logs = logs.into();
    }
    shape.snapshot_count = 500;
    for (ability, found) in probe::all(&plan.abilities(), &inside.run, &binary).await {
        println!("{ability:?}: {}", found.unwrap_or_else(|error| format!("cannot: {error:#}")));
    }
    let hosts = Hosts::create(shape).await?;
    nemesis::prepare(&plan, &hosts).await?;
    hosts.start_all().await?;
    let context = Arc::new(Context::new(1, hosts, 0));
    let load = load(&context);
    let mut failed = 0;
    let told = |record: &FaultRecord| {
        failed += usize::from(record.effect.is_err() || record.heal_error.is_some());
        tell(record);
    };
    let result = nemesis::once_each(&context, &plan, HOLD, told).await;
    context.stop();
    load.join_all().await;
    result?;
    let ops = context.history().ops;
    let acknowledged = ops.iter().filter(|op| matches!(op.outcome, Outcome::Ok(_))).count();
    println!("{acknowledged} of {} calls acknowledged", ops.len());
    for host in &context.hosts.hosts {
        let unexpected: Vec<_> = host.exits().into_iter().filter(|(_, expected)| !expected).collect();
        ensure!(unexpected.is_empty(), "{} ended by itself: {unexpected:?}", host.name);
        ensure!(!host.log_since(0).contains("panicked"), "{} panicked", host.name);
    }
    ensure!(failed == 0, "{failed} faults failed");
    Ok(())
}

fn tell(record: &FaultRecord) {
    let seconds = (record.healed_ns - record.started_ns) as f64 / 1e9;
    match &record.effect {
        Ok(effect) => println!("{} ({seconds:.1} s): {effect}", record.name),
        Err(why) => println!("{} ({seconds:.1} s) TOOK NO EFFECT: {why}", record.name),
    }
    if let Some(why) = &record.heal_error {
        println!("{} NOT HEALED: {why}", record.name);
    }
}

/// One client per member that writes all the time.
fn load(context: &Arc<Context>) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for node in context.hosts.members() {
        let context = context.clone();
        clients.spawn(async move {
            let mut client = Client::new(&context, "check", node);
            let mut number = 0u64;
            while !context.stopped() {
                number += 1;
                let action = Action::Put {
                    key: format!("check/{node}/{}", number % 50),
                    value: format!("{number:0200}"),
                    lease: 0,
                    prev_kv: false,
                };
                client.call(Call::Single { action, serializable: false }).await;
                context.sleep(WRITE_INTERVAL).await;
            }
        });
    }
    clients
}
