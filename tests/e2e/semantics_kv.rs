//! Put, delete, compact: what etcd's clients rely on of single keys.
//!
//! Writes go through one node and reads through another, so that every line
//! also holds across nodes.

use etcd_client::{CompactionOptions, DeleteOptions, GetOptions, PutOptions};
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Spec, on_cluster, on_own_cluster};

#[test]
fn a_new_store_is_at_revision_1_and_every_write_adds_one() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut client = c.client(0).await;
        assert_eq!(revision(&mut client).await, 1);
        for expected in 2..6 {
            let put = client.put("k", "v", None).await.unwrap();
            assert_eq!(put.header().unwrap().revision(), expected);
        }
    });
}

#[test]
fn what_one_node_wrote_another_reads() {
    on_cluster(async |c| {
        let p = unique("across");
        for (writer, reader) in [(0, 1), (1, 2), (2, 0)] {
            let key = format!("{p}{writer}");
            let put = c.client(writer).await.put(key.as_str(), "written", None).await.unwrap();
            let read = c.client(reader).await.get(key.as_str(), None).await.unwrap();
            assert_eq!(read.kvs()[0].value(), b"written");
            assert_eq!(read.kvs()[0].mod_revision(), put.header().unwrap().revision());
        }
    });
}

#[test]
fn a_writer_reads_its_own_write_serializably_from_the_same_node() {
    on_cluster(async |c| {
        let p = unique("own");
        for i in 0..60 {
            let mut client = c.client(i % 3).await;
            let put = client.put(format!("{p}k"), i.to_string(), None).await.unwrap();
            let read =
                client.get(format!("{p}k"), Some(GetOptions::new().with_serializable())).await.unwrap();
            assert_eq!(read.kvs()[0].value_str().unwrap(), i.to_string());
            assert!(read.header().unwrap().revision() >= put.header().unwrap().revision());
        }
    });
}

#[test]
fn a_key_counts_its_versions_and_starts_anew_after_a_delete() {
    on_cluster(async |c| {
        let (mut w, mut r) = (c.client(0).await, c.client(1).await);
        let key = unique("versions") + "k";
        let first = w.put(key.as_str(), "a", None).await.unwrap().header().unwrap().revision();
        let second = w.put(key.as_str(), "b", None).await.unwrap().header().unwrap().revision();
        assert_eq!(second, first + 1);
        assert_eq!(marks(&get_one(&mut r, &key).await.unwrap()), (first, second, 2, "b".into()));
        let deleted = w.delete(key.as_str(), None).await.unwrap();
        assert_eq!((deleted.deleted(), deleted.header().unwrap().revision()), (1, second + 1));
        assert!(get_one(&mut r, &key).await.is_none());
        let again = w.put(key.as_str(), "c", None).await.unwrap().header().unwrap().revision();
        assert_eq!(marks(&get_one(&mut r, &key).await.unwrap()), (again, again, 1, "c".into()));
    });
}

#[test]
fn keys_and_values_are_bytes() {
    on_cluster(async |c| {
        let (mut w, mut r) = (c.client(0).await, c.client(1).await);
        let mut key = unique("bytes").into_bytes();
        key.extend([0, 255, 0, 1, 254]);
        let value: Vec<u8> = (0..=255).collect();
        w.put(key.clone(), value.clone(), None).await.unwrap();
        let read = r.get(key.clone(), None).await.unwrap();
        assert_eq!((read.kvs()[0].key(), read.kvs()[0].value()), (&key[..], &value[..]));
        w.put(key.clone(), "", None).await.unwrap();
        assert_eq!(r.get(key, None).await.unwrap().kvs()[0].value(), b"");
    });
}

#[test]
fn a_put_returns_what_was_there_only_when_asked() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let key = unique("prev") + "k";
        let asked = || Some(PutOptions::new().with_prev_key());
        let first = client.put(key.as_str(), "a", asked()).await.unwrap();
        assert!(first.prev_key().is_none());
        assert!(client.put(key.as_str(), "b", None).await.unwrap().prev_key().is_none());
        let third = client.put(key.as_str(), "c", asked()).await.unwrap();
        let rev = first.header().unwrap().revision();
        assert_eq!(marks(third.prev_key().unwrap()), (rev, rev + 1, 2, "b".into()));
    });
}

#[test]
fn ignore_value_and_ignore_lease_keep_what_is_there() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let key = unique("ignore") + "k";
        let lease = client.lease_grant(600, None).await.unwrap().id();
        client.put(key.as_str(), "kept", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        client.put(key.as_str(), "", Some(PutOptions::new().with_ignore_value())).await.unwrap();
        let kv = get_one(&mut client, &key).await.unwrap();
        assert_eq!((kv.value(), kv.lease(), kv.version()), (&b"kept"[..], 0, 2));
        client.put(key.as_str(), "kept", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        client.put(key.as_str(), "new", Some(PutOptions::new().with_ignore_lease())).await.unwrap();
        let kv = get_one(&mut client, &key).await.unwrap();
        assert_eq!((kv.value(), kv.lease(), kv.version()), (&b"new"[..], lease, 4));
        client.lease_revoke(lease).await.unwrap();
    });
}

#[test]
fn ignore_options_on_a_missing_key_or_with_a_value_are_refused() {
    on_cluster(async |c| {
        let mut client = c.client(1).await;
        let key = unique("ignore-missing") + "k";
        let before = revision(&mut client).await;
        let (value, lease) = (PutOptions::new().with_ignore_value(), PutOptions::new().with_ignore_lease());
        let result = client.put(key.as_str(), "", Some(value.clone())).await;
        refused(result, Code::InvalidArgument, "etcdserver: key not found");
        let result = client.put(key.as_str(), "v", Some(lease.clone())).await;
        refused(result, Code::InvalidArgument, "etcdserver: key not found");
        let result = client.put(key.as_str(), "v", Some(value)).await;
        refused(result, Code::InvalidArgument, "etcdserver: value is provided");
        let result = client.put(key.as_str(), "v", Some(lease.with_lease(7))).await;
        refused(result, Code::InvalidArgument, "etcdserver: lease is provided");
        assert_eq!(revision(&mut client).await, before);
    });
}

#[test]
fn an_unknown_lease_is_refused_and_changes_nothing() {
    on_cluster(async |c| {
        let mut client = c.client(2).await;
        let key = unique("no-lease") + "k";
        let before = revision(&mut client).await;
        let options = PutOptions::new().with_lease(0x0123_4567_89ab);
        let result = client.put(key.as_str(), "v", Some(options)).await;
        refused(result, Code::NotFound, "etcdserver: requested lease not found");
        assert_eq!(revision(&mut client).await, before);
    });
}

#[test]
fn an_empty_key_is_refused_everywhere() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let (code, message) = (Code::InvalidArgument, "etcdserver: key is not provided");
        refused(client.put("", "v", None).await, code, message);
        refused(client.get("", None).await, code, message);
        refused(client.delete("", None).await, code, message);
    });
}

#[test]
fn a_delete_of_nothing_adds_no_revision() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let key = unique("nothing") + "k";
        let before = revision(&mut client).await;
        let response = client.delete(key.as_str(), None).await.unwrap();
        assert_eq!((response.deleted(), response.header().unwrap().revision()), (0, before));
        assert_eq!(revision(&mut client).await, before);
    });
}

#[test]
fn a_range_delete_is_one_revision_and_returns_what_was_there() {
    on_cluster(async |c| {
        let (mut w, mut r) = (c.client(0).await, c.client(1).await);
        let p = unique("delete-range");
        for key in ["a", "b", "c", "d"] {
            w.put(format!("{p}{key}"), key, None).await.unwrap();
        }
        let before = revision(&mut w).await;
        let options = DeleteOptions::new().with_range(format!("{p}c")).with_prev_key();
        let response = w.delete(format!("{p}a"), Some(options)).await.unwrap();
        assert_eq!((response.deleted(), response.header().unwrap().revision()), (2, before + 1));
        let values: Vec<_> =
            response.prev_kvs().iter().map(|kv| kv.value_str().unwrap().to_owned()).collect();
        assert_eq!(values, ["a", "b"]);
        let rest = r.get(p.as_str(), Some(GetOptions::new().with_prefix())).await.unwrap();
        assert_eq!(short_keys(&rest, &p), ["c", "d"]);
        let without = w.delete(p.as_str(), Some(DeleteOptions::new().with_prefix())).await.unwrap();
        assert_eq!((without.deleted(), without.prev_kvs().len()), (2, 0));
    });
}

#[test]
fn compaction_forgets_below_its_revision_and_keeps_it_readable() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let (mut w, mut r) = (c.client(0).await, c.client(1).await);
        for value in ["a", "b", "c"] {
            w.put("k", value, None).await.unwrap();
        }
        w.put("other", "x", None).await.unwrap();
        w.delete("other", None).await.unwrap();
        let at = revision(&mut w).await - 2;
        w.compact(at, None).await.unwrap();
        assert_eq!(revision(&mut r).await, at + 2, "compaction adds no revision");
        let old = |rev| Some(GetOptions::new().with_revision(rev));
        refused(
            r.get("k", old(at - 1)).await,
            Code::OutOfRange,
            "etcdserver: mvcc: required revision has been compacted",
        );
        let kept = r.get("k", old(at)).await.unwrap();
        assert_eq!(kept.kvs()[0].value(), b"c");
        assert_eq!(kept.header().unwrap().revision(), at + 2, "the header tells the current revision");
        assert_eq!(r.get("other", old(at + 1)).await.unwrap().kvs()[0].value(), b"x");
        assert_eq!(r.get("other", old(at + 2)).await.unwrap().kvs().len(), 0);
    });
}

#[test]
fn compaction_at_or_below_the_last_one_or_in_the_future_is_refused() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut client = c.client(0).await;
        for i in 0..5 {
            client.put("k", i.to_string(), None).await.unwrap();
        }
        client.compact(4, Some(CompactionOptions::new().with_physical())).await.unwrap();
        for at in [4, 3] {
            refused(
                client.compact(at, None).await,
                Code::OutOfRange,
                "etcdserver: mvcc: required revision has been compacted",
            );
        }
        refused(
            client.compact(7, None).await,
            Code::OutOfRange,
            "etcdserver: mvcc: required revision is a future revision",
        );
        client.compact(6, None).await.unwrap();
        assert_eq!(value(&mut client, "k").await.unwrap(), "4");
    });
}

#[test]
fn a_read_of_a_future_revision_is_refused() {
    on_cluster(async |c| {
        let mut client = c.client(1).await;
        let next = revision(&mut client).await + 1;
        refused(
            client.get("k", Some(GetOptions::new().with_revision(next))).await,
            Code::OutOfRange,
            "etcdserver: mvcc: required revision is a future revision",
        );
    });
}

#[test]
fn a_request_beyond_the_limit_is_refused_and_one_below_it_is_not() {
    on_cluster(async |c| {
        let mut client = c.client(1).await;
        let key = unique("large") + "k";
        client.put(key.as_str(), vec![b'x'; 1_500_000], None).await.unwrap();
        let result = client.put(key.as_str(), vec![b'x'; 1_600_000], None).await;
        refused(result, Code::InvalidArgument, "etcdserver: request is too large");
        assert_eq!(get_one(&mut client, &key).await.unwrap().value().len(), 1_500_000);
        client.delete(key, None).await.unwrap();
    });
}

#[test]
fn the_header_names_cluster_member_revision_and_term() {
    on_cluster(async |c| {
        let mut clusters = Vec::new();
        let mut members = Vec::new();
        for i in 0..3 {
            let mut client = c.client(i).await;
            let response = client.get("header", None).await.unwrap();
            let header = response.header().unwrap();
            assert!(header.raft_term() > 0 && header.revision() > 0);
            assert_eq!(header.member_id(), c.member_id(i).await);
            clusters.push(header.cluster_id());
            members.push(header.member_id());
        }
        assert!(clusters[0] != 0 && clusters.iter().all(|id| *id == clusters[0]));
        members.sort_unstable();
        members.dedup();
        assert_eq!(members.len(), 3);
    });
}

#[test]
fn equal_content_hashes_equal_on_all_nodes() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let mut w = c.client(0).await;
        for i in 0..200 {
            w.put(format!("h{}", i % 50), i.to_string(), None).await.unwrap();
        }
        w.delete("h1", Some(DeleteOptions::new().with_range("h3"))).await.unwrap();
        w.compact(100, None).await.unwrap();
        let at = revision(&mut w).await;
        for rev in [at, 150] {
            eventually("equal hashes on all nodes", SOON, async || {
                let mut seen = Vec::new();
                for i in 0..3 {
                    let mut client = c.client(i).await;
                    revision(&mut client).await;
                    seen.push(hash_kv(&mut client, rev).await);
                }
                seen.iter().all(|hash| *hash == seen[0]).then_some(())
            })
            .await;
        }
        let before = hash_kv(&mut w, at).await;
        w.put("h9", "changed", None).await.unwrap();
        assert_eq!(hash_kv(&mut w, at).await, before, "the past does not change");
        assert_ne!(hash_kv(&mut w, 0).await.0, before.0, "the present does");
    });
}
