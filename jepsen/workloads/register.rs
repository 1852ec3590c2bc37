//! Registers: each key is read, written and compared-and-set by workers at all
//! members.
//!
//! Claim: every key is a linearizable register. The search for an order grows
//! fast with the calls of one key and faster with those in doubt, so a key that
//! has had its share is left for a fresh one. It is read now and then
//! afterwards, and once at the end, so that what a later fault does to it shows.

use std::sync::{Arc, Mutex, MutexGuard};

use super::crew::{self, WORKERS, Worker};
use super::{Work, Workload};
use crate::context::Context;
use crate::judge::history::{
    Action, ActionReply, Body, Call, Compare, History, Operand, Outcome, Relation, Span, Txn,
};
use crate::judge::linearizable;
use crate::judge::verdict::Verdict;

const NAME: &str = "register";
/// Calls after which a key is only read now and then, and after which it is left alone.
const CALLS_BUSY_MAX: usize = 160;
const CALLS_MAX: usize = 195;
/// Calls in doubt after which a key is only read now and then.
const UNKNOWN_MAX: usize = 8;
/// How often a call goes to an old key.
const OLD_KEY_SHARE: f64 = 0.06;

/// The workload.
#[derive(Default)]
pub struct Register {
    keys: Arc<Mutex<Keys>>,
}

/// All keys, the last one in use.
#[derive(Default)]
struct Keys {
    keys: Vec<Key>,
}

#[derive(Default)]
struct Key {
    calls: usize,
    unknown: usize,
    /// What was last seen in it, for comparisons that have a chance.
    last_seen: Option<String>,
}

impl Keys {
    /// The key in use: a fresh one when the last has had its share.
    fn current(&mut self) -> usize {
        let used_up = |key: &Key| key.calls >= CALLS_BUSY_MAX || key.unknown >= UNKNOWN_MAX;
        if self.keys.last().is_none_or(used_up) {
            self.keys.push(Key::default());
        }
        let last = self.keys.len() - 1;
        self.keys[last].calls += 1;
        last
    }

    /// An old key that has calls left, looked for from `from` on.
    fn old(&mut self, from: usize) -> Option<usize> {
        let count = self.keys.len().saturating_sub(1);
        let found =
            (0..count).map(|step| (from + step) % count).find(|at| self.keys[*at].calls < CALLS_MAX)?;
        self.keys[found].calls += 1;
        Some(found)
    }
}

impl Workload for Register {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        let keys = Arc::clone(&self.keys);
        crew::drive(context, NAME, WORKERS, move |worker| work(worker, Arc::clone(&keys)))
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        let count = lock(&self.keys).keys.len();
        Box::pin(async move {
            for at in 0..count {
                crew::read_finally(&context, NAME, Span::key(key_name(at))).await?;
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        linearizable::check(history, NAME)
    }
}

fn lock(keys: &Mutex<Keys>) -> MutexGuard<'_, Keys> {
    keys.lock().expect("no worker panics while it holds the keys")
}

fn key_name(at: usize) -> String {
    format!("{NAME}/{at}")
}

async fn work(mut worker: Worker, keys: Arc<Mutex<Keys>>) -> anyhow::Result<()> {
    while worker.turn(1).await {
        let from = worker.pick(1 << 16);
        let old = worker.chance(OLD_KEY_SHARE).then(|| lock(&keys).old(from)).flatten();
        let at = old.unwrap_or_else(|| lock(&keys).current());
        let call = match old {
            Some(at) => read(at),
            None => {
                let last_seen = lock(&keys).keys[at].last_seen.clone();
                draw(&mut worker, at, last_seen)
            }
        };
        let outcome = worker.client.call(call.clone()).await;
        note(&mut lock(&keys).keys[at], &call, &outcome);
    }
    Ok(())
}

fn read(at: usize) -> Call {
    let action = Action::Range { span: Span::key(key_name(at)), revision: 0, limit: 0 };
    Call::Single { action, serializable: false }
}

/// Half reads, a quarter writes with rare deletions, a quarter comparisons.
fn draw(worker: &mut Worker, at: usize, last_seen: Option<String>) -> Call {
    let key = key_name(at);
    let put = |value| Action::Put { key: key.clone(), value, lease: 0, prev_kv: false };
    match worker.pick(100) {
        0..50 => read(at),
        50..72 => Call::Single { action: put(worker.value()), serializable: false },
        72..75 => {
            let action = Action::Delete { span: Span::key(key_name(at)), prev_kv: false };
            Call::Single { action, serializable: false }
        }
        _ => {
            let operand = match last_seen {
                Some(value) => Operand::Value(value),
                None => Operand::Version(0),
            };
            let compare = Compare { key: key.clone(), relation: Relation::Equal, operand };
            let look = Action::Range { span: Span::key(key.clone()), revision: 0, limit: 0 };
            let failure = if worker.chance(0.5) { vec![look] } else { Vec::new() };
            let success = vec![put(worker.value())];
            Call::Txn(Txn { compares: vec![compare], success, failure })
        }
    }
}

/// Remembers what the key was last seen to hold. It only guides later comparisons.
fn note(key: &mut Key, call: &Call, outcome: &Outcome) {
    let reply = match outcome {
        Outcome::Ok(reply) => reply,
        Outcome::Unknown(_) => {
            key.unknown += 1;
            return;
        }
        Outcome::Failed(_) => return,
    };
    let written = |action: &Action| match action {
        Action::Put { value, .. } => Some(Some(value.clone())),
        Action::Delete { .. } => Some(None),
        Action::Range { .. } => None,
    };
    let read = |reply: &ActionReply| match reply {
        ActionReply::Range { kvs, .. } => Some(kvs.first().map(|kv| kv.value.clone())),
        ActionReply::Put { .. } | ActionReply::Delete { .. } => None,
    };
    let seen = match (call, &reply.body) {
        (Call::Single { action, .. }, Body::Single(reply)) => read(reply).or_else(|| written(action)),
        (Call::Txn(txn), Body::Txn { succeeded: true, .. }) => txn.success.first().and_then(written),
        (Call::Txn(_), Body::Txn { succeeded: false, replies }) => replies.first().and_then(read),
        _ => None,
    };
    if let Some(seen) = seen {
        key.last_seen = seen;
    }
}
