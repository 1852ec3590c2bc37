//! The total of all accounts never changes: in every read of all of them, at
//! every revision, and in every state that a watch goes through (Jepsen's `bank`
//! workload; it finds transactions that are torn, in a read or in a watch).

use std::collections::BTreeMap;

use super::calls;
use super::describe;
use super::event_log::{self, EventLog};
use super::history::{
    Action, ActionReply, Body, Call, Event, EventKind, FULL_HISTORY, History, Kv, Revision,
};
use super::history::{Span, WatchStream};
use super::model::Store;
use super::verdict::Verdict;

const READS: &str = "every read of all accounts has the same total";
const REVISIONS: &str = "all accounts have the same total at every revision";
const WATCHES: &str = "a watch of all accounts goes only through states with the same total";

/// Judges transfers: each key `workload/...` is an account whose value begins with its balance, up to the end
/// or a `:` (what follows makes values unique). All accounts are made by one transaction. A range that covers
/// `Span::prefix("workload/")` must see `total`, or no account at all.
pub fn check(history: &History, workload: &str, total: i64) -> Vec<Verdict> {
    let log = EventLog::of(history);
    let accounts = Span::prefix(&format!("{workload}/"));
    let is_account = |event: &&Event| accounts.contains(&event.kv.key);
    let with_accounts =
        log.revisions.iter().filter(|(_, events)| events.iter().any(|event| is_account(&event)));
    let founded = with_accounts.map(|(revision, _)| *revision).next();
    let bank = Bank { history, workload, accounts, total, founded };
    let mut states = Found::default();
    bank.states(&mut BTreeMap::new(), &log.revisions, &mut states, "the order of revisions");
    vec![bank.reads().verdict(READS), states.verdict(REVISIONS), bank.watches(&log).verdict(WATCHES)]
}

struct Bank<'a> {
    history: &'a History,
    workload: &'a str,
    accounts: Span,
    total: i64,
    /// The revision that made the accounts.
    founded: Option<Revision>,
}

#[derive(Default)]
struct Found {
    checked: usize,
    findings: Vec<String>,
}

impl Found {
    fn verdict(self, claim: &'static str) -> Verdict {
        Verdict::from_findings(claim, self.checked, describe::some(self.findings))
    }
}

/// Balances by account.
type State = BTreeMap<String, i64>;

fn balance(kv: &Kv) -> Option<i64> {
    kv.value.split(':').next()?.parse().ok()
}

impl Bank<'_> {
    fn covers(&self, span: &Span) -> bool {
        let end = self.accounts.end.as_deref().unwrap_or_default();
        let reaches = span.end.as_deref().is_some_and(|own| own == "\0" || own >= end);
        span.key <= self.accounts.key && reaches
    }

    fn reads(&self) -> Found {
        let mut found = Found::default();
        for call in calls::done(self.history).iter().filter(|call| call.op.workload == self.workload) {
            let Some(reply) = call.reply() else { continue };
            match (&call.op.call, &reply.body) {
                (Call::Single { action, .. }, Body::Single(answer)) => {
                    self.read(call.index, reply.revision, action, answer, &mut found);
                }
                (Call::Txn(txn), Body::Txn { succeeded, replies }) => {
                    let actions = if *succeeded { &txn.success } else { &txn.failure };
                    for (action, answer) in actions.iter().zip(replies) {
                        self.read(call.index, reply.revision, action, answer, &mut found);
                    }
                }
                _ => {}
            }
        }
        found
    }

    fn read(&self, index: usize, header: Revision, action: &Action, answer: &ActionReply, found: &mut Found) {
        let Action::Range { span, revision, limit: 0 } = action else { return };
        let ActionReply::Range { kvs, .. } = answer else { return };
        if !self.covers(span) {
            return;
        }
        found.checked += 1;
        let at = if *revision == 0 { header } else { *revision };
        let mine = kvs.iter().filter(|kv| self.accounts.contains(&kv.key));
        let sum = mine.clone().map(balance).sum::<Option<i64>>();
        let is_before = mine.clone().next().is_none() && self.founded.is_none_or(|founded| at < founded);
        if !is_before && sum != Some(self.total) {
            let call = describe::call(self.history, index);
            found.findings.push(format!("{} instead of {} at revision {at}: {call}", told(sum), self.total));
        }
    }

    /// Goes through the states that these revisions make.
    fn states(
        &self,
        state: &mut State,
        revisions: &BTreeMap<Revision, Vec<Event>>,
        found: &mut Found,
        who: &str,
    ) {
        for (revision, events) in revisions {
            let mut is_touched = false;
            for event in events.iter().filter(|event| self.accounts.contains(&event.kv.key)) {
                is_touched = true;
                match (event.kind, balance(&event.kv)) {
                    (EventKind::Put, Some(balance)) => state.insert(event.kv.key.clone(), balance),
                    _ => state.remove(&event.kv.key),
                };
            }
            if !is_touched {
                continue;
            }
            found.checked += 1;
            let sum: i64 = state.values().sum();
            if sum != self.total {
                let events = describe::events(events);
                let total = self.total;
                found
                    .findings
                    .push(format!("{sum} instead of {total} at revision {revision} for {who}: {events}"));
            }
        }
    }

    fn watches(&self, log: &EventLog) -> Found {
        let mut found = Found::default();
        let store = log.store();
        let mut watchers: BTreeMap<u64, Vec<&WatchStream>> = BTreeMap::new();
        let streams = self.history.watches.iter().filter(|stream| stream.workload == self.workload);
        for stream in streams.filter(|stream| stream.watcher != FULL_HISTORY && self.covers(&stream.span)) {
            watchers.entry(stream.watcher).or_default().push(stream);
        }
        for (watcher, mut streams) in watchers {
            streams.sort_by_key(|stream| stream.opened_ns);
            let (mut state, mut reached) = (State::new(), None);
            for stream in streams {
                let mut told = event_log::told(stream);
                let from = first_revision(stream);
                // A watcher that does not go on where it was begins with what was there then.
                if reached.is_none_or(|reached| from > reached + 1) {
                    state = self.state_at(&store, from - 1);
                }
                told.revisions.retain(|revision, _| {
                    *revision <= told.complete && reached.is_none_or(|reached| *revision > reached)
                });
                self.states(&mut state, &told.revisions, &mut found, &format!("watcher {watcher}"));
                reached = Some(reached.unwrap_or(0).max(told.complete));
            }
        }
        found
    }

    fn state_at(&self, store: &Store, revision: Revision) -> State {
        let kvs = store.range_at(&self.accounts, revision);
        kvs.filter_map(|kv| Some((kv.key.clone(), balance(kv)?))).collect()
    }
}

/// The first revision that a stream may tell of.
fn first_revision(stream: &WatchStream) -> Revision {
    use super::history::WatchBody::Created;
    let created = stream.items.iter().find(|item| matches!(item.body, Created));
    match (stream.start_revision, created) {
        (0, Some(created)) => created.revision + 1,
        (from, _) => from.max(1),
    }
}

fn told(sum: Option<i64>) -> String {
    sum.map_or("no sum".to_owned(), |sum| sum.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Operand, Outcome, Txn, WatchBody};
    use crate::judge::simulator::{Next, Plan, Script, Seen, equal, putting, range, run};

    fn all() -> Span {
        Span::prefix("bank/")
    }

    fn account(number: u64) -> String {
        format!("bank/{number}")
    }

    fn call(seen: Seen<'_>) -> Next {
        let Seen { number, store, random, .. } = seen;
        let one = random.below(4);
        let two = (one + 1 + random.below(3)) % 4;
        let Some(from) = store.get(&account(one)) else {
            let success = (0..4).map(|to| putting(&account(to), &format!("10:{number}"))).collect();
            return Next::Call(Call::Txn(Txn { success, ..Txn::default() }));
        };
        if random.one_in(3) {
            let past = 1 + random.below(store.revision() as u64) as Revision;
            let action = Action::Range { span: all(), revision: past, limit: 0 };
            let past = Call::Single { action, serializable: true };
            return Next::Call(if random.one_in(2) { range(all()) } else { past });
        }
        let to = store.get(&account(two)).and_then(balance).expect("all accounts were made at once");
        let from = balance(from).expect("a balance");
        let put = |key, amount: i64| putting(&account(key), &format!("{amount}:{number}"));
        let compares = vec![equal(&account(one), Operand::Version(random.below(3) as i64))];
        let compares = if random.one_in(4) { compares } else { Vec::new() };
        Next::Call(Call::Txn(Txn {
            compares,
            success: vec![put(one, from - 3), put(two, to + 3)],
            failure: vec![],
        }))
    }

    fn script(seed: u64) -> Script {
        run(Plan { seed, workload: "bank", clients: 5, calls: 200, unknown_one_in: 10 }, call)
    }

    /// A watch from the beginning that reconnects, and one from somewhere on.
    fn history(seed: u64) -> History {
        let script = script(seed);
        let mut early = script.watch(1, all(), 1);
        early.items.truncate(20);
        let reached = event_log::told(&early).complete;
        let mut later = script.watch(1, all(), reached + 1);
        later.opened_ns = 9;
        let middle = script.watch(2, all(), 30);
        let mut history = script.history();
        history.watches.extend([early, later, middle]);
        history
    }

    fn broken(history: &History) -> Vec<&'static str> {
        let verdicts = check(history, "bank", 40).into_iter();
        verdicts.filter(|verdict| !verdict.held()).map(|verdict| verdict.claim).collect()
    }

    #[test]
    fn simulated_banks_keep_their_total() {
        for seed in 0..30 {
            let history = history(seed);
            assert_eq!(broken(&history), [""; 0], "seed {seed}");
            assert!(check(&history, "bank", 40).iter().all(|verdict| verdict.checked > 30));
            assert_eq!(broken(&history), [""; 0], "seed {seed}");
        }
    }

    #[test]
    fn a_torn_read_is_found() {
        let mut torn = history(1);
        let mut ranges = torn.ops.iter_mut().skip(60).filter_map(|op| match (&op.call, &mut op.outcome) {
            (Call::Single { .. }, Outcome::Ok(reply)) => Some(reply),
            _ => None,
        });
        let reply = ranges.next().expect("a read");
        let Body::Single(ActionReply::Range { kvs, .. }) = &mut reply.body else { panic!("a range") };
        kvs[2].value = "1000:x".into();
        assert_eq!(broken(&torn), [READS]);
        let mut empty = history(1);
        let op = empty.ops.iter_mut().rev().find(|op| op.call == range(all()) && op.reply().is_some());
        let Some(Outcome::Ok(reply)) = op.map(|op| &mut op.outcome) else { panic!("a read") };
        let Body::Single(ActionReply::Range { kvs, .. }) = &mut reply.body else { panic!("a range") };
        kvs.clear();
        assert_eq!(broken(&empty), [READS]);
    }

    #[test]
    fn a_torn_watch_and_a_torn_revision_are_found() {
        for (stream, claim) in
            [(0, vec![REVISIONS]), (1, vec![WATCHES]), (2, vec![WATCHES]), (3, vec![WATCHES])]
        {
            let mut torn = history(2);
            let mut several =
                torn.watches[stream].items.iter_mut().skip(5).filter_map(|item| match &mut item.body {
                    WatchBody::Events { events, .. } if events.len() > 1 => Some(events),
                    _ => None,
                });
            several.next().expect("a transfer").pop();
            let found = broken(&torn);
            assert!(claim.iter().all(|claim| found.contains(claim)), "stream {stream}: {found:?}");
        }
    }
}
