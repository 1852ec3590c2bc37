//! Partitions: packets between chosen hosts are dropped on the switch, silently
//! and in chosen directions.
//!
//! Clients are left alone, except by the one fault that cuts nobody else. Each
//! fault has an nft table of its own, so that healing one leaves the others. A
//! partition took effect when every direction that it cuts has dropped packets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::RngExt as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use super::catalogue::{Entry, Lock, Needs};
use super::network::{inside, nft, remove_table};
use super::{Deed, Fault, leader_or_any, names, within};
use crate::context::Context;
use crate::hosts::Host;
use crate::probe::Ability;

pub const FAULTS: &[Entry] = &[
    entry("partition-leader-alone", || Partition::boxed("partition-leader-alone", Shape::LeaderAlone)),
    entry("partition-leader-majority", || {
        Partition::boxed("partition-leader-majority", Shape::LeaderMajority)
    }),
    entry("partition-halves", || Partition::boxed("partition-halves", Shape::Halves)),
    entry("partition-ring", || Partition::boxed("partition-ring", Shape::Ring)),
    entry("partition-bridge", || Partition::boxed("partition-bridge", Shape::Bridge)),
    entry("partition-one-way-in", || Partition::boxed("partition-one-way-in", Shape::OneWayIn)),
    entry("partition-one-way-out", || Partition::boxed("partition-one-way-out", Shape::OneWayOut)),
    entry("partition-clients", || Box::new(ClientsCut)),
];

const fn entry(name: &'static str, make: fn() -> Box<dyn Fault>) -> Entry {
    let needs = Needs { members: 3, spares: 0, abilities: &[Ability::Nft] };
    Entry { name, needs, locks: &[Lock::Links], make }
}

/// How long a cut may take to drop something in every direction. The packets are sent by the harness.
const EFFECT_TIME_MAX: Duration = Duration::from_secs(3);

/// What a partition looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    LeaderAlone,
    /// The leader and as many as make a majority with it, against the rest.
    LeaderMajority,
    /// Two sides as equal as can be, drawn without regard to the leader.
    Halves,
    /// Everyone sees a majority, no two the same one. Three hosts are too few for that: there the
    /// leader and one follower do not see each other, and the other sees both.
    Ring,
    /// Two sides that only one host in the middle sees. Of three hosts, the middle and one on each side.
    Bridge,
    /// The leader hears nobody, and everybody hears it.
    OneWayIn,
    /// Nobody hears the leader, and it hears everybody.
    OneWayOut,
}

impl Shape {
    /// Who does not reach whom. `hosts` is in drawn order, the leader first.
    fn ways(self, hosts: &[usize]) -> BTreeSet<(usize, usize)> {
        let count = hosts.len();
        let majority = count / 2 + 1;
        let (leader, others) = (hosts[0], &hosts[1..]);
        match self {
            Shape::OneWayIn => others.iter().map(|other| (*other, leader)).collect(),
            Shape::OneWayOut => others.iter().map(|other| (leader, *other)).collect(),
            Shape::LeaderAlone => apart(&hosts[..1], others),
            // While another fault has removed a member, a cluster of three has two.
            _ if count == 2 => apart(&hosts[..1], others),
            Shape::LeaderMajority => apart(&hosts[..majority], &hosts[majority..]),
            // Which side the leader is on follows from the last of the drawn order.
            Shape::Halves if hosts[count - 1].is_multiple_of(2) => {
                apart(&hosts[..count / 2], &hosts[count / 2..])
            }
            Shape::Halves => apart(&hosts[..count - count / 2], &hosts[count - count / 2..]),
            Shape::Ring if count == 3 => apart(&hosts[..1], &hosts[1..2]),
            Shape::Ring => ring(hosts, majority),
            Shape::Bridge => {
                let middle = count / 2;
                apart(&hosts[..middle], &hosts[middle + 1..])
            }
        }
    }
}

/// Both ways between two sides.
pub fn apart(left: &[usize], right: &[usize]) -> BTreeSet<(usize, usize)> {
    let pairs = left.iter().flat_map(|a| right.iter().map(move |b| (*a, *b)));
    pairs.flat_map(|(a, b)| [(a, b), (b, a)]).collect()
}

/// Cuts everyone from those who are too far away on a ring for the nearest to make a majority.
fn ring(hosts: &[usize], majority: usize) -> BTreeSet<(usize, usize)> {
    let count = hosts.len();
    let reach = (majority - 1).div_ceil(2);
    let mut ways = BTreeSet::new();
    for (at, a) in hosts.iter().enumerate() {
        for (other, b) in hosts.iter().enumerate() {
            let distance = at.abs_diff(other).min(count - at.abs_diff(other));
            if distance > reach {
                ways.insert((*a, *b));
            }
        }
    }
    ways
}

/// Some of the peers do not reach some others.
struct Partition {
    name: &'static str,
    shape: Shape,
}

impl Partition {
    fn boxed(name: &'static str, shape: Shape) -> Box<dyn Fault> {
        Box::new(Partition { name, shape })
    }
}

impl Fault for Partition {
    fn name(&self) -> &'static str {
        self.name
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let mut members = context.hosts.members();
            members.shuffle(rng);
            ensure!(members.len() >= 2, "there is nobody to part {} from", names(context, &members));
            let leader = leader_or_any(context, &members).await;
            members.sort_by_key(|member| *member != leader);
            let ways = self.shape.ways(&members);
            let cut = Cut { table: self.name };
            cut.begin(context, &ways).await?;
            let dropped = cut.confirm(context, &ways).await?;
            let shown: Vec<String> =
                ways.iter().map(|(from, to)| names(context, &[*from, *to]).replace(' ', ">")).collect();
            let leader = names(context, &[leader]);
            Ok(format!("leader {leader}; no way {}; {dropped} packets dropped so far", shown.join(" ")))
        })
    }

    fn heal<'a>(&'a mut self, _context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move { Cut { table: self.name }.end().await })
    }
}

/// Directions between hosts in which nothing passes, as one nft table.
pub struct Cut {
    /// Names the table; the name of the fault.
    pub table: &'static str,
}

impl Cut {
    /// Drops from here on what goes these ways.
    ///
    /// # Errors
    /// When nft does not take it.
    pub async fn begin(&self, context: &Context, ways: &BTreeSet<(usize, usize)>) -> anyhow::Result<()> {
        let ip = |index: usize| context.hosts.hosts[index].ip;
        let elements: Vec<String> =
            ways.iter().map(|(from, to)| format!("{} . {}", ip(*from), ip(*to))).collect();
        nft(&format!(
            "table bridge {} {{
                 set cut {{ type ipv4_addr . ipv4_addr; counter; elements = {{ {} }}; }}
                 chain forward {{ type filter hook forward priority 0; policy accept;
                     ip saddr . ip daddr @cut drop; }}
             }}",
            underlined(self.table),
            elements.join(", ")
        ))
        .await
    }

    /// Sends something every way, and waits until it was dropped every way; gives how much was.
    ///
    /// # Errors
    /// When some way still lets everything through.
    pub async fn confirm(&self, context: &Context, ways: &BTreeSet<(usize, usize)>) -> anyhow::Result<u64> {
        within(EFFECT_TIME_MAX, || async {
            send_datagrams(context, ways).await?;
            let counts = self.counts().await?;
            let ip = |index: usize| context.hosts.hosts[index].ip.to_string();
            for (from, to) in ways {
                let dropped = counts.get(&(ip(*from), ip(*to))).copied().unwrap_or(0);
                ensure!(dropped > 0, "nothing was dropped on {}", names(context, &[*from, *to]));
            }
            Ok(counts.values().sum())
        })
        .await
    }

    /// Lets everything pass again. May be called without a beginning.
    ///
    /// # Errors
    /// When nft does not.
    pub async fn end(&self) -> anyhow::Result<()> {
        remove_table(&underlined(self.table)).await
    }

    async fn counts(&self) -> anyhow::Result<BTreeMap<(String, String), u64>> {
        let table = underlined(self.table);
        let listed = crate::hosts::command::line(&format!("nft -j list set bridge {table} cut")).await?;
        let listed: serde_json::Value = serde_json::from_str(&listed)?;
        let parts = listed["nftables"].as_array().context("nft lists no set")?;
        let elements = parts.iter().filter_map(|part| part["set"]["elem"].as_array()).flatten();
        let mut counts = BTreeMap::new();
        for element in elements {
            let way = &element["elem"]["val"]["concat"];
            let end = |at: usize| way[at].as_str().unwrap_or_default().to_owned();
            let packets = element["elem"]["counter"]["packets"].as_u64().unwrap_or(0);
            counts.insert((end(0), end(1)), packets);
        }
        Ok(counts)
    }
}

/// A name as nft takes it.
pub fn underlined(name: &str) -> String {
    name.replace('-', "_")
}

/// Sends one datagram each way, to a port where nobody listens.
async fn send_datagrams(context: &Context, ways: &BTreeSet<(usize, usize)>) -> anyhow::Result<()> {
    let mut targets: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for (from, to) in ways {
        targets.entry(*from).or_default().push(context.hosts.hosts[*to].ip.to_string());
    }
    for (from, to) in targets {
        let script = format!("for ip in {}; do echo > /dev/udp/$ip/9; done; true", to.join(" "));
        inside(&context.hosts.hosts[from].name, &["bash", "-c", &script]).await?;
    }
    Ok(())
}

/// Clients do not reach some of the nodes, the leader among them; nodes reach each other.
struct ClientsCut;

const CLIENTS_TABLE: &str = "partition_clients";

impl Fault for ClientsCut {
    fn name(&self) -> &'static str {
        "partition-clients"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let mut members = context.hosts.members();
            members.shuffle(rng);
            let leader = leader_or_any(context, &members).await;
            members.sort_by_key(|member| *member != leader);
            // At least one stays in reach, so that there is something to compare with.
            members.truncate(rng.random_range(1..members.len()));
            let hosts: Vec<&Host> = members.iter().map(|index| &context.hosts.hosts[*index]).collect();
            let ips: Vec<String> = hosts.iter().map(|host| host.ip.to_string()).collect();
            nft(&format!(
                "table bridge {CLIENTS_TABLE} {{
                     set shut {{ type ipv4_addr; elements = {{ {} }}; }}
                     counter dropped_in {{ }}
                     counter dropped_out {{ }}
                     chain input {{ type filter hook input priority 0; policy accept;
                         ip saddr @shut counter name dropped_in drop; }}
                     chain output {{ type filter hook output priority 0; policy accept;
                         ip daddr @shut counter name dropped_out drop; }}
                 }}",
                ips.join(", ")
            ))
            .await?;
            let socket = tokio::net::UdpSocket::bind("0.0.0.0:0").await?;
            for ip in &ips {
                // Dropped on its way out, which the sender may or may not be told.
                let _ = socket.send_to(b"?", format!("{ip}:9")).await;
                let url = format!("{ip}:2379");
                let connect = tokio::net::TcpStream::connect(url);
                let answered = tokio::time::timeout(Duration::from_millis(300), connect).await;
                ensure!(!matches!(answered, Ok(Ok(_))), "clients still reach {ip}");
            }
            let dropped = super::network::counter(CLIENTS_TABLE, "dropped_out").await?;
            ensure!(dropped > 0, "nothing was dropped");
            Ok(format!("clients do not reach {}; {dropped} packets dropped so far", names(context, &members)))
        })
    }

    fn heal<'a>(&'a mut self, _context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(remove_table(CLIENTS_TABLE))
    }
}
