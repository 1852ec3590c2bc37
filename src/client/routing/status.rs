//! The endpoints as people see them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::*;
use crate::client::Client;
use crate::resilience::BreakerState;

/// What a client knows of an endpoint. It changes from call to call; for
/// diagnosis, not to decide by.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointStatus {
    /// Its address, as it was given or as its member tells it.
    pub address: String,
    /// The member that answers there; `None` before it is known.
    pub member_id: Option<u64>,
    /// The member's name; empty before it is known.
    pub name: String,
    /// The zone that the options give it.
    pub zone: Option<String>,
    /// Whether it is known to lead.
    pub is_leader: bool,
    /// Whether it is used only while no member can be.
    pub is_spare: bool,
    /// What the last health check said.
    pub health: EndpointHealth,
    /// What the calls that were made say.
    pub breaker: BreakerState,
    /// Whether it is left out of choices.
    pub is_ejected: bool,
    /// Calls of this client under way there.
    pub in_flight: u32,
    /// Streams of this client that are open there.
    pub streams: u32,
    /// How long an answer takes: a moving average that follows peaks at once and
    /// forgets them slowly. `None` before the first answer.
    pub latency_ewma: Option<Duration>,
    /// How often it has been chosen.
    pub picks: u64,
}

impl Client {
    /// The endpoints of this client, and how they are.
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        self.calls.router().endpoints()
    }
}

impl Router {
    /// What is known of each endpoint.
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        let leader = self.leader.load(Ordering::Relaxed);
        let now = self.env.monotonic();
        let status = |entry: &Entry| {
            let endpoint = &entry.endpoint;
            let latency_ns = endpoint.latency_ns(now, self.options.latency_decay);
            EndpointStatus {
                address: endpoint.address().to_owned(),
                member_id: (entry.member.id != 0).then_some(entry.member.id),
                name: entry.member.name.clone(),
                zone: entry.zone.as_deref().map(str::to_owned),
                is_leader: leader != 0 && entry.member.id == leader,
                is_spare: entry.is_spare,
                health: endpoint.health(),
                breaker: endpoint.breaker(),
                is_ejected: endpoint.is_ejected(),
                in_flight: endpoint.load(CallKind::Read),
                streams: endpoint.load(CallKind::Stream),
                latency_ewma: (latency_ns > 0.0).then(|| Duration::from_nanos(latency_ns as u64)),
                picks: endpoint.picks(),
            }
        };
        self.set.load().entries().iter().map(status).collect()
    }
}
