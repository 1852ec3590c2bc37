//! What every call goes through: the choice of an endpoint, the metadata, the
//! deadline, and the decision whether to try again.
//!
//! A read is repeated at the next endpoint while the retry budget lasts. A
//! write is repeated only if it surely was not done or carries a request id.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::ClientError;
use super::routing::{CallKind, Route, Router};
use crate::env::{EnvRef, SystemEnv};
use crate::resilience::{Backoff, BackoffOptions, Budget, BudgetOptions};
use crate::types::RequestId;
use crate::wire::channel::ChannelOptions;
use crate::wire::metadata as names;

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// What its connections are like.
    pub channel: ChannelOptions,
    /// How long one call may take, all attempts together. Streams and waiting
    /// for a lock or an election have no limit.
    pub request_timeout: Duration,
    /// How many times a call is made at most; at least 1.
    pub attempts_max: u32,
    /// The waits between attempts.
    pub backoff: BackoffOptions,
    /// When to stop trying again because too much fails.
    pub budget: BudgetOptions,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            channel: ChannelOptions::default(),
            request_timeout: Duration::from_secs(10),
            attempts_max: 5,
            backoff: BackoffOptions::exponential(Duration::from_millis(25), Duration::from_secs(1)),
            budget: BudgetOptions::default(),
        }
    }
}

/// What all clones of a client share.
struct Shared {
    router: Arc<Router>,
    budget: Mutex<Budget>,
    options: ClientOptions,
    env: EnvRef,
}

/// The part of a client that makes calls.
#[derive(Clone)]
pub(super) struct Calls {
    shared: Arc<Shared>,
    metadata: MetadataMap,
    /// Whether writes carry a request id, which makes repeating them safe.
    has_request_id: bool,
}

/// Whether a call may change the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nature {
    Read,
    Write,
}

impl Calls {
    pub(super) fn new(endpoints: &[String], options: ClientOptions) -> Result<Calls, ClientError> {
        let env = SystemEnv::shared();
        let shared = Shared {
            router: Arc::new(Router::new(endpoints, &options.channel, &env)?),
            budget: Mutex::new(Budget::new(options.budget)),
            options,
            env,
        };
        Ok(Calls { shared: Arc::new(shared), metadata: MetadataMap::new(), has_request_id: false })
    }

    pub(super) fn with_metadata(&self, name: &'static str, value: &str) -> Result<Calls, ClientError> {
        let parsed = AsciiMetadataValue::try_from(value)
            .map_err(|_| ClientError::BadMetadata { name, value: value.to_owned() })?;
        let mut calls = self.clone();
        calls.metadata.insert(name, parsed);
        Ok(calls)
    }

    pub(super) fn with_request_id(&self, id: RequestId) -> Calls {
        let mut calls = self.clone();
        calls.metadata.insert(names::SESSION, AsciiMetadataValue::from(id.session));
        calls.metadata.insert(names::SEQUENCE, AsciiMetadataValue::from(id.sequence));
        calls.metadata.insert(names::ACKNOWLEDGED, AsciiMetadataValue::from(id.acknowledged));
        calls.has_request_id = true;
        calls
    }

    pub(super) fn options(&self) -> &ClientOptions {
        &self.shared.options
    }

    pub(super) fn env(&self) -> &EnvRef {
        &self.shared.env
    }

    /// A message with this client's metadata.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        *request.metadata_mut() = self.metadata.clone();
        request
    }

    pub(super) fn router(&self) -> &Arc<Router> {
        &self.shared.router
    }

    /// An endpoint for a stream.
    pub(super) fn route(&self, kind: CallKind, key: Option<&[u8]>) -> Route {
        self.shared.router.pick(kind, key, &[])
    }

    /// Makes a call, again if that is safe and may help, within the request
    /// timeout.
    pub(super) async fn call<M, R, F>(
        &self,
        nature: Nature,
        message: M,
        call: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<R, ClientError>
    where
        M: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let limit = self.shared.options.request_timeout;
        let attempts = self.attempts(nature, message, call, Some(limit));
        match tokio::time::timeout(limit, attempts).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::Unknown {
                message: format!("no answer within {limit:?}"),
                write: nature == Nature::Write,
            }),
        }
    }

    /// The same for a call that waits for something that others do.
    pub(super) async fn call_unlimited<M, R, F>(
        &self,
        nature: Nature,
        message: M,
        call: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<R, ClientError>
    where
        M: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        self.attempts(nature, message, call, None).await
    }

    async fn attempts<M, R, F>(
        &self,
        nature: Nature,
        message: M,
        call: impl Fn(Channel, Request<M>) -> F,
        limit: Option<Duration>,
    ) -> Result<R, ClientError>
    where
        M: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut backoff = Backoff::new(self.shared.options.backoff);
        let kind = if nature == Nature::Read { CallKind::Read } else { CallKind::Write };
        loop {
            let route = self.route(kind, None);
            let mut request = self.request(message.clone());
            if let Some(limit) = limit {
                request.set_timeout(limit);
            }
            let error = match call(route.channel(), request).await {
                Ok(response) => {
                    self.budget().on_success();
                    return Ok(response.into_inner());
                }
                Err(status) => ClientError::from_status(status, nature == Nature::Write),
            };
            if !error.may_retry() {
                return Err(error);
            }
            route.failed();
            let affordable = self.budget().on_failure();
            let last = backoff.failures() + 1 >= self.shared.options.attempts_max;
            if last || !affordable || !self.is_safe_again(&error) {
                return Err(error);
            }
            tokio::time::sleep(backoff.next_wait(self.shared.env.random_u64())).await;
        }
    }

    /// Whether repeating the call cannot do it twice.
    fn is_safe_again(&self, error: &ClientError) -> bool {
        !error.may_have_happened() || self.has_request_id
    }

    fn budget(&self) -> std::sync::MutexGuard<'_, Budget> {
        // A budget is a number; a panic elsewhere leaves nothing half done in it.
        self.shared.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn calls(endpoints: &[&str]) -> Calls {
        let endpoints: Vec<String> = endpoints.iter().map(|address| (*address).to_owned()).collect();
        let tick = Duration::from_millis(1);
        let options = ClientOptions {
            request_timeout: 200 * tick,
            backoff: BackoffOptions::exponential(tick, tick),
            ..ClientOptions::default()
        };
        Calls::new(&endpoints, options).expect("addresses")
    }

    /// Calls with a server that always answers `status`; how often it is asked.
    async fn asked(calls: &Calls, nature: Nature, status: fn() -> Status) -> u32 {
        let count = AtomicU32::new(0);
        let result: Result<(), _> = calls
            .call(nature, (), |_, _| {
                count.fetch_add(1, Ordering::Relaxed);
                async move { Err(status()) }
            })
            .await;
        assert!(result.is_err());
        count.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn reads_are_repeated_while_the_budget_lasts() {
        let unavailable = || Status::unavailable("etcdserver: request timed out");
        assert_eq!(asked(&calls(&["a:1", "b:1"]), Nature::Read, unavailable).await, 5);
        let calls = calls(&["a:1"]);
        for _ in 0..3 {
            asked(&calls, Nature::Read, unavailable).await;
        }
        assert_eq!(asked(&calls, Nature::Read, unavailable).await, 1);
    }

    #[tokio::test]
    async fn a_write_in_doubt_is_repeated_only_with_a_request_id() {
        let doubt = || Status::unavailable("etcdserver: leader changed");
        let calls = calls(&["a:1", "b:1"]);
        assert_eq!(asked(&calls, Nature::Write, doubt).await, 1);
        let id = RequestId { session: 1, sequence: 1, acknowledged: 0 };
        assert!(asked(&calls.with_request_id(id), Nature::Write, doubt).await > 1);
    }

    #[tokio::test]
    async fn a_write_that_was_surely_not_done_is_repeated() {
        assert_eq!(
            asked(&calls(&["a:1"]), Nature::Write, || Status::unavailable("etcdserver: no leader")).await,
            5
        );
    }

    #[tokio::test]
    async fn a_refusal_is_final_and_keeps_the_endpoint() {
        let calls = calls(&["a:1", "b:1"]);
        let before = calls.route(CallKind::Read, None).address().to_owned();
        assert_eq!(asked(&calls, Nature::Read, || Status::invalid_argument("no")).await, 1);
        assert_eq!(calls.route(CallKind::Read, None).address(), before);
    }

    #[tokio::test]
    async fn a_silent_server_leaves_a_write_in_doubt() {
        let calls = calls(&["a:1"]);
        let result: Result<(), _> = calls.call(Nature::Write, (), |_, _| std::future::pending()).await;
        assert!(result.is_err_and(|error| error.may_have_happened()));
    }

    #[tokio::test]
    async fn metadata_travels_with_each_request() {
        let id = RequestId { session: 7, sequence: 3, acknowledged: 2 };
        let calls = calls(&["a:1"]).with_metadata(names::ACTOR, "ops").expect("ASCII").with_request_id(id);
        let request = calls.request(());
        let value =
            |name| request.metadata().get(name).and_then(|value| value.to_str().ok().map(str::to_owned));
        assert_eq!(value(names::SESSION).as_deref(), Some("7"));
        assert_eq!(value(names::SEQUENCE).as_deref(), Some("3"));
        assert_eq!(value(names::ACKNOWLEDGED).as_deref(), Some("2"));
        assert_eq!(value(names::ACTOR).as_deref(), Some("ops"));
        assert!(calls.with_metadata(names::ACTOR, "a\nb").is_err());
    }

    #[tokio::test]
    async fn a_client_needs_endpoints() {
        assert!(matches!(Calls::new(&[], ClientOptions::default()), Err(ClientError::NoEndpoints)));
    }
}
