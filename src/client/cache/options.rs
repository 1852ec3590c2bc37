//! What a cache is opened with, and why it refuses.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;

use crate::client::{ClientError, ErrorClass};

/// How a cache behaves. Every field has a default that suits a service with some
/// ten thousand keys; [`CacheOptions::check`] says what is wrong with the others.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// Bytes of values and keys kept ready in memory, 64 KiB to 1 TiB.
    pub l1_bytes: u64,
    /// Bytes of compressed values in memory, filled with what the first level
    /// drops; 0 for none, up to 1 TiB.
    pub l2_bytes: u64,
    /// The directory of the durable level, made if it is missing; one process at
    /// a time. Without it nothing survives the process, and an offline start is
    /// not possible.
    pub dir: Option<PathBuf>,
    /// Bytes of keys and values on disk, 1 MiB to 1 TiB. Watched prefixes must
    /// fit; what is left holds other keys that were read. The file is larger by
    /// up to a half, and briefly holds two copies of a prefix that is read anew.
    pub l3_bytes: u64,
    /// What the first level drops when it is full.
    pub policy: CachePolicy,
    /// Prefixes that are kept whole and current by a watch; none begins with
    /// another. At most 64. The empty prefix is every key. The index of their keys
    /// stays in memory, besides the levels' bytes.
    pub prefixes: Vec<Bytes>,
    /// How long a key outside the prefixes is handed out to eventual reads before
    /// it is read anew, 1 ms to 30 days. While the cluster cannot be reached it is
    /// handed out beyond that, marked stale.
    pub ttl: Duration,
    /// The same for a key that was read and does not exist; 0 caches no absence
    /// outside the prefixes.
    pub absent_ttl: Duration,
    /// How often the cluster is asked for its revision, which is what proves the
    /// cache current, 10 ms to 1 h. A bounded read that finds the last proof too
    /// old does not wait for it: it asks by itself.
    pub verify_interval: Duration,
    /// What becomes of a bounded read that the cache cannot answer.
    pub unproven: Unproven,
    /// What becomes of an opening when the directory cannot be used.
    pub on_trouble: OnTrouble,
}

impl Default for CacheOptions {
    fn default() -> CacheOptions {
        CacheOptions {
            l1_bytes: 64 << 20,
            l2_bytes: 64 << 20,
            dir: None,
            l3_bytes: 1 << 30,
            policy: CachePolicy::Adaptive,
            prefixes: Vec::new(),
            ttl: Duration::from_secs(60),
            absent_ttl: Duration::from_secs(5),
            verify_interval: Duration::from_secs(2),
            unproven: Unproven::Refresh,
            on_trouble: OnTrouble::Fail,
        }
    }
}

/// What the first level of a cache drops when it is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachePolicy {
    /// What was used least recently.
    Lru,
    /// What is used least often (W-TinyLFU).
    Lfu,
    /// What has been in it for so long, 1 ms to 30 days, full or not; when full,
    /// what was used least recently.
    Ttl(Duration),
    /// [`CachePolicy::Lru`] or [`CachePolicy::Lfu`], whichever would have hit more
    /// of late. Changing over keeps the content.
    Adaptive,
}

/// What becomes of a bounded read that the cache cannot answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unproven {
    /// It asks the cluster.
    #[default]
    Refresh,
    /// It fails with [`CacheError::NotProven`], and nothing is sent.
    Refuse,
}

/// What becomes of an opening when the directory cannot be used: it is open in
/// another process, is of another cluster, or cannot be read or written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTrouble {
    /// It fails and says why.
    #[default]
    Fail,
    /// It goes on without the durable level, with a warning in the log.
    MemoryOnly,
}

/// Why a cache could not be opened, or why it has no answer.
#[derive(Clone, Debug, Error)]
pub enum CacheError {
    /// Another cache has the directory open, in this process or another.
    #[error(
        "the cache directory {} is in use; give each process a directory of its own, or allow it to go on in memory only",
        path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The cache holds what another cluster said.
    #[error(
        "the cache in {} is of cluster {expected:x}, and the endpoints are of cluster {actual:x}; \
         correct the endpoints, or give the cache another directory",
        if path.as_os_str().is_empty() { "memory".into() } else { path.display().to_string() }
    )]
    ForeignCluster {
        /// The directory; empty if the cache has none.
        path: PathBuf,
        /// The cluster that the cache is of.
        expected: u64,
        /// The cluster that the client speaks to.
        actual: u64,
    },
    /// The directory cannot be made, read or written.
    #[error("the cache directory {}: {reason}", path.display())]
    Disk {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A bounded read, and the cache cannot prove that what it has is so young.
    #[error(
        "the cache cannot prove an answer younger than {bound:?}; what it has is {}{}",
        aged(age),
        because(source)
    )]
    NotProven {
        /// What was asked for.
        bound: Duration,
        /// The age of what the cache has, if it has anything.
        age: Option<Duration>,
        /// Why the cluster could not be asked instead, if that was allowed.
        source: Option<Box<ClientError>>,
    },
    /// The cache was closed.
    #[error("the cache is closed")]
    Closed,
}

fn aged(age: &Option<Duration>) -> String {
    age.map_or("missing".to_owned(), |age| format!("{age:?} old"))
}

fn because(source: &Option<Box<ClientError>>) -> String {
    source.as_ref().map_or(String::new(), |source| format!(", and the cluster does not answer: {source}"))
}

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const DAYS_30: Duration = Duration::from_secs(30 * 86_400);
const TICK: Duration = Duration::from_millis(1);
/// Watched prefixes that one cache has at most; each is a watch of its own.
const PREFIXES_MAX: usize = 64;

impl CacheError {
    /// What kind of trouble it is.
    pub fn class(&self) -> ErrorClass {
        match self {
            CacheError::NotProven { source: Some(source), .. } => source.class(),
            CacheError::NotProven { source: None, .. } => ErrorClass::Unavailable,
            CacheError::InUse { .. } | CacheError::Disk { .. } => ErrorClass::Unavailable,
            CacheError::ForeignCluster { .. } | CacheError::Closed => ErrorClass::Invalid,
        }
    }

    /// Whether the same read could work if it were made again.
    pub fn may_retry(&self) -> bool {
        matches!(self, CacheError::NotProven { source, .. } if source.as_ref().is_none_or(|source| source.may_retry()))
    }
}

impl CacheOptions {
    /// Whether the options can be used.
    ///
    /// # Errors
    /// [`ClientError::BadOption`] names the field and the fix.
    pub fn check(&self) -> Result<(), ClientError> {
        let bytes = |option, value: u64, min: u64| {
            within(option, (min..=TIB).contains(&value), || format!("{value} bytes; give {min} to {TIB}"))
        };
        let time = |option, value: Duration, min: Duration, max: Duration| {
            within(option, (min..=max).contains(&value), || format!("{value:?}; give {min:?} to {max:?}"))
        };
        bytes("cache.l1_bytes", self.l1_bytes, 64 << 10)?;
        bytes("cache.l2_bytes", self.l2_bytes, 0)?;
        bytes("cache.l3_bytes", self.l3_bytes, MIB)?;
        time("cache.ttl", self.ttl, TICK, DAYS_30)?;
        time("cache.absent_ttl", self.absent_ttl, Duration::ZERO, DAYS_30)?;
        time("cache.verify_interval", self.verify_interval, 10 * TICK, Duration::from_secs(3600))?;
        if let CachePolicy::Ttl(after) = self.policy {
            time("cache.policy", after, TICK, DAYS_30)?;
        }
        let count = self.prefixes.len();
        within("cache.prefixes", count <= PREFIXES_MAX, || {
            format!("{count} of them; at most {PREFIXES_MAX}")
        })?;
        for (i, one) in self.prefixes.iter().enumerate() {
            let inside =
                self.prefixes.iter().enumerate().find(|(j, other)| *j != i && one.starts_with(other));
            if let Some((_, other)) = inside {
                return Err(ClientError::BadOption {
                    option: "cache.prefixes",
                    reason: format!("{one:?} lies within {other:?}; leave it out"),
                });
            }
        }
        Ok(())
    }
}

fn within(option: &'static str, holds: bool, reason: impl Fn() -> String) -> Result<(), ClientError> {
    if holds { Ok(()) } else { Err(ClientError::BadOption { option, reason: reason() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl Fn(&mut CacheOptions)) -> String {
        let mut options = CacheOptions::default();
        change(&mut options);
        options.check().expect_err("out of range").to_string()
    }

    #[test]
    fn an_option_out_of_its_range_is_named_with_the_fix() {
        CacheOptions::default().check().unwrap();
        assert!(refused(|o| o.l1_bytes = 10).contains("cache.l1_bytes: 10 bytes; give 65536 to"));
        assert!(refused(|o| o.l2_bytes = u64::MAX).contains("l2_bytes"));
        assert!(refused(|o| o.l3_bytes = 1).contains("l3_bytes"));
        assert!(refused(|o| o.ttl = Duration::ZERO).contains("ttl: 0ns; give 1ms to"));
        assert!(refused(|o| o.absent_ttl = Duration::MAX).contains("absent_ttl"));
        assert!(refused(|o| o.verify_interval = TICK).contains("verify_interval: 1ms; give 10ms to 3600s"));
        assert!(refused(|o| o.policy = CachePolicy::Ttl(Duration::ZERO)).contains("policy"));
        assert!(refused(|o| o.prefixes = vec!["a/".into(), "a/b".into()]).contains("lies within"));
        assert!(refused(|o| o.prefixes = vec!["a/".into(), "a/".into()]).contains("lies within"));
        assert!(refused(|o| o.prefixes = vec![Bytes::new(); 65]).contains("at most 64"));
    }
}
