//! Settings that change what clients see: limits, compaction by itself, and
//! etcd's own flags taken as they stand in a unit file.

use std::time::Duration;

use etcd_client::{GetOptions, Txn, TxnOp};
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Spec, on_own_cluster};
use crate::target::not_in_etcd;

#[test]
fn the_flags_of_an_etcd_unit_file_are_taken_as_they_are() {
    let spec = Spec::nodes(1)
        .flag("heartbeat-interval", 100)
        .flag("election-timeout", 1000)
        .flag("quota-backend-bytes", 2_147_483_648u64)
        .flag("max-request-bytes", 1_572_864)
        .flag("max-txn-ops", 128)
        .flag("snapshot-count", 10_000)
        .flag("auto-compaction-mode", "periodic")
        .flag("auto-compaction-retention", "1h")
        .flag("log-level", "info");
    on_own_cluster(spec, async |c| {
        c.client(0).await.put("k", "v", None).await.unwrap();
    });
}

#[test]
fn smaller_limits_are_kept() {
    let spec = Spec::nodes(1).flag("max-txn-ops", 4).flag("max-request-bytes", 65_536);
    on_own_cluster(spec, async |c| {
        let mut client = c.client(0).await;
        let puts = |n: usize| {
            Txn::new().and_then((0..n).map(|i| TxnOp::put(format!("{i}"), "v", None)).collect::<Vec<_>>())
        };
        client.txn(puts(4)).await.unwrap();
        let many = client.txn(puts(5)).await;
        refused(many, Code::InvalidArgument, "etcdserver: too many operations in txn request");
        client.put("k", vec![b'v'; 60_000], None).await.unwrap();
        let large = client.put("k", vec![b'v'; 70_000], None).await;
        refused(large, Code::InvalidArgument, "etcdserver: request is too large");
        let batch = Txn::new()
            .and_then([TxnOp::put("a", vec![b'v'; 40_000], None), TxnOp::put("b", vec![b'v'; 40_000], None)]);
        refused(client.txn(batch).await, Code::InvalidArgument, "etcdserver: request is too large");
    });
}

#[test]
fn history_is_compacted_by_itself_after_its_time() {
    let spec =
        Spec::nodes(3).flag("auto-compaction-mode", "periodic").flag("auto-compaction-retention", "1s");
    on_own_cluster(spec, async |c| {
        let mut client = c.client(0).await;
        let first = client.put("k", "0", None).await.unwrap().header().unwrap().revision();
        client.put("k", "1", None).await.unwrap();
        let gone = eventually("the first revision is forgotten", Duration::from_secs(40), async || {
            client.put("other", "v", None).await.unwrap();
            client.get("k", Some(GetOptions::new().with_revision(first))).await.err()
        })
        .await;
        refused::<()>(Err(gone), Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted");
        assert_eq!(value(&mut client, "k").await.unwrap(), "1");
    });
}

#[test]
fn more_writes_than_are_admitted_are_refused_as_too_many_requests() {
    if not_in_etcd("its limit is 5,000 entries between commit and apply, which no test reaches") {
        return;
    }
    on_own_cluster(Spec::nodes(3).flag("max-inflight-requests", 4), async |c| {
        let mut tasks = Vec::new();
        for i in 0..64 {
            let mut client = c.client(0).await;
            tasks.push(tokio::spawn(async move {
                let (mut done, mut refused) = (0, 0);
                for n in 0..20 {
                    match client.put(format!("k{i}"), n.to_string(), None).await {
                        Ok(_) => done += 1,
                        Err(etcd_client::Error::GRpcStatus(status)) => {
                            let expected = (Code::ResourceExhausted, "etcdserver: too many requests");
                            assert_eq!((status.code(), status.message()), expected);
                            refused += 1;
                        }
                        Err(other) => panic!("{other}"),
                    }
                }
                (done, refused)
            }));
        }
        let (mut done, mut refused) = (0, 0);
        for task in tasks {
            let (d, r) = task.await.unwrap();
            (done, refused) = (done + d, refused + r);
        }
        assert!(done > 0 && refused > 0, "{done} done, {refused} refused");
        c.client(0).await.put("after", "v", None).await.unwrap();
        assert_eq!(revision(&mut c.client(1).await).await, done + 2, "refused means not done");
    });
}

#[test]
fn a_read_beyond_its_memory_is_refused_and_can_be_streamed() {
    if not_in_etcd("a limit on the memory of a read") {
        return;
    }
    on_own_cluster(Spec::nodes(1).flag("max-range-bytes", "2MiB"), async |c| {
        let mut client = c.client(0).await;
        for i in 0..300 {
            client.put(format!("r{i:03}"), vec![b'v'; 10_000], None).await.unwrap();
        }
        let prefix = || Some(GetOptions::new().with_prefix());
        let status = status_of(client.get("r", prefix()).await);
        assert!(matches!(status.code(), Code::ResourceExhausted | Code::InvalidArgument), "{status:?}");
        let cut = client.get("r", Some(GetOptions::new().with_prefix().with_limit(50))).await.unwrap();
        assert_eq!((cut.kvs().len(), cut.count()), (50, 300));
        let mut stream = client.kv_client().get_stream("r", prefix()).await.unwrap();
        let mut seen = 0;
        while let Some(part) = stream.message().await.unwrap() {
            seen += part.kvs().len();
        }
        assert_eq!(seen, 300);
    });
}
