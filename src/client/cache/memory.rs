//! The two levels in memory: values, and compressed values.
//!
//! Invariant: of one key the first level never holds older knowledge than it held
//! before, and the second never newer than the first. All knowledge comes in
//! through [`Memory::change`], which runs alone for a key and takes what lies below
//! up first; what the first level drops goes down while the key is locked.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use moka::notification::RemovalCause;
use moka::ops::compute::Op;
use moka::sync::Cache;
use parking_lot::RwLock;
use xxhash_rust::xxh3::xxh3_64;

use super::adaptive::{Chooser, eviction};
use super::counts::Counts;
use super::record::{Entry, Moment, pack, unpack};
use super::{CacheOptions, CachePolicy, Level};

type Values = Cache<Bytes, Arc<Entry>>;
type Packed = Cache<Bytes, Bytes>;

/// Places in the table of what was filled last; a power of two.
const GUARDS: usize = 1024;
/// What a packed record weighs besides its bytes.
const PACKED_OVERHEAD: usize = 160;

/// The first level. While the policy changes over there are two.
struct First {
    live: Values,
    /// What the content moves out of.
    old: Option<Values>,
    policy: CachePolicy,
}

/// Values in memory.
pub(super) struct Memory {
    first: RwLock<First>,
    second: Option<Packed>,
    l1_bytes: u64,
    /// How long a value stays in the first level, in microseconds.
    stays: Option<i64>,
    chooser: Option<Chooser>,
    counts: Arc<Counts>,
    /// By a key's hash: the newest knowledge that the source gave of any key there.
    guards: Box<[AtomicI64]>,
}

impl Memory {
    pub fn new(options: &CacheOptions, counts: &Arc<Counts>) -> Memory {
        let second = (options.l2_bytes > 0).then(|| second_level(options.l2_bytes, counts));
        let policy = match options.policy {
            CachePolicy::Adaptive => CachePolicy::Lfu,
            fixed => fixed,
        };
        let live = first_level(options.l1_bytes, policy, second.as_ref(), counts);
        let adaptive = options.policy == CachePolicy::Adaptive;
        Memory {
            first: RwLock::new(First { live, old: None, policy }),
            second,
            l1_bytes: options.l1_bytes,
            stays: match policy {
                CachePolicy::Ttl(after) => Some(i64::try_from(after.as_micros()).unwrap_or(i64::MAX)),
                _ => None,
            },
            chooser: adaptive.then(|| Chooser::new(options.l1_bytes, policy)),
            counts: counts.clone(),
            guards: (0..GUARDS).map(|_| AtomicI64::new(0)).collect(),
        }
    }

    /// What is known of a key. A hit below the first level goes up.
    pub fn get(&self, key: &[u8], now: Moment) -> Option<(Arc<Entry>, Level)> {
        let first = self.first.read();
        if !first.live.contains_key(key) {
            // To ask for it would count as a use, and filling it in counts as one
            // already: a key that is read once must not look like a frequent one.
            let below = self.second.as_ref().is_some_and(|second| second.contains_key(key));
            if first.old.is_none() && !below {
                return None;
            }
        } else if let Some(entry) = first.live.get(key)
            && self.stays.is_none_or(|stays| now.saturating_sub(entry.stored) < stays)
        {
            return Some((entry, Level::L1));
        }
        let key = Bytes::copy_from_slice(key);
        let mut found = None;
        first.live.entry(key.clone()).and_compute_with(|current| {
            if let Some(entry) = current.map(|current| current.into_value()) {
                let is_over = self.stays.is_some_and(|stays| now.saturating_sub(entry.stored) >= stays);
                if is_over {
                    return Op::Remove;
                }
                found = Some((entry, Level::L1));
                return Op::Nop;
            }
            let Some((entry, level)) = self.take_below(&first, &key) else { return Op::Nop };
            let stored = if self.stays.is_some() { now } else { entry.stored };
            let entry = Arc::new(Entry { stored, ..entry });
            found = Some((entry.clone(), level));
            Op::Put(entry)
        });
        if found.as_ref().is_some_and(|(_, level)| *level == Level::L2) {
            self.counts.promotions.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    /// Changes what is known of one key, alone: `change` gets what there is, and
    /// gives what shall be there.
    fn change(&self, key: &Bytes, change: impl FnOnce(Option<Entry>) -> Option<Entry>) {
        let first = self.first.read();
        first.live.entry(key.clone()).and_compute_with(|current| {
            let below = self.take_below(&first, key).map(|(entry, _)| entry);
            let had = current.is_some();
            let known = match current {
                Some(current) => Some(Arc::unwrap_or_clone(current.into_value())),
                None => below,
            };
            match change(known) {
                Some(entry) => Op::Put(Arc::new(entry)),
                None if had => Op::Remove,
                None => Op::Nop,
            }
        });
    }

    /// Takes new knowledge in.
    pub fn put(&self, key: &Bytes, entry: Entry) {
        self.change(key, |known| Some(known.map_or(entry.clone(), |known| entry.clone().merge(&known))));
    }

    /// Takes new knowledge in, if something is known of the key.
    pub fn refresh(&self, key: &Bytes, entry: Entry) {
        self.change(key, |known| known.map(|known| entry.clone().merge(&known)));
    }

    /// Forgets a key.
    pub fn forget(&self, key: &Bytes) {
        self.change(key, |_| None);
    }

    /// A mark to be taken before a key is read at the disk or the source.
    pub fn guard(&self, key: &[u8]) -> i64 {
        self.guard_of(key).load(Ordering::Acquire)
    }

    /// Takes in what the source said. It is left out when a later answer has been
    /// here and gone in the meantime, so that nothing older takes its place.
    pub fn put_from_source(&self, key: &Bytes, entry: Entry) {
        let latest = self.guard_of(key).fetch_max(entry.as_of.0, Ordering::AcqRel);
        self.change(key, |known| match known {
            Some(known) => Some(entry.merge(&known)),
            None => (latest <= entry.as_of.0).then_some(entry),
        });
    }

    /// Takes in what the disk had, unless something came from the source since
    /// `guard` was taken.
    pub fn put_from_disk(&self, key: &Bytes, entry: Entry, guard: i64) {
        self.change(key, |known| match known {
            Some(known) => Some(entry.merge(&known)),
            None => (self.guard(key) == guard).then_some(entry),
        });
        self.counts.promotions.fetch_add(1, Ordering::Relaxed);
    }

    fn guard_of(&self, key: &[u8]) -> &AtomicI64 {
        &self.guards[xxh3_64(key) as usize % GUARDS]
    }

    /// Takes a key out of what lies below the first level.
    fn take_below(&self, first: &First, key: &Bytes) -> Option<(Entry, Level)> {
        if let Some(old) = &first.old
            && let Some(entry) = old.remove(key)
        {
            return Some((Arc::unwrap_or_clone(entry), Level::L1));
        }
        let record = self.second.as_ref()?.remove(key)?;
        let entry = unpack(key, &record);
        if entry.is_none() {
            self.counts.checksum_failures.fetch_add(1, Ordering::Relaxed);
        }
        Some((entry?, Level::L2))
    }

    /// Tells the adaptive policy of a read. Gives whether the policy changed, in
    /// which case [`Memory::move_over`] wants to be called.
    pub fn note(&self, key: &[u8], entry: &Entry) -> bool {
        let Some(chooser) = &self.chooser else { return false };
        match chooser.read(xxh3_64(key), entry.footprint(key)) {
            Some(policy) => self.change_policy(policy),
            None => false,
        }
    }

    /// Changes the live policy; the content stays reachable. A change while the
    /// one before is not complete is left out.
    fn change_policy(&self, policy: CachePolicy) -> bool {
        let mut first = self.first.write();
        if first.old.is_some() || first.policy == policy {
            return false;
        }
        let live = first_level(self.l1_bytes, policy, self.second.as_ref(), &self.counts);
        first.old = Some(std::mem::replace(&mut first.live, live));
        first.policy = policy;
        self.counts.policy_switches.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Moves up to `count` entries of the content to the live policy. False when
    /// nothing is left to move.
    pub fn move_over(&self, count: usize) -> bool {
        let Some(old) = self.first.read().old.clone() else { return false };
        let keys: Vec<Bytes> = old.iter().take(count).map(|(key, _)| (*key).clone()).collect();
        for key in &keys {
            // Whatever reads it takes it up; so does a change that changes nothing.
            self.change(key, |known| known);
        }
        if keys.is_empty() {
            self.first.write().old = None;
        }
        !keys.is_empty()
    }

    /// The live policy, and the bytes in both levels.
    pub fn usage(&self) -> (CachePolicy, u64, u64) {
        let first = self.first.read();
        let l1 = first.live.weighted_size() + first.old.as_ref().map_or(0, |old| old.weighted_size());
        (first.policy, l1, self.second.as_ref().map_or(0, |second| second.weighted_size()))
    }

    /// Does now what the levels would do by and by: drop what does not fit.
    #[cfg(test)]
    pub fn settle(&self) {
        let first = self.first.read();
        for _ in 0..3 {
            first.live.run_pending_tasks();
            self.second.iter().for_each(|second| second.run_pending_tasks());
        }
    }

    /// Damages every record of the second level.
    #[cfg(test)]
    pub fn damage_second(&self) {
        for (key, record) in self.second.iter().flat_map(|second| second.iter()) {
            let mut bytes = record.to_vec();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            self.second.iter().for_each(|second| second.insert((*key).clone(), bytes.clone().into()));
        }
    }
}

fn first_level(bytes: u64, policy: CachePolicy, second: Option<&Packed>, counts: &Arc<Counts>) -> Values {
    let (second, counts) = (second.cloned(), counts.clone());
    Cache::builder()
        .max_capacity(bytes)
        .weigher(|key: &Bytes, entry: &Arc<Entry>| entry.footprint(key))
        .eviction_policy(eviction(policy))
        .eviction_listener(move |key: Arc<Bytes>, entry: Arc<Entry>, cause| {
            if cause != RemovalCause::Size {
                return;
            }
            match &second {
                Some(second) => {
                    second.insert((*key).clone(), pack(&key, &entry).into());
                    counts.demotions.fetch_add(1, Ordering::Relaxed);
                }
                None => {
                    counts.evictions.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
        .build()
}

fn second_level(bytes: u64, counts: &Arc<Counts>) -> Packed {
    let counts = counts.clone();
    Cache::builder()
        .max_capacity(bytes)
        .weigher(|key: &Bytes, record: &Bytes| {
            u32::try_from(key.len() + record.len() + PACKED_OVERHEAD).unwrap_or(u32::MAX)
        })
        .eviction_policy(eviction(CachePolicy::Lru))
        .eviction_listener(move |_, _, cause| {
            if cause == RemovalCause::Size {
                counts.evictions.fetch_add(1, Ordering::Relaxed);
            }
        })
        .build()
}
