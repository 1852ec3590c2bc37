//! Requests and replies keep their meaning across the wire, and what cannot
//! mean anything is refused in etcd's words.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::types::{
    Compare, CompareOp, CompareTarget, Event, EventKind, KeyValue, RangeReply, TxnOp, TxnOpReply, TxnReply,
};
use crate::wire::etcdserverpb::request_op::Request;
use crate::wire::{
    UnexpectedOutcome, event, event_from_wire, put_response, range_reply_from_wire, range_response,
    txn_reply_from_wire, txn_response,
};

const MAX_OPS: usize = 128;

fn op(request: Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn put_op(key: &'static str) -> pb::RequestOp {
    op(Request::RequestPut(pb::PutRequest { key: key.into(), ..Default::default() }))
}

fn delete_op(key: &'static str, range_end: &'static str) -> pb::RequestOp {
    let delete = pb::DeleteRangeRequest { key: key.into(), range_end: range_end.into(), prev_kv: false };
    op(Request::RequestDeleteRange(delete))
}

fn txn_op(success: Vec<pb::RequestOp>, failure: Vec<pb::RequestOp>) -> pb::RequestOp {
    op(Request::RequestTxn(pb::TxnRequest { compare: Vec::new(), success, failure }))
}

fn checked(success: Vec<pb::RequestOp>) -> Result<(), InvalidRequest> {
    txn(pb::TxnRequest { success, ..Default::default() }, MAX_OPS).map(|_| ())
}

#[test]
fn the_messages_are_etcds() {
    let message = |error: InvalidRequest| error.to_string();
    assert_eq!(message(InvalidRequest::EmptyKey), "etcdserver: key is not provided");
    assert_eq!(message(InvalidRequest::EmptyStep), "etcdserver: key not found");
    assert_eq!(message(InvalidRequest::ValueProvided), "etcdserver: value is provided");
    assert_eq!(message(InvalidRequest::LeaseProvided), "etcdserver: lease is provided");
    assert_eq!(message(InvalidRequest::TooManyOps), "etcdserver: too many operations in txn request");
    assert_eq!(message(InvalidRequest::DuplicateKey), "etcdserver: duplicate key given in txn request");
    assert_eq!(message(InvalidRequest::SortOption), "etcdserver: invalid sort option");
}

#[test]
fn a_range_needs_a_key_and_a_known_order() {
    let request = pb::RangeRequest::default();
    assert_eq!(range_query(request.clone()), Err(InvalidRequest::EmptyKey));
    let request = pb::RangeRequest { key: "k".into(), ..request };
    assert!(range_query(request.clone()).is_ok());
    for (order, target) in [(3, 0), (-1, 0), (0, 5), (0, -1)] {
        let request = pb::RangeRequest { sort_order: order, sort_target: target, ..request.clone() };
        assert_eq!(range_query(request), Err(InvalidRequest::SortOption));
    }
}

#[test]
fn negative_limits_and_revisions_mean_none() {
    let request = pb::RangeRequest { key: "k".into(), limit: -1, revision: -1, ..Default::default() };
    let query = range_query(request).expect("a range");
    assert_eq!((query.limit, query.revision), (0, Revision(0)));
}

#[test]
fn a_streamed_range_is_neither_sorted_nor_filtered() {
    let base = pb::RangeRequest { key: "k".into(), ..Default::default() };
    let ascending = pb::RangeRequest { sort_order: PbOrder::Ascend.into(), ..base.clone() };
    assert!(range_stream_query(ascending.clone()).is_ok());
    let by_value = pb::RangeRequest { sort_target: PbTarget::Value.into(), ..ascending };
    assert_eq!(range_stream_query(by_value), Err(InvalidRequest::StreamSorted));
    let descending = pb::RangeRequest { sort_order: PbOrder::Descend.into(), ..base.clone() };
    assert_eq!(range_stream_query(descending), Err(InvalidRequest::StreamSorted));
    let filtered = pb::RangeRequest { min_mod_revision: 3, ..base };
    let error = range_stream_query(filtered).expect_err("a filter");
    assert!(error == InvalidRequest::StreamFiltered && error.is_unimplemented());
}

#[test]
fn a_put_keeps_or_gives_but_not_both() {
    let request = pb::PutRequest { key: "k".into(), value: "v".into(), lease: 7, ..Default::default() };
    assert!(put(request.clone()).is_ok());
    let value = pb::PutRequest { ignore_value: true, ..request.clone() };
    assert_eq!(put(value), Err(InvalidRequest::ValueProvided));
    let lease = pb::PutRequest { ignore_lease: true, ..request.clone() };
    assert_eq!(put(lease), Err(InvalidRequest::LeaseProvided));
    assert_eq!(put(pb::PutRequest { key: Bytes::new(), ..request }), Err(InvalidRequest::EmptyKey));
    assert_eq!(delete_range(pb::DeleteRangeRequest::default()), Err(InvalidRequest::EmptyKey));
}

#[test]
fn a_transaction_is_checked_in_every_part() {
    assert_eq!(checked(vec![pb::RequestOp { request: None }]), Err(InvalidRequest::EmptyStep));
    assert_eq!(checked(vec![put_op("")]), Err(InvalidRequest::EmptyKey));
    assert_eq!(checked(vec![txn_op(vec![], vec![put_op("")])]), Err(InvalidRequest::EmptyKey));
    let compare =
        |compare| txn(pb::TxnRequest { compare: vec![compare], ..Default::default() }, MAX_OPS).map(|_| ());
    assert_eq!(compare(pb::Compare::default()), Err(InvalidRequest::EmptyKey));
    let known = pb::Compare { key: "k".into(), ..Default::default() };
    assert_eq!(compare(known.clone()), Ok(()));
    assert_eq!(compare(pb::Compare { result: 9, ..known.clone() }), Err(InvalidRequest::Comparison));
    assert_eq!(compare(pb::Compare { target: 9, ..known }), Err(InvalidRequest::Comparison));
}

#[test]
fn a_value_of_another_field_counts_as_none() {
    use crate::wire::etcdserverpb::compare::{CompareTarget as PbCompareTarget, TargetUnion};
    let compare = pb::Compare {
        key: "k".into(),
        target: PbCompareTarget::Mod.into(),
        target_union: Some(TargetUnion::Version(5)),
        ..Default::default()
    };
    let txn = txn(pb::TxnRequest { compare: vec![compare], ..Default::default() }, MAX_OPS).expect("a txn");
    assert_eq!(txn.compare[0].target, CompareTarget::Mod(0));
}

#[test]
fn nested_steps_spend_the_same_budget() {
    let keys: Vec<&'static str> = vec!["a", "b", "c", "d", "e"];
    let puts = |count: usize| keys[..count].iter().map(|key| put_op(key)).collect::<Vec<_>>();
    let sized =
        |outer: Vec<pb::RequestOp>, max| txn(pb::TxnRequest { success: outer, ..Default::default() }, max);
    assert!(sized(puts(4), 4).is_ok());
    assert_eq!(sized(puts(5), 4), Err(InvalidRequest::TooManyOps));
    assert!(sized(vec![txn_op(puts(3), vec![])], 4).is_ok());
    assert_eq!(sized(vec![txn_op(puts(4), vec![])], 4), Err(InvalidRequest::TooManyOps));
    assert_eq!(sized(vec![txn_op(vec![], puts(4))], 4), Err(InvalidRequest::TooManyOps));
}

#[test]
fn no_key_is_changed_twice() {
    let twice = Err(InvalidRequest::DuplicateKey);
    assert_eq!(checked(vec![put_op("a"), put_op("b")]), Ok(()));
    assert_eq!(checked(vec![put_op("a"), put_op("a")]), twice);
    assert_eq!(checked(vec![put_op("b"), delete_op("a", "c")]), twice);
    assert_eq!(checked(vec![delete_op("a", ""), put_op("a")]), twice);
    assert_eq!(checked(vec![put_op("c"), delete_op("a", "c")]), Ok(()), "the end is exclusive");
    assert_eq!(checked(vec![put_op("z"), delete_op("a", "\0")]), twice, "a range without an end");
    assert_eq!(checked(vec![put_op("b"), delete_op("c", "a")]), Ok(()), "an empty range");
    assert_eq!(checked(vec![delete_op("a", "c"), delete_op("b", "d")]), Ok(()));
    let failure = vec![put_op("a"), put_op("a")];
    assert_eq!(
        txn(pb::TxnRequest { failure, ..Default::default() }, MAX_OPS),
        Err(InvalidRequest::DuplicateKey)
    );
}

#[test]
fn no_key_is_changed_twice_by_nested_transactions() {
    let twice = Err(InvalidRequest::DuplicateKey);
    let inner = |then, otherwise| txn_op(then, otherwise);
    assert_eq!(checked(vec![put_op("a"), inner(vec![put_op("a")], vec![])]), twice);
    assert_eq!(checked(vec![put_op("a"), inner(vec![], vec![delete_op("a", "")])]), twice);
    assert_eq!(checked(vec![inner(vec![put_op("a")], vec![put_op("a")])]), Ok(()), "one branch or the other");
    assert_eq!(checked(vec![inner(vec![put_op("a")], vec![delete_op("a", "")])]), Ok(()));
    assert_eq!(checked(vec![inner(vec![put_op("a")], vec![]), inner(vec![put_op("a")], vec![])]), twice);
    assert_eq!(
        checked(vec![inner(vec![put_op("a")], vec![]), inner(vec![delete_op("a", "")], vec![])]),
        twice
    );
    let deep = inner(vec![inner(vec![put_op("a")], vec![])], vec![]);
    assert_eq!(checked(vec![deep.clone(), put_op("a")]), twice);
    assert_eq!(checked(vec![deep, put_op("b")]), Ok(()));
}

/// A tree of transactions with this many steps at each level, and leaves below.
fn tree(widths: &[usize], leaf: &mut dyn FnMut() -> Request) -> Vec<pb::RequestOp> {
    let step = |below: &[usize]| match below {
        [] => op(leaf()),
        below => txn_op(tree(below, leaf), Vec::new()),
    };
    std::iter::repeat_n(&widths[1..], widths[0]).map(step).collect()
}

#[test]
fn a_crowd_of_steps_is_judged_at_once() {
    // As many as a request has room for, set in one branch and removed in the other.
    // Held against each other one by one they would take minutes.
    let widths = [42, 40, 20];
    let mut number = 0u32;
    let mut put = || {
        number += 1;
        let key = Bytes::copy_from_slice(&number.to_be_bytes());
        Request::RequestPut(pb::PutRequest { key, ..Default::default() })
    };
    let puts = tree(&widths, &mut put);
    let everything = pb::DeleteRangeRequest { key: "\0".into(), range_end: "\0".into(), prev_kv: false };
    let removals = tree(&widths, &mut || Request::RequestDeleteRange(everything.clone()));
    assert_eq!(checked(vec![txn_op(puts.clone(), removals.clone())]), Ok(()));
    let apart = vec![txn_op(puts, vec![]), txn_op(removals, vec![])];
    assert_eq!(checked(apart), Err(InvalidRequest::DuplicateKey));
}

#[test]
fn a_watch_may_leave_the_key_out() {
    assert_eq!(watch_range(Bytes::new(), "\0".into()), KeyRange::From("\0".into()));
    assert_eq!(watch_range("a".into(), Bytes::new()), KeyRange::Single("a".into()));
}

#[test]
fn a_repeated_write_without_a_kept_reply_says_so() {
    let before =
        crate::types::Outcome::AppliedBefore(crate::types::SequenceOutcome { revision: Revision(8) });
    let error = put_response(pb::ResponseHeader::default(), before).expect_err("no reply is kept");
    assert_eq!(error, UnexpectedOutcome::AppliedBefore { revision: Revision(8) });
    let other = put_response(pb::ResponseHeader::default(), crate::types::Outcome::Done);
    assert!(matches!(other, Err(UnexpectedOutcome::Mismatch { .. })));
}

#[test]
fn responses_inside_a_transaction_carry_the_revision_alone() {
    let header = pb::ResponseHeader { cluster_id: 1, member_id: 2, revision: 3, raft_term: 4 };
    let reply = TxnReply { succeeded: true, responses: vec![TxnOpReply::Put { prev: None }] };
    let response = txn_response(header, crate::types::Outcome::Txn(reply)).expect("a transaction");
    assert_eq!(response.header, Some(header));
    let Some(pb::response_op::Response::ResponsePut(put)) = &response.responses[0].response else {
        panic!("not a put")
    };
    assert_eq!(put.header, Some(pb::ResponseHeader { revision: 3, ..Default::default() }));
}

#[test]
fn a_previous_value_is_sent_only_when_asked_for() {
    let kv = KeyValue {
        key: "k".into(),
        create_revision: Revision(2),
        mod_revision: Revision(3),
        version: 2,
        lease: LeaseId(0),
        value: "v".into(),
    };
    let change = Event { space: Space::User, kind: EventKind::Put, kv: kv.clone(), prev: Some(kv) };
    assert!(event(&change, false).prev_kv.is_none());
    assert_eq!(event_from_wire(event(&change, true)), Some(change));
    assert_eq!(event_from_wire(crate::wire::mvccpb::Event::default()), None);
    let unknown = crate::wire::mvccpb::Event { r#type: 9, kv: Some(Default::default()), prev_kv: None };
    assert_eq!(event_from_wire(unknown), None);
}

fn bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..6).prop_map(Bytes::from)
}

fn key() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 1..6).prop_map(Bytes::from)
}

fn range() -> impl Strategy<Value = KeyRange> {
    (key(), bytes()).prop_map(|(key, end)| KeyRange::from_wire(key, end))
}

fn query() -> impl Strategy<Value = RangeQuery> {
    let targets =
        [SortTarget::Key, SortTarget::Version, SortTarget::Create, SortTarget::Mod, SortTarget::Value];
    let orders = [SortOrder::None, SortOrder::Ascend, SortOrder::Descend];
    let sort = (proptest::sample::select(targets.to_vec()), proptest::sample::select(orders.to_vec()));
    let bounds = (any::<i64>(), any::<i64>(), any::<i64>(), any::<i64>());
    (range(), 0..i64::MAX, 0..i64::MAX as u64, any::<(bool, bool)>(), sort, bounds).prop_map(
        |(range, revision, limit, (keys_only, count_only), (sort_target, sort_order), bounds)| RangeQuery {
            space: Space::User,
            range,
            revision: Revision(revision),
            limit,
            keys_only,
            count_only,
            sort_target,
            sort_order,
            min_mod_revision: Revision(bounds.0),
            max_mod_revision: Revision(bounds.1),
            min_create_revision: Revision(bounds.2),
            max_create_revision: Revision(bounds.3),
        },
    )
}

fn put_of() -> impl Strategy<Value = Put> {
    (key(), bytes(), any::<i64>(), any::<(bool, bool, bool)>()).prop_map(
        |(key, value, lease, (prev_kv, ignore_value, ignore_lease))| Put {
            space: Space::User,
            key,
            value: if ignore_value { Bytes::new() } else { value },
            lease: LeaseId(if ignore_lease { 0 } else { lease }),
            prev_kv,
            ignore_value,
            ignore_lease,
        },
    )
}

fn compare_of() -> impl Strategy<Value = Compare> {
    let ops = [CompareOp::Equal, CompareOp::Greater, CompareOp::Less, CompareOp::NotEqual];
    let target = prop_oneof![
        any::<i64>().prop_map(CompareTarget::Version),
        any::<i64>().prop_map(CompareTarget::Create),
        any::<i64>().prop_map(CompareTarget::Mod),
        any::<i64>().prop_map(CompareTarget::Lease),
        bytes().prop_map(CompareTarget::Value),
    ];
    (range(), proptest::sample::select(ops.to_vec()), target).prop_map(|(range, op, target)| Compare {
        space: Space::User,
        range,
        op,
        target,
    })
}

fn txn_of() -> impl Strategy<Value = Txn> {
    let delete = (range(), any::<bool>())
        .prop_map(|(range, prev_kv)| TxnOp::DeleteRange(DeleteRange { space: Space::User, range, prev_kv }));
    let leaf = prop_oneof![query().prop_map(TxnOp::Range), put_of().prop_map(TxnOp::Put), delete];
    let step = leaf.prop_recursive(2, 8, 2, |inner| {
        (vec(compare_of(), 0..2), vec(inner.clone(), 0..2), vec(inner, 0..2))
            .prop_map(|(compare, success, failure)| TxnOp::Txn(Txn { compare, success, failure }))
    });
    (vec(compare_of(), 0..3), vec(step.clone(), 0..3), vec(step, 0..3))
        .prop_map(|(compare, success, failure)| Txn { compare, success, failure })
}

fn kv() -> impl Strategy<Value = KeyValue> {
    (key(), bytes(), any::<(i64, i64, i64, i64)>()).prop_map(|(key, value, numbers)| KeyValue {
        key,
        create_revision: Revision(numbers.0),
        mod_revision: Revision(numbers.1),
        version: numbers.2,
        lease: LeaseId(numbers.3),
        value,
    })
}

fn reply() -> impl Strategy<Value = TxnReply> {
    let range = (vec(kv(), 0..3), any::<bool>(), 0..i64::MAX as u64)
        .prop_map(|(kvs, more, count)| TxnOpReply::Range(RangeReply { kvs, more, count }));
    let put = proptest::option::of(kv()).prop_map(|prev| TxnOpReply::Put { prev });
    let delete = (0..i64::MAX as u64, vec(kv(), 0..3))
        .prop_map(|(deleted, prev)| TxnOpReply::DeleteRange { deleted, prev });
    let step = prop_oneof![range, put, delete].prop_recursive(2, 8, 2, |inner| {
        (any::<bool>(), vec(inner, 0..2))
            .prop_map(|(succeeded, responses)| TxnOpReply::Txn(TxnReply { succeeded, responses }))
    });
    (any::<bool>(), vec(step, 0..3)).prop_map(|(succeeded, responses)| TxnReply { succeeded, responses })
}

/// Through the encoded bytes, as it travels.
fn over_the_wire<M: prost::Message + Default>(message: M) -> M {
    M::decode(&message.encode_to_vec()[..]).expect("what was encoded decodes")
}

proptest! {
    #[test]
    fn queries_keep_their_meaning(query in query(), serializable: bool) {
        let request = over_the_wire(range_request(query.clone(), serializable));
        prop_assert_eq!(request.serializable, serializable);
        prop_assert_eq!(range_query(request), Ok(query));
    }

    #[test]
    fn puts_keep_their_meaning(value in put_of()) {
        prop_assert_eq!(put(over_the_wire(put_request(value.clone()))), Ok(value));
    }

    #[test]
    fn transactions_keep_their_meaning(value in txn_of()) {
        let result = txn(over_the_wire(txn_request(value.clone())), MAX_OPS);
        prop_assert!(result == Err(InvalidRequest::DuplicateKey) || result == Ok(value));
    }

    #[test]
    fn replies_keep_their_meaning(value in reply()) {
        let outcome = crate::types::Outcome::Txn(value.clone());
        let response = over_the_wire(txn_response(pb::ResponseHeader::default(), outcome).expect("a transaction"));
        prop_assert_eq!(txn_reply_from_wire(response), Some(value));
    }

    #[test]
    fn range_replies_keep_their_meaning(kvs in vec(kv(), 0..4), more: bool, count in 0..i64::MAX as u64) {
        let value = RangeReply { kvs, more, count };
        let response = over_the_wire(range_response(pb::ResponseHeader::default(), value.clone()));
        prop_assert_eq!(range_reply_from_wire(response), value);
    }

    #[test]
    fn no_bytes_make_a_request_panic(bytes in vec(any::<u8>(), 0..64)) {
        use prost::Message as _;
        if let Ok(request) = pb::TxnRequest::decode(&bytes[..]) {
            let _ = txn(request, MAX_OPS);
        }
        if let Ok(request) = pb::RangeRequest::decode(&bytes[..]) {
            let _ = range_query(request);
        }
    }
}
