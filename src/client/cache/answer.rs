//! What a cached read asks for, what it gets, and what a cache tells about itself.

use std::time::Duration;

use bytes::Bytes;

use super::CachePolicy;
use crate::types::{KeyValue, Revision};

/// How current an answer has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consistency {
    /// Linearizable: the cluster is asked, every time. The answer feeds the cache.
    Strong,
    /// The answer was current at some moment no longer ago than this when it is
    /// handed out. The cache answers when it can prove that, by a linearizable
    /// read that began no longer ago and up to whose revision the watch has
    /// delivered; else the cluster is asked, or the read fails, as
    /// [`CacheOptions::unproven`](super::CacheOptions::unproven) says.
    ///
    /// Times are told by the machine's monotonic clock: that of a machine that
    /// sleeps stands still meanwhile.
    Bounded(Duration),
    /// Whatever is there, with its age; never older than what this cache handed
    /// out for the key before. When nothing is there a member near at hand is
    /// asked.
    Eventual,
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Values in memory. Also that a key of a watched prefix does not exist.
    L1,
    /// Compressed values in memory.
    L2,
    /// The disk.
    L3,
    /// The cluster.
    Server,
}

/// What a cached read gives.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The key; `None` if it does not exist.
    pub kv: Option<KeyValue>,
    /// The revision that this is known to have been the key's state at.
    pub revision: Revision,
    /// The key's state was this at some moment no longer ago than that. `None` if
    /// a member that may be behind answered and nothing tells by how much.
    pub age: Option<Duration>,
    /// Where it came from.
    pub level: Level,
    /// Whether it may be out of date with nobody at work on it: the watch of its
    /// prefix is cut off or catching up, or its time to live is over.
    pub stale: bool,
}

/// How far a watched prefix is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The cluster does not answer. What there is, is handed out as stale.
    Offline,
    /// The cluster answers, and not all changes up to its revision are here yet.
    CatchingUp,
    /// Everything up to the cluster's revision at the last check is here.
    Live,
}

/// One watched prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScopeState {
    /// The prefix.
    pub prefix: Bytes,
    /// How far it is.
    pub phase: Phase,
    /// The revision it is known whole at; 0 if nothing is known yet.
    pub revision: Revision,
}

/// What the durable level is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// There is none.
    Off,
    /// It is written and read.
    Working,
    /// It is no longer written, because a write failed or it is full. What it holds
    /// stays the state of one revision; only what cannot have changed is still read.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What a cache is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheState {
    /// The watched prefixes, in the order of the options.
    pub scopes: Vec<ScopeState>,
    /// The durable level.
    pub disk: DiskState,
    /// Whether the cluster answered when it was last asked for its revision.
    pub online: bool,
    /// The cluster is not the one that the cache is of: its answers are not taken
    /// in. It is the id that answered.
    pub foreign_cluster: Option<u64>,
}

impl CacheState {
    /// Whether everything that is watched is up to date.
    pub fn is_live(&self) -> bool {
        self.online && self.scopes.iter().all(|scope| scope.phase == Phase::Live)
    }
}

/// What a cache has done since it was opened, and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheStats {
    /// Answers from values in memory.
    pub l1_hits: u64,
    /// Answers from compressed values.
    pub l2_hits: u64,
    /// Answers from the disk.
    pub l3_hits: u64,
    /// Reads that no level could answer.
    pub misses: u64,
    /// Values that went up to the first level because they were used.
    pub promotions: u64,
    /// Values that went down to the second level because the first was full.
    pub demotions: u64,
    /// Values that the memory levels dropped because they were full.
    pub evictions: u64,
    /// Records that failed their checksum and were dropped.
    pub checksum_failures: u64,
    /// Changes of the live policy.
    pub policy_switches: u64,
    /// The live policy: never [`CachePolicy::Adaptive`].
    pub policy: CachePolicy,
    /// Bytes in the first level.
    pub l1_bytes: u64,
    /// Bytes in the second level.
    pub l2_bytes: u64,
    /// Bytes of keys and values on disk.
    pub l3_bytes: u64,
}
