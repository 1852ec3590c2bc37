//! Plain HTTP on the client port: health for supervisors, the version, and the
//! metrics. Paths and answers are etcd's, so that its probes work unchanged.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;

use super::context::{Role, Shared};
use super::{API_VERSION, STORAGE_VERSION, error};
use crate::mvcc::{self, ReadError, View};
use crate::node::NodeError;
use crate::telemetry::MetricsHandle;
use crate::types::{AlarmKind, KeyRange, RangeQuery, Space};

/// Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// How long a probe waits for the leader, at most: probes come every few seconds.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Clone)]
struct Pages {
    shared: Arc<Shared>,
    metrics: Option<MetricsHandle>,
}

/// The pages of the client port.
pub(super) fn routes(shared: Arc<Shared>, metrics: Option<MetricsHandle>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/livez", get(livez))
        .route("/livez/serializable_read", get(livez))
        .route("/readyz", get(readyz))
        .route("/readyz/data_corruption", get(|state: State<Pages>| one(state, Check::DataCorruption)))
        .route("/readyz/serializable_read", get(|state: State<Pages>| one(state, Check::SerializableRead)))
        .route("/readyz/linearizable_read", get(|state: State<Pages>| one(state, Check::LinearizableRead)))
        .route("/readyz/non_learner", get(|state: State<Pages>| one(state, Check::NonLearner)))
        .route("/version", get(version))
        .route("/metrics", get(metrics_page))
        .with_state(Pages { shared, metrics })
}

/// What no route has. gRPC clients are told in their own way.
pub(super) async fn not_found(method: Method, uri: Uri, headers: axum::http::HeaderMap) -> Response {
    let is_grpc = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    match is_grpc {
        true => error::unknown_method(uri.path()).into_http(),
        false => (StatusCode::NOT_FOUND, format!("{method} {uri} is not served\n")).into_response(),
    }
}

/// One thing that can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

impl Check {
    const LIVE: &'static [Check] = &[Check::SerializableRead];
    const READY: &'static [Check] =
        &[Check::DataCorruption, Check::SerializableRead, Check::LinearizableRead, Check::NonLearner];

    fn name(self) -> &'static str {
        match self {
            Check::DataCorruption => "data_corruption",
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::NonLearner => "non_learner",
        }
    }

    async fn run(self, shared: &Arc<Shared>) -> Result<(), String> {
        match self {
            Check::DataCorruption => {
                let corrupt = shared.node.view().alarms.iter().any(|alarm| alarm.kind == AlarmKind::Corrupt);
                if corrupt { Err("alarm activated: CORRUPT".to_owned()) } else { Ok(()) }
            }
            Check::SerializableRead => read(shared),
            Check::LinearizableRead => {
                barrier(shared).await.map_err(|error| error.to_string())?;
                read(shared)
            }
            // An observer is as ready as it will ever be.
            Check::NonLearner => match shared.role() {
                Role::Learner => Err("not supported for learner".to_owned()),
                Role::Voter | Role::Observer => Ok(()),
            },
        }
    }
}

async fn barrier(shared: &Arc<Shared>) -> Result<(), NodeError> {
    let limit = PROBE_TIMEOUT.min(shared.options.request_timeout);
    let confirmed = tokio::time::timeout(limit, shared.node.read_barrier()).await;
    confirmed.unwrap_or(Err(NodeError::Timeout))
}

/// Whether the local store can be read at all.
fn read(shared: &Arc<Shared>) -> Result<(), String> {
    let view = shared.node.view();
    one_key(&view).map_err(|error| error.to_string())
}

fn one_key(view: &View) -> Result<(), ReadError> {
    let range = KeyRange::Single(bytes::Bytes::from_static(b"\0"));
    let query = RangeQuery::all(Space::User, range);
    mvcc::range(&view.data, view.marks(Space::User), &query, usize::MAX).map(|_| ())
}

async fn livez(State(pages): State<Pages>, RawQuery(query): RawQuery) -> Response {
    checks(&pages, Check::LIVE, query.as_deref()).await
}

async fn readyz(State(pages): State<Pages>, RawQuery(query): RawQuery) -> Response {
    checks(&pages, Check::READY, query.as_deref()).await
}

async fn one(State(pages): State<Pages>, check: Check) -> Response {
    checks(&pages, &[check], None).await
}

async fn checks(pages: &Pages, checks: &[Check], query: Option<&str>) -> Response {
    let excluded = values(query, "exclude");
    let mut report = String::new();
    let mut failed = false;
    for check in checks.iter().filter(|check| !excluded.contains(&check.name())) {
        match check.run(&pages.shared).await {
            Ok(()) => report.push_str(&format!("[+]{} ok\n", check.name())),
            Err(reason) => {
                failed = true;
                report.push_str(&format!("[-]{} failed: {reason}\n", check.name()));
            }
        }
    }
    let verbose =
        query.unwrap_or_default().split('&').any(|pair| pair == "verbose" || pair.starts_with("verbose="));
    match (failed, verbose) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, report).into_response(),
        (false, true) => format!("{report}ok\n").into_response(),
        (false, false) => "ok\n".into_response(),
    }
}

/// The values of a query parameter, which may come several times. Names of
/// checks and alarms need no decoding.
fn values<'a>(query: Option<&'a str>, name: &str) -> Vec<&'a str> {
    let pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.filter(|(key, value)| *key == name && !value.is_empty()).map(|(_, value)| value).collect()
}

async fn health(State(pages): State<Pages>, RawQuery(query): RawQuery) -> Response {
    let query = query.as_deref();
    let excluded = values(query, "exclude");
    let serializable = values(query, "serializable").contains(&"true");
    let reason = unhealthy(&pages.shared, &excluded, serializable).await;
    let (code, body) = match reason {
        None => (StatusCode::OK, json!({ "health": "true", "reason": "" })),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, json!({ "health": "false", "reason": reason })),
    };
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

async fn unhealthy(shared: &Arc<Shared>, excluded: &[&str], serializable: bool) -> Option<String> {
    for alarm in shared.node.view().alarms.iter() {
        let name = match alarm.kind {
            AlarmKind::NoSpace => "NOSPACE",
            AlarmKind::Corrupt => "CORRUPT",
        };
        if !excluded.contains(&name) {
            return Some(format!("ALARM {name}"));
        }
    }
    if !serializable {
        if shared.node.leadership().leader == 0 {
            return Some("RAFT NO LEADER".to_owned());
        }
        if let Err(error) = barrier(shared).await {
            return Some(format!("RANGE ERROR:{error}"));
        }
    }
    read(shared).err().map(|error| format!("RANGE ERROR:{error}"))
}

async fn version(State(pages): State<Pages>) -> Response {
    // etcd's word until the members have agreed on a version.
    let cluster = match pages.shared.node.view().cluster_version {
        0 => "not_decided",
        _ => API_VERSION,
    };
    let body = json!({
        "etcdserver": API_VERSION,
        "etcdcluster": cluster,
        "storage": STORAGE_VERSION,
        "mainstay": env!("CARGO_PKG_VERSION"),
    });
    ([(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

async fn metrics_page(State(pages): State<Pages>) -> Response {
    match &pages.metrics {
        Some(metrics) => ([(header::CONTENT_TYPE, METRICS_TYPE)], metrics.render()).into_response(),
        None => (StatusCode::NOT_FOUND, "this process records no metrics\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_parameters_may_come_several_times() {
        let query = Some("exclude=NOSPACE&exclude=&serializable=true&exclude=CORRUPT&verbose");
        assert_eq!(values(query, "exclude"), ["NOSPACE", "CORRUPT"]);
        assert_eq!(values(query, "serializable"), ["true"]);
        assert!(values(None, "exclude").is_empty());
    }
}
