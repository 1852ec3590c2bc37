//! What a cache counts, cheaply enough for every read; published as metrics now and then.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{CachePolicy, CacheStats, Level};

/// Counters since the cache was opened.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub l1_hits: AtomicU64,
    pub l2_hits: AtomicU64,
    pub l3_hits: AtomicU64,
    pub misses: AtomicU64,
    pub promotions: AtomicU64,
    pub demotions: AtomicU64,
    pub evictions: AtomicU64,
    pub checksum_failures: AtomicU64,
    pub policy_switches: AtomicU64,
}

impl Counts {
    /// Counts an answer by where it came from, and gives how many came from there before.
    pub fn answered(&self, level: Level) -> u64 {
        let counter = match level {
            Level::L1 => &self.l1_hits,
            Level::L2 => &self.l2_hits,
            Level::L3 => &self.l3_hits,
            Level::Server => &self.misses,
        };
        counter.fetch_add(1, Ordering::Relaxed)
    }

    /// The counters with what the levels hold.
    pub fn stats(&self, policy: CachePolicy, [l1_bytes, l2_bytes, l3_bytes]: [u64; 3]) -> CacheStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheStats {
            l1_hits: read(&self.l1_hits),
            l2_hits: read(&self.l2_hits),
            l3_hits: read(&self.l3_hits),
            misses: read(&self.misses),
            promotions: read(&self.promotions),
            demotions: read(&self.demotions),
            evictions: read(&self.evictions),
            checksum_failures: read(&self.checksum_failures),
            policy_switches: read(&self.policy_switches),
            policy,
            l1_bytes,
            l2_bytes,
            l3_bytes,
        }
    }
}
