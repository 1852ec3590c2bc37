//! What every call goes through: the gate, the deadline, the request id, the
//! choice of an endpoint, and the decision whether to try again. The order is
//! told in `policy/mod.rs`; one attempt is in `calls/attempt.rs`.
//!
//! Invariants: a call that may change the store is repeated only if it surely
//! was not done, is harmless twice or carries a request id; once an attempt is
//! in doubt, the call is never reported as not done; an answer of another
//! cluster is never used.

mod attempt;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument;

use super::answer::Answer;
use super::call::{Call, Limit, Repeat};
use super::policy::{CallGate, Experience, Ids, OpenSession, PolicyOptions, RequestIds, Unopened, WriteId};
use super::routing::{CallKind, Route, Router, RoutingOptions};
use super::session;
use super::trace::CallTrace;
use super::trail::Trail;
use super::{ClientError, ErrorClass};
use crate::env::{EnvRef, SystemEnv};
use crate::resilience::{Backoff, Priority};
use crate::telemetry;
use crate::types::RequestId;
use crate::wire::channel::ChannelOptions;
use crate::wire::mainstay_v1 as pb;
use crate::wire::metadata as names;

pub(super) use attempt::Failure;
use attempt::Pushback;

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// What its connections are like.
    pub channel: ChannelOptions,
    /// How its calls find their endpoint.
    pub routing: RoutingOptions,
    /// How its calls meet trouble.
    pub policy: PolicyOptions,
}

impl Default for ClientOptions {
    /// Those of [`Client::connect`](super::Client::connect): the given endpoints
    /// and no others, no request ids, no tasks of its own.
    fn default() -> Self {
        ClientOptions {
            channel: ChannelOptions::default(),
            routing: RoutingOptions::direct(),
            policy: PolicyOptions::plain(),
        }
    }
}

/// What all clones of a client share.
struct Shared {
    router: Arc<Router>,
    gate: Arc<CallGate>,
    experience: Experience,
    ids: Ids,
    options: PolicyOptions,
    env: EnvRef,
}

/// The part of a client that makes calls.
#[derive(Clone)]
pub(super) struct Calls {
    shared: Arc<Shared>,
    metadata: MetadataMap,
    priority: Priority,
    /// Whether the caller gave a request id, which makes repeating writes safe.
    has_request_id: bool,
    /// Where attempts are written down, if anybody wants to know.
    trace: Option<CallTrace>,
}

impl Calls {
    pub(super) fn new(endpoints: &[String], options: ClientOptions) -> Result<Calls, ClientError> {
        let env = SystemEnv::shared();
        let ClientOptions { channel, routing, policy } = options;
        let router = Arc::new(Router::new(endpoints, routing, &channel, &env)?);
        Calls::with_router(router, policy, env)
    }

    pub(super) fn with_router(
        router: Arc<Router>,
        options: PolicyOptions,
        env: EnvRef,
    ) -> Result<Calls, ClientError> {
        options.check()?;
        let shared = Shared {
            router,
            gate: CallGate::new(&options, &env),
            experience: Experience::new(&options, &env),
            ids: Ids::new(&env),
            options,
            env,
        };
        let priority = Priority::default();
        Ok(Calls {
            shared: Arc::new(shared),
            metadata: MetadataMap::new(),
            priority,
            has_request_id: false,
            trace: None,
        })
    }

    /// From here on answers of another cluster are refused, unless one has
    /// decided already.
    pub(super) fn pin(&self, cluster_id: u64) {
        self.shared.router.pin_cluster(cluster_id);
    }

    /// Begins what runs beside the calls: discovery and health.
    pub(super) fn start(&self) {
        self.shared.router.start();
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
        stamp(&mut calls.metadata, id);
        calls.has_request_id = true;
        calls
    }

    pub(super) fn with_priority(&self, priority: Priority) -> Calls {
        Calls { priority, ..self.clone() }
    }

    pub(super) fn with_trace(&self, trace: CallTrace) -> Calls {
        Calls { trace: Some(trace), ..self.clone() }
    }

    pub(super) fn options(&self) -> &PolicyOptions {
        &self.shared.options
    }

    pub(super) fn env(&self) -> &EnvRef {
        &self.shared.env
    }

    /// The cluster that this client belongs to; 0 until an answer told it.
    pub(super) fn cluster_id(&self) -> u64 {
        self.shared.router.cluster_id()
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

    /// An endpoint for a stream, at none of those that were tried while there is another.
    pub(super) fn route_past(&self, kind: CallKind, key: Option<&[u8]>, tried: &[String]) -> Route {
        self.shared.router.pick(kind, key, tried)
    }

    /// Refuses an answer of another cluster.
    ///
    /// # Errors
    /// [`ClientError::WrongCluster`]; the caller reports the endpoint as failed.
    pub(super) fn check(&self, answer: &impl Answer, route: &Route) -> Result<(), ClientError> {
        let actual = answer.cluster_id();
        if actual == 0 {
            return Ok(());
        }
        match self.shared.router.pin_cluster(actual) {
            expected if expected != actual => {
                let address = route.address().to_owned();
                Err(ClientError::WrongCluster { expected, actual, address })
            }
            _ => Ok(()),
        }
    }

    /// Makes a call, again if that is safe and may help, within its limits.
    pub(super) async fn call<M, R, F>(
        &self,
        call: Call,
        message: M,
        send: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<R, ClientError>
    where
        M: Clone,
        R: Answer,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        self.call_at(call, message, send).await.map(|(answer, _)| answer)
    }

    /// The same for a caller that needs to know who answered.
    pub(super) async fn call_at<M, R, F>(
        &self,
        call: Call,
        message: M,
        send: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<(R, Route), ClientError>
    where
        M: Clone,
        R: Answer,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let began = self.shared.env.monotonic();
        let kind = call.kind_name();
        let span = tracing::debug_span!("call", kind, key = ?call.key);
        let result = self.admitted(&call, message, send).instrument(span).await;
        let time = self.shared.env.monotonic().saturating_sub(began);
        if call.limit == Limit::Request {
            metrics::histogram!(telemetry::CLIENT_CALL_SECONDS, "kind" => kind).record(time);
        }
        if let Err(error) = &result {
            let class = error.class().name();
            metrics::counter!(telemetry::CLIENT_CALLS_FAILED, "kind" => kind, "class" => class).increment(1);
        }
        result
    }

    /// Past the gate. What waits for others does not take part: it would hold
    /// its place for as long as they please.
    async fn admitted<M, R, F>(
        &self,
        call: &Call,
        message: M,
        send: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<(R, Route), ClientError>
    where
        M: Clone,
        R: Answer,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let shared = &self.shared;
        let deadline = match call.limit {
            Limit::Request => Some(shared.env.monotonic() + shared.options.request_timeout),
            Limit::Opening | Limit::None => None,
        };
        let _permit = match deadline {
            Some(deadline) => Some(shared.gate.enter(self.priority, deadline).await?),
            None => None,
        };
        self.attempts(call, message, send, deadline).await
    }

    async fn attempts<M, R, F>(
        &self,
        call: &Call,
        message: M,
        send: impl Fn(Channel, Request<M>) -> F,
        deadline: Option<Duration>,
    ) -> Result<(R, Route), ClientError>
    where
        M: Clone,
        R: Answer,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut trail = Trail::new(call.writes());
        let mut backoff = Backoff::new(self.shared.options.backoff);
        let mut id = self.identify(call, deadline).await?;
        loop {
            let repeatable = call.repeat == Repeat::Harmless || id.is_some() || self.has_request_id;
            let limit = self.attempt_limit(call, repeatable, backoff.failures(), deadline);
            let attempt = self.attempt(call, &message, &send, limit, id.as_ref(), &mut trail);
            let failure = match attempt.await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            let last = backoff.failures() + 1 >= self.shared.options.attempts_max;
            if let Some(gone) = id.take_if(|_| is_session_gone(&failure.error)) {
                self.shared.ids.forget(&gone);
                if last || trail.in_doubt() {
                    return Err(trail.verdict(failure));
                }
                backoff.next_wait(0);
                id = self.identify(call, deadline).await?;
                continue;
            }
            let safe = repeatable || !failure.error.may_have_happened();
            if !failure.error.may_retry() {
                return Err(trail.verdict(failure));
            }
            let affordable = self.shared.experience.failed();
            let wait = self.wait(&mut backoff, failure.pushback);
            let Some(wait) = wait.filter(|wait| safe && affordable && !last && self.in_time(*wait, deadline))
            else {
                return Err(trail.verdict(failure));
            };
            tracing::debug!(address = %failure.address, error = %failure.error, ?wait, "trying again");
            let class = failure.error.class().name();
            metrics::counter!(telemetry::CLIENT_RETRIES, "kind" => call.kind_name(), "class" => class)
                .increment(1);
            trail.add(failure);
            tokio::time::sleep(wait).await;
        }
    }

    /// The wait before the next attempt; `None` if the server wants none.
    fn wait(&self, backoff: &mut Backoff, pushback: Option<Pushback>) -> Option<Duration> {
        let own = self.shared.experience.next_wait(backoff);
        match pushback {
            None => Some(own),
            Some(Pushback::After(wait)) => Some(wait),
            Some(Pushback::Never) => None,
        }
    }

    fn in_time(&self, wait: Duration, deadline: Option<Duration>) -> bool {
        deadline.is_none_or(|deadline| self.shared.env.monotonic() + wait < deadline)
    }

    /// How long an attempt may take. One that cannot be followed by another has
    /// all the time there is.
    fn attempt_limit(
        &self,
        call: &Call,
        repeatable: bool,
        failures: u32,
        deadline: Option<Duration>,
    ) -> Option<Duration> {
        let options = &self.shared.options;
        let left = deadline.map(|deadline| deadline.saturating_sub(self.shared.env.monotonic()));
        let own = options.attempt_timeout.saturating_mul(1 << failures.min(20));
        match call.limit {
            Limit::None => None,
            Limit::Opening => Some(own),
            Limit::Request if repeatable && failures + 1 < options.attempts_max => {
                left.map(|left| left.min(own))
            }
            Limit::Request => left,
        }
    }

    /// The request id for a call, if it is one that carries one.
    async fn identify(
        &self,
        call: &Call,
        deadline: Option<Duration>,
    ) -> Result<Option<WriteId>, ClientError> {
        let wanted = call.repeat == Repeat::Identified && !self.has_request_id;
        if !wanted || self.shared.options.request_ids == RequestIds::Off {
            return Ok(None);
        }
        let begun = self.shared.ids.begin(|| self.open_session(deadline));
        let Some(deadline) = deadline else { return begun.await };
        // Another write may be opening the session, with more time than this one.
        let left = deadline.saturating_sub(self.shared.env.monotonic());
        tokio::time::timeout(left, begun).await.unwrap_or_else(|_| {
            let message = "no session for request ids could be opened in time".to_owned();
            Err(ClientError::NotDone { message, class: ErrorClass::Timeout })
        })
    }

    /// Opens a session. It expires by itself if it was opened in vain, so this
    /// may be repeated. Boxed, because it is a call too, if one without an id.
    fn open_session(
        &self,
        deadline: Option<Duration>,
    ) -> BoxFuture<'_, Result<Arc<OpenSession>, Unopened<ClientError>>> {
        Box::pin(async move {
            let asked_at = self.shared.env.monotonic();
            let request = pb::OpenRequest { ttl_s: self.shared.options.session_ttl.as_secs() };
            let opened =
                self.attempts(&Call::change().harmless_twice(), request, session::open, deadline).await;
            opened.map_err(unopened).map(|(session::Opened { session: answer, .. }, _)| {
                metrics::counter!(telemetry::CLIENT_SESSIONS_OPENED).increment(1);
                tracing::debug!(
                    session = answer.session,
                    ttl_s = answer.ttl_s,
                    "opened a session for request ids"
                );
                OpenSession::new(answer.session, Duration::from_secs(answer.ttl_s), asked_at)
            })
        })
    }
}

/// What it means for request ids that no session was opened.
fn unopened(error: ClientError) -> Unopened<ClientError> {
    match error {
        ClientError::Refused { code: Code::Unimplemented, .. } => {
            tracing::debug!("the server knows no request ids; writes in doubt are not repeated");
            Unopened::Unsupported
        }
        ClientError::Refused { code, message } => {
            tracing::warn!(?code, message, "no session for request ids; writes go without them for a while");
            Unopened::Refused
        }
        unreachable @ ClientError::Unreachable { .. } => Unopened::Failed(unreachable),
        // The write itself was not sent.
        error => Unopened::Failed(ClientError::NotDone {
            message: format!("no session for request ids could be opened: {error}"),
            class: error.class(),
        }),
    }
}

fn stamp(metadata: &mut MetadataMap, id: RequestId) {
    metadata.insert(names::SESSION, AsciiMetadataValue::from(id.session));
    metadata.insert(names::SEQUENCE, AsciiMetadataValue::from(id.sequence));
    metadata.insert(names::ACKNOWLEDGED, AsciiMetadataValue::from(id.acknowledged));
}

/// Whether the server does not know the session of a request id.
fn is_session_gone(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { code: Code::FailedPrecondition, message }
        if message.starts_with("mainstay: session "))
}

#[cfg(test)]
mod tests;
