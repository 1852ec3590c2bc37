//! The load that is measured: puts of 256 bytes over 10,000 keys, in an order that looks like chance and is
//! the same in every run.

use bytes::Bytes;
use mainstay::types::{
    Command, Compare, CompareOp, CompareTarget, KeyRange, KeyValue, LeaseId, Operation, Put, RangeQuery,
    Revision, Space, Txn, TxnOp,
};

/// Keys written to.
pub const KEYS: u64 = 10_000;
/// Bytes of each value.
pub const VALUE_BYTES: usize = 256;

/// An endless sequence of keys. `KEYS` consecutive ones are all different.
#[derive(Default)]
pub struct Keys {
    drawn: u64,
}

impl Iterator for Keys {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        // A step without a factor in common with their number visits all of them.
        let number = self.drawn * 7_919 % KEYS;
        self.drawn += 1;
        Some(format!("bench/{number:08}").into())
    }
}

/// A put as it stands in the log.
pub fn command(key: Bytes) -> Command {
    Command::internal(Operation::Put(put(key)))
}

/// A transaction as it stands in the log: if the key exists, set it and read it.
pub fn transaction(key: Bytes) -> Command {
    let range = KeyRange::Single(key.clone());
    let (space, target) = (Space::User, CompareTarget::Version(0));
    let compare = vec![Compare { space, range: range.clone(), op: CompareOp::Greater, target }];
    let success = vec![TxnOp::Put(put(key)), TxnOp::Range(RangeQuery::all(space, range))];
    Command::internal(Operation::Txn(Txn { compare, success, failure: Vec::new() }))
}

fn put(key: Bytes) -> Put {
    Put {
        space: Space::User,
        key,
        value: vec![b'v'; VALUE_BYTES].into(),
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    }
}

/// A key as it stands after its second put.
pub fn key_value(key: Bytes, revision: Revision) -> KeyValue {
    KeyValue {
        key,
        create_revision: Revision(2),
        mod_revision: revision,
        version: 2,
        lease: LeaseId::NONE,
        value: vec![b'v'; VALUE_BYTES].into(),
    }
}
