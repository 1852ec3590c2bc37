//! Three nodes agree: over a network that is only a table.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use openraft::RaftLogReader as _;
use openraft::errors::RPCError;
use openraft::network::{NetStreamAppend as _, RPCOption, RaftNetworkFactory as _};

use super::replication::NetworkFactory;
use super::testing::{CLUSTER, Cluster, PATIENCE, Table, eventually, options, send};
use super::*;
use crate::machine::Machine;
use crate::resilience::BreakerState;
use crate::storage::{StateDb, StateOptions, archive};
use crate::types::Member;

fn files_in(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_survive_the_leader_and_a_restart_of_everyone() {
    let table = Table::default();
    let mut cluster = Cluster::start(Arc::new(table.clone()), options(), Duration::ZERO).await;
    let first = cluster.put("a", "1").await;
    // Another leads when the first is cut off, and the first follows when it is back.
    table.cut(first, true);
    let second = cluster.put("b", "2").await;
    assert_ne!(first, second);
    table.cut(first, false);
    cluster.applied(first, cluster.applied_index(second)).await;
    for id in 1..=3 {
        cluster.stop(id).await;
    }
    for id in 1..=3 {
        cluster.open(id).await;
    }
    let leader = cluster.put("c", "3").await;
    for id in 1..=3 {
        cluster.applied(id, cluster.applied_index(leader)).await;
        let keys: Vec<_> = cluster.content(id).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["a", "b", "c"], "node {id}");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_for_too_long_gets_a_snapshot() {
    let options = RaftOptions { snapshot_count: 50, log_entries_kept: 5, ..options() };
    let mut cluster = Cluster::start(Arc::new(Table::default()), options, Duration::ZERO).await;
    let leader = cluster.put("k000", "v").await;
    let away = (1..=3).find(|id| *id != leader).unwrap();
    cluster.applied(away, 2).await;
    cluster.stop(away).await;
    for number in 0..150 {
        cluster.put(&format!("k{number:03}"), "v").await;
    }
    eventually("the log is purged", || cluster.purged(20)).await;
    cluster.open(away).await;
    let leader = cluster.put("z", "last").await;
    cluster.applied(away, cluster.applied_index(leader)).await;
    assert_eq!(cluster.content(away), cluster.content(leader));
    assert!(cluster.nodes[&away].snapshots.newest().is_some());
    // The replaced state is gone, and what came is what the next start finds.
    let content = cluster.content(away);
    cluster.stop(away).await;
    cluster.open(away).await;
    assert_eq!(files_in(&cluster.root.path().join(away.to_string()).join("state")), 2);
    cluster.applied(away, cluster.applied_index(leader)).await;
    assert_eq!(cluster.content(away), content);
    cluster.stop_all().await;
}

/// What openraft's issue 2116 takes: an install still runs; another leader
/// appends beyond it; then a newer snapshot comes. The guard keeps the second
/// one out until the first is dealt with, whether or not its sender waited.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_snapshot_waits_for_the_first_and_raft_lives() {
    let takes = Duration::from_millis(700);
    let table = Table::default();
    let options = RaftOptions { snapshot_count: 1_000_000, ..options() };
    let cluster = Cluster::start(Arc::new(table.clone()), options, takes).await;
    let leader = cluster.put("k", "0").await;
    let target = (1..=3).find(|id| *id != leader).unwrap();
    cluster.applied(target, cluster.applied_index(leader)).await;
    table.cut(target, true);
    let take = async |upto: usize| {
        for number in 0..upto {
            cluster.put("k", &number.to_string()).await;
        }
        let node = &cluster.nodes[&leader];
        let before = node.snapshots.newest().map(|snapshot| snapshot.manifest().last);
        node.handle.raft().trigger().snapshot().await.unwrap();
        eventually("a snapshot", || node.snapshots.newest().map(|new| new.manifest().last) != before).await;
        node.snapshots.newest().unwrap()
    };
    let first = take(20).await;
    let second = take(20).await;
    let raft = cluster.nodes[&leader].handle.raft();
    let vote: Vote = raft.with_raft_state(|state| *state.vote_ref()).await.unwrap();
    let term = vote.leader_id().term;
    let receiver = cluster.nodes[&target].handle.receiver();

    // The first sender gives up while the install runs.
    let install = send(receiver, vote, &first).await.unwrap().install();
    assert!(tokio::time::timeout(Duration::from_millis(200), install).await.is_err());

    // Another leader appends beyond the first snapshot, in several requests.
    let other = Vote::new_committed(term + 1, leader);
    let from = first.manifest().last;
    let mut previous = LogId::from(from);
    let mut appends = Vec::new();
    for index in from.index + 1..from.index + 9 {
        let entries =
            cluster.nodes[&leader].reader.clone().try_get_log_entries(index..index + 1).await.unwrap();
        let last = entries[0].log_id;
        appends.push(AppendRequest {
            vote: other,
            prev_log_id: Some(previous),
            entries,
            leader_commit: Some(previous),
        });
        previous = last;
    }
    let answers = receiver.append(futures_util::stream::iter(appends.into_iter().map(Ok)).boxed());
    let answers = tokio::spawn(answers.collect::<Vec<_>>());

    // Its snapshot is refused while the first is at work, without harm, and taken after.
    let refused = send(receiver, other, &second).await.err();
    assert!(matches!(refused, Some(PeerError::Busy(_))), "{refused:?}");
    let retried = async {
        loop {
            match send(receiver, other, &second).await {
                Ok(reception) => break reception.install().await,
                Err(PeerError::Busy(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => break Err(error),
            }
        }
    };
    tokio::time::timeout(PATIENCE, retried).await.expect("the guard is released").unwrap();
    answers.await.unwrap();
    cluster.nodes[&target].handle.raft().with_raft_state(|_| ()).await.expect("raft lives");
    cluster.applied(target, second.manifest().last.index).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_file_holds_the_state_and_damage_is_refused() {
    let cluster = Cluster::start(Arc::new(Table::default()), options(), Duration::ZERO).await;
    let mut leader = 0;
    for number in 0..10 {
        leader = cluster.put(&format!("key{number}"), &"v".repeat(number * 500)).await;
    }
    let handle = &cluster.nodes[&leader].handle;
    let mut file = handle.snapshot_file().await.unwrap();
    let size_bytes = file.size_bytes();
    assert_eq!(size_bytes % 512, 32);
    let path = cluster.root.path().join("saved");
    let whole = std::iter::from_fn(|| file.next().unwrap()).collect::<Vec<_>>().concat();
    assert_eq!(whole.len() as u64, size_bytes);
    std::fs::write(&path, &whole).unwrap();
    let status = archive::status(&path, cluster.root.path()).unwrap();
    assert_eq!((status.total_keys, status.cluster, status.size_bytes), (10, CLUSTER, size_bytes));
    assert_eq!(status.revision, cluster.nodes[&leader].published.view().revision);

    let target = cluster.root.path().join("restored");
    archive::unpack(&path, &target).unwrap();
    let restored = Machine::open(StateDb::open(&target, &StateOptions::default()).unwrap()).unwrap();
    assert_eq!(restored.applied().index, status.last.index);

    let damaged = cluster.root.path().join("damaged");
    for place in (0..whole.len()).step_by(whole.len() / 37) {
        let mut bytes = whole.clone();
        bytes[place] ^= 1;
        std::fs::write(&damaged, bytes).unwrap();
        assert!(archive::verify(&damaged).is_err(), "a flipped bit at {place} went unnoticed");
    }
    for cut in [0, 31, 32, 512, whole.len() - 512, whole.len() - 1] {
        std::fs::write(&damaged, &whole[..cut]).unwrap();
        assert!(archive::unpack(&damaged, &cluster.root.path().join("never")).is_err());
        assert!(!cluster.root.path().join("never").exists());
    }
    cluster.stop_all().await;
}

/// openraft waits its backoff out where it makes a request. An attempt that
/// failed without asking for one would be made again at once, for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_attempt_to_replicate_fails_before_its_first_request() {
    let table = Table::default();
    let cluster = Cluster::start(Arc::new(table.clone()), options(), Duration::ZERO).await;
    table.cut(3, true);
    let peers = cluster.nodes[&1].handle.peers().clone();
    let mut network = NetworkFactory { peers: peers.clone() }.new_client(3, &Member::default()).await;
    let pause = Duration::from_millis(50);
    for _ in 0..8 {
        let request = AppendRequest {
            vote: Vote::new(1, 1),
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        };
        let requests = futures_util::stream::once(async move {
            tokio::time::sleep(pause).await;
            request
        });
        let began = tokio::time::Instant::now();
        let answers = network.stream_append(requests.boxed(), RPCOption::new(PATIENCE)).await;
        assert!(matches!(answers, Err(RPCError::Unreachable(_))));
        assert!(began.elapsed() >= pause);
    }
    assert_ne!(peers.breaker(3), BreakerState::Closed, "it was the breaker that refused");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_for_another_is_refused_and_says_why() {
    let cluster = Cluster::start(Arc::new(Table::default()), options(), Duration::ZERO).await;
    let receiver = cluster.nodes[&2].handle.receiver();
    let right = Envelope { cluster: CLUSTER, target: 2, target_disk: 102, sender: 1 };
    assert_eq!(receiver.check(&right), Ok(()));
    assert_eq!(receiver.check(&Envelope { target_disk: 0, ..right }), Ok(()));
    let refused = |envelope| receiver.check(&envelope).unwrap_err();
    assert_eq!(refused(Envelope { cluster: 9, ..right }), Refusal::WrongCluster { actual: CLUSTER });
    assert_eq!(refused(Envelope { target: 3, ..right }), Refusal::WrongNode { actual: 2 });
    assert_eq!(refused(Envelope { target_disk: 9, ..right }), Refusal::WrongDisk { actual: 102 });
    // The caller remembers, and does not try again.
    let peers = cluster.nodes[&1].handle.peers();
    peers.directory().update(2, &Member { id: 2, disk: 9, ..Member::default() });
    let timeout = Duration::from_secs(1);
    let asked = peers.call(2, "/test", Bytes::new(), timeout, Retry::Always).await;
    assert_eq!(asked, Err(PeerError::Refused(Refusal::WrongDisk { actual: 102 })));
    assert_eq!(peers.refusal(2), Some(Refusal::WrongDisk { actual: 102 }));
    cluster.stop_all().await;
}
