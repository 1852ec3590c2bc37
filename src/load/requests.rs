//! Single requests: writes, reads, transactions, and a mix.

use bytes::Bytes;

use super::keys::Draw;
use super::{Failure, Keys, Read, Store, Work};

/// What is done with the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Set one.
    Put,
    /// Read as many keys as this, which follow each other.
    Range {
        /// How many; 1 is a single key.
        keys: u64,
        /// Whether any member may answer by itself.
        serializable: bool,
    },
    /// Look whether one is there, set it, read it.
    Txn,
    /// Read one, or set one.
    Mixed {
        /// How many of a hundred are reads.
        reads: u8,
        /// Whether any member may answer a read by itself.
        serializable: bool,
    },
}

/// One client that makes requests about keys drawn from all alike.
#[derive(Clone, Debug)]
pub struct Requests<S> {
    store: S,
    verb: Verb,
    keys: Keys,
    value: Bytes,
    draw: Draw,
}

impl<S: Store> Requests<S> {
    /// `clients` clients of the same kind, spread over the connections.
    pub fn clients(connections: &[S], clients: usize, verb: Verb, keys: &Keys, value: &Bytes) -> Vec<Self> {
        let stores = connections.iter().cycle().take(clients);
        let client = |(number, store): (usize, &S)| Requests {
            store: store.clone(),
            verb,
            keys: keys.clone(),
            value: value.clone(),
            draw: Draw::new(number as u64),
        };
        stores.enumerate().map(client).collect()
    }

    async fn read(&mut self, from: u64, keys: u64, serializable: bool) -> Result<(), Failure> {
        let end = if keys > 1 { self.keys.end(from + keys) } else { Bytes::new() };
        let found = self.store.range(Read { key: self.keys.key(from), end, serializable }).await?;
        // A read of nothing is cheap and would flatter the store.
        if found < keys { Err(Failure("a key was missing; fill first".to_owned())) } else { Ok(()) }
    }
}

impl<S: Store> Work for Requests<S> {
    async fn once(&mut self) -> Result<(), Failure> {
        let count = self.keys.count();
        let any = self.draw.below(count);
        match self.verb {
            Verb::Put => self.store.put(self.keys.key(any), self.value.clone()).await,
            Verb::Txn => self.store.txn(self.keys.key(any), self.value.clone()).await,
            Verb::Range { keys, serializable } => {
                // So that all of them are there.
                let from = self.draw.below(count.saturating_sub(keys) + 1);
                self.read(from, keys, serializable).await
            }
            Verb::Mixed { reads, serializable } if self.draw.below(100) < u64::from(reads) => {
                self.read(any, 1, serializable).await
            }
            Verb::Mixed { .. } => self.store.put(self.keys.key(any), self.value.clone()).await,
        }
    }
}
