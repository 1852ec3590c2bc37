//! Subscriptions on real nodes: no gap and no repeat, whatever happens to the
//! nodes; what a slow reader gets; where a replay begins.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use mainstay::client::{
    Batch, Client, ClientError, Filter, GetOptions, Overflow, Start, Subscription, SubscriptionStats,
};
use mainstay::types::{EventKind, Revision, SortOrder, SortTarget};
use rustix::process::Signal;
use tokio::task::JoinHandle;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_cluster, on_own_cluster};
use crate::target::{is_etcd, mainstay_binary, not_in_etcd};

/// Replays what a subscription tells, and panics at a gap or a repeat: the
/// versions of a key that is only ever set count up by one, so nobody needs to
/// know what was written to see that something is missing.
#[derive(Debug, Default)]
struct Replica {
    /// Version and revision of each key.
    keys: BTreeMap<String, (i64, i64)>,
    revision: i64,
    snapshots: u64,
    /// Whether versions may jump, because changes are merged.
    sparse: bool,
}

impl Replica {
    fn take(&mut self, batch: &Batch) {
        assert_eq!(batch.dropped, 0);
        if batch.snapshot.is_some_and(|part| part.first) {
            self.keys.clear();
            self.snapshots += 1;
        }
        for event in &batch.events {
            assert_eq!(event.kind, EventKind::Put);
            let key = String::from_utf8(event.kv.key.to_vec()).unwrap();
            let (version, revision) = (event.kv.version, event.kv.mod_revision.0);
            assert!(revision <= batch.revision.0);
            if batch.snapshot.is_none() {
                assert!(
                    revision > self.revision,
                    "{key} at {revision} repeats what came to {}",
                    self.revision
                );
                let before = self.keys.get(&key).map_or(0, |(version, _)| *version);
                let follows = if self.sparse { version > before } else { version == before + 1 };
                assert!(follows, "{key}: version {version} after {before}, at revision {revision}");
            }
            self.keys.insert(key, (version, revision));
        }
        assert!(batch.revision.0 >= self.revision, "{} after {}", batch.revision, self.revision);
        if batch.snapshot.is_none_or(|part| part.last) {
            self.revision = batch.revision.0;
        }
    }
}

/// A subscription that is read until its replica has seen `until` (0: not yet known).
struct Reader {
    task: JoinHandle<(Replica, SubscriptionStats)>,
    target: tokio::sync::watch::Sender<i64>,
}

impl Reader {
    /// `pause` is how long the reader sleeps after each batch.
    fn start(mut subscription: Subscription, sparse: bool, pause: Duration) -> Reader {
        let (target, mut wanted) = tokio::sync::watch::channel(0);
        let task = tokio::spawn(async move {
            let mut replica = Replica { sparse, ..Replica::default() };
            loop {
                let target = *wanted.borrow_and_update();
                if target > 0 && replica.keys.values().any(|(_, revision)| *revision >= target) {
                    return (replica, subscription.stats());
                }
                tokio::select! {
                    batch = subscription.next() => replica.take(&batch.expect("no end").expect("no error")),
                    _ = wanted.changed() => {}
                }
                tokio::time::sleep(pause).await;
            }
        });
        Reader { task, target }
    }

    async fn finish(self, target: i64) -> (Replica, SubscriptionStats) {
        self.target.send_replace(target);
        let finished = tokio::time::timeout(Duration::from_secs(60), self.task).await;
        finished.expect("every change arrives").expect("no gap and no repeat")
    }
}

/// What there is, as replicas keep it.
async fn state(client: &Client, filter: &Filter, prefix: &str) -> BTreeMap<String, (i64, i64)> {
    let options = GetOptions::prefix(prefix.to_owned()).sort(SortTarget::Key, SortOrder::Ascend);
    let all = client.range(options).await.unwrap().reply.kvs;
    let matching = all.into_iter().filter(|kv| filter.matches_key(&kv.key));
    let text = |key: &[u8]| String::from_utf8(key.to_vec()).unwrap();
    matching.map(|kv| (text(&kv.key), (kv.version, kv.mod_revision.0))).collect()
}

/// Sets keys one after the other until told to stop; failures are left at that.
fn write(client: Client, prefix: String, stop: Arc<AtomicBool>) -> JoinHandle<u64> {
    tokio::spawn(async move {
        let mut written = 0;
        for n in 0u64.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let ending = if n % 3 == 0 { "limit" } else { "name" };
            let key = format!("{prefix}s{}/{ending}", n % 20);
            written += u64::from(client.put(key, n.to_string()).await.is_ok());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        written
    })
}

fn client(c: &Cluster) -> Client {
    Client::connect(c.endpoints()).unwrap()
}

/// Kills, moves the leader and compacts, a few times.
async fn harm(c: &mut Cluster) {
    for round in 0..4 {
        let victim = rand::random_range(0..3);
        c.nodes[victim].kill();
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        // Everything that there is, so that who is behind finds nothing left.
        let client = client(c);
        let now = eventually("a majority compacts", SOON, async || {
            let now = client.range(GetOptions::key("revision?")).await.ok()?.revision;
            client.compact(now, false).await.ok().map(|()| now)
        })
        .await;
        c.start_all();
        c.wait_node_ready(victim).await;
        let leader = c.leader().await;
        let follower = c.member_id((leader + 1) % 3).await;
        let moved = c.client(leader).await.move_leader(follower).await;
        eprintln!(
            "round {round}: killed {victim}, compacted {now}, leader {leader} moved: {}",
            moved.is_ok()
        );
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
}

#[test]
fn every_change_comes_once_while_nodes_die_leaders_move_and_history_goes() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let p = unique("sub-harm");
        let filters = [
            Filter::prefix(p.clone()),
            Filter::prefix(p.clone()) & Filter::suffix("/limit").unwrap(),
            Filter::glob(&format!("{p}s1*/*")).unwrap(),
            Filter::regex(&format!("^{p}s[0-4]/")).unwrap(),
        ];
        // Of each four, the first share a client and so their watches.
        let shared = client(c);
        let mut readers = Vec::new();
        for n in 0..16 {
            let filter = filters[n % filters.len()].clone();
            let start = if n % 8 < 4 { Start::Snapshot } else { Start::Now };
            let client = if n < 8 { shared.clone() } else { client(c) };
            let subscription = client.subscribe(filter.clone()).start(start).open().await.unwrap();
            readers.push((filter, Reader::start(subscription, false, Duration::ZERO)));
        }
        // Falls behind so far that its watch is closed, and its place compacted.
        let slow = client(c).subscribe(filters[0].clone()).start(Start::Snapshot);
        let slow = slow.batches(10, Duration::ZERO).queue(10, Overflow::Block).open().await.unwrap();
        let slow_handle = slow.handle();
        slow_handle.pause();
        readers.push((filters[0].clone(), Reader::start(slow, false, Duration::ZERO)));
        let merging = client(c).subscribe(filters[0].clone()).start(Start::Snapshot);
        let merging = merging.queue(50, Overflow::CoalescePerKey).open().await.unwrap();
        readers.push((filters[0].clone(), Reader::start(merging, true, Duration::from_millis(300))));

        let stop = Arc::new(AtomicBool::new(false));
        let writer = write(client(c), p.clone(), stop.clone());
        // The snapshot goes out and what follows fills the queue.
        slow_handle.resume();
        tokio::time::sleep(Duration::from_millis(300)).await;
        slow_handle.pause();
        harm(c).await;
        slow_handle.resume();
        stop.store(true, Ordering::Relaxed);
        let written = writer.await.unwrap();
        assert!(written > 50, "{written}");
        // One last change that every filter matches.
        let client = client(c);
        let last =
            eventually("a last write", SOON, async || client.put(format!("{p}s1/limit"), "last").await.ok())
                .await;
        let mut resumes = 0;
        let mut of_slow = (Replica::default(), SubscriptionStats::default());
        for (n, (filter, reader)) in readers.into_iter().enumerate() {
            let (replica, stats) = reader.finish(last.revision.0).await;
            let there = state(&client, &filter, &p).await;
            for (key, seen) in &replica.keys {
                assert_eq!(there.get(key), Some(seen), "reader {n}, {key}");
            }
            if replica.snapshots > 0 {
                assert_eq!(replica.keys.len(), there.len(), "reader {n}");
            }
            resumes += stats.resumes;
            if n == 16 {
                of_slow = (replica, stats);
            }
        }
        assert!(resumes > 0, "a killed node had watches");
        let (replica, stats) = of_slow;
        assert!(replica.snapshots >= 2 && stats.snapshots >= 2, "{stats:?}");
        eprintln!("{written} writes, {resumes} resumes; the slow one: {stats:?}");
    });
}

#[test]
fn a_stopped_member_is_noticed_and_left() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let p = unique("sub-stop");
        let leader = c.leader().await;
        let mut subscriptions = Vec::new();
        for _ in 0..30 {
            let filter = Filter::prefix(p.clone());
            let mut subscription = client(c).subscribe(filter).start(Start::Snapshot).open().await.unwrap();
            assert!(subscription.next().await.unwrap().unwrap().snapshot.is_some());
            subscriptions.push(subscription);
        }
        let writer = Client::connect([c.nodes[leader].url()]).unwrap();
        writer.put(format!("{p}before"), "").await.unwrap();
        for subscription in &mut subscriptions {
            assert_eq!(subscription.next().await.unwrap().unwrap().events.len(), 1);
        }
        let stopped = (leader + 1) % 3;
        c.nodes[stopped].signal(Signal::STOP);
        writer.put(format!("{p}k"), "").await.unwrap();
        let since = Instant::now();
        let mut longest = Duration::ZERO;
        let mut resumes = 0;
        for subscription in &mut subscriptions {
            let batch = tokio::time::timeout(Duration::from_secs(30), subscription.next()).await;
            let batch = batch.expect("silence is noticed").unwrap().unwrap();
            assert_eq!((batch.events.len(), &batch.events[0].kv.key[..]), (1, format!("{p}k").as_bytes()));
            longest = longest.max(since.elapsed());
            resumes += subscription.stats().resumes;
        }
        c.nodes[stopped].signal(Signal::CONT);
        eprintln!("30 subscriptions, {resumes} resumes, the last after {longest:?}");
        assert!(resumes > 0, "some watched at the stopped member");
        assert!(longest < Duration::from_secs(20), "{longest:?}");
    });
}

async fn drain(subscription: &mut Subscription) -> Vec<Batch> {
    let mut batches = Vec::new();
    while let Ok(batch) = tokio::time::timeout(Duration::from_secs(2), subscription.next()).await {
        batches.push(batch.unwrap().unwrap());
    }
    batches
}

#[test]
fn a_slow_reader_gets_what_its_policy_says() {
    on_cluster(async |c| {
        let p = unique("sub-slow");
        let client = client(c);
        let open = async |overflow| {
            let builder = client.subscribe(Filter::prefix(p.clone())).queue(16, overflow);
            let subscription = builder.batches(5, Duration::ZERO).open().await.unwrap();
            subscription.handle().pause();
            subscription
        };
        let mut block = open(Overflow::Block).await;
        let mut merge = open(Overflow::CoalescePerKey).await;
        let mut drop = open(Overflow::DropOldest).await;
        let mut last = Revision(0);
        for n in 0..300 {
            last = client.put(format!("{p}k{}", n % 10), n.to_string()).await.unwrap().revision;
        }
        eventually("the policies have dropped and merged", SOON, async || {
            let (merge, drop) = (merge.stats(), drop.stats());
            (merge.received_revision >= last && drop.received_revision >= last).then_some(())
        })
        .await;
        // Longer than a full queue leaves the watch open.
        eventually("the blocked one lets its watch go", SOON, async || {
            (block.stats().resumes > 0).then_some(())
        })
        .await;
        for subscription in [&block, &merge, &drop] {
            let stats = subscription.stats();
            assert!(stats.paused && stats.queued <= 16 && stats.delivered == 0, "{stats:?}");
            assert!(stats.lag > Duration::ZERO, "{stats:?}");
            subscription.handle().resume();
        }
        let count = |batches: &[Batch]| batches.iter().map(|batch| batch.events.len() as u64).sum::<u64>();
        let told = drain(&mut block).await;
        assert_eq!(count(&told), 300);
        let values: Vec<i64> = told
            .iter()
            .flat_map(|batch| &batch.events)
            .map(|event| String::from_utf8_lossy(&event.kv.value).parse().unwrap())
            .collect();
        assert_eq!(values, (0..300).collect::<Vec<i64>>(), "no gap and no repeat");

        let told = drain(&mut merge).await;
        let merged: u64 = told.iter().map(|batch| batch.merged).sum();
        assert_eq!((count(&told), merged, merge.stats().merged), (10, 290, 290));
        let newest: Vec<String> = told
            .iter()
            .flat_map(|batch| &batch.events)
            .map(|event| String::from_utf8_lossy(&event.kv.value).into_owned())
            .collect();
        assert_eq!(newest, (290..300).map(|n| n.to_string()).collect::<Vec<_>>());

        let told = drain(&mut drop).await;
        assert_eq!((told[0].dropped, count(&told)), (284, 16), "told with the first batch");
        assert!(told[1..].iter().all(|batch| batch.dropped == 0));
        assert_eq!(told.last().unwrap().events.last().unwrap().kv.mod_revision, last);
        assert_eq!(drop.stats().dropped, 284);
    });
}

#[test]
fn a_replay_begins_at_a_revision_or_a_time() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let p = unique("sub-replay");
        let client = client(c);
        let mut revisions = Vec::new();
        let mut times = Vec::new();
        for n in 0..10 {
            // So that each change has a millisecond of its own.
            tokio::time::sleep(Duration::from_millis(5)).await;
            times.push(SystemTime::now());
            tokio::time::sleep(Duration::from_millis(5)).await;
            revisions.push(client.put(format!("{p}k"), n.to_string()).await.unwrap().revision);
        }
        let replay = async |start: Start| {
            let subscription = client.subscribe(Filter::prefix(p.clone())).start(start).open().await;
            let mut subscription = subscription?;
            let mut replayed = Vec::new();
            let mut snapshot = false;
            while replayed.last() != revisions.last() {
                let batch = subscription.next().await.unwrap().unwrap();
                snapshot |= batch.snapshot.is_some();
                replayed.extend(batch.events.iter().map(|event| event.kv.mod_revision));
            }
            Ok::<_, ClientError>((replayed, snapshot))
        };
        assert_eq!(replay(Start::Revision(Revision(1))).await.unwrap(), (revisions.clone(), false));
        assert_eq!(replay(Start::Revision(revisions[4])).await.unwrap(), (revisions[4..].to_vec(), false));
        if is_etcd() {
            let refused = replay(Start::Time(times[3])).await;
            assert!(matches!(refused, Err(ClientError::Unsupported { .. })), "{refused:?}");
        } else {
            assert_eq!(replay(Start::Time(times[3])).await.unwrap(), (revisions[3..].to_vec(), false));
            let (at, complete) =
                client.revision_at(SystemTime::now() + Duration::from_secs(60)).await.unwrap();
            assert_eq!((at, complete), (revisions[9].next(), true));
        }
        client.compact(revisions[6], true).await.unwrap();
        let newest = vec![revisions[9]];
        assert_eq!(replay(Start::Revision(revisions[2])).await.unwrap(), (newest.clone(), true));
        assert_eq!(replay(Start::Revision(revisions[7])).await.unwrap(), (revisions[7..].to_vec(), false));
        if !is_etcd() {
            assert_eq!(replay(Start::Time(times[2])).await.unwrap(), (newest, true));
            assert_eq!(replay(Start::Time(times[8])).await.unwrap(), (revisions[8..].to_vec(), false));
        }
    });
}

#[test]
fn a_pause_a_callback_and_kinds_of_change() {
    on_cluster(async |c| {
        let p = unique("sub-pause");
        let client = client(c);
        let (told, mut heard) = tokio::sync::mpsc::channel(100);
        let filter = Filter::prefix(p.clone()) & Filter::deletes();
        let delivery = client
            .subscribe(filter)
            .prev_kv()
            .deliver(move |batch| {
                let told = told.clone();
                async move { told.send(batch).await.unwrap() }
            })
            .await
            .unwrap();
        client.put(format!("{p}a"), "1").await.unwrap();
        client.delete(format!("{p}a")).await.unwrap();
        let batch = heard.recv().await.unwrap();
        assert_eq!((batch.events.len(), batch.events[0].kind), (1, EventKind::Delete));
        assert_eq!(batch.events[0].prev.as_ref().unwrap().value, "1");
        delivery.handle().pause();
        client.put(format!("{p}b"), "1").await.unwrap();
        client.delete(format!("{p}b")).await.unwrap();
        let early = tokio::time::timeout(Duration::from_secs(1), heard.recv()).await;
        assert!(early.is_err(), "{early:?}");
        delivery.handle().resume();
        let batch = heard.recv().await.unwrap();
        assert_eq!(&batch.events[0].kv.key[..], format!("{p}b").as_bytes());
        let stats = delivery.handle().stats();
        assert_eq!((stats.delivered, stats.filtered_out, stats.queued), (2, 0, 0), "puts are not even sent");
        delivery.handle().cancel();
        delivery.ended().await.unwrap();
    });
}

#[test]
fn the_tool_watches_with_filters() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_cluster(async |c| {
        let p = unique("sub-tool");
        let ready = c.root.join("watching");
        let endpoints = c.endpoints().join(",");
        let watch = |args: &[&str]| {
            let mut command = tokio::process::Command::new(mainstay_binary());
            command.args(["--endpoints", &endpoints, "watch"]).args(args);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
            command
        };
        let regex = format!("regex:^{p}[a-c]/x$");
        let ready_path = ready.to_str().unwrap();
        let filters = ["--filter", &regex, "--filter", "not:suffix:b/x", "--filter", "put"];
        let mut args = vec!["--prefix", "", "--max-events", "2", "-o", "json", "--ready-file", ready_path];
        args.extend(filters);
        let child = watch(&args).spawn().unwrap();
        eventually("the watch is in place", SOON, async || ready.exists().then_some(())).await;
        let client = client(c);
        for key in ["a/x", "b/x", "a/y", "d/x", "c/x"] {
            client.put(format!("{p}{key}"), "v").await.unwrap();
            client.delete(format!("{p}{key}")).await.unwrap();
        }
        let output = tokio::time::timeout(SOON, child.wait_with_output()).await.unwrap().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{printed}");
        assert_eq!(printed.lines().count(), 2, "{printed}");
        assert!(printed.contains(&format!("{p}a/x")) && printed.contains(&format!("{p}c/x")), "{printed}");
        let _ = std::fs::remove_file(&ready);
        for (filter, says) in [
            ("regex:a(b", "filter regex `a(b`"),
            ("suffix:", "the pattern is empty"),
            ("wild:x", "write put, delete"),
            ("prefix:elsewhere/", "no change of these keys can match"),
        ] {
            let refused = watch(&["--prefix", &p, "--filter", filter]).output().await.unwrap();
            let error = String::from_utf8(refused.stderr).unwrap();
            assert_eq!(refused.status.code(), Some(2), "{error}");
            assert!(error.contains(says), "{filter}: {error}");
        }
    });
}
