//! Transactions: comparisons on everything, both branches, nesting, budgets,
//! and one revision at most.

use etcd_client::{
    Compare, CompareOp, DeleteOptions, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Spec, on_cluster, on_own_cluster};
use crate::target::etcd_before;

const DUPLICATE: &str = "etcdserver: duplicate key given in txn request";
const TOO_MANY: &str = "etcdserver: too many operations in txn request";

fn put(key: impl Into<Vec<u8>>, value: &str) -> TxnOp {
    TxnOp::put(key, value, None)
}

fn get(key: impl Into<Vec<u8>>) -> TxnOp {
    TxnOp::get(key, None)
}

fn values(response: &TxnResponse) -> Vec<Option<String>> {
    let ops = response.op_responses().into_iter();
    ops.filter_map(|op| match op {
        TxnOpResponse::Get(got) => Some(got.kvs().first().map(|kv| kv.value_str().unwrap().to_owned())),
        _ => None,
    })
    .collect()
}

#[test]
fn the_branch_follows_the_comparisons_and_all_of_them_must_hold() {
    on_cluster(async |c| {
        let (mut w, mut r) = (c.client(0).await, c.client(1).await);
        let p = unique("branch");
        let (a, b) = (format!("{p}a"), format!("{p}b"));
        w.put(a.as_str(), "1", None).await.unwrap();
        let both = |second: &str| {
            vec![
                Compare::value(a.as_str(), CompareOp::Equal, "1"),
                Compare::value(a.as_str(), CompareOp::Equal, second),
            ]
        };
        let txn = |second| {
            Txn::new()
                .when(both(second))
                .and_then([put(b.as_str(), "then")])
                .or_else([put(b.as_str(), "else")])
        };
        assert!(w.txn(txn("1")).await.unwrap().succeeded());
        assert_eq!(value(&mut r, &b).await.unwrap(), "then");
        assert!(!w.txn(txn("2")).await.unwrap().succeeded());
        assert_eq!(value(&mut r, &b).await.unwrap(), "else");
        assert!(w.txn(Txn::new()).await.unwrap().succeeded(), "no comparison holds");
    });
}

#[test]
fn every_target_compares_in_every_way() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let key = unique("targets") + "k";
        let lease = client.lease_grant(600, None).await.unwrap().id();
        let create = client.put(key.as_str(), "m", None).await.unwrap().header().unwrap().revision();
        client.put(key.as_str(), "m", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        let k = key.as_str();
        // Each with what is there, something less, something greater.
        let of = |op: CompareOp, by: i64| {
            let value = match by {
                -1 => "l",
                0 => "m",
                _ => "n",
            };
            [
                Compare::version(k, op, 2 + by),
                Compare::create_revision(k, op, create + by),
                Compare::mod_revision(k, op, create + 1 + by),
                Compare::lease(k, op, lease + by),
                Compare::value(k, op, value),
            ]
        };
        let cases = [
            (CompareOp::Equal, [false, true, false]),
            (CompareOp::NotEqual, [true, false, true]),
            (CompareOp::Greater, [true, false, false]),
            (CompareOp::Less, [false, false, true]),
        ];
        for (op, holds) in cases {
            for (by, holds) in [-1, 0, 1].into_iter().zip(holds) {
                for compare in of(op, by) {
                    let shown = format!("{compare:?}");
                    let response = client.txn(Txn::new().when([compare])).await.unwrap();
                    assert_eq!(response.succeeded(), holds, "{shown}");
                }
            }
        }
        client.lease_revoke(lease).await.unwrap();
    });
}

#[test]
fn a_missing_key_has_zeros_and_no_value() {
    on_cluster(async |c| {
        let mut client = c.client(1).await;
        let key = unique("missing") + "k";
        let k = key.as_str();
        let cases = [
            (Compare::version(k, CompareOp::Equal, 0), true),
            (Compare::create_revision(k, CompareOp::Equal, 0), true),
            (Compare::mod_revision(k, CompareOp::Less, 1), true),
            (Compare::lease(k, CompareOp::Equal, 0), true),
            (Compare::version(k, CompareOp::Greater, 0), false),
            (Compare::value(k, CompareOp::Equal, ""), false),
            (Compare::value(k, CompareOp::NotEqual, "x"), false),
            (Compare::value(k, CompareOp::Less, "x"), false),
            (Compare::value(k, CompareOp::Equal, "").with_prefix(), false),
            (Compare::version(k, CompareOp::Equal, 0).with_prefix(), true),
        ];
        for (compare, holds) in cases {
            let shown = format!("{compare:?}");
            assert_eq!(client.txn(Txn::new().when([compare])).await.unwrap().succeeded(), holds, "{shown}");
        }
    });
}

#[test]
fn a_comparison_of_a_range_holds_when_every_key_does() {
    on_cluster(async |c| {
        let mut client = c.client(2).await;
        let p = unique("range-compare");
        for (key, value) in [("a", "1"), ("b", "1"), ("c", "2")] {
            client.put(format!("{p}{key}"), value, None).await.unwrap();
        }
        let cases = [
            (Compare::value(p.as_str(), CompareOp::Less, "3").with_prefix(), true),
            (Compare::value(p.as_str(), CompareOp::Equal, "1").with_prefix(), false),
            (Compare::value(format!("{p}a"), CompareOp::Equal, "1").with_range(format!("{p}c")), true),
            (Compare::version(p.as_str(), CompareOp::Equal, 1).with_prefix(), true),
        ];
        for (compare, holds) in cases {
            let shown = format!("{compare:?}");
            assert_eq!(client.txn(Txn::new().when([compare])).await.unwrap().succeeded(), holds, "{shown}");
        }
    });
}

#[test]
fn a_transaction_is_one_revision_and_none_when_nothing_changes() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut client = c.client(0).await;
        let many = Txn::new().and_then([put("a", "1"), put("b", "2"), put("c", "3")]);
        assert_eq!(client.txn(many).await.unwrap().header().unwrap().revision(), 2);
        let got = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
        assert!(got.kvs().iter().all(|kv| kv.mod_revision() == 2 && kv.create_revision() == 2));
        let reads = Txn::new().and_then([get("a"), TxnOp::delete("none", None)]);
        assert_eq!(client.txn(reads).await.unwrap().header().unwrap().revision(), 2);
        let nested =
            Txn::new().and_then([TxnOp::txn(Txn::new().and_then([put("d", "4")])), TxnOp::delete("a", None)]);
        assert_eq!(client.txn(nested).await.unwrap().header().unwrap().revision(), 3);
        assert_eq!(revision(&mut client).await, 3);
    });
}

#[test]
fn reads_inside_see_the_writes_before_them() {
    on_cluster(async |c| {
        let mut client = c.client(1).await;
        let p = unique("inside");
        let (a, b) = (format!("{p}a"), format!("{p}b"));
        client.put(a.as_str(), "old", None).await.unwrap();
        let before = revision(&mut client).await;
        let txn = Txn::new().and_then([
            get(a.as_str()),
            put(a.as_str(), "new"),
            get(a.as_str()),
            TxnOp::delete(b.as_str(), None),
            TxnOp::get(p.as_str(), Some(GetOptions::new().with_prefix().with_count_only())),
            TxnOp::put(b.as_str(), "late", Some(PutOptions::new().with_prev_key())),
        ]);
        // Putting b overlaps its delete, so the delete goes elsewhere.
        refused(client.txn(txn).await, Code::InvalidArgument, DUPLICATE);
        let txn = Txn::new().and_then([
            get(a.as_str()),
            TxnOp::put(a.as_str(), "new", Some(PutOptions::new().with_prev_key())),
            get(a.as_str()),
            get(b.as_str()),
            put(b.as_str(), "late"),
            get(b.as_str()),
        ]);
        let response = client.txn(txn).await.unwrap();
        let expected = [Some("old"), Some("new"), None, Some("late")].map(|v| v.map(str::to_owned));
        assert_eq!(values(&response), expected);
        assert_eq!(response.header().unwrap().revision(), before + 1);
        match &response.op_responses()[1] {
            TxnOpResponse::Put(put) => assert_eq!(put.prev_key().unwrap().value(), b"old"),
            other => panic!("{other:?}"),
        }
        match &response.op_responses()[2] {
            TxnOpResponse::Get(got) => assert_eq!(got.kvs()[0].mod_revision(), before + 1),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn deletes_inside_answer_with_what_was_there() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let p = unique("delete-inside");
        client.put(format!("{p}a"), "1", None).await.unwrap();
        client.put(format!("{p}b"), "2", None).await.unwrap();
        let options = DeleteOptions::new().with_prefix().with_prev_key();
        let txn = Txn::new().and_then([
            TxnOp::delete(p.as_str(), Some(options)),
            TxnOp::get(p.as_str(), Some(GetOptions::new().with_prefix())),
        ]);
        let response = client.txn(txn).await.unwrap();
        match &response.op_responses()[..] {
            [TxnOpResponse::Delete(deleted), TxnOpResponse::Get(got)] => {
                let values: Vec<_> = deleted.prev_kvs().iter().map(|kv| kv.value()).collect();
                assert_eq!((deleted.deleted(), values, got.count()), (2, vec![&b"1"[..], b"2"], 0));
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn nested_comparisons_see_the_state_before_the_transaction() {
    on_cluster(async |c| {
        let mut client = c.client(1).await;
        let p = unique("nested");
        let (a, b) = (format!("{p}a"), format!("{p}b"));
        client.put(a.as_str(), "before", None).await.unwrap();
        let inner = Txn::new()
            .when([Compare::value(a.as_str(), CompareOp::Equal, "before")])
            .and_then([put(b.as_str(), "saw before"), get(a.as_str())])
            .or_else([put(b.as_str(), "saw after")]);
        let txn = Txn::new().and_then([put(a.as_str(), "after"), TxnOp::txn(inner)]);
        let response = client.txn(txn).await.unwrap();
        match &response.op_responses()[1] {
            TxnOpResponse::Txn(inner) => {
                assert!(inner.succeeded());
                assert_eq!(values(inner), [Some("after".to_owned())], "reads inside see earlier writes");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(value(&mut client, &b).await.unwrap(), "saw before");
    });
}

#[test]
fn the_same_key_twice_is_refused() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let p = unique("twice");
        let k = format!("{p}k");
        let k = k.as_str();
        let before = revision(&mut client).await;
        let delete_prefix = || TxnOp::delete(p.as_str(), Some(DeleteOptions::new().with_prefix()));
        let nested = |op: TxnOp| TxnOp::txn(Txn::new().and_then([op]));
        let bad = [
            vec![put(k, "1"), put(k, "2")],
            vec![put(k, "1"), TxnOp::delete(k, None)],
            vec![delete_prefix(), put(k, "1")],
            vec![put(k, "1"), nested(put(k, "2"))],
            vec![nested(put(k, "1")), nested(put(k, "2"))],
            vec![delete_prefix(), nested(put(k, "1"))],
            vec![nested(delete_prefix()), put(k, "1")],
        ];
        for ops in bad {
            let shown = format!("{ops:?}");
            let status = status_of(client.txn(Txn::new().and_then(ops)).await);
            assert_eq!((status.code(), status.message()), (Code::InvalidArgument, DUPLICATE), "{shown}");
        }
        assert_eq!(revision(&mut client).await, before);
        let exclusive = Txn::new().and_then([put(k, "1")]).or_else([put(k, "2")]);
        client.txn(Txn::new().and_then([TxnOp::txn(exclusive)])).await.unwrap();
        client.txn(Txn::new().and_then([delete_prefix(), TxnOp::delete(k, None)])).await.unwrap();
    });
}

#[test]
fn the_budget_of_operations_is_128_and_nesting_spends_it() {
    on_cluster(async |c| {
        let mut client = c.client(2).await;
        let p = unique("budget");
        let puts = |n: usize| -> Vec<TxnOp> { (0..n).map(|i| put(format!("{p}{i}"), "v")).collect() };
        client.txn(Txn::new().and_then(puts(128))).await.unwrap();
        refused(client.txn(Txn::new().and_then(puts(129))).await, Code::InvalidArgument, TOO_MANY);
        refused(client.txn(Txn::new().or_else(puts(129))).await, Code::InvalidArgument, TOO_MANY);
        let compares: Vec<_> = (0..129).map(|_| Compare::version("k", CompareOp::Equal, 0)).collect();
        refused(client.txn(Txn::new().when(compares)).await, Code::InvalidArgument, TOO_MANY);
        let nested = |n| Txn::new().and_then([TxnOp::txn(Txn::new().and_then(puts(n)))]);
        client.txn(nested(127)).await.unwrap();
        refused(client.txn(nested(128)).await, Code::InvalidArgument, TOO_MANY);
    });
}

#[test]
fn a_bad_operation_refuses_the_whole_transaction() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let p = unique("whole");
        let good = || put(format!("{p}good"), "v");
        let other = format!("{p}other");
        let invalid = Code::InvalidArgument;
        let cases = [
            (put("", "v"), invalid, "etcdserver: key is not provided"),
            (get(""), invalid, "etcdserver: key is not provided"),
            (
                TxnOp::put(other.as_str(), "v", Some(PutOptions::new().with_ignore_value())),
                invalid,
                "etcdserver: value is provided",
            ),
            (
                TxnOp::put(other.as_str(), "", Some(PutOptions::new().with_ignore_value())),
                invalid,
                "etcdserver: key not found",
            ),
            (
                TxnOp::put(other.as_str(), "v", Some(PutOptions::new().with_lease(0x77aa))),
                Code::NotFound,
                "etcdserver: requested lease not found",
            ),
            (
                TxnOp::get(other.as_str(), Some(GetOptions::new().with_revision(i64::MAX))),
                Code::OutOfRange,
                "etcdserver: mvcc: required revision is a future revision",
            ),
        ];
        let before = revision(&mut client).await;
        for (bad, code, message) in cases {
            refused(client.txn(Txn::new().and_then([good(), bad])).await, code, message);
        }
        let compare = Compare::version("", CompareOp::Equal, 0);
        let result = client.txn(Txn::new().when([compare]).and_then([good()])).await;
        refused(result, invalid, "etcdserver: key is not provided");
        assert_eq!(revision(&mut client).await, before);
        assert!(get_one(&mut client, &format!("{p}good")).await.is_none());
    });
}

#[test]
fn a_read_of_a_compacted_revision_inside_refuses_the_transaction() {
    // Older etcd writes before it refuses (its issue 18667, fixed in 3.7).
    if etcd_before((3, 7)) {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let mut client = c.client(1).await;
        for i in 0..5 {
            client.put("k", i.to_string(), None).await.unwrap();
        }
        client.compact(5, None).await.unwrap();
        let old = TxnOp::get("k", Some(GetOptions::new().with_revision(3)));
        let result = client.txn(Txn::new().and_then([put("never", "v"), old])).await;
        refused(result, Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted");
        for i in 0..3 {
            let mut client = c.client(i).await;
            assert!(get_one(&mut client, "never").await.is_none());
            assert_eq!(revision(&mut client).await, 6);
        }
    });
}

#[test]
fn counters_by_compare_and_swap_lose_nothing() {
    on_cluster(async |c| {
        let key = unique("cas") + "counter";
        c.client(0).await.put(key.as_str(), "0", None).await.unwrap();
        let mut tasks = Vec::new();
        for i in 0..6 {
            let (mut client, key) = (c.client(i % 3).await, key.clone());
            tasks.push(tokio::spawn(async move {
                for _ in 0..20 {
                    loop {
                        let now = get_one(&mut client, &key).await.unwrap();
                        let next = now.value_str().unwrap().parse::<u32>().unwrap() + 1;
                        let same = Compare::mod_revision(key.as_str(), CompareOp::Equal, now.mod_revision());
                        let txn = Txn::new().when([same]).and_then([put(key.as_str(), &next.to_string())]);
                        if client.txn(txn).await.unwrap().succeeded() {
                            break;
                        }
                    }
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(value(&mut c.client(1).await, &key).await.unwrap(), "120");
    });
}
