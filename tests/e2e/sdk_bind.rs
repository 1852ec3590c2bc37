//! Typed bindings on real nodes: hot reload, whole transactions, broken changes,
//! compaction while away, nodes that die.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mainstay::client::{
    BindError, Binding, CacheOptions, CacheState, Client, ClientError, Format, TxnBuilder,
};
use serde::Deserialize;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_cluster, on_own_cluster};

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
struct Settings {
    port: u16,
    #[serde(default)]
    debug: bool,
    note: Option<String>,
    #[serde(default)]
    db: Db,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
struct Db {
    host: String,
    pool: u32,
}

fn sdk(c: &Cluster) -> Client {
    Client::connect(c.endpoints()).unwrap()
}

/// Waits for the next change, which must be good.
async fn changed<T>(binding: &mut Binding<T>) -> Arc<T> {
    tokio::time::timeout(SOON, binding.changed()).await.expect("a change").expect("a good one")
}

/// Waits for the next change, which must be refused.
async fn refused<T: std::fmt::Debug>(binding: &mut Binding<T>) -> BindError {
    tokio::time::timeout(SOON, binding.changed()).await.expect("a change").expect_err("a bad one")
}

#[test]
fn a_transaction_is_seen_whole_by_a_binding() {
    on_cluster(async |c| {
        let (client, p) = (sdk(c), unique("bind"));
        let port = format!("{p}port");
        let host = format!("{p}db/host");
        let pool = format!("{p}db/pool");
        let write = async |n: u32| {
            let txn = TxnBuilder::new()
                .then_put(port.clone(), n.to_string())
                .then_put(host.clone(), format!("h{n}"));
            client.txn(txn.then_put(pool.clone(), n.to_string()).build()).await.unwrap().revision
        };
        write(1).await;
        let binding = client.bind::<Settings>(&p).await.unwrap();
        assert_eq!(binding.load().db, Db { host: "h1".into(), pool: 1 });

        let over = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (binding, over) = (binding.clone(), over.clone());
            move || {
                let mut seen = HashMap::new();
                while !over.load(Ordering::Relaxed) {
                    let (settings, revision) = binding.load_with_revision();
                    assert_eq!(u32::from(settings.port), settings.db.pool, "half of a transaction");
                    assert_eq!(settings.db.host, format!("h{}", settings.port));
                    assert!(seen.insert(settings.port, revision).is_none_or(|before| before <= revision));
                    std::thread::yield_now();
                }
                seen.len()
            }
        });
        let mut last = write(2).await;
        for n in 3..=300 {
            last = write(n).await;
        }
        let settings = tokio::time::timeout(SOON, binding.wait_for(last)).await.unwrap().unwrap();
        assert_eq!(settings.port, 300);
        assert!(binding.revision() >= last);
        over.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 5, "the reader saw hardly any value");
    });
}

#[test]
fn a_broken_change_keeps_the_last_good_value_and_says_why() {
    on_cluster(async |c| {
        let (client, p) = (sdk(c), unique("bind"));
        let port = format!("{p}port");
        client.put(port.clone(), "8080").await.unwrap();
        client.put(format!("{p}debug"), "true").await.unwrap();
        client.put(format!("{p}note"), "\"hi\"").await.unwrap();
        client.put(format!("{p}db.toml"), "host = 'a'\npool = 3\n").await.unwrap();
        let check = |settings: &Settings| match settings.port {
            0..1024 => Err(format!("port {} is not ours to take", settings.port)),
            _ => Ok(()),
        };
        let mut binding = client.bind::<Settings>(&p).check(check).await.unwrap();
        let db = Db { host: "a".into(), pool: 3 };
        let good = Settings { port: 8080, debug: true, note: Some("hi".into()), db };
        assert_eq!(*binding.load(), good);

        // A number that is none, a document cut short, a value that the check refuses, no text.
        for (key, value, words) in [
            ("port", &b"eighty"[..], "`eighty` is no u16"),
            ("port", b"80", "port 80 is not ours to take"),
            ("port", b"80\xff", "is not UTF-8: byte 2"),
            ("db.toml", b"host = 'a'\npool = \n", "no TOML at line 2"),
            ("db/host", b"b", "has no place beside"),
        ] {
            let key = format!("{p}{key}");
            let before = client.get(key.clone()).await.unwrap();
            let revision = client.put(key.clone(), value).await.unwrap().revision;
            let error = refused(&mut binding).await;
            let text = error.to_string();
            assert!(text.contains(words), "{text}");
            if !matches!(error, BindError::Refused { .. }) {
                assert!(text.contains(&key), "{text} does not name {key}");
            }
            let status = binding.status();
            assert!(status.known >= revision && status.loaded < revision, "{status:?}");
            assert_eq!(*binding.load(), good);

            // Mending it is told, too.
            match before {
                Some(kv) => client.put(key.clone(), kv.value).await.unwrap().revision,
                None => client.delete(key.clone()).await.unwrap().revision,
            };
            assert_eq!(*changed(&mut binding).await, good);
            assert!(binding.status().problem.is_none());
        }

        // An optional key goes, and a wanted one.
        client.delete(format!("{p}note")).await.unwrap();
        assert_eq!(changed(&mut binding).await.note, None);
        client.delete(port.clone()).await.unwrap();
        assert!(refused(&mut binding).await.to_string().contains("missing field `port`"));
        assert_eq!(binding.load().port, 8080);
    });
}

#[test]
fn every_format_is_followed() {
    on_cluster(async |c| {
        let (client, p) = (sdk(c), unique("bind"));
        let whole = [
            (Format::Toml, "x.toml", "port = 1\n[db]\nhost = 'h'\npool = 2\n", "port = 2\n"),
            (
                Format::Json,
                "x.json",
                "{\"port\": 1, \"db\": {\"host\": \"h\", \"pool\": 2}}",
                "{\"port\": 2}",
            ),
            (Format::Yaml, "x.yaml", "port: 1\ndb:\n  host: h\n  pool: 2\n", "port: 2\n"),
        ];
        for (format, name, first, second) in whole {
            let key = format!("{p}{name}");
            client.put(key.clone(), first).await.unwrap();
            let mut by_extension = client.bind_key::<Settings>(&key).await.unwrap();
            let mut fixed = client.bind_key::<Settings>(&key).format(format).await.unwrap();
            let db = Db { host: "h".into(), pool: 2 };
            assert_eq!(*fixed.load(), Settings { port: 1, db, ..Settings::default() }, "{name}");
            assert_eq!(by_extension.load(), fixed.load());
            client.put(key.clone(), second).await.unwrap();
            assert_eq!(changed(&mut fixed).await.port, 2);
            assert_eq!(changed(&mut by_extension).await.port, 2);
            client.delete(key.clone()).await.unwrap();
        }
        client.put(format!("{p}a"), "[1]").await.unwrap();
        let plain = client.bind::<HashMap<String, String>>(&p).format(Format::Plain).await.unwrap();
        assert_eq!(plain.load()["a"], "[1]");
        let auto = client.bind::<HashMap<String, Vec<u8>>>(&p).await.unwrap();
        assert_eq!(auto.load()["a"], [1]);
    });
}

#[test]
fn what_is_not_there_is_refused_or_has_a_default() {
    on_cluster(async |c| {
        let (client, p) = (sdk(c), unique("bind"));
        let error = client.bind::<Settings>(&p).await.unwrap_err();
        assert!(matches!(error, BindError::Absent { .. }), "{error}");
        let mut binding = client.bind::<Settings>(&p).or_default().await.unwrap();
        assert_eq!(*binding.load(), Settings::default());
        client.put(format!("{p}port"), "7").await.unwrap();
        assert_eq!(changed(&mut binding).await.port, 7);
        client.delete(format!("{p}port")).await.unwrap();
        assert_eq!(changed(&mut binding).await.port, 0);
        // A neighbour whose name begins alike is somebody else's.
        client.put(format!("{}2/port", p.trim_end_matches('/')), "9").await.unwrap();
        let error = client.bind::<Settings>(p.trim_end_matches('/')).await.unwrap_err();
        assert!(matches!(error, BindError::Absent { .. }), "{error}");

        let nobody = Client::connect(["http://127.0.0.1:1"]).unwrap();
        let limit = Duration::from_millis(300);
        match nobody.bind::<Settings>(&p).start_limit(limit).await {
            Err(BindError::Read { source, .. }) => assert!(matches!(*source, ClientError::Unknown { .. })),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_binding_catches_up_after_compaction_and_after_a_node_is_lost() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let p = unique("bind");
        let (port, note) = (format!("{p}port"), format!("{p}note"));
        let away = c.follower().await;
        let others: Vec<String> = (0..3).filter(|i| *i != away).map(|i| c.nodes[i].url()).collect();
        let writer = Client::connect(others).unwrap();
        writer.put(port.clone(), "1").await.unwrap();
        writer.put(note.clone(), "there").await.unwrap();

        // One sees only the node that goes; the other has all of them.
        let lonely = Client::connect([c.nodes[away].url()]).unwrap();
        let mut lonely = lonely.bind::<Settings>(&p).await.unwrap();
        let mut wide = sdk(c).bind::<Settings>(&p).await.unwrap();
        c.nodes[away].kill();
        writer.put(port.clone(), "2").await.unwrap();
        assert_eq!(changed(&mut wide).await.port, 2);
        writer.delete(note.clone()).await.unwrap();
        assert_eq!(changed(&mut wide).await.note, None);
        for n in 3..50 {
            writer.put(port.clone(), n.to_string()).await.unwrap();
        }
        let last = writer.put(port.clone(), "50").await.unwrap().revision;
        writer.compact(last, true).await.unwrap();
        assert_eq!(*lonely.load(), Settings { port: 1, note: Some("there".into()), ..Settings::default() });

        c.nodes[away].start();
        c.wait_node_ready(away).await;
        // Usually at once; a node that is still catching up may tell steps in between.
        let mut before = 1;
        while before < 50 {
            let settings = changed(&mut lonely).await;
            assert!(settings.port >= before, "{} after {before}", settings.port);
            assert!(settings.note.is_none() || settings.port <= 2, "{settings:?}");
            before = settings.port;
        }
        assert_eq!(tokio::time::timeout(SOON, lonely.wait_for(last)).await.unwrap().unwrap().port, 50);

        // Whoever it follows may go, also the leader.
        for round in 0..3_u32 {
            let i = (c.leader().await + 1) % 3;
            c.nodes[i].kill();
            let leader = c.leader().await;
            let through = Client::connect([c.nodes[leader].url()]).unwrap();
            let put = async || through.put(port.clone(), (100 + round).to_string()).await.ok();
            let written = eventually("a write", SOON, put).await.revision;
            let value = tokio::time::timeout(SOON, wide.wait_for(written)).await.unwrap().unwrap();
            assert_eq!(u32::from(value.port), 100 + round);
            c.nodes[i].start();
            c.wait_node_ready(i).await;
        }
    });
}

#[test]
fn a_service_starts_with_its_last_settings_while_the_cluster_is_down() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let p = unique("bind");
        let writer = sdk(c);
        writer.put(format!("{p}port"), "1").await.unwrap();
        let last = writer.put(format!("{p}db.toml"), "host = 'a'\npool = 2\n").await.unwrap().revision;
        let cache = CacheOptions {
            prefixes: vec![p.clone().into()],
            dir: Some(c.root.join("cache")),
            ..CacheOptions::default()
        };
        let endpoints = c.endpoints();
        let service =
            async || Client::builder(endpoints.clone()).cache(cache.clone()).connect().await.unwrap();
        let client = service().await;
        let settings = client.bind::<Settings>(&p).await.unwrap();
        assert!(!settings.status().is_stale);
        let held = |state: &CacheState| state.is_live() && state.scopes[0].revision >= last;
        tokio::time::timeout(SOON, client.cache().unwrap().wait_for(held)).await.unwrap().unwrap();
        client.cache().unwrap().close().await;
        drop((client, settings));

        c.nodes[0].kill();
        let client = service().await;
        let mut settings = client.bind::<Settings>(&p).await.unwrap();
        assert_eq!(settings.load().db, Db { host: "a".into(), pool: 2 });
        assert!(settings.status().is_stale);

        c.nodes[0].start();
        c.wait_node_ready(0).await;
        let revision = writer.put(format!("{p}port"), "2").await.unwrap().revision;
        let port = tokio::time::timeout(SOON, settings.wait_for(revision)).await.unwrap().unwrap().port;
        assert_eq!((port, settings.status().is_stale), (2, false));
        assert_eq!(changed(&mut settings).await.port, 2);
    });
}
