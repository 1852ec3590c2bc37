//! The codec: what a put is as a command, as the newest record and as a change, to bytes and back.

use std::hint::black_box;

use bytes::Bytes;
use criterion::Criterion;
use mainstay::storage::codec::{decode, encode};
use mainstay::storage::layout::{Change, Record};
use mainstay::types::{Command, EventKind, LeaseId, Revision, Space};

use super::counts::Workload;
use super::puts::{self, VALUE_BYTES};

/// Everything that is encoded and decoded for one put.
pub const WORKLOAD: Workload = Workload { name: "codec", operation: "round trip of a put", prepare: counted };

/// The values that one put becomes.
struct Values {
    command: Command,
    record: Record,
    change: Change,
}

impl Values {
    fn new() -> Values {
        let key = Bytes::from_static(b"bench/00001234");
        let record = Record {
            create: Revision(2),
            modified: Revision(123_456),
            version: 12,
            lease: LeaseId::NONE,
            value: vec![b'v'; VALUE_BYTES].into(),
        };
        let change = Change {
            space: Space::User,
            kind: EventKind::Put,
            key: key.clone(),
            record: Some(record.clone()),
            actor: None,
            time_ms: 1_800_000_000_000,
        };
        Values { command: puts::command(key), record, change }
    }

    fn round_trip(&self) {
        black_box(
            decode::<Command>("command", &encode(black_box(&self.command))).expect("it was just encoded"),
        );
        black_box(
            decode::<Record>("current", &encode(black_box(&self.record))).expect("it was just encoded"),
        );
        black_box(
            decode::<Change>("history", &encode(black_box(&self.change))).expect("it was just encoded"),
        );
    }
}

fn counted() -> Box<dyn FnMut() -> u64> {
    const ROUND_TRIPS: u64 = 1_000;
    let values = Values::new();
    Box::new(move || {
        (0..ROUND_TRIPS).for_each(|_| values.round_trip());
        ROUND_TRIPS
    })
}

/// Times of each direction, and of all of it.
pub fn times(criterion: &mut Criterion) {
    let values = Values::new();
    let encoded = encode(&values.command);
    let mut group = criterion.benchmark_group("codec");
    group.bench_function("command/encode", |bencher| bencher.iter(|| encode(black_box(&values.command))));
    group.bench_function("command/decode", |bencher| {
        bencher.iter(|| decode::<Command>("command", black_box(&encoded)).expect("it was just encoded"));
    });
    group.bench_function("put/round-trip", |bencher| bencher.iter(|| values.round_trip()));
}
