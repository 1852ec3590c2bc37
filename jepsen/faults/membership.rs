//! Changes of who is a member, made as an operator makes them, while clients
//! write and other faults may be on.
//!
//! Whoever is added or replaced gets an empty disk first, and whoever is removed
//! ends by itself, as the product promises; both are waited for.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::RngExt as _;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, SliceRandom as _};

use super::catalogue::{Entry, Lock, Needs};
use super::{Deed, Fault, leader_or_any, names, operator, within};
use crate::context::Context;
use crate::hosts::{Host, Running};
use crate::judge::history::{Body, Call, Op, Outcome, Reply};

pub const FAULTS: &[Entry] = &[
    Entry {
        name: "grow-shrink",
        needs: Needs { members: 3, spares: CHANGED, abilities: &[] },
        // A node that is killed while it leaves would be started again as one that joins.
        locks: &[Lock::Members, Lock::Nodes],
        make: || Box::new(GrowShrink::default()),
    },
    Entry {
        name: "replace-node",
        needs: Needs { members: 3, spares: 0, abilities: &[] },
        locks: &[Lock::Members, Lock::Nodes],
        make: || Box::new(ReplaceNode::default()),
    },
    Entry {
        name: "remove-leader",
        needs: Needs { members: 3, spares: 0, abilities: &[] },
        locks: &[Lock::Members, Lock::Nodes],
        make: || Box::new(RemoveLeader::default()),
    },
];

/// How long one change may take while other faults come and go.
const CHANGE_TIME_MAX: Duration = Duration::from_secs(40);
/// How long a removed node may take to learn of it and end.
const END_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a new leader may take.
const ELECTION_TIME_MAX: Duration = Duration::from_secs(15);
/// The most members that a cluster grows to.
const MEMBERS_MAX: usize = 5;
/// With what `serve` ends when starting it again would change nothing: here, that it was removed.
pub const REMOVED_CODE: &str = "exit status: 7";

/// Makes a host's node, which does not run, a voter with an empty disk.
pub async fn join(context: &Context, host: &Host, as_learner: bool) -> anyhow::Result<()> {
    host.expect_exit(true);
    host.wipe().await?;
    let node = host.index;
    recorded(context, node, Call::MemberAdd { node }, vote(context, host, as_learner)).await?;
    host.expect_exit(false);
    Ok(())
}

async fn vote(context: &Context, host: &Host, as_learner: bool) -> anyhow::Result<()> {
    let urls: Vec<String> =
        context.hosts.members().iter().map(|index| context.hosts.hosts[*index].client_url()).collect();
    host.set_environment("MAINSTAY_KIND", as_learner.then_some("learner"));
    host.start_joining(&urls).await?;
    host.set_environment("MAINSTAY_KIND", None);
    within(CHANGE_TIME_MAX, || async {
        // A node that reaches nobody while it joins ends, and is started again.
        start_again(host).await?;
        if as_learner {
            operator::promote(context, host, Duration::from_secs(2)).await?;
        }
        operator::wait_voter(context, host, Duration::from_secs(2)).await
    })
    .await?;
    context.hosts.set_member(host.index, true);
    Ok(())
}

/// Makes a change and records it like a client's call: the judges must know from when on a node may serve, and until
/// when.
async fn recorded<T>(
    context: &Context,
    node: usize,
    call: Call,
    change: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let (process, invoked_ns) = (context.process(), context.now_ns());
    let result = change.await;
    let outcome = match &result {
        Ok(_) => {
            let members = context.hosts.members();
            let names = members.iter().map(|index| context.hosts.hosts[*index].name.clone()).collect();
            Outcome::Ok(Reply { revision: 0, body: Body::Members { names } })
        }
        Err(error) => Outcome::Unknown(format!("{error:#}")),
    };
    let returned_ns = context.now_ns();
    let op =
        Op { process, node, workload: "nemesis", call, request_id: None, invoked_ns, returned_ns, outcome };
    context.record(op);
    result
}

/// Removes a host's node from the cluster, whether it runs or not.
pub async fn remove(context: &Context, host: &Host) -> anyhow::Result<()> {
    let node = host.index;
    let change = async {
        operator::remove(context, host, CHANGE_TIME_MAX).await?;
        context.hosts.set_member(node, false);
        let known = operator::members(context, CHANGE_TIME_MAX).await?;
        ensure!(operator::member_of(&known, host).is_none(), "{} is still a member", host.name);
        Ok(())
    };
    recorded(context, node, Call::MemberRemove { node }, change).await
}

async fn start_again(host: &Host) -> anyhow::Result<()> {
    match host.running() {
        Running::Yes { .. } => Ok(()),
        Running::No => host.start().await,
    }
}

/// Removes a host's node, and waits until it has ended.
async fn leave(context: &Context, host: &Host) -> anyhow::Result<String> {
    host.expect_exit(true);
    remove(context, host).await?;
    let ended = match host.running() {
        Running::Yes { .. } => host.wait_end(END_TIME_MAX).await,
        Running::No => host.exits().pop().map(|(end, _)| end).context("it ended"),
    };
    // It may not hear of its removal: nobody needs to tell a node that is none of theirs. It must not serve then.
    ended.with_context(|| format!("{} was removed and goes on", host.name))
}

/// Grows by two to at most five members, and shrinks back; where there are five already, the other way round.
#[derive(Default)]
struct GrowShrink {
    added: Vec<usize>,
    removed: Vec<usize>,
}

/// Hosts that come or go.
const CHANGED: usize = 2;

impl GrowShrink {
    async fn grow(
        &mut self,
        context: &Context,
        spares: &[usize],
        rng: &mut StdRng,
    ) -> anyhow::Result<String> {
        let mut how = Vec::new();
        for spare in spares {
            let host = &context.hosts.hosts[*spare];
            let as_learner = rng.random_bool(0.5);
            self.added.push(*spare);
            join(context, host, as_learner).await.with_context(|| format!("{} joins", host.name))?;
            how.push(if as_learner { "by promotion" } else { "at once" });
        }
        Ok(format!("{} voted {}", names(context, &self.added), how.join(" and ")))
    }

    async fn shrink(&mut self, context: &Context, leaving: &[usize]) -> anyhow::Result<String> {
        for member in leaving {
            let host = &context.hosts.hosts[*member];
            self.removed.push(*member);
            let end = leave(context, host).await?;
            ensure!(end == REMOVED_CODE, "{} was removed and ended with {end}", host.name);
        }
        Ok(format!("{} were removed and ended by themselves", names(context, &self.removed)))
    }
}

impl Fault for GrowShrink {
    fn name(&self) -> &'static str {
        "grow-shrink"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let mut before = context.hosts.members();
            before.shuffle(rng);
            let mut spares: Vec<usize> =
                (0..context.hosts.hosts.len()).filter(|index| !before.contains(index)).collect();
            spares.shuffle(rng);
            spares.truncate(CHANGED.min(MEMBERS_MAX.saturating_sub(before.len())));
            let how = if spares.is_empty() {
                ensure!(before.len() > CHANGED, "there is no spare host, and nobody can be spared");
                self.shrink(context, &before[..CHANGED]).await?
            } else {
                self.grow(context, &spares, rng).await?
            };
            let after = context.hosts.members().len();
            Ok(format!("{} members became {after}: {how}", before.len()))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            while let Some(spare) = self.added.pop() {
                let host = &context.hosts.hosts[spare];
                let left = leave(context, host).await;
                host.kill().await?;
                host.wipe().await?;
                host.expect_exit(false);
                let end = left?;
                ensure!(end == REMOVED_CODE, "{} was removed and ended with {end}", host.name);
            }
            while let Some(member) = self.removed.pop() {
                rejoin(context, Some(member)).await?;
            }
            Ok(())
        })
    }
}

/// A node's host burns down; the node is removed, and another comes in its place with an empty disk.
#[derive(Default)]
struct ReplaceNode {
    victim: Option<usize>,
}

impl Fault for ReplaceNode {
    fn name(&self) -> &'static str {
        "replace-node"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let members = context.hosts.members();
            let victim = *members.choose(rng).context("there are members")?;
            let leader = leader_or_any(context, &members).await;
            self.victim = Some(victim);
            let host = &context.hosts.hosts[victim];
            host.expect_exit(true);
            host.kill().await?;
            remove(context, host).await?;
            host.wipe().await?;
            let part = if victim == leader { "leader" } else { "follower" };
            let left = names(context, &context.hosts.members());
            Ok(format!("{}, the {part}, killed, removed and wiped; left are {left}", host.name))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(rejoin(context, self.victim.take()))
    }
}

/// The leader removes itself, and comes back as a new member with an empty disk.
#[derive(Default)]
struct RemoveLeader {
    victim: Option<usize>,
}

impl Fault for RemoveLeader {
    fn name(&self) -> &'static str {
        "remove-leader"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, _rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let leader = leader_or_any(context, &context.hosts.members()).await;
            self.victim = Some(leader);
            let host = &context.hosts.hosts[leader];
            let end = leave(context, host).await?;
            ensure!(end == REMOVED_CODE, "{} was removed and ended with {end}", host.name);
            let next = within(ELECTION_TIME_MAX, || async {
                let next = context.hosts.leader().await.filter(|next| *next != leader);
                next.context("nobody took over from the leader that was removed")
            });
            let next = next.await?;
            Ok(format!(
                "{} led, was removed and ended by itself; {} leads",
                host.name,
                names(context, &[next])
            ))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(rejoin(context, self.victim.take()))
    }
}

/// Brings a host's node back: as it was when it is still a member, else as a new one.
async fn rejoin(context: &Context, victim: Option<usize>) -> anyhow::Result<()> {
    let Some(victim) = victim else { return Ok(()) };
    let host = &context.hosts.hosts[victim];
    let known = operator::members(context, CHANGE_TIME_MAX).await?;
    // What was injected may have stopped half way: then its disk is still that of a member.
    let is_member = operator::member_of(&known, host).is_some();
    if is_member && context.hosts.members().contains(&victim) {
        start_again(host).await?;
        operator::wait_voter(context, host, CHANGE_TIME_MAX).await?;
        host.expect_exit(false);
        return Ok(());
    }
    host.kill().await?;
    join(context, host, false).await.with_context(|| format!("{} joins again", host.name))
}
