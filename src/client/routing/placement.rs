//! Where keys belong, apart from any connection: for planning, for diagnosis and
//! for measuring the strategies.

use std::sync::atomic::AtomicI64;

use super::hash;
use super::options::Strategy;
use super::strategy::{Chooser, Draw, View};
use super::tables::{Maglev, Node, Ring};

/// Which member a key belongs to while all members are well and nobody is
/// overloaded. All clients with the same strategy and the same members agree,
/// in whatever order they know them.
///
/// ```
/// use mainstay::client::{Placement, Strategy};
///
/// let three = Placement::new(&Strategy::rendezvous(), &[(1, 1), (2, 1), (3, 1)]);
/// let owner = three.owner(b"svc/checkout/limits");
/// let four = Placement::new(&Strategy::rendezvous(), &[(4, 1), (3, 1), (2, 1), (1, 1)]);
/// // A member that joins takes keys, and nobody else does.
/// assert!([owner, 4].contains(&four.owner(b"svc/checkout/limits")));
/// ```
#[derive(Debug)]
pub struct Placement {
    chooser: Chooser,
    members: Vec<Placed>,
    is_even: bool,
    ring: Option<Ring>,
    maglev: Option<Maglev>,
}

#[derive(Debug)]
struct Placed {
    id: u64,
    id_hash: u64,
    weight: u32,
    account: AtomicI64,
}

impl Placement {
    /// The placement by `strategy` over `members`, each with its id and weight.
    /// For strategies that do not go by key, the owner of a key is whoever is
    /// next.
    ///
    /// # Panics
    /// Without members, or with more than 65,534.
    pub fn new(strategy: &Strategy, members: &[(u64, u32)]) -> Placement {
        assert!((1..usize::from(u16::MAX)).contains(&members.len()), "{} members", members.len());
        let placed = |(id, weight): &(u64, u32)| Placed {
            id: *id,
            id_hash: hash::of_member(*id),
            weight: (*weight).max(1),
            account: AtomicI64::new(0),
        };
        let members: Vec<Placed> = members.iter().map(placed).collect();
        let mut nodes: Vec<Node> = (0u16..)
            .zip(&members)
            .map(|(index, member)| Node { index, id_hash: member.id_hash, weight: member.weight })
            .collect();
        Node::sort(&mut nodes);
        Placement {
            chooser: Chooser::new(strategy),
            is_even: members.iter().all(|member| member.weight == members[0].weight),
            ring: Ring::wanted(strategy.layers(), &nodes),
            maglev: Maglev::wanted(strategy.layers(), &nodes),
            members,
        }
    }

    /// The member that a key or prefix belongs to.
    pub fn owner(&self, key: &[u8]) -> u64 {
        let draw = Draw { key: Some(hash::of_bytes(key)), turn: 0, random: &|| hash::of_bytes(key) };
        self.members[self.chooser.choose(self, &draw)].id
    }
}

impl View for Placement {
    fn count(&self) -> usize {
        self.members.len()
    }

    fn penalty(&self, _at: usize) -> u8 {
        0
    }

    fn id_hash(&self, at: usize) -> u64 {
        self.members[at].id_hash
    }

    fn weight(&self, at: usize) -> u32 {
        self.members[at].weight
    }

    fn load(&self, _at: usize) -> u32 {
        0
    }

    fn latency_ns(&self, _at: usize) -> f64 {
        0.0
    }

    fn account(&self, at: usize) -> &AtomicI64 {
        &self.members[at].account
    }

    fn is_even(&self) -> bool {
        self.is_even
    }

    fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    fn maglev(&self) -> Option<&Maglev> {
        self.maglev.as_ref()
    }
}
