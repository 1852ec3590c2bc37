//! Leases: granting, keeping, revoking, expiring; across nodes and restarts.

use std::time::{Duration, Instant};

use etcd_client::{LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions};
use tokio_stream::StreamExt;
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_cluster, on_own_cluster};
use crate::raw::{self, LeaseKeepAliveRequest, LeaseKeepAliveResponse};

/// Keep-alive of any ids, in order, and the TTL of each answer.
async fn keep_alive(c: &Cluster, node: usize, ids: &[i64]) -> Vec<(i64, i64)> {
    let channel = raw::channel(&c.nodes[node].url()).await;
    let requests: Vec<_> = ids.iter().map(|id| LeaseKeepAliveRequest { id: *id }).collect();
    // The stream stays open until the answers are here: ending it early may drop them.
    let open = tokio_stream::iter(requests).chain(tokio_stream::pending());
    let path = "/etcdserverpb.Lease/LeaseKeepAlive";
    let mut answers = raw::streaming::<_, LeaseKeepAliveResponse>(&channel, path, &[], open).await.unwrap();
    let mut told = Vec::new();
    while told.len() < ids.len() {
        let answer = tokio::time::timeout(SOON, answers.message()).await.expect("an answer in time");
        let answer = answer.unwrap().expect("the stream goes on");
        told.push((answer.id, answer.ttl));
    }
    told
}

#[test]
fn a_lease_is_granted_with_a_chosen_or_a_drawn_id() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let drawn = client.lease_grant(100, None).await.unwrap();
        assert!(drawn.id() > 0 && drawn.ttl() == 100 && drawn.error().is_empty());
        let id = rand::random_range(1..i64::MAX);
        let chosen = client.lease_grant(100, Some(LeaseGrantOptions::new().with_id(id))).await.unwrap();
        assert_eq!(chosen.id(), id);
        let again = client.lease_grant(100, Some(LeaseGrantOptions::new().with_id(id))).await;
        refused(again, Code::FailedPrecondition, "etcdserver: lease already exists");
        let all: Vec<_> = c.client(1).await.leases().await.unwrap().leases().iter().map(|l| l.id()).collect();
        assert!(all.contains(&id) && all.contains(&drawn.id()));
        client.lease_revoke(id).await.unwrap();
        client.lease_revoke(drawn.id()).await.unwrap();
    });
}

#[test]
fn the_shortest_lease_is_two_seconds_and_the_longest_9_billion() {
    on_cluster(async |c| {
        let mut client = c.client(2).await;
        for asked in [1, 0, -5] {
            let lease = client.lease_grant(asked, None).await.unwrap();
            assert_eq!(lease.ttl(), 2, "asked {asked}");
            let _ = client.lease_revoke(lease.id()).await;
        }
        let longest = client.lease_grant(9_000_000_000, None).await.unwrap();
        assert_eq!(longest.ttl(), 9_000_000_000);
        client.lease_revoke(longest.id()).await.unwrap();
        let beyond = client.lease_grant(9_000_000_001, None).await;
        refused(beyond, Code::OutOfRange, "etcdserver: too large lease TTL");
    });
}

#[test]
fn an_unknown_lease_has_ttl_0_minus_1_or_is_not_found() {
    on_cluster(async |c| {
        let mut client = c.client(1).await;
        let id = 0x0dea_dbee;
        for node in 0..3 {
            assert_eq!(keep_alive(c, node, &[id]).await, [(id, 0)]);
        }
        let told = client.lease_time_to_live(id, None).await.unwrap();
        assert_eq!((told.id(), told.ttl(), told.granted_ttl(), told.keys().len()), (id, -1, 0, 0));
        refused(client.lease_revoke(id).await, Code::NotFound, "etcdserver: requested lease not found");
    });
}

#[test]
fn time_to_live_tells_what_is_left_and_which_keys_hang_on_it() {
    on_cluster(async |c| {
        let p = unique("ttl");
        let mut client = c.client(0).await;
        let lease = client.lease_grant(500, None).await.unwrap().id();
        for k in ["b", "a", "c"] {
            client.put(format!("{p}{k}"), "v", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        }
        client.put(format!("{p}c"), "free", None).await.unwrap();
        for node in 0..3 {
            let mut client = c.client(node).await;
            revision(&mut client).await;
            let options = Some(LeaseTimeToLiveOptions::new().with_keys());
            let told = client.lease_time_to_live(lease, options).await.unwrap();
            let mut keys = told.keys().to_vec();
            keys.sort();
            assert_eq!(keys, [format!("{p}a").into_bytes(), format!("{p}b").into_bytes()]);
            assert_eq!(told.granted_ttl(), 500);
            assert!((480..=500).contains(&told.ttl()), "{}", told.ttl());
            assert!(client.lease_time_to_live(lease, None).await.unwrap().keys().is_empty());
        }
        client.lease_revoke(lease).await.unwrap();
    });
}

#[test]
fn revoking_deletes_the_keys_in_one_revision() {
    on_cluster(async |c| {
        let p = unique("revoke");
        let mut client = c.client(1).await;
        let lease = client.lease_grant(500, None).await.unwrap().id();
        for i in 0..10 {
            client.put(format!("{p}{i}"), "v", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        }
        let before = revision(&mut client).await;
        let revoked = client.lease_revoke(lease).await.unwrap();
        assert_eq!(revoked.header().unwrap().revision(), before + 1);
        let mut other = c.client(2).await;
        assert_eq!(revision(&mut other).await, before + 1);
        assert!(get_one(&mut other, &format!("{p}3")).await.is_none());
        // Without keys, nothing changes.
        let empty = client.lease_grant(500, None).await.unwrap().id();
        client.lease_revoke(empty).await.unwrap();
        assert_eq!(revision(&mut client).await, before + 1);
    });
}

#[test]
fn a_lease_that_nobody_keeps_expires_with_all_its_keys_in_one_revision() {
    on_cluster(async |c| {
        let p = unique("expire");
        let mut client = c.client(0).await;
        let lease = client.lease_grant(2, None).await.unwrap().id();
        let started = Instant::now();
        for i in 0..3 {
            client.put(format!("{p}{i}"), "v", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        }
        let before = revision(&mut client).await;
        eventually("the lease expires", SOON, async || {
            get_one(&mut client, &format!("{p}0")).await.is_none().then_some(())
        })
        .await;
        assert!(started.elapsed() >= Duration::from_millis(1900), "early: {:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(10), "late: {:?}", started.elapsed());
        assert_eq!(revision(&mut client).await, before + 1);
        assert_eq!(client.lease_time_to_live(lease, None).await.unwrap().ttl(), -1);
        assert_eq!(keep_alive(c, 1, &[lease]).await, [(lease, 0)]);
    });
}

#[test]
fn a_kept_lease_lives_whichever_node_is_asked() {
    on_cluster(async |c| {
        let key = unique("kept") + "k";
        let mut client = c.client(0).await;
        let lease = client.lease_grant(3, None).await.unwrap().id();
        client.put(key.as_str(), "v", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        let until = Instant::now() + Duration::from_secs(6);
        let mut node = 0;
        while Instant::now() < until {
            assert_eq!(keep_alive(c, node % 3, &[lease, lease]).await, [(lease, 3), (lease, 3)]);
            node += 1;
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
        assert!(get_one(&mut client, &key).await.is_some());
        client.lease_revoke(lease).await.unwrap();
    });
}

#[test]
fn a_put_moves_a_key_between_leases() {
    on_cluster(async |c| {
        let key = unique("move") + "k";
        let mut client = c.client(0).await;
        let (one, two) = (
            client.lease_grant(500, None).await.unwrap().id(),
            client.lease_grant(500, None).await.unwrap().id(),
        );
        client.put(key.as_str(), "v", Some(PutOptions::new().with_lease(one))).await.unwrap();
        client.put(key.as_str(), "v", Some(PutOptions::new().with_lease(two))).await.unwrap();
        client.lease_revoke(one).await.unwrap();
        assert_eq!(get_one(&mut client, &key).await.unwrap().lease(), two);
        client.put(key.as_str(), "v", None).await.unwrap();
        client.lease_revoke(two).await.unwrap();
        assert_eq!(get_one(&mut client, &key).await.unwrap().lease(), 0);
    });
}

#[test]
fn a_new_leader_gives_the_full_time_again_and_then_it_expires() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let leader = c.leader().await;
        let other = (leader + 1) % 3;
        let mut client = c.client(other).await;
        let lease = client.lease_grant(6, None).await.unwrap().id();
        client.put("k", "v", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3)).await;
        c.nodes[leader].kill();
        eventually("a new leader", SOON, async || client.get("k", None).await.ok()).await;
        let since = Instant::now();
        let left = eventually("the lease is known", SOON, async || {
            client.lease_time_to_live(lease, None).await.ok().filter(|told| told.ttl() > 0)
        })
        .await;
        assert_eq!(left.granted_ttl(), 6);
        eventually("the lease expires", SOON, async || {
            matches!(client.get("k", None).await, Ok(got) if got.kvs().is_empty()).then_some(())
        })
        .await;
        assert!(since.elapsed() > Duration::from_millis(2900), "short: {:?}", since.elapsed());
    });
}

#[test]
fn leases_survive_the_restart_of_every_node() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let mut client = c.client(0).await;
        let lease = client.lease_grant(400, None).await.unwrap().id();
        client.put("k", "v", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        c.kill_all();
        c.start_all();
        c.wait_ready().await;
        let mut client = c.client(1).await;
        let told =
            client.lease_time_to_live(lease, Some(LeaseTimeToLiveOptions::new().with_keys())).await.unwrap();
        assert_eq!((told.granted_ttl(), told.keys().to_vec()), (400, vec![b"k".to_vec()]));
        client.lease_revoke(lease).await.unwrap();
        assert!(get_one(&mut client, "k").await.is_none());
    });
}
