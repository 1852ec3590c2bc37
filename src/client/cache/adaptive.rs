//! Which policy would hit more: a sample of the keys runs through two small
//! caches that hold no values, one of each policy, with the first level's capacity
//! scaled down by the same factor as the keys.
//!
//! Keys are sampled by their hash, so that a key is always in or always out and
//! the small caches see the same pattern of reuse as the large one.

use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use parking_lot::Mutex;

use super::CachePolicy;

/// One key of so many is sampled, unless the first level is small.
const SAMPLED_OF: u64 = 16;
/// First levels below this are simulated whole: a sixteenth would be a handful of keys.
const SAMPLE_BYTES_MIN: u64 = 4 << 20;
/// Reads that are gathered before the simulations take them in.
const BATCH: usize = 256;
/// Reads of sampled keys between two decisions.
const WINDOW: u32 = 4096;
/// How much the newest window counts in the running hit rate.
const NEWEST: f64 = 0.5;
/// The other policy must hit that much more, in two windows one after the other.
const LEAD: f64 = 0.01;

/// A cache of hashes.
struct Ghost {
    policy: CachePolicy,
    cache: Cache<u64, u32>,
    hits: u32,
    rate: Option<f64>,
}

impl Ghost {
    fn new(policy: CachePolicy, bytes: u64) -> Ghost {
        let cache = Cache::builder()
            .max_capacity(bytes)
            .weigher(|_: &u64, weight: &u32| *weight)
            .eviction_policy(eviction(policy))
            .build();
        Ghost { policy, cache, hits: 0, rate: None }
    }

    fn read(&mut self, batch: &[(u64, u32)]) {
        for (i, (hash, weight)) in batch.iter().enumerate() {
            match self.cache.get(hash) {
                Some(_) => self.hits += 1,
                None => self.cache.insert(*hash, *weight),
            }
            if i % 32 == 31 {
                self.cache.run_pending_tasks();
            }
        }
    }

    fn end_window(&mut self) -> f64 {
        let newest = f64::from(std::mem::take(&mut self.hits)) / f64::from(WINDOW);
        let rate = self.rate.map_or(newest, |rate| rate + NEWEST * (newest - rate));
        self.rate = Some(rate);
        rate
    }
}

/// The way that moka drops what does not fit, for a policy.
pub(super) fn eviction(policy: CachePolicy) -> EvictionPolicy {
    match policy {
        CachePolicy::Lfu | CachePolicy::Adaptive => EvictionPolicy::tiny_lfu(),
        CachePolicy::Lru | CachePolicy::Ttl(_) => EvictionPolicy::lru(),
    }
}

struct Ghosts {
    /// The live policy's comes first.
    both: [Ghost; 2],
    reads: u32,
    /// Whether the other one led at the last decision.
    other_led: bool,
}

/// Watches reads and says when to change the policy.
pub(super) struct Chooser {
    sampled_of: u64,
    queue: Mutex<Vec<(u64, u32)>>,
    ghosts: Mutex<Ghosts>,
}

impl Chooser {
    /// For a first level of so many bytes, which begins with `live`.
    pub fn new(l1_bytes: u64, live: CachePolicy) -> Chooser {
        let sampled_of = if l1_bytes >= SAMPLE_BYTES_MIN { SAMPLED_OF } else { 1 };
        let other = if live == CachePolicy::Lru { CachePolicy::Lfu } else { CachePolicy::Lru };
        let both = [live, other].map(|policy| Ghost::new(policy, l1_bytes / sampled_of));
        Chooser {
            sampled_of,
            queue: Mutex::new(Vec::with_capacity(BATCH)),
            ghosts: Mutex::new(Ghosts { both, reads: 0, other_led: false }),
        }
    }

    /// A key was read that weighs so many bytes. Gives a policy when it is time to
    /// change over to it.
    pub fn read(&self, hash: u64, weight: u32) -> Option<CachePolicy> {
        // The low bits choose the place in hash tables; the high ones choose the sample.
        if !(hash >> 32).is_multiple_of(self.sampled_of) {
            return None;
        }
        let batch = {
            let mut queue = self.queue.lock();
            queue.push((hash, weight));
            if queue.len() < BATCH {
                return None;
            }
            std::mem::replace(&mut *queue, Vec::with_capacity(BATCH))
        };
        self.ghosts.lock().take(&batch)
    }
}

impl Ghosts {
    fn take(&mut self, batch: &[(u64, u32)]) -> Option<CachePolicy> {
        self.both.iter_mut().for_each(|ghost| ghost.read(batch));
        self.reads += batch.len() as u32;
        if self.reads < WINDOW {
            return None;
        }
        self.reads = 0;
        let [live, other] = &mut self.both;
        let leads = other.end_window() > live.end_window() + LEAD;
        let change = leads && self.other_led;
        self.other_led = leads && !change;
        if change {
            self.both.swap(0, 1);
        }
        change.then(|| self.both[0].policy)
    }
}

#[cfg(test)]
mod tests {
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    fn feed(chooser: &Chooser, keys: impl Iterator<Item = u64>) -> Vec<CachePolicy> {
        keys.filter_map(|key| chooser.read(xxh3_64(&key.to_le_bytes()), 100)).collect()
    }

    /// A loop a little larger than the cache: the least recently used key is the
    /// one that is needed next, so that LRU never hits.
    fn looped() -> impl Iterator<Item = u64> {
        (0..60_000).map(|i| i % 1200)
    }

    /// Each key is used a few times soon after it came up, and then no more.
    fn passing() -> impl Iterator<Item = u64> {
        (0..60_000).map(|i| 10_000 + i / 20 + (i % 4) * 7)
    }

    #[test]
    fn it_changes_over_and_back() {
        let chooser = Chooser::new(100_000, CachePolicy::Lru);
        assert_eq!(feed(&chooser, looped()), [CachePolicy::Lfu]);
        let polluted = passing().flat_map(|key| [key, key % 300]);
        let changes = feed(&chooser, polluted);
        assert!(changes.len() <= 2, "no to and fro: {changes:?}");
    }

    #[test]
    fn an_even_match_changes_nothing() {
        let chooser = Chooser::new(100_000, CachePolicy::Lfu);
        assert_eq!(feed(&chooser, (0..60_000).map(|i| i % 50)), []);
    }
}
