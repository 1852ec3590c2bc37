//! What an operator does on a good day, done on a bad one: handing over the
//! leadership, restarting every node, compacting and rewriting under load, and
//! bringing back a member that missed more than the log keeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mainstay::wire::etcdserverpb as pb;
use mainstay::wire::etcdserverpb::lease_client::LeaseClient;
use mainstay::wire::etcdserverpb::maintenance_client::MaintenanceClient;
use rand::RngExt as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::seq::SliceRandom as _;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::catalogue::{Entry, Lock, Needs};
use super::partition::Cut;
use super::{Deed, Fault, leader_or_any, names, operator, within};
use crate::client::Client;
use crate::context::Context;
use crate::hosts::Host;
use crate::judge::history::{Call, Outcome, Revision};
use crate::probe::Ability;

pub const FAULTS: &[Entry] = &[
    Entry {
        name: "leader-transfer",
        needs: Needs { members: 2, spares: 0, abilities: &[] },
        locks: &[],
        make: || Box::new(LeaderTransfer),
    },
    Entry {
        name: "rolling-restart",
        needs: Needs { members: 2, spares: 0, abilities: &[] },
        locks: &[Lock::Members, Lock::Nodes],
        make: || Box::new(RollingRestart),
    },
    Entry {
        name: "compact",
        needs: Needs { members: 1, spares: 0, abilities: &[] },
        locks: &[],
        make: || Box::new(Compact::default()),
    },
    Entry {
        name: "snapshot-behind",
        needs: Needs { members: 3, spares: 0, abilities: &[Ability::Nft] },
        // On a network that is slowed down, a snapshot takes longer than anybody waits for it.
        locks: &[Lock::Members, Lock::Nodes, Lock::Links, Lock::Pace],
        make: || Box::new(SnapshotBehind::default()),
    },
];

/// The leadership goes to another member, chosen by chance.
struct LeaderTransfer;

const TRANSFER_TIME_MAX: Duration = Duration::from_secs(10);

impl Fault for LeaderTransfer {
    fn name(&self) -> &'static str {
        "leader-transfer"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let mut order = context.hosts.members();
            order.shuffle(rng);
            within(TRANSFER_TIME_MAX, || async {
                let leader = context.hosts.leader().await.context("nobody leads")?;
                let target = order.iter().find(|index| **index != leader).context("it is alone")?;
                let (from, to) = (&context.hosts.hosts[leader], &context.hosts.hosts[*target]);
                let before = from.status().await?.term;
                operator::move_leader(from, to.status().await?.member).await?;
                let after = to.status().await?;
                ensure!(after.leader == after.member && after.term > before, "{} does not lead", to.name);
                Ok(format!("from {} to {}, term {before} to {}", from.name, to.name, after.term))
            })
            .await
        })
    }

    fn heal<'a>(&'a mut self, _context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// Every node is asked to stop and started again, one after the other.
struct RollingRestart;

const STOP_TIME_MAX: Duration = Duration::from_secs(15);
const START_TIME_MAX: Duration = Duration::from_secs(20);

impl Fault for RollingRestart {
    fn name(&self) -> &'static str {
        "rolling-restart"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let mut order = context.hosts.members();
            order.shuffle(rng);
            for index in &order {
                let host = &context.hosts.hosts[*index];
                let code = host.terminate(STOP_TIME_MAX).await?;
                ensure!(code == 0, "{} was asked to stop and ended with {code}", host.name);
                host.start().await?;
                within(START_TIME_MAX, || async { host.read().await })
                    .await
                    .with_context(|| format!("{} after its restart", host.name))?;
            }
            Ok(format!("stopped with exit code 0 and served again: {}", names(context, &order)))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move { context.hosts.settle(START_TIME_MAX).await })
    }
}

/// History is forgotten again and again, close behind the present, and the members' files are rewritten.
#[derive(Default)]
struct Compact {
    stop: CancellationToken,
    task: Option<JoinHandle<anyhow::Result<()>>>,
}

/// As what its calls are recorded.
const NAME: &str = "nemesis";
/// Between two compactions.
const COMPACT_INTERVAL: Duration = Duration::from_millis(200);
/// How long the first may take to show.
const COMPACT_TIME_MAX: Duration = Duration::from_secs(10);

impl Fault for Compact {
    fn name(&self) -> &'static str {
        "compact"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let mut members = context.hosts.members();
            members.shuffle(rng);
            let kept: i64 = rng.random_range(0..=200);
            let mark = within(COMPACT_TIME_MAX, || compact(context, kept)).await?;
            let rewritten = rewrite(context, &members).await?;
            let shown = within(COMPACT_TIME_MAX, || async {
                for member in &members {
                    let host = &context.hosts.hosts[*member];
                    match operator::metric(host, "mainstay_compacted_revision").await {
                        Ok(shown) if shown >= mark as f64 => return Ok(host.name.clone()),
                        _ => {}
                    }
                }
                bail!("nobody shows that {mark} is compacted")
            });
            let shown = shown.await?;
            let (stop, context) = (self.stop.clone(), context.clone());
            self.task = Some(tokio::spawn(async move {
                while !stop.is_cancelled() {
                    let _ = tokio::time::timeout(COMPACT_INTERVAL, stop.cancelled()).await;
                    // While other faults are on, it may well not work.
                    let _ = compact(&context, kept).await;
                }
                Ok(())
            }));
            Ok(format!(
                "all but {kept} revisions, up to {mark} first, as {shown} shows; {rewritten} was rewritten"
            ))
        })
    }

    fn heal<'a>(&'a mut self, _context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            self.stop.cancel();
            match self.task.take() {
                Some(task) => task.await?,
                None => Ok(()),
            }
        })
    }
}

/// Has one of these rewrite its files, whichever does; gives its name.
async fn rewrite(context: &Context, members: &[usize]) -> anyhow::Result<String> {
    let turn = AtomicUsize::new(0);
    within(COMPACT_TIME_MAX, || async {
        let next = turn.fetch_add(1, Ordering::Relaxed);
        let host = &context.hosts.hosts[members[next % members.len()]];
        let rewrite = |channel| async move {
            MaintenanceClient::new(channel).defragment(pb::DefragmentRequest {}).await
        };
        operator::call(host, rewrite).await?;
        Ok(host.name.clone())
    })
    .await
}

/// Forgets all but the last revisions, by way of the leader. The call is recorded like a client's: who judges the
/// history must know of it.
async fn compact(context: &Arc<Context>, kept: i64) -> anyhow::Result<Revision> {
    let leader = leader_or_any(context, &context.hosts.members()).await;
    // Not beyond what the record of everything has: nobody could judge what is forgotten before.
    let newest = context.hosts.hosts[leader].read().await?;
    let revision = newest.min(context.recorded()) - kept;
    ensure!(revision > 0, "there is no history of {kept} revisions yet");
    let mut client = Client::new(context, NAME, leader).with_deadline(COMPACT_TIME_MAX);
    match client.call(Call::Compact { revision }).await {
        Outcome::Ok(_) => Ok(revision),
        Outcome::Failed(why) | Outcome::Unknown(why) => bail!("not compacted to {revision}: {why}"),
    }
}

/// A follower is cut off until the others' logs begin beyond where its own ends: only a snapshot can bring it back.
#[derive(Default)]
struct SnapshotBehind {
    victim: Option<usize>,
    /// Snapshots it had installed before, and in which process.
    before: Option<(u32, f64)>,
    is_behind: bool,
}

const CUT: Cut = Cut { table: "snapshot-behind" };
/// How long the others may take to forget.
const PURGE_TIME_MAX: Duration = Duration::from_secs(60);
/// How long the snapshot may take to be installed.
const INSTALL_TIME_MAX: Duration = Duration::from_secs(60);
const FIRST_INDEX: &str = "mainstay_log_first_index";
const LAST_INDEX: &str = "mainstay_log_last_index";
const INSTALLED: &str = "mainstay_snapshots_installed_total";

impl Fault for SnapshotBehind {
    fn name(&self) -> &'static str {
        "snapshot-behind"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let members = context.hosts.members();
            let leader = leader_or_any(context, &members).await;
            let followers: Vec<usize> = members.iter().copied().filter(|member| *member != leader).collect();
            let victim = *followers.choose(rng).context("it has no follower")?;
            let others: Vec<usize> = members.iter().copied().filter(|member| *member != victim).collect();
            let host = &context.hosts.hosts[victim];
            self.victim = Some(victim);
            self.before = Some((host.pid()?, operator::metric(host, INSTALLED).await.unwrap_or(0.0)));
            let ways = others.iter().flat_map(|other| [(victim, *other), (*other, victim)]).collect();
            CUT.begin(context, &ways).await?;
            CUT.confirm(context, &ways).await?;
            let filling = Filling::start(context, others.clone());
            let behind = within(PURGE_TIME_MAX, || async {
                let last = operator::metric(host, LAST_INDEX).await?;
                for other in &others {
                    let first = operator::metric(&context.hosts.hosts[*other], FIRST_INDEX).await?;
                    ensure!(
                        first > last + 1.0,
                        "{} still has the log from {first}",
                        names(context, &[*other])
                    );
                }
                let first = operator::metric(&context.hosts.hosts[others[0]], FIRST_INDEX).await?;
                Ok((first, last))
            });
            let behind = behind.await;
            filling.stop().await;
            let (first, last) = behind?;
            self.is_behind = true;
            Ok(format!("{} has the log up to {last}, the others only from {first} on", host.name))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            CUT.end().await?;
            let (Some(victim), Some((pid, before)), true) = (self.victim, self.before, self.is_behind) else {
                return Ok(());
            };
            let host = &context.hosts.hosts[victim];
            within(INSTALL_TIME_MAX, || async {
                // A node that was started anew counts from the beginning.
                let before = if host.pid()? == pid { before } else { 0.0 };
                let installed = operator::metric(host, INSTALLED).await?;
                ensure!(installed > before, "{} has installed no snapshot", host.name);
                host.read().await.map(drop)
            })
            .await
        })
    }
}

/// Entries for the log that change no key, besides what clients write: leases that end by themselves.
struct Filling {
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

/// Calls at a time.
const FILLERS: usize = 16;
const FILLER_TTL_S: i64 = 2;

impl Filling {
    fn start(context: &Arc<Context>, through: Vec<usize>) -> Filling {
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        for filler in 0..FILLERS {
            let (context, stop) = (context.clone(), stop.clone());
            let index = through[filler % through.len()];
            tasks.spawn(async move {
                while !stop.is_cancelled() {
                    let host = &context.hosts.hosts[index];
                    if fill(host, &stop).await.is_err() {
                        tokio::time::sleep(COMPACT_INTERVAL).await;
                    }
                }
            });
        }
        Filling { stop, tasks }
    }

    async fn stop(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Grants leases on one connection until stopped, or until a call fails.
async fn fill(host: &Host, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut client = LeaseClient::new(operator::channel(host).await?);
    while !stop.is_cancelled() {
        let request = pb::LeaseGrantRequest { ttl: FILLER_TTL_S, id: 0 };
        match tokio::time::timeout(COMPACT_TIME_MAX, client.lease_grant(request)).await {
            Ok(granted) => drop(granted?),
            Err(_) => bail!("no answer"),
        }
    }
    Ok(())
}
