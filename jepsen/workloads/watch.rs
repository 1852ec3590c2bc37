//! Watches: clients change a small set of keys while watchers of every kind
//! follow, from one node to the next, and are held to etcd's nine guarantees.
//!
//! Watchers differ in what they watch (everything, one key, a range), in where
//! they begin (now, in the past, before what is compacted, in the future), in
//! what they ask for and in how they behave.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::RngExt;
use tokio::task::JoinSet;

use super::crew::{self, Worker};
use super::{Work, Workload};
use crate::context::Context;
use crate::judge;
use crate::judge::history::{Action, Call, Compare, History, Operand, Relation, Revision, Span, Txn};
use crate::judge::verdict::Verdict;
use crate::watcher::{Habits, Watcher, Wish};

const NAME: &str = "watch";
const KEYS: usize = 12;
const WRITERS: usize = 4;
/// How often a watcher comes that stays for a while only, and how long it stays.
const GUEST_EVERY: Duration = Duration::from_millis(1500);
const GUEST_TIME: Duration = Duration::from_secs(8);
/// Together, and with what they replace, three of these are more than a response may hold.
const BIG_VALUE_BYTES: usize = 450 << 10;
const BIG_KEYS: usize = 3;
/// Every watcher keeps every event, so there are few big ones.
const BIG_WRITES_MAX: usize = 3;
const BIG_EVERY: Duration = Duration::from_secs(3);
const BIG_DEADLINE: Duration = Duration::from_secs(5);
/// After healing, a watcher must have seen everything within this time.
const CATCH_UP_TIME_MAX: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Default)]
pub struct Watch {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    watchers: Vec<Watcher>,
    finished: usize,
    behind: Vec<String>,
}

impl Workload for Watch {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            let regulars = regulars(&context);
            let newest = regulars[0].follow();
            state.lock().expect("nobody panics with it").watchers = regulars;
            let mut tasks = JoinSet::new();
            for index in 0..WRITERS {
                tasks.spawn(write(Worker::new(&context, NAME, index, WRITERS)));
            }
            tasks.spawn(write_big(Worker::new(&context, NAME, WRITERS, WRITERS)));
            tasks.spawn(receive_guests(Worker::new(&context, NAME, WRITERS + 1, WRITERS), newest, state));
            while let Some(ended) = tasks.join_next().await {
                ended?;
            }
            Ok(())
        })
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            let last = crew::revision_finally(&context, NAME).await?;
            let watchers = std::mem::take(&mut state.lock().expect("nobody panics with it").watchers);
            let mut finishing = JoinSet::new();
            for watcher in watchers {
                finishing.spawn(async move {
                    let number = watcher.number;
                    (number, watcher.finish(last, CATCH_UP_TIME_MAX).await)
                });
            }
            while let Some(finished) = finishing.join_next().await {
                let (number, reached) = finished?;
                let mut state = state.lock().expect("nobody panics with it");
                state.finished += 1;
                if !reached? {
                    state.behind.push(format!(
                        "watcher {number} had not seen everything up to revision {last} {CATCH_UP_TIME_MAX:?} \
                         after healing"
                    ));
                }
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        let mut verdicts = judge::watch::check(history, NAME);
        // Without a compaction, or when no watch was behind one, there is nothing to claim about it.
        verdicts.retain(|verdict| verdict.checked > 0 || !verdict.claim.starts_with("compacted"));
        let state = self.state.lock().expect("nobody panics with it");
        let claim = "every watcher catches up after healing";
        verdicts.push(Verdict::from_findings(claim, state.finished, state.behind.clone()));
        verdicts
    }
}

fn key(number: usize) -> String {
    format!("{NAME}/k{number:02}")
}

fn everything() -> Span {
    Span::prefix("watch/k")
}

fn range(from: usize, to: usize) -> Span {
    Span { key: key(from), end: Some(key(to)) }
}

/// The watchers that are there all the time, one of each kind. The first one sees
/// everything and asks for progress.
fn regulars(context: &Arc<Context>) -> Vec<Watcher> {
    let seconds = Duration::from_secs;
    let now = |span| Wish::new(NAME, span, 0);
    let calm = Habits::default();
    let moving = Habits { move_every: Some(seconds(4)), ..calm.clone() };
    let slow = Habits { stall: Some(seconds(3)), window_bytes: 16 << 10, ..calm.clone() };
    let slow_and_moving = Habits { move_every: Some(seconds(7)), ..slow.clone() };
    let silent = Habits { progress_every: None, silence_max: seconds(10), ..calm.clone() };
    let led = Habits { require_leader: true, ..calm.clone() };
    let mut kinds = vec![
        (Wish::new(NAME, everything(), 1), calm.clone()),
        (Wish { prev_kv: true, ..now(everything()) }, calm.clone()),
        (Wish { prev_kv: true, ..Wish::new(NAME, everything(), 1) }, moving.clone()),
        (now(everything()), slow.clone()),
        (Wish { prev_kv: true, ..now(range(2, 9)) }, slow_and_moving),
        (now(range(3, 7)), moving.clone()),
        (Wish { prev_kv: true, ..now(Span::key(key(0))) }, moving.clone()),
        (Wish { progress_notify: true, ..now(Span::key(key(1))) }, silent),
        (Wish { no_put: true, prev_kv: true, ..now(everything()) }, moving.clone()),
        (Wish { no_delete: true, ..now(everything()) }, calm.clone()),
        (Wish { progress_notify: true, ..now(everything()) }, led),
        // Nobody ever writes there: progress is all it hears.
        (now(Span::prefix("watch/nothing/")), moving.clone()),
    ];
    let big = now(Span::prefix("watch/big"));
    kinds.push((Wish { prev_kv: true, fragment: true, ..big.clone() }, moving));
    kinds.push((Wish { prev_kv: true, ..big }, calm));
    kinds.into_iter().map(|(wish, habits)| Watcher::start(context, wish, habits)).collect()
}

/// Starts watchers that come late, begin anywhere, and end when they have seen what there was.
async fn receive_guests(
    mut host: Worker,
    newest: tokio::sync::watch::Receiver<Option<Revision>>,
    state: Arc<Mutex<State>>,
) {
    let context = Arc::clone(&host.context);
    let mut leaving = std::collections::VecDeque::new();
    while !context.stopped() {
        context.sleep(GUEST_EVERY).await;
        let now = (*newest.borrow()).unwrap_or(0).max(1);
        let wish = guest(&mut host, now);
        let habits = Habits {
            move_every: host.rng.random_bool(0.5).then_some(Duration::from_secs(3)),
            stall: host.rng.random_bool(0.3).then_some(Duration::from_secs(2)),
            ..Habits::default()
        };
        let watcher = Watcher::start(&context, wish, habits);
        leaving.push_back((tokio::time::Instant::now() + GUEST_TIME, watcher));
        while leaving.front().is_some_and(|(at, _)| *at <= tokio::time::Instant::now()) {
            let Some((_, watcher)) = leaving.pop_front() else { break };
            watcher.aim(now);
            state.lock().expect("nobody panics with it").watchers.push(watcher);
        }
    }
    let rest = leaving.into_iter().map(|(_, watcher)| watcher);
    state.lock().expect("nobody panics with it").watchers.extend(rest);
}

/// What a late watcher wants, when the newest revision is about `now`.
fn guest(host: &mut Worker, now: Revision) -> Wish {
    let rng = &mut host.rng;
    let span = match rng.random_range(0..4) {
        0 => Span::key(key(rng.random_range(0..KEYS))),
        1 => range(rng.random_range(0..KEYS / 2), rng.random_range(KEYS / 2..KEYS) + 1),
        _ => everything(),
    };
    let start = match rng.random_range(0..10) {
        // As long as nothing is compacted, the beginning; afterwards it must be told that it is gone.
        0 | 1 => 1,
        2..=5 => rng.random_range(1..=now),
        6 | 7 => rng.random_range((now - 200).max(1)..=now),
        8 => 0,
        _ => now + rng.random_range(1..300),
    };
    Wish {
        prev_kv: rng.random_bool(0.5),
        fragment: rng.random_bool(0.3),
        progress_notify: rng.random_bool(0.3),
        no_put: rng.random_bool(0.1),
        no_delete: rng.random_bool(0.1),
        ..Wish::new(NAME, span, start)
    }
}

/// Changes keys until the run stops.
async fn write(mut writer: Worker) {
    while writer.turn(1).await {
        let call = change(&mut writer);
        writer.client.call(call).await;
    }
}

fn change(writer: &mut Worker) -> Call {
    let single = |action| Call::Single { action, serializable: false };
    let chosen = writer.rng.random_range(0..KEYS);
    match writer.rng.random_range(0..100) {
        0..50 => single(put(writer, chosen)),
        50..65 => single(Action::Delete { span: Span::key(key(chosen)), prev_kv: false }),
        65..72 => {
            let span = range(chosen, (chosen + 3).min(KEYS));
            single(Action::Delete { span, prev_kv: true })
        }
        _ => Call::Txn(many(writer, chosen)),
    }
}

fn put(writer: &mut Worker, number: usize) -> Action {
    Action::Put { key: key(number), value: writer.value(), lease: 0, prev_kv: false }
}

/// Several keys in one revision, in any order, whichever way the comparison turns out.
fn many(writer: &mut Worker, first: usize) -> Txn {
    let count = writer.rng.random_range(2..=5);
    let step = [1, 5, 7, 11][writer.rng.random_range(0..4)];
    let mut branch = || -> Vec<Action> {
        (0..count)
            .map(|n| (first + n * step) % KEYS)
            .map(|number| match writer.rng.random_bool(0.7) {
                true => put(writer, number),
                false => Action::Delete { span: Span::key(key(number)), prev_kv: false },
            })
            .collect()
    };
    let (success, failure) = (branch(), branch());
    let absent = Compare { key: key(first), relation: Relation::Equal, operand: Operand::Version(0) };
    Txn { compares: vec![absent], success, failure }
}

/// Writes revisions that are larger than one response may be.
async fn write_big(mut writer: Worker) {
    writer.client = writer.client.with_deadline(BIG_DEADLINE);
    for _ in 0..BIG_WRITES_MAX {
        writer.context.sleep(BIG_EVERY).await;
        if writer.context.stopped() {
            return;
        }
        let puts = (0..BIG_KEYS).map(|number| {
            let value = format!("{}{}", writer.value(), "-".repeat(BIG_VALUE_BYTES));
            Action::Put { key: format!("{NAME}/big{number}"), value, lease: 0, prev_kv: false }
        });
        let call = Call::Txn(Txn { success: puts.collect(), ..Txn::default() });
        writer.client.call(call).await;
    }
}
