//! A member's disk is replaced by an empty one, and its node is started as it
//! always was: what an operator does who trusts that "it will catch up".
//!
//! It must not be taken in, because it has forgotten what it voted for and what
//! it acknowledged. It is asked at the worst moment: those who share the newest
//! entries with it are cut off, and those who do not have them are in reach, so
//! that with its vote they would make a majority that never heard of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use super::catalogue::{Entry, Lock, Needs};
use super::membership::{REMOVED_CODE, join, remove};
use super::partition::{Cut, apart};
use super::{Deed, Fault, leader_or_any, names};
use crate::context::Context;
use crate::probe::Ability;

/// The faults of this file.
pub const FAULTS: &[Entry] = &[Entry {
    name: "wiped-member",
    needs: Needs { members: 3, spares: 0, abilities: &[Ability::Nft] },
    locks: &[Lock::Members, Lock::Nodes, Lock::Links],
    make: || Box::new(WipedMember::default()),
}];

/// Keeps the late ones from what is acknowledged meanwhile.
const LATE: Cut = Cut { table: "wiped-late" };
/// Keeps those who have it from the wiped one.
const WITNESSES: Cut = Cut { table: "wiped-witnesses" };
/// How long clients write without the late ones.
const LATE_TIME: Duration = Duration::from_secs(1);
/// How long the wiped node may take to find out that it is not wanted.
const REFUSAL_TIME_MAX: Duration = Duration::from_secs(10);

#[derive(Default)]
struct WipedMember {
    victim: Option<usize>,
}

impl Fault for WipedMember {
    fn name(&self) -> &'static str {
        "wiped-member"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let members = context.hosts.members();
            ensure!(members.len() >= 3, "{} members are too few", members.len());
            let leader = leader_or_any(context, &members).await;
            let mut followers: Vec<usize> =
                members.iter().copied().filter(|member| *member != leader).collect();
            followers.shuffle(rng);
            let victim = followers.pop().context("it has followers")?;
            let late = followers.split_off(followers.len() - (members.len() - 1) / 2);
            let witnesses: Vec<usize> = followers.into_iter().chain([leader]).collect();
            let host = &context.hosts.hosts[victim];

            let ways = apart(&late, &with(&witnesses, victim));
            LATE.begin(context, &ways).await?;
            LATE.confirm(context, &ways).await?;
            tokio::time::sleep(LATE_TIME).await;
            host.expect_exit(true);
            self.victim = Some(victim);
            host.kill().await?;
            // The second cut stands before the first one falls: nothing slips through between them.
            let ways: BTreeSet<(usize, usize)> = apart(&witnesses, &with(&late, victim));
            WITNESSES.begin(context, &ways).await?;
            host.wipe().await?;
            LATE.end().await?;
            host.start().await?;
            let ended = host.wait_end(REFUSAL_TIME_MAX).await;
            let late = names(context, &late);
            match ended {
                Ok(end) => {
                    ensure!(end == REMOVED_CODE, "{} was wiped, and ended with {end}", host.name);
                    Ok(format!("{} was wiped and would not start beside {late}: {end}", host.name))
                }
                // One that had joined asks to be let in again, under another id: that is no vote of the old one's.
                Err(_) if host.status().await.is_err() => {
                    Ok(format!("{} was wiped, and waits outside beside {late}", host.name))
                }
                // One that once joined asks to be let in for longer than this, and serves nobody meanwhile.
                Err(_) if host.status().await.is_err() => {
                    Ok(format!("{} was wiped and waits beside {late} to be let in", host.name))
                }
                Err(_) => {
                    let complaint = format!("{} was wiped and takes part as if it had not been", host.name);
                    context.hosts.complain(complaint.clone());
                    Ok(complaint)
                }
            }
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            LATE.end().await?;
            WITNESSES.end().await?;
            let Some(victim) = self.victim.take() else { return Ok(()) };
            // As it should have been done: out with the old member, in with a new one.
            let host = &context.hosts.hosts[victim];
            host.kill().await?;
            remove(context, host).await?;
            join(context, host, false).await.with_context(|| format!("{} joins again", host.name))
        })
    }
}

fn with(some: &[usize], another: usize) -> Vec<usize> {
    some.iter().copied().chain([another]).collect()
}
