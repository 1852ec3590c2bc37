//! The faces of a node: etcd's gRPC API and plain HTTP on the client port, the
//! members' own calls on the peer port.
//!
//! One file for each service. They decide nothing about keys, leases or
//! members: a request is checked and converted by `wire`, done by `node`, and
//! what goes wrong becomes a code and a message in `error`, nowhere else.

mod auth;
mod cluster;
mod connection;
mod context;
pub mod control;
mod disk;
mod election;
mod error;
mod front;
mod health;
mod http;
mod kv;
mod lease;
mod listener;
mod lock;
mod mainstay;
mod maintenance;
mod options;
pub mod peer;
mod queue;
mod requests;
#[cfg(test)]
mod tests;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::service::Routes;

pub use error::ServeError;
pub use listener::{ListenError, Listeners};
pub use options::{ListenAddress, ServerOptions};
pub use watch::watch_spec;

use self::context::Shared;
use self::front::{Direct, Front};
use self::listener::ConnectionOptions;
use self::watch::{WatchService, WatchServiceOptions};
use crate::env::EnvRef;
use crate::node::Node;
use crate::telemetry::{self, MetricsHandle};
use crate::wire::etcdserverpb::auth_server::AuthServer;
use crate::wire::etcdserverpb::cluster_server::ClusterServer;
use crate::wire::etcdserverpb::kv_server::KvServer;
use crate::wire::etcdserverpb::lease_server::LeaseServer;
use crate::wire::etcdserverpb::maintenance_server::MaintenanceServer;
use crate::wire::mainstay_v1::admin_server::AdminServer;
use crate::wire::mainstay_v1::history_server::HistoryServer;
use crate::wire::mainstay_v1::sessions_server::SessionsServer;
use crate::wire::v3electionpb::election_server::ElectionServer;
use crate::wire::v3lockpb::lock_server::LockServer;

/// The version of etcd's API that is served.
pub const API_VERSION: &str = "3.7.0";
/// What etcd's clients are told of the form of the data.
const STORAGE_VERSION: &str = "3.7.0";
/// What a message may have beyond the largest request, as in etcd: its frame,
/// and the fields around the value that the limit is about.
const REQUEST_OVERHEAD_BYTES: usize = 512 << 10;
/// How often the metrics fold their samples.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// How long the peers' connections may take to close, after Raft has ended.
const PEER_DRAIN_MAX: Duration = Duration::from_millis(500);

/// A node's open ports and who serves them.
pub struct Server {
    shared: Arc<Shared>,
    client: Port,
    peer: Port,
    /// Health and metrics upkeep, with their names; they end when `stopping` is cancelled.
    tasks: Vec<(&'static str, JoinHandle<()>)>,
}

/// The listeners of one kind.
struct Port {
    addresses: Vec<SocketAddr>,
    drain: CancellationToken,
    listeners: Vec<JoinHandle<()>>,
}

impl Server {
    /// Serves `node` on the open ports. To be called before [`Node::run`], so
    /// that peers find it when it begins to take part.
    ///
    /// `metrics` is what `/metrics` shows; without it there is none.
    pub fn start(
        node: Node,
        listeners: Listeners,
        options: ServerOptions,
        env: EnvRef,
        metrics: Option<MetricsHandle>,
    ) -> Server {
        metrics::gauge!(telemetry::BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        let shared = Shared::new(node, options, env);
        let (reporter, health) = tonic_health::server::health_reporter();
        let (routes, kv, watch, names) = client_services(&shared);
        let counts = requests::CountRequests::new(shared.env.clone(), shared.options.slow_request);
        let router = routes
            .add_service(health)
            .add_service(reflection().build_v1().expect("the descriptor is compiled from the definitions"))
            .add_service(
                reflection().build_v1alpha().expect("the descriptor is compiled from the definitions"),
            )
            .into_axum_router()
            .layer(counts.clone())
            .merge(http::routes(shared.clone(), metrics.clone()))
            .fallback(http::not_found);
        let peer_router = Routes::new(peer::service(shared.node.raft_receiver().clone()))
            .add_service(control::service(shared.node.clone()))
            .into_axum_router();
        let mut tasks = vec![("health", tokio::spawn(health::run(shared.clone(), reporter, names)))];
        if let Some(metrics) = metrics {
            tasks.push(("metrics upkeep", tokio::spawn(upkeep(shared.clone(), metrics))));
        }
        let client = Port::open(
            listeners.client,
            Front::client(Direct { kv, watch, counts }, router),
            &ConnectionOptions::client(&shared.options),
        );
        let peer = Port::open(listeners.peer, Front::peer(peer_router), &ConnectionOptions::peer());
        Server { shared, client, peer, tasks }
    }

    /// Where clients connect to.
    pub fn client_addresses(&self) -> &[SocketAddr] {
        &self.client.addresses
    }

    /// Where peers connect to.
    pub fn peer_addresses(&self) -> &[SocketAddr] {
        &self.peer.addresses
    }

    /// Stops the server and the node, in this order: health says so, streams
    /// end, no new connection is accepted; the requests being served finish (up
    /// to `stop_timeout`); the node hands its leadership over and ends; the
    /// peers' port closes last, because the handing over needs it.
    pub async fn stop(mut self) {
        self.shared.stopping.cancel();
        self.shared.node.hub().close();
        self.shared.tasks.close();
        let limit = self.shared.options.stop_timeout;
        let drained = tokio::time::timeout(limit, async {
            self.client.drain().await;
            self.shared.tasks.wait().await;
        });
        if drained.await.is_err() {
            tracing::warn!(
                limit_ms = limit.as_millis() as u64,
                "requests were cut off: they took too long to finish"
            );
        }
        self.client.cut();
        self.shared.node.stop().await;
        let _ = tokio::time::timeout(PEER_DRAIN_MAX, self.peer.drain()).await;
        self.peer.cut();
        for (name, task) in self.tasks {
            if let Err(error) = task.await
                && error.is_panic()
            {
                tracing::error!(task = name, %error, "a task of the server panicked");
            }
        }
    }
}

impl Port {
    fn open(listeners: Vec<tokio::net::TcpListener>, front: Front, options: &ConnectionOptions) -> Port {
        let addresses = listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();
        let (front, drain) = (Arc::new(front), CancellationToken::new());
        let serve =
            |listener| tokio::spawn(listener::serve(listener, front.clone(), options.clone(), drain.clone()));
        Port { addresses, listeners: listeners.into_iter().map(serve).collect(), drain }
    }

    /// Accepts no more, and waits until every connection has ended.
    async fn drain(&mut self) {
        self.drain.cancel();
        for listener in &mut self.listeners {
            // One that was waited for before would panic; none is.
            let _ = listener.await;
        }
        self.listeners.clear();
    }

    /// Cuts off what did not end by itself: the connections go with their listener.
    fn cut(&mut self) {
        self.drain.cancel();
        self.listeners.iter().for_each(JoinHandle::abort);
    }
}

/// Every service of the client port but health and reflection, KV and Watch apart, and their names.
fn client_services(
    shared: &Arc<Shared>,
) -> (Routes, KvServer<kv::KvService>, WatchService, Vec<&'static str>) {
    let limit = shared.options.max_request_bytes + REQUEST_OVERHEAD_BYTES;
    let mut names = Vec::new();
    let mut builder = Routes::builder();
    macro_rules! serve {
        ($($server:ident($service:expr)),* $(,)?) => {
            $(
                names.push(named(&$server::new($service)));
                builder.add_service(
                    $server::new($service).max_decoding_message_size(limit).max_encoding_message_size(usize::MAX),
                );
            )*
        };
    }
    serve! {
        LeaseServer(lease::LeaseService::new(shared.clone())),
        ClusterServer(cluster::ClusterService::new(shared.clone())),
        MaintenanceServer(maintenance::MaintenanceService::new(shared.clone())),
        AuthServer(auth::AuthService::new(shared.clone())),
        LockServer(lock::LockService::new(shared.clone())),
        ElectionServer(election::ElectionService::new(shared.clone())),
        SessionsServer(mainstay::SessionsService::new(shared.clone())),
        HistoryServer(mainstay::HistoryService::new(shared.clone())),
        AdminServer(mainstay::AdminService::new(shared.clone())),
    }
    let watch = WatchService::new(
        &shared.node,
        WatchServiceOptions { request_bytes_max: limit, leaderless_grace: shared.options.leaderless_grace },
    );
    names.push(named(&watch));
    let kv = KvServer::new(kv::KvService::new(shared.clone()));
    names.push(named(&kv));
    let kv = kv.max_decoding_message_size(limit).max_encoding_message_size(usize::MAX);
    (builder.routes(), kv, watch, names)
}

fn named<S: NamedService>(_: &S) -> &'static str {
    S::NAME
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(crate::wire::DESCRIPTOR)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

async fn upkeep(shared: Arc<Shared>, metrics: MetricsHandle) {
    let started = shared.env.monotonic();
    loop {
        metrics.upkeep();
        let uptime = shared.env.monotonic().saturating_sub(started);
        metrics::gauge!(telemetry::UPTIME_SECONDS).set(uptime.as_secs_f64());
        tokio::select! {
            () = tokio::time::sleep(METRICS_UPKEEP) => {}
            () = shared.stopping.cancelled() => return,
        }
    }
}
