//! Which watchers want a key: exact keys by hash, ranges by an interval tree.
//!
//! The tree is a treap ordered by (start, end) whose nodes know the greatest
//! end below them, so that a lookup visits only what can hold the key. Watchers
//! of an equal range share one node. Watchers of one key or range are visited in
//! the order of their numbers; nothing here iterates a hash map.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

use crate::types::KeyRange;

/// The watchers of one space. `W` is what is found; `u64` numbers it.
pub(super) struct Index<W> {
    exact: HashMap<Bytes, BTreeMap<u64, W>>,
    ranges: Link<W>,
    /// Feeds the priorities: independent of the keys, so that no choice of
    /// keys can unbalance the tree, and equal in every run.
    inserted: u64,
}

type Link<W> = Option<Box<Node<W>>>;

struct Node<W> {
    start: Bytes,
    end: End,
    /// The greatest end in this subtree.
    end_max: End,
    priority: u64,
    left: Link<W>,
    right: Link<W>,
    watchers: BTreeMap<u64, W>,
}

/// The exclusive end of a range. The order of the variants is the order of ends.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Before(Bytes),
    Unbounded,
}

impl End {
    fn is_after(&self, key: &[u8]) -> bool {
        match self {
            End::Before(end) => key < &end[..],
            End::Unbounded => true,
        }
    }
}

impl<W> Default for Index<W> {
    fn default() -> Self {
        Index { exact: HashMap::new(), ranges: None, inserted: 0 }
    }
}

impl<W> Index<W> {
    /// Adds `watcher` under `number`, which is not in the index.
    pub(super) fn insert(&mut self, range: &KeyRange, number: u64, watcher: W) {
        let Some((start, end)) = interval(range) else {
            self.exact.entry(range.start().clone()).or_default().insert(number, watcher);
            return;
        };
        if let Some(node) = find(&mut self.ranges, &start, &end) {
            node.watchers.insert(number, watcher);
            return;
        }
        self.inserted += 1;
        let node = Box::new(Node {
            end_max: end.clone(),
            start,
            end,
            priority: scramble(self.inserted),
            left: None,
            right: None,
            watchers: BTreeMap::from([(number, watcher)]),
        });
        let root = self.ranges.take();
        self.ranges = Some(insert(root, node));
    }

    /// Removes what [`Index::insert`] added with the same range and number.
    pub(super) fn remove(&mut self, range: &KeyRange, number: u64) {
        let Some((start, end)) = interval(range) else {
            if let Some(watchers) = self.exact.get_mut(range.start()) {
                watchers.remove(&number);
                if watchers.is_empty() {
                    self.exact.remove(range.start());
                }
            }
            return;
        };
        let Some(node) = find(&mut self.ranges, &start, &end) else { return };
        node.watchers.remove(&number);
        if node.watchers.is_empty() {
            let root = self.ranges.take();
            self.ranges = remove(root, &start, &end);
        }
    }

    /// Visits every watcher whose range holds `key`, each once.
    pub(super) fn visit<'a>(&'a self, key: &[u8], mut found: impl FnMut(&'a W)) {
        for watcher in self.exact.get(key).into_iter().flat_map(BTreeMap::values) {
            found(watcher);
        }
        stab(&self.ranges, key, &mut found);
    }
}

/// Start and end of a range; `None` for a single key.
fn interval(range: &KeyRange) -> Option<(Bytes, End)> {
    match range {
        KeyRange::Single(_) => None,
        KeyRange::Span { start, end } => Some((start.clone(), End::Before(end.clone()))),
        KeyRange::From(start) => Some((start.clone(), End::Unbounded)),
    }
}

/// SplitMix64's finaliser: spreads consecutive numbers over all of u64.
fn scramble(number: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl<W> Node<W> {
    fn order(&self, start: &Bytes, end: &End) -> Ordering {
        start.cmp(&self.start).then_with(|| end.cmp(&self.end))
    }

    /// Restores `end_max` after a child changed.
    fn renew(&mut self) {
        let children = [&self.left, &self.right];
        let below = children.into_iter().flatten().map(|child| &child.end_max).max();
        self.end_max = below.map_or(&self.end, |below| below.max(&self.end)).clone();
    }
}

fn find<'a, W>(link: &'a mut Link<W>, start: &Bytes, end: &End) -> Option<&'a mut Node<W>> {
    let node = link.as_deref_mut()?;
    match node.order(start, end) {
        Ordering::Equal => Some(node),
        Ordering::Less => find(&mut node.left, start, end),
        Ordering::Greater => find(&mut node.right, start, end),
    }
}

fn insert<W>(link: Link<W>, mut new: Box<Node<W>>) -> Box<Node<W>> {
    let Some(mut node) = link else { return new };
    if new.priority > node.priority {
        (new.left, new.right) = split(Some(node), &new.start, &new.end);
        new.renew();
        return new;
    }
    if node.order(&new.start, &new.end) == Ordering::Less {
        node.left = Some(insert(node.left.take(), new));
    } else {
        node.right = Some(insert(node.right.take(), new));
    }
    node.renew();
    node
}

/// Divides a tree into what is below (start, end) and what is above it.
fn split<W>(link: Link<W>, start: &Bytes, end: &End) -> (Link<W>, Link<W>) {
    let Some(mut node) = link else { return (None, None) };
    if node.order(start, end) == Ordering::Less {
        let (below, above) = split(node.left.take(), start, end);
        node.left = above;
        node.renew();
        (below, Some(node))
    } else {
        let (below, above) = split(node.right.take(), start, end);
        node.right = below;
        node.renew();
        (Some(node), above)
    }
}

fn remove<W>(link: Link<W>, start: &Bytes, end: &End) -> Link<W> {
    let mut node = link?;
    match node.order(start, end) {
        Ordering::Equal => return merge(node.left.take(), node.right.take()),
        Ordering::Less => node.left = remove(node.left.take(), start, end),
        Ordering::Greater => node.right = remove(node.right.take(), start, end),
    }
    node.renew();
    Some(node)
}

/// Joins two trees, all of `below` standing before all of `above`.
fn merge<W>(below: Link<W>, above: Link<W>) -> Link<W> {
    match (below, above) {
        (None, tree) | (tree, None) => tree,
        (Some(mut below), Some(mut above)) => {
            if below.priority > above.priority {
                below.right = merge(below.right.take(), Some(above));
                below.renew();
                Some(below)
            } else {
                above.left = merge(Some(below), above.left.take());
                above.renew();
                Some(above)
            }
        }
    }
}

fn stab<'a, W>(link: &'a Link<W>, key: &[u8], found: &mut impl FnMut(&'a W)) {
    let Some(node) = link else { return };
    if !node.end_max.is_after(key) {
        return;
    }
    stab(&node.left, key, found);
    if key < &node.start[..] {
        return;
    }
    if node.end.is_after(key) {
        node.watchers.values().for_each(&mut *found);
    }
    stab(&node.right, key, found);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(0u8..4, 0..4).prop_map(Bytes::from)
    }

    fn range() -> impl Strategy<Value = KeyRange> {
        prop_oneof![
            key().prop_map(KeyRange::Single),
            key().prop_map(KeyRange::From),
            key().prop_map(KeyRange::prefix),
            (key(), key()).prop_map(|(start, end)| KeyRange::Span { start, end }),
        ]
    }

    proptest! {
        #[test]
        fn a_lookup_finds_exactly_the_ranges_that_hold_the_key(
            ranges in proptest::collection::vec((range(), any::<bool>()), 0..60),
            keys in proptest::collection::vec(key(), 1..20),
        ) {
            let mut index = Index::default();
            for (number, (range, _)) in ranges.iter().enumerate() {
                index.insert(range, number as u64, number);
            }
            for (number, (range, kept)) in ranges.iter().enumerate() {
                if !kept {
                    index.remove(range, number as u64);
                }
            }
            for key in keys {
                let mut found = Vec::new();
                index.visit(&key, |number| found.push(*number));
                found.sort_unstable();
                let holds = |(_, (range, kept)): &(usize, &(KeyRange, bool))| *kept && range.contains(&key);
                let expected: Vec<_> = ranges.iter().enumerate().filter(holds).map(|(number, _)| number).collect();
                prop_assert_eq!(found, expected);
            }
            for (number, (range, kept)) in ranges.iter().enumerate() {
                if *kept {
                    index.remove(range, number as u64);
                }
            }
            prop_assert!(index.exact.is_empty() && index.ranges.is_none());
        }
    }
}
