//! Leases: granted, kept alive through changing members, revoked, or left to
//! run out, while others look whether their keys are still there.
//!
//! Keys hang on one lease for all of their life, so that a key that is gone
//! says that its lease is. After healing, every lease that nobody keeps alive
//! is looked at until its keys are gone or the time for that is over.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rand::RngExt;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::crew::{self, Worker};
use super::{Work, Workload};
use crate::client::Client;
use crate::context::Context;
use crate::judge::history::{Action, Body, Call, History, Outcome, Span};
use crate::judge::lease::{self, Bounds};
use crate::judge::verdict::Verdict;

const NAME: &str = "lease";
const HOLDERS: usize = 16;
const LOOKERS: usize = 4;
const TTL_S_MAX: i64 = 10;
const KEYS_MAX: usize = 3;
/// What is forgiven before a lease's time is up: the clocks of one machine are read at different moments.
const EARLY_MS: u64 = 50;
/// What is forgiven after it: the leader looks every half second, and a leader that takes over, which it may
/// do without any fault on a busy machine, begins every lease anew.
const LATE_MS: u64 = 12_000;
/// The fault that lets clocks run at half and at double speed.
const CLOCK_RATE_FAULT: &str = "clock-rate";
const CLOCK_RATE_MAX: f64 = 2.0;

/// See the module.
#[derive(Default)]
pub struct Lease {
    book: Arc<Mutex<Book>>,
}

/// Leases whose keys nobody has seen gone yet.
#[derive(Default)]
struct Book {
    open: Vec<i64>,
    /// Leases that are still being attached to, or with a put in doubt: their keys may yet come.
    unsettled: Vec<i64>,
}

impl Workload for Lease {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        let book = Arc::clone(&self.book);
        Box::pin(async move {
            let mut crew = JoinSet::new();
            for index in 0..HOLDERS {
                crew.spawn(hold(Worker::new(&context, NAME, index, HOLDERS), Arc::clone(&book)));
            }
            for index in HOLDERS..HOLDERS + LOOKERS {
                crew.spawn(look(Worker::new(&context, NAME, index, LOOKERS), Arc::clone(&book)));
            }
            while let Some(ended) = crew.join_next().await {
                ended?;
            }
            Ok(())
        })
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        let book = Arc::clone(&self.book);
        Box::pin(async move {
            let until =
                Instant::now() + Duration::from_secs(TTL_S_MAX as u64) + Duration::from_millis(LATE_MS);
            let mut open = std::mem::take(&mut lock(&book).open);
            let mut first = 0;
            // Once more after the time is over: what is still there then is too late.
            let mut late = false;
            while !open.is_empty() && !late {
                late = Instant::now() > until;
                let mut still = Vec::new();
                for id in open {
                    first += 1;
                    let outcome = crew::insist(&context, NAME, first, read(id)).await?;
                    if crew::kvs(&outcome).is_none_or(|kvs| !kvs.is_empty()) {
                        still.push(id);
                    }
                }
                open = still;
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        let stretched = history.faults.iter().any(|fault| fault.name == CLOCK_RATE_FAULT);
        let clock_rate_max = if stretched { CLOCK_RATE_MAX } else { 1.0 };
        let bounds = Bounds { clock_rate_max, early_ms: EARLY_MS, late_ms: LATE_MS };
        lease::check(history, NAME, &bounds)
    }
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().expect("nobody panics while holding the book")
}

/// The keys of a lease.
fn prefix(id: i64) -> String {
    format!("{NAME}/{id:x}/")
}

fn read(id: i64) -> Call {
    let action = Action::Range { span: Span::prefix(&prefix(id)), revision: 0, limit: 0 };
    Call::Single { action, serializable: false }
}

/// What becomes of a lease.
enum Fate {
    /// Nobody cares for it.
    RunOut,
    /// Kept alive this many times, and then left.
    KeepThenLeave(u32),
    /// Kept alive this many times, and then revoked.
    KeepThenRevoke(u32),
}

/// Grants one lease after the other, and sees it through until it is left alone.
async fn hold(mut worker: Worker, book: Arc<Mutex<Book>>) {
    // Renewals come from a second client, so that they come through other members.
    let mut keeper = Client::new(&worker.context, NAME, worker.client.node());
    while worker.turn(1).await {
        // Short ones mostly: they end often.
        let ttl_s = if worker.chance(0.8) {
            worker.rng.random_range(2..=4)
        } else {
            worker.rng.random_range(5..=TTL_S_MAX)
        };
        let id = worker.rng.random_range(1..i64::MAX);
        let granted = worker.client.call(Call::LeaseGrant { id, ttl_s }).await;
        let Some(ttl_s) = remaining_s(&granted).filter(|ttl_s| *ttl_s > 0) else { continue };
        attach(&mut worker, &book, id).await;
        let fate = match worker.pick(10) {
            0..3 => Fate::RunOut,
            3..8 => Fate::KeepThenLeave(worker.rng.random_range(1..=8)),
            _ => Fate::KeepThenRevoke(worker.rng.random_range(0..=4)),
        };
        let (times, revoked) = match fate {
            Fate::RunOut => (0, false),
            Fate::KeepThenLeave(times) => (times, false),
            Fate::KeepThenRevoke(times) => (times, true),
        };
        keep_alive(&mut worker, &mut keeper, id, ttl_s, times).await;
        if revoked && !worker.context.stopped() {
            worker.client.call(Call::LeaseRevoke { id }).await;
        }
    }
}

/// Puts keys on the lease and enters it in the book.
async fn attach(worker: &mut Worker, book: &Mutex<Book>, id: i64) {
    {
        let mut book = lock(book);
        book.open.push(id);
        book.unsettled.push(id);
    }
    let mut doubt = false;
    for number in 0..=worker.pick(KEYS_MAX) {
        let (key, value) = (format!("{}{number}", prefix(id)), worker.value());
        let outcome = worker.client.act(Action::Put { key, value, lease: id, prev_kv: false }).await;
        doubt |= matches!(outcome, Outcome::Unknown(_));
    }
    if !doubt {
        lock(book).unsettled.retain(|unsettled| *unsettled != id);
    }
}

/// Renews the lease three times per time to live, each time at the next member, until it is gone.
async fn keep_alive(worker: &mut Worker, keeper: &mut Client, id: i64, ttl_s: i64, times: u32) {
    for _ in 0..times {
        let every = Duration::from_secs(ttl_s.unsigned_abs()) / 3;
        worker.context.sleep(every.mul_f64(worker.rng.random_range(0.7..1.3))).await;
        if worker.context.stopped() {
            return;
        }
        let members = worker.context.hosts.members();
        if !members.is_empty() {
            let at = worker.pick(members.len());
            keeper.turn_to(members[at]);
        }
        let outcome = keeper.call(Call::LeaseKeepAlive { id }).await;
        if remaining_s(&outcome).is_some_and(|remaining_s| remaining_s <= 0) {
            return;
        }
    }
}

fn remaining_s(outcome: &Outcome) -> Option<i64> {
    match outcome {
        Outcome::Ok(reply) => match &reply.body {
            Body::Lease { ttl_s, .. } => Some(*ttl_s),
            _ => None,
        },
        Outcome::Failed(_) | Outcome::Unknown(_) => None,
    }
}

/// Looks at any lease of the book, which loses it once its keys are gone.
async fn look(mut worker: Worker, book: Arc<Mutex<Book>>) {
    while worker.turn(1).await {
        let chosen = {
            let open = &lock(&book).open;
            if open.is_empty() { None } else { Some(open[worker.rng.random_range(0..open.len())]) }
        };
        let Some(id) = chosen else { continue };
        if worker.chance(0.1) {
            worker.client.call(Call::LeaseTimeToLive { id }).await;
            continue;
        }
        let gone = crew::kvs(&worker.client.call(read(id)).await).is_some_and(|kvs| kvs.is_empty());
        let mut book = lock(&book);
        if gone && !book.unsettled.contains(&id) {
            book.open.retain(|open| *open != id);
        }
    }
}
