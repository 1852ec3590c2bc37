//! Requests between the wire and the crate's own values.
//!
//! What comes in is checked here and nowhere else: a request that converts
//! means something, whatever the state is. The messages are etcd's, because
//! its clients compare them. Request keys always become keys of the space
//! [`Space::User`]; no request can name another.

use bytes::Bytes;
use thiserror::Error;

use super::convert_txn;
use super::etcdserverpb as pb;
use super::etcdserverpb::range_request::{SortOrder as PbOrder, SortTarget as PbTarget};
use crate::types::{
    DeleteRange, KeyRange, LeaseId, Put, RangeQuery, Revision, SortOrder, SortTarget, Space, Txn,
};

/// A request that is refused whatever the state is. Nothing was proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidRequest {
    /// A key is empty.
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    /// A step of a transaction is empty. etcd says it with these words.
    #[error("etcdserver: key not found")]
    EmptyStep,
    /// A value beside `ignore_value`.
    #[error("etcdserver: value is provided")]
    ValueProvided,
    /// A lease beside `ignore_lease`.
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    /// A transaction with more comparisons or steps than are allowed.
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    /// A transaction that would change a key twice.
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    /// An order or a field to sort by that does not exist.
    #[error("etcdserver: invalid sort option")]
    SortOption,
    /// A comparison or a field to compare that does not exist.
    #[error("mainstay: a comparison of the txn request is of an unknown kind")]
    Comparison,
    /// A streamed range that would have to be sorted. The one code for it and
    /// the next is "unimplemented"; all others are invalid arguments.
    #[error("RangeStream does not support custom sort orders")]
    StreamSorted,
    /// A streamed range with bounds on revisions.
    #[error("RangeStream does not support revision filters")]
    StreamFiltered,
}

impl InvalidRequest {
    /// Whether the request is well formed and only not served.
    pub fn is_unimplemented(self) -> bool {
        matches!(self, InvalidRequest::StreamSorted | InvalidRequest::StreamFiltered)
    }
}

/// What a Range asks. Whether it is serializable is not the query's to say:
/// look at the request.
///
/// # Errors
/// [`InvalidRequest::EmptyKey`] and [`InvalidRequest::SortOption`].
pub fn range_query(request: pb::RangeRequest) -> Result<RangeQuery, InvalidRequest> {
    if request.key.is_empty() {
        return Err(InvalidRequest::EmptyKey);
    }
    let sort_order = match PbOrder::try_from(request.sort_order) {
        Ok(PbOrder::None) => SortOrder::None,
        Ok(PbOrder::Ascend) => SortOrder::Ascend,
        Ok(PbOrder::Descend) => SortOrder::Descend,
        Err(_) => return Err(InvalidRequest::SortOption),
    };
    let sort_target = match PbTarget::try_from(request.sort_target) {
        Ok(PbTarget::Key) => SortTarget::Key,
        Ok(PbTarget::Version) => SortTarget::Version,
        Ok(PbTarget::Create) => SortTarget::Create,
        Ok(PbTarget::Mod) => SortTarget::Mod,
        Ok(PbTarget::Value) => SortTarget::Value,
        Err(_) => return Err(InvalidRequest::SortOption),
    };
    Ok(RangeQuery {
        space: Space::User,
        range: KeyRange::from_wire(request.key, request.range_end),
        // etcd reads negative numbers as zero here, and as themselves below.
        revision: Revision(request.revision.max(0)),
        limit: u64::try_from(request.limit).unwrap_or(0),
        keys_only: request.keys_only,
        count_only: request.count_only,
        sort_target,
        sort_order,
        min_mod_revision: Revision(request.min_mod_revision),
        max_mod_revision: Revision(request.max_mod_revision),
        min_create_revision: Revision(request.min_create_revision),
        max_create_revision: Revision(request.max_create_revision),
    })
}

/// What a RangeStream asks: what a Range may, in key order and unfiltered.
///
/// # Errors
/// Those of [`range_query`], [`InvalidRequest::StreamSorted`] and
/// [`InvalidRequest::StreamFiltered`].
pub fn range_stream_query(request: pb::RangeRequest) -> Result<RangeQuery, InvalidRequest> {
    let query = range_query(request)?;
    let in_key_order = match query.sort_order {
        SortOrder::None => true,
        SortOrder::Ascend => query.sort_target == SortTarget::Key,
        SortOrder::Descend => false,
    };
    if !in_key_order {
        return Err(InvalidRequest::StreamSorted);
    }
    let bounds = [
        query.min_mod_revision,
        query.max_mod_revision,
        query.min_create_revision,
        query.max_create_revision,
    ];
    if bounds.iter().any(|bound| bound.0 != 0) {
        return Err(InvalidRequest::StreamFiltered);
    }
    Ok(query)
}

/// What a Put asks.
///
/// # Errors
/// [`InvalidRequest::EmptyKey`], [`InvalidRequest::ValueProvided`] and
/// [`InvalidRequest::LeaseProvided`].
pub fn put(request: pb::PutRequest) -> Result<Put, InvalidRequest> {
    if request.key.is_empty() {
        return Err(InvalidRequest::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(InvalidRequest::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(InvalidRequest::LeaseProvided);
    }
    Ok(Put {
        space: Space::User,
        key: request.key,
        value: request.value,
        lease: LeaseId(request.lease),
        prev_kv: request.prev_kv,
        ignore_value: request.ignore_value,
        ignore_lease: request.ignore_lease,
    })
}

/// What a DeleteRange asks.
///
/// # Errors
/// [`InvalidRequest::EmptyKey`].
pub fn delete_range(request: pb::DeleteRangeRequest) -> Result<DeleteRange, InvalidRequest> {
    if request.key.is_empty() {
        return Err(InvalidRequest::EmptyKey);
    }
    Ok(DeleteRange {
        space: Space::User,
        range: KeyRange::from_wire(request.key, request.range_end),
        prev_kv: request.prev_kv,
    })
}

/// What a Txn asks. A list of comparisons or steps may be as long as
/// `max_ops`; what the longest takes is no longer there for transactions inside.
///
/// # Errors
/// Those of the steps, and [`InvalidRequest::TooManyOps`],
/// [`InvalidRequest::EmptyStep`], [`InvalidRequest::Comparison`] and
/// [`InvalidRequest::DuplicateKey`].
pub fn txn(request: pb::TxnRequest, max_ops: usize) -> Result<Txn, InvalidRequest> {
    convert_txn::checked(request, max_ops)
}

/// The keys that a watch is on. Unlike the others it may leave the key out,
/// which then means the first key there can be.
pub fn watch_range(key: Bytes, range_end: Bytes) -> KeyRange {
    let key = if key.is_empty() { Bytes::from_static(&[0]) } else { key };
    KeyRange::from_wire(key, range_end)
}

/// etcd's pair of `key` and `range_end` for a range.
pub fn wire_range(range: KeyRange) -> (Bytes, Bytes) {
    match range {
        KeyRange::Single(key) => (key, Bytes::new()),
        KeyRange::Span { start, end } => (start, end),
        KeyRange::From(start) => (start, Bytes::from_static(&[0])),
    }
}

/// The request of a query.
pub fn range_request(query: RangeQuery, serializable: bool) -> pb::RangeRequest {
    let (key, range_end) = wire_range(query.range);
    let sort_order = match query.sort_order {
        SortOrder::None => PbOrder::None,
        SortOrder::Ascend => PbOrder::Ascend,
        SortOrder::Descend => PbOrder::Descend,
    };
    let sort_target = match query.sort_target {
        SortTarget::Key => PbTarget::Key,
        SortTarget::Version => PbTarget::Version,
        SortTarget::Create => PbTarget::Create,
        SortTarget::Mod => PbTarget::Mod,
        SortTarget::Value => PbTarget::Value,
    };
    pb::RangeRequest {
        key,
        range_end,
        limit: i64::try_from(query.limit).unwrap_or(i64::MAX),
        revision: query.revision.0,
        sort_order: sort_order.into(),
        sort_target: sort_target.into(),
        serializable,
        keys_only: query.keys_only,
        count_only: query.count_only,
        min_mod_revision: query.min_mod_revision.0,
        max_mod_revision: query.max_mod_revision.0,
        min_create_revision: query.min_create_revision.0,
        max_create_revision: query.max_create_revision.0,
    }
}

/// The request of a put.
pub fn put_request(put: Put) -> pb::PutRequest {
    pb::PutRequest {
        key: put.key,
        value: put.value,
        lease: put.lease.0,
        prev_kv: put.prev_kv,
        ignore_value: put.ignore_value,
        ignore_lease: put.ignore_lease,
    }
}

/// The request of a delete.
pub fn delete_range_request(delete: DeleteRange) -> pb::DeleteRangeRequest {
    let (key, range_end) = wire_range(delete.range);
    pb::DeleteRangeRequest { key, range_end, prev_kv: delete.prev_kv }
}

/// The request of a transaction.
pub fn txn_request(txn: Txn) -> pb::TxnRequest {
    convert_txn::request(txn)
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
