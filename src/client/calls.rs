//! What every call goes through: the gate, the deadline, the request id, the
//! choice of an endpoint, and the decision whether to try again. The order is
//! told in `policy/mod.rs`.
//!
//! Invariants: a call that may change the store is repeated only if it surely
//! was not done, is harmless twice or carries a request id; once an attempt is
//! in doubt, the call is never reported as not done; an answer of another
//! cluster is never used.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
use super::trace::{Attempt, CallTrace};
use super::trail::Trail;
use super::{ClientError, ErrorClass};
use crate::env::{EnvRef, SystemEnv};
use crate::resilience::{Backoff, Priority};
use crate::telemetry;
use crate::types::RequestId;
use crate::wire::channel::ChannelOptions;
use crate::wire::mainstay_v1 as pb;
use crate::wire::mainstay_v1::sessions_client::SessionsClient;
use crate::wire::metadata as names;

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
    /// The cluster that this client belongs to; 0 until it is known.
    cluster_id: AtomicU64,
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

/// An attempt without an answer.
pub(super) struct Failure {
    pub error: ClientError,
    pub address: String,
    /// What the server said about trying again.
    pushback: Option<Pushback>,
}

/// A server's word on when to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pushback {
    After(Duration),
    Never,
}

impl Calls {
    pub(super) fn new(endpoints: &[String], options: ClientOptions) -> Result<Calls, ClientError> {
        let env = SystemEnv::shared();
        let ClientOptions { channel, routing, policy } = options;
        let cluster_id = routing.cluster_id;
        let router = Arc::new(Router::with_options(endpoints, routing, &channel, &env)?);
        Calls::with_router(router, policy, cluster_id, env)
    }

    pub(super) fn with_router(
        router: Arc<Router>,
        options: PolicyOptions,
        cluster_id: Option<u64>,
        env: EnvRef,
    ) -> Result<Calls, ClientError> {
        options.check()?;
        let shared = Shared {
            router,
            gate: CallGate::new(&options, &env),
            experience: Experience::new(&options, &env),
            ids: Ids::new(&env),
            cluster_id: AtomicU64::new(cluster_id.unwrap_or(0)),
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
        let _ = self.shared.cluster_id.compare_exchange(0, cluster_id, Ordering::AcqRel, Ordering::Acquire);
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
        self.shared.cluster_id.load(Ordering::Acquire)
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

    /// The same, at none of those that were tried while there is another.
    pub(super) fn route_past(&self, kind: CallKind, key: Option<&[u8]>, tried: &[String]) -> Route {
        self.shared.router.pick(kind, key, tried)
    }

    /// Refuses an answer of another cluster, and reports its endpoint.
    ///
    /// # Errors
    /// [`ClientError::WrongCluster`].
    pub(super) fn check(&self, answer: &impl Answer, route: &Route) -> Result<(), ClientError> {
        let actual = answer.cluster_id();
        if actual == 0 {
            return Ok(());
        }
        let pinned = &self.shared.cluster_id;
        match pinned.compare_exchange(0, actual, Ordering::AcqRel, Ordering::Acquire) {
            Err(expected) if expected != actual => {
                route.failed();
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

    /// One attempt; of a read, if that is on and it takes long, a second one beside it.
    async fn attempt<M, R, F>(
        &self,
        call: &Call,
        message: &M,
        send: &impl Fn(Channel, Request<M>) -> F,
        limit: Option<Duration>,
        id: Option<&WriteId>,
        trail: &mut Trail,
    ) -> Result<(R, Route), Failure>
    where
        M: Clone,
        R: Answer,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let route = self.pick(call, trail);
        let hedge = self.shared.options.hedge.filter(|_| call.is_plain_read());
        let Some(delay) = hedge.and_then(|hedge| self.shared.experience.hedge_delay(hedge)) else {
            return self.once(call, route, message.clone(), send, limit, id).await;
        };
        let first_address = route.address().to_owned();
        let first = self.once(call, route, message.clone(), send, limit, id);
        tokio::pin!(first);
        tokio::select! {
            biased;
            answer = &mut first => return answer,
            () = tokio::time::sleep(delay) => {}
        }
        let route = self.pick(call, trail);
        if route.address() == first_address || !self.shared.experience.pay_for_hedge() {
            return first.await;
        }
        metrics::counter!(telemetry::CLIENT_HEDGES).increment(1);
        tracing::debug!(address = route.address(), ?delay, "asking a second endpoint as well");
        let rest = limit.map(|limit| limit.saturating_sub(delay));
        let second = self.once(call, route, message.clone(), send, rest, id);
        tokio::pin!(second);
        // The first answer wins; a failure waits for the other.
        let failure = tokio::select! {
            answer = &mut first => match answer {
                Ok(answer) => return Ok(answer),
                Err(failure) => { trail.add(failure); second.await }
            },
            answer = &mut second => match answer {
                Ok(answer) => return Ok(answer),
                Err(failure) => { trail.add(failure); first.await }
            },
        };
        failure
    }

    fn pick(&self, call: &Call, trail: &mut Trail) -> Route {
        let route = self.shared.router.pick(call.kind, call.key.as_deref(), trail.tried());
        trail.visit(route.address());
        route
    }

    /// One message to one endpoint, and what its outcome says about the endpoint.
    async fn once<M, R, F>(
        &self,
        call: &Call,
        route: Route,
        message: M,
        send: &impl Fn(Channel, Request<M>) -> F,
        limit: Option<Duration>,
        id: Option<&WriteId>,
    ) -> Result<(R, Route), Failure>
    where
        R: Answer,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut request = self.request(message);
        if let Some(id) = id {
            stamp(request.metadata_mut(), id.id);
        }
        // The time of a stream's opening must not travel: it would end the stream.
        if let Some(limit) = limit.filter(|_| call.limit == Limit::Request) {
            request.set_timeout(limit);
        }
        let sent_at = self.shared.env.monotonic();
        let sent = send(route.channel(), request);
        let answer = match limit {
            None => Some(sent.await),
            Some(limit) => tokio::time::timeout(limit, sent).await.ok(),
        };
        let time = self.shared.env.monotonic().saturating_sub(sent_at);
        let (error, pushback) = match answer {
            Some(Ok(response)) => {
                let answer = response.into_inner();
                match self.check(&answer, &route) {
                    Ok(()) => {
                        self.note_answer(call, &route, time, sent_at, id);
                        self.write_down(call, &route, time, None);
                        return Ok((answer, route));
                    }
                    Err(error) => (error, None),
                }
            }
            Some(Err(status)) => {
                let pushback = pushback(&status);
                (ClientError::from_status(status, call.writes()), pushback)
            }
            None => (ClientError::timeout(limit.unwrap_or_default(), call.writes()), None),
        };
        self.note_failure(call, &route, &error, pushback);
        self.write_down(call, &route, time, Some(&error));
        Err(Failure { error, address: route.address().to_owned(), pushback })
    }

    fn note_answer(
        &self,
        call: &Call,
        route: &Route,
        time: Duration,
        sent_at: Duration,
        id: Option<&WriteId>,
    ) {
        route.worked();
        if let Some(id) = id {
            id.was_alive(sent_at);
        }
        self.shared.experience.worked(call.is_plain_read().then_some(time));
        if call.limit == Limit::Request {
            self.shared.gate.worked();
        }
        metrics::counter!(telemetry::CLIENT_ATTEMPTS, "kind" => call.kind_name(), "class" => "ok")
            .increment(1);
    }

    fn write_down(&self, call: &Call, route: &Route, time: Duration, error: Option<&ClientError>) {
        if let Some(trace) = &self.trace {
            let address = route.address().to_owned();
            trace.add(Attempt {
                address,
                kind: call.kind,
                key: call.key.clone(),
                time,
                error: error.cloned(),
            });
        }
    }

    fn note_failure(&self, call: &Call, route: &Route, error: &ClientError, pushback: Option<Pushback>) {
        let class = error.class();
        metrics::counter!(telemetry::CLIENT_ATTEMPTS, "kind" => call.kind_name(), "class" => class.name())
            .increment(1);
        tracing::debug!(address = route.address(), %error, class = class.name(), "an attempt failed");
        if pushback.is_some() || (class == ErrorClass::Overloaded && error.may_retry()) {
            self.shared.gate.pushed_back();
        }
        match error {
            // Reported where it was seen.
            ClientError::WrongCluster { .. } => {}
            // One that says it has too much to do is not sick.
            _ if class == ErrorClass::Overloaded => {}
            _ if error.may_retry() => route.failed(),
            _ => route.worked(),
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
        self.shared.ids.begin(|| self.open_session(deadline)).await
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
            let send = |channel, request: Request<pb::OpenRequest>| async move {
                SessionsClient::new(channel).open(request).await
            };
            let opened = self.attempts(&Call::change().harmless_twice(), request, send, deadline).await;
            opened.map_err(unopened).map(|(answer, _)| {
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

/// gRPC's word for it: milliseconds to wait; anything else means not to try again.
fn pushback(status: &Status) -> Option<Pushback> {
    let value = status.metadata().get("grpc-retry-pushback-ms")?;
    let ms = value.to_str().ok().and_then(|text| text.parse::<u32>().ok());
    Some(ms.map_or(Pushback::Never, |ms| Pushback::After(Duration::from_millis(u64::from(ms)))))
}

#[cfg(test)]
mod tests;
