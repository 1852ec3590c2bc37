//! The SDK in trouble, on real processes: connections cut after every single
//! byte of a write, servers that say nothing, nobody at all, the wrong cluster.
//! What a write did is counted at the store, not taken from its answer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use mainstay::client::{
    Client, ClientError, ClientOptions, ErrorClass, GetOptions, HedgeDelay, PolicyOptions, RequestIds,
    TxnBuilder, compare,
};
use mainstay::resilience::BackoffOptions;
use mainstay::types::{KeyRange, LeaseId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::checks::seed;
use crate::cluster::{Cluster, Permit, Spec, on_cluster, on_own_cluster};
use crate::target::{Target, is_etcd, not_in_etcd, skip, tool};

const MS: Duration = Duration::from_millis(1);
/// Writes under way at once.
const AT_ONCE: usize = 12;

fn policy(request_ids: RequestIds) -> PolicyOptions {
    PolicyOptions {
        request_ids,
        attempt_timeout: MS * 2_000,
        backoff: BackoffOptions::exponential(MS, MS * 20),
        ..PolicyOptions::default()
    }
}

fn client(endpoints: Vec<String>, policy: PolicyOptions) -> Client {
    let options = ClientOptions { policy, ..ClientOptions::default() };
    Client::with_options(endpoints, options).expect("addresses")
}

/// Where a connection is cut.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// After so many bytes to the server.
    Up(u64),
    /// After so many bytes to the client.
    Down(u64),
    /// Not at all.
    Never,
}

/// A door before one node, whose first connection is cut.
struct Door {
    address: String,
    /// Bytes of the first connection, up and down.
    bytes: Arc<[AtomicU64; 2]>,
    task: JoinHandle<()>,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Door {
    async fn before(node: String, cut: Cut) -> Door {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let bytes = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let counts = bytes.clone();
        let task = tokio::spawn(async move {
            let mut cut = cut;
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&node).await else { continue };
                connections.spawn(carry(near, far, std::mem::replace(&mut cut, Cut::Never), counts.clone()));
            }
        });
        Door { address, bytes, task }
    }
}

/// Carries bytes both ways until one side ends or the cut is reached; then both
/// sides are reset, so that nothing more of either arrives.
async fn carry(near: TcpStream, far: TcpStream, cut: Cut, counts: Arc<[AtomicU64; 2]>) {
    for stream in [&near, &far] {
        stream.set_nodelay(true).unwrap();
        stream.set_zero_linger().unwrap();
    }
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let (up, down) = match cut {
        Cut::Up(bytes) => (bytes, u64::MAX),
        Cut::Down(bytes) => (u64::MAX, bytes),
        Cut::Never => (u64::MAX, u64::MAX),
    };
    tokio::select! {
        () = one_way(near_read, far_write, up, &counts[0]) => {}
        () = one_way(far_read, near_write, down, &counts[1]) => {}
    }
}

async fn one_way(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut left: u64,
    count: &AtomicU64,
) {
    let mut buffer = [0; 4096];
    while left > 0 {
        let Ok(read @ 1..) = from.read(&mut buffer).await else { return };
        let passed = left.min(read as u64);
        if to.write_all(&buffer[..passed as usize]).await.is_err() {
            return;
        }
        count.fetch_add(passed, Ordering::Relaxed);
        left -= passed;
    }
}

async fn doors(nodes: &[String], cut: Cut) -> Vec<Door> {
    let mut doors = Vec::new();
    for node in nodes {
        doors.push(Door::before(node.clone(), cut).await);
    }
    doors
}

fn addresses(doors: &[Door]) -> Vec<String> {
    doors.iter().map(|door| door.address.clone()).collect()
}

fn nodes(c: &Cluster) -> Vec<String> {
    c.nodes.iter().map(|node| format!("127.0.0.1:{}", node.client_port)).collect()
}

/// The kinds of writes, each with an answer that tells whether it was the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Write {
    Put,
    /// Creates a key if it is missing, and counts in another.
    Txn,
    /// Removes a key that is there.
    Delete,
}

/// What a write said: whether it found the world as if it was the first.
type Said = Result<bool, ClientError>;

async fn write(client: &Client, kind: Write, key: &str) -> Said {
    match kind {
        Write::Put => client.put(key.to_owned(), "v").await.map(|_| true),
        Write::Txn => {
            let txn = TxnBuilder::new()
                .when(compare::missing(key.to_owned()))
                .then_put(key.to_owned(), "v")
                .then_put(format!("{key}/count"), "1")
                .or_else_get(key.to_owned());
            client.txn(txn.build()).await.map(|result| result.reply.succeeded)
        }
        Write::Delete => client.delete(key.to_owned()).await.map(|reply| reply.deleted == 1),
    }
}

/// Every cut that matters to a write by a new client: after each byte from the
/// beginning of the connection to the end of the answer.
async fn cuts(nodes: &[String], kind: Write, ids: RequestIds, key: &str) -> Vec<Cut> {
    let doors = doors(nodes, Cut::Never).await;
    let client = client(addresses(&doors), policy(ids));
    write(&client, kind, key).await.expect("nothing is cut");
    let most =
        |way: usize| doors.iter().map(|door| door.bytes[way].load(Ordering::Relaxed)).max().unwrap_or(0);
    let (up, down) = (most(0), most(1));
    assert!(up > 200 && down > 80, "the bytes were counted: {up} up, {down} down");
    (0..=up).map(Cut::Up).chain((0..=down).map(Cut::Down)).collect()
}

/// How a write under a cut went, and how often it took effect.
struct Tale {
    cut: Cut,
    key: String,
    said: Said,
}

async fn tell_all(nodes: &[String], kind: Write, ids: RequestIds, prefix: &str) -> Vec<Tale> {
    let cuts = cuts(nodes, kind, ids, &format!("{prefix}/whole")).await;
    let tales = cuts.into_iter().enumerate().map(|(i, cut)| async move {
        let doors = doors(nodes, cut).await;
        let client = client(addresses(&doors), policy(ids));
        let key = format!("{prefix}/{i:05}");
        let said = write(&client, kind, &key).await;
        Tale { cut, key, said }
    });
    stream::iter(tales).buffer_unordered(AT_ONCE).collect().await
}

/// How often each key below a prefix was set.
async fn versions(c: &Cluster, prefix: &str) -> BTreeMap<String, i64> {
    let client = client(nodes(c), policy(RequestIds::Off));
    let got = client.range(GetOptions::prefix(format!("{prefix}/"))).await.expect("all nodes are well");
    let name = |key: &[u8]| String::from_utf8_lossy(key).into_owned();
    got.reply.kvs.iter().map(|kv| (name(&kv.key), kv.version)).collect()
}

#[test]
fn with_request_ids_every_cut_write_succeeds_and_is_done_once() {
    if not_in_etcd("request ids") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        for kind in [Write::Put, Write::Txn] {
            let prefix = format!("ids/{kind:?}");
            let tales = tell_all(&nodes(c), kind, RequestIds::Auto, &prefix).await;
            let versions = versions(c, &prefix).await;
            for Tale { cut, key, said } in &tales {
                match said {
                    Ok(first) => assert!(first, "{kind:?} cut {cut:?} was told of an earlier one, its own"),
                    Err(error) => panic!("{kind:?} cut {cut:?}: {error}"),
                }
                assert_eq!(versions.get(key), Some(&1), "{kind:?} cut {cut:?}");
                if kind == Write::Txn {
                    assert_eq!(versions.get(&format!("{key}/count")), Some(&1), "{kind:?} cut {cut:?}");
                }
            }
            eprintln!("{kind:?}: {} cuts, each write done once", tales.len());
        }
    });
}

#[test]
fn with_request_ids_a_cut_delete_and_a_cut_grant_are_done_once() {
    if not_in_etcd("request ids") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let nodes = nodes(c);
        let whole = client(nodes.clone(), policy(RequestIds::Off));
        let prefix = "ids/delete";
        for i in 0..2_000 {
            whole.put(format!("{prefix}/{i:05}"), "v").await.expect("all nodes are well");
        }
        whole.put(format!("{prefix}/whole"), "v").await.expect("all nodes are well");
        for Tale { cut, said, .. } in tell_all(&nodes, Write::Delete, RequestIds::Auto, prefix).await {
            assert!(matches!(said, Ok(true)), "delete cut {cut:?}: {said:?}");
        }
        // A grant done twice leaves a lease that nobody knows of.
        let cuts = (0..1_000).step_by(9).flat_map(|bytes| [Cut::Up(bytes), Cut::Down(bytes)]);
        let grants = cuts.map(|cut| {
            let nodes = &nodes;
            async move {
                let doors = doors(nodes, cut).await;
                let client = client(addresses(&doors), policy(RequestIds::Auto));
                client.lease_grant(600, LeaseId::NONE).await.expect("granted in the end").id
            }
        });
        let mut granted: Vec<LeaseId> = stream::iter(grants).buffer_unordered(AT_ONCE).collect().await;
        let mut leases = whole.lease_list().await.expect("all nodes are well");
        granted.sort();
        leases.sort();
        assert_eq!(granted, leases);
    });
}

/// Without ids a write in doubt is not repeated: what is told is never wrong.
#[test]
fn without_request_ids_a_cut_write_is_done_at_most_once_and_doubt_is_told() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let (mut happened, mut not) = (0, 0);
        for kind in [Write::Put, Write::Txn] {
            let prefix = format!("plain/{kind:?}");
            let tales = tell_all(&nodes(c), kind, RequestIds::Off, &prefix).await;
            // A write whose connection is gone may still be under way.
            tokio::time::sleep(MS * 500).await;
            let versions = versions(c, &prefix).await;
            for Tale { cut, key, said } in &tales {
                let version = versions.get(key).copied().unwrap_or(0);
                match said {
                    Ok(first) => assert!(*first && version == 1, "{kind:?} cut {cut:?}: {version}"),
                    Err(error @ ClientError::Unknown { write: true, .. }) => {
                        assert!(version <= 1, "{kind:?} cut {cut:?}: {version} times, {error}");
                        assert_eq!(error.class(), ErrorClass::Network, "{error:?}");
                        if version == 1 { happened += 1 } else { not += 1 }
                    }
                    Err(error) => panic!("{kind:?} cut {cut:?}: {error:?}"),
                }
            }
        }
        eprintln!("in doubt: {happened} done, {not} not done");
        assert!(happened > 20 && not > 20, "the doubt is real: {happened} done, {not} not done");
    });
}

/// A real etcd knows no request ids: it is asked once, and its writes in doubt
/// are not repeated.
#[test]
fn a_real_etcd_is_written_to_without_ids_and_doubt_is_told() {
    if tool("etcd").is_none() {
        return skip("etcd is not installed");
    }
    let spec = Spec { target: Target::etcd("etcd"), ..Spec::nodes(3) };
    on_own_cluster(spec, async |c| {
        let prefix = "etcd/put";
        let tales = tell_all(&nodes(c), Write::Put, RequestIds::Auto, prefix).await;
        tokio::time::sleep(MS * 500).await;
        let versions = versions(c, prefix).await;
        let mut in_doubt = 0;
        for Tale { cut, key, said } in &tales {
            let version = versions.get(key).copied().unwrap_or(0);
            match said {
                Ok(_) => assert_eq!(version, 1, "cut {cut:?}"),
                Err(error) => {
                    assert!(
                        error.may_have_happened() && version <= 1,
                        "cut {cut:?}: {version} times, {error:?}"
                    );
                    in_doubt += 1;
                }
            }
        }
        assert!(in_doubt > 20, "{in_doubt} of {}", tales.len());
        let client = client(nodes(c), policy(RequestIds::Auto));
        for i in 0..20 {
            client.put("etcd/same", i.to_string()).await.expect("all nodes are well");
        }
        let kv = client.get("etcd/same").await.expect("all nodes are well").expect("it was set");
        assert_eq!(kv.version, 20);
    });
}

/// Connections that are cut at random, over and over, under many writers with
/// one client: the sum at the store is the sum of what was acknowledged.
#[test]
fn a_shared_client_counts_right_through_random_cuts() {
    if not_in_etcd("request ids") {
        return;
    }
    let seed = seed("a_shared_client_counts_right_through_random_cuts");
    on_own_cluster(Spec::nodes(3), async |c| {
        let mut doors = Vec::new();
        for (i, node) in nodes(c).into_iter().enumerate() {
            doors.push(flaky_door(node, seed.wrapping_add(i as u64)).await);
        }
        let endpoints = doors.iter().map(|(address, _)| address.clone()).collect();
        let client = client(endpoints, PolicyOptions { attempts_max: 50, ..policy(RequestIds::Auto) });
        let writers = (0..16).map(|writer| {
            let client = client.clone();
            async move {
                let mut done = 0;
                let until = Instant::now() + Duration::from_secs(10);
                while Instant::now() < until {
                    // The budget may run out in such a storm; doubt may not be denied.
                    match client.put(format!("storm/{writer:02}"), "v").await {
                        Ok(_) => done += 1,
                        Err(error) => panic!("writer {writer} after {done} writes: {error:?}"),
                    }
                }
                done
            }
        });
        let done: Vec<i64> = futures_util::future::join_all(writers).await;
        for (_, task) in &doors {
            task.abort();
        }
        let versions: Vec<i64> = versions(c, "storm").await.into_values().collect();
        assert_eq!(versions, done);
        assert!(done.iter().sum::<i64>() > 200, "{done:?}");
    });
}

/// A door whose connections each live for a random number of bytes.
async fn flaky_door(node: String, seed: u64) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let task = tokio::spawn(async move {
        let mut random = seed;
        let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(&node).await else { continue };
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bytes = 4_000 + (random >> 33) % 40_000;
            let cut = if random >> 63 == 0 { Cut::Up(bytes) } else { Cut::Down(bytes) };
            connections.spawn(carry(near, far, cut, counts.clone()));
        }
    });
    (address, task)
}

/// Nodes die and come back under a client as services make it: nothing fails,
/// and what was acknowledged is what was done.
#[test]
fn writes_and_reads_outlive_the_death_of_any_node() {
    if not_in_etcd("request ids") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let client = Client::builder(c.endpoints()).connect().await.expect("all nodes are well");
        let until = Instant::now() + Duration::from_secs(20);
        let writers = (0..8).map(|writer| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut done: i64 = 0;
                while Instant::now() < until {
                    client.put(format!("kill/{writer}"), "v").await.map_err(|error| (done, error))?;
                    let kv = client.get(format!("kill/{writer}")).await.map_err(|error| (done, error))?;
                    done += 1;
                    assert_eq!(kv.map(|kv| kv.version), Some(done), "writer {writer}");
                    tokio::time::sleep(MS * 5).await;
                }
                Ok::<i64, (i64, ClientError)>(done)
            })
        });
        let writers: Vec<_> = writers.collect();
        // The leader, then whoever follows it, and the new leader.
        for round in 0..3 {
            let victim = if round == 1 { c.follower().await } else { c.leader().await };
            c.nodes[victim].kill();
            tokio::time::sleep(MS * 2_500).await;
            c.nodes[victim].start();
            c.wait_node_ready(victim).await;
            tokio::time::sleep(MS * 1_000).await;
        }
        let mut total = 0;
        for writer in writers {
            total += writer.await.expect("no panic").expect("nothing fails");
        }
        assert!(total > 200, "{total}");
    });
}

/// Accepts and never answers.
async fn hole() -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let task = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    (address, task)
}

#[test]
fn a_node_that_accepts_and_never_answers_is_left_for_another() {
    if not_in_etcd("request ids") {
        return;
    }
    on_cluster(async |c| {
        let holes = [hole().await, hole().await];
        let endpoints = vec![holes[0].0.clone(), holes[1].0.clone(), nodes(c)[0].clone()];
        let policy = PolicyOptions { attempt_timeout: MS * 300, ..policy(RequestIds::Auto) };
        for round in 0..6 {
            let client = client(endpoints.clone(), policy.clone());
            let began = Instant::now();
            client.put("hole", "v").await.expect("the third endpoint answers");
            client.get("hole").await.expect("the third endpoint answers");
            // At worst 300 ms and 600 ms in the holes.
            assert!(began.elapsed() < MS * 2_500, "round {round} took {:?}", began.elapsed());
            let began = Instant::now();
            client.get("hole").await.expect("the third endpoint answers");
            assert!(began.elapsed() < MS * 250, "it stays with the one that answers: {:?}", began.elapsed());
        }
        for (_, task) in holes {
            task.abort();
        }
    });
}

#[test]
fn a_lease_is_kept_alive_past_a_node_that_never_answers() {
    on_cluster(async |c| {
        let holes = [hole().await, hole().await];
        let lease =
            client(nodes(c), policy(RequestIds::Off)).lease_grant(600, LeaseId::NONE).await.unwrap().id;
        let endpoints = vec![holes[0].0.clone(), holes[1].0.clone(), nodes(c)[0].clone()];
        for _ in 0..3 {
            let policy = PolicyOptions { attempt_timeout: MS * 200, ..policy(RequestIds::Off) };
            let client = client(endpoints.clone(), policy);
            let mut keeper = client.lease_keeper(lease);
            let began = Instant::now();
            assert!(keeper.keep().await.expect("the third endpoint answers") > 500);
            assert!(keeper.keep().await.expect("over the same stream") > 500);
            assert!(began.elapsed() < MS * 1_500, "{:?}", began.elapsed());
        }
        holes.iter().for_each(|(_, task)| task.abort());
    });
}

#[test]
fn a_hedged_read_does_not_wait_for_a_node_that_never_answers() {
    on_cluster(async |c| {
        let (hole, task) = hole().await;
        let endpoints = vec![hole, nodes(c)[0].clone()];
        let hedge = Some(HedgeDelay::Fixed(MS * 40));
        let mut slow = 0;
        for _ in 0..12 {
            let client = client(endpoints.clone(), PolicyOptions { hedge, ..policy(RequestIds::Off) });
            let began = Instant::now();
            client.get("hedged").await.expect("the other endpoint answers");
            let took = began.elapsed();
            assert!(took < MS * 1_000, "the attempt alone would have taken 2 s: {took:?}");
            slow += u32::from(took >= MS * 40);
        }
        assert!(slow > 0, "some of twelve clients began with the hole");
        task.abort();
    });
}

#[test]
fn when_no_endpoint_can_be_reached_the_error_names_each_with_its_reason() {
    crate::cluster::block_on(async {
        let mut endpoints = Vec::new();
        for _ in 0..3 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            endpoints.push(listener.local_addr().unwrap().to_string());
        }
        let client = client(endpoints.clone(), policy(RequestIds::Auto));
        let read = client.get("k").await.expect_err("nobody is there");
        let write = client.put("k", "v").await.expect_err("nobody is there");
        for error in [read, write] {
            assert!(
                matches!(&error, ClientError::Unreachable { endpoints } if endpoints.len() == 3),
                "{error:?}"
            );
            assert!(error.may_retry() && !error.may_have_happened() && error.class() == ErrorClass::Network);
            let text = error.to_string();
            assert!(endpoints.iter().all(|endpoint| text.contains(endpoint.as_str())), "{text}");
            assert!(text.contains("refused"), "{text}");
        }
    });
}

#[test]
fn a_wrong_cluster_behind_an_address_is_named_and_never_used() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut other = Cluster::prepare(Spec::nodes(1), Permit::uncounted());
        other.start_all();
        other.wait_ready().await;
        let ours = client(nodes(c), policy(RequestIds::Off));
        ours.put("k", "ours").await.expect("it is well");
        client(nodes(&other), policy(RequestIds::Off)).put("k", "theirs").await.expect("it is well");
        let cluster_id = ours.cluster_id();
        assert!(cluster_id.is_some());
        let pinned = |endpoints| {
            let mut options = ClientOptions { policy: policy(RequestIds::Off), ..ClientOptions::default() };
            options.routing.cluster_id = cluster_id;
            Client::with_options(endpoints, options).expect("addresses")
        };
        let error = pinned(nodes(&other)).get("k").await.expect_err("it is another cluster's");
        match &error {
            ClientError::WrongCluster { expected, actual, address } => {
                assert!(Some(*expected) == cluster_id && actual != expected && *address == nodes(&other)[0]);
            }
            other => panic!("{other:?}"),
        }
        let error = pinned(nodes(&other)).range_stream(GetOptions::keys(KeyRange::Single("k".into()))).await;
        let first = error.expect("a stream opens").next().await.expect("it has a piece");
        assert!(matches!(first, Err(ClientError::WrongCluster { .. })), "{first:?}");
        // With discovery too: nothing of ours is ever written there.
        let builder = Client::builder([nodes(&other), nodes(c)].concat()).cluster_id(cluster_id.unwrap_or(0));
        let both = builder.connect().await.expect("one of them is ours");
        for i in 0..20 {
            both.put(format!("both/{i}"), "ours").await.expect("the right one is found");
        }
        let there = client(nodes(&other), policy(RequestIds::Off)).range(GetOptions::prefix("both/")).await;
        assert_eq!(there.expect("it is well").reply.count, 0);
        let lost = Client::builder(nodes(&other)).cluster_id(cluster_id.unwrap_or(0)).connect().await;
        assert!(matches!(&lost, Err(ClientError::WrongCluster { .. })), "{lost:?}");
        // A session for request ids is never taken from there either.
        if !is_etcd() {
            for i in 0..8 {
                let mut options =
                    ClientOptions { policy: policy(RequestIds::Auto), ..ClientOptions::default() };
                options.routing.cluster_id = cluster_id;
                let both =
                    Client::with_options([nodes(&other), nodes(c)].concat(), options).expect("addresses");
                both.put(format!("ids/{i}"), "ours").await.expect("the right one is among them");
                let kv = ours.get(format!("ids/{i}")).await.expect("it is well");
                assert_eq!(kv.map(|kv| kv.version), Some(1));
            }
        }
        for _ in 0..8 {
            let both = pinned([nodes(&other), nodes(c)].concat());
            let kv = both.get("k").await.expect("the right one is among them").expect("the key is there");
            assert_eq!(&kv.value[..], b"ours");
        }
    });
}
