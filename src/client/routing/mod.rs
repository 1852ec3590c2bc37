//! Which endpoint an attempt or a stream goes to.
//!
//! A [`Router`] picks, a [`Route`] is what it picked: a channel, and the way to
//! report how it went. A route counts as in flight until it is dropped.
//!
//! It makes no calls on behalf of others and repeats none. A pick takes no lock;
//! it reads the current set of endpoints, which discovery and health checks
//! replace from their own tasks.

mod ejection;
mod endpoint;
mod hash;
mod options;
mod set;
mod strategy;
mod tables;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use metrics::Counter;
use parking_lot::Mutex;
use tonic::transport::Channel;

use super::ClientError;
use crate::env::EnvRef;
use crate::telemetry;
use crate::wire::channel::ChannelOptions;

pub use endpoint::EndpointHealth;
pub use options::{RoutingOptions, Strategy};

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
    /// Held while it is decided who is left out, or while the set is replaced.
    judging: Mutex<()>,
}

impl Router {
    /// A router of the given endpoints and no others.
    pub fn new(addresses: &[String], options: &ChannelOptions, env: &EnvRef) -> Result<Router, ClientError> {
        Router::with_options(addresses, RoutingOptions::direct(), options, env)
    }

    /// A router that begins with the given endpoints. Must be called inside a
    /// Tokio runtime.
    pub fn with_options(
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
            judging: Mutex::new(()),
            options,
            channel_options: channel_options.clone(),
            env: env.clone(),
        })
    }

    pub fn start(self: &Arc<Router>) {}

    /// The endpoint for a call of this kind; `key` is what it is about, if that
    /// is one key or prefix. Those in `tried` failed this call already: another
    /// is taken while there is one.
    pub fn pick(self: &Arc<Router>, kind: CallKind, key: Option<&[u8]>, tried: &[String]) -> Route {
        let now = self.env.monotonic();
        let turn = self.turn.load(Ordering::Relaxed);
        let desk = &self.desks[kind as usize];
        let endpoint = {
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
            set.entries()[at].endpoint.clone()
        };
        desk.picks.increment(1);
        endpoint.begin(kind);
        Route { router: self.clone(), endpoint, kind, turn, begun: now, reported: AtomicBool::new(false) }
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
    kind: CallKind,
    turn: usize,
    begun: Duration,
    /// Whether its latency is known to the endpoint.
    reported: AtomicBool,
}

impl Route {
    pub fn channel(&self) -> Channel {
        self.endpoint.channel()
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
