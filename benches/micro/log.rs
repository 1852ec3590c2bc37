//! The log store: appending with its sync, and reading back. The disk under `TMPDIR` decides the former.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use bytes::Bytes;
use criterion::{Criterion, Throughput};
use mainstay::env::SystemEnv;
use mainstay::storage::log::{LogEngine as _, LogOp, SegmentLog, SegmentLogOptions};
use tempfile::TempDir;

/// Bytes of one record: a put of 256 bytes in its envelopes.
const RECORD_BYTES: usize = 320;

/// A log and where it ends.
struct Log {
    log: SegmentLog,
    next: u64,
    record: Bytes,
    _dir: TempDir,
}

impl Log {
    fn new() -> Log {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let fatal = Arc::new(|error: &_| panic!("the log failed: {error}"));
        let log = SegmentLog::open(dir.path(), &SegmentLogOptions::default(), SystemEnv::shared(), fatal);
        Log { log: log.expect("a new log opens"), next: 0, record: vec![7; RECORD_BYTES].into(), _dir: dir }
    }

    /// Appends, and returns when it is durable.
    fn append(&mut self, records: u64) {
        let (done, durable) = sync_channel(1);
        let indexes = self.next..self.next + records;
        self.next = indexes.end;
        self.log.submit(LogOp::Append {
            records: indexes.map(|index| (index, self.record.clone())).collect(),
            done: Box::new(move |result| done.send(result).expect("who appends waits")),
        });
        durable.recv().expect("every append is answered").expect("the log is written");
    }
}

/// Times of appends of one record and of many, and of a read.
pub fn times(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log");
    let mut log = Log::new();
    for records in [1, 64] {
        group.throughput(Throughput::Elements(records));
        group.bench_function(format!("append-and-sync/{records}"), |bencher| {
            bencher.iter(|| log.append(records));
        });
    }
    log.append(64);
    let newest = log.next - 64..log.next;
    group.throughput(Throughput::Elements(64));
    group.bench_function("read/64", |bencher| {
        bencher.iter(|| log.log.read(newest.clone(), usize::MAX).expect("what was appended can be read"));
    });
}
