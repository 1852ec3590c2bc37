//! The hub: from published changes to the messages of every watcher, each on a stream of its own. One thread,
//! and a clock that stands still.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{BatchSize, Criterion, Throughput};
use mainstay::machine::Machine;
use mainstay::mvcc::{Published, View};
use mainstay::storage::{StateDb, StateOptions};
use mainstay::types::{Event, EventKind, KeyRange, Revision, RevisionEvents, Space};
use mainstay::watch::{Hub, HubOptions, WatchMessageKind, WatchSpec, WatchStream};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::Notify;

use super::counts::Workload;
use super::puts::{self, Keys};

/// Revisions published together, as one applied chunk.
const CHUNK: u64 = 64;

/// One event on its way to one of 1,000 watchers.
pub const WORKLOAD: Workload =
    Workload { name: "watch", operation: "event, to each of 1,000 watchers", prepare: counted };

/// Watchers of one prefix.
struct FanOut {
    runtime: Runtime,
    hub: Arc<Hub>,
    view: Arc<View>,
    revision: Revision,
    keys: Keys,
    watchers: u64,
    delivered: Arc<Delivered>,
    _dir: TempDir,
}

/// Counts what the streams have said.
#[derive(Default)]
struct Delivered {
    events: AtomicU64,
    /// The count that somebody waits for.
    wanted: AtomicU64,
    reached: Notify,
}

impl FanOut {
    fn new(watchers: u64) -> FanOut {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let db = StateDb::open(dir.path(), &StateOptions::default()).expect("a new database opens");
        let published: Arc<Published> = Machine::open(db).expect("a new database can be read").published();
        let view = published.view();
        let hub = Hub::new(published, HubOptions::default());
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().start_paused(true).build().expect("a runtime starts");
        let delivered = Arc::new(Delivered::default());
        runtime.spawn(hub.clone().run());
        let range = KeyRange::prefix("bench/".into());
        for _ in 0..watchers {
            let mut stream = hub.stream();
            let spec = WatchSpec::new(Space::User, range.clone(), Revision(0));
            stream.create(None, spec).expect("the range has keys");
            runtime.spawn(listen(stream, delivered.clone()));
        }
        let revision = view.revision;
        FanOut { runtime, hub, view, revision, keys: Keys::default(), watchers, delivered, _dir: dir }
    }

    /// The next changes.
    fn chunk(&mut self) -> Vec<Arc<RevisionEvents>> {
        let make = |key| {
            self.revision = self.revision.next();
            let kv = puts::key_value(key, self.revision);
            let event = Event { space: Space::User, kind: EventKind::Put, kv, prev: None };
            Arc::new(RevisionEvents { revision: self.revision, events: vec![Arc::new(event)] })
        };
        self.keys.by_ref().take(CHUNK as usize).map(make).collect()
    }
}

/// Publishes, and returns when every watcher has been sent everything.
fn deliver(fan_out: &FanOut, chunk: Vec<Arc<RevisionEvents>>) {
    let delivered = &fan_out.delivered;
    delivered.wanted.fetch_add(chunk.len() as u64 * fan_out.watchers, Ordering::Relaxed);
    fan_out.hub.publish(&fan_out.view, chunk);
    fan_out.runtime.block_on(delivered.reached.notified());
}

/// Takes a stream's messages, as the task of a connection would.
async fn listen(mut stream: WatchStream, delivered: Arc<Delivered>) {
    while let Some(message) = stream.next().await {
        if let WatchMessageKind::Events { events, .. } = message.kind {
            let count = events.len() as u64;
            let before = delivered.events.fetch_add(count, Ordering::Relaxed);
            if before + count == delivered.wanted.load(Ordering::Relaxed) {
                delivered.reached.notify_one();
            }
        }
    }
}

fn counted() -> Box<dyn FnMut() -> u64> {
    let mut fan_out = FanOut::new(1_000);
    // Once before, so that the lists have the size that they keep.
    let chunk = fan_out.chunk();
    deliver(&fan_out, chunk);
    let mut chunk = fan_out.chunk();
    Box::new(move || {
        deliver(&fan_out, std::mem::take(&mut chunk));
        CHUNK * fan_out.watchers
    })
}

/// Times of a chunk on its way to few and to many.
pub fn times(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("watch");
    for watchers in [1, 100, 1_000] {
        let fan_out = std::cell::RefCell::new(FanOut::new(watchers));
        group.throughput(Throughput::Elements(CHUNK * watchers));
        group.bench_function(format!("fan-out/{watchers}"), |bencher| {
            let (next, run) = (|| fan_out.borrow_mut().chunk(), |chunk| deliver(&fan_out.borrow(), chunk));
            bencher.iter_batched(next, run, BatchSize::PerIteration);
        });
    }
}
