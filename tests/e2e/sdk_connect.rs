//! Bringing a client up: every way in which the endpoints, the cluster or the
//! cache directory can be wrong, and starting while the whole cluster is down.

use std::time::{Duration, Instant};

use mainstay::client::{
    CacheError, CacheOptions, Client, ClientError, Consistency, Level, OnTrouble, PolicyOptions,
    RoutingOptions,
};

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_cluster, on_own_cluster};
use crate::process::free_port;
use crate::target::mainstay_binary;

const EVENTUAL: Consistency = Consistency::Eventual;

fn cached(dir: &std::path::Path, prefix: &str) -> CacheOptions {
    CacheOptions {
        dir: Some(dir.to_owned()),
        prefixes: vec![prefix.to_owned().into()],
        ..CacheOptions::default()
    }
}

fn connect_error(result: Result<Client, ClientError>) -> ClientError {
    result.map(|_| ()).expect_err("it must not come up")
}

/// Waits until everything that is watched has been read and is current.
async fn live(client: &Client) {
    let cache = client.cache().expect("it was built with one");
    let state = tokio::time::timeout(SOON, cache.wait_for(|state| state.is_live())).await;
    state.expect("it becomes live").expect("it is open");
}

#[tokio::test]
async fn endpoints_that_cannot_be_are_named() {
    let none = Client::builder(Vec::<String>::new()).connect().await;
    assert!(matches!(connect_error(none), ClientError::NoEndpoints));
    for (address, part) in [("https://a:1", "`https`"), ("a b", "a b"), ("", "not an address")] {
        let error = connect_error(Client::builder([address]).connect().await);
        assert!(matches!(error, ClientError::BadAddress(_)), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    }
    let policy = PolicyOptions { attempts_max: 0, ..PolicyOptions::default() };
    let error = connect_error(Client::builder(["a:1"]).policy(policy).connect().await);
    assert!(error.to_string().contains("policy.attempts_max"), "{error}");
    let routing = RoutingOptions { health_interval: Some(Duration::ZERO), ..RoutingOptions::default() };
    let error = connect_error(Client::builder(["a:1"]).routing(routing).connect().await);
    assert!(error.to_string().contains("health_interval"), "{error}");
    let cache = CacheOptions { l1_bytes: 1, ..CacheOptions::default() };
    let error = connect_error(Client::builder(["a:1"]).cache(cache).connect().await);
    assert!(error.to_string().contains("l1_bytes"), "{error}");
    let error = connect_error(Client::builder(["a:1"]).actor("a\nb").connect().await);
    assert!(matches!(error, ClientError::BadMetadata { .. }), "{error:?}");
}

#[tokio::test]
async fn nobody_there_is_said_with_every_address_and_soon() {
    let addresses: Vec<String> = (0..3).map(|_| format!("127.0.0.1:{}", free_port())).collect();
    let began = Instant::now();
    let error = connect_error(Client::builder(addresses.clone()).connect().await);
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    for address in &addresses {
        assert!(error.to_string().contains(address), "{error} does not name {address}");
    }
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn one_that_accepts_and_never_answers_ends_in_time() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let began = Instant::now();
    let limit = Duration::from_millis(1500);
    let error = connect_error(Client::builder([address]).connect_timeout(limit).connect().await);
    assert!(began.elapsed() < 2 * limit, "{:?}", began.elapsed());
    assert!(error.may_retry() && !error.may_have_happened(), "{error:?}");
}

#[test]
fn a_silent_endpoint_is_left_for_one_that_answers() {
    on_cluster(async |c| {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut endpoints = c.endpoints();
        endpoints.insert(0, silent.local_addr().unwrap().to_string());
        let client = Client::builder(endpoints).connect().await.unwrap();
        let key = unique("silent");
        for n in 0..20 {
            client.put(key.clone(), n.to_string()).await.unwrap();
        }
        assert_eq!(client.get(key).await.unwrap().unwrap().version, 20);
    });
}

#[test]
fn another_cluster_behind_an_address_is_refused() {
    on_own_cluster(Spec::nodes(1), async |ours| {
        on_second_cluster(async |theirs| {
            let id = Client::builder(ours.endpoints()).connect().await.unwrap().cluster_id().unwrap();
            let wrong = Client::builder(theirs.endpoints()).cluster_id(id).connect().await;
            match connect_error(wrong) {
                ClientError::WrongCluster { expected, actual, .. } => assert!(expected == id && actual != id),
                other => panic!("{other:?}"),
            }
            // One of them among the right ones is not used.
            let both = ours.endpoints().into_iter().chain(theirs.endpoints());
            let client = Client::builder(both).cluster_id(id).connect().await.unwrap();
            for n in 0..30 {
                client.put("whose", n.to_string()).await.unwrap();
                assert!(client.get("whose").await.unwrap().is_some());
            }
            let there = Client::connect(theirs.endpoints()).unwrap();
            assert!(there.get("whose").await.unwrap().is_none(), "the other cluster was written to");
        })
        .await;
    });
}

/// One more cluster, for the time of a test.
async fn on_second_cluster(test: impl AsyncFnOnce(&mut Cluster)) {
    let mut cluster = Cluster::prepare(Spec::nodes(1), crate::cluster::Permit::uncounted());
    cluster.start_all();
    cluster.wait_ready().await;
    test(&mut cluster).await;
    cluster.kill_all();
}

#[test]
fn a_service_starts_while_the_whole_cluster_is_down() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let dir = tempfile::tempdir().unwrap();
        let build = || Client::builder(c.endpoints()).cache(cached(dir.path(), "svc/")).connect();
        let bytes = b"\xff\xfe not text".to_vec();
        {
            let client = build().await.unwrap();
            client.put("svc/limit", "10").await.unwrap();
            let last = client.put("svc/raw", bytes.clone()).await.unwrap();
            live(&client).await;
            let cache = client.cache().unwrap();
            eventually("the cache has it", SOON, async || {
                cache.get("svc/raw", EVENTUAL).await.ok().filter(|answer| answer.revision >= last.revision)
            })
            .await;
            cache.close().await;
        }
        let endpoints = c.endpoints();
        c.kill_all();
        let began = Instant::now();
        let client =
            Client::builder(endpoints).cache(cached(dir.path(), "svc/")).connect().await.expect("offline");
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
        let cache = client.cache().unwrap();
        let limit = cache.get("svc/limit", EVENTUAL).await.unwrap();
        assert_eq!(&limit.kv.unwrap().value[..], b"10");
        assert!(limit.stale && limit.level == Level::L3, "{:?}", limit.level);
        assert_eq!(&cache.get("svc/raw", EVENTUAL).await.unwrap().kv.unwrap().value[..], &bytes[..]);
        assert!(cache.get("svc/none", EVENTUAL).await.unwrap().kv.is_none(), "the prefix is held whole");
        assert!(cache.get("svc/limit", Consistency::Strong).await.is_err());
        assert!(cache.get("svc/limit", Consistency::Bounded(Duration::from_secs(5))).await.is_err());

        c.start_all();
        c.wait_ready().await;
        live(&client).await;
        client.put("svc/limit", "11").await.unwrap();
        let bounded = Consistency::Bounded(Duration::from_secs(5));
        eventually("the new value", SOON, async || {
            let answer = cache.get("svc/limit", bounded).await.unwrap();
            (answer.kv.unwrap().value == "11" && !answer.stale).then_some(())
        })
        .await;
    });
}

#[test]
fn a_directory_that_cannot_be_used_says_why() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let dir = tempfile::tempdir().unwrap();
        let open = |options: CacheOptions| Client::builder(c.endpoints()).cache(options).connect();
        let first = open(cached(dir.path(), "a/")).await.unwrap();
        first.put("a/x", "1").await.unwrap();
        live(&first).await;
        // In use.
        let error = connect_error(open(cached(dir.path(), "a/")).await);
        assert!(matches!(&error, ClientError::Cache(CacheError::InUse { .. })), "{error:?}");
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
        let mut other = tokio::process::Command::new(mainstay_binary());
        other.args(["get", "a/x", "--consistency", "eventual", "--endpoints", &c.endpoints().join(",")]);
        let output = other.arg("--cache-dir").arg(dir.path()).output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("is in use"), "another process: {said}");
        let memory = CacheOptions { on_trouble: OnTrouble::MemoryOnly, ..cached(dir.path(), "a/") };
        let second = open(memory).await.unwrap();
        live(&second).await;
        assert!(second.cache().unwrap().get("a/x", EVENTUAL).await.unwrap().kv.is_some());
        first.cache().unwrap().close().await;
        drop(first);
        // Of another cluster.
        on_second_cluster(async |other| {
            let foreign = Client::builder(other.endpoints()).cache(cached(dir.path(), "a/")).connect().await;
            let error = connect_error(foreign);
            assert!(matches!(&error, ClientError::Cache(CacheError::ForeignCluster { .. })), "{error:?}");
        })
        .await;
        // Cut in half: set aside, and begun anew.
        let file = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .max_by_key(|path| path.metadata().unwrap().len())
            .unwrap();
        let half = file.metadata().unwrap().len() / 2;
        std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(half).unwrap();
        let again = open(cached(dir.path(), "a/")).await.expect("it begins anew");
        live(&again).await;
        assert!(again.cache().unwrap().get("a/x", EVENTUAL).await.unwrap().kv.is_some());
        // A file where the directory should be.
        let error = connect_error(open(cached(&file, "a/")).await);
        assert!(matches!(&error, ClientError::Cache(CacheError::Disk { .. })), "{error:?}");
    });
}
