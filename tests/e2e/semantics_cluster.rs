//! Maintenance, Cluster, Auth, and the HTTP pages: what tools and clients ask of a node.

use etcd_client::{AlarmAction, AlarmType, MemberAddOptions};
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Spec, on_cluster, on_own_cluster};
use crate::target::{etcd_before, is_etcd};
use crate::{http, raw};

#[test]
fn status_tells_leader_term_indexes_and_size() {
    on_cluster(async |c| {
        c.client(0).await.put(unique("status") + "k", "v", None).await.unwrap();
        let mut leaders = Vec::new();
        for i in 0..3 {
            let mut client = c.client(i).await;
            revision(&mut client).await;
            let status = client.status().await.unwrap();
            assert!(status.raft_term() > 0 && status.raft_index() > 0);
            assert!(status.raft_applied_index() > 0 && status.raft_applied_index() <= status.raft_index());
            let sizes = (status.db_size(), status.raft_used_db_size());
            assert!(
                sizes.0 > 0 && sizes.1 > 0 && !status.is_learner(),
                "bytes of files and in use: {sizes:?}"
            );
            assert!(status.errors().is_empty());
            assert!(status.version().split('.').count() == 3, "{}", status.version());
            assert_eq!(status.header().unwrap().member_id(), c.member_id(i).await);
            leaders.push(status.leader());
        }
        assert!(leaders[0] != 0 && leaders.iter().all(|leader| *leader == leaders[0]));
    });
}

#[test]
fn the_member_list_names_everyone_with_their_addresses() {
    on_cluster(async |c| {
        for i in 0..3 {
            // A member makes its client addresses known once it runs.
            let list = eventually("all addresses are known", SOON, async || {
                let list = c.client(i).await.member_list().await.unwrap();
                list.members().iter().all(|member| !member.client_urls().is_empty()).then_some(list)
            })
            .await;
            let mut names: Vec<_> = list.members().iter().map(|m| m.name().to_owned()).collect();
            names.sort();
            assert_eq!(names, ["n1", "n2", "n3"]);
            for node in &c.nodes {
                let member = list.members().iter().find(|m| m.name() == node.name).unwrap();
                assert_eq!(member.peer_urls(), [node.peer_url()]);
                assert_eq!(member.client_urls(), [node.url()]);
                assert!(member.id() != 0 && !member.is_learner());
            }
        }
    });
}

#[test]
fn what_is_wrong_with_a_member_change_is_told() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let unknown = 0x1234_5678;
        let not_found = (Code::NotFound, "etcdserver: member not found");
        refused(client.member_remove(unknown).await, not_found.0, not_found.1);
        refused(client.member_promote(unknown).await, not_found.0, not_found.1);
        refused(
            client.member_update(unknown, ["http://127.0.0.1:1".to_owned()]).await,
            not_found.0,
            not_found.1,
        );
        let taken = settled(async || c.client(0).await.member_add([c.nodes[1].peer_url()], None).await).await;
        refused(taken, Code::FailedPrecondition, "etcdserver: Peer URLs already exists");
        let voter = c.member_id(1).await;
        let promoted = client.member_promote(voter).await;
        refused(promoted, Code::FailedPrecondition, "etcdserver: can only promote a learner member");
        let bad = client.member_add(["not a url"], None).await;
        refused(bad, Code::InvalidArgument, "etcdserver: given member URLs are invalid");
    });
}

#[test]
fn a_learner_is_added_listed_not_promoted_before_it_runs_and_removed() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let url = format!("http://127.0.0.1:{}", crate::process::free_port());
        let added = settled(async || {
            c.client(0)
                .await
                .member_add([url.as_str()], Some(MemberAddOptions::new().with_is_learner()))
                .await
        });
        let added = added.await.unwrap();
        let member = added.member().unwrap();
        assert!(member.id() != 0 && member.is_learner() && member.name().is_empty());
        assert_eq!((member.peer_urls(), added.member_list().len()), (&[url][..], 4));
        let promoted = client.member_promote(member.id()).await;
        let message = "etcdserver: can only promote a learner member which is in sync with leader";
        refused(promoted, Code::FailedPrecondition, message);
        let removed = client.member_remove(member.id()).await.unwrap();
        assert_eq!(removed.members().len(), 3);
        let again = client.member_remove(member.id()).await;
        refused(again, Code::NotFound, "etcdserver: member not found");
    });
}

#[test]
fn the_leader_moves_to_a_named_member_and_to_nobody_else() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let leader = c.leader().await;
        let target = (leader + 1) % 3;
        let id = c.member_id(target).await;
        let asked_of_follower = c.client(target).await.move_leader(id).await;
        if is_etcd() {
            refused(asked_of_follower, Code::FailedPrecondition, "etcdserver: not leader");
        } else {
            // Any node passes it on, or answers as etcd does.
            let _ = asked_of_follower;
        }
        let leader = c.leader().await;
        let nobody = c.client(leader).await.move_leader(0x99).await;
        refused(nobody, Code::FailedPrecondition, "etcdserver: bad leader transferee");
        let target = (leader + 1) % 3;
        let id = c.member_id(target).await;
        c.client(leader).await.move_leader(id).await.unwrap();
        eventually("the leader has moved", SOON, async || (c.leader().await == target).then_some(())).await;
        c.client(leader).await.put("k", "v", None).await.unwrap();
    });
}

#[test]
fn alarms_are_listed_raised_and_cleared() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut client = c.client(0).await;
        let none = client.alarm(AlarmAction::Get, AlarmType::None, None).await.unwrap();
        assert!(none.alarms().is_empty());
        client.alarm(AlarmAction::Activate, AlarmType::Nospace, None).await.unwrap();
        let full = (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded");
        refused(client.put("k", "v", None).await, full.0, full.1);
        refused(client.lease_grant(100, None).await, full.0, full.1);
        client.get("k", None).await.expect("reads go on");
        client.delete("k", None).await.expect("deletes go on");
        let status = client.status().await.unwrap();
        assert!(status.errors().iter().any(|e| e.contains("NOSPACE")), "{:?}", status.errors());
        client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, None).await.unwrap();
        client.put("k", "v", None).await.expect("writes go on");
        assert!(client.alarm(AlarmAction::Get, AlarmType::None, None).await.unwrap().alarms().is_empty());
    });
}

#[test]
fn the_quota_raises_the_alarm_and_reads_go_on() {
    on_own_cluster(Spec::nodes(3).flag("quota-backend-bytes", 4 * 1024 * 1024), async |c| {
        let mut client = c.client(1).await;
        let mut written = 0;
        let status = loop {
            match client.put(format!("q{written}"), rand_bytes(100_000), None).await {
                Ok(_) => written += 1,
                Err(error) => break status_of::<()>(Err(error)),
            }
            assert!(written < 2000, "the quota is never reached");
        };
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "etcdserver: mvcc: database space exceeded");
        assert_eq!(get_one(&mut client, "q0").await.unwrap().value().len(), 100_000);
        let alarms = eventually("the alarm stands", SOON, async || {
            let alarms = client.alarm(AlarmAction::Get, AlarmType::None, None).await.unwrap();
            (!alarms.alarms().is_empty()).then_some(alarms)
        })
        .await;
        assert!(alarms.alarms().iter().all(|a| a.alarm() == AlarmType::Nospace && a.member_id() != 0));
        // The other nodes refuse too, and etcd's way out works.
        let other = c.client(2).await.put("q", rand_bytes(100_000), None).await;
        refused(other, Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded");
        for i in 0..written {
            client.delete(format!("q{i}"), None).await.unwrap();
        }
        let at = revision(&mut client).await;
        client.compact(at, Some(etcd_client::CompactionOptions::new().with_physical())).await.unwrap();
        for i in 0..3 {
            c.client(i).await.defragment().await.unwrap();
        }
        // A node may raise its alarm late, so what stands is cleared until nothing does.
        eventually("writes go on", SOON, async || {
            let standing = client.alarm(AlarmAction::Get, AlarmType::None, None).await.unwrap();
            for alarm in standing.alarms() {
                let mut of = etcd_client::AlarmOptions::new();
                of.with_member(alarm.member_id());
                let _ = client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(of)).await;
            }
            client.put("q", "small", None).await.ok()
        })
        .await;
    });
}

fn rand_bytes(n: usize) -> Vec<u8> {
    (0..n).map(|_| rand::random()).collect()
}

#[test]
fn a_snapshot_streams_whole_and_ends_with_its_sha256() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut client = c.client(0).await;
        for i in 0..200 {
            client.put(format!("s{i}"), rand_bytes(1000), None).await.unwrap();
        }
        let mut stream = client.snapshot().await.unwrap();
        let (mut whole, mut left) = (Vec::new(), None);
        while let Some(part) = stream.message().await.unwrap() {
            if let Some(left) = left {
                assert!(part.remaining_bytes() <= left);
            }
            left = Some(part.remaining_bytes());
            whole.extend_from_slice(part.blob());
        }
        assert_eq!(left, Some(0));
        // etcdctl checks it so: some multiple of 512 bytes, then 32 bytes of SHA-256.
        assert_eq!(whole.len() % 512, 32);
        let (content, sum) = whole.split_at(whole.len() - 32);
        assert_eq!(Sha256::digest(content).as_slice(), sum);
    });
}

#[test]
fn hash_and_defragment_answer() {
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        assert!(client.hash().await.unwrap().header().is_some());
        client.defragment().await.unwrap();
        let future = revision(&mut client).await + 100;
        refused(
            client.hash_kv(future).await,
            Code::OutOfRange,
            "etcdserver: mvcc: required revision is a future revision",
        );
    });
}

#[test]
fn auth_is_not_enabled_in_etcds_words() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut client = c.client(0).await;
        let channel = raw::channel(&c.nodes[0].url()).await;
        let body: Result<raw::Empty, _> =
            raw::unary(&channel, "/etcdserverpb.Auth/Authenticate", &[], raw::Empty {}).await;
        raw_refused(body, Code::FailedPrecondition, "etcdserver: authentication is not enabled");
        client.put("k", "v", None).await.unwrap();
        if etcd_before((3, 6)) {
            return;
        }
        let token = [("token", "any".to_owned())];
        let request = raw::RangeRequest { key: b"k".to_vec(), ..Default::default() };
        let got: raw::RangeResponse =
            raw::unary(&channel, "/etcdserverpb.KV/Range", &token, request).await.unwrap();
        assert_eq!(got.kvs[0].value, b"v", "a token without auth is ignored");
    });
}

#[test]
fn an_unknown_method_is_unimplemented() {
    on_cluster(async |c| {
        let channel = raw::channel(&c.nodes[0].url()).await;
        for path in ["/etcdserverpb.KV/Nothing", "/no.Such/Service"] {
            let result: Result<raw::Empty, _> = raw::unary(&channel, path, &[], raw::Empty {}).await;
            assert_eq!(result.unwrap_err().code(), Code::Unimplemented, "{path}");
        }
    });
}

#[test]
fn the_pages_beside_grpc_answer_on_the_same_port() {
    on_cluster(async |c| {
        for node in &c.nodes {
            let (code, body) = http::get(node.client_port, "/health").await.unwrap();
            assert_eq!(code, 200);
            let health: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_eq!(health["health"], "true");
            let (code, body) = http::get(node.client_port, "/version").await.unwrap();
            assert_eq!(code, 200);
            let version: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert!(version["etcdserver"].is_string() && version["etcdcluster"].is_string(), "{body}");
            let (code, body) = http::get(node.client_port, "/metrics").await.unwrap();
            assert!(code == 200 && body.lines().any(|line| line.starts_with("# TYPE ")), "{body}");
            if !etcd_before((3, 6)) {
                assert_eq!(http::get(node.client_port, "/livez").await.unwrap().0, 200);
                assert_eq!(http::get(node.client_port, "/readyz").await.unwrap().0, 200);
            }
            assert_eq!(http::get(node.client_port, "/nothing").await.unwrap().0, 404);
        }
    });
}

#[test]
fn without_a_quorum_health_says_no_and_linearizable_reads_are_unavailable() {
    on_own_cluster(Spec::nodes(3), async |c| {
        c.client(0).await.put("k", "v", None).await.unwrap();
        c.client(2).await.get("k", None).await.unwrap();
        c.nodes[0].kill();
        c.nodes[1].kill();
        let port = c.nodes[2].client_port;
        eventually("health says no", SOON, async || match http::get(port, "/health").await {
            Ok((503, body)) if body.contains("false") => Some(()),
            _ => None,
        })
        .await;
        let mut client = c.client(2).await;
        for status in [status_of(client.get("k", None).await), status_of(client.put("k", "w", None).await)] {
            // Older etcd waits until the client's own deadline and says so.
            if !etcd_before((3, 6)) {
                assert!(matches!(status.code(), Code::Unavailable), "{status:?}");
                assert!(status.message().starts_with("etcdserver: "), "{status:?}");
            }
        }
        let mut strict = strict_client(&c.nodes[2].url()).await;
        let required = strict.get("k", Some(etcd_client::GetOptions::new().with_serializable())).await;
        refused(required, Code::Unavailable, "etcdserver: no leader");
        let local = etcd_client::GetOptions::new().with_serializable();
        assert_eq!(client.get("k", Some(local)).await.unwrap().kvs()[0].value(), b"v");
        if !etcd_before((3, 6)) {
            assert_eq!(http::get(port, "/livez").await.unwrap().0, 200, "it lives, it is only not ready");
            assert_eq!(http::get(port, "/readyz").await.unwrap().0, 503);
        }
        c.start_all();
        c.wait_ready().await;
        c.client(2).await.put("k", "w", None).await.unwrap();
    });
}

/// A client that sends `hasleader` with every call.
async fn strict_client(url: &str) -> etcd_client::Client {
    let options = etcd_client::ConnectOptions::new().with_require_leader(true);
    etcd_client::Client::connect([url], Some(options)).await.unwrap()
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[test]
fn grpc_health_says_serving() {
    on_cluster(async |c| {
        let channel = raw::channel(&c.nodes[0].url()).await;
        let path = "/grpc.health.v1.Health/Check";
        let whole: HealthResponse = raw::unary(&channel, path, &[], HealthRequest::default()).await.unwrap();
        assert_eq!(whole.status, 1);
        let unknown = HealthRequest { service: "no.such.Service".into() };
        let answer: Result<HealthResponse, _> = raw::unary(&channel, path, &[], unknown).await;
        assert_eq!(answer.unwrap_err().code(), Code::NotFound);
    });
}

#[test]
fn downgrade_answers_without_breaking_anything() {
    if etcd_before((3, 5)) {
        return;
    }
    on_cluster(async |c| {
        let mut client = c.client(0).await;
        let cancel = client.maintenance_client().downgrade(etcd_client::DowngradeOptions::Cancel).await;
        assert!(cancel.is_err(), "there is none to cancel");
        client.get("k", None).await.unwrap();
    });
}
