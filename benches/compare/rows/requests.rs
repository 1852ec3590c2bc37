//! Single requests: puts, reads, transactions and a mix of them, as fast as the clients can.

use anyhow::Result;
use etcd_client::Client;
use mainstay::load::{Requests, Verb, value};

use super::{BOTH, LIMIT, Row, Run, cpu, ops};
use crate::bench::{Bench, KEYS, VALUE_BYTES, connections, fill, foreign, keys, measure};
use crate::cluster::Cluster;
use crate::figures::Figures;

const CONNECTIONS: usize = 100;
const CLIENTS: usize = 256;
const LINEARIZABLE: Verb = Verb::Range { keys: 1, serializable: false };
const SERIALIZABLE: Verb = Verb::Range { keys: 1, serializable: true };
const MIXED: Verb = Verb::Mixed { reads: 90, serializable: false };
const HUNDRED: Verb = Verb::Range { keys: 100, serializable: false };

pub const ROWS: &[Row] = &[
    Row {
        goals: &[cpu(0.33), ops(1.8)],
        ..row("put", "256 clients, 100 connections, 256 B, 10,000 keys", |bench| {
            Box::pin(all_nodes(bench, Verb::Put, CLIENTS))
        })
    },
    Row {
        goals: &[cpu(0.4), ops(1.3)],
        ..row("put-1-client", "one client at the leader, 256 B, 10,000 keys", |bench| {
            Box::pin(one_client(bench, Verb::Put))
        })
    },
    Row {
        goals: &[cpu(0.4), ops(1.7)],
        ..row("put-1000-clients", "1,000 clients, 100 connections, 256 B, 10,000 keys", |bench| {
            Box::pin(all_nodes(bench, Verb::Put, 1_000))
        })
    },
    Row {
        goals: &[cpu(0.2), ops(2.0)],
        ..row("range-linearizable", "one key of 10,000, 256 clients, 100 connections", |bench| {
            Box::pin(all_nodes(bench, LINEARIZABLE, CLIENTS))
        })
    },
    Row {
        goals: &[cpu(0.3), ops(1.5)],
        ..row("range-serializable", "one key of 10,000, 256 clients, 100 connections", |bench| {
            Box::pin(all_nodes(bench, SERIALIZABLE, CLIENTS))
        })
    },
    Row {
        goals: &[cpu(0.25), ops(2.0)],
        ..row("mixed", "90 % linearizable reads, 10 % puts, 256 clients, 100 connections", |bench| {
            Box::pin(all_nodes(bench, MIXED, CLIENTS))
        })
    },
    Row {
        goals: &[cpu(0.35), ops(1.8)],
        ..row("txn", "compare, put and get of one key, 256 clients, 100 connections", |bench| {
            Box::pin(all_nodes(bench, Verb::Txn, CLIENTS))
        })
    },
    Row {
        goals: &[cpu(0.2), ops(2.5)],
        ..row("range-100-keys", "100 keys of 256 B, linearizable, 30 clients, 30 connections", |bench| {
            Box::pin(all_nodes(bench, HUNDRED, 30))
        })
    },
];

const fn row(name: &'static str, load: &'static str, run: Run) -> Row {
    Row { name, load, sides: BOTH, goals: &[], limit: LIMIT, run }
}

/// Clients spread over all three nodes.
async fn all_nodes(bench: &Bench, verb: Verb, clients: usize) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3)).await;
    let connections = connections(&cluster, CONNECTIONS.min(clients)).await;
    load(bench, &cluster, connections, verb, clients).await
}

/// One client, at the leader: elsewhere its latency would depend on who was elected.
async fn one_client(bench: &Bench, verb: Verb) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3)).await;
    let connection = cluster.client(cluster.leader().await).await;
    load(bench, &cluster, vec![connection], verb, 1).await
}

async fn load(
    bench: &Bench,
    cluster: &Cluster,
    connections: Vec<Client>,
    verb: Verb,
    clients: usize,
) -> Result<Figures> {
    fill(&connections, KEYS as usize, VALUE_BYTES).await?;
    let workers = Requests::clients(&foreign(connections), clients, verb, &keys(KEYS), &value(VALUE_BYTES));
    measure(bench, cluster, workers).await
}
