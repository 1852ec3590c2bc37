//! Members come, go, lead and are replaced while clients write.
//!
//! What etcd does too (add, promote, remove, replace, a wiped member) is proven
//! against it; joining by one command, observers and recovery are Mainstay's own.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use etcd_client::{GetOptions, MemberAddOptions};
use tokio::task::JoinHandle;
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, connect, on_own_cluster};
use crate::target::{is_etcd, mainstay_binary, not_in_etcd};

/// Writes rising numbers through every node in turn, until stopped; gives the acknowledged ones.
struct Load {
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    task: JoinHandle<Vec<u64>>,
}

impl Load {
    fn start(c: &Cluster) -> Load {
        let (stop, acked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let endpoints = c.endpoints();
        let (stopped, counted) = (stop.clone(), acked.clone());
        let task = tokio::spawn(async move {
            let mut done = Vec::new();
            let mut number = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                let mut client = connect(&endpoints).await;
                loop {
                    number += 1;
                    let call = client.put(format!("load/{number:08}"), number.to_string(), None);
                    match tokio::time::timeout(Duration::from_secs(3), call).await {
                        Ok(Ok(_)) => {
                            done.push(number);
                            counted.fetch_add(1, Ordering::Relaxed);
                        }
                        _ => break,
                    }
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
            done
        });
        Load { stop, acked, task }
    }

    /// Waits until writes flow.
    async fn flows(&self) {
        let from = self.acked.load(Ordering::Relaxed);
        eventually("writes flow", SOON, async || {
            (self.acked.load(Ordering::Relaxed) > from + 10).then_some(())
        })
        .await;
    }

    /// Stops it, and asserts that everything acknowledged is there on every running node.
    async fn finish(self, c: &Cluster) {
        self.flows().await;
        self.stop.store(true, Ordering::Relaxed);
        let done = self.task.await.unwrap();
        let running: Vec<_> = c.nodes.iter().filter(|node| node.process.is_some()).collect();
        for node in running {
            let mut client = node.client().await;
            let all =
                client.get("load/", Some(GetOptions::new().with_prefix().with_keys_only())).await.unwrap();
            let keys: std::collections::HashSet<String> = keys(&all).into_iter().collect();
            let missing = done.iter().find(|number| !keys.contains(&format!("load/{number:08}")));
            assert_eq!(missing, None, "{} misses an acknowledged write", node.name);
        }
    }
}

/// Adds a member in etcd's way: MemberAdd first, then a node that says "existing".
async fn add_existing(c: &mut Cluster, via: usize, name: &str, learner: bool) -> (usize, u64) {
    let i = c.extra_node(name);
    let url = c.nodes[i].peer_url();
    let options = learner.then(|| MemberAddOptions::new().with_is_learner());
    let added = settled(async || c.client(via).await.member_add([url.as_str()], options.clone()).await)
        .await
        .unwrap();
    let id = added.member().unwrap().id();
    let mut known = Vec::new();
    for member in added.member_list() {
        let name = if member.id() == id { name } else { member.name() };
        known.push(format!("{name}={}", member.peer_urls()[0]));
    }
    let node = &mut c.nodes[i];
    node.flags.push(format!("--initial-cluster={}", known.join(",")));
    node.flags.push("--initial-cluster-state=existing".into());
    node.start();
    (i, id)
}

async fn is_voter(c: &Cluster, id: u64) -> bool {
    let running = c.nodes.iter().find(|node| node.process.is_some()).expect("a node runs");
    match running.client().await.member_list().await {
        Ok(list) => list.members().iter().any(|m| m.id() == id && !m.is_learner() && !m.name().is_empty()),
        Err(_) => false,
    }
}

#[test]
fn a_learner_catches_up_is_promoted_and_votes() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let load = Load::start(c);
        load.flows().await;
        let (i, id) = add_existing(c, 0, "n4", true).await;
        let promoted = eventually("the learner is in sync", Duration::from_secs(40), async || {
            match c.client(0).await.member_promote(id).await {
                Ok(list) => Some(list),
                Err(etcd_client::Error::GRpcStatus(status)) => {
                    let expected =
                        "etcdserver: can only promote a learner member which is in sync with leader";
                    let unsettled = status.code() == Code::Unavailable;
                    assert!(status.message() == expected || unsettled, "{status:?}");
                    None
                }
                Err(other) => panic!("{other}"),
            }
        })
        .await;
        assert!(promoted.members().iter().any(|m| m.id() == id && !m.is_learner()));
        c.wait_node_ready(i).await;
        load.flows().await;
        // Four members: with one dead, the new one is needed for nothing but counts.
        let victim = (c.leader().await + 1) % 3;
        c.nodes[victim].kill();
        load.flows().await;
        c.start_all();
        c.wait_ready().await;
        load.finish(c).await;
    });
}

#[test]
fn a_removed_member_stops_and_the_others_go_on() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let load = Load::start(c);
        let victim = c.follower().await;
        let id = c.member_id(victim).await;
        let other = (victim + 1) % 3;
        settled(async || c.client(other).await.member_remove(id).await).await.unwrap();
        let status = c.nodes[victim].wait_exit(Duration::from_secs(30)).await;
        let log = c.nodes[victim].log_text();
        assert!(log.contains("removed"), "it says why");
        if !is_etcd() {
            eprintln!("REPORT a removed member ended with {status}");
        }
        load.flows().await;
        // It does not come back either.
        c.nodes[victim].start();
        c.nodes[victim].wait_exit(Duration::from_secs(30)).await;
        assert_eq!(c.client(other).await.member_list().await.unwrap().members().len(), 2);
        load.finish(c).await;
    });
}

#[test]
fn a_dead_member_is_replaced() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let load = Load::start(c);
        load.flows().await;
        let victim = c.follower().await;
        let (via, third) = ((victim + 1) % 3, (victim + 2) % 3);
        let id = c.member_id(victim).await;
        c.nodes[victim].kill();
        std::fs::remove_dir_all(&c.nodes[victim].data_dir).unwrap();
        settled(async || c.client(via).await.member_remove(id).await).await.unwrap();
        let (i, new_id) = add_existing(c, via, "n4", false).await;
        assert_ne!(new_id, id);
        c.wait_node_ready(i).await;
        eventually("the new member votes", Duration::from_secs(40), async || {
            is_voter(c, new_id).await.then_some(())
        })
        .await;
        // Now one of the old ones may die.
        c.nodes[third].kill();
        load.flows().await;
        c.nodes[third].start();
        c.wait_ready().await;
        load.finish(c).await;
    });
}

#[test]
fn a_change_that_would_lose_the_quorum_is_refused() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let victim = c.follower().await;
        let alive: Vec<usize> = (0..3).filter(|i| *i != victim).collect();
        let (dead, healthy) = (c.member_id(victim).await, c.member_id(alive[1]).await);
        // Let it settle first, so that the refusal below is about the quorum.
        tokio::time::sleep(Duration::from_secs(if is_etcd() { 6 } else { 0 })).await;
        c.nodes[victim].kill();
        let mut client = c.client(alive[0]).await;
        let refused =
            eventually("the loss is noticed", SOON, async || match client.member_remove(healthy).await {
                Err(etcd_client::Error::GRpcStatus(status)) => Some(status),
                other => panic!("two of three alive, one of them removed: {other:?}"),
            })
            .await;
        assert!(matches!(refused.code(), Code::FailedPrecondition | Code::Unavailable), "{refused:?}");
        assert!(refused.message().starts_with("etcdserver: "), "{refused:?}");
        client.put("k", "v", None).await.unwrap();
        assert_eq!(client.member_list().await.unwrap().members().len(), 3);
        // Removing the dead one is allowed, and leaves a cluster of two.
        settled(async || c.client(alive[0]).await.member_remove(dead).await).await.unwrap();
        client.put("k", "w", None).await.unwrap();
    });
}

#[test]
fn a_member_whose_disk_was_wiped_refuses_to_start() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let load = Load::start(c);
        load.flows().await;
        c.nodes[1].kill();
        std::fs::remove_dir_all(&c.nodes[1].data_dir).unwrap();
        c.nodes[1].start();
        if is_etcd() {
            // etcd lets it in with "new" and dies of its log; nothing to learn from that here.
            c.nodes[1].kill();
        } else {
            let status = c.nodes[1].wait_exit(Duration::from_secs(30)).await;
            assert!(!status.success());
            let log = c.nodes[1].log_text();
            assert!(log.contains("disk") || log.contains("data directory"), "it says why:\n{log}");
        }
        load.finish(c).await;
    });
}

#[test]
fn one_command_adds_a_node_which_becomes_a_voter_by_itself() {
    if not_in_etcd("--join") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let load = Load::start(c);
        load.flows().await;
        let i = c.extra_node("n4");
        let target = c.nodes[1].url();
        c.nodes[i].flags.push(format!("--join={target}"));
        c.nodes[i].start();
        c.wait_node_ready(i).await;
        let id = c.member_id(i).await;
        eventually("it is promoted", Duration::from_secs(40), async || is_voter(c, id).await.then_some(()))
            .await;
        // A restart with the same flags is the same member.
        c.nodes[i].kill();
        c.nodes[i].start();
        c.wait_node_ready(i).await;
        assert_eq!(c.member_id(i).await, id);
        assert_eq!(c.client(0).await.member_list().await.unwrap().members().len(), 4);
        // It can lead.
        let leader = c.leader().await;
        if leader != i {
            c.client(leader).await.move_leader(id).await.unwrap();
            eventually("it leads", SOON, async || (c.leader().await == i).then_some(())).await;
        }
        load.finish(c).await;
    });
}

#[test]
fn a_name_that_is_taken_cannot_join() {
    if not_in_etcd("--join") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let i = c.extra_node("n2");
        c.nodes[i].data_dir = c.root.join("another-n2");
        let target = c.nodes[0].url();
        c.nodes[i].flags.push(format!("--join={target}"));
        c.nodes[i].start();
        let status = c.nodes[i].wait_exit(Duration::from_secs(30)).await;
        assert!(!status.success());
        assert!(c.nodes[i].log_text().contains("the name \"n2\" is taken"), "it says why");
        assert_eq!(c.client(0).await.member_list().await.unwrap().members().len(), 3);
    });
}

#[test]
fn an_observer_serves_and_is_never_promoted() {
    if not_in_etcd("observers") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let i = c.extra_node("watcher");
        let target = c.nodes[0].url();
        c.nodes[i].flags.extend([format!("--join={target}"), "--kind=observer".into()]);
        c.nodes[i].start();
        c.wait_node_ready(i).await;
        let id = c.member_id(i).await;
        // It reads linearizably and forwards writes.
        let mut observer = c.client(i).await;
        c.client(0).await.put("k", "v", None).await.unwrap();
        assert_eq!(value(&mut observer, "k").await.unwrap(), "v");
        observer.put("k", "through the observer", None).await.unwrap();
        assert_eq!(value(&mut c.client(2).await, "k").await.unwrap(), "through the observer");
        let promoted = c.client(0).await.member_promote(id).await;
        assert!(promoted.is_err(), "{promoted:?}");
        assert!(!is_voter(c, id).await);
        // Its death matters to nobody's quorum.
        c.nodes[i].kill();
        c.nodes[2].kill();
        c.client(0).await.put("k", "still", None).await.unwrap();
    });
}

#[test]
fn a_learner_joined_by_kind_waits_for_its_promotion() {
    if not_in_etcd("--join") {
        return;
    }
    on_own_cluster(Spec::nodes(1), async |c| {
        let i = c.extra_node("n2");
        let target = c.nodes[0].url();
        c.nodes[i].flags.extend([format!("--join={target}"), "--kind=learner".into()]);
        c.nodes[i].start();
        let id = eventually("it is a member", SOON, async || {
            let list = c.client(0).await.member_list().await.unwrap();
            list.members().iter().find(|m| m.name() == "n2" && m.is_learner()).map(|m| m.id())
        })
        .await;
        // etcd's learners refuse linearizable reads and writes, and clients go to the next endpoint.
        let mut learner = c.client(i).await;
        let refusal = eventually("it answers", SOON, async || match learner.get("k", None).await {
            Err(etcd_client::Error::GRpcStatus(s)) if s.code() == Code::FailedPrecondition => Some(s),
            Ok(got) => panic!("a learner served a linearizable read: {got:?}"),
            Err(_) => None,
        })
        .await;
        assert_eq!(refusal.message(), "etcdserver: rpc not supported for learner");
        refused(learner.put("k", "v", None).await, Code::FailedPrecondition, refusal.message());
        learner.get("k", Some(GetOptions::new().with_serializable())).await.unwrap();
        assert!(learner.status().await.unwrap().is_learner());
        eventually("it can be promoted", SOON, async || c.client(0).await.member_promote(id).await.ok())
            .await;
        c.wait_node_ready(i).await;
        assert!(is_voter(c, id).await);
    });
}

#[test]
fn a_lost_quorum_is_recovered_by_a_guarded_command() {
    if not_in_etcd("recover") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let mut client = c.client(0).await;
        for i in 0..50 {
            client.put(format!("k{i}"), i.to_string(), None).await.unwrap();
        }
        revision(&mut c.client(0).await).await;
        c.kill_all();
        std::fs::remove_dir_all(&c.nodes[1].data_dir).unwrap();
        std::fs::remove_dir_all(&c.nodes[2].data_dir).unwrap();
        let dir = c.nodes[0].data_dir.to_str().unwrap().to_owned();
        let recover = |args: &[&str]| {
            let mut command = Command::new(mainstay_binary());
            command.args(["recover", "--data-dir", &dir]).args(args).stdin(std::process::Stdio::null());
            command.output().unwrap()
        };
        let guarded = recover(&["--force-new-cluster"]);
        assert!(!guarded.status.success(), "without a yes it does nothing");
        let done = recover(&["--force-new-cluster", "--yes"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        c.nodes[0].start();
        c.wait_node_ready(0).await;
        let mut client = c.client(0).await;
        let all = client.get("k", Some(GetOptions::new().with_prefix())).await.unwrap();
        assert_eq!(all.count(), 50);
        let list = client.member_list().await.unwrap();
        let [member] = list.members() else { panic!("{list:?}") };
        // What was not given is as it was.
        assert_eq!((member.name(), member.peer_urls()), ("n1", &[c.nodes[0].peer_url()][..]));
        assert_eq!(member.client_urls(), [c.nodes[0].url()]);
        client.put("after", "v", None).await.unwrap();
        // And it grows again.
        let i = c.extra_node("n4");
        let target = c.nodes[0].url();
        c.nodes[i].flags.push(format!("--join={target}"));
        c.nodes[i].start();
        c.wait_node_ready(i).await;
        assert_eq!(value(&mut c.client(i).await, "k7").await.unwrap(), "7");
    });
}

#[test]
fn a_follower_that_slept_through_a_snapshot_catches_up() {
    let mut spec = Spec::nodes(3).flag("snapshot-count", 200);
    if !is_etcd() {
        spec = spec.flag("log-retention-entries", 200);
    }
    on_own_cluster(spec, async |c| {
        for _ in 0..2 {
            let follower = c.follower().await;
            c.nodes[follower].kill();
            let mut client = c.client((follower + 1) % 3).await;
            // etcd keeps 5,000 entries beyond the snapshot.
            let writes = if is_etcd() { 6000 } else { 1500 };
            let mut tasks = Vec::new();
            for w in 0..16 {
                let mut client = client.clone();
                tasks.push(tokio::spawn(async move {
                    for i in 0..writes / 16 {
                        client.put(format!("k{w}"), format!("{i}"), None).await.unwrap();
                    }
                }));
            }
            for task in tasks {
                task.await.unwrap();
            }
            c.start_all();
            c.wait_ready().await;
            let at = revision(&mut client).await;
            revision(&mut c.client(follower).await).await;
            let mut hashes = Vec::new();
            for i in 0..3 {
                revision(&mut c.client(i).await).await;
                hashes.push(hash_kv(&mut c.client(i).await, at).await);
            }
            assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
        }
    });
}
