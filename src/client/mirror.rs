//! A range of keys followed for ever: first all of it, then everything that
//! changes, and all of it again when the changes in between were compacted.
//!
//! Invariant: whoever applies every update in order holds exactly the range as
//! it was at [`Mirror::revision`]. Caches, subscriptions and typed bindings all
//! stand on this one loop.

use std::time::Duration;

use futures_util::TryStreamExt;

use super::{Client, ClientError, Watch, WatchBatch, WatchOptions};
use crate::resilience::Backoff;
use crate::types::{KeyRange, KeyValue, Revision};

/// Keys that one page of a snapshot has at most.
const PAGE_KEYS: u64 = 1_000;

/// What a mirror brings.
#[derive(Clone, Debug)]
pub enum MirrorUpdate {
    /// The whole range as of one revision; it replaces what was there before.
    /// The first update is one, unless the mirror began at a revision, and so is
    /// the first after changes that were compacted before they were seen.
    Snapshot {
        /// The revision.
        revision: Revision,
        /// All keys, in order.
        kvs: Vec<KeyValue>,
    },
    /// What changed since the update before; without events it only moves the
    /// revision.
    Changes(WatchBatch),
}

impl MirrorUpdate {
    /// Everything up to this revision is known after it.
    pub fn revision(&self) -> Revision {
        match self {
            MirrorUpdate::Snapshot { revision, .. } => *revision,
            MirrorUpdate::Changes(batch) => batch.revision,
        }
    }
}

/// A range that is followed.
#[derive(Debug)]
pub struct Mirror {
    client: Client,
    range: KeyRange,
    prev_kv: bool,
    /// What the last update brought the range to; 0 before the first.
    revision: Revision,
    watch: Option<Watch>,
    backoff: Backoff,
}

impl Client {
    /// Follows a range. `known` is the revision that the caller holds the range
    /// at already, from an earlier mirror; 0 begins with a snapshot. Nothing is
    /// asked before the first [`Mirror::next`].
    pub fn mirror(&self, range: KeyRange, known: Revision) -> Mirror {
        let backoff = Backoff::new(self.calls.options().backoff);
        Mirror { client: self.clone(), range, prev_kv: false, revision: known, watch: None, backoff }
    }
}

impl Mirror {
    /// Has events tell how their key was before.
    pub fn with_prev_kv(mut self) -> Mirror {
        self.prev_kv = true;
        self
    }

    /// The revision of the last update; 0 before the first.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Waits for the next update, over as many connections as it takes. Dropping
    /// the future loses nothing.
    ///
    /// # Errors
    /// Those that trying again does not mend; calling it again is allowed, and
    /// goes on where it was.
    pub async fn next(&mut self) -> Result<MirrorUpdate, ClientError> {
        loop {
            match self.step().await {
                Ok(update) => {
                    self.backoff.reset();
                    self.revision = update.revision();
                    return Ok(update);
                }
                Err(ClientError::Compacted { .. }) => {
                    self.watch = None;
                    self.revision = Revision(0);
                }
                Err(error) if error.may_retry() => {
                    let random = self.client.calls.env().random_u64();
                    tokio::time::sleep(self.backoff.next_wait(random).max(Duration::from_millis(1))).await;
                }
                Err(error) => {
                    self.watch = None;
                    return Err(error);
                }
            }
        }
    }

    /// Asks the server to say soon how far the changes that it has sent reach.
    /// The answer is an update without events. Nothing happens while there is no
    /// connection.
    pub fn request_progress(&self) {
        if let Some(watch) = &self.watch {
            watch.request_progress();
        }
    }

    async fn step(&mut self) -> Result<MirrorUpdate, ClientError> {
        if self.revision.0 == 0 {
            return self.snapshot().await;
        }
        if self.watch.is_none() {
            let options = WatchOptions {
                start: self.revision.next(),
                prev_kv: self.prev_kv,
                progress_notify: true,
                ..WatchOptions::new(self.range.clone())
            };
            self.watch = Some(self.client.watch(options).await?);
        }
        let Some(watch) = &mut self.watch else { return Err(ClientError::Protocol("no watch")) };
        watch.next().await.map(MirrorUpdate::Changes)
    }

    async fn snapshot(&mut self) -> Result<MirrorUpdate, ClientError> {
        let mut pages = self.client.pages(self.range.clone(), PAGE_KEYS);
        let (mut revision, mut kvs) = (Revision(0), Vec::new());
        while let Some(page) = pages.try_next().await? {
            // Later pages are read at the first one's revision, and tell the store's own.
            if revision.0 == 0 {
                revision = page.revision;
            }
            kvs.extend(page.reply.kvs);
        }
        Ok(MirrorUpdate::Snapshot { revision, kvs })
    }
}
