//! Clusters in one process: the real log, state and tasks of every node, over a
//! network that is only a table of nodes.

mod cluster;
mod network;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use cluster::{Cluster, ELECTION_TIMEOUT, PATIENCE, eventually, get, put, put_operation};
use tokio::time::Instant;

use super::*;
use crate::storage::StateOptions;
use crate::types::{Alarm, AlarmAction, AlarmKind, ApplyError, Outcome, Revision};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_takes_writes_and_reads_what_was_acknowledged() {
    let cluster = Cluster::start(3).await;
    let mut revisions = Vec::new();
    for name in ["n1", "n2", "n3"] {
        let node = cluster.node(name);
        let reply = node.propose(put_operation(name, "1"), ProposeContext::default()).await.unwrap();
        assert!(node.view().revision >= reply.revision, "its own view has what it acknowledged");
        revisions.push(reply.revision);
    }
    assert_eq!(revisions, [Revision(2), Revision(3), Revision(4)]);
    for name in ["n1", "n2", "n3"] {
        let node = cluster.node(name);
        node.read_barrier().await.unwrap();
        assert_eq!(get(node, "n3").as_deref(), Some("1"), "{name}");
    }
    let members = cluster.node("n2").members(true).await.unwrap();
    assert_eq!(members.len(), 3);
    assert!(members.iter().all(|view| view.is_voter && view.member.disk != 0));
    eventually("every name and client URL is published", || {
        cluster.names().iter().all(|name| {
            let roster = cluster.node(name).inner.core.committed_roster();
            roster.members.values().all(|view| !view.member.client_urls.is_empty())
        })
    })
    .await;
    eventually("the cluster version is set", || cluster.node("n3").view().cluster_version == own_version())
        .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_the_leader_goes() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let follower = cluster.names().into_iter().find(|name| *name != leader).unwrap();
    let node = cluster.node(&follower).clone();
    let writing = tokio::spawn(async move {
        let mut acknowledged = BTreeMap::new();
        for round in 0..300 {
            let key = format!("k{}", round % 7);
            let value = round.to_string();
            match node.propose(put_operation(&key, &value), ProposeContext::default()).await {
                Ok(_) => {
                    acknowledged.insert(key, (value, true));
                }
                Err(error) => {
                    assert!(error.may_have_happened() || error.may_retry(), "{error}");
                    acknowledged.insert(key, (value, false));
                }
            }
        }
        acknowledged
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    cluster.crash(&leader).await;
    let acknowledged = writing.await.unwrap();
    let node = cluster.node(&follower);
    node.read_barrier().await.unwrap();
    let certain = acknowledged.values().filter(|(_, certain)| *certain).count();
    assert!(certain >= 5, "most writes went through: {acknowledged:?}");
    for (key, (value, certain)) in &acknowledged {
        if *certain {
            assert_eq!(get(node, key).as_ref(), Some(value), "{key}");
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_end_when_nobody_renews_them_and_not_before() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let follower = cluster.names().into_iter().find(|name| *name != leader).unwrap();
    let node = cluster.node(&follower);
    let grant = |ttl_s| Operation::LeaseGrant { id: LeaseId::NONE, ttl_s };
    let too_long = node.propose(grant(LEASE_TTL_S_MAX + 1), ProposeContext::default()).await;
    assert_eq!(too_long.unwrap_err(), NodeError::LeaseTtlTooLarge);
    let mut leases = Vec::new();
    for _ in 0..2 {
        let reply = node.propose(grant(1), ProposeContext::default()).await.unwrap();
        let Ok(Outcome::LeaseGrant { id, ttl_s }) = reply.outcome else { panic!("{reply:?}") };
        assert_eq!(ttl_s, 1);
        leases.push(id);
    }
    let [kept, left] = leases[..] else { unreachable!() };
    cluster::put_with_lease(node, "kept", kept).await;
    cluster::put_with_lease(node, "left", left).await;
    let view = node.lease_time_to_live(kept, true).await.unwrap();
    assert_eq!((view.granted_ttl_s, view.keys), (1, vec![Bytes::from_static(b"kept")]));
    let started = tokio::time::Instant::now();
    while started.elapsed() < Duration::from_secs(4) && get(node, "left").is_some() {
        assert_eq!(node.lease_keep_alive(kept).await.unwrap(), 1);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(get(node, "left"), None, "it was not renewed");
    assert_eq!(get(node, "kept").as_deref(), Some("v"), "it was renewed");
    assert_eq!(node.leases().await.unwrap(), [kept]);
    assert_eq!(node.lease_keep_alive(left).await.unwrap(), 0);
    assert_eq!(node.lease_time_to_live(left, true).await.unwrap().ttl_s, -1);
    // A new leader starts it again from its full time, and ends it, too.
    let target = node.id();
    cluster.node(&leader).move_leader(target).await.unwrap();
    assert_eq!(node.lease_keep_alive(kept).await.unwrap(), 1);
    eventually("the lease ends under the new leader", || get(node, "kept").is_none()).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_joins_is_promoted_removed_and_replaced() {
    let mut cluster = Cluster::start(3).await;
    put(cluster.node("n1"), "before", "1").await;
    cluster.join("n4", MemberKind::Voter, "n2").await.unwrap();
    let fourth = cluster.node("n4").id();
    eventually("the fourth votes", || {
        let roster = cluster.node("n1").inner.core.committed_roster();
        roster.members.get(&fourth).is_some_and(|view| view.is_voter)
    })
    .await;
    let node = cluster.node("n4");
    node.read_barrier().await.unwrap();
    assert_eq!(get(node, "before").as_deref(), Some("1"));
    // Joining again with the same disk finds the same member.
    let old_leader = cluster.leader().await;
    let gone = cluster.node(&old_leader).id();
    let asked = cluster.names().into_iter().find(|name| *name != old_leader).unwrap();
    let members = cluster.node(&asked).member_remove(gone).await.unwrap();
    assert_eq!(members.len(), 3);
    let exit = cluster.node(&old_leader).exit().clone();
    let reason = tokio::time::timeout(PATIENCE, exit.wait()).await.unwrap();
    assert_eq!(reason, ExitReason::Removed);
    put(cluster.node(&asked), "after", "1").await;
    cluster.stop_node(&old_leader).await;
    let again = cluster.reopen(&old_leader).await;
    assert!(matches!(again, Err(NodeError::NotAdmitted(text)) if text.contains("was removed")));
    // An observer comes, reads, and is never promoted.
    cluster.join("n5", MemberKind::Observer, &asked).await.unwrap();
    let observer = cluster.node("n5");
    observer.read_barrier().await.unwrap();
    assert_eq!(get(observer, "after").as_deref(), Some("1"));
    put(observer, "from-observer", "1").await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let roster = cluster.node(&asked).inner.core.committed_roster();
    assert!(!roster.members[&observer.id()].is_voter);
    let promoted = cluster.node(&asked).member_promote(observer.id()).await;
    assert!(matches!(promoted, Err(NodeError::Invalid(_))));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_added_member_claims_its_record_and_a_wiped_disk_does_not_come_back() {
    let mut cluster = Cluster::start(3).await;
    let urls = vec!["http://n4".to_owned()];
    let (added, _) = cluster.node("n1").member_add(urls.clone(), MemberKind::Learner).await.unwrap();
    assert_eq!(cluster.node("n1").member_add(urls, MemberKind::Learner).await, Err(NodeError::PeerUrlExists));
    cluster.claim("n4").await.unwrap();
    assert_eq!(cluster.node("n4").id(), added.id);
    let promoted = async {
        loop {
            match cluster.node("n2").member_promote(added.id).await {
                Err(NodeError::LearnerNotReady) => tokio::time::sleep(Duration::from_millis(50)).await,
                other => return other,
            }
        }
    };
    let members = tokio::time::timeout(PATIENCE, promoted).await.unwrap().unwrap();
    assert!(members.iter().find(|view| view.member.id == added.id).unwrap().is_voter);

    cluster.stop_node("n3").await;
    cluster.wipe("n3");
    cluster.reopen("n3").await.unwrap();
    let exit = cluster.node("n3").exit().clone();
    let reason = tokio::time::timeout(PATIENCE, exit.wait()).await.unwrap();
    assert!(matches!(&reason, ExitReason::Refused(why) if why.contains("wiped disk")), "{reason:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_with_a_request_id_is_applied_once() {
    let cluster = Cluster::start(3).await;
    let node = cluster.node("n1");
    let opened = node.propose(Operation::SessionOpen { ttl_s: 60 }, ProposeContext::default()).await.unwrap();
    let Ok(Outcome::Session { id: session }) = opened.outcome else { panic!("{opened:?}") };
    let with = |sequence| ProposeContext {
        request: Some(RequestId { session, sequence, acknowledged: 0 }),
        ..ProposeContext::default()
    };
    let first = node.propose(put_operation("k", "1"), with(1)).await.unwrap();
    put(cluster.node("n2"), "k", "2").await;
    let retried = cluster.node("n3").propose(put_operation("k", "1"), with(1)).await.unwrap();
    assert_eq!(retried.outcome, first.outcome);
    assert_eq!(get(cluster.node("n3"), "k").as_deref(), Some("2"), "the retry changed nothing");
    let other = node.propose(put_operation("k", "9"), with(1)).await.unwrap();
    assert_eq!(other.outcome, Err(ApplyError::SequenceReused { sequence: 1 }));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_only_to_voters_and_refusals_name_the_reason() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let follower = cluster.names().into_iter().find(|name| *name != leader).unwrap();
    let target = cluster.node(&follower).id();
    assert_eq!(cluster.node(&leader).move_leader(77).await, Err(NodeError::BadTransferee));
    assert_eq!(cluster.node(&follower).move_leader(target).await, Err(NodeError::NotLeader));
    cluster.node(&leader).move_leader(target).await.unwrap();
    eventually("the target leads", || cluster.node(&follower).leadership().here).await;
    put(cluster.node(&leader), "after", "1").await;
    let large = put_operation("k", &"x".repeat(2 << 20));
    let refused = cluster.node(&leader).propose(large, ProposeContext::default()).await;
    assert_eq!(refused.unwrap_err(), NodeError::RequestTooLarge);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_nothing_is_acknowledged_and_it_ends_in_time() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let others: Vec<String> = cluster.names().into_iter().filter(|name| *name != leader).collect();
    for name in &others {
        cluster.crash(name).await;
    }
    let node = cluster.node(&leader);
    let short = ProposeContext { timeout: Some(Duration::from_secs(2)), ..ProposeContext::default() };
    let refused = node.propose(put_operation("k", "1"), short).await.unwrap_err();
    assert!(matches!(refused, NodeError::Timeout | NodeError::NoLeader | NodeError::LeaderChanged));
    let promised =
        NodeOptions { election_timeout: ELECTION_TIMEOUT, ..NodeOptions::default() }.request_timeout();
    let patience = |place| async move {
        tokio::time::sleep(Duration::from_millis(25) * place).await;
        let started = Instant::now();
        let read = async { (node.read_barrier().await, started.elapsed()) };
        let renewal = async { (node.lease_keep_alive(LeaseId(7)).await.map(drop), started.elapsed()) };
        for (refused, waited) in <[_; 2]>::from(tokio::join!(read, renewal)) {
            assert!(refused.is_err());
            assert!(
                waited + Duration::from_millis(100) >= promised,
                "number {place} was given up after {waited:?}"
            );
            assert!(waited <= promised + Duration::from_secs(2), "number {place} waited for {waited:?}");
        }
    };
    futures_util::future::join_all((0..20).map(patience)).await;
    for name in &others {
        cluster.reopen(name).await.unwrap();
    }
    put(cluster.node(&leader), "k", "2").await;
    cluster.node(&others[0]).read_barrier().await.unwrap();
    assert_eq!(get(cluster.node(&others[0]), "k").as_deref(), Some("2"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forwarding_link_that_falls_silent_is_given_up() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let follower = cluster.names().into_iter().find(|name| *name != leader).unwrap();
    let node = cluster.node(&follower);
    cluster.network.mute.store(true, Ordering::Relaxed);
    let lost = node.propose(put_operation("silent", "1"), ProposeContext::default()).await;
    assert!(lost.is_err(), "{lost:?}");
    cluster.network.mute.store(false, Ordering::Relaxed);
    // The link's own time began a little after the proposal's.
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Its place among the unanswered messages must not stay taken: the next goes over a new link.
    let next = node.propose(put_operation("silent", "2"), ProposeContext::default()).await;
    assert!(next.is_ok(), "{next:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_survivor_goes_on_and_a_snapshot_makes_a_new_cluster() {
    let mut cluster = Cluster::start(3).await;
    for round in 0..20 {
        put(cluster.node("n1"), &format!("k{round}"), "1").await;
    }
    let snapshot = cluster.save_snapshot("n1").await;
    put(cluster.node("n1"), "late", "1").await;
    let revision = cluster.node("n1").view().revision;
    for name in ["n1", "n2", "n3"] {
        cluster.stop_node(name).await;
    }
    let env = crate::env::SystemEnv::shared();
    let recovered = force_new_cluster(
        ForceNewCluster {
            data_dir: cluster.dir("n1"),
            name: None,
            peer_urls: Vec::new(),
            client_urls: vec!["http://n1-clients".to_owned()],
            state: StateOptions::default(),
        },
        &env,
    )
    .await
    .unwrap();
    assert_eq!(recovered.revision, revision);
    assert!(recovered.backup.unwrap().join("IDENTITY").exists());
    cluster.reopen("n1").await.unwrap();
    let node = cluster.node("n1");
    put(node, "new", "1").await;
    assert_eq!((get(node, "late"), get(node, "k19")), (Some("1".to_owned()), Some("1".to_owned())));
    let members = node.members(true).await.unwrap();
    let kept: Vec<_> = members.iter().map(|view| (&*view.member.name, &*view.member.peer_urls)).collect();
    assert_eq!(kept, [("n1", &["http://n1".to_owned()][..])], "what was not given stays as it was");
    cluster.stop_node("n1").await;

    let restored = restore_snapshot(
        RestoreSnapshot {
            file: snapshot,
            data_dir: cluster.dir("n9"),
            name: "n9".to_owned(),
            members: vec![InitialMember { name: "n9".to_owned(), peer_urls: vec!["http://n9".to_owned()] }],
            token: "restored".to_owned(),
            state: StateOptions::default(),
        },
        &env,
    )
    .await
    .unwrap();
    cluster.reopen("n9").await.unwrap();
    let node = cluster.node("n9");
    assert_eq!(node.cluster_id(), restored.cluster_id);
    put(node, "new", "1").await;
    assert_eq!((get(node, "late"), get(node, "k19")), (None, Some("1".to_owned())));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_over_its_quota_refuses_writes_until_an_operator_clears_it() {
    let mut cluster = Cluster::prepare(1);
    cluster.quota_bytes = 1;
    cluster.open_all().await;
    let node = cluster.node("n1");
    let alarm = Alarm { member: node.id(), kind: AlarmKind::NoSpace };
    eventually("the alarm is raised", || node.view().alarms.contains(&alarm)).await;
    let refused = node.propose(put_operation("k", "1"), ProposeContext::default()).await.unwrap();
    assert_eq!(refused.outcome, Err(ApplyError::NoSpace));
    let clear = Operation::Alarm { action: AlarmAction::Deactivate, alarm };
    node.propose(clear, ProposeContext::default()).await.unwrap();
    eventually("it is raised again while it holds", || node.view().alarms.contains(&alarm)).await;
    cluster.stop().await;
}
