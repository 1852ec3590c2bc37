//! What happens to processes: they are killed, or stand still.
//!
//! A killed node has lost nothing that it wrote, synced or not; see `power` for
//! that. Seen to have taken effect: the kernel has no such process any more, or
//! shows it as stopped.

use std::sync::Arc;

use anyhow::ensure;
use futures_util::future::try_join_all;
use rand::rngs::StdRng;

use super::catalogue::{Entry, Lock, Needs};
use super::whom::Whom;
use super::{Deed, Fault, names};
use crate::context::Context;
use crate::hosts::{Running, process_state};

const NEEDS: Needs = Needs { members: 3, spares: 0, abilities: &[] };
const LOCKS: &[Lock] = &[Lock::Nodes];

/// The faults of this file.
pub const FAULTS: &[Entry] = &[
    Entry { name: "kill-one", needs: NEEDS, locks: LOCKS, make: || kill("kill-one", Whom::One) },
    Entry {
        name: "kill-majority",
        needs: NEEDS,
        locks: LOCKS,
        make: || kill("kill-majority", Whom::Majority),
    },
    Entry { name: "kill-all", needs: NEEDS, locks: LOCKS, make: || kill("kill-all", Whom::All) },
    Entry { name: "pause-leader", needs: NEEDS, locks: LOCKS, make: || pause("pause-leader", Whom::Leader) },
    Entry {
        name: "pause-majority",
        needs: NEEDS,
        locks: LOCKS,
        make: || pause("pause-majority", Whom::Majority),
    },
];

/// SIGKILL; healed by a start.
struct Kill {
    name: &'static str,
    whom: Whom,
    hit: Vec<usize>,
}

fn kill(name: &'static str, whom: Whom) -> Box<dyn Fault> {
    Box::new(Kill { name, whom, hit: Vec::new() })
}

impl Fault for Kill {
    fn name(&self) -> &'static str {
        self.name
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            self.hit = self.whom.draw(context, rng).await?;
            try_join_all(self.hit.iter().map(async |index| {
                let host = &context.hosts.hosts[*index];
                let pid = host.pid()?;
                host.kill().await?;
                ensure!(process_state(pid).is_err(), "{} still has process {pid}", host.name);
                anyhow::Ok(())
            }))
            .await?;
            Ok(format!("{}: no such process any more", names(context, &self.hit)))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(start(context, &self.hit))
    }
}

/// Starts the nodes that do not run.
pub async fn start(context: &Context, hit: &[usize]) -> anyhow::Result<()> {
    for index in hit {
        let host = &context.hosts.hosts[*index];
        if host.running() == Running::No {
            host.start().await?;
        }
    }
    Ok(())
}

/// SIGSTOP; healed by SIGCONT.
struct Pause {
    name: &'static str,
    whom: Whom,
    hit: Vec<usize>,
}

fn pause(name: &'static str, whom: Whom) -> Box<dyn Fault> {
    Box::new(Pause { name, whom, hit: Vec::new() })
}

impl Fault for Pause {
    fn name(&self) -> &'static str {
        self.name
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            self.hit = self.whom.draw(context, rng).await?;
            try_join_all(self.hit.iter().map(|index| context.hosts.hosts[*index].pause())).await?;
            Ok(format!("{}: the kernel shows it as stopped", names(context, &self.hit)))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            let hit = self.hit.iter().map(|index| &context.hosts.hosts[*index]);
            let alive = hit.filter(|host| host.running() != Running::No);
            try_join_all(alive.map(|host| host.resume())).await.map(drop)
        })
    }
}
