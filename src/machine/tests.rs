//! The state machine against a model that keeps every state it ever had, and
//! stories told by scripts.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::mvcc::{self, EventQuery, SweepProgress, View};
use crate::storage::StateOptions;
use crate::types::{
    Compare, CompareOp, CompareTarget, DeleteRange, EventKind, KeyValue, Put, RangeQuery, RequestId, Txn,
    TxnOp,
};

mod scripts;

/// A machine in a directory of its own, fed entry by entry.
struct Rig {
    dir: tempfile::TempDir,
    machine: Machine,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(&StateOptions::default())
    }

    /// One that remembers hardly anything of what it wrote.
    fn forgetful() -> Rig {
        Rig::with(&StateOptions { record_cache_bytes: 600, ..StateOptions::default() })
    }

    fn with(options: &StateOptions) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine::open(StateDb::open(dir.path(), options).unwrap()).unwrap();
        Rig { dir, machine }
    }

    fn apply(&mut self, commands: Vec<Command>) -> Vec<Reply> {
        let applied = self.machine.applied().index;
        let entries = commands.into_iter().zip(applied + 1..).map(|(command, index)| Entry {
            position: LogPosition { term: 1, node: 1, index },
            time_ms: index,
            payload: Payload::Command(codec::encode(&command).into()),
        });
        self.machine.apply(entries.collect()).unwrap()
    }

    fn one(&mut self, operation: Operation) -> Reply {
        self.apply(vec![Command::internal(operation)]).remove(0)
    }

    /// Sweeps to the mark, so many changes at a time.
    fn sweep(&self, changes_max: usize, walked: &mut mvcc::Walked) {
        let mark = self.view().compacted_user;
        let mut step = || mvcc::sweep(self.machine.db(), Space::User, mark, changes_max, walked).unwrap();
        while step() == SweepProgress::More {}
    }

    fn view(&self) -> Arc<View> {
        self.machine.published().view()
    }

    fn range(&self, query: &RangeQuery) -> Result<Vec<KeyValue>, ReadError> {
        let view = self.view();
        let reply = mvcc::range(&view.data, view.marks(query.space), query, 1 << 20)?;
        let short = mvcc::range_if_short(&view.data, view.marks(query.space), query, 1 << 20)?;
        assert!(short.is_none_or(|short| short == reply), "{query:?}");
        Ok(reply.kvs)
    }

    fn hash(&self, revision: Revision) -> u32 {
        let view = self.view();
        mvcc::hash_kv(&view.data, view.marks(Space::User), Space::User, revision).unwrap().hash
    }

    /// Closes and opens the machine again, flushed.
    fn reopen(self) -> Rig {
        let Rig { dir, machine } = self;
        machine.db().flush().unwrap();
        drop(machine);
        let machine = Machine::open(StateDb::open(dir.path(), &StateOptions::default()).unwrap()).unwrap();
        Rig { dir, machine }
    }
}

fn put(key: &str, value: &str, lease: i64) -> Put {
    Put {
        space: Space::User,
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        lease: LeaseId(lease),
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    }
}

fn single(key: &str) -> KeyRange {
    KeyRange::Single(Bytes::copy_from_slice(key.as_bytes()))
}

fn user(range: KeyRange) -> RangeQuery {
    RangeQuery::all(Space::User, range)
}

#[test]
fn only_a_short_range_is_read_where_it_was_asked() {
    let mut rig = Rig::new();
    rig.apply(
        (0..600).map(|n| Command::internal(Operation::Put(put(&format!("k{n:03}"), "v", 0)))).collect(),
    );
    rig.one(Operation::Put(put("large", &"v".repeat(300 << 10), 0)));
    let view = rig.view();
    let keys = |query: &RangeQuery| {
        let reply = mvcc::range_if_short(&view.data, view.marks(Space::User), query, 1 << 20).unwrap();
        reply.map(|reply| reply.kvs.len())
    };
    let prefix = |prefix: &'static str| user(KeyRange::prefix(prefix.into()));
    assert_eq!(keys(&prefix("k1")), Some(100));
    assert_eq!(keys(&prefix("k")), None, "too many keys");
    assert_eq!(keys(&RangeQuery { count_only: true, ..prefix("k") }), None, "counting them is a walk, too");
    assert_eq!(keys(&prefix("l")), None, "too many bytes");
    assert_eq!(keys(&user(single("large"))), Some(1), "one key is one key");
    assert_eq!(keys(&RangeQuery { revision: Revision(50), ..prefix("k") }), None, "the past takes seeking");
    assert_eq!(keys(&RangeQuery { revision: Revision(50), ..user(single("k001")) }), Some(1));
}

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    Put { key: u8, value: u8, lease: i64 },
    Delete { from: u8, to: u8 },
    PutIfAbsent { key: u8, value: u8 },
    PutTwo { a: u8, b: u8, value: u8 },
    Grant { id: i64 },
    Revoke { id: i64 },
    Compact { back: i64 },
}

fn step() -> impl Strategy<Value = Step> {
    let key = || 0u8..6;
    prop_oneof![
        6 => (key(), any::<u8>(), 0i64..3).prop_map(|(key, value, lease)| Step::Put { key, value, lease }),
        2 => (key(), key()).prop_map(|(from, to)| Step::Delete { from, to }),
        2 => (key(), any::<u8>()).prop_map(|(key, value)| Step::PutIfAbsent { key, value }),
        1 => (key(), key(), any::<u8>()).prop_map(|(a, b, value)| Step::PutTwo { a, b, value }),
        1 => (1i64..3).prop_map(|id| Step::Grant { id }),
        1 => (1i64..3).prop_map(|id| Step::Revoke { id }),
        1 => (0i64..8).prop_map(|back| Step::Compact { back }),
    ]
}

fn name(key: u8) -> String {
    // Zero bytes and prefixes of each other, the hard cases of key order.
    ["a", "a\0", "a\0\0", "ab", "b", "b\u{1}"][key as usize].to_owned()
}

/// Every state the store ever had, by revision.
struct Model {
    states: Vec<BTreeMap<Vec<u8>, KeyValue>>,
    compacted: i64,
    leases: Vec<i64>,
}

impl Model {
    fn new() -> Model {
        // No state 0; state 1 is empty.
        Model { states: vec![BTreeMap::new(), BTreeMap::new()], compacted: 0, leases: Vec::new() }
    }

    fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    fn command(&self, step: &Step) -> Operation {
        match step {
            Step::Put { key, value, lease } => Operation::Put(put(&name(*key), &value.to_string(), *lease)),
            Step::Delete { from, to } => {
                let (start, end) = (name(*from).into_bytes().into(), name(*to).into_bytes().into());
                Operation::DeleteRange(DeleteRange {
                    space: Space::User,
                    range: KeyRange::Span { start, end },
                    prev_kv: true,
                })
            }
            Step::PutIfAbsent { key, value } => Operation::Txn(Txn {
                compare: vec![Compare {
                    space: Space::User,
                    range: single(&name(*key)),
                    op: CompareOp::Equal,
                    target: CompareTarget::Version(0),
                }],
                success: vec![TxnOp::Put(put(&name(*key), &value.to_string(), 0))],
                failure: vec![TxnOp::Range(user(single(&name(*key))))],
            }),
            Step::PutTwo { a, b, value } => {
                let mut success = vec![TxnOp::Put(put(&name(*a), &value.to_string(), 0))];
                if a != b {
                    success.push(TxnOp::Put(put(&name(*b), &value.to_string(), 0)));
                }
                success.push(TxnOp::Range(user(KeyRange::From(Bytes::from_static(b"\0")))));
                Operation::Txn(Txn { compare: Vec::new(), success, failure: Vec::new() })
            }
            Step::Grant { id } => Operation::LeaseGrant { id: LeaseId(*id), ttl_s: 10 },
            Step::Revoke { id } => Operation::LeaseRevoke { id: LeaseId(*id) },
            Step::Compact { back } => {
                Operation::Compact { space: Space::User, revision: Revision(self.revision() - back) }
            }
        }
    }

    fn step(&mut self, step: &Step) {
        let next = Revision(self.revision() + 1);
        let mut state = self.states.last().unwrap().clone();
        let before = state.clone();
        let mut set = |key: u8, value: u8, lease: i64| {
            let key = name(key).into_bytes();
            let old = state.get(&key);
            let kv = KeyValue {
                key: key.clone().into(),
                create_revision: old.map_or(next, |old| old.create_revision),
                mod_revision: next,
                version: old.map_or(1, |old| old.version + 1),
                lease: LeaseId(lease),
                value: value.to_string().into_bytes().into(),
            };
            state.insert(key, kv);
        };
        match step {
            Step::Put { key, value, lease } if *lease == 0 || self.leases.contains(lease) => {
                set(*key, *value, *lease);
            }
            Step::Put { .. } => {}
            Step::Delete { from, to } => {
                let (from, to) = (name(*from).into_bytes(), name(*to).into_bytes());
                state.retain(|key, _| !(from <= *key && *key < to));
            }
            Step::PutIfAbsent { key, value } => {
                if !before.contains_key(&name(*key).into_bytes()) {
                    set(*key, *value, 0);
                }
            }
            Step::PutTwo { a, b, value } => {
                set(*a, *value, 0);
                if a != b {
                    set(*b, *value, 0);
                }
            }
            Step::Grant { id } => {
                if !self.leases.contains(id) {
                    self.leases.push(*id);
                }
            }
            Step::Revoke { id } => {
                if self.leases.contains(id) {
                    self.leases.retain(|lease| lease != id);
                    state.retain(|_, kv| kv.lease.0 != *id);
                }
            }
            Step::Compact { back } => {
                let mark = self.revision() - back;
                if mark > self.compacted {
                    self.compacted = mark;
                }
            }
        }
        if state != before {
            self.states.push(state);
        }
    }

    /// What a watcher from `from` on must see: key, kind and value before, by revision.
    fn events(&self, from: i64) -> Vec<(i64, Vec<u8>, EventKind)> {
        let mut events = Vec::new();
        for revision in from.max(2)..=self.revision() {
            let (before, after) = (&self.states[revision as usize - 1], &self.states[revision as usize]);
            let keys = before.keys().chain(after.keys()).collect::<std::collections::BTreeSet<_>>();
            for key in keys {
                match (before.get(key), after.get(key)) {
                    (Some(_), None) => events.push((revision, key.clone(), EventKind::Delete)),
                    (before, Some(after)) if before != Some(after) => {
                        events.push((revision, key.clone(), EventKind::Put));
                    }
                    _ => {}
                }
            }
        }
        events
    }
}

fn check(rig: &Rig, model: &Model) {
    let view = rig.view();
    assert_eq!(view.revision.0, model.revision());
    for revision in 1..=model.revision() {
        let query =
            RangeQuery { revision: Revision(revision), ..user(KeyRange::From(Bytes::from_static(b"\0"))) };
        let found = rig.range(&query);
        if revision < model.compacted {
            assert!(matches!(found, Err(ReadError::Refused(ApplyError::Compacted))), "{revision}: {found:?}");
            continue;
        }
        let expected: Vec<_> = model.states[revision as usize].values().cloned().collect();
        assert_eq!(found.unwrap(), expected, "at revision {revision}");
        check_events(&view, model, revision);
    }
}

fn check_events(view: &View, model: &Model, from: i64) {
    let all = KeyRange::From(Bytes::from_static(b"\0"));
    for range in [all, single("a"), single("b")] {
        let mut seen = Vec::new();
        let mut next = Revision(from);
        while next <= view.revision {
            let query = EventQuery {
                space: Space::User,
                range: &range,
                from: next,
                to: view.revision,
                prev: true,
                budget_bytes: 1,
                budget_changes: 3,
            };
            let (found, on) = mvcc::events(&view.data, view.marks(Space::User), &query).unwrap();
            assert!(on > next, "no progress from {next}");
            next = on;
            for event in found.iter().flat_map(|revision| &revision.events) {
                let at = event.kv.mod_revision.0;
                if at > model.compacted {
                    let before = model.states[at as usize - 1].get(&event.kv.key[..]);
                    assert_eq!(event.prev.as_ref(), before, "prev at {at}");
                }
                seen.push((at, event.kv.key.to_vec(), event.kind));
            }
        }
        let mut expected = model.events(from);
        expected.retain(|(_, key, _)| range.contains(key));
        seen.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        assert_eq!(seen, expected, "events from {from} of {range:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Reads, events, history and hash agree with the model, whatever the
    /// chunks, the sweeps and the restarts.
    #[test]
    fn every_revision_reads_as_the_model_says(
        steps in proptest::collection::vec(step(), 1..60),
        chunk in 1usize..9, sweep_every in 1usize..20, reopen_at in 0usize..60,
    ) {
        let mut model = Model::new();
        let (mut rig, mut twin) = (Rig::new(), Rig::forgetful());
        let mut walked = mvcc::Walked::default();
        for (number, steps) in steps.chunks(chunk).enumerate() {
            let mut commands = Vec::new();
            for step in steps {
                // A compaction names the revision it would have by then.
                commands.push(Command::internal(model.command(step)));
                model.step(step);
            }
            for command in &commands {
                twin.apply(vec![command.clone()]);
            }
            rig.apply(commands);
            if number % sweep_every == 0 {
                rig.sweep(2, &mut walked);
                // A sweep deletes only what no reader can see, so nothing published changes.
            }
            if number == reopen_at {
                rig = rig.reopen();
            }
        }
        // A view taken after the last sweep.
        rig.one(Operation::SessionRenew { session: 0 });
        check(&rig, &model);
        prop_assert_eq!(rig.view().compacted_user.0, model.compacted);
        prop_assert_eq!(rig.hash(Revision(0)), twin.hash(Revision(0)));
        let at = Revision(model.compacted.max(1));
        prop_assert_eq!(rig.hash(at), twin.hash(at));
    }
}

/// As when a snapshot was installed in the middle of a sweep, by a leader that has swept less.
#[test]
fn what_was_walked_in_another_database_is_not_believed() {
    let rigs = [Rig::new(), Rig::new()].map(|mut rig| {
        (0..4).for_each(|n| drop(rig.one(Operation::Put(put("a", &n.to_string(), 0)))));
        let mark = rig.one(Operation::Put(put("b", "", 0))).revision;
        rig.one(Operation::Compact { space: Space::User, revision: mark }).outcome.unwrap();
        rig
    });
    let mut walked = mvcc::Walked::default();
    for rig in &rigs {
        rig.sweep(2, &mut walked);
    }
    let [swept, other] = rigs.map(|mut rig| {
        // A view of after the sweep.
        rig.one(Operation::Put(put("b", "", 0)));
        let at = rig.view().compacted_user;
        (
            rig.range(&RangeQuery { revision: at, ..user(KeyRange::From(Bytes::from_static(b"\0"))) })
                .unwrap(),
            rig.hash(at),
        )
    });
    assert_eq!(swept.0[0].value, "3");
    assert_eq!(other, swept);
}

#[test]
fn a_crash_loses_a_suffix_and_nothing_else() {
    let mut rig = Rig::new();
    rig.one(Operation::Put(put("a", "1", 0)));
    rig.machine.db().flush().unwrap();
    rig.apply((0..100).map(|n| Command::internal(Operation::Put(put("a", &n.to_string(), 0)))).collect());
    let Rig { dir, machine } = rig;
    let copy = tempfile::tempdir().unwrap();
    // What a crash leaves is what the files hold now: nothing was flushed since.
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    drop(machine);
    let after = Machine::open(StateDb::open(copy.path(), &StateOptions::default()).unwrap()).unwrap();
    assert_eq!((after.applied().index, after.published().view().revision), (1, Revision(2)));
}

/// Every third entry is one that makes no revision; stamps are the indices.
#[test]
fn a_time_finds_its_revision_also_after_compaction() {
    let mut rig = Rig::new();
    let mut stamps = Vec::new();
    for n in 0..40 {
        let operation = match n % 3 {
            0 => Operation::SessionOpen { ttl_s: 60 },
            _ => Operation::Put(put(&format!("k{}", n % 5), "v", 0)),
        };
        let revision = rig.one(operation).revision;
        if n % 3 != 0 {
            stamps.push((revision, rig.machine.applied().index));
        }
    }
    let first_from = |time: u64, above: Revision| {
        let later = stamps.iter().find(|(revision, stamp)| *stamp >= time && *revision > above);
        later.map_or(stamps[stamps.len() - 1].0.next(), |(revision, _)| *revision)
    };
    let ask = |rig: &Rig, time: u64| {
        let view = rig.view();
        mvcc::revision_at(&view.data, view.marks(Space::User), time).unwrap()
    };
    for time in 0..45 {
        let found = mvcc::RevisionAt { revision: first_from(time, Revision(0)), compacted: false };
        assert_eq!(ask(&rig, time), found, "at {time}");
    }
    for mark in [12, 13, stamps[stamps.len() - 1].0.0] {
        let mark = Revision(mark);
        rig.one(Operation::Compact { space: Space::User, revision: mark }).outcome.unwrap();
        rig.sweep(7, &mut mvcc::Walked::default());
        let marked = stamps.iter().find(|(revision, _)| *revision == mark).unwrap().1;
        let next = stamps.iter().find(|(revision, _)| *revision > mark).map_or(u64::MAX, |(_, stamp)| *stamp);
        for time in 0..45 {
            let found = ask(&rig, time);
            assert_eq!(found.revision, first_from(time, mark), "at {time}");
            // Certain where it must be, and never in doubt without need.
            assert!(found.compacted || time > marked, "{time} is at or before the mark's {marked}");
            assert!(!found.compacted || time <= next, "{time} is after {next}");
        }
    }
}

#[test]
fn a_retry_is_applied_once_also_after_a_restart() {
    let mut rig = Rig::new();
    let Ok(Outcome::Session { id }) = rig.one(Operation::SessionOpen { ttl_s: 60 }).outcome else { panic!() };
    let write = |sequence, value: &str, acknowledged| Command {
        request: Some(RequestId { session: id, sequence, acknowledged }),
        actor: None,
        operation: Operation::Put(Put { prev_kv: true, ..put("k", value, 0) }),
    };
    let first = rig.apply(vec![write(1, "a", 0), write(1, "a", 0)]);
    assert_eq!(first[0], first[1]);
    let mut rig = rig.reopen();
    assert_eq!(rig.apply(vec![write(1, "a", 0)])[0], first[0]);
    assert_eq!(rig.view().revision, Revision(2));
    let refused = |reply: &Reply| reply.outcome.clone().unwrap_err();
    let replies = rig.apply(vec![write(1, "b", 0), write(3, "c", 2), write(2, "d", 0), write(1, "a", 0)]);
    assert_eq!(refused(&replies[0]), ApplyError::SequenceReused { sequence: 1 });
    assert_eq!(replies[1].revision, Revision(3));
    assert_eq!(refused(&replies[2]), ApplyError::SequenceAcknowledged { sequence: 2 });
    assert_eq!(refused(&replies[3]), ApplyError::SequenceAcknowledged { sequence: 1 });
    rig.one(Operation::SessionExpire { term: 1, sessions: vec![(id, 1)] });
    assert_eq!(rig.apply(vec![write(4, "e", 0)])[0].revision, Revision(4), "it was renewed since");
    let renewed = rig.machine.sessions()[0].1.renewed;
    rig.one(Operation::SessionExpire { term: 1, sessions: vec![(id, renewed)] });
    assert_eq!(refused(&rig.apply(vec![write(5, "f", 0)])[0]), ApplyError::SessionNotFound { session: id });
}

#[test]
fn an_answer_that_would_be_too_large_is_refused_and_changes_nothing() {
    let mut rig = Rig::new();
    let large = "x".repeat(15 << 20);
    for key in ["a", "b"] {
        rig.one(Operation::Put(put(key, &large, 0)));
    }
    let everything = || KeyRange::from_wire(Bytes::from_static(b"a"), Bytes::from_static(b"c"));
    let read = |times: usize| {
        let mut success = vec![TxnOp::Put(put("new", "1", 0))];
        success.extend((0..times).map(|_| TxnOp::Range(user(everything()))));
        Operation::Txn(Txn { compare: Vec::new(), success, failure: Vec::new() })
    };
    let before = rig.view().revision;
    // Each of the two ranges alone is not too much.
    let reply = rig.one(read(2));
    assert!(matches!(reply.outcome, Err(ApplyError::ReplyTooLarge { .. })), "{:?}", reply.outcome);
    assert_eq!(rig.view().revision, before);
    assert_eq!(rig.range(&user(single("new"))).unwrap(), []);
    assert!(rig.one(read(1)).outcome.is_ok());

    rig.one(Operation::Put(put("b2", &large, 0)));
    let delete =
        |prev_kv| Operation::DeleteRange(DeleteRange { space: Space::User, range: everything(), prev_kv });
    let reply = rig.one(delete(true));
    assert!(matches!(reply.outcome, Err(ApplyError::ReplyTooLarge { .. })), "{:?}", reply.outcome);
    assert!(matches!(rig.one(delete(false)).outcome, Ok(Outcome::DeleteRange { deleted: 3, .. })));
}

#[test]
fn an_entry_out_of_order_stops_the_node() {
    let mut rig = Rig::new();
    rig.one(Operation::Put(put("a", "1", 0)));
    let position = LogPosition { term: 1, node: 1, index: 5 };
    let entry = Entry { position, time_ms: 0, payload: Payload::Blank };
    assert!(matches!(rig.machine.apply(vec![entry]), Err(StorageError::Corrupt { .. })));
}

#[test]
fn a_command_of_a_later_version_stops_the_node() {
    let mut rig = Rig::new();
    let position = LogPosition { term: 1, node: 1, index: 1 };
    // No request, no actor, and an operation number that does not exist.
    let unknown = codec::encode(&(0u8, 0u8, 200u8));
    let entry = Entry { position, time_ms: 0, payload: Payload::Command(unknown.into()) };
    assert!(rig.machine.apply(vec![entry]).is_err());
}
