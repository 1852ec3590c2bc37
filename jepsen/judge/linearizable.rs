//! Every key is a linearizable register: there is an order of all calls that
//! keeps to their times and in which every answer is right (Herlihy and Wing,
//! "Linearizability: A Correctness Condition for Concurrent Objects", 1990).
//!
//! Each key is judged for itself, which is enough, since linearizability is
//! local. The search is Wing and Gong's, with Lowe's cache of configurations
//! seen ("Testing for Linearizability", 2017): a configuration is the set of
//! calls done, as a 128-bit Zobrist hash, and the value. It never looks at a
//! revision, so that it shares no assumption with [`super::revision_order`].
//! When the search does not end within its budget, the claim is undecided.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::calls::{self, Done};
use super::describe;
use super::history::{Action, ActionReply, Body, Call, Compare, History, Kv, Operand, Relation, Txn};
use super::random::Random;
use super::simulator;
use super::verdict::Verdict;

const CLAIM: &str = "every key is a linearizable register";

/// Configurations that the search may visit for one key. Legal histories of 200 calls need some hundreds.
const CONFIGURATIONS_MAX: usize = 4_000_000;

/// Judges the single-key calls of `workload`: unconditional puts and deletes of one key, ranges of one key
/// at revision 0 that are not serializable, and transactions with one comparison of a key (its value is
/// equal, or its version or create revision equals 0) that put that key, and on failure do nothing or range
/// it. Any other call of the workload makes the claim undecided, so nothing is skipped in silence. At most
/// about 200 calls a key, or the search may not end.
pub fn check(history: &History, workload: &str) -> Vec<Verdict> {
    let calls = calls::done(history);
    let (registers, foreign) = registers(&calls, workload);
    let checked =
        registers.iter().map(|register| register.steps.iter().filter(|s| s.is_known()).count()).sum();
    let mut findings = Vec::new();
    let mut undecided: Vec<String> = foreign;
    for (register, found) in registers.iter().zip(search_all(&registers)) {
        match found {
            Found::Order => {}
            Found::None(best) => findings.push(register.explain(history, &best)),
            Found::Nothing => undecided.push(format!(
                "{}: no answer within {CONFIGURATIONS_MAX} configurations of {} calls",
                register.key,
                register.steps.len()
            )),
        }
    }
    let doubt = (!undecided.is_empty()).then(|| describe::some(undecided).join("; "));
    vec![Verdict::unless(CLAIM, checked, describe::some(findings), doubt)]
}

/// Generates `calls` valid calls, 200 a key, judges them and returns how long judging took and the verdict.
#[expect(clippy::disallowed_methods, reason = "the time that passes on this machine is what is asked for")]
pub fn speed(calls: usize) -> (Duration, Verdict) {
    let history = simulator::registers(1, calls / 200, 200, 100);
    let began = Instant::now();
    let verdict = check(&history, "register").remove(0);
    (began.elapsed(), verdict)
}

/// A value of a register, by number; 0 stands for "no such key".
type Value = u32;

/// What a call's answer says about the value it met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Met {
    Anything,
    Is(Value),
    IsNot(Value),
    /// The answer contradicts itself.
    Impossible,
}

/// One call of one register.
#[derive(Clone, Copy, Debug)]
struct Step {
    met: Met,
    /// What it leaves; nothing when it changes nothing.
    leaves: Option<Value>,
    invoked_ns: u64,
    /// The end of time for a call without an answer.
    returned_ns: u64,
    index: usize,
}

impl Step {
    fn is_known(&self) -> bool {
        self.returned_ns != u64::MAX
    }

    /// The value after it, if it may come at this value.
    fn after(&self, value: Value) -> Option<Value> {
        let fits = match self.met {
            Met::Anything => true,
            Met::Is(expected) => value == expected,
            Met::IsNot(other) => value != other,
            Met::Impossible => false,
        };
        fits.then(|| self.leaves.unwrap_or(value))
    }
}

/// One key with all of its calls.
#[derive(Default)]
struct Register<'a> {
    key: &'a str,
    values: HashMap<&'a str, Value>,
    steps: Vec<Step>,
}

/// The registers of a workload, and the calls that are none of a register.
fn registers<'a>(calls: &[Done<'a>], workload: &str) -> (Vec<Register<'a>>, Vec<String>) {
    let mut registers: Vec<Register<'a>> = Vec::new();
    let mut places: HashMap<&'a str, usize> = HashMap::new();
    let mut foreign = Vec::new();
    for call in calls.iter().filter(|call| call.op.workload == workload) {
        let key = match &call.op.call {
            Call::Single { serializable: true, .. } => continue,
            Call::Single { action: Action::Put { key, .. }, .. } => key,
            Call::Single { action: Action::Range { span, .. } | Action::Delete { span, .. }, .. } => {
                &span.key
            }
            Call::Txn(txn) => txn.compares.first().map_or("", |compare| &compare.key),
            // Calls that touch no key: leases, compaction, members.
            _ => continue,
        };
        let place = *places.entry(key).or_insert_with(|| {
            registers.push(Register { key, ..Register::default() });
            registers.len() - 1
        });
        if !registers[place].take(call) {
            foreign.push(format!("#{} is no call of a register: {}", call.index, call.op.call));
        }
    }
    registers.iter_mut().for_each(Register::prune);
    (registers, foreign)
}

impl<'a> Register<'a> {
    fn value(&mut self, value: &'a str) -> Value {
        let next = self.values.len() as Value + 1;
        *self.values.entry(value).or_insert(next)
    }

    fn value_of(&mut self, kv: Option<&'a Kv>) -> Value {
        kv.map_or(0, |kv| self.value(&kv.value))
    }

    /// Takes a call in; false if it is none of a register.
    fn take(&mut self, call: &Done<'a>) -> bool {
        let read = match &call.op.call {
            Call::Single { action, .. } => self.single(action, call.body()),
            Call::Txn(txn) => self.compare_and_set(txn, call.body()),
            _ => None,
        };
        let Some((met, leaves)) = read else { return false };
        let returned_ns = call.returned_ns.unwrap_or(u64::MAX);
        let step = Step { met, leaves, invoked_ns: call.invoked_ns, returned_ns, index: call.index };
        // What changes nothing and was not answered says nothing.
        if step.is_known() || leaves.is_some() {
            self.steps.push(step);
        }
        true
    }

    fn single(&mut self, action: &'a Action, body: Option<&'a Body>) -> Option<(Met, Option<Value>)> {
        let reply = match body {
            None => None,
            Some(Body::Single(reply)) => Some(reply),
            Some(_) => return None,
        };
        Some(match (action, reply) {
            (Action::Range { span, revision: 0, .. }, reply) if span.end.is_none() => match reply {
                None => (Met::Anything, None),
                Some(ActionReply::Range { kvs, .. }) => (Met::Is(self.value_of(kvs.first())), None),
                Some(_) => return None,
            },
            (Action::Put { value, prev_kv, .. }, reply) => {
                let met = match reply {
                    Some(ActionReply::Put { prev }) if *prev_kv => Met::Is(self.value_of(prev.as_ref())),
                    _ => Met::Anything,
                };
                (met, Some(self.value(value)))
            }
            (Action::Delete { span, prev_kv }, reply) if span.end.is_none() => {
                let met = match reply {
                    Some(ActionReply::Delete { prev, .. }) if *prev_kv => {
                        Met::Is(self.value_of(prev.first()))
                    }
                    Some(ActionReply::Delete { deleted: 0, .. }) => Met::Is(0),
                    Some(_) => Met::IsNot(0),
                    None => Met::Anything,
                };
                (met, Some(0))
            }
            _ => return None,
        })
    }

    fn compare_and_set(&mut self, txn: &'a Txn, body: Option<&'a Body>) -> Option<(Met, Option<Value>)> {
        let [Compare { key, relation: Relation::Equal, operand }] = &txn.compares[..] else { return None };
        let [Action::Put { key: put, value, prev_kv: false, .. }] = &txn.success[..] else { return None };
        let reads_itself = |action: &Action| matches!(action, Action::Range { span, revision: 0, .. } if span.end.is_none() && span.key == *key);
        if put != key || txn.failure.len() > 1 || !txn.failure.iter().all(reads_itself) {
            return None;
        }
        let expected = match operand {
            Operand::Value(value) => self.value(value),
            Operand::Version(0) | Operand::CreateRevision(0) => 0,
            _ => return None,
        };
        let new = self.value(value);
        Some(match body {
            None | Some(Body::Txn { succeeded: true, .. }) => (Met::Is(expected), Some(new)),
            Some(Body::Txn { replies, .. }) => match replies.first() {
                None => (Met::IsNot(expected), None),
                Some(ActionReply::Range { kvs, .. }) => match self.value_of(kvs.first()) {
                    seen if seen == expected => (Met::Impossible, None),
                    seen => (Met::Is(seen), None),
                },
                Some(_) => return None,
            },
            Some(_) => return None,
        })
    }

    /// Drops calls without an answer whose value nobody met: an order with such a call in it is one without
    /// it, too, as long as every answer names the value it met. It spares the search to try them everywhere.
    fn prune(&mut self) {
        if self.steps.iter().any(|step| matches!(step.met, Met::IsNot(_))) {
            return;
        }
        loop {
            let met: HashSet<Value> = self
                .steps
                .iter()
                .filter_map(|step| if let Met::Is(value) = step.met { Some(value) } else { None })
                .collect();
            let before = self.steps.len();
            self.steps
                .retain(|step| step.is_known() || step.leaves.is_some_and(|value| met.contains(&value)));
            if self.steps.len() == before {
                return;
            }
        }
    }

    fn explain(&self, history: &History, best: &Best) -> String {
        let name =
            |value: Value| self.values.iter().find(|(_, number)| **number == value).map(|(name, _)| *name);
        let value = name(best.value).map_or("no value".to_owned(), |name| format!("the value {name:?}"));
        let blocked = describe::call(history, self.steps[best.blocked].index);
        let (done, all) = (best.done, self.steps.iter().filter(|step| step.is_known()).count());
        let key = self.key;
        format!(
            "{key}: no order explains {all} answers; the longest takes in {done}, leaves {value}, and cannot go on before {blocked}"
        )
    }
}

/// What the search found.
enum Found {
    Order,
    None(Best),
    /// No answer within the budget.
    Nothing,
}

/// How far the search came at best.
#[derive(Default)]
struct Best {
    /// Calls with an answer that were in order.
    done: usize,
    value: Value,
    /// The step that should have been next at the latest.
    blocked: usize,
}

/// Searches all registers, on all cores.
fn search_all(registers: &[Register<'_>]) -> Vec<Found> {
    let steps_max = registers.iter().map(|register| register.steps.len()).max().unwrap_or(0);
    let mut random = Random::new(0x6d61_696e_7374_6179);
    let zobrist: Vec<u128> =
        (0..steps_max).map(|_| (u128::from(random.next()) << 64) | u128::from(random.next())).collect();
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<(usize, Found)>> = Mutex::new(Vec::with_capacity(registers.len()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let Some(register) = registers.get(place) else { return };
                    let one = search(&register.steps, &zobrist);
                    found.lock().expect("no searcher panics").push((place, one));
                }
            });
        }
    });
    let mut found = found.into_inner().expect("no searcher panicked");
    found.sort_unstable_by_key(|(place, _)| *place);
    found.into_iter().map(|(_, found)| found).collect()
}

/// Invocations and returns in the order of time, as a list from which a call in order is lifted out with
/// both its ends. Place 0 is the list's head; calls without an answer have no return.
struct Timeline {
    step: Vec<u32>,
    is_return: Vec<bool>,
    next: Vec<u32>,
    prev: Vec<u32>,
    /// Of each step, the place of its return; 0 without one.
    return_of: Vec<u32>,
}

impl Timeline {
    fn new(steps: &[Step]) -> Timeline {
        let mut moments: Vec<(u64, bool, u32)> = Vec::with_capacity(2 * steps.len());
        for (number, step) in steps.iter().enumerate() {
            moments.push((step.invoked_ns, false, number as u32));
            if step.is_known() {
                moments.push((step.returned_ns, true, number as u32));
            }
        }
        // At the same moment invocations come first, which makes the calls concurrent.
        moments.sort_unstable();
        let places = moments.len() as u32 + 1;
        let mut line = Timeline {
            step: std::iter::once(0).chain(moments.iter().map(|moment| moment.2)).collect(),
            is_return: std::iter::once(false).chain(moments.iter().map(|moment| moment.1)).collect(),
            next: (1..=places).map(|place| place % places).collect(),
            prev: (0..places).map(|place| (place + places - 1) % places).collect(),
            return_of: vec![0; steps.len()],
        };
        for place in 1..places {
            if line.is_return[place as usize] {
                line.return_of[line.step[place as usize] as usize] = place;
            }
        }
        line
    }

    fn unlink(&mut self, place: u32) {
        let (prev, next) = (self.prev[place as usize], self.next[place as usize]);
        self.next[prev as usize] = next;
        self.prev[next as usize] = prev;
    }

    fn relink(&mut self, place: u32) {
        let (prev, next) = (self.prev[place as usize], self.next[place as usize]);
        self.next[prev as usize] = place;
        self.prev[next as usize] = place;
    }

    fn lift(&mut self, call: u32) {
        self.unlink(call);
        match self.return_of[self.step[call as usize] as usize] {
            0 => {}
            place => self.unlink(place),
        }
    }

    fn put_back(&mut self, call: u32) {
        match self.return_of[self.step[call as usize] as usize] {
            0 => {}
            place => self.relink(place),
        }
        self.relink(call);
    }
}

fn search(steps: &[Step], zobrist: &[u128]) -> Found {
    let mut line = Timeline::new(steps);
    let known = steps.iter().filter(|step| step.is_known()).count();
    let mut seen: HashSet<(u128, Value), BuildHasherDefault<Folded>> = HashSet::default();
    let mut stack: Vec<(u32, Value)> = Vec::new();
    let (mut done, mut value, mut set) = (0, 0, 0u128);
    let mut best = Best::default();
    let mut at = line.next[0];
    while done < known {
        // Before `known` calls are done there is a return in the list, so the walk ends at one.
        let number = line.step[at as usize] as usize;
        if !line.is_return[at as usize] {
            let entered =
                steps[number].after(value).filter(|after| seen.insert((set ^ zobrist[number], *after)));
            let Some(after) = entered else {
                at = line.next[at as usize];
                continue;
            };
            if seen.len() > CONFIGURATIONS_MAX {
                return Found::Nothing;
            }
            stack.push((at, value));
            line.lift(at);
            done += usize::from(steps[number].is_known());
            set ^= zobrist[number];
            value = after;
            at = line.next[0];
            continue;
        }
        if done >= best.done {
            best = Best { done, value, blocked: number };
        }
        let Some((call, before)) = stack.pop() else { return Found::None(best) };
        let number = line.step[call as usize] as usize;
        line.put_back(call);
        done -= usize::from(steps[number].is_known());
        set ^= zobrist[number];
        value = before;
        at = line.next[call as usize];
    }
    Found::Order
}

/// A hasher for what is a hash already.
#[derive(Default)]
struct Folded(u64);

impl Hasher for Folded {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u128(&mut self, set: u128) {
        self.0 ^= set as u64;
    }

    fn write_u32(&mut self, value: u32) {
        self.0 ^= u64::from(value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{ActionReply, Op, Outcome, Reply, Span};
    use crate::judge::simulator::{Script, cas, delete, get, put, registers};
    use crate::judge::verdict::Held;

    fn judged(script: Script) -> Verdict {
        check(&script.history(), "test").remove(0)
    }

    /// Makes the answer of a read claim another value.
    fn lie(op: &mut Op, value: Option<&str>) {
        let Outcome::Ok(reply) = &mut op.outcome else { panic!("{op}") };
        let Body::Single(ActionReply::Range { kvs, count, .. }) = &mut reply.body else { panic!("{op:?}") };
        *kvs = value.map(|value| Kv { value: value.to_owned(), ..Kv::default() }).into_iter().collect();
        *count = kvs.len() as i64;
    }

    #[test]
    fn calls_one_after_another_hold_and_a_stale_read_does_not() {
        let mut script = Script::new("test");
        script.call(0, 10, 20, put("a", "1"));
        script.call(1, 30, 40, put("a", "2"));
        let read = script.call(2, 50, 60, get("a"));
        let mut stale = Script { ops: script.ops.clone(), ..Script::new("test") };
        assert_eq!(judged(script), Verdict::new(CLAIM, 3, Held::Yes));
        lie(&mut stale.ops[read], Some("1"));
        let Held::No(findings) = judged(stale).outcome else { panic!("a stale read passed") };
        assert!(findings[0].contains("#2 (process 2"), "{findings:?}");
    }

    #[test]
    fn concurrent_calls_may_be_seen_in_either_order_but_not_in_both() {
        for (first, second, holds) in
            [("1", "1", true), ("2", "2", true), ("1", "2", true), ("3", "3", false)]
        {
            let mut script = Script::new("test");
            script.call(0, 10, 100, put("a", "1"));
            script.call(1, 10, 100, put("a", "2"));
            let one = script.call(2, 20, 30, get("a"));
            let two = script.call(2, 40, 50, get("a"));
            let three = script.call(2, 60, 70, get("a"));
            lie(&mut script.ops[one], Some(first));
            lie(&mut script.ops[two], Some(second));
            lie(&mut script.ops[three], Some(second));
            assert_eq!(judged(script).held(), holds, "{first} then {second}");
        }
        let mut script = Script::new("test");
        script.call(0, 10, 100, put("a", "1"));
        script.call(1, 10, 100, put("a", "2"));
        for (at, value) in [(20, "1"), (40, "2"), (60, "1")] {
            let read = script.call(2, at, at + 10, get("a"));
            lie(&mut script.ops[read], Some(value));
        }
        assert!(!judged(script).held(), "a value came back");
    }

    #[test]
    fn a_call_without_an_answer_may_happen_late_or_never_but_once() {
        let reads = |values: &[Option<&str>]| {
            let mut script = Script::new("test");
            script.call(0, 1, 2, put("a", "0"));
            script.unknown(0, 10, 20, put("a", "1"), false);
            for (at, value) in values.iter().enumerate() {
                let at = 100 + 10 * at as u64;
                let read = script.call(2, at, at + 5, get("a"));
                lie(&mut script.ops[read], *value);
            }
            judged(script).held()
        };
        assert!(reads(&[Some("0"), Some("0")]));
        assert!(reads(&[Some("0"), Some("1"), Some("1")]));
        assert!(!reads(&[Some("0"), Some("1"), Some("0")]));
        assert!(!reads(&[None]));
    }

    #[test]
    fn a_call_that_failed_for_certain_is_not_seen() {
        let mut script = Script::new("test");
        script.record(0, 10, 20, put("a", "1"), Outcome::Failed("refused".into()));
        let read = script.call(1, 30, 40, get("a"));
        let mut seen = Script { ops: script.ops.clone(), ..Script::new("test") };
        assert!(judged(script).held());
        lie(&mut seen.ops[read], Some("1"));
        assert!(!judged(seen).held());
    }

    #[test]
    fn compare_and_set_and_deletions_are_understood() {
        let mut script = Script::new("test");
        script.call(0, 1, 2, cas("a", None, "1"));
        script.call(0, 3, 4, cas("a", Some("1"), "2"));
        let failed = script.call(0, 5, 6, cas("a", Some("1"), "3"));
        script.call(0, 7, 8, delete(Span::key("a")));
        script.call(0, 9, 10, delete(Span::key("a")));
        script.call(0, 11, 12, get("a"));
        let mut wrong = Script { ops: script.ops.clone(), ..Script::new("test") };
        assert!(judged(script).held());
        let Outcome::Ok(Reply { body: Body::Txn { succeeded, replies }, .. }) =
            &mut wrong.ops[failed].outcome
        else {
            panic!()
        };
        *succeeded = true;
        replies.clear();
        assert!(!judged(wrong).held());
    }

    #[test]
    fn a_call_that_no_register_has_makes_it_undecided() {
        let mut script = Script::new("test");
        script.call(0, 1, 2, put("a", "1"));
        script.call(0, 3, 4, delete(Span::prefix("a")));
        assert!(matches!(judged(script).outcome, Held::Undecided(_)));
    }

    #[test]
    fn simulated_registers_hold_and_every_planted_lie_is_found() {
        for seed in 0..100 {
            let mut history = registers(seed, 1, 200, 30);
            let verdict = check(&history, "register").remove(0);
            assert_eq!(verdict.outcome, Held::Yes, "seed {seed}");
            // A read long after the end of the run that sees a value from its beginning.
            let op =
                history.ops.iter().find(|op| matches!(op.call, Call::Single { .. }) && op.reply().is_some());
            let mut late = op.expect("some read").clone();
            (late.invoked_ns, late.returned_ns, late.call) = (u64::MAX - 9, u64::MAX - 8, get("register/0"));
            let body = Body::Single(ActionReply::Range { kvs: vec![], count: 0, more: false });
            late.outcome = Outcome::Ok(Reply { revision: 1, body });
            history.ops.push(late);
            assert!(!check(&history, "register")[0].held(), "seed {seed}");
        }
    }

    #[test]
    fn a_read_moved_far_from_its_time_is_found() {
        let (mut planted, mut found) = (0, 0);
        for seed in 100..200 {
            let mut history = registers(seed, 1, 200, 50);
            let reads: Vec<usize> = (0..history.ops.len())
                .filter(|at| matches!(&history.ops[*at].reply().map(|reply| &reply.body), Some(Body::Single(ActionReply::Range { kvs, .. })) if !kvs.is_empty()))
                .collect();
            let (early, late) = (reads[reads.len() / 8], reads[reads.len() - 2]);
            if history.ops[early].reply().map(|reply| &reply.body)
                == history.ops[late].reply().map(|reply| &reply.body)
            {
                continue;
            }
            history.ops[late].outcome = history.ops[early].outcome.clone();
            planted += 1;
            found += usize::from(!check(&history, "register")[0].held());
        }
        assert!(planted > 90 && found == planted, "{found} of {planted}");
    }
}
