//! List-append: transactions over one to four lists, guarded by the revisions at
//! which the lists were read.
//!
//! Claim: appending transactions are strictly serializable. A list that is full
//! is left for a fresh one, because every append writes the whole list.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::crew::{self, WORKERS, Worker};
use super::{Work, Workload};
use crate::context::Context;
use crate::judge::append;
use crate::judge::history::{
    Action, ActionReply, Body, Call, Compare, History, Kv, Operand, Outcome, Relation, Span, Txn,
};
use crate::judge::verdict::Verdict;

const NAME: &str = "append";
/// Lists in use at a time.
const LISTS: usize = 5;
/// Elements of a list after which the next one takes its place.
const ELEMENTS_MAX: usize = 60;
/// Most lists of one transaction.
const LISTS_OF_TXN_MAX: usize = 4;

/// The workload.
#[derive(Default)]
pub struct Append {
    generations: Arc<Generations>,
}

/// Which list is in use at each place. A full one is followed by the next.
#[derive(Default)]
struct Generations([AtomicU32; LISTS]);

impl Generations {
    fn key(&self, place: usize) -> String {
        format!("{NAME}/{place}.{}", self.0[place].load(Ordering::Relaxed))
    }

    /// Goes on to the next list if this one is full.
    fn note(&self, kv: &Kv) {
        let parts = kv.key.strip_prefix("append/").and_then(|rest| rest.split_once('.'));
        let Some((place, generation)) = parts else { return };
        let (Ok(place), Ok(generation)) = (place.parse::<usize>(), generation.parse::<u32>()) else { return };
        if place < LISTS && kv.value.split(',').count() >= ELEMENTS_MAX {
            // Another worker may have gone on already.
            let next = generation + 1;
            let _ = self.0[place].compare_exchange(generation, next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

impl Workload for Append {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        let generations = Arc::clone(&self.generations);
        crew::drive(context, NAME, WORKERS, move |worker| work(worker, Arc::clone(&generations)))
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        let generations = Arc::clone(&self.generations);
        Box::pin(async move {
            for place in 0..LISTS {
                for generation in 0..=generations.0[place].load(Ordering::Relaxed) {
                    let key = format!("{NAME}/{place}.{generation}");
                    crew::read_finally(&context, NAME, Span::key(key)).await?;
                }
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        append::check(history, NAME)
    }
}

async fn work(mut worker: Worker, generations: Arc<Generations>) -> anyhow::Result<()> {
    while worker.turn(2).await {
        let keys = draw_keys(&mut worker, &generations);
        let reads = keys.iter().map(|key| read(key)).collect();
        let look = Call::Txn(Txn { success: reads, ..Txn::default() });
        let Some(mut seen) = lists(&worker.client.call(look).await, keys.len()) else { continue };
        seen.iter().flatten().for_each(|kv| generations.note(kv));
        // One in five only reads. The others try again once with what the failure showed.
        let attempts = if worker.chance(0.2) { 0 } else { 2 };
        for _ in 0..attempts {
            let txn = append(&mut worker, &keys, &seen);
            let outcome = worker.client.call(Call::Txn(txn)).await;
            match lists(&outcome, keys.len()) {
                Some(now) if crew::succeeded(&outcome) == Some(false) => seen = now,
                _ => break,
            }
        }
    }
    Ok(())
}

/// One to four keys, each once.
fn draw_keys(worker: &mut Worker, generations: &Generations) -> Vec<String> {
    let count = 1 + worker.pick(LISTS_OF_TXN_MAX);
    let first = worker.pick(LISTS);
    (0..count).map(|step| generations.key((first + step) % LISTS)).collect()
}

fn read(key: &str) -> Action {
    Action::Range { span: Span::key(key), revision: 0, limit: 0 }
}

/// What a transaction of nothing but reads, one a key, saw in each key.
fn lists(outcome: &Outcome, keys: usize) -> Option<Vec<Option<Kv>>> {
    let Outcome::Ok(reply) = outcome else { return None };
    let Body::Txn { replies, .. } = &reply.body else { return None };
    let seen: Vec<Option<Kv>> = replies
        .iter()
        .filter_map(|reply| match reply {
            ActionReply::Range { kvs, .. } => Some(kvs.first().cloned()),
            ActionReply::Put { .. } | ActionReply::Delete { .. } => None,
        })
        .collect();
    (seen.len() == keys && replies.len() == keys).then_some(seen)
}

/// Appends to at least one of the lists and reads the others, if none has changed since it was seen.
fn append(worker: &mut Worker, keys: &[String], seen: &[Option<Kv>]) -> Txn {
    let guard = |(key, seen): (&String, &Option<Kv>)| Compare {
        key: key.clone(),
        relation: Relation::Equal,
        operand: Operand::ModRevision(seen.as_ref().map_or(0, |kv| kv.mod_revision)),
    };
    let compares = keys.iter().zip(seen).map(guard).collect();
    let always = worker.pick(keys.len());
    let mut success = Vec::new();
    for (at, key) in keys.iter().enumerate() {
        let appends = at == always || worker.chance(0.5);
        if !appends || worker.chance(0.3) {
            success.push(read(key));
        }
        if appends {
            let element = worker.number();
            let value = match &seen[at] {
                Some(kv) => format!("{},{element}", kv.value),
                None => element.to_string(),
            };
            success.push(Action::Put { key: key.clone(), value, lease: 0, prev_kv: false });
        }
    }
    Txn { compares, success, failure: keys.iter().map(|key| read(key)).collect() }
}
