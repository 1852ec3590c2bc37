//! Histories as a right store makes them, written call by call or by many
//! simulated clients at once: what the checkers must accept, and after one
//! planted lie must not.
//!
//! A simulated call takes effect at a moment between its invocation and its
//! return; one without an answer takes effect at some moment after it, or never.
//! This file knows nothing of how checkers look at a history.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::history::{Action, Call, Compare, Event, FULL_HISTORY, History, Op, Operand, Outcome, Relation};
use super::history::{Reply, Revision, Span, Txn, WatchBody, WatchItem, WatchStream};
use super::model::Store;
use super::random::Random;

/// A right store, and what is recorded of it.
pub struct Script {
    pub store: Store,
    pub workload: &'static str,
    pub ops: Vec<Op>,
    pub log: Vec<(Revision, Vec<Event>)>,
}

impl Script {
    pub fn new(workload: &'static str) -> Script {
        Script { store: Store::default(), workload, ops: Vec::new(), log: Vec::new() }
    }

    /// Does the call now and records it as answered; returns its place in `ops`.
    pub fn call(&mut self, process: u64, from_ns: u64, to_ns: u64, call: Call) -> usize {
        let reply = self.effect(&call);
        self.record(process, from_ns, to_ns, call, Outcome::Ok(reply))
    }

    /// Records the call as one without an answer; it is done now or never.
    pub fn unknown(&mut self, process: u64, from_ns: u64, to_ns: u64, call: Call, happens: bool) -> usize {
        if happens {
            self.effect(&call);
        }
        self.record(process, from_ns, to_ns, call, Outcome::Unknown("timeout".to_owned()))
    }

    pub fn record(&mut self, process: u64, from_ns: u64, to_ns: u64, call: Call, outcome: Outcome) -> usize {
        let (workload, request_id) = (self.workload, None);
        let (node, invoked_ns, returned_ns) = (process as usize % 3, from_ns, to_ns);
        self.ops.push(Op { process, node, workload, call, request_id, invoked_ns, returned_ns, outcome });
        self.ops.len() - 1
    }

    /// Does the call now, without a record of it.
    pub fn effect(&mut self, call: &Call) -> Reply {
        let done = self.store.execute(call).expect("a scripted call reads or changes keys");
        if !done.events.is_empty() {
            let revision = self.store.revision() + 1;
            self.store.commit(revision, &done.events);
            self.log.push((revision, done.events));
        }
        Reply { revision: self.store.revision(), body: done.body }
    }

    /// The history until now, with the watch of everything at its end.
    pub fn history(mut self) -> History {
        let watch = self.watch(FULL_HISTORY, Span { key: "\0".to_owned(), end: Some("\0".to_owned()) }, 1);
        self.ops.sort_by_key(|op| op.invoked_ns);
        History { ops: self.ops, watches: vec![watch], ..History::default() }
    }

    /// A watch with previous records that saw all that it should, one revision a response.
    pub fn watch(&self, watcher: u64, span: Span, start_revision: Revision) -> WatchStream {
        let at_ns = self.ops.iter().map(|op| op.returned_ns).max().unwrap_or(0) + 1;
        let item = |revision, body| WatchItem { at_ns, revision, body };
        let mut items = vec![item(self.store.revision(), WatchBody::Created)];
        for (revision, events) in self.log.iter().filter(|(revision, _)| *revision >= start_revision) {
            let events: Vec<Event> = events.iter().filter(|e| span.contains(&e.kv.key)).cloned().collect();
            if !events.is_empty() {
                items.push(item(*revision, WatchBody::Events { events, fragment: false }));
            }
        }
        items.push(item(self.store.revision(), WatchBody::Progress));
        let (prev_kv, workload) = (true, self.workload);
        WatchStream { watcher, workload, span, start_revision, prev_kv, items, ..WatchStream::default() }
    }
}

/// What runs, and how well.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub workload: &'static str,
    pub clients: usize,
    pub calls: usize,
    /// One call in so many has no answer; 0 means none.
    pub unknown_one_in: u64,
}

/// What a client sees when it chooses its next call, at the moment of the effect.
pub struct Seen<'a> {
    pub client: usize,
    /// A number that no other call has.
    pub number: usize,
    pub store: &'a Store,
    /// The answer to its last call.
    pub last: Option<&'a Reply>,
    pub random: &'a mut Random,
}

/// What a client does.
pub enum Next {
    Call(Call),
    /// Nothing; the store lets a lease run out instead.
    Expire(i64),
}

/// Runs the plan; `choose` says what each client does next.
pub fn run(plan: Plan, mut choose: impl FnMut(Seen<'_>) -> Next) -> Script {
    let mut random = Random::new(plan.seed);
    let mut script = Script::new(plan.workload);
    let mut last: Vec<Option<Reply>> = vec![None; plan.clients];
    let mut processes: Vec<u64> = (0..plan.clients as u64).collect();
    // Moments of effect, each with that of its invocation and the client.
    let mut due: BinaryHeap<Reverse<(u64, u64, usize)>> = BinaryHeap::new();
    for client in 0..plan.clients {
        let invoked_ns = 1 + random.below(1000);
        due.push(Reverse((invoked_ns + random.below(1000), invoked_ns, client)));
    }
    for number in 0..plan.calls {
        let Some(Reverse((effect_ns, invoked_ns, client))) = due.pop() else { break };
        let store = &script.store;
        let choice = choose(Seen { client, number, store, last: last[client].as_ref(), random: &mut random });
        let is_unknown = plan.unknown_one_in > 0 && random.one_in(plan.unknown_one_in);
        let mut returned_ns = effect_ns + random.below(1000);
        match choice {
            Next::Expire(id) => {
                script.effect(&Call::LeaseRevoke { id });
            }
            Next::Call(call) if is_unknown => {
                // The client may give up before the call takes effect.
                returned_ns = invoked_ns + random.below(1500);
                let happens = random.one_in(2);
                script.unknown(processes[client], invoked_ns, returned_ns, call, happens);
                last[client] = None;
                processes[client] = (plan.clients + number) as u64;
            }
            Next::Call(call) => {
                let index = script.call(processes[client], invoked_ns, returned_ns, call);
                last[client] = script.ops[index].reply().cloned();
            }
        }
        let again_ns = returned_ns + 1 + random.below(300);
        due.push(Reverse((effect_ns.max(again_ns + random.below(1000)) + 1, again_ns, client)));
    }
    script
}

/// Registers with reads, writes and compare-and-set, each with five clients.
pub fn registers(seed: u64, keys: usize, calls_per_key: usize, unknown_one_in: u64) -> History {
    let mut all = History { seed, ..History::default() };
    for number in 0..keys {
        let key = format!("register/{number}");
        let seed = seed.wrapping_mul(1_000_003) + number as u64;
        let plan = Plan { seed, workload: "register", clients: 5, calls: calls_per_key, unknown_one_in };
        all.ops.extend(run(plan, |seen| Next::Call(register_call(&key, seen))).ops);
    }
    all.ops.sort_by_key(|op| op.invoked_ns);
    all
}

fn register_call(key: &str, seen: Seen<'_>) -> Call {
    let new = seen.number.to_string();
    let old = seen.store.get(key).map(|kv| kv.value.as_str());
    match seen.random.below(8) {
        0..4 => get(key),
        4..6 => put(key, &new),
        6 => cas(key, old, &new),
        _ => cas(key, Some(&seen.random.below(1 + seen.number as u64).to_string()), &new),
    }
}

/// Every kind of call on a few keys, with leases that run out and reads of the past.
pub fn mixed(seed: u64, calls: usize, unknown_one_in: u64) -> Script {
    run(Plan { seed, workload: "kv", clients: 6, calls, unknown_one_in }, |seen| {
        let Seen { number, store, random, .. } = seen;
        let mut key = || format!("kv/{}", random.below(6));
        let (one, two) = (key(), key());
        let value = number.to_string();
        let past = 1 + random.below(store.revision() as u64) as Revision;
        let compare = match random.below(5) {
            0 => equal(&one, Operand::ModRevision(store.get(&one).map_or(0, |kv| kv.mod_revision))),
            1 => Compare { relation: Relation::Greater, ..equal(&one, Operand::Version(2)) },
            2 => Compare { relation: Relation::NotEqual, ..equal(&one, Operand::Value(past.to_string())) },
            3 => Compare { relation: Relation::Less, ..equal(&one, Operand::CreateRevision(past)) },
            _ => equal(&one, Operand::Lease(1)),
        };
        let read = |revision, limit| Action::Range { span: Span::prefix("kv/"), revision, limit };
        Next::Call(match random.below(16) {
            0..3 => put(&one, &value),
            3 => put_leased(&one, &value, 1 + random.below(3) as i64),
            4 => delete(Span::key(one)),
            5 => delete(Span { key: one.clone().min(two.clone()), end: Some(one.max(two)) }),
            6..9 => get(&one),
            9 => range(Span::prefix("kv/")),
            10 => Call::Single { action: read(past, 2), serializable: false },
            11..14 if one != two => {
                let success = vec![putting(&one, &value), putting(&two, &value), read(0, 0)];
                let failure = vec![Action::Delete { span: Span::key(one), prev_kv: true }, read(past, 0)];
                Call::Txn(Txn { compares: vec![compare], success, failure })
            }
            14 => Call::LeaseRevoke { id: 1 + random.below(3) as i64 },
            _ => return Next::Expire(1 + random.below(3) as i64),
        })
    })
}

/// The register's read.
pub fn get(key: &str) -> Call {
    range(Span::key(key))
}

/// A linearizable read of everything in `span`.
pub fn range(span: Span) -> Call {
    Call::Single { action: Action::Range { span, revision: 0, limit: 0 }, serializable: false }
}

/// The action of a put without a lease.
pub fn putting(key: &str, value: &str) -> Action {
    Action::Put { key: key.to_owned(), value: value.to_owned(), lease: 0, prev_kv: false }
}

pub fn put(key: &str, value: &str) -> Call {
    Call::Single { action: putting(key, value), serializable: false }
}

pub fn put_leased(key: &str, value: &str, lease: i64) -> Call {
    let action = Action::Put { key: key.to_owned(), value: value.to_owned(), lease, prev_kv: false };
    Call::Single { action, serializable: false }
}

pub fn delete(span: Span) -> Call {
    Call::Single { action: Action::Delete { span, prev_kv: true }, serializable: false }
}

/// Puts `new` if the value is `old` (no value: if there is no key), else reads it.
pub fn cas(key: &str, old: Option<&str>, new: &str) -> Call {
    let operand = old.map_or(Operand::Version(0), |old| Operand::Value(old.to_owned()));
    let compares = vec![equal(key, operand)];
    let read = Action::Range { span: Span::key(key), revision: 0, limit: 0 };
    Call::Txn(Txn { compares, success: vec![putting(key, new)], failure: vec![read] })
}

pub fn equal(key: &str, operand: Operand) -> Compare {
    Compare { key: key.to_owned(), relation: Relation::Equal, operand }
}
