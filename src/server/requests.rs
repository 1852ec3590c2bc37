//! What every request of the client port passes: it is counted, timed, and
//! logged if it was slow.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response};
use futures_util::future::BoxFuture;
use metrics::{Counter, Gauge, Histogram};
use parking_lot::RwLock;
use tonic::Code;
use tower::{Layer, Service};

use crate::env::EnvRef;
use crate::telemetry;

/// Methods whose answer is a stream: they have no duration worth comparing.
const STREAMS: &[&str] = &[
    "/etcdserverpb.KV/RangeStream",
    "/etcdserverpb.Watch/Watch",
    "/etcdserverpb.Lease/LeaseKeepAlive",
    "/etcdserverpb.Maintenance/Snapshot",
    "/v3electionpb.Election/Observe",
];
/// Methods that wait for somebody else on purpose.
const WAITS: &[&str] = &["/v3lockpb.Lock/Lock", "/v3electionpb.Election/Campaign"];

/// Counts requests. Clones share the counters.
#[derive(Clone)]
pub(super) struct CountRequests {
    shared: Arc<Counters>,
}

struct Counters {
    env: EnvRef,
    slow: Duration,
    in_flight: Gauge,
    /// By path. Holds only paths that a service answered, so it is bounded.
    methods: RwLock<HashMap<String, Arc<Method>>>,
}

/// The handles of one method, looked up once.
struct Method {
    ok: Counter,
    seconds: Histogram,
}

impl CountRequests {
    pub(super) fn new(env: EnvRef, slow: Duration) -> CountRequests {
        let in_flight = metrics::gauge!(telemetry::REQUESTS_IN_FLIGHT);
        CountRequests { shared: Arc::new(Counters { env, slow, in_flight, methods: RwLock::default() }) }
    }
}

impl CountRequests {
    /// Counts the request for `path` that `answer` is the answer to.
    pub(super) async fn count<B, E>(
        &self,
        path: String,
        answer: impl Future<Output = Result<Response<B>, E>>,
    ) -> Result<Response<B>, E> {
        let shared = &self.shared;
        let in_flight = InFlight::new(&shared.in_flight);
        let started = shared.env.monotonic();
        let response = answer.await?;
        drop(in_flight);
        // An error stands in the head; after an answer the trailers say OK.
        let code = match response.headers().get("grpc-status") {
            Some(status) => Code::from_bytes(status.as_bytes()),
            None => Code::Ok,
        };
        shared.done(&path, code, shared.env.monotonic().saturating_sub(started));
        Ok(response)
    }
}

impl Counters {
    fn method(&self, path: &str) -> Arc<Method> {
        if let Some(method) = self.methods.read().get(path) {
            return method.clone();
        }
        let method = Arc::new(Method {
            ok: metrics::counter!(telemetry::REQUESTS, "method" => path.to_owned(), "code" => "OK"),
            seconds: metrics::histogram!(telemetry::REQUEST_SECONDS, "method" => path.to_owned()),
        });
        self.methods.write().entry(path.to_owned()).or_insert(method).clone()
    }

    fn done(&self, path: &str, code: Code, took: Duration) {
        if code == Code::Unimplemented {
            // Of any path a client made up; a label each would be unbounded.
            metrics::counter!(telemetry::REQUESTS, "method" => "other", "code" => "Unimplemented")
                .increment(1);
            return;
        }
        let method = self.method(path);
        match code {
            Code::Ok => method.ok.increment(1),
            code => {
                let code = format!("{code:?}");
                metrics::counter!(telemetry::REQUESTS, "method" => path.to_owned(), "code" => code)
                    .increment(1);
            }
        }
        if STREAMS.contains(&path) {
            return;
        }
        method.seconds.record(took.as_secs_f64());
        if took >= self.slow && !WAITS.contains(&path) {
            tracing::warn!(method = path, took_ms = took.as_millis() as u64, ?code, "a slow request");
        }
    }
}

/// A request in flight, until it is answered or given up.
struct InFlight(Gauge);

impl InFlight {
    fn new(gauge: &Gauge) -> InFlight {
        gauge.increment(1.0);
        InFlight(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

impl<S> Layer<S> for CountRequests {
    type Service = CountedService<S>;

    fn layer(&self, inner: S) -> CountedService<S> {
        CountedService { inner, counts: self.clone() }
    }
}

/// See [`CountRequests`].
#[derive(Clone)]
pub(super) struct CountedService<S> {
    inner: S,
    counts: CountRequests,
}

impl<S> Service<Request<Body>> for CountedService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let answer = self.inner.call(request);
        let counts = self.counts.clone();
        Box::pin(async move { counts.count(path, answer).await })
    }
}
