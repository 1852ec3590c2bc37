//! A range of keys followed for ever: first all of it, then everything that
//! changes, and all of it again when the changes in between were compacted.
//!
//! Invariant: whoever applies every update in order holds exactly the range as
//! it was at [`Mirror::revision`]. Caches, subscriptions and typed bindings all
//! stand on this one loop.

use futures_util::TryStreamExt;
use futures_util::stream::BoxStream;
use tokio::time::{Instant, sleep_until};
use tonic::Code;

use super::{Client, ClientError, ErrorClass, RangeResult, Watch, WatchBatch, WatchOptions};
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
///
/// What is under way stands here and not in the future of [`Mirror::next`], so
/// that a caller who drops that future over and over still gets on.
pub struct Mirror {
    client: Client,
    range: KeyRange,
    prev_kv: bool,
    /// Which changes come: keys that are set, keys that are removed.
    kinds: (bool, bool),
    /// What the last update brought the range to; 0 before the first, and when
    /// the next has to be a snapshot.
    revision: Revision,
    loading: Option<Loading>,
    watch: Option<Watch>,
    /// Of watches that are gone.
    resumes: u64,
    backoff: Backoff,
    /// When to try again after a failure.
    until: Option<Instant>,
}

/// A snapshot that is being read.
struct Loading {
    pages: BoxStream<'static, Result<RangeResult, ClientError>>,
    /// The first page's; later pages are read at it.
    revision: Revision,
    kvs: Vec<KeyValue>,
}

impl Client {
    /// Follows a range. `known` is the revision that the caller holds the range
    /// at already, from an earlier mirror; 0 begins with a snapshot. Nothing is
    /// asked before the first [`Mirror::next`].
    ///
    /// ```no_run
    /// # use mainstay::client::{Client, ClientError, MirrorUpdate};
    /// # use mainstay::types::{KeyRange, Revision};
    /// # async fn example(client: Client) -> Result<(), ClientError> {
    /// let mut mirror = client.mirror(KeyRange::prefix("svc/".into()), Revision(0));
    /// loop {
    ///     match mirror.next().await? {
    ///         MirrorUpdate::Snapshot { revision, kvs } => println!("{} keys at {revision}", kvs.len()),
    ///         MirrorUpdate::Changes(batch) => println!("{} changes", batch.events.len()),
    ///     }
    /// }
    /// # }
    /// ```
    pub fn mirror(&self, range: KeyRange, known: Revision) -> Mirror {
        Mirror {
            client: self.clone(),
            range,
            prev_kv: false,
            kinds: (true, true),
            revision: known,
            loading: None,
            watch: None,
            resumes: 0,
            backoff: Backoff::new(self.calls.options().backoff),
            until: None,
        }
    }
}

impl Mirror {
    /// Has events tell how their key was before.
    pub fn with_prev_kv(mut self) -> Mirror {
        self.prev_kv = true;
        self
    }

    /// Leaves changes of a kind out, if nobody is to hold the whole range but to
    /// hear of some changes. Snapshots come as they are.
    pub(super) fn with_kinds(mut self, puts: bool, deletes: bool) -> Mirror {
        self.kinds = (puts, deletes);
        self
    }

    /// The revision of the last update; 0 before the first.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// How often the changes were asked for anew where they broke off.
    pub fn resumes(&self) -> u64 {
        self.resumes + self.watch.as_ref().map_or(0, Watch::resumes)
    }

    /// Waits for the next update, over as many connections as it takes. Dropping
    /// the future loses nothing.
    ///
    /// # Errors
    /// Those that trying again does not mend; calling it again is allowed, and
    /// goes on where it was.
    pub async fn next(&mut self) -> Result<MirrorUpdate, ClientError> {
        loop {
            if let Some(until) = self.until {
                sleep_until(until).await;
                self.until = None;
            }
            match self.step().await {
                Ok(update) => {
                    self.backoff.reset();
                    self.revision = update.revision();
                    return Ok(update);
                }
                Err(ClientError::Compacted { compact_revision }) => {
                    tracing::debug!(compact_revision, at = %self.revision, "a mirror begins anew with a snapshot");
                    self.close();
                    self.revision = Revision(0);
                }
                Err(error) if error.may_retry() => {
                    let random = self.client.calls.env().random_u64();
                    self.until = Some(Instant::now() + self.backoff.next_wait(random));
                }
                Err(error) => {
                    self.close();
                    return Err(error);
                }
            }
        }
    }

    /// Asks the server to say soon how far the changes that it has sent reach.
    /// The answer is an update without events. Nothing happens while there is no
    /// connection.
    pub fn request_progress(&mut self) {
        if let Some(watch) = &mut self.watch {
            watch.request_progress();
        }
    }

    fn close(&mut self) {
        self.resumes += self.watch.take().map_or(0, |watch| watch.resumes());
    }

    async fn step(&mut self) -> Result<MirrorUpdate, ClientError> {
        if self.revision.0 == 0 {
            return self.snapshot().await;
        }
        let watch = self.watch.get_or_insert_with(|| {
            let options = WatchOptions {
                start: self.revision.next(),
                prev_kv: self.prev_kv,
                progress_notify: true,
                no_put: !self.kinds.0,
                no_delete: !self.kinds.1,
                ..WatchOptions::new(self.range.clone())
            };
            Watch::new(self.client.clone(), options)
        });
        watch.next().await.map(MirrorUpdate::Changes)
    }

    async fn snapshot(&mut self) -> Result<MirrorUpdate, ClientError> {
        let loading = self.loading.get_or_insert_with(|| {
            let pages = self.client.pages(self.range.clone(), PAGE_KEYS);
            Loading { pages: Box::pin(pages), revision: Revision(0), kvs: Vec::new() }
        });
        loop {
            match loading.pages.try_next().await {
                Ok(Some(page)) => {
                    // Later pages are read at the first one's revision, and tell the store's own.
                    if loading.revision.0 == 0 {
                        loading.revision = page.revision;
                    }
                    loading.kvs.extend(page.reply.kvs);
                }
                Ok(None) => {
                    let (revision, kvs) = (loading.revision, std::mem::take(&mut loading.kvs));
                    self.loading = None;
                    return Ok(MirrorUpdate::Snapshot { revision, kvs });
                }
                Err(error) => {
                    let begun = loading.revision.0 > 0;
                    self.loading = None;
                    return Err(match error {
                        // What was being read was compacted between two pages.
                        ClientError::Refused { code: Code::OutOfRange, message } if begun => {
                            ClientError::Unknown { message, write: false, class: ErrorClass::Conflict }
                        }
                        error => error,
                    });
                }
            }
        }
    }
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror")
            .field("range", &self.range)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}
