//! The bank: transfers between accounts by transaction, reads of all accounts
//! now, at old revisions and from whatever a member has, and watches of all.
//!
//! Claim: the total of all accounts never changes, in no read and in no state
//! that a watch goes through.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::crew::{self, WORKERS, Worker};
use super::{Work, Workload};
use crate::context::Context;
use crate::judge::bank;
use crate::judge::history::{
    Action, Call, Compare, History, Kv, Operand, Outcome, Relation, Revision, Span, Txn,
};
use crate::judge::verdict::Verdict;
use crate::watcher::{Habits, Watcher, Wish};

const NAME: &str = "bank";
const ACCOUNTS: usize = 8;
const BALANCE_AT_FIRST: i64 = 100;
const TOTAL: i64 = ACCOUNTS as i64 * BALANCE_AT_FIRST;
/// The most that is transferred at once.
const AMOUNT_MAX: usize = 20;
/// How far back reads of the past go.
const PAST_MAX: usize = 200;
/// Watches of all accounts, and how long one stays with one member.
const WATCHERS: usize = 2;
const MOVE_EVERY: Duration = Duration::from_secs(5);
/// How long the watches may take to see everything after healing.
const WATCH_TIME_MAX: Duration = Duration::from_secs(20);

/// The workload.
#[derive(Default)]
pub struct Bank {
    watchers: Arc<Mutex<Vec<Watcher>>>,
}

impl Workload for Bank {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        let watchers = Arc::clone(&self.watchers);
        Box::pin(async move {
            for _ in 0..WATCHERS {
                let habits = Habits { move_every: Some(MOVE_EVERY), ..Habits::default() };
                let watcher = Watcher::start(&context, Wish::new(NAME, all(), 1), habits);
                watchers.lock().expect("nobody panics with it").push(watcher);
            }
            crew::drive(context, NAME, WORKERS, work).await
        })
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        let watchers = std::mem::take(&mut *self.watchers.lock().expect("nobody panics with it"));
        Box::pin(async move {
            let action = Action::Range { span: all(), revision: 0, limit: 0 };
            let call = Call::Single { action, serializable: false };
            let Outcome::Ok(last) = crew::insist(&context, NAME, 0, call).await? else { return Ok(()) };
            for watcher in watchers {
                let reached = watcher.finish(last.revision, WATCH_TIME_MAX).await?;
                anyhow::ensure!(reached, "bank: a watch did not reach revision {}", last.revision);
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        bank::check(history, NAME, TOTAL)
    }
}

fn all() -> Span {
    Span::prefix("bank/")
}

fn account(number: usize) -> String {
    format!("{NAME}/{number}")
}

async fn work(mut worker: Worker) -> anyhow::Result<()> {
    let mut newest: Revision = 0;
    while worker.turn(2).await {
        let serializable = worker.chance(0.2);
        let back = if worker.chance(0.1) { 1 + worker.pick(PAST_MAX) as Revision } else { 0 };
        let revision = if newest > back && back > 0 { newest - back } else { 0 };
        let action = Action::Range { span: all(), revision, limit: 0 };
        let outcome = worker.client.call(Call::Single { action, serializable }).await;
        let Outcome::Ok(reply) = &outcome else { continue };
        newest = newest.max(reply.revision);
        let accounts = crew::kvs(&outcome).unwrap_or_default();
        let txn = match accounts.is_empty() {
            true if revision == 0 => found(&mut worker),
            true => continue,
            false => transfer(&mut worker, &accounts),
        };
        worker.client.call(Call::Txn(txn)).await;
    }
    Ok(())
}

/// A balance, and something that makes the value unique.
fn balance(worker: &mut Worker, amount: i64) -> String {
    format!("{amount}:{}", worker.value())
}

fn put(worker: &mut Worker, key: &str, amount: i64) -> Action {
    let value = balance(worker, amount);
    Action::Put { key: key.to_owned(), value, lease: 0, prev_kv: false }
}

/// Makes all accounts, unless they are there.
fn found(worker: &mut Worker) -> Txn {
    let operand = Operand::Version(0);
    let compares = vec![Compare { key: account(0), relation: Relation::Equal, operand }];
    let success = (0..ACCOUNTS).map(|number| put(worker, &account(number), BALANCE_AT_FIRST)).collect();
    Txn { compares, success, failure: Vec::new() }
}

/// Moves an amount from one account to another, if both are as they were seen.
fn transfer(worker: &mut Worker, accounts: &[Kv]) -> Txn {
    let from = worker.pick(accounts.len());
    let to = (from + 1 + worker.pick(accounts.len().max(2) - 1)) % accounts.len();
    let amount = 1 + worker.pick(AMOUNT_MAX) as i64;
    let (from, to) = (&accounts[from], &accounts[to]);
    let amount = if holds(from) >= amount { amount } else { 0 };
    let guard = |kv: &Kv, by_value: bool| {
        let operand =
            if by_value { Operand::Value(kv.value.clone()) } else { Operand::ModRevision(kv.mod_revision) };
        Compare { key: kv.key.clone(), relation: Relation::Equal, operand }
    };
    let by_value = worker.chance(0.5);
    let compares = vec![guard(from, by_value), guard(to, by_value)];
    let mut success =
        vec![put(worker, &from.key, holds(from) - amount), put(worker, &to.key, holds(to) + amount)];
    let look = Action::Range { span: all(), revision: 0, limit: 0 };
    if worker.chance(0.3) {
        // Before or after both, for in between the total is another.
        let at = if worker.chance(0.5) { 0 } else { success.len() };
        success.insert(at, look.clone());
    }
    Txn { compares, success, failure: vec![look] }
}

/// The balance of an account; one that cannot be read shows as a changed total.
fn holds(kv: &Kv) -> i64 {
    kv.value.split(':').next().and_then(|amount| amount.parse().ok()).unwrap_or(0)
}
