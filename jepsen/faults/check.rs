//! The faults' check of themselves: `--self-check faults [NAME...]`, or
//! `--self-check power TIMES`.
//!
//! Each is injected under a simple load and healed. This proves that faults
//! take effect and that a cluster comes back; whether it kept every promise is
//! for the workloads, except the first of them: nothing acknowledged is lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mainstay::wire::channel::{ChannelOptions, connect_now};
use mainstay::wire::etcdserverpb::kv_client::KvClient;
use mainstay::wire::etcdserverpb::{PutRequest, RangeRequest};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::transport::Channel;

use super::catalogue::{self, Entry};
use crate::context::Context;
use crate::hosts::{Hosts, Shape};
use crate::nemesis::{self, Plan};
use crate::probe;

const SETTLE_TIME_MAX: Duration = Duration::from_secs(60);
const CALL_TIME_MAX: Duration = Duration::from_secs(2);
/// Writers, each with a node of its own.
const WRITERS: usize = 8;

/// Injects and heals each fault once.
pub async fn run(shape: Shape, names: &[String], hold: Duration) -> anyhow::Result<()> {
    let entries: Vec<Entry> = match names {
        [] => catalogue::all()?,
        names => names.iter().map(|name| catalogue::find(name)).collect::<anyhow::Result<_>>()?,
    };
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let plan = Plan::OneOf(entries.clone());
    for (ability, found) in probe::all(&plan.abilities(), &shape.run, &shape.binary).await {
        println!("can do {ability:?}: {}", found.with_context(|| format!("cannot do {ability:?}"))?);
    }
    let context = Arc::new(Context::new(seed, Hosts::create(shape).await?, 0));
    nemesis::prepare(&plan, &context.hosts).await?;
    context.hosts.start_all().await?;
    let load = Load::start(&context);
    let mut failed = Vec::new();
    for entry in entries {
        load.flows().await?;
        if let Err(error) = once(&context, entry, &mut rng, hold).await {
            println!("{}: FAILED: {error:#}", entry.name);
            failed.push(entry.name);
        }
    }
    load.finish(&context).await?;
    for host in &context.hosts.hosts {
        let exits: Vec<_> = host.exits().into_iter().filter(|(_, expected)| !expected).collect();
        ensure!(exits.is_empty(), "{} ended by itself: {exits:?}", host.name);
    }
    ensure!(failed.is_empty(), "these faults failed: {failed:?}");
    let complaints = context.hosts.complaints();
    ensure!(complaints.is_empty(), "{complaints:?}");
    Ok(())
}

async fn once(context: &Arc<Context>, entry: Entry, rng: &mut StdRng, hold: Duration) -> anyhow::Result<()> {
    let mut fault = (entry.make)();
    let began = Instant::now();
    let effect = fault.inject(context, rng).await;
    let injected = began.elapsed();
    tokio::time::sleep(hold).await;
    let began = Instant::now();
    let healed = fault.heal(context).await;
    let heal = began.elapsed();
    let effect = effect.context("injecting")?;
    healed.context("healing")?;
    context.hosts.settle(SETTLE_TIME_MAX).await?;
    let (name, serving) = (fault.name(), began.elapsed());
    println!("{name}: {effect} ({injected:.2?}; healed {heal:.2?}, serving {serving:.2?})");
    Ok(())
}

/// Clients that write their own keys, each value once.
struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<std::sync::atomic::AtomicU64>,
    writers: Vec<JoinHandle<BTreeMap<String, u64>>>,
}

impl Load {
    fn start(context: &Arc<Context>) -> Load {
        let (stop, written) = (Arc::<AtomicBool>::default(), Arc::default());
        let writer =
            |number| tokio::spawn(write(context.clone(), number, stop.clone(), Arc::clone(&written)));
        Load { writers: (0..WRITERS).map(writer).collect(), stop, written }
    }

    /// Waits until writes are acknowledged.
    async fn flows(&self) -> anyhow::Result<()> {
        let before = self.written.load(Ordering::Relaxed);
        let deadline = Instant::now() + SETTLE_TIME_MAX;
        while self.written.load(Ordering::Relaxed) < before + 100 {
            ensure!(Instant::now() < deadline, "no write was acknowledged for {SETTLE_TIME_MAX:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Stops, and holds what was acknowledged against what every member has.
    async fn finish(self, context: &Context) -> anyhow::Result<()> {
        self.flows().await?;
        self.stop.store(true, Ordering::Relaxed);
        let mut acknowledged = BTreeMap::new();
        for writer in self.writers {
            acknowledged.extend(writer.await?);
        }
        context.hosts.settle(SETTLE_TIME_MAX).await?;
        for index in context.hosts.members() {
            let found = read_all(&context.hosts.hosts[index].client_url()).await?;
            let lost = acknowledged.iter().filter(|(key, n)| found.get(*key).is_none_or(|found| found < n));
            let lost: Vec<_> = lost.collect();
            if !lost.is_empty() {
                bail!(
                    "{} of {} keys lost acknowledged writes: {:?}",
                    lost.len(),
                    acknowledged.len(),
                    lost[0]
                );
            }
        }
        println!("{} writes were acknowledged, none is lost", self.written.load(Ordering::Relaxed));
        Ok(())
    }
}

async fn connect(url: &str) -> anyhow::Result<KvClient<Channel>> {
    Ok(KvClient::new(connect_now(url, &ChannelOptions::default()).await?))
}

async fn write(
    context: Arc<Context>,
    number: usize,
    stop: Arc<AtomicBool>,
    written: Arc<std::sync::atomic::AtomicU64>,
) -> BTreeMap<String, u64> {
    let mut acknowledged = BTreeMap::new();
    let mut value = 0_u64;
    for turn in number.. {
        let members = context.hosts.members();
        let url = context.hosts.hosts[members[turn % members.len()]].client_url();
        if let Ok(mut client) = connect(&url).await {
            while !stop.load(Ordering::Relaxed) {
                value += 1;
                let key = format!("check/{number}/{:03}", value % 500);
                let put = PutRequest {
                    key: key.clone().into(),
                    value: value.to_string().into_bytes().into(),
                    ..PutRequest::default()
                };
                match tokio::time::timeout(CALL_TIME_MAX, client.put(put)).await {
                    Ok(Ok(_)) => acknowledged.insert(key, value),
                    _ => break,
                };
                written.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    acknowledged
}

async fn read_all(url: &str) -> anyhow::Result<BTreeMap<String, u64>> {
    let request = RangeRequest {
        key: b"check/".to_vec().into(),
        range_end: b"check0".to_vec().into(),
        ..RangeRequest::default()
    };
    let got = connect(url).await?.range(request).await?.into_inner();
    let number =
        |value: &[u8]| std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(got.kvs.iter().map(|kv| (String::from_utf8_lossy(&kv.key).into_owned(), number(&kv.value))).collect())
}
