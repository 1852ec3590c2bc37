//! Clients at work: one operation after the other, as fast as they come or at a fixed rate.
//!
//! At a fixed rate, an operation's latency begins when it was due, not when a client got to it: a
//! store that stands still for a second is seen to have stood still for everything due in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Failure, Outcome, Tally};

/// A client that has failed waits this long, so that a store that is gone is not called in a circle.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(10);
/// What a timer may be late by: its own grain, which is no latency of the store.
const TIMER_GRAIN: Duration = Duration::from_millis(2);

/// What one client does over and over.
pub trait Work: Send + 'static {
    /// Does it once.
    fn once(&mut self) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// When to end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Until {
    /// After this time; what is under way then is waited for.
    Time(Duration),
    /// After this many operations, whether they succeed or fail.
    Ops(u64),
}

/// How often, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Operations per second over all clients; as many as they can when left out.
    pub rate: Option<f64>,
    /// When to end.
    pub until: Until,
}

impl Plan {
    /// As many as the clients can, for this time.
    pub fn for_time(time: Duration) -> Plan {
        Plan { rate: None, until: Until::Time(time) }
    }
}

/// The turns that clients take, in the order in which they are due.
#[derive(Debug)]
struct Turns {
    plan: Plan,
    start: Instant,
    next: AtomicU64,
}

impl Turns {
    /// The time from which the next operation counts, waited for. `None` when it is over.
    async fn take(&self) -> Option<Instant> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let over = |at: Instant| match self.plan.until {
            Until::Time(time) => at >= self.start + time,
            Until::Ops(ops) => number >= ops,
        };
        let now = Instant::now();
        if over(now) {
            return None;
        }
        let Some(rate) = self.plan.rate else { return Some(now) };
        let due = self.start + Duration::from_secs_f64(number as f64 / rate);
        if over(due) {
            return None;
        }
        if due <= now {
            return Some(due);
        }
        sleep_until(due).await;
        let now = Instant::now();
        Some(if now - due <= TIMER_GRAIN { now } else { due })
    }

    /// How many operations should have been begun by the end and were not.
    fn late(&self, begun: u64) -> u64 {
        match (self.plan.rate, self.plan.until) {
            (Some(rate), Until::Time(time)) => {
                ((rate * time.as_secs_f64()).floor() as u64).saturating_sub(begun)
            }
            _ => 0,
        }
    }
}

/// Has every worker work by the plan, counted by `tally`. Returns what came of it and the workers, for
/// another time.
pub async fn drive<W: Work>(workers: Vec<W>, plan: &Plan, tally: &Arc<Tally>) -> (Outcome, Vec<W>) {
    let turns = Arc::new(Turns { plan: *plan, start: Instant::now(), next: AtomicU64::new(0) });
    let mut tasks = JoinSet::new();
    for (number, mut worker) in workers.into_iter().enumerate() {
        let (turns, tally) = (turns.clone(), tally.clone());
        tasks.spawn(async move {
            while let Some(since) = turns.take().await {
                match worker.once().await {
                    Ok(()) => tally.succeeded(number, since.elapsed()),
                    Err(failure) => {
                        tally.failed(&failure);
                        sleep(PAUSE_AFTER_FAILURE).await;
                    }
                }
            }
            worker
        });
    }
    let workers = tasks.join_all().await;
    let mut outcome = tally.take(turns.start.elapsed());
    outcome.late = turns.late(outcome.ops() + outcome.errors());
    (outcome, workers)
}
