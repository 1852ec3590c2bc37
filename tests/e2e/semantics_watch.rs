//! Watches: creation, events, options. Spoken raw, because clients hide parts
//! of the protocol that other clients rely on.

use std::time::Duration;

use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::checks::*;
use crate::cluster::{Cluster, on_cluster};
use crate::raw::{self, Event, WatchCancel, WatchCreate, WatchRequest, WatchResponse};
use etcd_client::{DeleteOptions, PutOptions, Txn, TxnOp};

/// One watch stream of one node.
///
/// etcd sends the headers of the response with the first message only, so the
/// call is not awaited before something was asked.
pub struct Watch {
    requests: Sender<WatchRequest>,
    opening: Option<JoinHandle<Result<Streaming<WatchResponse>, Status>>>,
    responses: Option<Streaming<WatchResponse>>,
}

impl Watch {
    /// Opens a stream.
    pub async fn open(c: &Cluster, node: usize, metadata: &[(&str, String)]) -> Watch {
        let grpc = raw::channel(&c.nodes[node].url()).await;
        let (requests, queue) = channel(64);
        let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        let opening = tokio::spawn(async move {
            let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
            raw::streaming(&grpc, "/etcdserverpb.Watch/Watch", &metadata, ReceiverStream::new(queue)).await
        });
        Watch { requests, opening: Some(opening), responses: None }
    }

    /// Sends any request.
    pub async fn send(&self, request: WatchRequest) {
        self.requests.send(request).await.expect("the stream is open");
    }

    /// Asks for a watch and returns the answer to that.
    pub async fn create(&mut self, create: WatchCreate) -> WatchResponse {
        self.send(WatchRequest { create: Some(create), ..Default::default() }).await;
        let answer = self.next().await;
        assert!(answer.created, "created precedes everything: {answer:?}");
        answer
    }

    /// Asks to cancel a watch.
    pub async fn cancel(&mut self, watch_id: i64) {
        self.send(WatchRequest { cancel: Some(WatchCancel { watch_id }), ..Default::default() }).await;
    }

    /// Asks for a progress notification.
    pub async fn progress(&mut self) {
        self.send(WatchRequest { progress: Some(raw::Empty {}), ..Default::default() }).await;
    }

    /// The next message.
    pub async fn next(&mut self) -> WatchResponse {
        self.try_next().await.expect("the stream goes on")
    }

    /// The next message or the end of the stream.
    pub async fn try_next(&mut self) -> Result<WatchResponse, Status> {
        match tokio::time::timeout(SOON, self.message()).await {
            Ok(Ok(Some(message))) => Ok(message),
            Ok(Ok(None)) => Err(Status::ok("the stream ended")),
            Ok(Err(status)) => Err(status),
            Err(_) => panic!("no message on the watch stream within {SOON:?}"),
        }
    }

    async fn message(&mut self) -> Result<Option<WatchResponse>, Status> {
        if let Some(opening) = &mut self.opening {
            let opened = opening.await.expect("the opening task does not panic");
            self.opening = None;
            self.responses = Some(opened?);
        }
        self.responses.as_mut().expect("opened above").message().await
    }

    /// Collects events of any watch until there are `n`.
    pub async fn events(&mut self, n: usize) -> Vec<Event> {
        let mut all = Vec::new();
        while all.len() < n {
            let message = self.next().await;
            assert!(!message.canceled, "{message:?}");
            all.extend(message.events);
        }
        assert_eq!(all.len(), n, "{all:?}");
        all
    }

    /// Asserts that nothing comes for a while.
    pub async fn silent(&mut self, period: Duration) {
        if let Ok(message) = tokio::time::timeout(period, self.message()).await {
            panic!("expected silence, got {message:?}");
        }
    }
}

/// A watch of one key from now on.
pub fn key(key: &str) -> WatchCreate {
    WatchCreate { key: key.as_bytes().to_vec(), ..Default::default() }
}

/// A watch of everything with a prefix that ends in `/`.
pub fn prefix(prefix: &str) -> WatchCreate {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().expect("not empty") += 1;
    WatchCreate { key: prefix.as_bytes().to_vec(), range_end: end, ..Default::default() }
}

/// An event as text: `+key=value` or `-key`, its revision beside it.
pub fn told(event: &Event, strip: &str) -> (String, i64) {
    let kv = event.kv.as_ref().expect("every event has a key");
    let key = String::from_utf8_lossy(&kv.key).into_owned();
    let key = key.strip_prefix(strip).unwrap_or(&key);
    let text = match event.kind {
        0 => format!("+{key}={}", String::from_utf8_lossy(&kv.value)),
        _ => format!("-{key}"),
    };
    (text, kv.mod_revision)
}

#[test]
fn created_comes_first_then_puts_and_deletes_in_order() {
    on_cluster(async |c| {
        let p = unique("order");
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 1, &[]).await;
        let created = watch.create(prefix(&p)).await;
        assert_eq!((created.watch_id, created.canceled, created.events.len()), (0, false, 0));
        let rev = w.put(format!("{p}a"), "1", None).await.unwrap().header().unwrap().revision();
        w.put(format!("{p}b"), "2", None).await.unwrap();
        w.delete(format!("{p}a"), None).await.unwrap();
        w.put(format!("{p}a"), "3", None).await.unwrap();
        let events = watch.events(4).await;
        let expected = [("+a=1", rev), ("+b=2", rev + 1), ("-a", rev + 2), ("+a=3", rev + 3)];
        assert_eq!(
            events.iter().map(|e| told(e, &p)).collect::<Vec<_>>(),
            expected.map(|(t, r)| (t.to_owned(), r))
        );
        let deleted = events[2].kv.as_ref().unwrap();
        assert_eq!((deleted.create_revision, deleted.version, deleted.value.len()), (0, 0, 0));
        let anew = events[3].kv.as_ref().unwrap();
        assert_eq!((anew.create_revision, anew.version), (rev + 3, 1));
    });
}

#[test]
fn a_watch_of_one_key_hears_of_no_other() {
    on_cluster(async |c| {
        let p = unique("one");
        let mut w = c.client(2).await;
        let mut watch = Watch::open(c, 0, &[]).await;
        watch.create(key(&format!("{p}k"))).await;
        for other in ["j", "k0", "l", "k"] {
            w.put(format!("{p}{other}"), "v", None).await.unwrap();
        }
        let events = watch.events(1).await;
        assert_eq!(told(&events[0], &p).0, "+k=v");
        watch.silent(Duration::from_millis(200)).await;
    });
}

#[test]
fn ranges_are_half_open_and_zero_means_to_the_end() {
    on_cluster(async |c| {
        let p = unique("range");
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 2, &[]).await;
        let range = WatchCreate {
            key: format!("{p}b").into_bytes(),
            range_end: format!("{p}d").into_bytes(),
            ..Default::default()
        };
        assert_eq!(watch.create(range).await.watch_id, 0);
        // Everything of other tests on this cluster sorts before 0xff.
        let from = WatchCreate { key: vec![0xff, 0xff], range_end: vec![0], ..Default::default() };
        assert_eq!(watch.create(from).await.watch_id, 1);
        for k in ["a", "b", "c", "d"] {
            w.put(format!("{p}{k}"), "v", None).await.unwrap();
        }
        let events = watch.events(2).await;
        assert_eq!(events.iter().map(|e| told(e, &p).0).collect::<Vec<_>>(), ["+b=v", "+c=v"]);
        let mut high = vec![0xff, 0xff, 0xff];
        high.extend(p.as_bytes());
        w.put(high.clone(), "high", None).await.unwrap();
        let message = watch.next().await;
        assert_eq!((message.watch_id, message.events[0].kv.as_ref().unwrap().key.clone()), (1, high.clone()));
        w.delete(high, None).await.unwrap();
    });
}

#[test]
fn a_start_revision_in_the_past_replays_from_there() {
    on_cluster(async |c| {
        let p = unique("past");
        let mut w = c.client(0).await;
        let first = w.put(format!("{p}k"), "0", None).await.unwrap().header().unwrap().revision();
        for i in 1..20 {
            w.put(format!("{p}k"), i.to_string(), None).await.unwrap();
        }
        for node in 0..3 {
            let mut watch = Watch::open(c, node, &[]).await;
            let create = WatchCreate { start_revision: first + 5, ..key(&format!("{p}k")) };
            assert!(!watch.create(create).await.canceled);
            let events = watch.events(15).await;
            let got: Vec<_> = events.iter().map(|e| told(e, &p)).collect();
            let expected: Vec<_> = (5..20).map(|i| (format!("+k={i}"), first + i)).collect();
            assert_eq!(got, expected, "node {node}");
        }
    });
}

#[test]
fn a_future_start_stays_silent_until_then() {
    on_cluster(async |c| {
        let p = unique("future");
        let mut w = c.client(1).await;
        let now = revision(&mut w).await;
        let mut watch = Watch::open(c, 0, &[]).await;
        let created = watch.create(WatchCreate { start_revision: now + 3, ..prefix(&p) }).await;
        assert!(created.created && !created.canceled);
        for i in 1..=4 {
            w.put(format!("{p}{i}"), "v", None).await.unwrap();
        }
        let events = watch.events(2).await;
        assert_eq!(
            events.iter().map(|e| told(e, &p)).collect::<Vec<_>>(),
            [("+3=v".to_owned(), now + 3), ("+4=v".to_owned(), now + 4)]
        );
        watch.silent(Duration::from_millis(200)).await;
    });
}

#[test]
fn prev_kv_is_what_was_there_before() {
    on_cluster(async |c| {
        let p = unique("prev");
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 1, &[]).await;
        watch.create(WatchCreate { prev_kv: true, ..prefix(&p) }).await;
        watch.create(prefix(&p)).await;
        let rev = w.put(format!("{p}k"), "1", None).await.unwrap().header().unwrap().revision();
        w.put(format!("{p}k"), "2", None).await.unwrap();
        w.delete(format!("{p}k"), None).await.unwrap();
        let (mut with, mut without) = (Vec::new(), Vec::new());
        while with.len() < 3 || without.len() < 3 {
            let message = watch.next().await;
            if message.watch_id == 0 { with.extend(message.events) } else { without.extend(message.events) }
        }
        assert!(without.iter().all(|event| event.prev_kv.is_none()));
        assert!(with[0].prev_kv.is_none(), "nothing was there before it was created");
        let prev = with[1].prev_kv.as_ref().unwrap();
        assert_eq!((prev.mod_revision, prev.version, &prev.value[..]), (rev, 1, &b"1"[..]));
        let prev = with[2].prev_kv.as_ref().unwrap();
        assert_eq!((prev.mod_revision, prev.version, &prev.value[..]), (rev + 1, 2, &b"2"[..]));
    });
}

#[test]
fn prev_kv_also_comes_from_history() {
    on_cluster(async |c| {
        let p = unique("prev-past");
        let mut w = c.client(0).await;
        let rev = w.put(format!("{p}k"), "1", None).await.unwrap().header().unwrap().revision();
        w.put(format!("{p}k"), "2", None).await.unwrap();
        w.delete(p.as_str(), Some(DeleteOptions::new().with_prefix())).await.unwrap();
        let mut watch = Watch::open(c, 2, &[]).await;
        watch.create(WatchCreate { prev_kv: true, start_revision: rev, ..prefix(&p) }).await;
        let events = watch.events(3).await;
        let prev: Vec<_> = events.iter().map(|e| e.prev_kv.as_ref().map(|kv| kv.value.clone())).collect();
        assert_eq!(prev, [None, Some(b"1".to_vec()), Some(b"2".to_vec())]);
    });
}

#[test]
fn filters_leave_out_puts_or_deletes() {
    on_cluster(async |c| {
        let p = unique("filters");
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 1, &[]).await;
        watch.create(WatchCreate { filters: vec![0], ..prefix(&p) }).await;
        watch.create(WatchCreate { filters: vec![1], ..prefix(&p) }).await;
        watch.create(WatchCreate { filters: vec![0, 1], ..prefix(&p) }).await;
        w.put(format!("{p}k"), "1", None).await.unwrap();
        w.delete(format!("{p}k"), None).await.unwrap();
        w.put(format!("{p}end"), "2", None).await.unwrap();
        let (mut deletes, mut puts) = (Vec::new(), Vec::new());
        while deletes.is_empty() || puts.len() < 2 {
            let message = watch.next().await;
            let told = message.events.iter().map(|e| told(e, &p).0);
            match message.watch_id {
                0 => deletes.extend(told),
                1 => puts.extend(told),
                _ => panic!("filtered out both: {message:?}"),
            }
        }
        assert_eq!((deletes, puts), (vec!["-k".into()], vec!["+k=1".into(), "+end=2".into()]));
        watch.silent(Duration::from_millis(200)).await;
    });
}

#[test]
fn a_transaction_comes_as_one_message_of_one_revision() {
    on_cluster(async |c| {
        let p = unique("atomic");
        let mut w = c.client(2).await;
        let mut live = Watch::open(c, 0, &[]).await;
        live.create(prefix(&p)).await;
        let ops: Vec<_> = (0..100).map(|i| TxnOp::put(format!("{p}{i:03}"), "v", None)).collect();
        let rev = w.txn(Txn::new().and_then(ops)).await.unwrap().header().unwrap().revision();
        let mut late = Watch::open(c, 1, &[]).await;
        late.create(WatchCreate { start_revision: rev, ..prefix(&p) }).await;
        for watch in [&mut live, &mut late] {
            let message = watch.next().await;
            assert_eq!(message.events.len(), 100);
            assert!(message.events.iter().all(|e| told(e, &p).1 == rev));
            assert!(message.revision() >= rev && !message.fragment);
            let keys: Vec<_> = message.events.iter().map(|e| e.kv.as_ref().unwrap().key.clone()).collect();
            assert!(keys.is_sorted(), "in the order of the operations");
        }
    });
}

#[test]
fn a_lease_and_its_keys_end_in_one_message() {
    on_cluster(async |c| {
        let p = unique("lease-end");
        let mut w = c.client(0).await;
        let lease = w.lease_grant(600, None).await.unwrap().id();
        for i in 0..5 {
            w.put(format!("{p}{i}"), "v", Some(PutOptions::new().with_lease(lease))).await.unwrap();
        }
        // Where the puts went: another member may not have applied them yet, and would tell them.
        let mut watch = Watch::open(c, 0, &[]).await;
        watch.create(prefix(&p)).await;
        w.lease_revoke(lease).await.unwrap();
        let message = watch.next().await;
        assert_eq!(
            message.events.iter().map(|e| told(e, &p).0).collect::<Vec<_>>(),
            ["-0", "-1", "-2", "-3", "-4"]
        );
        let revs: Vec<_> = message.events.iter().map(|e| told(e, &p).1).collect();
        assert!(revs.iter().all(|rev| *rev == revs[0]));
    });
}

#[test]
fn many_watches_share_a_stream_and_each_event_goes_to_all_of_them() {
    on_cluster(async |c| {
        let p = unique("shared");
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 2, &[]).await;
        for id in 0..50 {
            assert_eq!(watch.create(key(&format!("{p}k"))).await.watch_id, id);
        }
        w.put(format!("{p}k"), "v", None).await.unwrap();
        let mut heard = Vec::new();
        while heard.len() < 50 {
            let message = watch.next().await;
            assert_eq!(message.events.len(), 1);
            heard.push(message.watch_id);
        }
        heard.sort_unstable();
        assert_eq!(heard, (0..50).collect::<Vec<_>>());
    });
}

#[test]
fn watchers_on_all_nodes_hear_the_same_story_under_load() {
    on_cluster(async |c| {
        let p = unique("story");
        let mut watches = Vec::new();
        for node in 0..3 {
            let mut watch = Watch::open(c, node, &[]).await;
            watch.create(prefix(&p)).await;
            watches.push(watch);
        }
        let mut tasks = Vec::new();
        for writer in 0..6 {
            let (mut client, p) = (c.client(writer % 3).await, p.clone());
            tasks.push(tokio::spawn(async move {
                for i in 0..50 {
                    client.put(format!("{p}{}", i % 7), format!("{writer}-{i}"), None).await.unwrap();
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        let mut stories = Vec::new();
        for watch in &mut watches {
            let story: Vec<_> = watch.events(300).await.iter().map(|e| told(e, &p)).collect();
            assert!(story.windows(2).all(|pair| pair[0].1 < pair[1].1), "revisions rise");
            stories.push(story);
        }
        assert!(stories[0] == stories[1] && stories[1] == stories[2]);
        assert_eq!(stories[0].last().unwrap().1 - stories[0][0].1, 299, "none is missing");
    });
}
