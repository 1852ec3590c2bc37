//! The tables that ring and maglev hashing look keys up in. Made anew when the
//! endpoints change, never in between.
//!
//! A table names endpoints by their place in the list that it was made of. Who
//! finds an endpoint there that cannot be used walks on, so that its keys spread
//! over all others.

use std::cmp::Reverse;

use super::hash::mixed;
use super::options::Strategy;

/// The fewest points of a ring.
const RING_POINTS_MIN: u64 = 1_024;
/// The most: weights count for less beyond.
const RING_POINTS_MAX: u64 = 1 << 20;
/// The entries of a maglev table; a prime, so that every step visits all of them.
pub const MAGLEV_ENTRIES: usize = 65_537;

/// How often a maglev table is looked into for an endpoint that can be used.
const JUMPS_MAX: u64 = 64;

/// What a table needs to know of an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// Its place in the list of endpoints.
    pub index: u16,
    /// What it is called, hashed; no two have the same.
    pub id_hash: u64,
    /// Its share of the keys, against the others'; at least 1.
    pub weight: u32,
}

impl Node {
    /// Every client makes the same table, in whatever order it met the members.
    pub fn sort(nodes: &mut [Node]) {
        nodes.sort_by_key(|node| Reverse(node.id_hash));
    }
}

/// A ring of points: a key belongs to the endpoint of the next point.
#[derive(Debug)]
pub struct Ring {
    points: Vec<(u64, u16)>,
}

impl Ring {
    /// The ring, if one of the strategies needs it.
    pub fn wanted<'a>(mut strategies: impl Iterator<Item = &'a Strategy>, nodes: &[Node]) -> Option<Ring> {
        let points = strategies.find_map(|strategy| match strategy {
            Strategy::Ring { points, .. } => Some(*points),
            _ => None,
        });
        points.map(|points| Ring::new(nodes, points))
    }

    /// A ring with `points` points for each unit of weight. The number does not
    /// depend on how many endpoints there are (unless there are very few), so
    /// that none of the others' points move when one comes or goes.
    pub fn new(nodes: &[Node], points: u32) -> Ring {
        let total: u64 = nodes.iter().map(|node| u64::from(node.weight)).sum::<u64>().max(1);
        let per_unit =
            u64::from(points).max(RING_POINTS_MIN.div_ceil(total)).min(RING_POINTS_MAX / total).max(1);
        let mut ring: Vec<(u64, u16)> = nodes
            .iter()
            .flat_map(|node| {
                let count = per_unit * u64::from(node.weight);
                (0..count).map(|n| (mixed(node.id_hash, n.wrapping_add(1)), node.index))
            })
            .collect();
        ring.sort_unstable();
        Ring { points: ring }
    }

    /// The endpoints from the key's place on, some of them often; each point once.
    pub fn walk(&self, key: u64) -> impl Iterator<Item = usize> + '_ {
        let start = self.points.partition_point(|(at, _)| *at < key);
        let (before, after) = self.points.split_at(start);
        after.iter().chain(before).map(|(_, index)| usize::from(*index))
    }

    /// How many points it has.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.points.len()
    }
}

/// A table in which each endpoint has its share of entries, and most entries
/// stay when an endpoint comes or goes.
#[derive(Debug)]
pub struct Maglev {
    entries: Vec<u16>,
}

impl Maglev {
    /// The table, if one of the strategies needs it.
    pub fn wanted<'a>(mut strategies: impl Iterator<Item = &'a Strategy>, nodes: &[Node]) -> Option<Maglev> {
        let needs = strategies.any(|strategy| matches!(strategy, Strategy::Maglev { .. }));
        needs.then(|| Maglev::new(nodes))
    }

    /// Fills the table: the endpoints take turns, as often as their weight says,
    /// and each takes the first free entry of its own random order.
    pub fn new(nodes: &[Node]) -> Maglev {
        const FREE: u16 = u16::MAX;
        let mut entries = vec![FREE; if nodes.is_empty() { 0 } else { MAGLEV_ENTRIES }];
        let heaviest = u64::from(nodes.iter().map(|node| node.weight).max().unwrap_or(1));
        let size = MAGLEV_ENTRIES as u64;
        // Where each one looks next, how far it steps, and its unused turns.
        let mut seekers: Vec<(u64, u64, u64)> = nodes
            .iter()
            .map(|node| (mixed(node.id_hash, 1) % size, mixed(node.id_hash, 2) % (size - 1) + 1, 0))
            .collect();
        let mut left = entries.len();
        while left > 0 {
            for (node, (next, step, turns)) in nodes.iter().zip(&mut seekers) {
                *turns += u64::from(node.weight);
                if *turns < heaviest || left == 0 {
                    continue;
                }
                *turns -= heaviest;
                while entries[*next as usize] != FREE {
                    *next = (*next + *step) % size;
                }
                entries[*next as usize] = node.index;
                left -= 1;
            }
        }
        Maglev { entries }
    }

    /// The key's endpoint, and then more at random, as the key draws them: what
    /// stands next to an entry in the table depends on its owner, so walking on
    /// from there would favour some.
    pub fn walk(&self, key: u64) -> impl Iterator<Item = usize> + '_ {
        let jumps = if self.entries.is_empty() { 0 } else { JUMPS_MAX };
        let places = (0..jumps).map(move |jump| if jump == 0 { key } else { mixed(key, jump) });
        places.map(|place| usize::from(self.entries[(place % self.entries.len() as u64) as usize]))
    }

    /// How many entries it has.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}
