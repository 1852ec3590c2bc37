//! What the store means, in a few lines: keys with their versions, leases'
//! keys, and what a call does to them and is answered.
//!
//! It is written from etcd's API documentation (v3 `rpc.proto`) and knows the
//! whole past, so compaction does not exist here. Executing changes nothing;
//! what came out of it is committed as events.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::history::{Action, ActionReply, Body, Call, Compare, Event, EventKind, Kv, Operand, Relation};
use super::history::{Revision, Span, Txn};

/// A store at its newest revision, with every revision before.
#[derive(Debug)]
pub struct Store {
    revision: Revision,
    /// Of each key, the revisions at which it changed, with what it became.
    keys: BTreeMap<String, Vec<(Revision, Option<Kv>)>>,
    lease_keys: BTreeMap<i64, BTreeSet<String>>,
}

/// What a call would do now.
#[derive(Debug)]
pub struct Executed {
    pub body: Body,
    /// All at the next revision; none if the call only reads.
    pub events: Vec<Event>,
}

impl Default for Store {
    /// An empty store; its revision is 1.
    fn default() -> Store {
        Store { revision: 1, keys: BTreeMap::new(), lease_keys: BTreeMap::new() }
    }
}

impl Store {
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// A key as it was at `at`.
    pub fn get_at(&self, key: &str, at: Revision) -> Option<&Kv> {
        version_at(self.keys.get(key)?, at)
    }

    pub fn get(&self, key: &str) -> Option<&Kv> {
        self.get_at(key, self.revision)
    }

    /// All keys of `span` as they were at `at`, in their order.
    pub fn range_at<'a>(&'a self, span: &Span, at: Revision) -> impl Iterator<Item = &'a Kv> + use<'a> {
        self.keys.range::<str, _>(bounds(span)).filter_map(move |(_, versions)| version_at(versions, at))
    }

    /// The keys that go with a lease.
    pub fn lease_keys(&self, lease: i64) -> impl Iterator<Item = &str> {
        self.lease_keys.get(&lease).into_iter().flatten().map(String::as_str)
    }

    /// What the call would do and answer; nothing for calls that neither read nor change keys.
    pub fn execute(&self, call: &Call) -> Option<Executed> {
        let mut work = Work { store: self, own: BTreeMap::new(), events: Vec::new() };
        let body = match call {
            Call::Single { action, .. } => Body::Single(work.act(action)),
            Call::Txn(Txn { compares, success, failure }) => {
                let succeeded = compares.iter().all(|compare| self.holds(compare));
                let actions = if succeeded { success } else { failure };
                Body::Txn { succeeded, replies: actions.iter().map(|action| work.act(action)).collect() }
            }
            Call::LeaseRevoke { id } => {
                self.lease_keys(*id).for_each(|key| work.delete(key));
                Body::LeaseRevoked
            }
            _ => return None,
        };
        Some(Executed { body, events: work.events })
    }

    /// What a range would have been answered at `at`; nothing for other calls and for the future.
    pub fn execute_at(&self, call: &Call, at: Revision) -> Option<Body> {
        let Call::Single { action: Action::Range { span, revision, limit }, .. } = call else { return None };
        if *revision > at || at > self.revision {
            return None;
        }
        let work = Work { store: self, own: BTreeMap::new(), events: Vec::new() };
        Some(Body::Single(work.range(span, if *revision == 0 { at } else { *revision }, *limit)))
    }

    /// Makes `revision` the newest, with these changes.
    pub fn commit(&mut self, revision: Revision, events: &[Event]) {
        self.revision = revision;
        for event in events {
            let new = (event.kind == EventKind::Put).then(|| event.kv.clone());
            let key = event.kv.key.as_str();
            let old_lease = self.get(key).map_or(0, |kv| kv.lease);
            let new_lease = new.as_ref().map_or(0, |kv| kv.lease);
            if old_lease != new_lease {
                if let Some(keys) = self.lease_keys.get_mut(&old_lease) {
                    keys.remove(key);
                }
                if new_lease != 0 {
                    self.lease_keys.entry(new_lease).or_default().insert(key.to_owned());
                }
            }
            match self.keys.get_mut(key) {
                Some(versions) => versions.push((revision, new)),
                None => {
                    self.keys.insert(key.to_owned(), vec![(revision, new)]);
                }
            }
        }
    }

    fn holds(&self, compare: &Compare) -> bool {
        let kv = self.get(&compare.key);
        let of = |field: fn(&Kv) -> i64| kv.map_or(0, field);
        let order = match &compare.operand {
            // A key that is not there has no value, so no comparison of it holds.
            Operand::Value(value) => match kv {
                None => return false,
                Some(kv) => kv.value.as_str().cmp(value),
            },
            Operand::Version(version) => of(|kv| kv.version).cmp(version),
            Operand::CreateRevision(revision) => of(|kv| kv.create_revision).cmp(revision),
            Operand::ModRevision(revision) => of(|kv| kv.mod_revision).cmp(revision),
            Operand::Lease(lease) => of(|kv| kv.lease).cmp(lease),
        };
        match compare.relation {
            Relation::Equal => order.is_eq(),
            Relation::NotEqual => order.is_ne(),
            Relation::Greater => order.is_gt(),
            Relation::Less => order.is_lt(),
        }
    }
}

/// A call under way: it sees what it has changed itself.
struct Work<'a> {
    store: &'a Store,
    own: BTreeMap<String, Option<Kv>>,
    events: Vec<Event>,
}

impl Work<'_> {
    fn act(&mut self, action: &Action) -> ActionReply {
        match action {
            Action::Range { span, revision, limit } => {
                if *revision == 0 {
                    limited(self.live(span), *limit)
                } else {
                    self.range(span, *revision, *limit)
                }
            }
            Action::Put { key, value, lease, prev_kv } => {
                let before = self.get(key).cloned();
                let revision = self.store.revision + 1;
                let kv = Kv {
                    key: key.clone(),
                    value: value.clone(),
                    create_revision: before.as_ref().map_or(revision, |kv| kv.create_revision),
                    mod_revision: revision,
                    version: before.as_ref().map_or(1, |kv| kv.version + 1),
                    lease: *lease,
                };
                self.own.insert(key.clone(), Some(kv.clone()));
                self.events.push(Event { kind: EventKind::Put, kv, prev: before.clone() });
                ActionReply::Put { prev: before.filter(|_| *prev_kv) }
            }
            Action::Delete { span, prev_kv } => {
                let gone: Vec<Kv> = self.live(span).into_iter().map(Cow::into_owned).collect();
                gone.iter().for_each(|kv| self.delete(&kv.key));
                let deleted = gone.len() as i64;
                ActionReply::Delete { deleted, prev: if *prev_kv { gone } else { Vec::new() } }
            }
        }
    }

    /// A range of the past.
    fn range(&self, span: &Span, at: Revision, limit: i64) -> ActionReply {
        limited(past(self.store, span, at), limit)
    }

    fn delete(&mut self, key: &str) {
        let prev = self.get(key).cloned();
        let kv = Kv { key: key.to_owned(), mod_revision: self.store.revision + 1, ..Kv::default() };
        self.own.insert(key.to_owned(), None);
        self.events.push(Event { kind: EventKind::Delete, kv, prev });
    }

    fn get(&self, key: &str) -> Option<&Kv> {
        self.own.get(key).map_or_else(|| self.store.get(key), Option::as_ref)
    }

    fn live(&self, span: &Span) -> Vec<Cow<'_, Kv>> {
        let stored = past(self.store, span, self.store.revision);
        if self.own.is_empty() {
            return stored;
        }
        let mut all: BTreeMap<&str, Cow<'_, Kv>> = BTreeMap::new();
        for kv in self.store.range_at(span, self.store.revision) {
            all.insert(&kv.key, Cow::Borrowed(kv));
        }
        for (key, kv) in self.own.range::<str, _>(bounds(span)) {
            match kv {
                Some(kv) => all.insert(key, Cow::Borrowed(kv)),
                None => all.remove(key.as_str()),
            };
        }
        all.into_values().collect()
    }
}

fn limited(found: Vec<Cow<'_, Kv>>, limit: i64) -> ActionReply {
    let count = found.len();
    let kept = if limit == 0 { count } else { count.min(limit as usize) };
    let kvs = found.into_iter().take(kept).map(Cow::into_owned).collect();
    ActionReply::Range { kvs, count: count as i64, more: kept < count }
}

fn past<'a>(store: &'a Store, span: &Span, at: Revision) -> Vec<Cow<'a, Kv>> {
    store.range_at(span, at).map(Cow::Borrowed).collect()
}

fn version_at(versions: &[(Revision, Option<Kv>)], at: Revision) -> Option<&Kv> {
    let after = versions.partition_point(|(revision, _)| *revision <= at);
    versions[..after].last()?.1.as_ref()
}

fn bounds(span: &Span) -> (Bound<&str>, Bound<&str>) {
    let from = span.key.as_str();
    match span.end.as_deref() {
        None => (Bound::Included(from), Bound::Included(from)),
        Some("\0") => (Bound::Included(from), Bound::Unbounded),
        // A range that ends before it begins holds nothing, and must not make the map panic.
        Some(end) => (Bound::Included(from), Bound::Excluded(end.max(from))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str, lease: i64) -> Action {
        Action::Put { key: key.into(), value: value.into(), lease, prev_kv: true }
    }

    fn range(span: Span, revision: Revision, limit: i64) -> Action {
        Action::Range { span, revision, limit }
    }

    fn delete(span: Span) -> Action {
        Action::Delete { span, prev_kv: true }
    }

    fn txn(compares: Vec<Compare>, success: Vec<Action>) -> Call {
        Call::Txn(Txn { compares, success, failure: vec![] })
    }

    /// Does a call, and says what it was answered.
    fn done(store: &mut Store, call: &Call) -> Body {
        let done = store.execute(call).expect("a call on keys");
        if !done.events.is_empty() {
            store.commit(store.revision() + 1, &done.events);
        }
        done.body
    }

    fn act(store: &mut Store, action: Action) -> String {
        done(store, &Call::Single { action, serializable: false }).to_string()
    }

    #[test]
    fn a_key_counts_its_versions_from_its_creation() {
        let mut store = Store::default();
        assert_eq!(act(&mut store, put("a", "1", 0)), "put");
        assert_eq!(act(&mut store, put("a", "2", 0)), "put over a=\"1\" (mod 2, create 2, version 1)");
        let both = "[a=\"2\" (mod 3, create 2, version 2)]";
        assert_eq!(act(&mut store, range(Span::key("a"), 0, 0)), format!("{both} of 1"));
        assert_eq!(act(&mut store, delete(Span::key("a"))), format!("deleted 1 {both}"));
        assert_eq!(act(&mut store, delete(Span::key("a"))), "deleted 0 []");
        act(&mut store, put("a", "3", 0));
        let again = "[a=\"3\" (mod 5, create 5, version 1)] of 1";
        assert_eq!(act(&mut store, range(Span::key("a"), 0, 0)), again);
        assert_eq!(act(&mut store, range(Span::key("a"), 3, 0)), format!("{both} of 1"));
        assert_eq!(act(&mut store, range(Span::key("a"), 4, 0)), "[] of 0");
        assert_eq!(store.revision(), 5);
    }

    #[test]
    fn a_limited_range_counts_everything_and_says_that_there_is_more() {
        let mut store = Store::default();
        let all = ["a", "b", "c", "d"].map(|key| put(key, "", 0)).to_vec();
        done(&mut store, &txn(vec![], all));
        assert_eq!(store.revision(), 2);
        let to = |end: &str| Span { key: "b".into(), end: Some(end.into()) };
        for (span, limit, found) in [
            (to("d"), 0, "2 of 2"),
            (to("\0"), 0, "3 of 3"),
            (to("\0"), 2, "2 of 3 and more"),
            (to("a"), 0, "0 of 0"),
        ] {
            let told = act(&mut store, range(span, 0, limit));
            let (kvs, count) = told.split_once("] of ").expect("a range");
            assert_eq!(format!("{} of {count}", kvs.matches('=').count()), found);
        }
    }

    #[test]
    fn a_transaction_sees_what_it_has_done_itself_and_makes_one_revision() {
        let mut store = Store::default();
        act(&mut store, put("a", "1", 0));
        let steps = vec![put("b", "2", 0), delete(Span::key("a")), range(Span::prefix("\0"), 0, 0)];
        let all = Span { key: "a".into(), end: Some("z".into()) };
        let steps = [steps, vec![range(all, 0, 0)]].concat();
        let Body::Txn { succeeded: true, replies } = done(&mut store, &txn(vec![], steps)) else { panic!() };
        assert_eq!(replies[3].to_string(), "[b=\"2\" (mod 3, create 3, version 1)] of 1");
        assert_eq!((store.revision(), store.get("a")), (3, None));
    }

    #[test]
    fn comparisons_of_a_key_that_is_not_there_see_zeros_and_no_value() {
        let mut store = Store::default();
        act(&mut store, put("a", "1", 7));
        let holds =
            |key: &str, relation, operand| store.holds(&Compare { key: key.into(), relation, operand });
        use Relation::{Equal, Greater, Less, NotEqual};
        assert!(holds("x", Equal, Operand::Version(0)) && holds("x", Less, Operand::ModRevision(1)));
        assert!(holds("x", Equal, Operand::CreateRevision(0)) && holds("x", Equal, Operand::Lease(0)));
        for relation in [Equal, NotEqual, Greater, Less] {
            assert!(!holds("x", relation, Operand::Value("1".into())));
        }
        assert!(
            holds("a", Equal, Operand::Value("1".into())) && holds("a", Greater, Operand::Value("0".into()))
        );
        assert!(holds("a", Equal, Operand::Lease(7)) && holds("a", NotEqual, Operand::Version(2)));
    }

    #[test]
    fn a_lease_takes_the_keys_that_are_on_it_now() {
        let mut store = Store::default();
        for (key, lease) in [("a", 7), ("b", 7), ("c", 8), ("a", 8), ("d", 7)] {
            act(&mut store, put(key, "", lease));
        }
        act(&mut store, delete(Span::key("d")));
        assert_eq!(store.lease_keys(7).collect::<Vec<_>>(), ["b"]);
        done(&mut store, &Call::LeaseRevoke { id: 8 });
        let left = act(&mut store, range(Span { key: "a".into(), end: Some("\0".into()) }, 0, 0));
        assert_eq!(left, "[b=\"\" (mod 3, create 3, version 1, lease 7)] of 1");
        assert_eq!((store.revision(), store.lease_keys(8).count()), (8, 0));
        done(&mut store, &Call::LeaseRevoke { id: 8 });
        assert_eq!(store.revision(), 8, "nothing was left to change");
    }
}
