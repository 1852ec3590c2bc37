//! What has to be there before the load: keys with values, and leases.

use bytes::Bytes;
use tokio::task::JoinSet;

use super::{Failure, Keys, Lease, Store, Work};

/// How many requests that prepare are under way at once.
const AT_ONCE: u64 = 64;

/// Writes keys number `from` to `to` (exclusive; past the end of the space they begin again), `per_txn`
/// in one transaction and in no order.
///
/// # Errors
/// The first failure; some keys are written then.
pub async fn fill<S: Store>(
    connections: &[S],
    keys: &Keys,
    value: &Bytes,
    numbers: std::ops::Range<u64>,
    per_txn: u64,
) -> Result<(), Failure> {
    let mut tasks = JoinSet::new();
    for (worker, store) in (0..AT_ONCE).zip(connections.iter().cycle()) {
        let (mut store, keys, value, numbers) = (store.clone(), keys.clone(), value.clone(), numbers.clone());
        tasks.spawn(async move {
            let mut from = numbers.start + worker * per_txn;
            while from < numbers.end {
                let some = from..numbers.end.min(from + per_txn);
                store.put_all(some.map(|number| keys.key(number)).collect(), value.clone()).await?;
                from += AT_ONCE * per_txn;
            }
            Ok(())
        });
    }
    tasks.join_all().await.into_iter().collect()
}

/// `clients` clients with `leases` leases of `ttl_s` seconds between them, granted and with their
/// streams open.
///
/// # Errors
/// The first failure; the leases granted until then expire by themselves.
pub async fn lease<S: Store>(
    connections: &[S],
    clients: usize,
    leases: usize,
    ttl_s: i64,
) -> Result<Vec<Keeping<S::Lease>>, Failure> {
    let mut tasks = JoinSet::new();
    for (client, store) in (0..clients.min(leases)).zip(connections.iter().cycle()) {
        let (mut store, count) = (store.clone(), (client..leases).step_by(clients).len());
        tasks.spawn(async move {
            let mut own = Vec::with_capacity(count);
            for _ in 0..count {
                own.push(store.lease(ttl_s).await?);
            }
            Ok(Keeping { leases: own, next: 0 })
        });
    }
    tasks.join_all().await.into_iter().collect()
}

/// A client that renews its leases one after the other.
#[derive(Debug)]
pub struct Keeping<L> {
    leases: Vec<L>,
    next: usize,
}

impl<L: Lease> Work for Keeping<L> {
    async fn once(&mut self) -> Result<(), Failure> {
        let at = self.next % self.leases.len();
        self.next += 1;
        self.leases[at].keep().await
    }
}
