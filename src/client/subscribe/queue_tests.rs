//! Queues against a model that keeps everything.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::types::{EventKind, KeyValue, LeaseId, Space};

fn event(key: u8, revision: i64) -> Event {
    let kv = KeyValue {
        key: Bytes::copy_from_slice(&[key]),
        create_revision: Revision(revision),
        mod_revision: Revision(revision),
        version: 1,
        lease: LeaseId::NONE,
        value: Bytes::copy_from_slice(&revision.to_be_bytes()),
    };
    Event { space: Space::User, kind: EventKind::Put, kv, prev: None }
}

fn unit(revision: i64, keys: &[u8]) -> Unit {
    let events = keys.iter().map(|key| event(*key, revision)).collect();
    Unit { revision: Revision(revision), events, since: Instant::now() }
}

fn snapshot(queue: &mut Queue, revision: i64, keys: &[u8]) -> bool {
    let events = keys.iter().map(|key| event(*key, revision)).collect();
    queue.offer_snapshot(Revision(revision), events, Instant::now()).is_none()
}

/// Revisions and keys of a batch.
fn shown(batch: &Batch) -> Vec<(i64, u8)> {
    batch.events.iter().map(|event| (event.kv.mod_revision.0, event.kv.key[0])).collect()
}

#[tokio::test]
async fn a_revision_is_never_torn_apart() {
    let mut queue = Queue::new(10, Overflow::Block);
    assert!(queue.offer(unit(2, b"a")).1.is_none());
    assert!(queue.offer(unit(3, b"bcd")).1.is_none());
    assert!(queue.offer(unit(4, b"e")).1.is_none());
    let batch = queue.take(2).expect("a batch");
    assert_eq!((batch.revision, shown(&batch).len()), (Revision(3), 4));
    queue.advance(Revision(9));
    let batch = queue.take(2).expect("a batch");
    assert_eq!(batch.revision, Revision(9), "nothing else matched up to there");
    assert!(queue.take(2).is_none());
}

#[tokio::test]
async fn one_large_revision_is_let_in_alone() {
    for overflow in [Overflow::Block, Overflow::CoalescePerKey, Overflow::DropOldest] {
        let mut queue = Queue::new(2, overflow);
        assert!(queue.offer(unit(2, b"abcd")).1.is_none());
        assert_eq!(queue.offer(unit(3, b"e")).1.is_none(), overflow == Overflow::DropOldest);
    }
}

#[tokio::test]
async fn blocking_gives_back_what_does_not_fit() {
    let mut queue = Queue::new(2, Overflow::Block);
    assert!(queue.offer(unit(2, b"ab")).1.is_none());
    let (made, back) = queue.offer(unit(3, b"a"));
    assert_eq!((made, back.map(|unit| unit.revision)), (Made::default(), Some(Revision(3))));
    assert!(queue.is_due(100), "waiting would not bring more");
    assert_eq!(shown(&queue.take(9).expect("a batch")), [(2, b'a'), (2, b'b')]);
    assert!(!queue.is_due(100));
}

#[tokio::test]
async fn merging_keeps_the_newest_and_its_place_in_the_order() {
    let mut queue = Queue::new(3, Overflow::CoalescePerKey);
    for (revision, keys) in [(2, &b"a"[..]), (3, b"bc"), (4, b"a"), (5, b"b")] {
        assert!(queue.offer(unit(revision, keys)).1.is_none());
    }
    assert_eq!(queue.len(), 3);
    let (_, back) = queue.offer(unit(6, b"d"));
    assert!(back.is_some(), "a fourth key waits");
    let batch = queue.take(9).expect("a batch");
    assert_eq!(shown(&batch), [(3, b'c'), (4, b'a'), (5, b'b')]);
    assert_eq!((batch.merged, batch.dropped), (2, 0));
    assert!(queue.offer(unit(6, b"a")).0 == Made::default(), "what was handed out is not merged");
}

#[tokio::test]
async fn dropping_counts_and_says_so_with_the_next_batch() {
    let mut queue = Queue::new(3, Overflow::DropOldest);
    for (revision, keys) in [(2, &b"ab"[..]), (3, b"c"), (4, b"d"), (5, b"e")] {
        assert!(queue.offer(unit(revision, keys)).1.is_none());
    }
    let batch = queue.take(1).expect("a batch");
    assert_eq!((shown(&batch), batch.dropped), (vec![(3, b'c')], 2));
    assert_eq!(queue.take(1).expect("a batch").dropped, 0, "told once");
}

#[tokio::test]
async fn a_snapshot_stands_alone_and_comes_in_parts() {
    for overflow in [Overflow::Block, Overflow::CoalescePerKey, Overflow::DropOldest] {
        let mut queue = Queue::new(2, overflow);
        assert!(queue.offer(unit(2, b"a")).1.is_none());
        assert!(!snapshot(&mut queue, 9, b"abc"), "what was before goes out first");
        assert_eq!(queue.take(9).expect("a batch").revision, Revision(2));
        assert!(snapshot(&mut queue, 9, b"abc"));
        assert!(queue.offer(unit(10, b"a")).1.is_some(), "what follows waits");
        let first = queue.take(2).expect("a part");
        assert_eq!(first.snapshot, Some(SnapshotPart { first: true, last: false }));
        let last = queue.take(2).expect("a part");
        assert_eq!(last.snapshot, Some(SnapshotPart { first: false, last: true }));
        assert_eq!((first.events.len(), last.events.len(), last.revision), (2, 1, Revision(9)));
        assert!(queue.offer(unit(10, b"a")).1.is_none());
    }
    let mut queue = Queue::new(2, Overflow::Block);
    assert!(snapshot(&mut queue, 5, b""));
    let batch = queue.take(2).expect("an empty snapshot says that nothing is there");
    assert_eq!(batch.snapshot, Some(SnapshotPart { first: true, last: true }));
}

/// What a reader does: take, or let changes come.
#[derive(Clone, Debug)]
enum Step {
    Change(Vec<u8>),
    Take(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let keys = prop::collection::btree_set(0u8..6, 1..4).prop_map(|keys| keys.into_iter().collect());
    let step = prop_oneof![3 => keys.prop_map(Step::Change), 1 => (1usize..8).prop_map(Step::Take)];
    prop::collection::vec(step, 1..120)
}

/// Everything that happened, and everything that the reader was told.
#[derive(Default)]
struct Story {
    happened: Vec<(i64, u8)>,
    told: Vec<(i64, u8)>,
    merged: u64,
    dropped: u64,
}

/// Plays the steps; a change that finds no room waits until the reader has made some.
fn play(overflow: Overflow, capacity: usize, steps: Vec<Step>) -> Story {
    let mut queue = Queue::new(capacity, overflow);
    let mut story = Story::default();
    let mut revision = 1;
    let take = |queue: &mut Queue, story: &mut Story, max| {
        if let Some(batch) = queue.take(max) {
            let newest = batch.events.iter().map(|event| event.kv.mod_revision).max();
            assert!(newest.is_some_and(|newest| newest <= batch.revision));
            story.told.extend(shown(&batch));
            story.merged += batch.merged;
            story.dropped += batch.dropped;
        }
    };
    for step in steps {
        match step {
            Step::Take(max) => take(&mut queue, &mut story, max),
            Step::Change(keys) => {
                revision += 1;
                story.happened.extend(keys.iter().map(|key| (revision, *key)));
                let mut waiting = Some(unit(revision, &keys));
                while let Some(unit) = waiting.take() {
                    waiting = queue.offer(unit).1;
                    if waiting.is_some() {
                        assert_ne!(overflow, Overflow::DropOldest, "dropping never waits");
                        take(&mut queue, &mut story, 1);
                    }
                }
                let largest = capacity.max(keys.len());
                assert!(queue.len() <= largest, "{} of {largest}", queue.len());
            }
        }
    }
    while queue.len() > 0 {
        take(&mut queue, &mut story, 3);
    }
    assert!(queue.take(1).is_none() && queue.places.is_empty() && queue.oldest().is_none());
    story
}

fn newest(events: &[(i64, u8)]) -> BTreeMap<u8, i64> {
    events.iter().map(|(revision, key)| (*key, *revision)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn blocking_loses_nothing(capacity in 1usize..12, steps in steps()) {
        let story = play(Overflow::Block, capacity, steps);
        prop_assert_eq!(&story.told, &story.happened);
        prop_assert_eq!((story.merged, story.dropped), (0, 0));
    }

    #[test]
    fn merging_ends_with_the_newest_state_in_order(capacity in 1usize..12, steps in steps()) {
        let story = play(Overflow::CoalescePerKey, capacity, steps);
        prop_assert!(story.told.is_sorted_by_key(|(revision, _)| *revision));
        prop_assert_eq!(newest(&story.told), newest(&story.happened));
        prop_assert_eq!(story.told.len() as u64 + story.merged, story.happened.len() as u64);
        prop_assert_eq!(story.dropped, 0);
    }

    #[test]
    fn dropping_counts_exactly(capacity in 1usize..12, steps in steps()) {
        let story = play(Overflow::DropOldest, capacity, steps);
        prop_assert!(story.told.is_sorted_by_key(|(revision, _)| *revision));
        prop_assert!(story.told.iter().all(|told| story.happened.contains(told)));
        prop_assert_eq!(story.told.len() as u64 + story.dropped, story.happened.len() as u64);
        prop_assert_eq!(story.told.last(), story.happened.last());
    }
}
