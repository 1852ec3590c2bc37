//! One real node on loopback, asked over gRPC and HTTP as clients ask.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::*;
use crate::env::SystemEnv;
use crate::node::{Bootstrap, InitialMember, NodeOptions, NodeParts};
use crate::raft::{Fatal, GrpcTransport};
use crate::storage::DataDirOptions;
use crate::watch::HubOptions;
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::auth_client::AuthClient;
use crate::wire::etcdserverpb::cluster_client::ClusterClient;
use crate::wire::etcdserverpb::kv_client::KvClient;
use crate::wire::etcdserverpb::lease_client::LeaseClient;
use crate::wire::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::wire::etcdserverpb::request_op::Request as Op;
use crate::wire::mainstay_v1::history_client::HistoryClient;
use crate::wire::mainstay_v1::sessions_client::SessionsClient;
use crate::wire::mainstay_v1::{OpenRequest, RevisionAtRequest};
use crate::wire::v3electionpb as election;
use crate::wire::v3electionpb::election_client::ElectionClient;
use crate::wire::v3lockpb::lock_client::LockClient;
use crate::wire::v3lockpb::{LockRequest, UnlockRequest};

/// Nothing here takes longer on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(30);

struct Rig {
    server: Server,
    channel: Channel,
    _dir: tempfile::TempDir,
}

impl Rig {
    async fn start() -> Rig {
        Rig::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut ServerOptions)) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let env = SystemEnv::shared();
        let mut options = ServerOptions {
            client_listeners: vec![ListenAddress::client("127.0.0.1", 0)],
            peer_listeners: vec![ListenAddress::peer("127.0.0.1", 0)],
            ..ServerOptions::default()
        };
        change(&mut options);
        let listeners = Listeners::open(&options).await.unwrap();
        let peer_url = format!("http://{}", listeners.peer_addresses()[0]);
        let client_url = format!("http://{}", listeners.client_addresses()[0]);
        let member = InitialMember { name: "only".to_owned(), peer_urls: vec![peer_url.clone()] };
        let node_options = NodeOptions {
            name: "only".to_owned(),
            data_dir: dir.path().join("data"),
            peer_urls: vec![peer_url],
            client_urls: vec![client_url.clone()],
            bootstrap: Bootstrap::Initial { members: vec![member], token: "t".to_owned() },
            disk_reserve_bytes: 0,
            ..NodeOptions::default()
        };
        let parts = NodeParts {
            options: node_options,
            env: env.clone(),
            fatal: Fatal::new(|reason| panic!("the node ended: {reason}")),
            transport: Box::new(|directory| Arc::new(GrpcTransport::new(directory, Duration::from_secs(1)))),
            dialer: Arc::new(control::GrpcDialer),
            watch: HubOptions::default(),
            data_dir: DataDirOptions { ballast_bytes: 0 },
            inline: false,
            log: None,
        };
        let node = Node::start(parts).await.unwrap();
        let metrics = telemetry::metrics_recorder().ok();
        let server = Server::start(node.clone(), listeners, options, env, metrics);
        node.run();
        let mut leader = node.leader_changes();
        let led = tokio::time::timeout(PATIENCE, leader.wait_for(|leader| *leader != 0)).await;
        led.expect("a node alone elects itself").unwrap();
        let channel = Channel::from_shared(client_url).unwrap().connect_lazy();
        Rig { server, channel, _dir: dir }
    }

    fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone())
    }

    fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel.clone())
    }

    async fn put(&self, key: &str, value: &str) -> pb::PutResponse {
        let request = put_request(key, value);
        self.kv().put(request).await.unwrap().into_inner()
    }

    /// One HTTP/1.1 request: status line and body.
    async fn http(&self, path: &str) -> (String, String) {
        let address = self.server.client_addresses()[0];
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }
}

fn key(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put_request(name: &str, value: &str) -> pb::PutRequest {
    pb::PutRequest { key: key(name), value: key(value), ..Default::default() }
}

fn get_request(name: &str) -> pb::RangeRequest {
    pb::RangeRequest { key: key(name), ..Default::default() }
}

fn prefix_request(prefix: &str) -> pb::RangeRequest {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().unwrap() += 1;
    pb::RangeRequest { key: key(prefix), range_end: end.into(), ..Default::default() }
}

fn op(request: Op) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn with<T>(message: T, metadata: &[(&'static str, &str)]) -> Request<T> {
    let mut request = Request::new(message);
    for (name, value) in metadata {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    request
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, message: &str) {
    let status = result.unwrap_err();
    assert_eq!((status.code(), status.message()), (code, message));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_put_read_deleted_and_compacted() {
    let rig = Rig::start().await;
    let mut kv = rig.kv();
    let header = rig.put("a", "1").await.header.unwrap();
    assert_eq!(header.revision, 2);
    assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term > 0);
    rig.put("a", "2").await;
    rig.put("b", "3").await;

    let got = kv.range(prefix_request("a")).await.unwrap().into_inner();
    assert_eq!((got.count, &got.kvs[0].value[..], got.kvs[0].version), (1, &b"2"[..], 2));
    let old = pb::RangeRequest { revision: 2, ..get_request("a") };
    let got = kv.range(old.clone()).await.unwrap().into_inner();
    assert_eq!((&got.kvs[0].value[..], got.header.unwrap().revision), (&b"1"[..], 4));

    refused(kv.range(get_request("")).await, Code::InvalidArgument, "etcdserver: key is not provided");
    let future = pb::RangeRequest { revision: 99, ..get_request("a") };
    let message = "etcdserver: mvcc: required revision is a future revision";
    refused(kv.range(future).await, Code::OutOfRange, message);
    let missing = pb::PutRequest { ignore_value: true, ..put_request("none", "") };
    refused(kv.put(missing).await, Code::InvalidArgument, "etcdserver: key not found");

    let compacted = kv.compact(pb::CompactionRequest { revision: 3, physical: true });
    tokio::time::timeout(PATIENCE, compacted).await.expect("the sweep ends").unwrap();
    let message = "etcdserver: mvcc: required revision has been compacted";
    refused(kv.range(old).await, Code::OutOfRange, message);
    refused(
        kv.compact(pb::CompactionRequest { revision: 3, physical: false }).await,
        Code::OutOfRange,
        message,
    );

    let delete = pb::DeleteRangeRequest { key: key("a"), range_end: Bytes::new(), prev_kv: true };
    let deleted = kv.delete_range(delete).await.unwrap().into_inner();
    assert_eq!((deleted.deleted, deleted.prev_kvs.len()), (1, 1));
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_only_reads_costs_no_revision() {
    let rig = Rig::start().await;
    let mut kv = rig.kv();
    rig.put("a", "1").await;
    let compare = pb::Compare {
        result: pb::compare::CompareResult::Equal.into(),
        target: pb::compare::CompareTarget::Version.into(),
        key: key("a"),
        target_union: Some(pb::compare::TargetUnion::Version(1)),
        ..Default::default()
    };
    let read = pb::TxnRequest {
        compare: vec![compare.clone()],
        success: vec![op(Op::RequestRange(get_request("a")))],
        failure: vec![],
    };
    let reply = kv.txn(read).await.unwrap().into_inner();
    assert!(reply.succeeded);
    assert_eq!(reply.header.unwrap().revision, 2);
    let write = pb::TxnRequest {
        compare: vec![compare],
        success: vec![op(Op::RequestPut(put_request("b", "2"))), op(Op::RequestRange(get_request("b")))],
        failure: vec![],
    };
    let reply = kv.txn(write).await.unwrap().into_inner();
    let Some(pb::response_op::Response::ResponseRange(range)) = &reply.responses[1].response else {
        panic!("{reply:?}")
    };
    assert_eq!(&range.kvs[0].value[..], b"2", "a read inside sees the write before it");
    let twice = vec![op(Op::RequestPut(put_request("x", "1"))), op(Op::RequestPut(put_request("x", "2")))];
    let twice = pb::TxnRequest { compare: vec![], success: twice, failure: vec![] };
    refused(kv.txn(twice).await, Code::InvalidArgument, "etcdserver: duplicate key given in txn request");
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_ranges_adds_up_to_the_range() {
    let rig = Rig::start().await;
    let mut kv = rig.kv();
    let value = "v".repeat(200 << 10);
    for n in 0..12 {
        rig.put(&format!("k{n:02}"), &value).await;
    }
    for limit in [0, 7, 12, 20] {
        let request = pb::RangeRequest { limit, ..prefix_request("k") };
        let whole = kv.range(request.clone()).await;
        // The whole answer is larger than what a tonic client takes by default.
        let whole = match whole {
            Ok(whole) => whole.into_inner(),
            Err(status) => panic!("{status}"),
        };
        let mut stream = kv.range_stream(request).await.unwrap().into_inner();
        let mut pieces = Vec::new();
        while let Some(piece) = stream.next().await {
            pieces.push(piece.unwrap().range_response.unwrap());
        }
        let last = pieces.last().unwrap();
        assert_eq!((last.count, last.more), (whole.count, whole.more), "limit {limit}");
        assert_eq!(last.header.as_ref().unwrap().revision, whole.header.unwrap().revision);
        assert!(pieces.len() > 1);
        assert!(pieces[..pieces.len() - 1].iter().all(|piece| piece.header.is_none() && piece.count == 0));
        let kvs: Vec<_> = pieces.into_iter().flat_map(|piece| piece.kvs).collect();
        assert_eq!(kvs, whole.kvs, "limit {limit}");
    }
    let sorted =
        pb::RangeRequest { sort_order: pb::range_request::SortOrder::Descend.into(), ..prefix_request("k") };
    let message = "RangeStream does not support custom sort orders";
    refused(kv.range_stream(sorted).await, Code::Unimplemented, message);
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_told_in_etcds_words() {
    let rig = Rig::with(|options| options.max_range_bytes = 1 << 20).await;
    let mut kv = rig.kv();
    let large = "x".repeat((3 << 19) + 1);
    let message = "etcdserver: request is too large";
    refused(kv.put(put_request("a", &large)).await, Code::InvalidArgument, message);
    let ops = (0..129).map(|n| op(Op::RequestPut(put_request(&format!("{n}"), "")))).collect();
    let many = pb::TxnRequest { compare: vec![], success: ops, failure: vec![] };
    refused(kv.txn(many).await, Code::InvalidArgument, "etcdserver: too many operations in txn request");
    let half = "x".repeat(700 << 10);
    rig.put("r1", &half).await;
    rig.put("r2", &half).await;
    let status = kv.range(prefix_request("r")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_is_applied_once() {
    let rig = Rig::start().await;
    let mut sessions = SessionsClient::new(rig.channel.clone());
    let session = sessions.open(OpenRequest { ttl_s: 0 }).await.unwrap().into_inner().session.to_string();
    let id = [("mainstay-session", session.as_str()), ("mainstay-sequence", "1"), ("mainstay-actor", "ann")];
    let mut kv = rig.kv();
    let first = kv.put(with(put_request("a", "1"), &id)).await.unwrap().into_inner();
    let second = kv.put(with(put_request("a", "1"), &id)).await.unwrap().into_inner();
    assert_eq!(first.header.unwrap().revision, second.header.unwrap().revision);
    let got = kv.range(get_request("a")).await.unwrap().into_inner();
    assert_eq!(got.kvs[0].version, 1);
    let other = kv.put(with(put_request("a", "2"), &id)).await.unwrap_err();
    assert!(other.message().contains("sequence 1 was used before"), "{other}");
    let half = kv.put(with(put_request("a", "2"), &id[..1])).await.unwrap_err();
    assert!(half.message().contains("mainstay-sequence"), "{half}");
    let unknown = [("mainstay-session", "12345"), ("mainstay-sequence", "1")];
    let unknown = kv.put(with(put_request("a", "2"), &unknown)).await.unwrap_err();
    assert_eq!(unknown.code(), Code::FailedPrecondition, "{unknown}");
    // A lease whose id the server chose is the same one the second time.
    let id = [("mainstay-session", session.as_str()), ("mainstay-sequence", "2")];
    let grant = pb::LeaseGrantRequest { ttl: 60, id: 0 };
    let first = rig.lease().lease_grant(with(grant, &id)).await.unwrap().into_inner().id;
    let second = rig.lease().lease_grant(with(grant, &id)).await.unwrap().into_inner().id;
    assert_eq!(first, second);
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_finds_its_revision() {
    let rig = Rig::start().await;
    let mut history = HistoryClient::new(rig.channel.clone());
    rig.put("a", "1").await;
    let since_1970 = || Duration::from_millis(SystemEnv::shared().wall_ms());
    let between = since_1970() + Duration::from_millis(1);
    while since_1970() < between {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let second = rig.put("a", "2").await.header.unwrap().revision;
    let mut at = async |time: Duration| {
        let request = RevisionAtRequest { time_ms: time.as_millis() as u64 };
        history.revision_at(request).await.unwrap().into_inner()
    };
    assert_eq!(at(Duration::ZERO).await.revision, second - 1);
    assert_eq!(at(between).await.revision, second);
    assert_eq!(at(since_1970() + PATIENCE).await.revision, second + 1);
    assert!(!at(Duration::ZERO).await.compacted);
    let compact = pb::CompactionRequest { revision: second, physical: true };
    rig.kv().compact(compact).await.unwrap();
    assert!(at(Duration::ZERO).await.compacted);
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_live_are_renewed_and_end() {
    let rig = Rig::start().await;
    let mut lease = rig.lease();
    let granted = lease.lease_grant(pb::LeaseGrantRequest { ttl: 60, id: 7 }).await.unwrap().into_inner();
    assert_eq!((granted.id, granted.ttl), (7, 60));
    let again = lease.lease_grant(pb::LeaseGrantRequest { ttl: 60, id: 7 }).await;
    refused(again, Code::FailedPrecondition, "etcdserver: lease already exists");
    let long = lease.lease_grant(pb::LeaseGrantRequest { ttl: 9_000_000_001, id: 8 }).await;
    refused(long, Code::OutOfRange, "etcdserver: too large lease TTL");
    rig.kv().put(pb::PutRequest { lease: 7, ..put_request("k", "") }).await.unwrap();
    let asked = tokio_stream::iter([7, 99].map(|id| pb::LeaseKeepAliveRequest { id }));
    let answers: Vec<_> = lease
        .lease_keep_alive(asked)
        .await
        .unwrap()
        .into_inner()
        .map(|answer| answer.unwrap())
        .collect()
        .await;
    let pairs: Vec<_> =
        answers.iter().map(|answer: &pb::LeaseKeepAliveResponse| (answer.id, answer.ttl)).collect();
    assert_eq!(pairs, [(7, 60), (99, 0)], "in the order they were asked");
    let ttl = lease.lease_time_to_live(pb::LeaseTimeToLiveRequest { id: 7, keys: true }).await.unwrap();
    assert_eq!(ttl.into_inner().keys, [key("k")]);
    let none = lease.lease_time_to_live(pb::LeaseTimeToLiveRequest { id: 99, keys: false }).await.unwrap();
    assert_eq!(none.into_inner().ttl, -1);
    lease.lease_revoke(pb::LeaseRevokeRequest { id: 7 }).await.unwrap();
    let gone = lease.lease_revoke(pb::LeaseRevokeRequest { id: 7 }).await;
    refused(gone, Code::NotFound, "etcdserver: requested lease not found");
    assert_eq!(rig.kv().range(get_request("k")).await.unwrap().into_inner().count, 0);
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_held_by_one_and_passed_on() {
    let rig = Rig::start().await;
    let mut lock = LockClient::new(rig.channel.clone());
    let mut lease = rig.lease();
    for id in [1, 2, 3] {
        lease.lease_grant(pb::LeaseGrantRequest { ttl: 60, id }).await.unwrap();
    }
    let ask = |lease| LockRequest { name: key("l"), lease };
    let held = lock.lock(ask(1)).await.unwrap().into_inner().key;
    assert_eq!(held, key("l/1"));
    let again = lock.lock(ask(1)).await.unwrap().into_inner().key;
    assert_eq!(again, held, "who holds it gets it again");
    let waiter = lock.clone();
    let wait = |lease| {
        let mut lock = waiter.clone();
        tokio::spawn(async move { lock.lock(ask(lease)).await })
    };
    let second = wait(2);
    let queued = |count: i64| {
        let mut kv = rig.kv();
        async move {
            let until = tokio::time::timeout(PATIENCE, async {
                while kv.range(prefix_request("l/")).await.unwrap().into_inner().count != count {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            });
            until.await.expect("the queue comes to that length");
        }
    };
    queued(2).await;
    let third = wait(3);
    queued(3).await;
    // One that gives up leaves the queue by itself.
    third.abort();
    queued(2).await;
    assert!(!second.is_finished());
    lock.unlock(UnlockRequest { key: held }).await.unwrap();
    let passed = tokio::time::timeout(PATIENCE, second).await.unwrap().unwrap().unwrap().into_inner();
    assert_eq!(passed.key, key("l/2"));
    // One whose lease ends while it waits is told so.
    let waiting = wait(3);
    queued(2).await;
    lease.lease_revoke(pb::LeaseRevokeRequest { id: 3 }).await.unwrap();
    let lost = tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap();
    refused(lost, Code::Unknown, "mutex: session is expired");
    let unknown = lock.lock(ask(99)).await;
    refused(unknown, Code::NotFound, "etcdserver: requested lease not found");
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_election_has_one_leader_and_observers_hear_of_each() {
    let rig = Rig::start().await;
    let mut client = ElectionClient::new(rig.channel.clone());
    let mut lease = rig.lease();
    for id in [1, 2] {
        lease.lease_grant(pb::LeaseGrantRequest { ttl: 60, id }).await.unwrap();
    }
    let name = || election::LeaderRequest { name: key("e") };
    refused(client.leader(name()).await, Code::Unknown, "election: no leader");
    let mut observed = client.observe(name()).await.unwrap().into_inner();
    let campaign =
        |lease, value: &str| election::CampaignRequest { name: key("e"), lease, value: key(value) };
    let won = client.campaign(campaign(1, "one")).await.unwrap().into_inner().leader.unwrap();
    assert_eq!((&won.key[..], won.lease), (&b"e/1"[..], 1));
    let proclaim = |leader, value: &str| election::ProclaimRequest { leader, value: key(value) };
    client.proclaim(proclaim(Some(won.clone()), "uno")).await.unwrap();
    refused(client.proclaim(proclaim(None, "x")).await, Code::Unknown, "\"leader\" field must be provided");
    let leader = client.leader(name()).await.unwrap().into_inner().kv.unwrap();
    assert_eq!(&leader.value[..], b"uno");
    let mut rival = client.clone();
    let second = tokio::spawn(async move { rival.campaign(campaign(2, "two")).await });
    client.resign(election::ResignRequest { leader: Some(won.clone()) }).await.unwrap();
    let second = tokio::time::timeout(PATIENCE, second).await.unwrap().unwrap().unwrap().into_inner();
    assert_eq!(&second.leader.unwrap().key[..], b"e/2");
    refused(client.proclaim(proclaim(Some(won), "late")).await, Code::Unknown, "election: not leader");
    let mut seen = Vec::new();
    while seen.last().map(|value: &Bytes| &value[..]) != Some(b"two") {
        let next = tokio::time::timeout(PATIENCE, observed.next()).await.expect("the observer hears of both");
        seen.push(next.unwrap().unwrap().kv.unwrap().value);
    }
    assert_eq!(seen.first().unwrap(), &key("one"));
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_ask_for_members_status_hashes_and_snapshots() {
    let rig = Rig::start().await;
    rig.put("a", "1").await;
    let mut cluster = ClusterClient::new(rig.channel.clone());
    let list = cluster.member_list(pb::MemberListRequest { linearizable: true }).await.unwrap().into_inner();
    assert_eq!(list.members.len(), 1);
    assert!(!list.members[0].is_learner);
    let bad = pb::MemberAddRequest { peer_ur_ls: vec!["nowhere".to_owned()], is_learner: false };
    refused(
        cluster.member_add(bad).await,
        Code::InvalidArgument,
        "etcdserver: given member URLs are invalid",
    );
    refused(
        cluster.member_remove(pb::MemberRemoveRequest { id: 1 }).await,
        Code::NotFound,
        "etcdserver: member not found",
    );

    let mut maintenance = MaintenanceClient::new(rig.channel.clone());
    let status = maintenance.status(pb::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.version, "3.7.0");
    assert_eq!(status.leader, list.members[0].id);
    assert!(status.raft_applied_index > 0 && status.errors.is_empty(), "{status:?}");
    let hash = maintenance.hash_kv(pb::HashKvRequest { revision: 0 }).await.unwrap().into_inner();
    assert_eq!((hash.hash_revision, hash.compact_revision), (2, -1));
    let alarm = |action: pb::alarm_request::AlarmAction, alarm: pb::AlarmType| pb::AlarmRequest {
        action: action.into(),
        member_id: status.leader,
        alarm: alarm.into(),
    };
    use pb::alarm_request::AlarmAction::{Activate, Deactivate, Get};
    let raised = maintenance.alarm(alarm(Activate, pb::AlarmType::Nospace)).await.unwrap().into_inner();
    assert_eq!(raised.alarms.len(), 1);
    let full = rig.kv().put(put_request("b", "2")).await;
    refused(full, Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded");
    let status_line = rig.http("/health").await;
    assert!(status_line.0.contains("503") && status_line.1.contains("ALARM NOSPACE"), "{status_line:?}");
    let standing = maintenance.alarm(alarm(Get, pb::AlarmType::None)).await.unwrap().into_inner();
    assert_eq!(standing.alarms.len(), 1);
    let cleared = maintenance.alarm(alarm(Deactivate, pb::AlarmType::Nospace)).await.unwrap().into_inner();
    assert_eq!(cleared.alarms.len(), 1);

    let mut stream = maintenance.snapshot(pb::SnapshotRequest {}).await.unwrap().into_inner();
    let (mut bytes, mut left) = (0, None);
    while let Some(piece) = stream.next().await {
        let piece = piece.unwrap();
        bytes += piece.blob.len() as u64;
        left = Some(piece.remaining_bytes);
    }
    assert_eq!(left, Some(0));
    assert_eq!(bytes % 512, 32, "etcdctl takes the last 32 bytes for the hash");
    maintenance.defragment(pb::DefragmentRequest {}).await.unwrap();
    let cancel = pb::DowngradeRequest {
        action: pb::downgrade_request::DowngradeAction::Cancel.into(),
        version: String::new(),
    };
    let message = "etcdserver: no inflight downgrade job";
    refused(maintenance.downgrade(cancel).await, Code::FailedPrecondition, message);

    let mut auth = AuthClient::new(rig.channel.clone());
    assert!(!auth.auth_status(pb::AuthStatusRequest {}).await.unwrap().into_inner().enabled);
    let login = auth.authenticate(pb::AuthenticateRequest::default()).await;
    refused(login, Code::FailedPrecondition, "etcdserver: authentication is not enabled");
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_port_speaks_http_too() {
    let rig = Rig::start().await;
    rig.put("a", "1").await;
    assert_eq!(rig.http("/health").await.1, r#"{"health":"true","reason":""}"#);
    assert_eq!(rig.http("/livez").await.1, "ok\n");
    let (status, body) = rig.http("/readyz?verbose").await;
    assert!(status.contains("200") && body.contains("[+]linearizable_read ok"), "{status} {body}");
    assert!(rig.http("/version").await.1.contains(r#""etcdserver":"3.7.0""#));
    let (_, metrics) = rig.http("/metrics").await;
    assert!(metrics.contains("mainstay_requests_total"), "{metrics}");
    assert!(rig.http("/nothing").await.0.contains("404"));
    rig.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_ends_streams_and_is_quick() {
    let rig = Rig::start().await;
    let mut lock = LockClient::new(rig.channel.clone());
    for id in [1, 2] {
        rig.lease().lease_grant(pb::LeaseGrantRequest { ttl: 60, id }).await.unwrap();
    }
    lock.lock(LockRequest { name: key("l"), lease: 1 }).await.unwrap();
    let waiting = tokio::spawn(async move { lock.lock(LockRequest { name: key("l"), lease: 2 }).await });
    let mut election = ElectionClient::new(rig.channel.clone());
    let mut observed =
        election.observe(election::LeaderRequest { name: key("e") }).await.unwrap().into_inner();
    let observing = tokio::spawn(async move { observed.next().await });
    let Rig { server, channel, _dir } = rig;
    drop(channel);
    tokio::time::timeout(Duration::from_secs(10), server.stop()).await.expect("stopping has a limit");
    let lost = waiting.await.unwrap().unwrap_err();
    assert_eq!(lost.code(), Code::Unavailable, "{lost}");
    let ended = observing.await.unwrap();
    assert!(matches!(ended, Some(Err(_)) | None), "{ended:?}");
}
