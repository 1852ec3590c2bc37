//! Applying chunks of puts: from encoded commands to a published view.

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use mainstay::machine::{Entry, Machine, Payload};
use mainstay::storage::layout::LogPosition;
use mainstay::storage::{StateDb, StateOptions, codec};
use mainstay::types::Command;
use tempfile::TempDir;

use super::counts::Workload;
use super::puts::{self, KEYS, Keys};

/// Entries of a chunk, about as many as 256 clients bring together.
const CHUNK: u64 = 64;

/// One put in a chunk of 64, to a key that exists.
pub const PUT: Workload =
    Workload { name: "apply", operation: "put, in a chunk of 64", prepare: counted_put };

/// One transaction in a chunk of 64: compare a key's version, set it, read it.
pub const TXN: Workload =
    Workload { name: "txn", operation: "compare, put and get, in a chunk of 64", prepare: counted_txn };

/// A state machine with all keys in it.
struct Apply {
    machine: Machine,
    _dir: TempDir,
}

impl Apply {
    fn new(log: &mut Log) -> Apply {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let db = StateDb::open(dir.path(), &StateOptions::default()).expect("a new database opens");
        let machine = Machine::open(db).expect("a new database can be read");
        let mut apply = Apply { machine, _dir: dir };
        for _ in 0..KEYS.div_ceil(CHUNK) {
            apply.apply(log.chunk(CHUNK));
        }
        apply
    }

    /// Forgets what the machine remembers beside its database.
    fn reopen(&mut self) {
        let db = self.machine.db().clone();
        self.machine.replace(db).expect("the database can be read again");
    }

    fn apply(&mut self, entries: Vec<Entry>) {
        let replies = self.machine.apply(entries).expect("a put is applied");
        assert!(replies.iter().all(|reply| reply.outcome.is_ok()), "a put was refused");
    }
}

/// Where entries come from.
struct Log {
    last: u64,
    keys: Keys,
    command: fn(Bytes) -> Command,
}

impl Log {
    fn of(command: fn(Bytes) -> Command) -> Log {
        Log { last: 0, keys: Keys::default(), command }
    }

    fn chunk(&mut self, entries: u64) -> Vec<Entry> {
        (0..entries).map(|_| self.entry()).collect()
    }

    fn entry(&mut self) -> Entry {
        self.last += 1;
        let key = self.keys.next().expect("the sequence is endless");
        Entry {
            position: LogPosition { term: 1, node: 1, index: self.last },
            time_ms: self.last,
            payload: Payload::Command(codec::encode(&(self.command)(key)).into()),
        }
    }
}

/// As when puts go on for long: the machine remembers most of the keys, and looks every fourth up.
fn counted_put() -> Box<dyn FnMut() -> u64> {
    counted(puts::command)
}

fn counted_txn() -> Box<dyn FnMut() -> u64> {
    counted(puts::transaction)
}

fn counted(command: fn(Bytes) -> Command) -> Box<dyn FnMut() -> u64> {
    const CHUNKS: u64 = 40;
    let mut log = Log::of(puts::command);
    let mut apply = Apply::new(&mut log);
    apply.reopen();
    let counted = CHUNKS * CHUNK;
    for _ in 0..(KEYS - counted / 4) / CHUNK {
        apply.apply(log.chunk(CHUNK));
    }
    log.command = command;
    let mut chunks: Vec<_> = (0..CHUNKS).map(|_| log.chunk(CHUNK)).collect();
    Box::new(move || {
        for chunk in std::mem::take(&mut chunks) {
            apply.apply(chunk);
        }
        counted
    })
}

/// Times of chunks of several sizes.
pub fn times(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply");
    for entries in [1, CHUNK, 1024] {
        let mut log = Log::of(puts::command);
        let mut apply = Apply::new(&mut log);
        group.throughput(Throughput::Elements(entries));
        group.bench_function(format!("puts/{entries}"), |bencher| {
            bencher.iter_batched(|| log.chunk(entries), |chunk| apply.apply(chunk), BatchSize::SmallInput);
        });
    }
}
