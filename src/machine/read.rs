//! Transactions that only read, answered from a view, without the log.

use std::ops::ControlFlow;

use super::txn::matches;
use crate::mvcc::{self, Keys, ReadError, View};
use crate::types::{ApplyError, Compare, KeyValue, Txn, TxnOp, TxnOpReply, TxnReply};

/// Whether a transaction can change nothing, whichever branches it takes.
pub fn is_read_only(txn: &Txn) -> bool {
    txn.success.iter().chain(&txn.failure).all(|op| match op {
        TxnOp::Range(_) => true,
        TxnOp::Txn(inner) => is_read_only(inner),
        TxnOp::Put(_) | TxnOp::DeleteRange(_) => false,
    })
}

/// Does what [`super::Machine`] would do with a transaction that
/// [`is_read_only`]. Its ranges may collect `budget_bytes` together.
///
/// # Errors
/// What a range inside is refused for, and storage errors.
pub fn read_txn(view: &View, txn: &Txn, budget_bytes: usize) -> Result<TxnReply, ReadError> {
    let mut left = budget_bytes;
    run(view, txn, budget_bytes, &mut left)
}

fn run(view: &View, txn: &Txn, budget_bytes: usize, left: &mut usize) -> Result<TxnReply, ReadError> {
    let mut succeeded = true;
    for compare in &txn.compare {
        succeeded = succeeded && holds(view, compare)?;
    }
    let mut responses = Vec::new();
    for op in if succeeded { &txn.success } else { &txn.failure } {
        responses.push(match op {
            TxnOp::Range(query) => {
                let reply = mvcc::range(&view.data, view.marks(query.space), query, *left);
                let reply = reply.map_err(|error| whole_budget(error, budget_bytes))?;
                let used: usize = reply.kvs.iter().map(KeyValue::footprint).sum();
                *left = left.saturating_sub(used);
                TxnOpReply::Range(reply)
            }
            TxnOp::Txn(inner) => TxnOpReply::Txn(run(view, inner, budget_bytes, left)?),
            TxnOp::Put(_) | TxnOp::DeleteRange(_) => unreachable!("the caller checked that it only reads"),
        });
    }
    Ok(TxnReply { succeeded, responses })
}

/// The limit told is the whole transaction's, not what its last range had left.
fn whole_budget(error: ReadError, budget_bytes: usize) -> ReadError {
    match error {
        ReadError::Refused(ApplyError::ReplyTooLarge { .. }) => {
            ReadError::Refused(ApplyError::ReplyTooLarge { limit_bytes: budget_bytes as u64 })
        }
        other => other,
    }
}

fn holds(view: &View, compare: &Compare) -> Result<bool, ReadError> {
    let mut holds = None;
    view.data.visit(compare.space, &compare.range, &mut |_, found| {
        let matched = matches(compare, Some(&found.record()?));
        holds = Some(matched);
        Ok(if matched { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    Ok(holds.unwrap_or_else(|| matches(compare, None)))
}
