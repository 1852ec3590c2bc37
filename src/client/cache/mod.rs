//! Three levels of read cache behind one type: values in memory, compressed values
//! in memory, and a file.
//!
//! Watched prefixes are kept whole: a [`Mirror`](super::Mirror) brings every change,
//! an index says which keys there are and at which revision each was last set, and
//! the levels hold the values. Other keys are cached as they are read. A linearizable
//! read every now and then proves how recent all of that is.
//!
//! Never here: an answer older than one that was handed out for the key before, a
//! value in the place of a newer one, and an error or an absence in the place of a
//! value that is not older. What a level holds is taken for true only when its
//! checksum is right, and, in a watched prefix, when the index names its revision.
//!
//! The proof of a watched prefix relies on the server: an answer to a progress
//! request comes after all events up to its revision. [`Watch`](super::Watch) sees
//! to it that this also holds of versions of etcd that answer too early.

mod adaptive;
mod answer;
mod core;
mod counts;
mod disk;
mod feed;
mod file;
mod flights;
mod memory;
mod options;
mod read;
mod record;
mod scope;
mod source;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::task::AbortHandle;

pub use answer::{Answer, CacheState, CacheStats, Consistency, DiskState, Level, Phase, ScopeState};
pub use options::{CacheError, CacheOptions, CachePolicy, OnTrouble, Unproven};
#[doc(hidden)]
pub use source::{CacheFeed, CacheSource, Seen};

use self::core::Core;
use super::{Client, ClientError};

/// A cache over a cluster. Cheap to clone; all clones are one cache. It works until
/// the last clone is dropped or one is closed.
///
/// ```no_run
/// # use std::time::Duration;
/// # use mainstay::client::{Cache, CacheOptions, Client, ClientError, Consistency};
/// # async fn example(client: Client) -> Result<(), ClientError> {
/// let options = CacheOptions {
///     prefixes: vec!["svc/checkout/".into()],
///     dir: Some("/var/cache/checkout".into()),
///     ..CacheOptions::default()
/// };
/// let cache = Cache::open(&client, options, None).await?;
/// let second = Consistency::Bounded(Duration::from_secs(1));
/// let answer = cache.get("svc/checkout/limit", second).await?;
/// println!("{:?} as of revision {}, from {:?}", answer.kv, answer.revision, answer.level);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Cache {
    running: Arc<Running>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("state", &*self.core().state.borrow()).finish_non_exhaustive()
    }
}

/// A cache with its tasks, which end with it.
struct Running {
    core: Arc<Core>,
    tasks: Vec<AbortHandle>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Cache {
    /// Opens a cache over a client. Returns when the directory has been read, and
    /// needs no answer of the cluster: see [`Cache::state`]. `cluster_id` is the
    /// cluster that the client speaks to, if that is known; otherwise it is the one
    /// that the directory is of, or the first that answers.
    ///
    /// # Errors
    /// [`CacheError`], as [`ClientError::Cache`]: a bad option, or a directory that
    /// is in use, of another cluster, or not usable. A file that is damaged or of
    /// another version is no error: it is set aside, beside the new one.
    pub async fn open(
        client: &Client,
        options: CacheOptions,
        cluster_id: Option<u64>,
    ) -> Result<Cache, ClientError> {
        Cache::over(Arc::new(client.clone()), options, cluster_id).await
    }

    /// Opens a cache over something else than a cluster.
    ///
    /// # Errors
    /// As [`Cache::open`].
    #[doc(hidden)]
    pub async fn over(
        source: Arc<dyn CacheSource>,
        options: CacheOptions,
        cluster_id: Option<u64>,
    ) -> Result<Cache, ClientError> {
        let core = Arc::new(Core::open(source, options, cluster_id.unwrap_or(0)).await?);
        let mut tasks: Vec<AbortHandle> = (core.scopes.iter())
            .map(|scope| tokio::spawn(feed::follow(core.clone(), scope.clone())).abort_handle())
            .collect();
        tasks.push(tokio::spawn(feed::verify(core.clone())).abort_handle());
        tasks.push(tokio::spawn(feed::move_over(core.clone())).abort_handle());
        Ok(Cache { running: Arc::new(Running { core, tasks }) })
    }

    fn core(&self) -> &Core {
        &self.running.core
    }

    /// What the cache is doing.
    pub fn state(&self) -> CacheState {
        self.core().state.borrow().clone()
    }

    /// The cluster that the cache is of, if it is known: what the client was told,
    /// what the directory says, or who answered first.
    pub fn cluster_id(&self) -> Option<u64> {
        Some(self.core().cluster.load(Ordering::Acquire)).filter(|id| *id != 0)
    }

    /// Whether there is something to serve without the cluster: a watched prefix is
    /// whole, or other keys lie on disk.
    pub fn has_content(&self) -> bool {
        let core = self.core();
        core.scopes.iter().any(|scope| scope.revision().0 > 0)
            || core.disk.as_ref().is_some_and(|disk| disk.bytes() > 0)
    }

    /// Waits until the cache's state fulfils a condition; gives that state. Waits for
    /// ever if it never does.
    ///
    /// # Errors
    /// [`CacheError::Closed`].
    pub async fn wait_for(&self, holds: impl Fn(&CacheState) -> bool) -> Result<CacheState, ClientError> {
        let mut state = self.core().state.subscribe();
        let met = state.wait_for(|state| holds(state) || self.core().closed.load(Ordering::Relaxed)).await;
        match met {
            Ok(state) if holds(&state) => Ok(state.clone()),
            _ => Err(CacheError::Closed.into()),
        }
    }

    /// What the cache has done since it was opened, and what it holds.
    pub fn stats(&self) -> CacheStats {
        let core = self.core();
        let (policy, l1_bytes, l2_bytes) = core.memory.usage();
        let l3_bytes = core.disk.as_ref().map_or(0, |disk| disk.bytes());
        core.counts.stats(policy, [l1_bytes, l2_bytes, l3_bytes])
    }

    /// Ends the cache, for all its clones: later reads fail. Returns when everything
    /// is on disk and the directory is free for another.
    pub async fn close(&self) {
        let core = self.core();
        core.closed.store(true, Ordering::Release);
        self.running.tasks.iter().for_each(AbortHandle::abort);
        core.mark_proofs();
        if let Some(disk) = &core.disk {
            disk.close();
            disk.closed().await;
        }
        core.state.send_modify(|_| {});
    }
}
