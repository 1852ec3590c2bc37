//! The client SDK: what a service links to read its settings from a cluster, and
//! to go on when the cluster has trouble. It works against every server of etcd's
//! v3 API; what only Mainstay has, says so.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use mainstay::client::{CacheOptions, Client, ClientError, Consistency, Filter};
//!
//! # async fn example() -> Result<(), ClientError> {
//! let client = Client::builder(["10.0.0.1:2379", "10.0.0.2:2379"])
//!     .cache(CacheOptions { prefixes: vec!["svc/checkout/".into()], ..CacheOptions::default() })
//!     .connect()
//!     .await?;
//!
//! // Writes carry request ids: one whose connection broke is repeated, and done once.
//! client.put("svc/checkout/limit", "10").await?;
//!
//! // Reads say how current they have to be, and how current they are.
//! if let Some(cache) = client.cache() {
//!     let answer = cache.get("svc/checkout/limit", Consistency::Bounded(Duration::from_secs(2))).await?;
//!     println!("{:?}, {:?} old, from {:?}", answer.kv, answer.age, answer.level);
//! }
//!
//! // Changes come in order, each once, over as many connections as it takes.
//! let mut changes = client.subscribe(Filter::glob("svc/*/limit")?).open().await?;
//! while let Some(batch) = changes.next().await {
//!     let batch = batch?;
//!     println!("{} changes up to revision {}", batch.events.len(), batch.revision);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | | |
//! |---|---|
//! | [`Client::builder`] | a client for a service: finds the members, watches over them, repeats what is safe |
//! | [`Client::connect`] | a client of the given endpoints and nothing else, for tools |
//! | [`RoutingOptions`] | which endpoint a call goes to |
//! | [`PolicyOptions`] | deadlines, retries and their budget, hedging, limits, request ids |
//! | [`Cache`] | three levels of cache, bounded staleness, starting offline |
//! | [`Client::subscribe`] | changes, filtered and batched |
//! | [`Client::watch`], [`Client::mirror`] | changes as they come, and ranges that are kept whole |
//! | [`Client::bind`] | a prefix as a value of your own type, reloaded as it changes |
//! | [`ClientError`] | may it be tried again, may it have happened: two answers |
//!
//! Its metrics are named `mainstay_client_...`, and [`crate::telemetry::CATALOGUE`] describes each.

mod answer;
mod bind;
mod builder;
mod cache;
mod call;
mod calls;
mod cluster;
mod error;
mod kv;
mod lease;
mod lock;
mod mirror;
mod policy;
mod routing;
mod session;
mod subscribe;
mod trace;
mod trail;
mod watch;

pub use bind::{Bind, BindError, BindStatus, Binding, Format};
pub use builder::ClientBuilder;
pub use cache::{
    Answer, Cache, CacheError, CacheOptions, CachePolicy, CacheState, CacheStats, Consistency, DiskState,
    Level, OnTrouble, Phase, ScopeState, Unproven,
};
#[doc(hidden)]
pub use cache::{CacheFeed, CacheSource, Seen};
pub use calls::ClientOptions;
pub use cluster::SnapshotPiece;
pub use error::{ClientError, ErrorClass};
pub use kv::{DeleteReply, GetOptions, PutOptions, PutReply, RangeResult, TxnBuilder, TxnResult, compare};
pub use lease::{LeaseGranted, LeaseKeeper, LeaseRemaining};
pub use mirror::{Mirror, MirrorUpdate};
pub use policy::{HedgeDelay, PolicyOptions, RequestIds};
pub use routing::{CallKind, EndpointHealth, EndpointStatus, Placement, RoutingOptions, Strategy};
pub use session::{Session, SessionWrite};
pub use subscribe::{
    Batch, Delivery, Filter, FilterError, Overflow, SnapshotPart, Start, SubscribeBuilder, SubscribeOptions,
    Subscription, SubscriptionHandle, SubscriptionStats,
};
pub use trace::{Attempt, CallTrace};
pub use watch::{Watch, WatchBatch, WatchOptions};

use std::sync::Arc;

use calls::Calls;
use subscribe::Feeds;

use crate::resilience::Priority;
use crate::types::RequestId;
use crate::wire::metadata as names;

/// A connection to a cluster. Cheap to clone; all clones share the channels.
#[derive(Clone)]
pub struct Client {
    calls: Calls,
    cache: Option<Cache>,
    feeds: Arc<Feeds>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("options", self.calls.options()).finish_non_exhaustive()
    }
}

impl Client {
    /// A client of the cluster at these endpoints (`http://host:port`). Does
    /// not wait for a connection: the first call does. Must be called inside a
    /// Tokio runtime.
    ///
    /// # Errors
    /// [`ClientError::NoEndpoints`] and [`ClientError::BadAddress`].
    pub fn connect<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Result<Client, ClientError> {
        Client::with_options(endpoints, ClientOptions::default())
    }

    /// The same with other timeouts and limits.
    ///
    /// # Errors
    /// [`ClientError::NoEndpoints`] and [`ClientError::BadAddress`].
    pub fn with_options<E: Into<String>>(
        endpoints: impl IntoIterator<Item = E>,
        options: ClientOptions,
    ) -> Result<Client, ClientError> {
        let endpoints: Vec<String> = endpoints.into_iter().map(Into::into).collect();
        Ok(Client { calls: Calls::new(&endpoints, options)?, cache: None, feeds: Arc::default() })
    }

    fn with_calls(&self, calls: Calls) -> Client {
        Client { calls, cache: self.cache.clone(), feeds: self.feeds.clone() }
    }

    /// A client whose writes name `actor` in history and audit.
    ///
    /// # Errors
    /// [`ClientError::BadMetadata`] if the name is not printable ASCII.
    pub fn with_actor(&self, actor: &str) -> Result<Client, ClientError> {
        Ok(self.with_calls(self.calls.with_metadata(names::ACTOR, actor)?))
    }

    /// A client whose calls have this priority at the gate: see [`PolicyOptions`].
    pub fn with_priority(&self, priority: Priority) -> Client {
        self.with_calls(self.calls.with_priority(priority))
    }

    /// The cluster that this client belongs to, as its options or the first
    /// answer told; `None` before.
    pub fn cluster_id(&self) -> Option<u64> {
        Some(self.calls.cluster_id()).filter(|id| *id != 0)
    }

    /// A client whose next write carries this request id: it is applied once,
    /// however often it is made, and is repeated when its outcome is unknown.
    /// Use it for one write only. [`Session`] deals the ids out.
    pub fn with_request_id(&self, id: RequestId) -> Client {
        self.with_calls(self.calls.with_request_id(id))
    }
}
