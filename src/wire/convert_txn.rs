//! Transactions between the wire and the crate's own values, with the two
//! checks that look at a transaction as a whole: its size, and that it changes
//! no key twice.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;

use super::convert::{self, InvalidRequest, wire_range};
use super::etcdserverpb as pb;
use super::etcdserverpb::compare::{CompareResult, CompareTarget as PbTarget, TargetUnion};
use super::etcdserverpb::request_op::Request;
use crate::types::{Compare, CompareOp, CompareTarget, KeyRange, Space, Txn, TxnOp};

/// A transaction that has passed all checks.
pub(super) fn checked(request: pb::TxnRequest, max_ops: usize) -> Result<Txn, InvalidRequest> {
    let txn = from_wire(request, max_ops)?;
    changes(&txn.success)?;
    changes(&txn.failure)?;
    Ok(txn)
}

fn from_wire(request: pb::TxnRequest, max_ops: usize) -> Result<Txn, InvalidRequest> {
    let longest = request.compare.len().max(request.success.len()).max(request.failure.len());
    let Some(left) = max_ops.checked_sub(longest) else { return Err(InvalidRequest::TooManyOps) };
    let steps = |list: Vec<pb::RequestOp>| -> Result<Vec<TxnOp>, InvalidRequest> {
        list.into_iter().map(|step| step_from_wire(step, left)).collect()
    };
    Ok(Txn {
        compare: request.compare.into_iter().map(compare_from_wire).collect::<Result<_, _>>()?,
        success: steps(request.success)?,
        failure: steps(request.failure)?,
    })
}

fn step_from_wire(step: pb::RequestOp, max_ops: usize) -> Result<TxnOp, InvalidRequest> {
    Ok(match step.request.ok_or(InvalidRequest::EmptyStep)? {
        Request::RequestRange(range) => TxnOp::Range(convert::range_query(range)?),
        Request::RequestPut(put) => TxnOp::Put(convert::put(put)?),
        Request::RequestDeleteRange(delete) => TxnOp::DeleteRange(convert::delete_range(delete)?),
        Request::RequestTxn(txn) => TxnOp::Txn(from_wire(txn, max_ops)?),
    })
}

fn compare_from_wire(compare: pb::Compare) -> Result<Compare, InvalidRequest> {
    if compare.key.is_empty() {
        return Err(InvalidRequest::EmptyKey);
    }
    let op = match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => CompareOp::Equal,
        Ok(CompareResult::Greater) => CompareOp::Greater,
        Ok(CompareResult::Less) => CompareOp::Less,
        Ok(CompareResult::NotEqual) => CompareOp::NotEqual,
        Err(_) => return Err(InvalidRequest::Comparison),
    };
    // A given value of another field than the one compared counts as none
    // given, which is zero; that is how etcd reads it.
    let given = compare.target_union;
    let target = match (PbTarget::try_from(compare.target), given) {
        (Ok(PbTarget::Version), Some(TargetUnion::Version(version))) => CompareTarget::Version(version),
        (Ok(PbTarget::Version), _) => CompareTarget::Version(0),
        (Ok(PbTarget::Create), Some(TargetUnion::CreateRevision(revision))) => {
            CompareTarget::Create(revision)
        }
        (Ok(PbTarget::Create), _) => CompareTarget::Create(0),
        (Ok(PbTarget::Mod), Some(TargetUnion::ModRevision(revision))) => CompareTarget::Mod(revision),
        (Ok(PbTarget::Mod), _) => CompareTarget::Mod(0),
        (Ok(PbTarget::Value), Some(TargetUnion::Value(value))) => CompareTarget::Value(value),
        (Ok(PbTarget::Value), _) => CompareTarget::Value(Bytes::new()),
        (Ok(PbTarget::Lease), Some(TargetUnion::Lease(lease))) => CompareTarget::Lease(lease),
        (Ok(PbTarget::Lease), _) => CompareTarget::Lease(0),
        (Err(_), _) => return Err(InvalidRequest::Comparison),
    };
    let range = KeyRange::from_wire(compare.key, compare.range_end);
    Ok(Compare { space: Space::User, range, op, target })
}

/// The wire form of a transaction.
pub(super) fn request(txn: Txn) -> pb::TxnRequest {
    let steps = |list: Vec<TxnOp>| list.into_iter().map(step_to_wire).collect();
    pb::TxnRequest {
        compare: txn.compare.into_iter().map(compare_to_wire).collect(),
        success: steps(txn.success),
        failure: steps(txn.failure),
    }
}

fn step_to_wire(step: TxnOp) -> pb::RequestOp {
    let request = match step {
        TxnOp::Range(query) => Request::RequestRange(convert::range_request(query, false)),
        TxnOp::Put(put) => Request::RequestPut(convert::put_request(put)),
        TxnOp::DeleteRange(delete) => Request::RequestDeleteRange(convert::delete_range_request(delete)),
        TxnOp::Txn(txn) => Request::RequestTxn(request(txn)),
    };
    pb::RequestOp { request: Some(request) }
}

fn compare_to_wire(compare: Compare) -> pb::Compare {
    let result = match compare.op {
        CompareOp::Equal => CompareResult::Equal,
        CompareOp::Greater => CompareResult::Greater,
        CompareOp::Less => CompareResult::Less,
        CompareOp::NotEqual => CompareResult::NotEqual,
    };
    let (target, given) = match compare.target {
        CompareTarget::Version(version) => (PbTarget::Version, TargetUnion::Version(version)),
        CompareTarget::Create(revision) => (PbTarget::Create, TargetUnion::CreateRevision(revision)),
        CompareTarget::Mod(revision) => (PbTarget::Mod, TargetUnion::ModRevision(revision)),
        CompareTarget::Value(value) => (PbTarget::Value, TargetUnion::Value(value)),
        CompareTarget::Lease(lease) => (PbTarget::Lease, TargetUnion::Lease(lease)),
    };
    let (key, range_end) = wire_range(compare.range);
    pb::Compare { result: result.into(), target: target.into(), key, range_end, target_union: Some(given) }
}

/// What a list of steps may set and remove, whichever branches are taken.
#[derive(Default)]
struct Changes {
    /// Each key that may be set, with the step of the list that does it.
    puts: BTreeMap<Bytes, usize>,
    /// What may be removed, for each step of the list that removes.
    removals: Vec<(Vec<Removal>, usize)>,
}

/// Keys that may be removed; never an empty range.
struct Removal {
    start: Bytes,
    /// The end, exclusive, if there is one.
    end: Option<Bytes>,
}

/// Checks that no two steps of a list change one key in one revision: history
/// holds one change of a key per revision, and a watcher would not know which
/// came last. Only removing a key twice is harmless.
///
/// The two branches of a transaction inside exclude each other and are not
/// held against each other. etcd overlooks two corners that are refused here: a
/// removal without an end, and one in a later transaction inside than the put.
///
/// What one step removes is merged before it is held against what is set, so
/// that the time grows with the request and not with its square.
fn changes(steps: &[TxnOp]) -> Result<Changes, InvalidRequest> {
    let mut all = Changes::default();
    for (index, step) in steps.iter().enumerate() {
        match step {
            TxnOp::Range(_) => {}
            TxnOp::Put(put) => all.set(BTreeMap::from([(put.key.clone(), index)]), index)?,
            TxnOp::DeleteRange(delete) => {
                all.removals.extend(Removal::of(&delete.range).map(|removal| (vec![removal], index)));
            }
            TxnOp::Txn(txn) => {
                let (mut success, mut failure) = (changes(&txn.success)?, changes(&txn.failure)?);
                success.puts.append(&mut failure.puts);
                all.set(success.puts, index)?;
                let removals = success.removals.into_iter().chain(failure.removals);
                all.removals.push((merged(removals.flat_map(|(removals, _)| removals).collect()), index));
            }
        }
    }
    for (removals, remover) in &all.removals {
        for removal in removals {
            let mut hit = all.puts.range::<[u8], _>(removal.bounds());
            if hit.any(|(_, setter)| setter != remover) {
                return Err(InvalidRequest::DuplicateKey);
            }
        }
    }
    Ok(all)
}

impl Changes {
    /// Adds what one step sets.
    fn set(&mut self, mut puts: BTreeMap<Bytes, usize>, step: usize) -> Result<(), InvalidRequest> {
        puts.values_mut().for_each(|setter| *setter = step);
        // The fewer go to the more.
        if puts.len() > self.puts.len() {
            std::mem::swap(&mut puts, &mut self.puts);
        }
        for (key, setter) in puts {
            if self.puts.insert(key, setter).is_some() {
                return Err(InvalidRequest::DuplicateKey);
            }
        }
        Ok(())
    }
}

impl Removal {
    /// `None` for a range that no key can be in.
    fn of(range: &KeyRange) -> Option<Removal> {
        let end = match range {
            KeyRange::Single(key) => Some([&key[..], &[0]].concat().into()),
            KeyRange::Span { end, .. } => Some(end.clone()),
            KeyRange::From(_) => None,
        };
        (!range.is_empty()).then(|| Removal { start: range.start().clone(), end })
    }

    fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        (Bound::Included(&self.start), self.end.as_deref().map_or(Bound::Unbounded, Bound::Excluded))
    }
}

/// The same keys in the fewest ranges, in their order.
fn merged(mut removals: Vec<Removal>) -> Vec<Removal> {
    removals.sort_by(|a, b| a.start.cmp(&b.start));
    let mut merged: Vec<Removal> = Vec::new();
    for removal in removals {
        let Some(last) = merged.last_mut() else {
            merged.push(removal);
            continue;
        };
        let Some(end) = &last.end else { break };
        if removal.start > *end {
            merged.push(removal);
        } else if removal.end.as_ref().is_none_or(|later| later > end) {
            last.end = removal.end;
        }
    }
    merged
}
