//! The SDK against a real etcd: everything that etcd has works, and what it has
//! not is refused in words.

use std::time::{Duration, SystemTime};

use futures_util::{StreamExt, TryStreamExt};
use mainstay::client::{
    CacheOptions, Client, ClientError, Consistency, Filter, GetOptions, Level, MirrorUpdate, PutOptions,
    Start, TxnBuilder, WatchOptions, compare,
};
use mainstay::types::{EventKind, KeyRange, LeaseId, Revision, SortOrder, SortTarget, TxnOpReply};
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_own_cluster};
use crate::target::{Target, tool};

/// Runs a test on three real etcds.
fn on_etcd(test: impl AsyncFnOnce(&mut Cluster)) {
    let Some(path) = tool("etcd") else { return };
    let target = Target::etcd(&path.to_string_lossy());
    on_own_cluster(Spec { target, ..Spec::nodes(3) }, test);
}

fn sdk(c: &Cluster) -> Client {
    Client::connect(c.endpoints()).unwrap()
}

#[test]
fn keys_and_transactions_work_with_etcd() {
    on_etcd(async |c| {
        let client = sdk(c);
        let first = client.put("a/1", "x").await.unwrap().revision;
        let options = PutOptions { prev_kv: true, ..PutOptions::default() };
        let second = client.put_with("a/1", "y", options).await.unwrap();
        assert_eq!(second.prev.unwrap().value, "x");
        assert_eq!(second.revision, first.next());
        let kv = client.get("a/1").await.unwrap().unwrap();
        assert_eq!((&kv.value[..], kv.version, kv.create_revision), (&b"y"[..], 2, first));
        assert!(client.get("a/none").await.unwrap().is_none());
        let old = client.range(GetOptions::key("a/1").revision(first)).await.unwrap();
        assert_eq!(old.reply.kvs[0].value, "x");

        for n in 0..25 {
            client.put(format!("p/{n:02}"), n.to_string()).await.unwrap();
        }
        let sorted = GetOptions::prefix("p/").sort(SortTarget::Key, SortOrder::Descend).limit(2).keys_only();
        let sorted = client.range(sorted.serializable()).await.unwrap().reply;
        assert_eq!((&sorted.kvs[0].key[..], sorted.count, sorted.more), (&b"p/24"[..], 25, true));
        let pages: Vec<_> = client.pages(KeyRange::prefix("p/".into()), 10).try_collect().await.unwrap();
        assert_eq!(pages.iter().map(|page| page.reply.kvs.len()).collect::<Vec<_>>(), [10, 10, 5]);

        let txn =
            TxnBuilder::new().when(compare::value_is("a/1", "y")).then_put("a/2", "z").or_else_get("a/1");
        assert!(client.txn(txn.build()).await.unwrap().reply.succeeded);
        let txn = TxnBuilder::new().when(compare::missing("a/2")).then_put("a/2", "w").or_else_get("a/2");
        let lost = client.txn(txn.build()).await.unwrap().reply;
        assert!(!lost.succeeded);
        assert!(matches!(&lost.responses[0], TxnOpReply::Range(reply) if reply.kvs[0].value == "z"));
        let gone = client.delete_range(KeyRange::prefix("p/".into()), true).await.unwrap();
        assert_eq!((gone.deleted, gone.prev.len()), (25, 25));
        assert_eq!(client.delete("p/00").await.unwrap().deleted, 0);

        match client.put("", "x").await.unwrap_err() {
            ClientError::Refused { code, message } => {
                assert_eq!((code, &message[..]), (Code::InvalidArgument, "etcdserver: key is not provided"));
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn watches_and_mirrors_work_with_etcd() {
    on_etcd(async |c| {
        let client = sdk(c);
        let prefix = KeyRange::prefix("w/".into());
        let start = client.put("w/0", "0").await.unwrap().revision;
        let mut watch = client
            .watch(WatchOptions { prev_kv: true, start, ..WatchOptions::new(prefix.clone()) })
            .await
            .unwrap();
        let mut mirror = client.mirror(prefix, Revision(0));
        let MirrorUpdate::Snapshot { kvs, .. } = mirror.next().await.unwrap() else { panic!("no snapshot") };
        assert_eq!(kvs.len(), 1);

        // Each node dies once; nothing is lost and nothing comes twice.
        let (mut written, mut watched, mut mirrored) = (1, Vec::new(), Vec::new());
        for i in 0..3 {
            for _ in 0..10 {
                let put = async || client.put("w/0", written.to_string()).await.ok();
                eventually("a write", SOON, put).await;
                written += 1;
            }
            c.nodes[i].kill();
            let alive: Vec<String> = (0..3).filter(|n| *n != i).map(|n| c.nodes[n].url()).collect();
            let through = Client::connect(alive).unwrap();
            let put = async || through.put("w/1", i.to_string()).await.ok();
            let revision = eventually("a write", SOON, put).await.revision;
            let watching = async {
                while watch.resume_revision() <= revision {
                    watched.extend(watch.next().await.unwrap().events);
                }
            };
            tokio::time::timeout(SOON, watching).await.expect("the watch goes on");
            let mirroring = async {
                while mirror.revision() < revision {
                    match mirror.next().await.unwrap() {
                        MirrorUpdate::Changes(batch) => mirrored.extend(batch.events),
                        MirrorUpdate::Snapshot { .. } => panic!("nothing was compacted"),
                    }
                }
            };
            tokio::time::timeout(SOON, mirroring).await.expect("the mirror goes on");
            c.nodes[i].start();
            c.wait_node_ready(i).await;
        }
        assert_eq!(watched[0].kv.mod_revision, start);
        assert!(watched.windows(2).all(|pair| pair[0].kv.mod_revision < pair[1].kv.mod_revision));
        assert!(watched[1..].iter().all(|event| event.kind == EventKind::Put));
        assert_eq!(watched[2].prev.as_ref().unwrap().value, watched[1].kv.value);
        let (a, b): (Vec<_>, Vec<_>) = (
            watched[1..].iter().map(|event| event.kv.mod_revision).collect(),
            mirrored.iter().map(|event| event.kv.mod_revision).collect(),
        );
        assert_eq!(a, b);

        let now = client.put("w/2", "x").await.unwrap().revision;
        client.compact(now, true).await.unwrap();
        let late = WatchOptions { start, ..WatchOptions::new(KeyRange::Single("w/0".into())) };
        let gone = match client.watch(late).await {
            Ok(mut watch) => watch.next().await.map(|_| ()),
            Err(error) => Err(error),
        };
        assert!(
            matches!(gone, Err(ClientError::Compacted { compact_revision }) if compact_revision == now.0)
        );
    });
}

#[test]
fn leases_locks_and_elections_work_with_etcd() {
    on_etcd(async |c| {
        let client = sdk(c);
        let lease = client.lease_grant(30, LeaseId::NONE).await.unwrap();
        let options = PutOptions { lease: lease.id, ..PutOptions::default() };
        client.put_with("l/1", "x", options).await.unwrap();
        let mut keeper = client.lease_keeper(lease.id);
        assert_eq!(keeper.keep().await.unwrap(), 30);
        assert_eq!(keeper.keep().await.unwrap(), 30);
        let left = client.lease_ttl(lease.id, true).await.unwrap().unwrap();
        assert_eq!((left.granted_ttl_s, left.keys), (30, vec!["l/1".into()]));
        assert!(client.lease_list().await.unwrap().contains(&lease.id));

        let key = client.lock("lock", lease.id).await.unwrap();
        let second = client.lease_grant(30, LeaseId::NONE).await.unwrap();
        let waiting = tokio::spawn({
            let client = client.clone();
            async move { client.lock("lock", second.id).await }
        });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!waiting.is_finished(), "the lock is held");
        client.unlock(key).await.unwrap();
        let key = tokio::time::timeout(SOON, waiting).await.unwrap().unwrap().unwrap();
        client.unlock(key).await.unwrap();

        let leader = client.campaign("e", lease.id, "one").await.unwrap();
        assert_eq!(client.leader("e").await.unwrap().value, "one");
        let mut seen = client.observe("e".into()).await.unwrap().boxed();
        assert_eq!(seen.next().await.unwrap().unwrap().value, "one");
        client.proclaim(leader.clone(), "two").await.unwrap();
        assert_eq!(seen.next().await.unwrap().unwrap().value, "two");
        client.resign(leader).await.unwrap();
        assert_eq!(client.leader("e").await.unwrap_err().to_string(), "election: no leader");

        client.lease_revoke(lease.id).await.unwrap();
        assert!(client.get("l/1").await.unwrap().is_none());
        assert!(matches!(keeper.keep().await, Err(ClientError::LeaseGone { .. })));
        assert!(client.lease_ttl(lease.id, false).await.unwrap().is_none());
    });
}

#[test]
fn members_and_maintenance_work_with_etcd() {
    on_etcd(async |c| {
        let client = sdk(c);
        let members = client.member_list().await.unwrap();
        assert_eq!(members.members.len(), 3);
        let status = client.status().await.unwrap();
        assert!(members.members.iter().any(|member| member.id == status.leader));
        let revision = client.put("m", "1").await.unwrap().revision;
        let one = Client::connect([c.nodes[0].url()]).unwrap();
        // Now this member has it, too.
        one.get("m").await.unwrap().expect("it was put");
        assert_eq!(
            one.hash_kv(revision).await.unwrap().header.unwrap().cluster_id,
            members.header.unwrap().cluster_id
        );
        one.defragment().await.unwrap();
        assert!(client.alarm_list().await.unwrap().is_empty());
        let pieces: Vec<_> = one.snapshot().await.unwrap().try_collect().await.unwrap();
        assert_eq!(pieces.last().unwrap().remaining_bytes, 0);
    });
}

#[test]
fn what_etcd_does_not_have_is_refused_in_words() {
    on_etcd(async |c| {
        let client = sdk(c);
        // No request ids: a session cannot be opened, and an id is not looked at.
        let refused = client.open_session(60).await.map(|_| ()).unwrap_err();
        assert!(!refused.may_retry() && !refused.may_have_happened(), "{refused:?}");
        let client = client.with_actor("somebody").unwrap();
        client.put("k", "v").await.unwrap();
    });
}

#[test]
fn a_binding_follows_etcd() {
    #[derive(Debug, serde::Deserialize)]
    struct Pool {
        max: u32,
    }
    on_etcd(async |c| {
        let client = sdk(c);
        client.put("b/max", "1").await.unwrap();
        let mut pool = client.bind::<Pool>("b").await.unwrap();
        assert_eq!(pool.load().max, 1);
        client.put("b/max", "x").await.unwrap();
        pool.changed().await.unwrap_err();
        c.nodes[0].kill();
        let put = async || client.put("b/max", "2").await.ok();
        let revision = eventually("a write", SOON, put).await.revision;
        let known = tokio::time::timeout(SOON, pool.wait_for(revision)).await.unwrap();
        assert_eq!(known.unwrap().max, 2);
        // Keys that are none of the binding's move its revision, too.
        let revision = client.put("elsewhere", "x").await.unwrap().revision;
        tokio::time::timeout(SOON, pool.wait_for(revision)).await.unwrap().unwrap();
    });
}

#[test]
fn a_client_with_everything_on_works_with_etcd() {
    on_etcd(async |c| {
        // One address is enough: the others are found, the leader too.
        let cache = CacheOptions {
            prefixes: vec!["all/".into()],
            dir: Some(c.root.join("cache")),
            ..CacheOptions::default()
        };
        let client = Client::builder([c.nodes[0].url()]).cache(cache).connect().await.unwrap();
        let found = async || {
            let endpoints = client.endpoints();
            let members = endpoints.iter().filter(|one| !one.is_spare && one.member_id.is_some()).count();
            (members == 3 && endpoints.iter().any(|one| one.is_leader)).then_some(())
        };
        eventually("the members are found", SOON, found).await;

        // etcd knows no request ids: a write goes without one.
        let filter = Filter::prefix("all/") & Filter::suffix("x").unwrap();
        let mut subscription = client.subscribe(filter).start(Start::Snapshot).open().await.unwrap();
        let revision = client.put("all/x", "1").await.unwrap().revision;
        client.put("all/y", "1").await.unwrap();
        let told = async {
            loop {
                let batch = subscription.next().await.expect("it goes on").unwrap();
                if let Some(event) = batch.events.first() {
                    return event.clone();
                }
            }
        };
        let event = tokio::time::timeout(SOON, told).await.expect("the change");
        assert_eq!((&event.kv.key[..], event.kv.mod_revision), (&b"all/x"[..], revision));

        // The cache proves what it has, and what it has not.
        let cache = client.cache().unwrap();
        tokio::time::timeout(SOON, cache.wait_for(|state| state.is_live())).await.unwrap().unwrap();
        let bound = Consistency::Bounded(Duration::from_secs(5));
        let cached = async || {
            let answer = cache.get("all/x", bound).await.unwrap();
            // Within the bound it may be as it was before the put.
            if answer.revision < revision {
                return None;
            }
            assert_eq!(answer.kv.unwrap().value, "1");
            (answer.level != Level::Server).then_some(())
        };
        eventually("an answer of the cache", SOON, cached).await;
        assert!(cache.get("all/none", bound).await.unwrap().kv.is_none());
        assert_eq!(cache.get("all/x", Consistency::Strong).await.unwrap().level, Level::Server);

        // Time replay is Mainstay's own, and refused in words.
        let yesterday = SystemTime::now() - Duration::from_secs(86_400);
        let refused = client.subscribe(Filter::everything()).start(Start::Time(yesterday)).open().await;
        assert!(matches!(refused, Err(ClientError::Unsupported { .. })));

        // A node goes: reads, writes, bindings and the subscription go on.
        let values = client.bind::<std::collections::HashMap<String, u32>>("all").await.unwrap();
        c.nodes[0].kill();
        let put = async || client.put("all/x", "2").await.ok();
        let revision = eventually("a write", SOON, put).await.revision;
        assert_eq!(cache.get("all/x", Consistency::Strong).await.unwrap().kv.unwrap().value, "2");
        let known = tokio::time::timeout(SOON, values.wait_for(revision)).await.unwrap().unwrap();
        assert_eq!(known["x"], 2);
        let told = async {
            loop {
                let batch = subscription.next().await.expect("it goes on").unwrap();
                if batch.events.iter().any(|event| event.kv.value == "2") {
                    return;
                }
            }
        };
        tokio::time::timeout(SOON, told).await.expect("the change");
    });
}
