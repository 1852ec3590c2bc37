//! What everyone in a run shares: the hosts, the clock, the recorder, the stop
//! sign.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::hosts::Hosts;
use crate::judge::history::{FaultRecord, History, Op, Revision, WatchStream};

/// One run, as everyone in it sees it.
pub struct Context {
    pub seed: u64,
    pub hosts: Hosts,
    /// Calls per second that each workload aims at, over all of its clients.
    pub rate: u32,
    /// Cancelled when workloads shall stop driving.
    stop: CancellationToken,
    began: Instant,
    process_next: AtomicU64,
    history: Mutex<History>,
    /// Up to where the full history is recorded.
    recorded: Mutex<Option<watch::Receiver<Option<Revision>>>>,
}

impl Context {
    pub fn new(seed: u64, hosts: Hosts, rate: u32) -> Context {
        Context {
            seed,
            hosts,
            rate,
            stop: CancellationToken::new(),
            began: Instant::now(),
            process_next: AtomicU64::new(0),
            history: Mutex::new(History { seed, ..History::default() }),
            recorded: Mutex::new(None),
        }
    }

    /// Nanoseconds since the run began.
    pub fn now_ns(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    /// A process number that nobody else has.
    pub fn process(&self) -> u64 {
        self.process_next.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether workloads shall stop.
    pub fn stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Tells workloads to stop.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Sleeps, but not beyond the stop sign.
    pub async fn sleep(&self, time: Duration) {
        let _ = tokio::time::timeout(time, self.stop.cancelled()).await;
    }

    /// Follows how far the full history is recorded.
    pub fn follow_recorded(&self, position: watch::Receiver<Option<Revision>>) {
        *self.recorded.lock().expect("no recorder panics") = Some(position);
    }

    /// Up to where every change is recorded. Whoever compacts must not go beyond, or nobody can tell
    /// afterwards what the store did there.
    pub fn recorded(&self) -> Revision {
        let recorded = self.recorded.lock().expect("no recorder panics");
        recorded.as_ref().and_then(|position| *position.borrow()).unwrap_or(0)
    }

    pub fn record(&self, op: Op) {
        self.history.lock().expect("no recorder panics").ops.push(op);
    }

    pub fn record_watch(&self, stream: WatchStream) {
        self.history.lock().expect("no recorder panics").watches.push(stream);
    }

    pub fn record_fault(&self, fault: FaultRecord) {
        self.history.lock().expect("no recorder panics").faults.push(fault);
    }

    /// What was recorded until now, calls in the order of their invocation.
    pub fn history(&self) -> History {
        let mut history = self.history.lock().expect("no recorder panics").clone();
        history.ops.sort_by_key(|op| op.invoked_ns);
        history
    }
}
