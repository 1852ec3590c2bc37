//! Stores that take long to fill: filled once for each side, used by every round, and removed at the
//! end. It owns their directories and what is written to them; what is measured is the row's.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use anyhow::{Context, Result};
use etcd_client::{Client, Txn, TxnOp};

use crate::bench::{Bench, connections, key};
use crate::cluster::{Cluster, Permit, Spec, fresh_root};

/// The store's size may be anything; the default quota of both sides is 2 GiB.
const QUOTA_BYTES: u64 = 32 << 30;
/// Connections that fill, and writers on them.
const CONNECTIONS: usize = 16;
const WRITERS: usize = 128;

/// Which directories are filled. Their names are in `dir()`.
static FILLED: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);

/// What a store holds: keys [`key`] 0 to `keys`, with values that nothing can compress.
#[derive(Clone, Copy, Debug, Default)]
pub struct Content {
    /// A name of its own.
    pub name: &'static str,
    /// How many keys.
    pub keys: usize,
    /// Bytes of a value.
    pub value_bytes: usize,
    /// How many puts come in one transaction.
    pub per_txn: usize,
}

/// Where this process keeps them.
fn dir() -> PathBuf {
    static DIR: LazyLock<PathBuf> = LazyLock::new(fresh_root);
    DIR.clone()
}

/// Removes all of them.
pub fn remove() {
    let mut filled = FILLED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    filled.clear();
    let _ = fs::remove_dir_all(dir());
}

/// The flags that every start of such a store needs.
pub fn spec(bench: &Bench) -> Spec {
    bench.spec(1).flag("quota-backend-bytes", QUOTA_BYTES)
}

/// One node, not started, over a store that holds `content`. Dropping the cluster leaves the store.
///
/// # Errors
/// When it cannot be filled.
pub async fn cluster(bench: &Bench, content: Content) -> Result<Cluster> {
    let data = dir().join(format!("{}-{}", bench.side.name(), content.name));
    let filled = FILLED.lock().is_ok_and(|filled| filled.contains(&data));
    if !filled {
        fs::create_dir_all(dir())?;
        let mut filling = over(bench, &data);
        filling.start_all();
        filling.wait_ready().await;
        let clients = connections(&filling, CONNECTIONS).await;
        fill(&clients, content).await?;
        if let Ok(mut filled) = FILLED.lock() {
            filled.insert(data.clone());
        }
    }
    Ok(over(bench, &data))
}

fn over(bench: &Bench, data: &Path) -> Cluster {
    let mut cluster = Cluster::prepare(spec(bench), Permit::uncounted());
    for node in &mut cluster.nodes {
        node.data_dir = data.to_owned();
    }
    cluster
}

/// Writes `content`, so that a crash at once after it loses nothing.
///
/// # Errors
/// When a write fails.
pub async fn fill(clients: &[Client], content: Content) -> Result<()> {
    let (next, values) = (Arc::new(AtomicUsize::new(0)), Arc::new(Values::new(content.value_bytes)));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let mut client = clients[writer % clients.len()].clone();
        let (next, values) = (next.clone(), values.clone());
        writers.spawn(async move {
            loop {
                let first = next.fetch_add(content.per_txn, Ordering::Relaxed);
                if first >= content.keys {
                    return anyhow::Ok(());
                }
                let keys = first..content.keys.min(first + content.per_txn);
                if content.per_txn == 1 {
                    client.put(key(first), values.of(first), None).await.context("filling")?;
                } else {
                    let puts: Vec<TxnOp> = keys.map(|i| TxnOp::put(key(i), values.of(i), None)).collect();
                    client.txn(Txn::new().and_then(puts)).await.context("filling")?;
                }
            }
        });
    }
    while let Some(done) = writers.join_next().await {
        done??;
    }
    Ok(())
}

/// Values cut out of random bytes, each at another place: one store compresses and the other does not,
/// and equal values would make a large store small.
struct Values {
    pool: Vec<u8>,
    value_bytes: usize,
}

impl Values {
    fn new(value_bytes: usize) -> Values {
        let mut pool = vec![0; (4 << 20) + value_bytes];
        rand::Rng::fill_bytes(&mut rand::rng(), &mut pool);
        Values { pool, value_bytes }
    }

    fn of(&self, i: usize) -> &[u8] {
        // A step that shares no factor with the pool's size visits every place before it repeats one.
        let at = i.wrapping_mul(1_000_003) % (self.pool.len() - self.value_bytes);
        &self.pool[at..at + self.value_bytes]
    }
}
