//! Which endpoint an attempt or a stream goes to.
//!
//! A [`Router`] picks, a [`Route`] is what it picked: a channel, and the way to
//! report how it went. A route counts as in flight until it is dropped.
//!
//! It makes no calls on behalf of others and repeats none. A pick takes no lock;
//! it reads the current set of endpoints, which discovery and health checks
//! replace from their own tasks.

mod ask;
mod discovery;
mod ejection;
mod endpoint;
mod hash;
mod health;
mod options;
mod placement;
mod set;
mod status;
mod strategy;
mod tables;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use metrics::Counter;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tonic::transport::Channel;

use super::ClientError;
use crate::env::EnvRef;
use crate::telemetry;
use crate::wire::channel::{self, ChannelOptions};

pub use endpoint::EndpointHealth;
pub use options::{RoutingOptions, Strategy};
pub use placement::Placement;
pub use status::EndpointStatus;

use ask::{Ask, Network};
use endpoint::Endpoint;
use set::{CallView, EndpointSet, Entry, Member};
use strategy::{Chooser, Draw};

/// What a call is, as far as choosing its endpoint goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CallKind {
    /// A read that any member may answer from its own state.
    SerializableRead,
    /// A linearizable read.
    Read,
    /// Anything that may change the store.
    Write,
    /// A stream that lasts: a watch, a lease's keep-alive.
    Stream,
}

impl CallKind {
    const ALL: [CallKind; 4] =
        [CallKind::SerializableRead, CallKind::Read, CallKind::Write, CallKind::Stream];
}

/// How calls of one kind choose, and the count of their choices.
struct Desk {
    chooser: Chooser,
    picks: Counter,
}

/// Chooses endpoints. Shared by all clones of a client.
pub(in crate::client) struct Router {
    options: RoutingOptions,
    channel_options: ChannelOptions,
    env: EnvRef,
    set: ArcSwap<EndpointSet>,
    /// By the kinds' order.
    desks: [Desk; 4],
    /// Counts up when the current endpoint of those that stick to one fails.
    turn: AtomicUsize,
    /// The member that leads; 0 when nobody knows.
    leader: AtomicU64,
    /// The cluster that the endpoints must be of; 0 before the first has answered.
    cluster: AtomicU64,
    ask: Arc<dyn Ask>,
    /// Asks for a round of discovery before its time.
    wake: Arc<Notify>,
    /// The rounds of discovery that are over.
    rounds: watch::Sender<u64>,
    /// Discovery and health checks; they end with the router.
    tasks: Mutex<Vec<AbortHandle>>,
    /// Held while it is decided who is left out, or while the set is replaced.
    judging: Mutex<()>,
}

impl Router {
    /// A router that begins with the given endpoints. Must be called inside a
    /// Tokio runtime.
    pub fn new(
        addresses: &[String],
        options: RoutingOptions,
        channel_options: &ChannelOptions,
        env: &EnvRef,
    ) -> Result<Router, ClientError> {
        options.check()?;
        let mut entries: Vec<Entry> = Vec::new();
        for address in addresses {
            if entries.iter().all(|entry| !same_address(entry.endpoint.address(), address)) {
                let endpoint = Endpoint::new(address, true, channel_options, options.ejection)?;
                entries.push(Entry::new(Arc::new(endpoint), Member::default(), true, &options));
            }
        }
        if entries.is_empty() {
            return Err(ClientError::NoEndpoints);
        }
        // Clients spread over the endpoints instead of all using the first.
        let first = (env.random_u64() % entries.len() as u64) as usize;
        let desks = CallKind::ALL.map(|kind| Desk {
            chooser: Chooser::new(options.strategy(kind)),
            picks: metrics::counter!(telemetry::CLIENT_PICKS, "strategy" => options.strategy(kind).name()),
        });
        Ok(Router {
            set: ArcSwap::from_pointee(EndpointSet::new(entries, &options)),
            desks,
            turn: AtomicUsize::new(first),
            leader: AtomicU64::new(0),
            cluster: AtomicU64::new(options.cluster_id.unwrap_or(0)),
            ask: Arc::new(Network),
            wake: Arc::new(Notify::new()),
            rounds: watch::Sender::new(0),
            tasks: Mutex::new(Vec::new()),
            judging: Mutex::new(()),
            options,
            channel_options: channel_options.clone(),
            env: env.clone(),
        })
    }

    /// Starts discovery and health checks, as far as the options want them. They
    /// end when the router is dropped, with the last clone of the client.
    pub fn start(self: &Arc<Router>) {
        let mut tasks = self.tasks.lock();
        if !tasks.is_empty() {
            return;
        }
        let weak = || Arc::downgrade(self);
        if let Some(interval) = self.options.discovery_interval {
            tasks.push(tokio::spawn(discovery::run(weak(), interval)).abort_handle());
        }
        if let Some(interval) = self.options.health_interval {
            tasks.push(tokio::spawn(health::run(weak(), interval)).abort_handle());
        }
    }

    /// Waits until the first round of discovery is over, however it went; at
    /// once if there is none to wait for.
    #[cfg(test)]
    pub async fn discovered(&self) {
        if self.options.discovery_interval.is_some() && !self.tasks.lock().is_empty() {
            let mut rounds = self.rounds.subscribe();
            // The sender lives as long as `self`.
            let _ = rounds.wait_for(|rounds| *rounds > 0).await;
        }
    }

    /// The cluster that this client belongs to; 0 until an answer told it.
    pub fn cluster_id(&self) -> u64 {
        self.cluster.load(Ordering::Relaxed)
    }

    /// An endpoint is of this cluster; the first one counts. Returns the cluster
    /// that this client belongs to.
    pub fn pin_cluster(&self, actual: u64) -> u64 {
        match self.cluster.compare_exchange(0, actual, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => actual,
            Err(pinned) => pinned,
        }
    }

    /// The endpoint for a call of this kind; `key` is what it is about, if that
    /// is one key or prefix. Those in `tried` failed this call already: another
    /// is taken while there is one.
    pub fn pick(self: &Arc<Router>, kind: CallKind, key: Option<&[u8]>, tried: &[String]) -> Route {
        let now = self.env.monotonic();
        let turn = self.turn.load(Ordering::Relaxed);
        let desk = &self.desks[kind as usize];
        let (endpoint, member, foreign) = {
            let set = self.set.load();
            let draw = Draw { key: key.map(hash::of_bytes), turn, random: &|| self.env.random_u64() };
            let view = CallView {
                set: &set,
                chooser: &desk.chooser,
                kind,
                tried,
                leader: self.leader.load(Ordering::Relaxed),
                now,
                decay: self.options.latency_decay,
            };
            let probe = set.take_probe(kind, tried, now);
            let at = probe.unwrap_or_else(|| desk.chooser.choose(&view, &draw));
            let entry = &set.entries()[at];
            (entry.endpoint.clone(), entry.member.id, entry.foreign)
        };
        desk.picks.increment(1);
        endpoint.begin(kind);
        let (router, reported) = (self.clone(), AtomicBool::new(false));
        Route { router, endpoint, member, foreign, kind, turn, begun: now, reported }
    }

    /// This member no longer leads, as far as anyone knows; who does is asked soon.
    fn forget_leader(&self, leader: u64) {
        let _ = self.leader.compare_exchange(leader, 0, Ordering::Relaxed, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Decides anew who is left out, after something about an endpoint changed.
    fn judge(&self) {
        let _one_at_a_time = self.judging.lock();
        for entry in self.set.load().judge() {
            let address = entry.endpoint.address().to_owned();
            let ejected = entry.endpoint.is_ejected();
            tracing::debug!(endpoint = address, ejected, "an endpoint is left out, or no longer");
            if ejected {
                metrics::counter!(telemetry::CLIENT_EJECTIONS, "endpoint" => address.clone()).increment(1);
            }
            metrics::gauge!(telemetry::CLIENT_ENDPOINT_EJECTED, "endpoint" => address)
                .set(f64::from(ejected));
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.tasks.lock().iter().for_each(AbortHandle::abort);
    }
}

/// Whether two addresses are the same, but for how they are written.
fn same_address(a: &str, b: &str) -> bool {
    let bare = |address: &str| -> String {
        let bare = address.split_once("://").map_or(address, |(_, bare)| bare);
        bare.trim_end_matches('/').to_ascii_lowercase()
    };
    bare(a) == bare(b)
}

/// A chosen endpoint.
pub(in crate::client) struct Route {
    router: Arc<Router>,
    endpoint: Arc<Endpoint>,
    /// The member that answers there; 0 when nobody knows.
    member: u64,
    foreign: Option<u64>,
    kind: CallKind,
    turn: usize,
    begun: Duration,
    /// Whether its latency is known to the endpoint.
    reported: AtomicBool,
}

impl Route {
    /// Its channel; to nowhere if another cluster answers there, so that nothing
    /// is ever written to a wrong one.
    pub fn channel(&self) -> Channel {
        if self.foreign.is_some() { channel::refusing() } else { self.endpoint.channel() }
    }

    /// Why nothing may be sent there: another cluster answers.
    pub fn refusal(&self) -> Option<ClientError> {
        let (expected, address) = (self.router.cluster_id(), self.address().to_owned());
        self.foreign.map(|actual| ClientError::WrongCluster { expected, actual, address })
    }

    /// The endpoint's address, as it was given.
    pub fn address(&self) -> &str {
        self.endpoint.address()
    }

    /// An answer came, if only a refusal: the endpoint is well.
    pub fn worked(&self) {
        let now = self.router.env.monotonic();
        if self.endpoint.on_success(now, self.latency(now), self.router.options.latency_decay) {
            self.router.judge();
        }
    }

    /// No answer came, or one that blames the server.
    pub fn failed(&self) {
        let next = self.turn.wrapping_add(1);
        // Losing the race means that another call has moved on, which is as good.
        let _ = self.router.turn.compare_exchange(self.turn, next, Ordering::Relaxed, Ordering::Relaxed);
        let (now, random) = (self.router.env.monotonic(), self.router.env.random_u64());
        let decay = self.router.options.latency_decay;
        if self.endpoint.on_failure(now, random, self.latency(now), decay) {
            self.router.judge();
        }
        // It may be gone for good, or lead no longer; the members know.
        self.router.forget_leader(self.member);
    }

    /// How long the call takes will say nothing about the endpoint: it waits for
    /// what others do.
    pub fn is_waiting(&self) {
        self.reported.store(true, Ordering::Relaxed);
    }

    /// The answer was that there is no leader, or no longer the same.
    pub fn leader_lost(&self) {
        self.router.forget_leader(self.router.leader.load(Ordering::Relaxed));
    }

    /// How long the call took, the first time it is asked. What a stream lasts
    /// says nothing.
    fn latency(&self, now: Duration) -> Option<Duration> {
        let first = self.kind != CallKind::Stream && !self.reported.swap(true, Ordering::Relaxed);
        first.then(|| now.saturating_sub(self.begun))
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.endpoint.end(self.kind);
    }
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Route").field(&self.endpoint.address()).finish()
    }
}
