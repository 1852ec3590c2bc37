//! Replies and events between the crate's own values and the wire.
//!
//! Keys and values are shared bytes: nothing here copies them. Headers come
//! from the caller, who knows the cluster, the member and the term.

use thiserror::Error;

use super::etcdserverpb as pb;
use super::etcdserverpb::response_op::Response;
use super::mvccpb;
use crate::types::{
    Event, EventKind, KeyValue, LeaseId, Outcome, RangeReply, Revision, Space, TxnOpReply, TxnReply,
};

/// A reply that is not one to the request.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UnexpectedOutcome {
    /// The request is a repetition whose reply was too large to be kept.
    #[error("mainstay: the request was applied before, at revision {revision}; its reply is no longer kept")]
    AppliedBefore {
        /// Where it was applied.
        revision: Revision,
    },
    /// The state machine answered something else. A bug.
    #[error("mainstay: internal error: {request} was answered with {outcome}")]
    Mismatch {
        /// The request.
        request: &'static str,
        /// The answer.
        outcome: String,
    },
}

fn unexpected(request: &'static str, outcome: Outcome) -> UnexpectedOutcome {
    match outcome {
        Outcome::AppliedBefore(before) => UnexpectedOutcome::AppliedBefore { revision: before.revision },
        other => UnexpectedOutcome::Mismatch { request, outcome: format!("{other:?}") },
    }
}

/// The response to a Range.
pub fn range_response(header: pb::ResponseHeader, reply: RangeReply) -> pb::RangeResponse {
    pb::RangeResponse {
        header: Some(header),
        kvs: reply.kvs.into_iter().map(key_value).collect(),
        more: reply.more,
        count: i64::try_from(reply.count).unwrap_or(i64::MAX),
    }
}

/// The response to a Put.
///
/// # Errors
/// [`UnexpectedOutcome`] if the outcome is not a put's.
pub fn put_response(
    header: pb::ResponseHeader,
    outcome: Outcome,
) -> Result<pb::PutResponse, UnexpectedOutcome> {
    match outcome {
        Outcome::Put { prev } => Ok(put_reply(header, prev)),
        other => Err(unexpected("a put", other)),
    }
}

/// The response to a DeleteRange.
///
/// # Errors
/// [`UnexpectedOutcome`] if the outcome is not a delete's.
pub fn delete_range_response(
    header: pb::ResponseHeader,
    outcome: Outcome,
) -> Result<pb::DeleteRangeResponse, UnexpectedOutcome> {
    match outcome {
        Outcome::DeleteRange { deleted, prev } => Ok(delete_reply(header, deleted, prev)),
        other => Err(unexpected("a delete", other)),
    }
}

/// The response to a Txn. The responses inside carry the revision alone in
/// their headers, as etcd's do.
///
/// # Errors
/// [`UnexpectedOutcome`] if the outcome is not a transaction's.
pub fn txn_response(
    header: pb::ResponseHeader,
    outcome: Outcome,
) -> Result<pb::TxnResponse, UnexpectedOutcome> {
    match outcome {
        Outcome::Txn(reply) => Ok(txn_reply(header, reply)),
        other => Err(unexpected("a transaction", other)),
    }
}

fn put_reply(header: pb::ResponseHeader, prev: Option<KeyValue>) -> pb::PutResponse {
    pb::PutResponse { header: Some(header), prev_kv: prev.map(key_value) }
}

fn delete_reply(header: pb::ResponseHeader, deleted: u64, prev: Vec<KeyValue>) -> pb::DeleteRangeResponse {
    pb::DeleteRangeResponse {
        header: Some(header),
        deleted: i64::try_from(deleted).unwrap_or(i64::MAX),
        prev_kvs: prev.into_iter().map(key_value).collect(),
    }
}

fn txn_reply(header: pb::ResponseHeader, reply: TxnReply) -> pb::TxnResponse {
    let inner = pb::ResponseHeader { revision: header.revision, ..Default::default() };
    let response = |step: TxnOpReply| match step {
        TxnOpReply::Range(range) => Response::ResponseRange(range_response(inner, range)),
        TxnOpReply::Put { prev } => Response::ResponsePut(put_reply(inner, prev)),
        TxnOpReply::DeleteRange { deleted, prev } => {
            Response::ResponseDeleteRange(delete_reply(inner, deleted, prev))
        }
        TxnOpReply::Txn(txn) => Response::ResponseTxn(txn_reply(inner, txn)),
    };
    let responses = reply.responses.into_iter().map(|step| pb::ResponseOp { response: Some(response(step)) });
    pb::TxnResponse { header: Some(header), succeeded: reply.succeeded, responses: responses.collect() }
}

/// A key for the wire.
pub fn key_value(kv: KeyValue) -> mvccpb::KeyValue {
    mvccpb::KeyValue {
        key: kv.key,
        create_revision: kv.create_revision.0,
        mod_revision: kv.mod_revision.0,
        version: kv.version,
        value: kv.value,
        lease: kv.lease.0,
    }
}

/// An event for the wire, with the key before only if `prev_kv` asks for it.
pub fn event(event: &Event, prev_kv: bool) -> mvccpb::Event {
    let kind = match event.kind {
        EventKind::Put => mvccpb::event::EventType::Put,
        EventKind::Delete => mvccpb::event::EventType::Delete,
    };
    let prev = if prev_kv { event.prev.clone().map(key_value) } else { None };
    mvccpb::Event { r#type: kind.into(), kv: Some(key_value(event.kv.clone())), prev_kv: prev }
}

/// A key from the wire.
pub fn key_value_from_wire(kv: mvccpb::KeyValue) -> KeyValue {
    KeyValue {
        key: kv.key,
        create_revision: Revision(kv.create_revision),
        mod_revision: Revision(kv.mod_revision),
        version: kv.version,
        lease: LeaseId(kv.lease),
        value: kv.value,
    }
}

/// An event from the wire; `None` for one of an unknown kind or without a key.
pub fn event_from_wire(event: mvccpb::Event) -> Option<Event> {
    let kind = match event.r#type() {
        mvccpb::event::EventType::Put if event.r#type == 0 => EventKind::Put,
        mvccpb::event::EventType::Put => return None,
        mvccpb::event::EventType::Delete => EventKind::Delete,
    };
    Some(Event {
        space: Space::User,
        kind,
        kv: key_value_from_wire(event.kv?),
        prev: event.prev_kv.map(key_value_from_wire),
    })
}

/// What a range gave.
pub fn range_reply_from_wire(response: pb::RangeResponse) -> RangeReply {
    RangeReply {
        kvs: response.kvs.into_iter().map(key_value_from_wire).collect(),
        more: response.more,
        count: u64::try_from(response.count).unwrap_or(0),
    }
}

/// What a transaction gave; `None` if a response inside is of an unknown kind.
pub fn txn_reply_from_wire(response: pb::TxnResponse) -> Option<TxnReply> {
    let step = |op: pb::ResponseOp| {
        Some(match op.response? {
            Response::ResponseRange(range) => TxnOpReply::Range(range_reply_from_wire(range)),
            Response::ResponsePut(put) => TxnOpReply::Put { prev: put.prev_kv.map(key_value_from_wire) },
            Response::ResponseDeleteRange(delete) => TxnOpReply::DeleteRange {
                deleted: u64::try_from(delete.deleted).unwrap_or(0),
                prev: delete.prev_kvs.into_iter().map(key_value_from_wire).collect(),
            },
            Response::ResponseTxn(txn) => TxnOpReply::Txn(txn_reply_from_wire(txn)?),
        })
    };
    let responses = response.responses.into_iter().map(step).collect::<Option<_>>()?;
    Some(TxnReply { succeeded: response.succeeded, responses })
}
