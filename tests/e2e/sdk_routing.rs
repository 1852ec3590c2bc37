//! The SDK finds its way on real nodes: members are found from one address, dead
//! ones are left and come back, the leader is followed.
//!
//! All but the joining of an observer is asked of a real etcd too.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mainstay::client::{Client, EndpointHealth, EndpointStatus, GetOptions, RoutingOptions, Strategy};

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_cluster, on_own_cluster};
use crate::target::not_in_etcd;

/// Quicker than the defaults, so that tests need not wait.
fn options() -> RoutingOptions {
    RoutingOptions {
        discovery_interval: Some(Duration::from_secs(2)),
        health_interval: Some(Duration::from_millis(300)),
        probe_timeout: Duration::from_secs(1),
        ..RoutingOptions::default()
    }
}

/// A client that knows one node of the cluster.
async fn client(c: &Cluster, node: usize, options: RoutingOptions) -> Client {
    Client::builder([c.nodes[node].url()]).routing(options).connect().await.unwrap()
}

fn of(client: &Client, url: &str) -> Option<EndpointStatus> {
    client.endpoints().into_iter().find(|endpoint| endpoint.address == url)
}

/// Waits until there are so many endpoints, all well, and a leader.
async fn finds(client: &Client, count: usize) {
    eventually("all members are found", SOON, async || {
        let endpoints = client.endpoints();
        let well = |endpoint: &EndpointStatus| {
            endpoint.health == EndpointHealth::Serving && !endpoint.is_ejected && !endpoint.is_spare
        };
        let leads = endpoints.iter().any(|endpoint| endpoint.is_leader);
        (leads && endpoints.len() == count && endpoints.iter().all(well)).then_some(())
    })
    .await;
}

fn picks(client: &Client) -> BTreeMap<String, u64> {
    client.endpoints().into_iter().map(|endpoint| (endpoint.address, endpoint.picks)).collect()
}

/// Where the calls went that `calls` made.
async fn went(client: &Client, calls: impl AsyncFnOnce()) -> BTreeMap<String, u64> {
    let before = picks(client);
    calls().await;
    let mut went = picks(client);
    went.iter_mut().for_each(|(address, count)| *count -= before.get(address).unwrap_or(&0));
    went.retain(|_, count| *count > 0);
    went
}

async fn read_serializable(client: &Client, count: u32) {
    for n in 0..count {
        let options = GetOptions::key(format!("key/{n}")).serializable();
        client.range(options).await.unwrap();
    }
}

#[test]
fn one_address_finds_all_and_reads_spread_by_key() {
    on_cluster(async |c| {
        let client = client(c, 1, options()).await;
        finds(&client, 3).await;
        let leader = c.leader().await;
        let leads = of(&client, &c.nodes[leader].url()).unwrap();
        assert_eq!(leads.member_id, Some(c.member_id(leader).await));
        let spread = went(&client, async || read_serializable(&client, 300).await).await;
        assert!(spread.len() == 3 && spread.values().all(|count| *count > 60), "{spread:?}");
        let one_key = went(&client, async || {
            for _ in 0..20 {
                client.range(GetOptions::key("one").serializable()).await.unwrap();
            }
        });
        assert_eq!(one_key.await.len(), 1, "a key keeps its endpoint");
        let writes = went(&client, async || {
            for n in 0..20 {
                client.put(unique("routing"), n.to_string()).await.unwrap();
            }
        });
        assert!(writes.await.get(&c.nodes[leader].url()).is_some_and(|count| *count >= 20));
    });
}

#[test]
fn every_strategy_serves() {
    on_cluster(async |c| {
        let strategies = [
            Strategy::Ring { points: 128, load_bound: 1.25 },
            Strategy::Maglev { load_bound: 1.25 },
            Strategy::RoundRobin,
            Strategy::WeightedRoundRobin,
            Strategy::WeightedRandom,
            Strategy::LeastInFlight,
            Strategy::PeakEwma,
            Strategy::Sticky,
            Strategy::PeakEwma.zone_local().leader_first(),
        ];
        for strategy in strategies {
            let key = unique("strategy");
            let client = client(c, 0, options().with_strategy(strategy)).await;
            client.put(key.clone(), "v").await.unwrap();
            finds(&client, 3).await;
            read_serializable(&client, 20).await;
            assert_eq!(client.get(key).await.unwrap().unwrap().value, "v");
        }
    });
}

#[test]
fn a_killed_node_is_left_within_seconds_and_comes_back() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let dead = c.follower().await;
        let url = c.nodes[dead].url();
        let client = client(c, (dead + 1) % 3, options()).await;
        finds(&client, 3).await;
        c.nodes[dead].kill();
        let since = Instant::now();
        eventually("it is left", SOON, async || {
            read_serializable(&client, 20).await;
            of(&client, &url).unwrap().is_ejected.then_some(())
        })
        .await;
        let left = since.elapsed();
        let reads = went(&client, async || read_serializable(&client, 200).await).await;
        // A probe now and then, but none of its share.
        assert!(reads.get(&url).is_none_or(|count| *count < 10), "{reads:?}");
        assert_eq!(client.endpoints().len(), 3, "it is away, not removed");
        c.start_all();
        c.wait_ready().await;
        let since = Instant::now();
        eventually("it comes back", SOON, async || {
            read_serializable(&client, 20).await;
            (!of(&client, &url).unwrap().is_ejected).then_some(())
        })
        .await;
        eprintln!(
            "REPORT a killed node was left after {left:?}, and used {:?} after it was back",
            since.elapsed()
        );
        assert!(left < Duration::from_secs(5), "{left:?}");
        let reads = went(&client, async || read_serializable(&client, 300).await).await;
        assert!(reads[&url] > 60, "{reads:?}");
    });
}

#[test]
fn writes_follow_the_leader() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let (old, new) = (c.leader().await, c.follower().await);
        let client = client(c, new, options()).await;
        finds(&client, 3).await;
        let direct = Client::connect([c.nodes[old].url()]).unwrap();
        direct.move_leader(c.member_id(new).await).await.unwrap();
        let url = c.nodes[new].url();
        eventually("the new leader is known", SOON, async || {
            of(&client, &url).unwrap().is_leader.then_some(())
        })
        .await;
        let writes = went(&client, async || {
            for n in 0..50 {
                client.put("followed", n.to_string()).await.unwrap();
            }
        });
        let writes = writes.await;
        assert!(writes.get(&url).is_some_and(|count| *count >= 50), "{writes:?}");

        c.nodes[new].kill();
        eventually("writes flow again", SOON, async || client.put("followed", "on").await.ok()).await;
        for n in 0..50 {
            client.put("followed", n.to_string()).await.unwrap();
        }
        let next = c.nodes[c.leader().await].url();
        eventually("the next leader is known", SOON, async || {
            of(&client, &next).unwrap().is_leader.then_some(())
        })
        .await;
    });
}

#[test]
fn members_that_join_are_used_and_those_removed_are_not() {
    if not_in_etcd("--join") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let client = client(c, 0, options()).await;
        finds(&client, 3).await;
        let at = c.extra_node("n4");
        let target = c.nodes[0].url();
        c.nodes[at].flags.extend([format!("--join={target}"), "--kind=observer".into()]);
        c.nodes[at].start();
        c.wait_node_ready(at).await;
        finds(&client, 4).await;
        let url = c.nodes[at].url();
        let reads = went(&client, async || read_serializable(&client, 400).await).await;
        assert!(reads[&url] > 50, "an observer takes its share: {reads:?}");

        let id = of(&client, &url).unwrap().member_id.unwrap();
        client.member_remove(id).await.unwrap();
        eventually("it is gone", SOON, async || of(&client, &url).is_none().then_some(())).await;
        let reads = went(&client, async || read_serializable(&client, 100).await).await;
        assert!(!reads.contains_key(&url), "{reads:?}");
    });
}
