//! No element is lost, invented or brought back: sets that elements are added
//! to by compare-and-set (Jepsen's `set` workload for etcd).
//!
//! An element that was acknowledged, or that somebody read, is in every read
//! that begins later. What is read at all was added by somebody, and not by an
//! addition that failed for certain. The lists' own story (who appended after
//! whom) is judged by [`super::append`], not here.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::append::{List, elements};
use super::calls;
use super::describe;
use super::history::{Action, ActionReply, Body, Call, History, Outcome, Txn};
use super::verdict::Verdict;

const LOST: &str = "no element that was acknowledged or read is lost";
const INVENTED: &str = "every element was added by somebody";
const BACK: &str = "no element is there twice, comes back, or comes from an addition that failed";

/// Judges sets: every key of the workload is one, holding its elements as `"1,2,3"`. An element is added by a
/// transaction that puts `old + "," + element` under a comparison; the addition is done when it succeeded. A
/// linearizable range of the key reads it; one after all additions is needed.
pub fn check(history: &History, workload: &str) -> Vec<Verdict> {
    let found = judge(history, workload, |_, _| true);
    vec![
        Verdict::unless(LOST, found.acknowledged, describe::some(found.lost), found.unread),
        Verdict::from_findings(INVENTED, found.read, describe::some(found.invented)),
        Verdict::from_findings(BACK, found.read + found.failed, describe::some(found.back)),
    ]
}

/// What is known of a workload's sets.
#[derive(Debug, Default)]
pub struct Found {
    pub acknowledged: usize,
    /// Distinct elements that were read.
    pub read: usize,
    pub failed: usize,
    pub lost: Vec<String>,
    pub invented: Vec<String>,
    pub back: Vec<String>,
    /// A set that nobody read after its last addition.
    pub unread: Option<String>,
}

/// Judges the sets whose additions `is_addition` says so of, by key and transaction.
pub fn judge(history: &History, workload: &str, is_addition: impl Fn(&str, &Txn) -> bool) -> Found {
    let mut sets = Sets { history, sets: BTreeMap::new() };
    let of_workload = || history.ops.iter().enumerate().filter(|(_, op)| op.workload == workload);
    for (index, op) in of_workload() {
        let Call::Txn(txn) = &op.call else { continue };
        for action in &txn.success {
            let Action::Put { key, value, .. } = action else { continue };
            let Some(element) = elements(value).and_then(|list| list.last().copied()) else { continue };
            if is_addition(key, txn) {
                sets.attempt(key, element, index);
            }
        }
    }
    for call in calls::done(history).iter().filter(|call| call.op.workload == workload) {
        sets.answer(call.index);
    }
    let mut found = Found::default();
    sets.sets.iter().for_each(|(key, set)| set.judge(history, key, &mut found));
    found
}

/// One set of a workload.
#[derive(Default)]
struct Set {
    added: HashMap<u64, Added>,
    reads: Vec<Read>,
}

/// How the attempts to add one element ended.
#[derive(Default)]
struct Added {
    acknowledged: Option<usize>,
    unknown: Option<usize>,
    failed: Option<usize>,
}

/// What a set was at some moment of the call at `index`.
struct Read {
    index: usize,
    list: List,
}

struct Sets<'a> {
    history: &'a History,
    sets: BTreeMap<&'a str, Set>,
}

impl<'a> Sets<'a> {
    fn attempt(&mut self, key: &'a str, element: u64, index: usize) {
        let added = self.sets.entry(key).or_default().added.entry(element).or_default();
        let place = match &self.history.ops[index].outcome {
            Outcome::Ok(reply) if matches!(reply.body, Body::Txn { succeeded: true, .. }) => {
                &mut added.acknowledged
            }
            Outcome::Ok(_) | Outcome::Failed(_) => &mut added.failed,
            Outcome::Unknown(_) => &mut added.unknown,
        };
        place.get_or_insert(index);
    }

    fn answer(&mut self, index: usize) {
        let op = &self.history.ops[index];
        let Some(reply) = op.reply() else { return };
        match (&op.call, &reply.body) {
            (Call::Single { action, serializable: false }, Body::Single(reply)) => {
                self.read(index, action, reply)
            }
            (Call::Txn(txn), Body::Txn { succeeded, replies }) => {
                let actions = if *succeeded { &txn.success } else { &txn.failure };
                actions.iter().zip(replies).for_each(|(action, reply)| self.read(index, action, reply));
            }
            _ => {}
        }
    }

    fn read(&mut self, index: usize, action: &Action, reply: &ActionReply) {
        match (action, reply) {
            (Action::Range { span, revision: 0, limit: 0 }, ActionReply::Range { kvs, .. }) => {
                for (key, set) in self.sets.iter_mut().filter(|(key, _)| span.contains(key)) {
                    let value = kvs.iter().find(|kv| kv.key == *key).and_then(|kv| elements(&kv.value));
                    set.reads.push(Read { index, list: value.unwrap_or_default() });
                }
            }
            // What was put is what the set was then.
            (Action::Put { key, value, .. }, _) => {
                if let (Some(set), Some(list)) = (self.sets.get_mut(key.as_str()), elements(value)) {
                    set.reads.push(Read { index, list });
                }
            }
            _ => {}
        }
    }
}

impl Set {
    fn judge(&self, history: &History, key: &str, found: &mut Found) {
        let times = |read: &Read| (history.ops[read.index].invoked_ns, history.ops[read.index].returned_ns);
        let mut reads: Vec<(&Read, BTreeSet<u64>)> =
            self.reads.iter().map(|read| (read, read.list.iter().copied().collect())).collect();
        reads.sort_by_key(|(read, _)| times(read));
        for (read, distinct) in reads.iter().filter(|(read, distinct)| distinct.len() < read.list.len()) {
            let twice = read.list.len() - distinct.len();
            let told = describe::call(history, read.index);
            found.back.push(format!("{key}: {twice} elements are there twice in {told}"));
        }
        let all_read: BTreeSet<u64> = reads.iter().flat_map(|(_, list)| list.iter().copied()).collect();
        found.read += all_read.len();
        for element in all_read.iter().copied().chain(self.added.keys().copied()).collect::<BTreeSet<u64>>() {
            self.element(history, key, element, &reads, found);
        }
        let last = self
            .added
            .values()
            .filter_map(|added| added.acknowledged)
            .map(|index| history.ops[index].returned_ns);
        let is_read = |last: u64| reads.iter().any(|(read, _)| times(read).0 > last);
        if last.max().is_some_and(|last| !is_read(last)) {
            found.unread.get_or_insert_with(|| format!("{key} was not read after the last addition"));
        }
    }

    fn element(
        &self,
        history: &History,
        key: &str,
        element: u64,
        reads: &[(&Read, BTreeSet<u64>)],
        found: &mut Found,
    ) {
        let name = |index: usize| describe::call(history, index);
        let times = |read: &Read| (history.ops[read.index].invoked_ns, history.ops[read.index].returned_ns);
        let seen = reads.iter().filter(|(_, list)| list.contains(&element)).map(|(read, _)| *read);
        let first = seen.clone().min_by_key(|read| times(read).1);
        let added = self.added.get(&element);
        match (added, first) {
            (None, Some(read)) => {
                found.invented.push(format!("{key}: nobody added {element}, seen by {}", name(read.index)));
            }
            (Some(Added { acknowledged: None, unknown: None, failed: Some(failed) }), Some(read)) => {
                found.back.push(format!(
                    "{key}: {element} of {} is seen by {}",
                    name(*failed),
                    name(read.index)
                ));
            }
            _ => {}
        }
        let acknowledged = added.and_then(|added| added.acknowledged);
        found.acknowledged += usize::from(acknowledged.is_some());
        found.failed += usize::from(added.is_some_and(|added| added.failed.is_some()));
        let since = acknowledged.into_iter().chain(first.map(|read| read.index));
        let Some(since) = since.min_by_key(|index| history.ops[*index].returned_ns) else { return };
        let is_later = |read: &Read| times(read).0 > history.ops[since].returned_ns;
        let missed = reads.iter().find(|(read, list)| is_later(read) && !list.contains(&element));
        let Some((missed, _)) = missed else { return };
        let told = format!("{key}: {element}, there since {}, is not in {}", name(since), name(missed.index));
        if let Some(again) = seen.clone().find(|read| times(read).0 > times(missed).1) {
            found.back.push(format!("{told}, but again in {}", name(again.index)));
        }
        found.lost.push(told);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Op, Span};
    use crate::judge::simulator::{Next, Plan, Script, cas, get, range, run};
    use crate::judge::verdict::Held;

    fn broken(ops: Vec<Op>) -> Vec<&'static str> {
        let history = History { ops, ..History::default() };
        check(&history, "set").iter().filter(|verdict| !verdict.held()).map(|verdict| verdict.claim).collect()
    }

    fn script() -> Script {
        let mut script = Script::new("set");
        script.call(0, 10, 20, cas("set/0", None, "1"));
        script.call(1, 30, 40, cas("set/0", Some("1"), "1,2"));
        script.call(2, 50, 60, cas("set/0", Some("1"), "1,3"));
        script.call(2, 70, 80, get("set/0"));
        script.unknown(2, 90, 95, cas("set/0", Some("1,2"), "1,2,4"), true);
        script.call(1, 100, 110, range(Span::prefix("set/")));
        script
    }

    /// The last read, seeing this instead.
    fn ending(value: &str) -> Vec<Op> {
        let mut ops = script().ops;
        set_value(ops.last_mut().expect("the last read"), value);
        ops
    }

    fn set_value(op: &mut Op, value: &str) {
        let Outcome::Ok(reply) = &mut op.outcome else { panic!("a read") };
        let Body::Single(ActionReply::Range { kvs, .. }) = &mut reply.body else { panic!("a range") };
        kvs[0].value = value.to_owned();
    }

    #[test]
    fn additions_that_were_done_are_seen_and_those_in_doubt_may_be() {
        let history = History { ops: script().ops, ..History::default() };
        let verdicts = check(&history, "set");
        assert_eq!(verdicts.iter().map(|verdict| verdict.checked).collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(broken(script().ops), [""; 0]);
        assert_eq!(broken(ending("1,2")), [""; 0]);
    }

    #[test]
    fn lost_invented_failed_and_doubled_elements_are_found() {
        assert_eq!(broken(ending("1,4")), [LOST]);
        assert_eq!(broken(ending("1,2,5")), [INVENTED]);
        assert_eq!(broken(ending("1,2,3")), [BACK]);
        assert_eq!(broken(ending("1,2,2")), [BACK]);
    }

    #[test]
    fn an_element_that_comes_back_is_found() {
        let mut script = script();
        let missed = script.call(0, 120, 130, get("set/0"));
        script.call(0, 140, 150, get("set/0"));
        set_value(&mut script.ops[missed], "1,2");
        assert_eq!(broken(script.ops), [LOST, BACK]);
    }

    #[test]
    fn without_a_read_at_the_end_it_is_undecided() {
        let mut ops = script().ops;
        ops.truncate(2);
        let history = History { ops, ..History::default() };
        assert!(matches!(check(&history, "set")[0].outcome, Held::Undecided(_)));
    }

    #[test]
    fn simulated_sets_hold() {
        for seed in 0..40 {
            let plan = Plan { seed, workload: "set", clients: 5, calls: 150, unknown_one_in: 10 };
            let mut script = run(plan, |seen| {
                let old = seen.store.get("set/0").map(|kv| kv.value.clone());
                let new =
                    old.as_ref().map_or(seen.number.to_string(), |old| format!("{old},{}", seen.number));
                let stale = Some("7".to_owned()).filter(|_| seen.random.one_in(4)).or(old);
                Next::Call(if seen.random.one_in(3) {
                    get("set/0")
                } else {
                    cas("set/0", stale.as_deref(), &new)
                })
            });
            script.call(99, u64::MAX - 2, u64::MAX - 1, get("set/0"));
            assert_eq!(broken(script.ops), [""; 0], "seed {seed}");
        }
    }
}
