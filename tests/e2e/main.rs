//! End-to-end tests: real processes, foreign clients.
//!
//! Every test starts (or borrows) a cluster of real `mainstay serve` processes
//! on loopback and speaks to it through clients that know nothing of Mainstay:
//! the `etcd-client` crate, `etcdctl`, and messages declared here by hand.
//!
//! The same tests run against real etcd, which is how their expectations are
//! proven: `MAINSTAY_TEST_TARGET=etcd` (or the path of an etcd binary). A test
//! of what etcd does not have says so and returns early there.
//!
//! Knobs: `MAINSTAY_TEST_CLUSTERS` (clusters alive at once, default 2),
//! `MAINSTAY_TEST_SEED` (replays a random test), `MAINSTAY_TEST_DIR` (where
//! data directories live), `CI=true` (a missing tool fails instead of skipping).
#![allow(clippy::unwrap_used)]
#![expect(
    clippy::disallowed_methods,
    reason = "the time that real processes take is measured on the real clock"
)]

mod checks;
mod cluster;
mod http;
mod process;
mod raw;
mod target;

mod semantics_kv;
mod semantics_range;
mod semantics_stream;
mod semantics_txn;

mod semantics_lease;
mod semantics_watch;
mod semantics_watch_edges;

mod sdk_bind;
mod sdk_cache;
mod sdk_connect;
mod sdk_etcd;
mod sdk_retry;
mod sdk_routing;
mod sdk_subscribe;
mod semantics_cluster;
mod semantics_lock;
mod semantics_settings;

mod cli;
mod cli_bench;
mod crash;
mod etcdctl;
mod failover;
mod membership;
mod request_ids;
mod trouble;
mod trouble_disk;
