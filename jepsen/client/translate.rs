//! Between the history's words and the wire's. It decides nothing, and refuses
//! nothing: an answer that is not one to the call is told as such.

use mainstay::wire::etcdserverpb as pb;
use mainstay::wire::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use mainstay::wire::etcdserverpb::{request_op, response_op};
use mainstay::wire::mvccpb;

use crate::judge::history::{
    Action, ActionReply, Body, Compare, Event, EventKind, Kv, Operand, Relation, Reply, Span, Txn,
};

/// An answer that is not one to the call.
pub struct Nonsense(pub String);

pub fn range(span: &Span, revision: i64, limit: i64, serializable: bool) -> pb::RangeRequest {
    pb::RangeRequest {
        key: span.key.clone().into(),
        range_end: end(span),
        revision,
        limit,
        serializable,
        ..Default::default()
    }
}

pub fn put(key: &str, value: &str, lease: i64, prev_kv: bool) -> pb::PutRequest {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    pb::PutRequest { key, value, lease, prev_kv, ..Default::default() }
}

pub fn delete(span: &Span, prev_kv: bool) -> pb::DeleteRangeRequest {
    pb::DeleteRangeRequest { key: span.key.clone().into(), range_end: end(span), prev_kv }
}

pub fn txn(txn: &Txn) -> pb::TxnRequest {
    pb::TxnRequest {
        compare: txn.compares.iter().map(compare).collect(),
        success: txn.success.iter().map(step).collect(),
        failure: txn.failure.iter().map(step).collect(),
    }
}

/// The wire's end of a range: empty for one key.
pub fn end(span: &Span) -> bytes::Bytes {
    span.end.clone().unwrap_or_default().into()
}

fn compare(compare: &Compare) -> pb::Compare {
    let result = match compare.relation {
        Relation::Equal => CompareResult::Equal,
        Relation::NotEqual => CompareResult::NotEqual,
        Relation::Greater => CompareResult::Greater,
        Relation::Less => CompareResult::Less,
    };
    let (target, union) = match &compare.operand {
        Operand::Value(value) => (CompareTarget::Value, TargetUnion::Value(value.clone().into())),
        Operand::Version(version) => (CompareTarget::Version, TargetUnion::Version(*version)),
        Operand::CreateRevision(revision) => (CompareTarget::Create, TargetUnion::CreateRevision(*revision)),
        Operand::ModRevision(revision) => (CompareTarget::Mod, TargetUnion::ModRevision(*revision)),
        Operand::Lease(lease) => (CompareTarget::Lease, TargetUnion::Lease(*lease)),
    };
    pb::Compare {
        result: result.into(),
        target: target.into(),
        key: compare.key.clone().into(),
        range_end: bytes::Bytes::new(),
        target_union: Some(union),
    }
}

fn step(action: &Action) -> pb::RequestOp {
    let request = match action {
        Action::Range { span, revision, limit } => {
            request_op::Request::RequestRange(range(span, *revision, *limit, false))
        }
        Action::Put { key, value, lease, prev_kv } => {
            request_op::Request::RequestPut(put(key, value, *lease, *prev_kv))
        }
        Action::Delete { span, prev_kv } => request_op::Request::RequestDeleteRange(delete(span, *prev_kv)),
    };
    pb::RequestOp { request: Some(request) }
}

pub fn kv(kv: mvccpb::KeyValue) -> Kv {
    Kv {
        key: text(&kv.key),
        value: text(&kv.value),
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
        version: kv.version,
        lease: kv.lease,
    }
}

/// An event of a watch.
pub fn event(event: mvccpb::Event) -> Event {
    let kind = match event.r#type() {
        mvccpb::event::EventType::Put => EventKind::Put,
        mvccpb::event::EventType::Delete => EventKind::Delete,
    };
    Event { kind, kv: event.kv.map(kv).unwrap_or_default(), prev: event.prev_kv.map(kv) }
}

/// Keys and values of the harness are ASCII; anything else came from elsewhere and stays visible.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn reply(header: Option<pb::ResponseHeader>, body: Body) -> Reply {
    Reply { revision: header.map_or(0, |header| header.revision), body }
}

pub fn range_reply(reply: pb::RangeResponse) -> ActionReply {
    ActionReply::Range { kvs: reply.kvs.into_iter().map(kv).collect(), count: reply.count, more: reply.more }
}

pub fn put_reply(reply: pb::PutResponse) -> ActionReply {
    ActionReply::Put { prev: reply.prev_kv.map(kv) }
}

pub fn delete_reply(reply: pb::DeleteRangeResponse) -> ActionReply {
    ActionReply::Delete { deleted: reply.deleted, prev: reply.prev_kvs.into_iter().map(kv).collect() }
}

/// The answer to a transaction.
pub fn txn_reply(response: pb::TxnResponse) -> Result<Reply, Nonsense> {
    let replies = response
        .responses
        .into_iter()
        .map(|op| match op.response {
            Some(response_op::Response::ResponseRange(reply)) => Ok(range_reply(reply)),
            Some(response_op::Response::ResponsePut(reply)) => Ok(put_reply(reply)),
            Some(response_op::Response::ResponseDeleteRange(reply)) => Ok(delete_reply(reply)),
            other => Err(Nonsense(format!("a step was answered with {other:?}"))),
        })
        .collect::<Result<Vec<_>, Nonsense>>()?;
    Ok(reply(response.header, Body::Txn { succeeded: response.succeeded, replies }))
}
