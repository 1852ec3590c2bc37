//! Losing the leader: by kill -9, by a pause, by a polite stop.

use std::time::{Duration, Instant};

use etcd_client::{Client, PutOptions};
use rustix::process::Signal;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_own_cluster};
use crate::target::is_etcd;

/// How long until a write through this client succeeds again.
async fn gap(client: &mut Client, since: Instant) -> Duration {
    eventually("writes flow again", SOON, async || {
        let call = client.put("gap", "v", None);
        matches!(tokio::time::timeout(Duration::from_millis(500), call).await, Ok(Ok(_))).then_some(())
    })
    .await;
    since.elapsed()
}

async fn survivors_client(c: &Cluster, dead: usize) -> Client {
    c.client((dead + 1) % 3).await
}

#[test]
fn writes_flow_again_within_two_seconds_after_the_leader_is_killed() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let mut gaps = Vec::new();
        for _ in 0..5 {
            let leader = c.leader().await;
            let mut client = survivors_client(c, leader).await;
            client.put("before", "v", None).await.unwrap();
            let since = Instant::now();
            c.nodes[leader].kill();
            gaps.push(gap(&mut client, since).await);
            c.start_all();
            c.wait_ready().await;
        }
        gaps.sort();
        eprintln!("REPORT fail-over gaps after kill -9 of the leader: {gaps:?}");
        // etcd's own default takes up to twice its election timeout of one second, and a retry.
        let limit = if is_etcd() { 6 } else { 2 };
        // The median, because one core of a busy machine may be away for a second.
        assert!(gaps[2] < Duration::from_secs(limit), "{gaps:?}");
        assert!(gaps[4] < Duration::from_secs(2 * limit), "{gaps:?}");
    });
}

#[test]
fn a_paused_leader_is_replaced_and_never_answers_from_the_past() {
    on_own_cluster(Spec::nodes(3), async |c| {
        for round in 0..3 {
            let leader = c.leader().await;
            c.client(leader).await.put("k", format!("old{round}"), None).await.unwrap();
            c.nodes[leader].signal(Signal::STOP);
            let mut client = survivors_client(c, leader).await;
            eventually("the others write", SOON, async || {
                let call = client.put("k", format!("new{round}"), None);
                matches!(tokio::time::timeout(Duration::from_secs(1), call).await, Ok(Ok(_))).then_some(())
            })
            .await;
            // The read is asked while it sleeps, so that it is the first thing it does.
            let mut stale = c.client(leader).await;
            let read = tokio::spawn(async move {
                tokio::time::timeout(Duration::from_secs(10), stale.get("k", None)).await
            });
            tokio::time::sleep(Duration::from_millis(100)).await;
            c.nodes[leader].signal(Signal::CONT);
            if let Ok(Ok(got)) = read.await.unwrap() {
                assert_eq!(got.kvs()[0].value_str().unwrap(), format!("new{round}"), "a stale read");
            }
            c.wait_ready().await;
        }
    });
}

#[test]
fn a_paused_follower_slows_nobody_and_catches_up() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let follower = c.follower().await;
        c.nodes[follower].signal(Signal::STOP);
        let mut client = survivors_client(c, follower).await;
        let since = Instant::now();
        for i in 0..200 {
            client.put(format!("k{i}"), "v", None).await.unwrap();
        }
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
        c.nodes[follower].signal(Signal::CONT);
        c.wait_ready().await;
        assert_eq!(value(&mut c.client(follower).await, "k199").await.unwrap(), "v");
    });
}

#[test]
fn a_leader_stopped_politely_hands_over_and_ends_within_five_seconds() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let leader = c.leader().await;
        let mut client = survivors_client(c, leader).await;
        client.put("before", "v", None).await.unwrap();
        let since = Instant::now();
        c.nodes[leader].signal(Signal::TERM);
        let gap = gap(&mut client, since).await;
        let status = c.nodes[leader].wait_exit(Duration::from_secs(15)).await;
        let ended = since.elapsed();
        eprintln!(
            "REPORT polite stop of the leader: writes after {gap:?}, ended after {ended:?} with {status}"
        );
        if !is_etcd() {
            assert!(status.success(), "{status}");
            assert!(ended < Duration::from_secs(5), "{ended:?}");
            assert!(gap < Duration::from_secs(2), "{gap:?}");
        }
        c.start_all();
        c.wait_ready().await;
    });
}

#[test]
fn unfinished_calls_are_answered_when_a_node_stops() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let leader = c.leader().await;
        let mut tasks = Vec::new();
        for i in 0..20 {
            let mut client = c.client(leader).await;
            tasks.push(tokio::spawn(async move {
                for n in 0..500 {
                    let options = PutOptions::new().with_prev_key();
                    if client.put(format!("s{i}"), n.to_string(), Some(options)).await.is_err() {
                        return;
                    }
                }
            }));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        c.nodes[leader].signal(Signal::TERM);
        c.nodes[leader].wait_exit(Duration::from_secs(15)).await;
        for task in tasks {
            tokio::time::timeout(SOON, task).await.expect("no call hangs").unwrap();
        }
    });
}
