//! The power fails: a host loses everything that was not synced.
//!
//! The node is killed first, then its filesystem is cut from the device without
//! a flush of its journal, then mounted again; in this order, because a sync
//! under way while the filesystem goes down may be answered and yet be lost,
//! which no power failure does. Seen to have taken effect: a file written and
//! not synced after the kill is gone, and one that was synced before stayed.

use std::sync::Arc;

use futures_util::future::try_join_all;
use rand::RngExt as _;
use rand::rngs::StdRng;

use super::catalogue::{Entry, Lock, Needs};
use super::whom::Whom;
use super::{Deed, Fault, names, process};
use crate::context::Context;
use crate::hosts::command;
use crate::probe::Ability;

const NEEDS: Needs = Needs { members: 3, spares: 0, abilities: &[Ability::Shutdown] };
const LOCKS: &[Lock] = &[Lock::Nodes];

/// The faults of this file.
pub const FAULTS: &[Entry] = &[
    Entry { name: "power-one", needs: NEEDS, locks: LOCKS, make: || power("power-one", Whom::One) },
    Entry {
        name: "power-majority",
        needs: NEEDS,
        locks: LOCKS,
        make: || power("power-majority", Whom::Majority),
    },
    Entry { name: "power-all", needs: NEEDS, locks: LOCKS, make: || power("power-all", Whom::All) },
];

struct Power {
    name: &'static str,
    whom: Whom,
    hit: Vec<usize>,
}

fn power(name: &'static str, whom: Whom) -> Box<dyn Fault> {
    Box::new(Power { name, whom, hit: Vec::new() })
}

impl Fault for Power {
    fn name(&self) -> &'static str {
        self.name
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            self.hit = self.whom.draw(context, rng).await?;
            let hosts: Vec<_> = self.hit.iter().map(|index| &context.hosts.hosts[*index]).collect();
            // The kernel writes pages when it likes: sometimes some of what nobody synced is there afterwards.
            if rng.random_bool(0.25) {
                let lucky = hosts[rng.random_range(0..hosts.len())];
                command::run("sync", &["-f".as_ref(), lucky.mount.as_os_str()]).await?;
            }
            try_join_all(hosts.iter().map(|host| host.kill())).await?;
            let seen = try_join_all(hosts.iter().map(|host| host.power_fail())).await?;
            Ok(format!("{}: {}", names(context, &self.hit), seen[0]))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(process::start(context, &self.hit))
    }
}
