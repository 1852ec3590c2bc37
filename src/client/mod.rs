//! The client SDK: typed calls to a cluster, over etcd's API and Mainstay's own.
//!
//! It goes on to another endpoint when one fails, repeats what is safe to
//! repeat, and resumes watches where they broke off. It never repeats a write
//! whose outcome is unknown, unless the write carries a request id: see
//! [`Session`]. It runs no task of its own.
//!
//! ```no_run
//! use mainstay::client::{Client, ClientError, GetOptions};
//!
//! # async fn example() -> Result<(), ClientError> {
//! let client = Client::connect(["http://127.0.0.1:2379"])?;
//! client.put("greeting", "hello").await?;
//! if let Some(kv) = client.get("greeting").await? {
//!     println!("{:?} at revision {}", kv.value, kv.mod_revision);
//! }
//! let all = client.range(GetOptions::prefix("greet").limit(100)).await?;
//! println!("{} keys", all.reply.count);
//! # Ok(())
//! # }
//! ```

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
pub use routing::{CallKind, EndpointHealth, EndpointStatus, RoutingOptions, Strategy};
pub use session::{Session, SessionWrite};
pub use subscribe::{
    Batch, Delivery, Filter, FilterError, Overflow, SnapshotPart, Start, SubscribeBuilder, SubscribeOptions,
    Subscription, SubscriptionHandle, SubscriptionStats,
};
pub use trace::{Attempt, CallTrace};
pub use watch::{Watch, WatchBatch, WatchOptions};

use calls::Calls;

pub use crate::resilience::Priority;
use crate::types::RequestId;
use crate::wire::metadata as names;

/// A connection to a cluster. Cheap to clone; all clones share the channels.
#[derive(Clone)]
pub struct Client {
    calls: Calls,
    cache: Option<Cache>,
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
        Ok(Client { calls: Calls::new(&endpoints, options)?, cache: None })
    }

    fn with_calls(&self, calls: Calls) -> Client {
        Client { calls, cache: self.cache.clone() }
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
