//! Load on a store, and what it felt like: clients that call one after the other or at a fixed rate,
//! watchers that take the time of what reaches them, and histograms of both.
//!
//! It knows a store only as a [`Store`], so that the same load runs through this crate's own stubs and
//! through anyone else's client. It never retries and hides nothing: a call that fails is counted, by
//! what it said. It prints nothing.

mod audience;
mod drive;
mod keys;
mod prepare;
mod requests;
mod tally;

use bytes::Bytes;
use thiserror::Error;

pub use audience::{Audience, catch_up, watch_all};
pub use drive::{Plan, Until, Work, drive};
pub use keys::{Keys, value};
pub use prepare::{Keeping, fill, lease};
pub use requests::{Requests, Verb};
pub use tally::{Outcome, Tally};

/// Why a call failed: a few words that are the same for the same reason, because they are counted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Failure(pub String);

/// What a read asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// The key, or the first key.
    pub key: Bytes,
    /// The end of the range, exclusive; empty for one key.
    pub end: Bytes,
    /// Whether any member may answer by itself.
    pub serializable: bool,
}

/// What a watch asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchFrom {
    /// The first key.
    pub key: Bytes,
    /// The end of the range, exclusive.
    pub end: Bytes,
    /// Changes from this revision on; 0 is from now on.
    pub revision: i64,
}

/// A connection to a store. Clones share it. Every call is made once, with a deadline of the
/// implementor's.
pub trait Store: Clone + Send + Sync + 'static {
    /// A watch that is in place.
    type Watch: Watch;
    /// A lease that is granted.
    type Lease: Lease;

    /// Sets a key.
    fn put(&mut self, key: Bytes, value: Bytes) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Sets several keys in one transaction.
    fn put_all(&mut self, keys: Vec<Bytes>, value: Bytes)
    -> impl Future<Output = Result<(), Failure>> + Send;

    /// Reads; returns how many keys came.
    fn range(&mut self, read: Read) -> impl Future<Output = Result<u64, Failure>> + Send;

    /// If the key is there, sets it and reads it; else sets it. One transaction.
    fn txn(&mut self, key: Bytes, value: Bytes) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Starts a watch on a stream of its own and waits until it is in place.
    fn watch(&mut self, from: WatchFrom) -> impl Future<Output = Result<Self::Watch, Failure>> + Send;

    /// Grants a lease of `ttl_s` seconds and opens a stream that keeps it.
    fn lease(&mut self, ttl_s: i64) -> impl Future<Output = Result<Self::Lease, Failure>> + Send;
}

/// A watch that is in place.
pub trait Watch: Send + 'static {
    /// Waits for changes and shows the value of each; a deletion's is empty.
    fn next(
        &mut self,
        each: &mut (dyn FnMut(&[u8]) + Send),
    ) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// A lease that is granted.
pub trait Lease: Send + 'static {
    /// Renews it once and waits for the answer. A lease that is gone is a failure.
    fn keep(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
}

#[cfg(test)]
mod tests;
