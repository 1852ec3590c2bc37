//! One order of revisions explains every answer, over the whole database: the
//! store is strictly serializable, and its revisions are that order (etcd, "KV
//! API guarantees"; the check is after etcd's robustness tests).
//!
//! Four claims. Writes have revisions of their own. Revisions keep to the order
//! of time. A replay in their order reproduces every answer. Every revision was
//! made by a call, or by a lease that ran out: calls without an answer are found
//! by what they wrote in the watch of everything, and are nowhere otherwise.
//! Times are never taken from watches, which may be late. The replay follows
//! what was watched, so that one lie is not reported again at each later answer.

use std::collections::{BTreeMap, BTreeSet};

use super::attribution::{self, Candidate, Candidates};
use super::calls::{self, Done};
use super::describe;
use super::event_log::{self, EventLog};
use super::history::{Action, ActionReply, Body, Call, Event, EventKind, History, Outcome, Revision};
use super::model::Store;
use super::verdict::Verdict;

const UNIQUE: &str = "every write has a revision of its own";
const TIME: &str = "revisions keep to the order of time";
const REPLAY: &str = "a replay in the order of revisions reproduces every answer";
const MADE: &str = "every revision was made by a call or by a lease that ran out";

/// Who made a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// The call at this place of the history; of several attempts the one that was answered first, with
    /// the invocation of the first of all.
    Call {
        index: usize,
        invoked_ns: u64,
    },
    /// The end of this lease.
    Expiry(i64),
    Nobody,
}

impl Maker {
    fn by(call: &Done<'_>) -> Maker {
        Maker::Call { index: call.index, invoked_ns: call.invoked_ns }
    }
}

/// The order, with what contradicts it.
#[derive(Debug, Default)]
pub struct Order {
    pub log: EventLog,
    pub store: Store,
    pub makers: BTreeMap<Revision, Maker>,
    writes: usize,
    timed: usize,
    replayed: usize,
    unique: Vec<String>,
    time: Vec<String>,
    replay: Vec<String>,
    made: Vec<String>,
    /// The first answer from beyond what was watched.
    beyond: Option<String>,
}

/// Judges all calls of all workloads against the [`FULL_HISTORY`](super::history::FULL_HISTORY) watch. Whoever
/// changes the store must record the call, whatever its workload.
pub fn check(history: &History) -> Vec<Verdict> {
    let order = resolve(history);
    let beyond = order.beyond.clone().or_else(|| {
        (order.log.reached <= 1 && order.writes > 0)
            .then(|| "the watch of everything is not in the history".into())
    });
    vec![
        Verdict::from_findings(UNIQUE, order.writes, describe::some(order.unique)),
        Verdict::from_findings(TIME, order.timed, describe::some(order.time)),
        Verdict::unless(REPLAY, order.replayed, describe::some(order.replay), beyond.clone()),
        Verdict::unless(MADE, order.makers.len(), describe::some(order.made), beyond),
    ]
}

/// Finds the order of a history.
pub fn resolve(history: &History) -> Order {
    let calls = calls::done(history);
    let mut order = Order { log: EventLog::of(history), ..Order::default() };
    order.made.append(&mut order.log.contradictions.clone());
    let bounds = Bounds::of(&calls);
    order.keep_time(history, &calls, &bounds);
    let mut claims: BTreeMap<Revision, Vec<usize>> = BTreeMap::new();
    let mut reads: BTreeMap<Revision, Vec<usize>> = BTreeMap::new();
    let mut candidates = Candidates::default();
    for (place, call) in calls.iter().enumerate() {
        match (call.revision(), call.body()) {
            (Some(revision), Some(body)) if changed(body) => claims.entry(revision).or_default().push(place),
            (Some(revision), Some(Body::Single(_) | Body::Txn { .. } | Body::LeaseRevoked))
                if linearizable(call) =>
            {
                reads.entry(revision).or_default().push(place);
                candidates.take(call, place, bounds.before(call.invoked_ns).0);
            }
            _ => candidates.take(call, place, bounds.before(call.invoked_ns).0),
        }
    }
    let mut replay = Replay { history, calls: &calls, candidates, open: Vec::new(), order };
    replay.run(&claims, &reads);
    replay.attribute()
}

/// Whether an answer says that the call changed something.
pub fn changed(body: &Body) -> bool {
    let one = |reply: &ActionReply| match reply {
        ActionReply::Put { .. } => true,
        ActionReply::Delete { deleted, .. } => *deleted > 0,
        ActionReply::Range { .. } => false,
    };
    match body {
        Body::Single(reply) => one(reply),
        Body::Txn { replies, .. } => replies.iter().any(one),
        _ => false,
    }
}

fn linearizable(call: &Done<'_>) -> bool {
    !matches!(call.op.call, Call::Single { serializable: true, .. })
}

/// Which revisions were known when.
struct Bounds {
    /// Times of answers in their order, with the highest revision of any answer until then and who had it.
    known: Vec<(u64, Revision, usize)>,
}

impl Bounds {
    fn of(calls: &[Done<'_>]) -> Bounds {
        let mut known: Vec<(u64, Revision, usize)> = Vec::with_capacity(calls.len());
        for call in calls {
            let (Some(at), Some(reply)) = (call.returned_ns, call.reply()) else { continue };
            // A member's answer about itself is no answer of the store.
            if !matches!(reply.body, Body::HashKv { .. } | Body::Members { .. } | Body::Compact) {
                known.push((at, reply.revision, call.index));
            }
        }
        known.sort_unstable();
        let mut highest = (0, 0);
        for (_, revision, index) in &mut known {
            highest = highest.max((*revision, *index));
            (*revision, *index) = highest;
        }
        Bounds { known }
    }

    /// The highest revision that was answered before `at`, and by which call.
    fn before(&self, at: u64) -> (Revision, usize) {
        let after = self.known.partition_point(|(time, ..)| *time < at);
        after.checked_sub(1).map_or((0, 0), |last| (self.known[last].1, self.known[last].2))
    }
}

impl Order {
    fn keep_time(&mut self, history: &History, calls: &[Done<'_>], bounds: &Bounds) {
        for call in calls.iter().filter(|call| linearizable(call)) {
            let (Some(revision), Some(body)) = (call.revision(), call.body()) else { continue };
            if !matches!(body, Body::Single(_) | Body::Txn { .. } | Body::LeaseRevoked) {
                continue;
            }
            self.timed += 1;
            let (known, by) = bounds.before(call.invoked_ns);
            let is_late = if changed(body) { revision <= known } else { revision < known };
            if is_late {
                let (call, by) = (describe::call(history, call.index), describe::call(history, by));
                self.time.push(format!("{call} began after revision {known} had been answered to {by}"));
            }
        }
    }
}

/// A replay under way.
struct Replay<'a> {
    history: &'a History,
    calls: &'a [Done<'a>],
    candidates: Candidates<'a>,
    /// Revisions that no answer claims, with who may have made them.
    open: Vec<Open>,
    order: Order,
}

struct Open {
    revision: Revision,
    candidates: Vec<usize>,
    /// The lease whose keys are exactly those deleted.
    lease: Option<i64>,
    /// A call that did this, but began too late for it.
    late: Option<usize>,
}

impl Replay<'_> {
    fn run(&mut self, claims: &BTreeMap<Revision, Vec<usize>>, reads: &BTreeMap<Revision, Vec<usize>>) {
        let revisions: BTreeSet<Revision> =
            claims.keys().chain(reads.keys()).chain(self.order.log.revisions.keys()).copied().collect();
        let nobody = Vec::new();
        for revision in revisions {
            let claimed = claims.get(&revision).unwrap_or(&nobody);
            self.write(revision, claimed);
            for place in reads.get(&revision).unwrap_or(&nobody) {
                self.read(revision, &self.calls[*place]);
            }
        }
        let (last, reached) = (self.order.store.revision(), self.order.log.reached);
        if reached > last {
            let what =
                format!("revisions {} to {reached} are missing: nobody was told of a change", last + 1);
            self.order.made.push(what);
        }
    }

    /// Brings the store to `revision`.
    fn write(&mut self, revision: Revision, claimed: &[usize]) {
        let told = self.order.log.revisions.get(&revision).cloned();
        if told.is_none() && claimed.is_empty() {
            return;
        }
        self.order.writes += claimed.len();
        let expected = self.order.store.revision() + 1;
        if revision != expected {
            let last = revision - 1;
            self.order
                .made
                .push(format!("revisions {expected} to {last} are missing: nobody was told of a change"));
            // Versions and comparisons do not depend on the number, except that it is the next.
            self.order.store.commit(last, &[]);
        }
        if let [one, other, ..] = claimed {
            let [one, other] =
                [one, other].map(|place| describe::call(self.history, self.calls[*place].index));
            self.order.unique.push(format!("revision {revision} was given to {one} and to {other}"));
        }
        let Some(first) = claimed.first().map(|place| &self.calls[*place]) else {
            let told = told.expect("a revision that nobody claims was told");
            self.unclaimed(revision, &told);
            self.order.store.commit(revision, &told);
            return;
        };
        self.order.makers.insert(revision, Maker::by(first));
        let done = self.order.store.execute(&first.op.call).expect("only calls that touch keys change them");
        self.answer(first, &done.body);
        match &told {
            Some(told) if event_log::same(told, &done.events) => {}
            Some(told) => self.order.replay.push(format!(
                "revision {revision} was told as {}, but is {}",
                describe::events(told),
                describe::call(self.history, first.index)
            )),
            None if revision > self.order.log.reached => self.beyond(first),
            None => self.order.made.push(format!(
                "revision {revision} was never told, but is {}",
                describe::call(self.history, first.index)
            )),
        }
        self.order.store.commit(revision, told.as_deref().unwrap_or(&done.events));
    }

    fn read(&mut self, revision: Revision, call: &Done<'_>) {
        if revision > self.order.log.reached {
            return self.beyond(call);
        }
        if let Call::Single { action: Action::Range { revision: asked, .. }, .. } = &call.op.call
            && *asked > revision
        {
            let call = describe::call(self.history, call.index);
            return self.order.replay.push(format!("a revision of the future was read: {call}"));
        }
        if let Call::LeaseRevoke { id } = call.op.call {
            self.order.replayed += 1;
            if let Some(key) = self.order.store.lease_keys(id).next() {
                let call = describe::call(self.history, call.index);
                self.order.replay.push(format!("{key} outlived its lease: {call}"));
            }
            return;
        }
        let done = self.order.store.execute(&call.op.call).expect("reads touch keys");
        self.answer(call, &done.body);
    }

    fn answer(&mut self, call: &Done<'_>, expected: &Body) {
        self.order.replayed += 1;
        if call.body() != Some(expected) {
            let call = describe::call(self.history, call.index);
            self.order
                .replay
                .push(format!("the answer should be {}: {call}", describe::short(expected.to_string())));
        }
    }

    fn beyond(&mut self, call: &Done<'_>) {
        let reached = self.order.log.reached;
        self.order.beyond.get_or_insert_with(|| {
            format!(
                "the watch of everything only reached revision {reached}, before {}",
                describe::call(self.history, call.index)
            )
        });
    }

    /// Notes who may have made a revision that no answer claims.
    fn unclaimed(&mut self, revision: Revision, told: &[Event]) {
        let store = &self.order.store;
        let (mut candidates, lease) = (self.candidates.likely(store, told), expired(store, told));
        let explains = |number: &usize| {
            let candidate = self.candidates.get(*number);
            candidate.explains(&self.calls[candidate.place], store, told)
        };
        let in_time = |number: &usize| {
            let candidate = self.candidates.get(*number);
            candidate.after < revision && revision <= candidate.until
        };
        let others: Vec<usize> = candidates.extract_if(.., |number| !in_time(number)).collect();
        candidates.retain(explains);
        let is_explained = lease.is_some() || !candidates.is_empty();
        let late = others.into_iter().find(|number| !is_explained && explains(number));
        let late = late.map(|number| self.calls[self.candidates.get(number).place].index);
        let open = Open { revision, candidates, lease, late };
        self.open.push(open);
    }

    /// Gives each open revision a maker of its own, as far as there are enough.
    fn attribute(mut self) -> Order {
        // Revisions that only a call can have made choose before those that a lease's end explains, too.
        self.open.sort_by_key(|open| open.lease.is_some());
        let choices: Vec<&[usize]> = self.open.iter().map(|open| &open.candidates[..]).collect();
        let must: Vec<usize> =
            (0..self.candidates.len()).filter(|number| self.candidates.get(*number).must).collect();
        let chosen = attribution::assign(&choices, self.candidates.len(), &must);
        let mut used = vec![false; self.candidates.len()];
        for (open, choice) in self.open.iter().zip(chosen) {
            let maker = match (choice, open.lease) {
                (Some(number), _) => {
                    used[number] = true;
                    Maker::by(&self.calls[self.candidates.get(number).place])
                }
                (None, Some(lease)) => Maker::Expiry(lease),
                (None, None) => Maker::Nobody,
            };
            if maker == Maker::Nobody {
                let finding = self.nobody(open);
                self.order.made.push(finding);
            }
            self.order.makers.insert(open.revision, maker);
        }
        let lost = self.candidates.all().zip(&used).filter(|(candidate, used)| candidate.must && !**used);
        for (Candidate { place, .. }, _) in lost {
            let call = describe::call(self.history, self.calls[*place].index);
            self.order.made.push(format!("no revision is that of {call}"));
        }
        self.order
    }

    fn nobody(&self, open: &Open) -> String {
        let events = &self.order.log.revisions[&open.revision];
        let told = format!("revision {} was made by nobody: {}", open.revision, describe::events(events));
        let wrote = |call: &Call| {
            let puts = attribution::puts(call);
            puts.iter().any(|put| events.iter().any(|e| e.kv.key == put.0 && e.kv.value == put.1))
        };
        let failed = || {
            self.history.ops.iter().position(|op| matches!(op.outcome, Outcome::Failed(_)) && wrote(&op.call))
        };
        let again = || self.calls.iter().find(|call| wrote(&call.op.call)).map(|call| call.index);
        match (open.late, failed(), again()) {
            (Some(late), ..) => {
                format!("{told}; it fits only {}, which had not begun", describe::call(self.history, late))
            }
            (_, Some(failed), _) => {
                format!("{told}; yet it failed for {}", describe::call(self.history, failed))
            }
            (_, _, Some(again)) => {
                format!("{told}; it may be a repetition of {}", describe::call(self.history, again))
            }
            (None, None, None) => told,
        }
    }
}

/// The lease whose keys, all of them, these events delete.
fn expired(store: &Store, told: &[Event]) -> Option<i64> {
    let lease = store.get(&told.first()?.kv.key)?.lease;
    let gone: BTreeSet<&str> = told.iter().map(|event| event.kv.key.as_str()).collect();
    let all_gone =
        told.iter().all(|event| event.kind == EventKind::Delete) && store.lease_keys(lease).eq(gone);
    (lease != 0 && all_gone).then_some(lease)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Op, Reply, Span, WatchBody};
    use crate::judge::random::Random;
    use crate::judge::simulator::{Script, cas, delete, get, mixed, put, put_leased};
    use crate::judge::verdict::Held;

    fn broken(history: &History) -> Vec<&'static str> {
        check(history).iter().filter(|verdict| !verdict.held()).map(|verdict| verdict.claim).collect()
    }

    fn reply(op: &mut Op) -> &mut Reply {
        let Outcome::Ok(reply) = &mut op.outcome else { panic!("an answered call") };
        reply
    }

    /// Puts, a failed and a successful comparison, a read, a lease's end: what every case below begins with.
    fn script() -> Script {
        let mut script = Script::new("test");
        script.call(0, 10, 20, put("a", "1"));
        script.call(1, 30, 40, put_leased("b", "2", 7));
        script.call(1, 50, 60, cas("a", Some("1"), "3"));
        script.call(2, 70, 80, cas("a", Some("1"), "4"));
        script.call(2, 90, 100, get("a"));
        script.effect(&Call::LeaseRevoke { id: 7 });
        script.call(0, 110, 120, get("b"));
        script
    }

    #[test]
    fn a_right_history_holds_with_every_call_and_revision_looked_at() {
        let verdicts = check(&script().history());
        assert_eq!(verdicts.iter().map(Verdict::held).collect::<Vec<_>>(), [true; 4], "{verdicts:?}");
        assert_eq!(verdicts.iter().map(|verdict| verdict.checked).collect::<Vec<_>>(), [3, 6, 6, 4]);
        assert_eq!(resolve(&script().history()).makers[&5], Maker::Expiry(7));
    }

    #[test]
    fn one_revision_for_two_writes_is_found() {
        let mut history = script().history();
        reply(&mut history.ops[1]).revision = 2;
        assert!(broken(&history).contains(&UNIQUE));
    }

    #[test]
    fn a_read_behind_an_answered_write_is_found() {
        let mut script = script();
        let late = script.ops[4].clone();
        script.call(1, 130, 140, put("a", "5"));
        script.ops.push(Op { invoked_ns: 150, returned_ns: 160, ..late });
        assert_eq!(broken(&script.history()), [TIME]);
    }

    #[test]
    fn a_wrong_branch_and_a_wrong_version_are_found() {
        let mut history = script().history();
        let Body::Txn { succeeded, .. } = &mut reply(&mut history.ops[3]).body else { panic!() };
        *succeeded = true;
        assert_eq!(broken(&history), [REPLAY]);
        let mut history = script().history();
        let Body::Single(ActionReply::Range { kvs, .. }) = &mut reply(&mut history.ops[4]).body else {
            panic!()
        };
        kvs[0].version += 1;
        assert_eq!(broken(&history), [REPLAY]);
    }

    #[test]
    fn calls_without_an_answer_are_found_by_what_they_wrote() {
        let mut script = script();
        let call = script.unknown(0, 200, 210, put("c", "9"), true);
        script.unknown(0, 220, 230, put("c", "10"), false);
        script.call(1, 240, 250, get("c"));
        let history = script.history();
        assert_eq!(broken(&history), [""; 0]);
        assert_eq!(resolve(&history).makers[&6], Maker::Call { index: call, invoked_ns: 200 });

        let mut failed = history.clone();
        failed.ops[call].outcome = Outcome::Failed("refused".into());
        assert_eq!(broken(&failed), [MADE]);
        // It is in the store although it began only after the next revision had been read.
        let mut late = history.clone();
        (late.ops[call].invoked_ns, late.ops[call].returned_ns) = (260, 270);
        assert_eq!(broken(&late), [MADE]);
    }

    #[test]
    fn one_unknown_call_done_twice_is_found() {
        let mut script = script();
        script.unknown(0, 200, 210, put("c", "9"), true);
        script.effect(&put("c", "9"));
        assert_eq!(broken(&script.history()), [MADE]);
    }

    #[test]
    fn a_lease_that_leaves_a_key_behind_is_found() {
        let mut script = Script::new("test");
        script.call(0, 10, 20, put_leased("a", "1", 7));
        script.call(0, 30, 40, put_leased("b", "2", 7));
        script.effect(&delete(Span::key("a")));
        assert_eq!(broken(&script.history()), [MADE]);
    }

    #[test]
    fn a_deletion_in_doubt_goes_to_the_revision_that_no_lease_explains() {
        let mut script = script();
        script.call(0, 200, 210, put_leased("c", "9", 8));
        script.unknown(1, 220, 230, delete(Span::prefix("c")), true);
        script.call(0, 240, 250, put("c", "10"));
        let all = delete(Span::prefix("c"));
        script.effect(&all);
        assert_eq!(broken(&script.history()), [""; 0]);
    }

    #[test]
    fn an_acknowledged_write_that_nobody_was_told_of_is_lost() {
        let mut history = script().history();
        history.watches[0].items.remove(2);
        assert_eq!(broken(&history), [MADE]);
    }

    #[test]
    fn without_the_watch_of_everything_it_is_undecided() {
        let mut history = script().history();
        history.watches.clear();
        assert_eq!(broken(&history), [REPLAY, MADE]);
        assert!(check(&history).iter().all(|verdict| !matches!(verdict.outcome, Held::No(_))));
    }

    #[test]
    fn a_retried_write_counts_once_wherever_its_answers_came_from() {
        let mut script = script();
        let first = script.unknown(0, 200, 210, put("c", "9"), true);
        let again = Reply { revision: 8, body: Body::Single(ActionReply::Put { prev: None }) };
        script.call(1, 205, 215, put("d", "10"));
        script.call(1, 216, 217, put("d", "11"));
        let second = script.record(3, 220, 230, put("c", "9"), Outcome::Ok(again));
        for index in [first, second] {
            script.ops[index].request_id = Some("1/1".into());
        }
        assert_eq!(broken(&script.history()), [""; 0]);
    }

    /// One lie about one thing, each of a kind that a broken store could tell.
    fn plant(history: &mut History, kind: u64, random: &mut Random) -> bool {
        let index = random.below(history.ops.len() as u64) as usize;
        let later = history.ops.len() - 1 - random.below(20) as usize;
        let items = &mut history.watches[0].items;
        let item = 1 + random.below(items.len() as u64 - 2) as usize;
        match kind {
            0 => {
                items.remove(item);
                return true;
            }
            1 => {
                let WatchBody::Events { events, .. } = &mut items[item].body else { return false };
                events[0].kv.value.push('x');
                return events[0].kind == EventKind::Put;
            }
            2 => {
                let early = history.ops[..later - 50].iter().find(|op| op.call == history.ops[later].call);
                let Some(early) = early.map(|op| op.outcome.clone()) else { return false };
                let is_other = early != history.ops[later].outcome && matches!(early, Outcome::Ok(_));
                history.ops[later].outcome = early;
                return is_other;
            }
            _ => {}
        }
        let Outcome::Ok(reply) = &mut history.ops[index].outcome else { return false };
        match (&mut reply.body, kind) {
            (Body::Single(ActionReply::Range { kvs, .. }), 3) if !kvs.is_empty() => {
                kvs.remove(0);
            }
            (Body::Single(ActionReply::Range { kvs, .. }), 4) if !kvs.is_empty() => kvs[0].mod_revision -= 1,
            (Body::Txn { succeeded, .. }, 5) => *succeeded = !*succeeded,
            (Body::Single(ActionReply::Delete { deleted, .. }), 6) => *deleted += 1,
            (Body::Single(ActionReply::Put { .. }), 7) => reply.revision += 1,
            _ => return false,
        }
        true
    }

    #[test]
    fn simulated_histories_hold_and_every_planted_lie_is_found() {
        let mut planted = [0; 8];
        for seed in 0..20 {
            let history = mixed(seed, 400, 15).history();
            for verdict in check(&history) {
                assert_eq!(verdict.outcome, Held::Yes, "seed {seed}: {}", verdict.claim);
            }
            let mut random = Random::new(seed);
            for round in 0..64 {
                let (kind, mut lying) = (round % 8, history.clone());
                if plant(&mut lying, kind, &mut random) {
                    planted[kind as usize] += 1;
                    assert_ne!(broken(&lying), [""; 0], "seed {seed}, round {round}, lie {kind}");
                }
            }
        }
        assert!(planted.iter().all(|count| *count > 10), "{planted:?}");
    }
}
