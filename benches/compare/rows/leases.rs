//! Keeping leases alive.

use anyhow::{Context, Result};
use mainstay::load::lease;

use super::{BOTH, LIMIT, Row, cpu, ops};
use crate::bench::{Bench, connections, foreign, measure};
use crate::figures::Figures;

const LEASES: usize = 10_000;
/// Longer than any measurement, so that none expires.
const TTL_S: i64 = 3_600;

pub const ROWS: &[Row] = &[Row {
    name: "lease-keep-alive",
    load: "10,000 leases, a stream each, 256 clients, 100 connections",
    sides: BOTH,
    goals: &[cpu(0.3), ops(1.8)],
    limit: LIMIT,
    run: |bench| Box::pin(keep_alive(bench)),
}];

async fn keep_alive(bench: &Bench) -> Result<Figures> {
    let cluster = bench.cluster(bench.spec(3)).await;
    let stores = foreign(connections(&cluster, 100).await);
    let workers = lease(&stores, 256, bench.scaled(LEASES), TTL_S).await.context("granting the leases")?;
    measure(bench, &cluster, workers).await
}
