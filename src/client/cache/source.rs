//! Where a cache reads from: a cluster, or what a test puts in its place.

use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::future::BoxFuture;

use crate::client::answer::Answer;
use crate::client::{Client, ClientError, GetOptions, Mirror, MirrorUpdate};
use crate::env::EnvRef;
use crate::types::{KeyRange, KeyValue, Revision};
use crate::wire::etcdserverpb::kv_client::KvClient;
use crate::wire::range_reply_from_wire;

/// Keys that one page of a scan has at most.
const PAGE_KEYS: u64 = 1_000;

/// What a read at the source gave.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The key; `None` if it does not exist.
    pub kv: Option<KeyValue>,
    /// The revision of the state that answered.
    pub revision: Revision,
    /// The cluster that answered; 0 if it does not say.
    pub cluster_id: u64,
}

/// A place to read from.
pub trait CacheSource: Send + Sync + 'static {
    /// Reads one key. A linearizable answer shows everything that was done before
    /// the call; any other may be behind.
    fn read(&self, key: Bytes, linearizable: bool) -> BoxFuture<'_, Result<Seen, ClientError>>;

    /// Reads all keys of a range, with the revision they are the state of;
    /// linearizable. Fails when the source cannot be reached, unlike a feed.
    fn scan(&self, range: KeyRange) -> BoxFuture<'_, Result<(Revision, Vec<KeyValue>), ClientError>>;

    /// Follows a range from what is known of it.
    fn follow(&self, range: KeyRange, known: Revision) -> Box<dyn CacheFeed>;

    /// Time and chance.
    fn env(&self) -> EnvRef;
}

/// A range that is followed, as [`Mirror`] does.
pub trait CacheFeed: Send {
    /// Waits for the next update. Dropping the future loses nothing.
    fn next(&mut self) -> BoxFuture<'_, Result<MirrorUpdate, ClientError>>;

    /// Asks for an update soon, if only one without events.
    fn request_progress(&mut self);
}

impl CacheFeed for Mirror {
    fn next(&mut self) -> BoxFuture<'_, Result<MirrorUpdate, ClientError>> {
        Box::pin(Mirror::next(self))
    }

    fn request_progress(&mut self) {
        Mirror::request_progress(self);
    }
}

impl CacheSource for Client {
    fn read(&self, key: Bytes, linearizable: bool) -> BoxFuture<'_, Result<Seen, ClientError>> {
        Box::pin(async move {
            let options = GetOptions::key(key);
            let options = if linearizable { options } else { options.serializable() };
            let response = self
                .calls
                .call(options.call(), options.into_request(), |channel, request| async move {
                    KvClient::new(channel).max_decoding_message_size(usize::MAX).range(request).await
                })
                .await?;
            let (cluster_id, revision) = (response.cluster_id(), response.revision());
            let kv = range_reply_from_wire(response).kvs.into_iter().next();
            Ok(Seen { kv, revision, cluster_id })
        })
    }

    fn scan(&self, range: KeyRange) -> BoxFuture<'_, Result<(Revision, Vec<KeyValue>), ClientError>> {
        Box::pin(async move {
            let mut pages = self.pages(range, PAGE_KEYS);
            let (mut revision, mut kvs) = (Revision(0), Vec::new());
            while let Some(page) = pages.try_next().await? {
                // Later pages are read at the first one's revision, and tell the store's own.
                if revision.0 == 0 {
                    revision = page.revision;
                }
                kvs.extend(page.reply.kvs);
            }
            Ok((revision, kvs))
        })
    }

    fn follow(&self, range: KeyRange, known: Revision) -> Box<dyn CacheFeed> {
        Box::new(self.mirror(range, known))
    }

    fn env(&self) -> EnvRef {
        self.calls.env().clone()
    }
}
