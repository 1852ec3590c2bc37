//! A network that loses packets, is narrow, or breaks connections.
//!
//! Everything happens on the switch, where the harness is, or in a host's own
//! namespace; the machine's network is not touched.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::RngExt as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;

use super::catalogue::{Entry, Lock, Needs};
use super::{Deed, Fault, leader_or_any, names, within};
use crate::context::Context;
use crate::hosts::{Host, command};
use crate::probe::Ability;

pub const FAULTS: &[Entry] = &[
    Entry {
        name: "loss",
        needs: Needs { members: 2, spares: 0, abilities: &[Ability::Nft] },
        locks: &[],
        make: || Box::new(Loss),
    },
    Entry {
        name: "bandwidth",
        needs: Needs { members: 2, spares: 0, abilities: &[Ability::Tbf] },
        locks: &[Lock::Pace],
        make: || Box::new(Bandwidth::default()),
    },
    Entry {
        name: "cut-connections",
        needs: Needs { members: 2, spares: 0, abilities: &[Ability::SocketKill] },
        locks: &[],
        make: || Box::new(CutConnections),
    },
];

/// Runs a command inside the network namespace of this name, which for a host is its own.
///
/// # Errors
/// When it fails there.
pub async fn inside(namespace: &str, words: &[&str]) -> anyhow::Result<String> {
    // Not `ip netns exec`, which makes mounts of its own that hold every host's disk while it lasts.
    let namespace = format!("--net=/run/netns/{namespace}");
    let mut all = vec![namespace.as_str()];
    all.extend(words);
    command::run("nsenter", &all).await
}

/// The switch's end of a host's cable.
fn port(host: &Host) -> String {
    format!("p{}", host.index + 1)
}

/// Has nft do something.
///
/// # Errors
/// What nft says.
pub async fn nft(script: &str) -> anyhow::Result<()> {
    command::run("nft", &[script]).await.map(drop)
}

/// Removes a table on the bridge, if it is there.
///
/// # Errors
/// What nft says.
pub async fn remove_table(table: &str) -> anyhow::Result<()> {
    nft(&format!("add table bridge {table}; delete table bridge {table};")).await
}

/// How many packets a named counter of a table has seen.
///
/// # Errors
/// When there is none.
pub async fn counter(table: &str, name: &str) -> anyhow::Result<u64> {
    let listed = command::line(&format!("nft -j list counter bridge {table} {name}")).await?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let parts = listed["nftables"].as_array().context("nft lists no counter")?;
    parts.iter().find_map(|part| part["counter"]["packets"].as_u64()).context("nft lists no counter")
}

/// One packet in five between members is lost.
struct Loss;

const LOSS_TABLE: &str = "loss";
const LOSS_PERCENT: u32 = 20;

impl Fault for Loss {
    fn name(&self) -> &'static str {
        "loss"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, _rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let members = context.hosts.members();
            let ips: Vec<String> =
                members.iter().map(|index| context.hosts.hosts[*index].ip.to_string()).collect();
            nft(&format!(
                "table bridge {LOSS_TABLE} {{
                     set peers {{ type ipv4_addr; elements = {{ {} }}; }}
                     counter seen {{ }}
                     counter lost {{ }}
                     chain forward {{ type filter hook forward priority 0; policy accept;
                         ip saddr @peers ip daddr @peers counter name seen;
                         ip saddr @peers ip daddr @peers numgen random mod 100 < {LOSS_PERCENT} \
                             counter name lost drop; }}
                 }}",
                ips.join(", ")
            ))
            .await?;
            within(Duration::from_secs(5), || async {
                // The members' own traffic is enough, unless nobody runs.
                let (first, second) = (&context.hosts.hosts[members[0]].name, &ips[1]);
                let script = format!("for i in {{1..50}}; do echo > /dev/udp/{second}/9; done; true");
                inside(first, &["bash", "-c", &script]).await?;
                let (seen, lost) = (counter(LOSS_TABLE, "seen").await?, counter(LOSS_TABLE, "lost").await?);
                ensure!(lost >= 10, "{lost} of {seen} packets lost");
                Ok(format!("{LOSS_PERCENT} % between {}: {lost} of {seen} so far", names(context, &members)))
            })
            .await
        })
    }

    fn heal<'a>(&'a mut self, _context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(remove_table(LOSS_TABLE))
    }
}

/// The leader's link carries little, both ways.
#[derive(Default)]
struct Bandwidth {
    victim: Option<usize>,
}

impl Fault for Bandwidth {
    fn name(&self) -> &'static str {
        "bandwidth"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let members = context.hosts.members();
            let victim = leader_or_any(context, &members).await;
            let kilobits = [256, 512, 1024].choose(rng).copied().unwrap_or(512);
            self.victim = Some(victim);
            let host = &context.hosts.hosts[victim];
            let bucket = format!("root tbf rate {kilobits}kbit burst 16kb latency 400ms");
            command::line(&format!("tc qdisc add dev {} {bucket}", port(host))).await?;
            let words = format!("tc qdisc add dev eth0 {bucket}");
            inside(&host.name, &words.split(' ').collect::<Vec<_>>()).await?;
            within(Duration::from_secs(5), || async {
                // More than the bucket holds, towards somebody else.
                let other = members.iter().find(|index| **index != victim).context("it is alone")?;
                let ip = context.hosts.hosts[*other].ip;
                let script = format!(
                    "p=$(printf '%01000d' 0); for i in {{1..40}}; do echo $p > /dev/udp/{ip}/9; done; true"
                );
                inside(&host.name, &["bash", "-c", &script]).await?;
                let shown = inside(&host.name, &["tc", "-s", "-j", "qdisc", "show", "dev", "eth0"]).await?;
                let shown: serde_json::Value = serde_json::from_str(&shown)?;
                let waited = shown[0]["overlimits"].as_u64().unwrap_or(0);
                ensure!(shown[0]["kind"] == "tbf" && waited > 0, "no packet had to wait: {shown}");
                Ok(format!("{} has {kilobits} kbit/s; {waited} times a packet waited so far", host.name))
            })
            .await
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            let Some(victim) = self.victim.take() else { return Ok(()) };
            let host = &context.hosts.hosts[victim];
            let outside = command::line(&format!("tc qdisc del dev {} root", port(host))).await;
            inside(&host.name, &["tc", "qdisc", "del", "dev", "eth0", "root"]).await?;
            outside.map(drop)
        })
    }
}

/// Every live connection of some hosts ends at once, to peers and to clients.
struct CutConnections;

impl Fault for CutConnections {
    fn name(&self) -> &'static str {
        "cut-connections"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let members = context.hosts.members();
            let mut victims = vec![leader_or_any(context, &members).await];
            if rng.random_bool(0.5) {
                victims = members;
            }
            let mut cut = 0;
            for victim in &victims {
                // Its exit code tells of sockets that were gone already; what it printed was cut.
                let script = "ss -K -H -t state established 2>/dev/null; true";
                let host = &context.hosts.hosts[*victim];
                cut += inside(&host.name, &["bash", "-c", script]).await?.lines().count();
            }
            ensure!(cut > 0, "{} had no connection to cut", names(context, &victims));
            Ok(format!("{cut} connections of {}", names(context, &victims)))
        })
    }

    fn heal<'a>(&'a mut self, _context: &'a Arc<Context>) -> Deed<'a, ()> {
        // Connections are made anew by who needs them.
        Box::pin(async { Ok(()) })
    }
}
