//! The hosts' check of themselves, on real nodes: `--self-check hosts`.
//!
//! It proves the machinery, not the store.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::time::Instant;

use super::{Hosts, Running, Shape, process_state};

const WAIT: Duration = Duration::from_secs(30);

/// Makes five hosts, starts three nodes, does everything to them once, and says how long each took.
pub async fn run(shape: Shape) -> anyhow::Result<()> {
    let began = Instant::now();
    let hosts = Hosts::create(shape).await?;
    let made = began.elapsed();
    println!("made 5 hosts in {made:?}");
    ensure!(made < Duration::from_secs(5), "that is too slow");
    step("3 nodes serve", hosts.start_all()).await?;
    let leader = hosts.leader().await.context("a leader")?;
    println!("{} leads", hosts.hosts[leader].name);
    step("kill and restart of the leader", kill(&hosts, leader)).await?;
    step("pause of the leader", pause(&hosts)).await?;
    step("graceful end of n1", terminate(&hosts)).await?;
    step("power failure of all", power(&hosts)).await?;
    step("n4 joins", join(&hosts)).await?;
    for host in &hosts.hosts {
        ensure!(host.exits().is_empty(), "{} ended by itself: {:?}", host.name, host.exits());
    }
    println!("hosts: all is well, {:?} in all", began.elapsed());
    Ok(())
}

async fn step(what: &str, work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let began = Instant::now();
    work.await.with_context(|| what.to_owned())?;
    println!("{what}: {:?}", began.elapsed());
    Ok(())
}

async fn kill(hosts: &Hosts, victim: usize) -> anyhow::Result<()> {
    let host = &hosts.hosts[victim];
    let pid = host.pid()?;
    host.kill().await?;
    ensure!(host.running() == Running::No && process_state(pid).is_err(), "process {pid} is still there");
    another_leads(hosts, victim).await?;
    hosts.settle(WAIT).await
}

async fn another_leads(hosts: &Hosts, before: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + WAIT;
    while hosts.leader().await.is_none_or(|next| next == before) {
        ensure!(Instant::now() < deadline, "nobody took over");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn pause(hosts: &Hosts) -> anyhow::Result<()> {
    let leader = hosts.wait_leader(WAIT).await?;
    let host = &hosts.hosts[leader];
    host.pause().await?;
    another_leads(hosts, leader).await?;
    host.resume().await?;
    hosts.settle(WAIT).await
}

async fn terminate(hosts: &Hosts) -> anyhow::Result<()> {
    let code = hosts.hosts[0].terminate(Duration::from_secs(10)).await?;
    ensure!(code == 0, "exit code {code}");
    hosts.settle(WAIT).await
}

async fn power(hosts: &Hosts) -> anyhow::Result<()> {
    let members = hosts.members();
    for index in &members {
        hosts.hosts[*index].kill().await?;
    }
    for index in &members {
        hosts.hosts[*index].power_fail().await?;
    }
    hosts.settle(WAIT).await
}

async fn join(hosts: &Hosts) -> anyhow::Result<()> {
    hosts.hosts[3].start_joining(&hosts.client_urls()).await?;
    hosts.set_member(3, true);
    hosts.settle(WAIT).await?;
    // And it is the same member after a restart.
    hosts.hosts[3].kill().await?;
    hosts.settle(WAIT).await
}
