//! What routing can be told, and what it refuses.

use std::collections::BTreeMap;
use std::time::Duration;

use super::CallKind;
use crate::client::ClientError;
use crate::resilience::{BreakerOptions, BreakerRatio};

/// How an endpoint is chosen among several.
#[derive(Clone, Debug, PartialEq)]
pub enum Strategy {
    /// Highest random weight: each endpoint ranks differently for each key, and
    /// the best ranked one that is not overloaded is taken. A key's endpoint
    /// stays the same until that endpoint fails or a better ranked one joins,
    /// and is the same for all clients. Without a key, any endpoint.
    Rendezvous {
        /// An endpoint takes no more than this many times its fair share of what
        /// the client has under way, so that one hot key cannot bury it: 1.25 is
        /// a good value; at least 1, or infinite for no bound. Below 8 under way
        /// an endpoint always takes more.
        load_bound: f64,
    },
    /// A hash ring with points for each endpoint: like rendezvous, faster from
    /// about twenty endpoints on, less even.
    Ring {
        /// Points for each unit of weight; 16 to 4096. The ring has at least
        /// 1024 in all.
        points: u32,
        /// As of [`Strategy::Rendezvous`].
        load_bound: f64,
    },
    /// A lookup table of 65537 entries: the fastest, as even as rendezvous; moves
    /// a few more keys than it has to when endpoints come or go.
    Maglev {
        /// As of [`Strategy::Rendezvous`].
        load_bound: f64,
    },
    /// One after the other.
    RoundRobin,
    /// One after the other, the heavier ones more often, evenly interleaved.
    WeightedRoundRobin,
    /// Any, the heavier ones more often.
    WeightedRandom,
    /// The one where the client has the least under way for its weight.
    LeastInFlight,
    /// Of two random ones, the one that promises the earlier answer: by a moving
    /// average of its latency that follows peaks at once and forgets them slowly,
    /// times what is under way there.
    PeakEwma,
    /// The same until it fails, then the next.
    Sticky,
    /// The endpoints in the client's zone by the inner strategy, while any of
    /// them is well; all of them otherwise, and when the client has no zone.
    ZoneLocal(Box<Strategy>),
    /// The leader, which saves linearizable reads and writes a hop; by the inner
    /// strategy while nobody is known to lead, or when the leader fails.
    LeaderFirst(Box<Strategy>),
}

impl Strategy {
    /// Rendezvous hashing with the usual load bound of 1.25.
    pub fn rendezvous() -> Strategy {
        Strategy::Rendezvous { load_bound: 1.25 }
    }

    /// This one, but with the client's zone first.
    pub fn zone_local(self) -> Strategy {
        Strategy::ZoneLocal(Box::new(self))
    }

    /// This one, but with the leader first.
    pub fn leader_first(self) -> Strategy {
        Strategy::LeaderFirst(Box::new(self))
    }

    /// Its name in metrics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Strategy::Rendezvous { .. } => "rendezvous",
            Strategy::Ring { .. } => "ring",
            Strategy::Maglev { .. } => "maglev",
            Strategy::RoundRobin => "round_robin",
            Strategy::WeightedRoundRobin => "weighted_round_robin",
            Strategy::WeightedRandom => "weighted_random",
            Strategy::LeastInFlight => "least_in_flight",
            Strategy::PeakEwma => "peak_ewma",
            Strategy::Sticky => "sticky",
            Strategy::ZoneLocal(_) => "zone_local",
            Strategy::LeaderFirst(_) => "leader_first",
        }
    }

    /// It, and what it wraps.
    pub(super) fn layers(&self) -> impl Iterator<Item = &Strategy> {
        std::iter::successors(Some(self), |layer| match layer {
            Strategy::ZoneLocal(inner) | Strategy::LeaderFirst(inner) => Some(inner),
            _ => None,
        })
    }
}

/// How calls find their endpoint.
///
/// The defaults are for a service with a client of its own: they discover the
/// members, watch over them, and spread reads by key.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutingOptions {
    /// For reads that any member may answer. By key, so that each member and
    /// observer keeps its own share of the keys warm.
    pub serializable_read: Strategy,
    /// For linearizable reads.
    pub read: Strategy,
    /// For writes.
    pub write: Strategy,
    /// For streams: watches, and keeping leases alive.
    pub stream: Strategy,
    /// The zone the client is in; none by default. It matters to
    /// [`Strategy::ZoneLocal`] only: [`RoutingOptions::in_zone`] sets both.
    pub zone: Option<String>,
    /// The zones of endpoints, which etcd's members know nothing of: by a
    /// member's name, or by how an address begins (`10.1.` or `10.1.0.7:2379`,
    /// without `http://`). The longest that fits counts.
    pub zones: BTreeMap<String, String>,
    /// The weights of endpoints, 1 to 100, found in the same way; 1 for all
    /// others. Hashing and the weighted strategies go by them.
    pub weights: BTreeMap<String, u32>,
    /// How often the members and their leader are asked for; also soon after
    /// calls have failed. `None`: never, the given endpoints are all. At least
    /// one second; 30 seconds by default.
    pub discovery_interval: Option<Duration>,
    /// How often each endpoint's health is asked for. `None`: never. At least
    /// 100 milliseconds; five seconds by default.
    pub health_interval: Option<Duration>,
    /// How long one question of discovery and health may take; 10 milliseconds
    /// to one minute, two seconds by default.
    pub probe_timeout: Duration,
    /// When an endpoint is left out because calls fail there, and for how long.
    /// At most half of the endpoints are; when more are unwell, none is left
    /// out. `None`: calls that fail leave nobody out.
    pub ejection: Option<BreakerOptions>,
    /// How fast the average latency forgets: after this long, a peak counts for
    /// about a third. 100 milliseconds to ten minutes; ten seconds by default.
    pub latency_decay: Duration,
    /// The cluster to expect. Endpoints that answer for another one are never
    /// used. `None`: the cluster that answers first.
    pub cluster_id: Option<u64>,
}

impl Default for RoutingOptions {
    fn default() -> Self {
        RoutingOptions {
            serializable_read: Strategy::rendezvous(),
            read: Strategy::PeakEwma.leader_first(),
            write: Strategy::PeakEwma.leader_first(),
            stream: Strategy::rendezvous(),
            zone: None,
            zones: BTreeMap::new(),
            weights: BTreeMap::new(),
            discovery_interval: Some(Duration::from_secs(30)),
            health_interval: Some(Duration::from_secs(5)),
            probe_timeout: Duration::from_secs(2),
            ejection: Some(BreakerOptions {
                ratio: Some(BreakerRatio::default()),
                ..BreakerOptions::default()
            }),
            latency_decay: Duration::from_secs(10),
            cluster_id: None,
        }
    }
}

impl RoutingOptions {
    /// Only the given endpoints, one at a time: the current one until it fails,
    /// then the next. Without discovery, health checks and tasks.
    pub fn direct() -> RoutingOptions {
        RoutingOptions {
            serializable_read: Strategy::Sticky,
            read: Strategy::Sticky,
            write: Strategy::Sticky,
            stream: Strategy::Sticky,
            discovery_interval: None,
            health_interval: None,
            ejection: None,
            ..RoutingOptions::default()
        }
    }

    /// The same strategy for every kind of call.
    pub fn with_strategy(mut self, strategy: Strategy) -> RoutingOptions {
        self.serializable_read = strategy.clone();
        self.read = strategy.clone();
        self.write = strategy.clone();
        self.stream = strategy;
        self
    }

    /// For a client in this zone, which serializable reads and streams prefer.
    pub fn in_zone(mut self, zone: impl Into<String>) -> RoutingOptions {
        let wrapped = |strategy: Strategy| match strategy {
            Strategy::ZoneLocal(_) => strategy,
            other => other.zone_local(),
        };
        self.zone = Some(zone.into());
        self.serializable_read = wrapped(self.serializable_read);
        self.stream = wrapped(self.stream);
        self
    }

    /// The strategy for calls of this kind.
    pub fn strategy(&self, kind: CallKind) -> &Strategy {
        match kind {
            CallKind::SerializableRead => &self.serializable_read,
            CallKind::Read => &self.read,
            CallKind::Write => &self.write,
            CallKind::Stream => &self.stream,
        }
    }

    /// Refuses what cannot work.
    ///
    /// # Errors
    /// [`ClientError::BadOption`] naming the first bad field and what it takes.
    pub fn check(&self) -> Result<(), ClientError> {
        for kind in CallKind::ALL {
            self.strategy(kind).layers().try_for_each(check_strategy)?;
        }
        let ms = Duration::from_millis;
        let within = |option, value: Duration, least: Duration, most: Duration| match value {
            value if value >= least && value <= most => Ok(()),
            value => bad(option, format!("{value:?} is not between {least:?} and {most:?}")),
        };
        let day = Duration::from_secs(86_400);
        if let Some(interval) = self.discovery_interval {
            within("routing.discovery_interval", interval, ms(1_000), day)?;
        }
        if let Some(interval) = self.health_interval {
            within("routing.health_interval", interval, ms(100), day)?;
        }
        within("routing.probe_timeout", self.probe_timeout, ms(10), ms(60_000))?;
        within("routing.latency_decay", self.latency_decay, ms(100), ms(600_000))?;
        if let Some((of, weight)) = self.weights.iter().find(|(_, weight)| !(1..=100).contains(*weight)) {
            return bad("routing.weights", format!("the weight of {of:?} is {weight}; give 1 to 100"));
        }
        let names = self.zones.iter().flat_map(|(of, zone)| [of, zone]).chain(&self.zone);
        if names.chain(self.weights.keys()).any(String::is_empty) {
            return bad("routing.zones", "a zone, a name or an address is empty; leave it out".to_owned());
        }
        Ok(())
    }
}

fn check_strategy(strategy: &Strategy) -> Result<(), ClientError> {
    if let Strategy::Rendezvous { load_bound }
    | Strategy::Ring { load_bound, .. }
    | Strategy::Maglev { load_bound } = strategy
        && (load_bound.is_nan() || *load_bound < 1.0)
    {
        let name = strategy.name();
        return bad("routing.load_bound", format!("{load_bound} of {name} is below 1; 1.25 is a good value"));
    }
    match strategy {
        Strategy::Ring { points, .. } if !(16..=4_096).contains(points) => {
            bad("routing.points", format!("{points} of ring is not between 16 and 4096"))
        }
        _ => Ok(()),
    }
}

fn bad(option: &'static str, reason: String) -> Result<(), ClientError> {
    Err(ClientError::BadOption { option, reason })
}

/// What a map of names and beginnings of addresses says of an endpoint.
pub(super) fn matching<'a, T>(map: &'a BTreeMap<String, T>, name: &str, address: &str) -> Option<&'a T> {
    let bare = address.split_once("://").map_or(address, |(_, bare)| bare);
    let fits = |of: &str| of == name || bare.starts_with(of) || address == of;
    map.iter().filter(|(of, _)| fits(of)).max_by_key(|(of, _)| of.len()).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_good() {
        RoutingOptions::default().check().expect("the defaults");
        RoutingOptions::direct().check().expect("direct");
        RoutingOptions::default().in_zone("a").in_zone("b").check().expect("in a zone");
    }

    #[test]
    fn a_bad_value_is_refused_by_name() {
        let zero = Duration::ZERO;
        let default = RoutingOptions::default;
        let nan = Strategy::Maglev { load_bound: f64::NAN }.leader_first();
        let few = Strategy::Ring { points: 3, load_bound: 1.25 };
        let weights = BTreeMap::from([("n1".to_owned(), 0)]);
        let zones = BTreeMap::from([(String::new(), "a".to_owned())]);
        let wrong = [
            ("routing.discovery_interval", RoutingOptions { discovery_interval: Some(zero), ..default() }),
            ("routing.health_interval", RoutingOptions { health_interval: Some(zero), ..default() }),
            ("routing.probe_timeout", RoutingOptions { probe_timeout: zero, ..default() }),
            ("routing.latency_decay", RoutingOptions { latency_decay: zero, ..default() }),
            ("routing.load_bound", RoutingOptions { write: nan, ..default() }),
            ("routing.points", RoutingOptions { stream: few, ..default() }),
            ("routing.weights", RoutingOptions { weights, ..default() }),
            ("routing.zones", RoutingOptions { zones, ..default() }),
        ];
        for (name, options) in wrong {
            let error = options.check().expect_err(name).to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn names_and_addresses_are_matched_and_the_longest_wins() {
        let pairs = [("n1", "a"), ("10.1.", "b"), ("10.1.0.7:2379", "c"), ("http://x:1", "d")];
        let map: BTreeMap<String, &str> = pairs.map(|(of, zone)| (of.to_owned(), zone)).into();
        assert_eq!(matching(&map, "n1", "http://10.2.0.1:2379"), Some(&"a"));
        assert_eq!(matching(&map, "n2", "http://10.1.0.1:2379"), Some(&"b"));
        assert_eq!(matching(&map, "n1", "10.1.0.7:2379"), Some(&"c"));
        assert_eq!(matching(&map, "", "http://x:1"), Some(&"d"));
        assert_eq!(matching(&map, "n3", "http://10.2.0.1:2379"), None);
    }
}
