//! Request ids: a write repeated with the same id is applied once, whatever
//! happened to the cluster in between. Mainstay's own; etcd has none.

use std::time::Duration;

use etcd_client::GetOptions;
use tonic::{Code, Status};

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_own_cluster};
use crate::raw::{self, PutRequest, PutResponse};
use crate::target::not_in_etcd;

#[derive(Clone, PartialEq, prost::Message)]
struct OpenRequest {
    #[prost(uint64, tag = "1")]
    ttl_s: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct OpenResponse {
    #[prost(uint64, tag = "1")]
    session: u64,
    #[prost(uint64, tag = "2")]
    ttl_s: u64,
}

async fn open(c: &Cluster, node: usize, ttl_s: u64) -> u64 {
    let channel = raw::channel(&c.nodes[node].url()).await;
    let opened: OpenResponse =
        raw::unary(&channel, "/mainstay.v1.Sessions/Open", &[], OpenRequest { ttl_s }).await.unwrap();
    assert!(opened.session != 0 && opened.ttl_s > 0);
    opened.session
}

async fn put(
    c: &Cluster,
    node: usize,
    (session, sequence, acknowledged): (u64, u64, u64),
    key: &str,
    value: &str,
) -> Result<PutResponse, Status> {
    let channel = raw::channel(&c.nodes[node].url()).await;
    let metadata = [
        ("mainstay-session", session.to_string()),
        ("mainstay-sequence", sequence.to_string()),
        ("mainstay-acknowledged", acknowledged.to_string()),
    ];
    let request = PutRequest { key: key.into(), value: value.into(), prev_kv: true, ..Default::default() };
    raw::unary(&channel, "/etcdserverpb.KV/Put", &metadata, request).await
}

fn at(response: &PutResponse) -> i64 {
    response.header.as_ref().unwrap().revision
}

#[test]
fn a_repeated_write_is_applied_once_on_any_node() {
    if not_in_etcd("request ids") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let session = open(c, 0, 60).await;
        let first = put(c, 0, (session, 1, 0), "k", "a").await.unwrap();
        c.client(1).await.put("k", "between", None).await.unwrap();
        for node in 0..3 {
            let again = put(c, node, (session, 1, 0), "k", "a").await.unwrap();
            assert_eq!(again.prev_kv, first.prev_kv, "the same answer as the first time");
            assert_eq!(at(&again), at(&first), "also the revision that it was done at");
        }
        let kv = get_one(&mut c.client(2).await, "k").await.unwrap();
        assert_eq!((kv.value(), kv.version(), kv.mod_revision()), (&b"between"[..], 2, at(&first) + 1));
    });
}

#[test]
fn sequences_may_come_out_of_order_and_at_once() {
    if not_in_etcd("request ids") {
        return;
    }
    on_own_cluster(Spec::nodes(1), async |c| {
        let session = open(c, 0, 60).await;
        let order = [7, 2, 5, 1, 6, 3, 4];
        for sequence in order {
            put(c, 0, (session, sequence, 0), &format!("k{sequence}"), "v").await.unwrap();
        }
        for sequence in order {
            put(c, 0, (session, sequence, 0), &format!("k{sequence}"), "v").await.unwrap();
        }
        let got = c.client(0).await.get("k", Some(GetOptions::new().with_prefix())).await.unwrap();
        assert!(got.kvs().iter().all(|kv| kv.version() == 1));
        assert_eq!(got.header().unwrap().revision(), 8);
        let both =
            tokio::join!(put(c, 0, (session, 8, 0), "twin", "v"), put(c, 0, (session, 8, 0), "twin", "v"));
        both.0.unwrap();
        both.1.unwrap();
        assert_eq!(get_one(&mut c.client(0).await, "twin").await.unwrap().version(), 1);
    });
}

#[test]
fn wrong_ids_are_refused_and_change_nothing() {
    if not_in_etcd("request ids") {
        return;
    }
    on_own_cluster(Spec::nodes(1), async |c| {
        let session = open(c, 0, 60).await;
        put(c, 0, (session, 1, 0), "k", "a").await.unwrap();
        put(c, 0, (session, 3, 2), "k", "b").await.unwrap();
        let before = revision(&mut c.client(0).await).await;
        let unknown = put(c, 0, (session ^ 1, 1, 0), "k", "x").await.unwrap_err();
        assert!(unknown.message().contains("session"), "{unknown:?}");
        let acknowledged = put(c, 0, (session, 1, 2), "k", "a").await.unwrap_err();
        assert!(acknowledged.message().contains("acknowledged"), "{acknowledged:?}");
        let reused = put(c, 0, (session, 3, 2), "k", "other").await.unwrap_err();
        assert!(reused.message().contains("used before"), "{reused:?}");
        for status in [unknown, acknowledged, reused] {
            assert!(
                !matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal),
                "{status:?}"
            );
        }
        let channel = raw::channel(&c.nodes[0].url()).await;
        for bad in ["", "x", "-1", "99999999999999999999999"] {
            let metadata = [("mainstay-session", bad.to_owned()), ("mainstay-sequence", "9".to_owned())];
            let request = PutRequest { key: b"k".to_vec(), ..Default::default() };
            let result: Result<PutResponse, _> =
                raw::unary(&channel, "/etcdserverpb.KV/Put", &metadata, request).await;
            assert_eq!(result.unwrap_err().code(), Code::InvalidArgument, "{bad:?}");
        }
        assert_eq!(revision(&mut c.client(0).await).await, before);
    });
}

#[test]
fn an_expired_session_is_refused() {
    if not_in_etcd("request ids") {
        return;
    }
    on_own_cluster(Spec::nodes(1), async |c| {
        let session = open(c, 0, 1).await;
        put(c, 0, (session, 1, 0), "k", "a").await.unwrap();
        let refused = eventually("the session expires", Duration::from_secs(90), async || {
            tokio::time::sleep(Duration::from_millis(500)).await;
            put(c, 0, (session, 1, 0), "k", "a").await.err()
        })
        .await;
        assert!(refused.message().contains("session"), "{refused:?}");
    });
}

#[test]
fn a_repeat_is_recognised_after_leader_change_restart_and_snapshot() {
    if not_in_etcd("request ids") {
        return;
    }
    on_own_cluster(Spec::nodes(3).flag("snapshot-count", 100), async |c| {
        let session = open(c, 1, 600).await;
        let first = put(c, 1, (session, 1, 0), "k", "once").await.unwrap();
        let repeat = async |c: &Cluster, when: &str| {
            for node in 0..3 {
                let again = put(c, node, (session, 1, 0), "k", "once").await.unwrap();
                assert_eq!(again.prev_kv, first.prev_kv, "{when}");
            }
            let kv = get_one(&mut c.client(0).await, "k").await.unwrap();
            assert_eq!((kv.version(), kv.mod_revision()), (1, at(&first)), "{when}");
        };
        let leader = c.leader().await;
        c.nodes[leader].kill();
        let alive = (leader + 1) % 3;
        eventually("a new leader", SOON, async || c.client(alive).await.put("x", "y", None).await.ok()).await;
        c.start_all();
        c.wait_ready().await;
        repeat(c, "after a leader change").await;
        c.kill_all();
        c.start_all();
        c.wait_ready().await;
        repeat(c, "after the restart of all").await;
        // Past the snapshot, with a follower that slept through it.
        let follower = c.follower().await;
        c.nodes[follower].kill();
        let mut client = c.client((follower + 1) % 3).await;
        for i in 0..500 {
            client.put("fill", i.to_string(), None).await.unwrap();
        }
        c.start_all();
        c.wait_ready().await;
        c.kill_all();
        c.start_all();
        c.wait_ready().await;
        repeat(c, "after a snapshot").await;
    });
}
