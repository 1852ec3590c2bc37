//! What puts, deletes and transactions do.
//!
//! A transaction is checked whole against the state before it, and only then
//! done: what can be refused is refused before anything is changed. The one
//! refusal in the middle, an answer that grows too large, undoes the rest.

use std::ops::ControlFlow;

use super::chunk::{Layers, Transaction, key_value};
use super::{ApplyFailure, Machine, REPLY_BYTES_MAX};
use crate::mvcc::{self, Keys, Marks};

use crate::storage::layout::Record;
use crate::types::{
    ApplyError, Compare, CompareOp, CompareTarget, DeleteRange, KeyValue, Put, RangeQuery, RangeReply, Txn,
    TxnOp, TxnOpReply, TxnReply,
};

impl Machine {
    /// Sets a key.
    pub(super) fn put(&mut self, tx: &mut Transaction, put: Put) -> Result<Option<KeyValue>, ApplyFailure> {
        let prev = self.layers().record(put.space, &put.key)?;
        let (create, version) = match &prev {
            Some(prev) => (prev.create, prev.version + 1),
            None => (tx.revision, 1),
        };
        let mut record =
            Record { create, modified: tx.revision, version, lease: put.lease, value: put.value };
        if put.ignore_value || put.ignore_lease {
            let prev = prev.as_ref().ok_or(ApplyError::KeyNotFound)?;
            if put.ignore_value {
                record.value = prev.value.clone();
            }
            if put.ignore_lease {
                record.lease = prev.lease;
            }
        }
        let reply = match &prev {
            Some(prev) if put.prev_kv => Some(key_value(put.key.clone(), prev.clone())),
            _ => None,
        };
        tx.returns(reply.as_slice())?;
        tx.change(&mut self.chunk, put.space, put.key, Some(record), prev);
        Ok(reply)
    }

    /// Removes keys; returns how many, and what they were if that is asked for.
    pub(super) fn delete_range(
        &mut self,
        tx: &mut Transaction,
        delete: &DeleteRange,
    ) -> Result<(u64, Vec<KeyValue>), ApplyFailure> {
        let mut found = Vec::new();
        self.layers().visit(delete.space, &delete.range, &mut |key, record| {
            found.push((bytes::Bytes::copy_from_slice(key), record.record()?));
            Ok(ControlFlow::Continue(()))
        })?;
        let deleted = found.len() as u64;
        let mut prev = Vec::new();
        for (key, record) in found {
            if delete.prev_kv {
                prev.push(key_value(key.clone(), record.clone()));
                tx.returns(&prev[prev.len() - 1..])?;
            }
            tx.change(&mut self.chunk, delete.space, key, None, Some(record));
        }
        Ok((deleted, prev))
    }

    /// Decides which branches a transaction takes, and refuses it if any step
    /// of them could not be done. Everything is judged by the state before it.
    pub(super) fn plan(&self, txn: &Txn) -> Result<Plan, ApplyFailure> {
        let mut succeeded = true;
        for compare in &txn.compare {
            succeeded = succeeded && self.holds(compare)?;
        }
        let mut nested = Vec::new();
        for op in if succeeded { &txn.success } else { &txn.failure } {
            match op {
                TxnOp::Range(query) => self.check_range(query)?,
                TxnOp::Put(put) => self.check_put(put)?,
                TxnOp::DeleteRange(_) => {}
                TxnOp::Txn(inner) => nested.push(self.plan(inner)?),
            }
        }
        Ok(Plan { succeeded, nested })
    }

    /// Does what was planned.
    pub(super) fn execute(
        &mut self,
        tx: &mut Transaction,
        txn: Txn,
        plan: Plan,
    ) -> Result<TxnReply, ApplyFailure> {
        let mut nested = plan.nested.into_iter();
        let mut responses = Vec::new();
        for op in if plan.succeeded { txn.success } else { txn.failure } {
            responses.push(match op {
                TxnOp::Range(query) => TxnOpReply::Range(self.read(tx, &query)?),
                TxnOp::Put(put) => TxnOpReply::Put { prev: self.put(tx, put)? },
                TxnOp::DeleteRange(delete) => {
                    let (deleted, prev) = self.delete_range(tx, &delete)?;
                    TxnOpReply::DeleteRange { deleted, prev }
                }
                TxnOp::Txn(inner) => {
                    let plan = nested.next().expect("one plan for each transaction inside");
                    TxnOpReply::Txn(self.execute(tx, inner, plan)?)
                }
            });
        }
        Ok(TxnReply { succeeded: plan.succeeded, responses })
    }

    /// Refuses a put that cannot be done: an unknown lease, or a key that must exist.
    pub(super) fn check_put(&self, put: &Put) -> Result<(), ApplyFailure> {
        if (put.ignore_value || put.ignore_lease) && self.layers().record(put.space, &put.key)?.is_none() {
            return Err(ApplyError::KeyNotFound.into());
        }
        if put.lease.is_some() && !self.leases.contains_key(&put.lease) {
            return Err(ApplyError::LeaseNotFound.into());
        }
        Ok(())
    }

    fn check_range(&self, query: &RangeQuery) -> Result<(), ApplyFailure> {
        if query.revision > self.state.revision {
            return Err(ApplyError::FutureRevision.into());
        }
        if query.revision.0 > 0 && query.revision < self.state.compacted(query.space) {
            return Err(ApplyError::Compacted.into());
        }
        Ok(())
    }

    /// A range inside a transaction: at the head it sees the transaction's own
    /// changes; at a revision it reads the disk, to which `apply` has written
    /// out everything before the transaction.
    fn read(&self, tx: &mut Transaction, query: &RangeQuery) -> Result<RangeReply, ApplyFailure> {
        let reply = if query.revision.0 <= 0 {
            mvcc::range_at_head(&self.layers(), query, REPLY_BYTES_MAX)?
        } else {
            let compacted = self.state.compacted(query.space);
            let marks = Marks { revision: self.state.revision, compacted };
            mvcc::range(&self.db, marks, query, REPLY_BYTES_MAX)?
        };
        tx.returns(&reply.kvs)?;
        Ok(reply)
    }

    fn holds(&self, compare: &Compare) -> Result<bool, ApplyFailure> {
        // A missing key, and a range without keys, are compared as absent.
        let mut holds = None;
        self.layers().visit(compare.space, &compare.range, &mut |_, found| {
            let matched = matches(compare, Some(&found.record()?));
            holds = Some(matched);
            Ok(if matched { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        Ok(holds.unwrap_or_else(|| matches(compare, None)))
    }

    pub(super) fn layers(&self) -> Layers<'_> {
        Layers { db: &self.db, chunk: &self.chunk }
    }
}

/// Which branch a transaction takes, and those inside that branch.
pub(super) struct Plan {
    succeeded: bool,
    nested: Vec<Plan>,
}

/// Whether a record (or its absence) is as the comparison wants it.
pub(super) fn matches(compare: &Compare, record: Option<&Record>) -> bool {
    let number = |field: fn(&Record) -> i64, target: i64| record.map_or(0, field).cmp(&target);
    let ordering = match &compare.target {
        CompareTarget::Version(target) => number(|record| record.version, *target),
        CompareTarget::Create(target) => number(|record| record.create.0, *target),
        CompareTarget::Mod(target) => number(|record| record.modified.0, *target),
        CompareTarget::Lease(target) => number(|record| record.lease.0, *target),
        CompareTarget::Value(target) => match record {
            Some(record) => record.value.cmp(target),
            None => return false,
        },
    };
    match compare.op {
        CompareOp::Equal => ordering.is_eq(),
        CompareOp::NotEqual => ordering.is_ne(),
        CompareOp::Greater => ordering.is_gt(),
        CompareOp::Less => ordering.is_lt(),
    }
}

/// Whether the transaction sets a key in either branch, which is what a full
/// store refuses.
pub(super) fn has_put(txn: &Txn) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match op {
        TxnOp::Put(_) => true,
        TxnOp::Txn(inner) => has_put(inner),
        TxnOp::Range(_) | TxnOp::DeleteRange(_) => false,
    })
}

/// Whether the transaction reads the past, which is on disk only.
pub(super) fn reads_past(txn: &Txn) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match op {
        TxnOp::Range(query) => query.revision.0 > 0,
        TxnOp::Txn(inner) => reads_past(inner),
        TxnOp::Put(_) | TxnOp::DeleteRange(_) => false,
    })
}
