//! Which endpoint an attempt or a stream goes to.
//!
//! A [`Router`] picks, a [`Route`] is what it picked: a channel, and the way to
//! report how it went. A route counts as in flight until it is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tonic::transport::Channel;

use super::ClientError;
use crate::env::EnvRef;
use crate::wire::channel::{self, ChannelOptions};

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

/// One server address.
#[derive(Debug)]
struct Endpoint {
    address: String,
    channel: Channel,
}

/// Chooses endpoints. Shared by all clones of a client.
pub(in crate::client) struct Router {
    /// Never empty.
    endpoints: Vec<Arc<Endpoint>>,
    /// Counts up when the current endpoint fails; modulo the number of them.
    current: AtomicUsize,
}

impl Router {
    pub fn new(addresses: &[String], options: &ChannelOptions, env: &EnvRef) -> Result<Router, ClientError> {
        let open = |address: &String| -> Result<Arc<Endpoint>, ClientError> {
            let channel = channel::connect(address, options)?;
            Ok(Arc::new(Endpoint { address: address.clone(), channel }))
        };
        let endpoints = addresses.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        if endpoints.is_empty() {
            return Err(ClientError::NoEndpoints);
        }
        // Clients spread over the endpoints instead of all using the first.
        let first = (env.random_u64() % endpoints.len() as u64) as usize;
        Ok(Router { endpoints, current: AtomicUsize::new(first) })
    }

    /// The endpoint for a call of this kind; `key` is what it is about, if that
    /// is one key or prefix. Those in `tried` failed this call already: another
    /// is taken while there is one.
    pub fn pick(self: &Arc<Router>, _kind: CallKind, _key: Option<&[u8]>, _tried: &[String]) -> Route {
        let turn = self.current.load(Ordering::Relaxed);
        let endpoint = self.endpoints[turn % self.endpoints.len()].clone();
        Route { router: self.clone(), endpoint, turn }
    }
}

/// A chosen endpoint.
pub(in crate::client) struct Route {
    router: Arc<Router>,
    endpoint: Arc<Endpoint>,
    turn: usize,
}

impl Route {
    pub fn channel(&self) -> Channel {
        self.endpoint.channel.clone()
    }

    /// The endpoint's address, as it was given.
    pub fn address(&self) -> &str {
        &self.endpoint.address
    }

    /// An answer came, if only a refusal: the endpoint is well.
    pub fn worked(&self) {}

    /// No answer came, or one that blames the server.
    pub fn failed(&self) {
        let next = self.turn.wrapping_add(1);
        // Losing the race means that another call has moved on, which is as good.
        let current = &self.router.current;
        let _ = current.compare_exchange(self.turn, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Route").field(&self.endpoint.address).finish()
    }
}
