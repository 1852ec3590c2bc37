//! The Watch service over a real connection, with the generated client.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};

use super::*;
use crate::watch::HubOptions;
use crate::watch::tests::DiskFeed;
use crate::wire::etcdserverpb::watch_client::WatchClient;
use crate::wire::etcdserverpb::{WatchCancelRequest, WatchProgressRequest};

struct Fixture {
    feed: DiskFeed,
    leader: watch::Sender<NodeId>,
    client: WatchClient<tonic::transport::Channel>,
}

impl Fixture {
    async fn new(options: HubOptions) -> Fixture {
        let feed = DiskFeed::new(options);
        let _hub = tokio::spawn(feed.hub.clone().run());
        let (leader, followed) = watch::channel(7);
        let surroundings = Surroundings {
            hub: feed.hub.clone(),
            cluster_id: 11,
            member_id: 12,
            term: Box::new(|| 13),
            leader: followed,
            options: WatchServiceOptions {
                leaderless_grace: Duration::from_millis(50),
                ..Default::default()
            },
        };
        let service = WatchService { surroundings: Arc::new(surroundings) };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder().add_service(service);
        let _server = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap();
        Fixture { feed, leader, client: WatchClient::new(channel.connect().await.unwrap()) }
    }

    async fn open(&mut self, wants_leader: bool) -> Result<Client, Status> {
        let (requests, received) = mpsc::channel(16);
        let mut request = tonic::Request::new(ReceiverStream::new(received));
        if wants_leader {
            request.metadata_mut().insert("hasleader", "true".parse().unwrap());
        }
        let responses = self.client.watch(request).await?.into_inner();
        Ok(Client { requests, responses })
    }
}

struct Client {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
}

impl Client {
    async fn ask(&mut self, request: RequestUnion) {
        self.requests.send(WatchRequest { request_union: Some(request) }).await.unwrap();
    }

    async fn create(&mut self, request: WatchCreateRequest) -> WatchResponse {
        self.ask(RequestUnion::CreateRequest(request)).await;
        self.hear().await
    }

    async fn hear(&mut self) -> WatchResponse {
        let heard = tokio::time::timeout(Duration::from_secs(10), self.responses.message());
        heard.await.expect("a response comes").unwrap().expect("the stream goes on")
    }
}

fn on(key: &'static str) -> WatchCreateRequest {
    WatchCreateRequest { key: key.into(), ..WatchCreateRequest::default() }
}

/// Everything in the space.
fn on_all() -> WatchCreateRequest {
    WatchCreateRequest { range_end: Bytes::from_static(&[0]), ..WatchCreateRequest::default() }
}

fn keys(response: &WatchResponse) -> Vec<(Bytes, i64)> {
    let kvs = response.events.iter().map(|event| event.kv.as_ref().unwrap());
    kvs.map(|kv| (kv.key.clone(), kv.mod_revision)).collect()
}

#[tokio::test]
async fn a_stream_creates_hears_asks_and_cancels() {
    let mut fixture = Fixture::new(HubOptions::default()).await;
    fixture.feed.put("a", "1");
    let mut client = fixture.open(true).await.unwrap();
    let created = client.create(on("a")).await;
    assert_eq!((created.created, created.watch_id, created.events.len()), (true, 0, 0));
    let header = created.header.unwrap();
    assert_eq!((header.cluster_id, header.member_id, header.raft_term, header.revision), (11, 12, 13, 2));
    assert_eq!(client.create(on_all()).await.watch_id, 1);
    fixture.feed.put("a", "2");
    let mut heard = [client.hear().await, client.hear().await];
    heard.sort_by_key(|response| response.watch_id);
    for (id, response) in heard.iter().enumerate() {
        assert_eq!(response.watch_id, id as i64);
        assert_eq!(keys(response), [("a".into(), 3)]);
        let kv = response.events[0].kv.as_ref().unwrap();
        assert_eq!((&kv.value[..], kv.create_revision, kv.version), (&b"2"[..], 3, 1));
        assert_eq!(response.header.as_ref().unwrap().revision, 3);
    }
    client.ask(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    let progress = client.hear().await;
    assert_eq!((progress.watch_id, progress.header.unwrap().revision), (-1, 3));
    client.ask(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 99 })).await;
    client.ask(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 0 })).await;
    let canceled = client.hear().await;
    assert!(canceled.canceled && canceled.watch_id == 0 && canceled.cancel_reason.is_empty());
    fixture.feed.put("a", "3");
    assert_eq!(client.hear().await.watch_id, 1);
}

#[tokio::test]
async fn a_failed_create_says_why_and_keeps_the_stream() {
    let mut fixture = Fixture::new(HubOptions::default()).await;
    for _ in 0..4 {
        fixture.feed.put("a", "1");
    }
    fixture.feed.compact(Revision(4));
    let mut client = fixture.open(false).await.unwrap();
    assert_eq!(client.create(WatchCreateRequest { watch_id: 5, ..on("a") }).await.watch_id, 5);
    let reasons = [
        (
            WatchCreateRequest { watch_id: 5, ..on("a") },
            "mvcc: duplicate watch ID provided on the WatchStream",
        ),
        (WatchCreateRequest { range_end: "A".into(), ..on("a") }, "mvcc: watcher range is empty"),
        (
            WatchCreateRequest { start_revision: -1, ..on("a") },
            "etcdserver: mvcc: required revision has been compacted",
        ),
    ];
    for (request, reason) in reasons {
        let refused = client.create(request).await;
        assert!(refused.created && refused.canceled);
        assert_eq!((refused.watch_id, &refused.cancel_reason[..]), (-1, reason));
    }
    // Below the compact mark the watcher is created, and then ended with the mark.
    let created = client.create(WatchCreateRequest { start_revision: 3, ..on("a") }).await;
    assert!(created.created && !created.canceled);
    let ended = client.hear().await;
    assert_eq!((ended.watch_id, ended.canceled, ended.compact_revision), (created.watch_id, true, 4));
    // At the mark it is not.
    let created = client.create(WatchCreateRequest { start_revision: 4, ..on("a") }).await;
    assert!(created.created && !created.canceled);
    assert_eq!(keys(&client.hear().await), [("a".into(), 4), ("a".into(), 5)]);
}

#[tokio::test]
async fn streams_that_want_a_leader_end_without_one_and_all_end_with_the_hub() {
    let mut fixture = Fixture::new(HubOptions::default()).await;
    let mut wanting = fixture.open(true).await.unwrap();
    let mut other = fixture.open(false).await.unwrap();
    wanting.create(on("a")).await;
    other.create(on("a")).await;
    // A short election does not matter.
    fixture.leader.send_replace(0);
    fixture.leader.send_replace(8);
    tokio::time::sleep(Duration::from_millis(100)).await;
    fixture.feed.put("a", "1");
    wanting.hear().await;
    other.hear().await;
    fixture.leader.send_replace(0);
    let status = wanting.responses.message().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::Unavailable, "etcdserver: no leader"));
    assert_eq!(fixture.open(true).await.err().unwrap().message(), "etcdserver: no leader");
    fixture.feed.put("a", "2");
    other.hear().await;
    fixture.feed.hub.close();
    let status = other.responses.message().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::Unavailable, "etcdserver: server stopped"));
}
