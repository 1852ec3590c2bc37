//! Sets: elements are added to a key's list by compare-and-set.
//!
//! Claim: no element is lost, invented or brought back. A set that is full is
//! left for a fresh one, because every addition writes the whole set; all are
//! read at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::crew::{self, WORKERS, Worker};
use super::{Work, Workload};
use crate::context::Context;
use crate::judge::history::{
    Action, ActionReply, Body, Call, Compare, History, Kv, Operand, Outcome, Relation, Span, Txn,
};
use crate::judge::set;
use crate::judge::verdict::Verdict;

const NAME: &str = "set";
/// Elements after which the next set takes the place of this one.
const ELEMENTS_MAX: usize = 200;
/// How often an addition is tried before the element is given up.
const ATTEMPTS_MAX: usize = 3;

/// The workload.
#[derive(Default)]
pub struct Set {
    /// The number of the set in use.
    current: Arc<AtomicU32>,
}

impl Workload for Set {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        let current = Arc::clone(&self.current);
        crew::drive(context, NAME, WORKERS, move |worker| work(worker, Arc::clone(&current)))
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        let last = self.current.load(Ordering::Relaxed);
        Box::pin(async move {
            for number in 0..=last {
                crew::read_finally(&context, NAME, Span::key(key_name(number))).await?;
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        set::check(history, NAME)
    }
}

fn key_name(number: u32) -> String {
    format!("{NAME}/{number}")
}

async fn work(mut worker: Worker, current: Arc<AtomicU32>) -> anyhow::Result<()> {
    while worker.turn(2).await {
        let number = current.load(Ordering::Relaxed);
        let key = key_name(number);
        let Some(kvs) = worker.read(Span::key(key.clone())).await else { continue };
        let mut seen = kvs.into_iter().next();
        if seen.as_ref().is_some_and(|kv| kv.value.split(',').count() >= ELEMENTS_MAX) {
            // Another worker may have gone on already.
            let _ = current.compare_exchange(number, number + 1, Ordering::Relaxed, Ordering::Relaxed);
            continue;
        }
        let element = worker.number();
        for _ in 0..ATTEMPTS_MAX {
            let call = add(&mut worker, &key, seen.as_ref(), element);
            match refusal(&worker.client.call(call).await) {
                Some(now) => seen = now,
                // Done, or in doubt: another attempt could add it twice.
                None => break,
            }
        }
    }
    Ok(())
}

/// Adds an element if the set is still as it was seen.
fn add(worker: &mut Worker, key: &str, seen: Option<&Kv>, element: u64) -> Call {
    let operand = match seen {
        Some(kv) if worker.chance(0.5) => Operand::Value(kv.value.clone()),
        Some(kv) => Operand::ModRevision(kv.mod_revision),
        None => Operand::Version(0),
    };
    let value = match seen {
        Some(kv) => format!("{},{element}", kv.value),
        None => element.to_string(),
    };
    let put = Action::Put { key: key.to_owned(), value, lease: 0, prev_kv: false };
    let look = Action::Range { span: Span::key(key), revision: 0, limit: 0 };
    let compare = Compare { key: key.to_owned(), relation: Relation::Equal, operand };
    Call::Txn(Txn { compares: vec![compare], success: vec![put], failure: vec![look] })
}

/// What the set was instead, when that is why nothing was added.
fn refusal(outcome: &Outcome) -> Option<Option<Kv>> {
    let Outcome::Ok(reply) = outcome else { return None };
    match &reply.body {
        Body::Txn { succeeded: false, replies } => match replies.first() {
            Some(ActionReply::Range { kvs, .. }) => Some(kvs.first().cloned()),
            _ => None,
        },
        _ => None,
    }
}
