//! RangeStream: the concatenation of its chunks equals Range, and what it refuses.

use etcd_client::{GetOptions, GetResponse, SortOrder, SortTarget, Txn, TxnOp};
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Cluster, on_cluster};
use crate::target::etcd_before;

async fn chunks(c: &Cluster, key: &str, options: GetOptions) -> Result<Vec<GetResponse>, etcd_client::Error> {
    let mut stream = c.client(1).await.kv_client().get_stream(key, Some(options)).await?;
    let mut all = Vec::new();
    while let Some(chunk) = stream.message().await? {
        all.push(chunk);
    }
    Ok(all)
}

async fn fill(c: &Cluster, p: &str, keys: usize, value_bytes: usize) {
    let mut w = c.client(0).await;
    for from in (0..keys).step_by(50) {
        let puts: Vec<_> = (from..(from + 50).min(keys))
            .map(|i| TxnOp::put(format!("{p}{i:05}"), vec![b'v'; value_bytes], None))
            .collect();
        w.txn(Txn::new().and_then(puts)).await.unwrap();
    }
}

#[test]
fn the_chunks_put_together_are_the_range() {
    if etcd_before((3, 7)) {
        return;
    }
    on_cluster(async |c| {
        let p = unique("stream");
        fill(c, &p, 3000, 1000).await;
        let mut r = c.client(2).await;
        let revision = revision(&mut r).await;
        let prefix = || GetOptions::new().with_prefix();
        let cases = [
            prefix(),
            prefix().with_limit(1234),
            prefix().with_limit(3000),
            prefix().with_keys_only(),
            prefix().with_count_only(),
            prefix().with_revision(revision - 30),
            prefix().with_serializable(),
            GetOptions::new(),
        ];
        for options in cases {
            let whole = r.get(p.as_str(), Some(options.clone())).await.unwrap();
            let parts = chunks(c, &p, options.clone()).await.unwrap();
            let kvs: Vec<_> =
                parts.iter().flat_map(|part| part.kvs()).map(|kv| (kv.key(), marks(kv))).collect();
            let expected: Vec<_> = whole.kvs().iter().map(|kv| (kv.key(), marks(kv))).collect();
            assert!(kvs == expected, "{options:?}: {} of {}", kvs.len(), expected.len());
            let (last, before) = parts.split_last().expect("at least one chunk");
            assert_eq!((last.count(), last.more()), (whole.count(), whole.more()), "{options:?}");
            assert_eq!(last.header().unwrap().revision(), revision);
            assert!(before.iter().all(|part| part.count() == 0 && !part.more()), "{options:?}");
        }
        let parts = chunks(c, &p, prefix()).await.unwrap();
        assert!(parts.len() > 1, "3 MB come in more than one chunk");
    });
}

#[test]
fn a_stream_reads_one_revision_while_writers_go_on() {
    if etcd_before((3, 7)) {
        return;
    }
    on_cluster(async |c| {
        let p = unique("steady");
        fill(c, &p, 2000, 1000).await;
        let mut stream = c
            .client(1)
            .await
            .kv_client()
            .get_stream(p.as_str(), Some(GetOptions::new().with_prefix()))
            .await
            .unwrap();
        let mut seen = stream.message().await.unwrap().expect("a first chunk").kvs().len();
        let mut w = c.client(0).await;
        for i in 0..200 {
            w.delete(format!("{p}{:05}", 1999 - i), None).await.unwrap();
            w.put(format!("{p}x{i}"), "late", None).await.unwrap();
        }
        while let Some(chunk) = stream.message().await.unwrap() {
            assert!(chunk.kvs().iter().all(|kv| kv.value() != b"late"));
            seen += chunk.kvs().len();
        }
        assert_eq!(seen, 2000);
    });
}

#[test]
fn sorts_and_revision_filters_are_unimplemented() {
    if etcd_before((3, 7)) {
        return;
    }
    on_cluster(async |c| {
        let prefix = || GetOptions::new().with_prefix();
        let sorted = chunks(c, "k", prefix().with_sort(SortTarget::Key, SortOrder::Descend)).await;
        refused(sorted, Code::Unimplemented, "RangeStream does not support custom sort orders");
        let filters = [
            prefix().with_min_mod_revision(1),
            prefix().with_max_mod_revision(1),
            prefix().with_min_create_revision(1),
            prefix().with_max_create_revision(1),
        ];
        for filter in filters {
            let result = chunks(c, "k", filter).await;
            refused(result, Code::Unimplemented, "RangeStream does not support revision filters");
        }
        chunks(c, "k", prefix().with_sort(SortTarget::Key, SortOrder::Ascend)).await.unwrap();
    });
}

#[test]
fn empty_keys_and_wrong_revisions_are_refused_as_in_range() {
    if etcd_before((3, 7)) {
        return;
    }
    on_cluster(async |c| {
        let empty = chunks(c, "", GetOptions::new()).await;
        refused(empty, Code::InvalidArgument, "etcdserver: key is not provided");
        let next = revision(&mut c.client(0).await).await + 1000;
        let future = chunks(c, "k", GetOptions::new().with_revision(next)).await;
        refused(future, Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision");
    });
}
