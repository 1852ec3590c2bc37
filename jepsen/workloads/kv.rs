//! Mixed calls on few keys: puts, deletions, reads of now and of the past,
//! transactions over several keys, keys with leases.
//!
//! Claim: one order of revisions explains every answer, down to previous
//! values, versions, counts and limits. What the draw is guided by (what this
//! worker last saw) decides nothing about right or wrong.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::crew::{self, WORKERS, Worker};
use super::{Work, Workload};
use crate::context::Context;
use crate::judge::history::{
    Action, ActionReply, Body, Call, Compare, History, Kv, Operand, Outcome, Relation, Revision, Span, Txn,
};
use crate::judge::verdict::Verdict;

const NAME: &str = "kv";
/// Few, so that calls meet.
const KEYS: usize = 10;
/// How far back reads of the past go.
const PAST_MAX: usize = 300;
/// The shortest and the longest lease, in seconds.
const TTL_S: std::ops::RangeInclusive<i64> = 2..=8;

/// The workload.
pub struct MixedKv;

impl Workload for MixedKv {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        crew::drive(context, NAME, WORKERS, work)
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        Box::pin(async move { crew::read_finally(&context, NAME, Span::prefix("kv/")).await.map(drop) })
    }

    /// Nothing of its own: it is there for the order of revisions, which every run judges.
    fn judge(&self, _history: &History) -> Vec<Verdict> {
        Vec::new()
    }
}

/// What a worker remembers to draw calls that have a chance.
#[derive(Default)]
struct Memory {
    newest: Revision,
    seen: BTreeMap<String, Kv>,
    /// Its own lease, while it knows of no reason why it should be gone.
    lease: i64,
}

async fn work(mut worker: Worker) -> anyhow::Result<()> {
    let mut memory = Memory::default();
    while worker.turn(1).await {
        let call = draw(&mut worker, &memory);
        let outcome = worker.client.call(call.clone()).await;
        memory.note(&call, &outcome);
    }
    Ok(())
}

impl Memory {
    fn note(&mut self, call: &Call, outcome: &Outcome) {
        match (call, outcome) {
            (Call::LeaseGrant { id, .. }, Outcome::Ok(_)) => self.lease = *id,
            // Revoked, expired, or nobody knows: the next one is another.
            (Call::LeaseRevoke { .. }, _) => self.lease = 0,
            (_, Outcome::Failed(why)) if why.contains("lease not found") => self.lease = 0,
            _ => {}
        }
        let Outcome::Ok(reply) = outcome else { return };
        self.newest = self.newest.max(reply.revision);
        let replies = match &reply.body {
            Body::Single(reply) => std::slice::from_ref(reply),
            Body::Txn { replies, .. } => replies,
            _ => return,
        };
        for reply in replies {
            if let ActionReply::Range { kvs, .. } = reply {
                self.seen.extend(kvs.iter().map(|kv| (kv.key.clone(), kv.clone())));
            }
        }
    }
}

fn draw(worker: &mut Worker, memory: &Memory) -> Call {
    let single = |action| Call::Single { action, serializable: false };
    match worker.pick(100) {
        0..28 => single(put(worker, memory)),
        28..40 => single(delete(worker)),
        40..62 => single(range(worker, memory)),
        62..66 => Call::Single { action: range(worker, memory), serializable: true },
        66..96 => Call::Txn(txn(worker, memory)),
        _ => lease(worker, memory),
    }
}

fn key(worker: &mut Worker) -> String {
    format!("{NAME}/{}", worker.pick(KEYS))
}

fn put(worker: &mut Worker, memory: &Memory) -> Action {
    let lease = if worker.chance(0.15) { memory.lease } else { 0 };
    Action::Put { key: key(worker), value: worker.value(), lease, prev_kv: worker.chance(0.5) }
}

/// One key, or now and then several.
fn delete(worker: &mut Worker) -> Action {
    let span = if worker.chance(0.3) { span(worker) } else { Span::key(key(worker)) };
    Action::Delete { span, prev_kv: worker.chance(0.5) }
}

/// Some neighbours, or all keys.
fn span(worker: &mut Worker) -> Span {
    let from = worker.pick(KEYS);
    match worker.pick(4) {
        0 => Span::prefix("kv/"),
        _ => Span { key: format!("{NAME}/{from}"), end: Some(format!("{NAME}/{}", (from + 3).min(9))) },
    }
}

fn range(worker: &mut Worker, memory: &Memory) -> Action {
    let span = if worker.chance(0.5) { span(worker) } else { Span::key(key(worker)) };
    let back = 1 + worker.pick(PAST_MAX) as Revision;
    let revision = match worker.pick(10) {
        0..3 if memory.newest > back => memory.newest - back,
        // Often one that does not exist yet, which is refused.
        3 if memory.newest > 0 => memory.newest + worker.pick(3) as Revision,
        _ => 0,
    };
    let limit = if worker.chance(0.3) { 1 + worker.pick(4) as i64 } else { 0 };
    Action::Range { span, revision, limit }
}

/// Comparisons that often hold, and up to three steps on different keys.
fn txn(worker: &mut Worker, memory: &Memory) -> Txn {
    let compares = (0..1 + worker.pick(2)).map(|_| compare(worker, memory)).collect();
    let success = steps(worker, memory);
    let failure = if worker.chance(0.5) { steps(worker, memory) } else { vec![range(worker, memory)] };
    Txn { compares, success, failure }
}

fn compare(worker: &mut Worker, memory: &Memory) -> Compare {
    let key = key(worker);
    let seen = memory.seen.get(&key).cloned().unwrap_or_default();
    let operand = match worker.pick(6) {
        0 => Operand::Value(seen.value),
        1 => Operand::Version(seen.version),
        2 => Operand::CreateRevision(seen.create_revision),
        3 | 4 => Operand::ModRevision(seen.mod_revision),
        _ => Operand::Lease(seen.lease),
    };
    let relation = match worker.pick(8) {
        0..4 => Relation::Equal,
        4 => Relation::NotEqual,
        5 => Relation::Greater,
        _ => Relation::Less,
    };
    Compare { key, relation, operand }
}

/// A key is changed at most once in a transaction: the store refuses more.
fn steps(worker: &mut Worker, memory: &Memory) -> Vec<Action> {
    let mut untouched: Vec<String> = (0..KEYS).map(|at| format!("{NAME}/{at}")).collect();
    let mut steps = Vec::new();
    for _ in 0..1 + worker.pick(3) {
        let key = untouched.swap_remove(worker.pick(untouched.len()));
        steps.push(match worker.pick(10) {
            0..5 => match put(worker, memory) {
                Action::Put { value, lease, prev_kv, .. } => Action::Put { key, value, lease, prev_kv },
                other => other,
            },
            5..7 => Action::Delete { span: Span::key(key), prev_kv: worker.chance(0.5) },
            _ => range(worker, memory),
        });
    }
    steps
}

/// Grants a lease when there is none; otherwise revokes it, or leaves it to expire.
fn lease(worker: &mut Worker, memory: &Memory) -> Call {
    if memory.lease != 0 && worker.chance(0.5) {
        return Call::LeaseRevoke { id: memory.lease };
    }
    let ttl_s = TTL_S.start() + worker.pick((TTL_S.end() - TTL_S.start() + 1) as usize) as i64;
    // No other workload draws ids from here.
    Call::LeaseGrant { id: (1 << 40) + worker.number() as i64, ttl_s }
}
