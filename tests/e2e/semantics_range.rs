//! Range: every option, and how they combine.

use etcd_client::{GetOptions, SortOrder, SortTarget};
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Cluster, on_cluster};
use crate::raw;
use crate::target::etcd_before;

/// Five keys whose key order, value order, create order, mod order and version order all differ.
async fn five(c: &Cluster, label: &str) -> (String, i64) {
    let p = unique(label);
    let mut w = c.client(0).await;
    let start = revision(&mut w).await;
    // Create order d b a e c; values after the last write: a=5 b=3 c=1 d=2 e=4.
    for (key, value) in [("d", "2"), ("b", "3"), ("a", "9"), ("e", "4"), ("c", "1")] {
        w.put(format!("{p}{key}"), value, None).await.unwrap();
    }
    // Versions: a=3 b=1 c=1 d=2 e=1.
    for (key, value) in [("d", "2"), ("a", "8"), ("a", "5")] {
        w.put(format!("{p}{key}"), value, None).await.unwrap();
    }
    (p, start)
}

fn prefix() -> GetOptions {
    GetOptions::new().with_prefix()
}

#[test]
fn a_range_is_half_open_and_sorted_by_key() {
    on_cluster(async |c| {
        let (p, _) = five(c, "half-open").await;
        let mut r = c.client(1).await;
        let options = GetOptions::new().with_range(format!("{p}d"));
        let got = r.get(format!("{p}b"), Some(options)).await.unwrap();
        assert_eq!((short_keys(&got, &p), got.count(), got.more()), (vec!["b".into(), "c".into()], 2, false));
        let backwards = GetOptions::new().with_range(format!("{p}a"));
        let got = r.get(format!("{p}d"), Some(backwards)).await.unwrap();
        assert_eq!((got.kvs().len(), got.count()), (0, 0));
        let same = GetOptions::new().with_range(format!("{p}b"));
        assert_eq!(r.get(format!("{p}b"), Some(same)).await.unwrap().count(), 0);
    });
}

#[test]
fn range_end_zero_means_everything_from_the_key_on() {
    on_cluster(async |c| {
        // Keys of 0xff sort behind everything other tests write.
        let mut key = vec![0xff_u8; 4];
        key.extend(unique("from").into_bytes());
        let mut w = c.client(0).await;
        for suffix in [1u8, 2, 3] {
            let mut full = key.clone();
            full.push(suffix);
            w.put(full, vec![suffix], None).await.unwrap();
        }
        let mut from = key.clone();
        from.push(2);
        let got = c.client(1).await.get(from, Some(GetOptions::new().with_from_key())).await.unwrap();
        let mine: Vec<_> =
            got.kvs().iter().filter(|kv| kv.key().starts_with(&key)).map(|kv| kv.value()[0]).collect();
        assert_eq!(mine, [2, 3]);
        let all = c.client(2).await.get("", Some(GetOptions::new().with_all_keys().with_count_only())).await;
        assert!(all.unwrap().count() >= 3);
    });
}

#[test]
fn limit_cuts_after_sorting_and_count_ignores_it() {
    on_cluster(async |c| {
        let (p, _) = five(c, "limit").await;
        let mut r = c.client(1).await;
        for (limit, kept, more) in [(2, 2, true), (5, 5, false), (9, 5, false), (0, 5, false)] {
            let got = r.get(p.as_str(), Some(prefix().with_limit(limit))).await.unwrap();
            assert_eq!((got.kvs().len(), got.count(), got.more()), (kept, 5, more), "limit {limit}");
        }
        let options = prefix().with_limit(2).with_sort(SortTarget::Key, SortOrder::Descend);
        let got = r.get(p.as_str(), Some(options)).await.unwrap();
        assert_eq!((short_keys(&got, &p), got.more()), (vec!["e".into(), "d".into()], true));
    });
}

#[test]
fn every_sort_target_sorts_both_ways() {
    on_cluster(async |c| {
        let (p, _) = five(c, "sort").await;
        let mut r = c.client(2).await;
        let cases = [
            (SortTarget::Key, "abcde"),
            (SortTarget::Create, "dbaec"),
            (SortTarget::Mod, "becda"),
            (SortTarget::Value, "cdbea"),
        ];
        for (target, ascending) in cases {
            let descending: String = ascending.chars().rev().collect();
            for (order, expected) in [(SortOrder::Ascend, ascending), (SortOrder::Descend, &descending)] {
                let got = r.get(p.as_str(), Some(prefix().with_sort(target, order))).await.unwrap();
                assert_eq!(short_keys(&got, &p).concat(), expected, "{target:?} {order:?}");
            }
        }
        let by_version = prefix().with_sort(SortTarget::Version, SortOrder::Descend).with_limit(2);
        let got = r.get(p.as_str(), Some(by_version)).await.unwrap();
        assert_eq!(short_keys(&got, &p).concat(), "ad");
    });
}

#[test]
fn without_an_order_another_target_than_the_key_sorts_ascending() {
    on_cluster(async |c| {
        let (p, _) = five(c, "none").await;
        let options = prefix().with_sort(SortTarget::Value, SortOrder::None);
        let got = c.client(1).await.get(p.as_str(), Some(options)).await.unwrap();
        assert_eq!(short_keys(&got, &p).concat(), "cdbea");
    });
}

#[test]
fn revision_filters_hide_keys_and_leave_the_count() {
    on_cluster(async |c| {
        let (p, start) = five(c, "filters").await;
        let mut r = c.client(1).await;
        // Created at start + 1..=5 in the order d b a e c; d again at +6, a at +7 and +8.
        let cases = [
            (prefix().with_min_mod_revision(start + 5), "acd"),
            (prefix().with_max_mod_revision(start + 5), "bce"),
            (prefix().with_min_create_revision(start + 3), "ace"),
            (prefix().with_max_create_revision(start + 2), "bd"),
            (prefix().with_min_mod_revision(start + 5).with_max_create_revision(start + 1), "d"),
        ];
        for (options, expected) in cases {
            let got = r.get(p.as_str(), Some(options)).await.unwrap();
            assert_eq!(
                (short_keys(&got, &p).concat().as_str(), got.count(), got.more()),
                (expected, 5, false)
            );
        }
        let cut = prefix().with_min_mod_revision(start + 5).with_limit(2);
        let got = r.get(p.as_str(), Some(cut)).await.unwrap();
        assert_eq!((short_keys(&got, &p).concat().as_str(), got.count(), got.more()), ("ac", 5, true));
    });
}

#[test]
fn keys_only_and_count_only_leave_out_the_rest() {
    on_cluster(async |c| {
        let (p, _) = five(c, "only").await;
        let mut r = c.client(1).await;
        let got = r.get(p.as_str(), Some(prefix().with_keys_only())).await.unwrap();
        assert_eq!(short_keys(&got, &p).concat(), "abcde");
        assert!(
            got.kvs().iter().all(|kv| kv.value().is_empty() && kv.mod_revision() > 0 && kv.version() > 0)
        );
        let got = r.get(p.as_str(), Some(prefix().with_count_only())).await.unwrap();
        assert_eq!((got.kvs().len(), got.count(), got.more()), (0, 5, false));
        let got = r.get(p.as_str(), Some(prefix().with_count_only().with_limit(2))).await.unwrap();
        assert_eq!((got.kvs().len(), got.count()), (0, 5));
        // Values sort even when they are not returned.
        let sorted = prefix().with_keys_only().with_sort(SortTarget::Value, SortOrder::Descend);
        let got = r.get(p.as_str(), Some(sorted)).await.unwrap();
        assert_eq!(short_keys(&got, &p).concat(), "aebdc");
        assert!(got.kvs().iter().all(|kv| kv.value().is_empty()));
    });
}

#[test]
fn an_old_revision_shows_the_past_under_the_current_header() {
    on_cluster(async |c| {
        let (p, start) = five(c, "past").await;
        let mut r = c.client(2).await;
        let now = revision(&mut r).await;
        let got = r.get(p.as_str(), Some(prefix().with_revision(start + 3))).await.unwrap();
        assert_eq!((short_keys(&got, &p).concat().as_str(), got.count()), ("abd", 3));
        assert_eq!(got.header().unwrap().revision(), now);
        assert_eq!(marks(&got.kvs()[0]), (start + 3, start + 3, 1, "9".into()));
        let got = r.get(p.as_str(), Some(prefix().with_revision(start))).await.unwrap();
        assert_eq!(got.count(), 0);
        c.client(0).await.delete(format!("{p}a"), None).await.unwrap();
        let got = r.get(format!("{p}a"), Some(GetOptions::new().with_revision(now))).await.unwrap();
        assert_eq!(marks(&got.kvs()[0]), (start + 3, start + 8, 3, "5".into()));
    });
}

#[test]
fn a_serializable_read_answers_from_the_node_itself() {
    on_cluster(async |c| {
        let (p, _) = five(c, "serializable").await;
        for i in 0..3 {
            let mut client = c.client(i).await;
            revision(&mut client).await;
            let got = client.get(p.as_str(), Some(prefix().with_serializable())).await.unwrap();
            assert_eq!(got.count(), 5);
        }
    });
}

#[test]
fn unknown_sort_options_are_refused() {
    if etcd_before((3, 6)) {
        return;
    }
    on_cluster(async |c| {
        let channel = raw::channel(&c.nodes[0].url()).await;
        let base = raw::RangeRequest { key: b"k".to_vec(), ..Default::default() };
        let cases = [
            raw::RangeRequest { sort_order: 7, ..base.clone() },
            raw::RangeRequest { sort_target: 9, ..base.clone() },
        ];
        for request in cases {
            let result: Result<raw::RangeResponse, _> =
                raw::unary(&channel, "/etcdserverpb.KV/Range", &[], request).await;
            raw_refused(result, Code::InvalidArgument, "etcdserver: invalid sort option");
        }
    });
}

#[test]
fn a_large_range_comes_whole() {
    on_cluster(async |c| {
        let p = unique("many");
        let mut w = c.client(0).await;
        for batch in 0..20 {
            let puts: Vec<_> = (0..100)
                .map(|i| etcd_client::TxnOp::put(format!("{p}{:05}", batch * 100 + i), vec![b'v'; 300], None))
                .collect();
            w.txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
        }
        let got = c.client(1).await.get(p.as_str(), Some(prefix())).await.unwrap();
        assert_eq!((got.kvs().len(), got.count()), (2000, 2000));
        assert!(got.kvs().windows(2).all(|pair| pair[0].key() < pair[1].key()));
        w.delete(p.as_str(), Some(etcd_client::DeleteOptions::new().with_prefix())).await.unwrap();
    });
}
