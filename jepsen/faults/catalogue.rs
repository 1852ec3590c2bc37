//! Every fault by name: what it needs, what it excludes, how it is made.
//!
//! Each family lists its own faults in a table called `FAULTS`; here they come
//! together and are held against [`NAMES`], so that none is forgotten. It
//! injects nothing.

use anyhow::{Context as _, bail, ensure};

use super::{
    Fault, clock, damage, delay, disk, maintenance, membership, network, partition, power, process, wiped,
};
use crate::probe::Ability;

/// Every fault that there must be, in the order in which results are shown.
pub const NAMES: &[&str] = &[
    "kill-one",
    "kill-majority",
    "kill-all",
    "pause-leader",
    "pause-majority",
    "partition-leader-alone",
    "partition-leader-majority",
    "partition-halves",
    "partition-ring",
    "partition-bridge",
    "partition-one-way-in",
    "partition-one-way-out",
    "partition-clients",
    "delay",
    "jitter",
    "loss",
    "bandwidth",
    "cut-connections",
    "power-one",
    "power-majority",
    "power-all",
    "disk-slow",
    "disk-hung",
    "disk-full",
    "fsync-fails",
    "bit-flip",
    "torn-tail",
    "clock-jump",
    "clock-rate",
    "leader-transfer",
    "rolling-restart",
    "grow-shrink",
    "replace-node",
    "remove-leader",
    "wiped-member",
    "compact",
    "snapshot-behind",
];

/// The tables of all families. A new family's table is added here.
const FAMILIES: &[&[Entry]] = &[
    process::FAULTS,
    power::FAULTS,
    disk::FAULTS,
    damage::FAULTS,
    partition::FAULTS,
    delay::FAULTS,
    network::FAULTS,
    clock::FAULTS,
    membership::FAULTS,
    maintenance::FAULTS,
    wiped::FAULTS,
];

/// One fault, as the schedule sees it.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Its name on the command line, one of [`NAMES`].
    pub name: &'static str,
    pub needs: Needs,
    /// What nobody else may touch meanwhile. Two faults that share a lock would make each other
    /// meaningless (a paused node that is killed) and are never under way together.
    pub locks: &'static [Lock],
    /// Makes one for a single injection.
    pub make: fn() -> Box<dyn Fault>,
}

/// What must be there for a fault to mean something.
#[derive(Clone, Copy)]
pub struct Needs {
    /// The fewest members in a cluster of which it can be done.
    pub members: usize,
    /// Hosts that are prepared but no members.
    pub spares: usize,
    /// What this machine must be able to do.
    pub abilities: &'static [Ability],
}

/// What one fault at a time may have. In the order in which locks are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lock {
    /// Who is a member.
    Members,
    /// Whether nodes run, and their disks: whoever stops, freezes or damages a node or its disk.
    Nodes,
    /// The clocks of the nodes.
    Clocks,
    /// How fast the network is.
    Pace,
    /// The shape of the network: two partitions at once would be a third one.
    Links,
}

/// All faults, in the order of [`NAMES`].
pub fn all() -> anyhow::Result<Vec<Entry>> {
    let known: Vec<Entry> = FAMILIES.iter().flat_map(|table| table.iter()).copied().collect();
    for entry in &known {
        ensure!(NAMES.contains(&entry.name), "the fault {} is not in the list of names", entry.name);
    }
    let named = |name: &&str| {
        let mut found = known.iter().filter(|entry| entry.name == *name);
        let entry = found.next().with_context(|| format!("nobody makes the fault {name}"))?;
        ensure!(found.next().is_none(), "the fault {name} is made twice");
        Ok(*entry)
    };
    NAMES.iter().map(named).collect()
}

/// The fault of this name.
pub fn find(name: &str) -> anyhow::Result<Entry> {
    if !NAMES.contains(&name) {
        bail!("there is no fault {name:?}; there are: {}", NAMES.join(", "));
    }
    let all = FAMILIES.iter().flat_map(|table| table.iter());
    let entry = all.copied().find(|entry| entry.name == name);
    entry.with_context(|| format!("nobody makes the fault {name}"))
}

impl Entry {
    /// Whether both can be under way at once and still mean something.
    pub fn goes_with(&self, other: &Entry) -> bool {
        self.name != other.name && !self.locks.iter().any(|lock| other.locks.contains(lock))
    }
}
