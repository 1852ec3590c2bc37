//! One watched prefix: which keys there are and at which revision each was last
//! set. The levels hold bytes; this decides what is true.
//!
//! Invariants: the index is the prefix exactly as it was at `revision`, which never
//! falls. `ahead` holds what is known beyond that: answers of the cluster that the
//! watch has not reached yet, and for a moment the values of the newest changes,
//! until the levels have them. So a value in a level is current if and only if its
//! revision is the index's, whatever became of the level in between, and a key that
//! is in neither does not exist.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use super::file::StoredScope;
use super::record::{Moment, own};
use crate::client::MirrorUpdate;
use crate::types::{EventKind, KeyRange, KeyValue, Revision};

/// Answers beyond the watch that are remembered key by key.
const AHEAD_MAX: usize = 10_000;

/// A watched prefix.
pub(super) struct Scope {
    pub prefix: Bytes,
    pub range: KeyRange,
    inner: RwLock<Inner>,
    proofs: Mutex<Proofs>,
    /// Everything in the prefix is proven as of this moment.
    proved: AtomicI64,
    /// Up to this revision the levels have everything.
    stored: AtomicI64,
    /// Whether it is up to date, as whoever follows it sees it.
    pub live: AtomicBool,
    /// Whether a record on disk is damaged, so that all has to be read anew.
    damaged: AtomicBool,
    /// Wakes whoever follows the prefix, to ask how far the changes reach.
    pub wanted: Notify,
}

struct Inner {
    index: HashMap<Bytes, Revision>,
    /// 0 until everything is here for the first time.
    revision: Revision,
    ahead: HashMap<Bytes, Ahead>,
    /// Something beyond `revision` was handed out and could not be remembered:
    /// until the watch is there nothing else is handed out.
    barrier: Revision,
}

#[derive(Clone, Debug)]
struct Ahead {
    kv: Option<KeyValue>,
    as_of: Revision,
}

/// Linearizable reads that the watch has not caught up with: the oldest, which is
/// the next to be reached even while the store changes all the time, and the newest.
#[derive(Default)]
struct Proofs {
    oldest: Option<(Revision, Moment)>,
    newest: Option<(Revision, Moment)>,
}

/// What a scope knows of a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Found {
    /// Nothing: not everything is here yet.
    Unknown,
    /// It does not exist.
    Absent,
    /// It was last set at this revision; a level may have the value.
    At(Revision),
    /// Here it is.
    Here(Option<KeyValue>),
}

/// What a scope knows of a key, as of when.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Known {
    pub found: Found,
    pub revision: Revision,
    pub proved: Moment,
}

/// What the levels may do with what the cluster said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Learned {
    /// Keep it.
    Keep,
    /// Leave it: the scope has taken care of it, or knows better.
    Done,
}

/// What an update changes: each key once, with its new state.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub revision: Revision,
    pub keys: Vec<(Bytes, Option<KeyValue>)>,
    /// The index after a snapshot.
    whole: Option<HashMap<Bytes, Revision>>,
}

impl Scope {
    /// A prefix with what is known of it from the disk; all empty if nothing is.
    pub fn new(prefix: Bytes, stored: StoredScope, proved: Moment) -> Scope {
        let StoredScope { index, revision, damaged, .. } = stored;
        let inner = Inner { index, revision, ahead: HashMap::new(), barrier: Revision(0) };
        // On the wire a range cannot start at the empty key.
        let range = match prefix.is_empty() {
            true => KeyRange::From(Bytes::from_static(&[0])),
            false => KeyRange::prefix(prefix.clone()),
        };
        Scope {
            prefix,
            range,
            inner: RwLock::new(inner),
            proofs: Mutex::default(),
            proved: AtomicI64::new(proved),
            stored: AtomicI64::new(revision.0),
            live: AtomicBool::new(false),
            damaged: AtomicBool::new(damaged),
            wanted: Notify::new(),
        }
    }

    /// What is known of a key.
    pub fn find(&self, key: &[u8]) -> Known {
        // The proof first: what is found after it is at least as recent.
        let proved = self.proved();
        let inner = self.inner.read();
        let revision = inner.revision;
        if revision.0 == 0 || revision < inner.barrier {
            return Known { found: Found::Unknown, revision, proved };
        }
        if !inner.ahead.is_empty()
            && let Some(ahead) = inner.ahead.get(key)
        {
            let revision = revision.max(ahead.as_of);
            return Known { found: Found::Here(ahead.kv.clone()), revision, proved };
        }
        let found = inner.index.get(key).map_or(Found::Absent, |at| Found::At(*at));
        Known { found, revision, proved }
    }

    /// The revision the prefix is known whole at; 0 if nothing is known.
    pub fn revision(&self) -> Revision {
        self.inner.read().revision
    }

    /// The moment as of which everything is proven.
    pub fn proved(&self) -> Moment {
        self.proved.load(Ordering::Acquire)
    }

    /// The keys that exist.
    pub fn keys(&self) -> Vec<Bytes> {
        self.inner.read().index.keys().cloned().collect()
    }

    /// The revision from which on changes are wanted; 0 for everything.
    pub fn resume(&self) -> Revision {
        if self.damaged.load(Ordering::Relaxed) { Revision(0) } else { self.revision() }
    }

    /// Works out what an update changes; `None` if it is not newer than what is here.
    /// Only one task may plan and publish.
    pub fn plan(&self, update: &MirrorUpdate) -> Option<Changes> {
        let revision = update.revision();
        let inner = self.inner.read();
        // A member that is behind may be asked after one that was not.
        let mends = revision == inner.revision && self.damaged.load(Ordering::Relaxed);
        if revision <= inner.revision && !mends {
            return None;
        }
        Some(match update {
            MirrorUpdate::Snapshot { kvs, .. } => snapshot_changes(&inner.index, revision, kvs),
            MirrorUpdate::Changes(batch) => {
                let mut newest = HashMap::new();
                for event in batch.events.iter().filter(|event| event.kv.mod_revision > inner.revision) {
                    let kv = (event.kind == EventKind::Put).then(|| own(&event.kv));
                    let key = kv
                        .as_ref()
                        .map_or_else(|| Bytes::copy_from_slice(&event.kv.key), |kv| kv.key.clone());
                    newest.insert(key, kv);
                }
                Changes { revision, keys: newest.into_iter().collect(), whole: None }
            }
        })
    }

    /// Makes changes true, all at once, and has their values at hand until
    /// [`Scope::settle`].
    pub fn publish(&self, changes: &mut Changes) {
        let mut fresh: HashMap<Bytes, Ahead> = (changes.keys.iter())
            .map(|(key, kv)| (key.clone(), Ahead { kv: kv.clone(), as_of: changes.revision }))
            .collect();
        let mut inner = self.inner.write();
        for (key, ahead) in inner.ahead.drain().filter(|(_, ahead)| ahead.as_of > changes.revision) {
            fresh.insert(key, ahead);
        }
        inner.ahead = fresh;
        let replaced = match changes.whole.take() {
            Some(whole) => {
                self.damaged.store(false, Ordering::Relaxed);
                std::mem::replace(&mut inner.index, whole)
            }
            None => {
                for (key, kv) in &changes.keys {
                    match kv {
                        Some(kv) => inner.index.insert(key.clone(), kv.mod_revision),
                        None => inner.index.remove(key),
                    };
                }
                HashMap::new()
            }
        };
        inner.revision = changes.revision;
        drop(inner);
        drop(replaced);
        self.advance(changes.revision);
    }

    /// The levels have what was published.
    pub fn settle(&self) {
        let mut inner = self.inner.write();
        let revision = inner.revision;
        inner.ahead.retain(|_, ahead| ahead.as_of > revision);
        self.stored.store(revision.0, Ordering::Release);
    }

    /// The revision that the levels have everything of, with the moment as of which
    /// that is proven; `None` while they take something in.
    pub fn stored(&self) -> Option<(Revision, Moment)> {
        // The proof first, as in `find`.
        let proved = self.proved();
        let revision = self.revision();
        (self.stored.load(Ordering::Acquire) == revision.0).then_some((revision, proved))
    }

    /// Takes in what the cluster said of one key, and says what the levels may do
    /// with it.
    pub fn learn(&self, key: &Bytes, kv: Option<&KeyValue>, as_of: Revision) -> Learned {
        let mut inner = self.inner.write();
        if inner.revision.0 == 0 {
            inner.barrier = inner.barrier.max(as_of);
            return Learned::Keep;
        }
        let indexed = inner.index.get(key).copied();
        let is_ahead = inner.ahead.get(key).is_some_and(|ahead| ahead.as_of >= as_of);
        if !is_ahead && indexed == kv.map(|kv| kv.mod_revision) {
            return if indexed.is_some() { Learned::Keep } else { Learned::Done };
        }
        if as_of <= inner.revision || is_ahead {
            return Learned::Done;
        }
        if inner.ahead.len() < AHEAD_MAX || inner.ahead.contains_key(key) {
            inner.ahead.insert(key.clone(), Ahead { kv: kv.map(own), as_of });
            return Learned::Done;
        }
        inner.barrier = inner.barrier.max(as_of);
        Learned::Keep
    }

    /// A linearizable read that began at `begun` found the store at `revision`.
    /// True if that proves the prefix already; else the watch is asked how far it is.
    pub fn verified(&self, revision: Revision, begun: Moment) -> bool {
        {
            let mut proofs = self.proofs.lock();
            proofs.oldest.get_or_insert((revision, begun));
            proofs.newest = Some((revision, begun));
        }
        let own = self.revision();
        self.advance(own);
        let proven = own >= revision;
        if !proven {
            self.wanted.notify_one();
        }
        proven
    }

    /// The begin of the oldest read that the watch has not caught up with.
    pub fn waits_since(&self) -> Option<Moment> {
        self.proofs.lock().oldest.map(|(_, begun)| begun)
    }

    fn advance(&self, revision: Revision) {
        let mut proofs = self.proofs.lock();
        if let Some((at, begun)) = proofs.newest
            && at <= revision
        {
            self.proved.fetch_max(begun, Ordering::AcqRel);
            *proofs = Proofs::default();
        }
        if let Some((at, begun)) = proofs.oldest
            && at <= revision
        {
            self.proved.fetch_max(begun, Ordering::AcqRel);
            proofs.oldest = proofs.newest;
        }
    }
}

fn snapshot_changes(index: &HashMap<Bytes, Revision>, revision: Revision, kvs: &[KeyValue]) -> Changes {
    let mut whole = HashMap::with_capacity(kvs.len());
    let mut keys = Vec::new();
    for kv in kvs {
        let key = match index.get_key_value(&kv.key) {
            Some((key, at)) if *at == kv.mod_revision => key.clone(),
            _ => {
                let kv = own(kv);
                let key = kv.key.clone();
                keys.push((key.clone(), Some(kv)));
                key
            }
        };
        whole.insert(key, kv.mod_revision);
    }
    keys.extend(index.keys().filter(|key| !whole.contains_key(*key)).map(|key| (key.clone(), None)));
    Changes { revision, keys, whole: Some(whole) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::WatchBatch;
    use crate::types::{Event, LeaseId, Space};

    fn kv(key: &'static str, at: i64) -> KeyValue {
        KeyValue {
            key: key.into(),
            create_revision: Revision(1),
            mod_revision: Revision(at),
            version: 1,
            lease: LeaseId(0),
            value: format!("{key}@{at}").into(),
        }
    }

    fn snapshot(revision: i64, kvs: Vec<KeyValue>) -> MirrorUpdate {
        MirrorUpdate::Snapshot { revision: Revision(revision), kvs }
    }

    fn changes(revision: i64, events: Vec<(EventKind, KeyValue)>) -> MirrorUpdate {
        let event = |(kind, kv)| Event { space: Space::User, kind, kv, prev: None };
        let events = events.into_iter().map(event).collect();
        MirrorUpdate::Changes(WatchBatch { revision: Revision(revision), events })
    }

    fn apply(scope: &Scope, update: MirrorUpdate) -> usize {
        let Some(mut changes) = scope.plan(&update) else { return 0 };
        scope.publish(&mut changes);
        scope.settle();
        changes.keys.len()
    }

    fn scope() -> Scope {
        Scope::new("a/".into(), StoredScope::default(), Moment::MIN)
    }

    fn found(scope: &Scope, key: &str) -> Found {
        scope.find(key.as_bytes()).found
    }

    #[test]
    fn it_knows_absence_only_when_it_is_whole() {
        let scope = scope();
        assert_eq!(found(&scope, "a/x"), Found::Unknown);
        apply(&scope, snapshot(5, vec![kv("a/y", 3)]));
        assert_eq!(found(&scope, "a/x"), Found::Absent);
        assert_eq!(found(&scope, "a/y"), Found::At(Revision(3)));
    }

    #[test]
    fn a_fresh_snapshot_changes_what_differs_and_removes_what_is_gone() {
        let scope = scope();
        apply(&scope, snapshot(5, vec![kv("a/same", 3), kv("a/gone", 4), kv("a/set", 5)]));
        assert_eq!(apply(&scope, snapshot(9, vec![kv("a/same", 3), kv("a/set", 8), kv("a/new", 9)])), 3);
        assert_eq!(found(&scope, "a/gone"), Found::Absent);
        assert_eq!(found(&scope, "a/set"), Found::At(Revision(8)));
        assert_eq!(scope.revision(), Revision(9));
    }

    #[test]
    fn it_never_goes_back() {
        let scope = scope();
        apply(&scope, snapshot(9, vec![kv("a/x", 8)]));
        assert_eq!(apply(&scope, snapshot(7, vec![])), 0, "a member that is behind");
        assert_eq!(apply(&scope, changes(8, vec![(EventKind::Delete, kv("a/x", 8))])), 0, "a repeat");
        assert_eq!(found(&scope, "a/x"), Found::At(Revision(8)));
        assert_eq!(scope.revision(), Revision(9));
    }

    #[test]
    fn what_the_cluster_said_counts_until_the_watch_is_there() {
        let scope = scope();
        apply(&scope, snapshot(5, vec![kv("a/x", 5), kv("a/y", 4)]));
        let kept = scope.learn(&"a/y".into(), Some(&kv("a/y", 4)), Revision(8));
        assert_eq!(kept, Learned::Keep, "the value of the index");
        assert_eq!(scope.learn(&"a/x".into(), Some(&kv("a/x", 7)), Revision(8)), Learned::Done);
        assert_eq!(scope.learn(&"a/x".into(), Some(&kv("a/x", 6)), Revision(6)), Learned::Done);
        assert_eq!(found(&scope, "a/x"), Found::Here(Some(kv("a/x", 7))));
        apply(&scope, changes(6, vec![(EventKind::Put, kv("a/x", 6))]));
        assert_eq!(found(&scope, "a/x"), Found::Here(Some(kv("a/x", 7))), "not back to 6");
        apply(&scope, changes(8, vec![(EventKind::Put, kv("a/x", 7))]));
        assert_eq!(found(&scope, "a/x"), Found::At(Revision(7)));
        scope.learn(&"a/x".into(), None, Revision(8));
        assert_eq!(found(&scope, "a/x"), Found::At(Revision(7)), "an answer that is not newer");
        scope.learn(&"a/x".into(), None, Revision(12));
        assert_eq!(found(&scope, "a/x"), Found::Here(None));
    }

    #[test]
    fn more_than_it_can_remember_closes_it_until_the_watch_is_there() {
        let scope = scope();
        apply(&scope, snapshot(5, vec![kv("a/x", 5)]));
        for i in 0..=AHEAD_MAX {
            scope.learn(&format!("a/{i}").into(), Some(&kv("a/?", 7)), Revision(9));
        }
        assert_eq!(found(&scope, "a/x"), Found::Unknown);
        apply(&scope, changes(9, vec![]));
        assert_eq!(found(&scope, "a/x"), Found::At(Revision(5)));
    }

    #[test]
    fn what_was_handed_out_before_it_was_whole_is_not_taken_back() {
        let scope = scope();
        assert_eq!(scope.learn(&"a/x".into(), Some(&kv("a/x", 9)), Revision(9)), Learned::Keep);
        apply(&scope, snapshot(7, vec![kv("a/x", 5)]));
        assert_eq!(found(&scope, "a/x"), Found::Unknown);
        apply(&scope, changes(9, vec![(EventKind::Put, kv("a/x", 9))]));
        assert_eq!(found(&scope, "a/x"), Found::At(Revision(9)));
    }

    #[test]
    fn damage_is_mended_by_a_snapshot_that_is_not_newer() {
        let index = HashMap::from([("a/x".into(), Revision(0)), ("a/y".into(), Revision(4))]);
        let stored = StoredScope { index, revision: Revision(5), damaged: true, ..StoredScope::default() };
        let scope = Scope::new("a/".into(), stored, Moment::MIN);
        assert_eq!(scope.resume(), Revision(0));
        assert_eq!(found(&scope, "a/y"), Found::At(Revision(4)), "the rest is good");
        assert_eq!(apply(&scope, snapshot(5, vec![kv("a/x", 5), kv("a/y", 4)])), 1);
        assert_eq!(found(&scope, "a/x"), Found::At(Revision(5)));
        assert_eq!(scope.resume(), Revision(5));
    }

    #[test]
    fn a_proof_needs_the_watch_to_have_reached_the_revision() {
        let scope = scope();
        apply(&scope, snapshot(5, vec![]));
        assert!(scope.verified(Revision(5), 100));
        assert_eq!(scope.proved(), 100);
        assert!(!scope.verified(Revision(7), 200));
        assert!(!scope.verified(Revision(9), 300));
        assert!(!scope.verified(Revision(11), 400));
        assert_eq!((scope.proved(), scope.waits_since()), (100, Some(200)));
        apply(&scope, changes(6, vec![]));
        assert_eq!(scope.proved(), 100, "a notice from a member that is behind proves nothing");
        apply(&scope, changes(8, vec![]));
        assert_eq!((scope.proved(), scope.waits_since()), (200, Some(400)));
        apply(&scope, changes(11, vec![]));
        assert_eq!((scope.proved(), scope.waits_since()), (400, None));
    }

    #[test]
    fn values_are_at_hand_while_the_levels_take_them_in() {
        let scope = scope();
        let mut first = scope.plan(&snapshot(5, vec![kv("a/x", 5)])).unwrap();
        scope.publish(&mut first);
        assert_eq!(found(&scope, "a/x"), Found::Here(Some(kv("a/x", 5))));
        scope.settle();
        assert_eq!(found(&scope, "a/x"), Found::At(Revision(5)));
    }
}
