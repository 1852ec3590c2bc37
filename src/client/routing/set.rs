//! All endpoints at one time. A set never changes; a new one takes its place.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use super::ejection::{self, Case};
use super::endpoint::Endpoint;
use super::options::{RoutingOptions, matching};
use super::strategy::{Chooser, View, penalty};
use super::tables::{Maglev, Node, Ring};
use super::{CallKind, hash};

/// An endpoint and what the cluster says of it.
#[derive(Clone, Debug)]
pub struct Entry {
    pub endpoint: Arc<Endpoint>,
    /// What is known of who answers there; 0 and empty before anyone is.
    pub member: Member,
    /// A given address that no member goes by; used while no member can be.
    pub is_spare: bool,
    /// The other cluster that it is of, if it is.
    pub foreign: Option<u64>,
    pub zone: Option<Arc<str>>,
    is_far: bool,
    weight: u32,
    id_hash: u64,
}

/// What the cluster says of a member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    pub name: String,
    /// It takes serializable reads only, as etcd's learners do.
    pub is_read_only: bool,
}

impl Entry {
    pub fn new(endpoint: Arc<Endpoint>, member: Member, is_spare: bool, options: &RoutingOptions) -> Entry {
        let address = endpoint.address();
        let zone = matching(&options.zones, &member.name, address).map(|zone| Arc::from(zone.as_str()));
        let weight = matching(&options.weights, &member.name, address).copied().unwrap_or(1);
        let id_hash = match member.id {
            0 => hash::of_bytes(address.as_bytes()),
            id => hash::of_member(id),
        };
        let is_far = options.zone.is_some() && zone.as_deref() != options.zone.as_deref();
        Entry { endpoint, member, is_spare, foreign: None, zone, is_far, weight, id_hash }
    }

    /// The same address, found to be of another cluster.
    pub fn foreign(endpoint: Arc<Endpoint>, cluster: u64, options: &RoutingOptions) -> Entry {
        Entry { foreign: Some(cluster), ..Entry::new(endpoint, Member::default(), true, options) }
    }

    /// Whether it is known to refuse such calls, or must not be asked.
    fn is_unfit(&self, kind: CallKind) -> bool {
        self.foreign.is_some() || (self.member.is_read_only && kind != CallKind::SerializableRead)
    }

    /// Whether this and `other` are the same in all that choices go by.
    fn is_like(&self, other: &Entry) -> bool {
        Arc::ptr_eq(&self.endpoint, &other.endpoint)
            && self.member == other.member
            && (self.is_spare, self.foreign) == (other.is_spare, other.foreign)
    }
}

/// The endpoints at one time.
#[derive(Debug)]
pub struct EndpointSet {
    /// Never empty. In the order in which they were given, members after that
    /// by id.
    entries: Vec<Entry>,
    is_even: bool,
    ring: Option<Ring>,
    maglev: Option<Maglev>,
}

impl EndpointSet {
    /// A set of `entries`, of which there is at least one.
    pub fn new(entries: Vec<Entry>, options: &RoutingOptions) -> EndpointSet {
        assert!(!entries.is_empty(), "a set of endpoints is never empty");
        let is_even = entries.iter().all(|entry| entry.weight == entries[0].weight);
        let has_members = entries.iter().any(|entry| !entry.is_spare);
        let mut nodes: Vec<Node> = (0u16..)
            .zip(&entries)
            .filter(|(_, entry)| entry.foreign.is_none() && (!entry.is_spare || !has_members))
            .map(|(index, entry)| Node { index, id_hash: entry.id_hash, weight: entry.weight })
            .collect();
        Node::sort(&mut nodes);
        let strategies = || CallKind::ALL.into_iter().flat_map(|kind| options.strategy(kind).layers());
        let (ring, maglev) = (Ring::wanted(strategies(), &nodes), Maglev::wanted(strategies(), &nodes));
        EndpointSet { entries, is_even, ring, maglev }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Whether choices from `other` would be the same.
    pub fn is_like(&self, other: &EndpointSet) -> bool {
        self.entries.len() == other.entries.len()
            && self.entries.iter().zip(&other.entries).all(|(a, b)| a.is_like(b))
    }

    /// Decides anew who is left out. Returns those for which that changed.
    pub fn judge(&self) -> Vec<&Entry> {
        let cases: Vec<Case> = (self.entries.iter())
            .map(|entry| Case { is_well: entry.endpoint.is_well(), is_spare: entry.is_spare })
            .collect();
        let verdicts = ejection::ejected(&cases);
        let pairs = self.entries.iter().zip(verdicts);
        pairs
            .filter(|(entry, ejected)| entry.endpoint.set_ejected(*ejected))
            .map(|(entry, _)| entry)
            .collect()
    }

    /// An endpoint whose breaker waits for a call to find out whether it can
    /// close, if this call may be that one.
    pub fn take_probe(&self, kind: CallKind, tried: &[String], now: Duration) -> Option<usize> {
        let may_go = |entry: &Entry| !entry.is_unfit(kind) && !has(tried, entry);
        let due = |entry: &Entry| entry.endpoint.is_probe_due(now);
        self.entries.iter().position(|entry| due(entry) && may_go(entry) && entry.endpoint.take_probe(now))
    }
}

fn has(tried: &[String], entry: &Entry) -> bool {
    tried.iter().any(|address| address == entry.endpoint.address())
}

/// The set as one call sees it.
pub struct CallView<'a> {
    pub set: &'a EndpointSet,
    pub chooser: &'a Chooser,
    pub kind: CallKind,
    pub tried: &'a [String],
    /// The member that leads; 0 when nobody knows.
    pub leader: u64,
    pub now: Duration,
    pub decay: Duration,
}

impl View for CallView<'_> {
    fn count(&self) -> usize {
        self.set.entries.len()
    }

    fn penalty(&self, at: usize) -> u8 {
        let entry = &self.set.entries[at];
        let mut against = 0;
        for (holds, reason) in [
            (entry.is_unfit(self.kind), penalty::UNFIT),
            (!self.tried.is_empty() && has(self.tried, entry), penalty::TRIED),
            (entry.endpoint.is_ejected(), penalty::EJECTED),
            (entry.is_spare, penalty::SPARE),
            (
                self.chooser.wants_leader && (self.leader == 0 || entry.member.id != self.leader),
                penalty::NOT_LEADER,
            ),
            (self.chooser.wants_zone && entry.is_far, penalty::FAR),
        ] {
            if holds {
                against |= reason;
            }
        }
        against
    }

    fn id_hash(&self, at: usize) -> u64 {
        self.set.entries[at].id_hash
    }

    fn weight(&self, at: usize) -> u32 {
        self.set.entries[at].weight
    }

    fn load(&self, at: usize) -> u32 {
        self.set.entries[at].endpoint.load(self.kind)
    }

    fn latency_ns(&self, at: usize) -> f64 {
        self.set.entries[at].endpoint.latency_ns(self.now, self.decay)
    }

    fn account(&self, at: usize) -> &AtomicI64 {
        self.set.entries[at].endpoint.account()
    }

    fn is_even(&self) -> bool {
        self.set.is_even
    }

    fn ring(&self) -> Option<&Ring> {
        self.set.ring.as_ref()
    }

    fn maglev(&self) -> Option<&Maglev> {
        self.set.maglev.as_ref()
    }
}
