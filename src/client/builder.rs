//! Puts a client together: what it is told, and the order in which it comes up.

use std::time::Duration;

use super::calls::ClientOptions;
use super::{Cache, CacheOptions, CallTrace, Client, ClientError, PolicyOptions, RoutingOptions};
use crate::wire::channel::ChannelOptions;
use crate::wire::metadata as names;

/// How long a client with a cache on disk waits for the cluster before it starts
/// with what it has.
const OFFLINE_AFTER: Duration = Duration::from_secs(1);

/// Puts a client together. Everything but the endpoints has a default that suits
/// a service: members are discovered and watched over, reads spread by key,
/// writes carry request ids, nothing is cached.
///
/// ```no_run
/// use std::time::Duration;
///
/// use mainstay::client::{CacheOptions, Client, ClientError, Consistency};
///
/// # async fn example() -> Result<(), ClientError> {
/// let client = Client::builder(["10.0.0.1:2379", "10.0.0.2:2379", "10.0.0.3:2379"])
///     .cache(CacheOptions {
///         prefixes: vec!["svc/checkout/".into()],
///         dir: Some("/var/cache/checkout".into()),
///         ..CacheOptions::default()
///     })
///     .connect()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing before `connect`"]
pub struct ClientBuilder {
    endpoints: Vec<String>,
    options: ClientOptions,
    actor: Option<String>,
    cache: Option<CacheOptions>,
    connect_timeout: Duration,
    trace: Option<CallTrace>,
}

impl Client {
    /// Begins a client of the cluster at these endpoints (`host:port` or
    /// `http://host:port`). A few members are enough: the others are found.
    pub fn builder<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> ClientBuilder {
        ClientBuilder {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            options: ClientOptions {
                channel: ChannelOptions::default(),
                routing: RoutingOptions::default(),
                policy: PolicyOptions::default(),
            },
            actor: None,
            cache: None,
            connect_timeout: Duration::from_secs(5),
            trace: None,
        }
    }
}

impl ClientBuilder {
    /// How calls find their endpoint.
    pub fn routing(mut self, routing: RoutingOptions) -> ClientBuilder {
        self.options.routing = routing;
        self
    }

    /// How calls meet trouble: deadlines, retries, limits.
    pub fn policy(mut self, policy: PolicyOptions) -> ClientBuilder {
        self.options.policy = policy;
        self
    }

    /// What connections are like.
    pub fn channel(mut self, channel: ChannelOptions) -> ClientBuilder {
        self.options.channel = channel;
        self
    }

    /// Keeps what is read, and starts offline where there is something to start
    /// from: see [`Client::cache`].
    pub fn cache(mut self, cache: CacheOptions) -> ClientBuilder {
        self.cache = Some(cache);
        self
    }

    /// The zone the client is in, which serializable reads and streams prefer.
    pub fn zone(mut self, zone: impl Into<String>) -> ClientBuilder {
        self.options.routing = self.options.routing.in_zone(zone);
        self
    }

    /// The cluster to expect: answers of another one are errors. Without it the
    /// first answer decides, or the cache on disk.
    pub fn cluster_id(mut self, id: u64) -> ClientBuilder {
        self.options.routing.cluster_id = Some(id);
        self
    }

    /// Whom writes name in history and audit; printable ASCII.
    pub fn actor(mut self, actor: impl Into<String>) -> ClientBuilder {
        self.actor = Some(actor.into());
        self
    }

    /// How long [`ClientBuilder::connect`] waits for a first answer; 5 s by default.
    pub fn connect_timeout(mut self, timeout: Duration) -> ClientBuilder {
        self.connect_timeout = timeout;
        self
    }

    /// Where to write down what becomes of each message that is sent.
    ///
    /// ```no_run
    /// # use mainstay::client::{CallTrace, Client, ClientError};
    /// # async fn example() -> Result<(), ClientError> {
    /// let trace = CallTrace::default();
    /// let client = Client::builder(["127.0.0.1:2379"]).trace(trace.clone()).connect().await?;
    /// client.get("greeting").await?;
    /// for attempt in trace.attempts() {
    ///     println!("{} after {:?}: {:?}", attempt.address, attempt.time, attempt.error);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn trace(mut self, trace: CallTrace) -> ClientBuilder {
        self.trace = Some(trace);
        self
    }

    /// Brings the client up: opens the cache, and waits for a first answer of the
    /// cluster. When none comes, and the cache on disk has something to serve,
    /// the client starts offline and catches up by itself. Must be called inside
    /// a Tokio runtime.
    ///
    /// # Errors
    /// [`ClientError::NoEndpoints`], [`ClientError::BadAddress`],
    /// [`ClientError::BadOption`] and [`ClientError::BadMetadata`] for what cannot
    /// be meant; [`ClientError::Unreachable`] and others of a first call;
    /// [`ClientError::WrongCluster`]; [`ClientError::Cache`].
    pub async fn connect(self) -> Result<Client, ClientError> {
        let mut client = Client::with_options(self.endpoints, self.options)?;
        if let Some(actor) = &self.actor {
            client.calls = client.calls.with_metadata(names::ACTOR, actor)?;
        }
        if let Some(trace) = self.trace {
            client.calls = client.calls.with_trace(trace);
        }
        client.calls.start();
        let Some(options) = self.cache else {
            client.meet(self.connect_timeout).await?;
            return Ok(client);
        };
        options.check()?;
        let first_wait = match &options.dir {
            Some(_) => OFFLINE_AFTER.min(self.connect_timeout),
            None => self.connect_timeout,
        };
        let met = client.meet(first_wait).await;
        if let Err(error) = &met
            && (options.dir.is_none() || !is_absence(error))
        {
            return met.map(|()| client);
        }
        let cache = Cache::open(&client, options, client.cluster_id()).await?;
        if let Err(error) = met {
            let left = self.connect_timeout.saturating_sub(first_wait);
            match cache.cluster_id().filter(|_| cache.has_content()) {
                Some(id) => {
                    client.calls.pin(id);
                    tracing::warn!(%error, "no member answers; starting offline with what the cache on disk has");
                }
                None if left.is_zero() => return Err(error),
                None => client.meet(left).await?,
            }
        }
        client.cache = Some(cache);
        Ok(client)
    }
}

/// Whether nobody was there, as against somebody who should not be.
fn is_absence(error: &ClientError) -> bool {
    error.may_retry() && !matches!(error, ClientError::WrongCluster { .. })
}

impl Client {
    /// The cache, if the client was built with one.
    pub fn cache(&self) -> Option<&Cache> {
        self.cache.as_ref()
    }

    /// A first answer, from whichever member gives one.
    async fn meet(&self, limit: Duration) -> Result<(), ClientError> {
        match tokio::time::timeout(limit, self.member_list_serializable()).await {
            Ok(answer) => answer.map(|_| ()),
            Err(_) => Err(ClientError::timeout(limit, false)),
        }
    }
}
