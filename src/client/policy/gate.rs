//! The gate that calls wait at: [`Gate`] with wakers and timers. What it lets
//! through holds a [`Permit`] until it is done.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::PolicyOptions;
use crate::client::ClientError;
use crate::env::EnvRef;
use crate::resilience::{AdaptiveLimit, Entry, Gate, GateRefusal, Priority, RateLimit, Ticket};
use crate::telemetry;

/// While both limits hold a waiter back, it looks again this often at the least.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Why a call that waited was refused.
const LATE: &str = "its turn did not come in time";

/// The gate of one client.
pub(in crate::client) struct CallGate {
    state: Mutex<State>,
    env: EnvRef,
}

struct State {
    gate: Gate<oneshot::Sender<Permit>>,
    adaptive: Option<AdaptiveLimit>,
}

/// The right to be in flight.
pub(in crate::client) struct Permit {
    gate: Arc<CallGate>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.state.lock().gate.leave();
        self.gate.serve();
    }
}

/// Takes a waiter out of the queue when it is not waited for any more.
struct Waiting<'a> {
    gate: &'a CallGate,
    ticket: Ticket,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.gate.state.lock().gate.give_up(self.ticket);
    }
}

impl CallGate {
    pub fn new(options: &PolicyOptions, env: &EnvRef) -> Arc<CallGate> {
        let adaptive = options.adaptive.map(|mut adaptive| {
            adaptive.limit_max = adaptive.limit_max.min(options.in_flight_max);
            adaptive.limit_min = adaptive.limit_min.min(adaptive.limit_max);
            AdaptiveLimit::new(adaptive)
        });
        let limit = adaptive.as_ref().map_or(options.in_flight_max, AdaptiveLimit::limit) as usize;
        let gate = Gate::new(limit, options.queue_max as usize, options.rate.map(RateLimit::new));
        Arc::new(CallGate { state: Mutex::new(State { gate, adaptive }), env: env.clone() })
    }

    /// Waits for its turn, until `deadline` at the latest.
    ///
    /// # Errors
    /// [`ClientError::Overloaded`] when there is no turn for it.
    pub async fn enter(
        self: &Arc<CallGate>,
        priority: Priority,
        deadline: Duration,
    ) -> Result<Permit, ClientError> {
        let began = self.env.monotonic();
        let (sender, mut admitted) = oneshot::channel();
        let entry = self.state.lock().gate.enter(priority, Some(deadline), began, sender);
        let ticket = match entry {
            Ok(Entry::Admitted) => return Ok(Permit { gate: self.clone() }),
            // Dropping the evicted one's sender tells it.
            Ok(Entry::Queued { ticket, evicted: _ }) => ticket,
            Err(GateRefusal::Full) => return Err(refused(priority, "too many calls wait already")),
            Err(GateRefusal::TooLate) => return Err(refused(priority, "its turn would come too late")),
        };
        let _waiting = Waiting { gate: self, ticket };
        self.serve();
        loop {
            let now = self.env.monotonic();
            let rate_wait = self.state.lock().gate.rate_wait(ticket, now).map(|wait| wait.max(LOOK_AGAIN));
            let left = deadline.saturating_sub(now);
            tokio::select! {
                biased;
                permit = &mut admitted => {
                    let now = self.env.monotonic();
                    let Ok(permit) = permit else {
                        let late = now > deadline;
                        let why = if late { LATE } else { "a more urgent call took its place" };
                        return Err(refused(priority, why));
                    };
                    let waited = now.saturating_sub(began);
                    metrics::histogram!(telemetry::CLIENT_GATE_WAIT_SECONDS, "priority" => priority.name())
                        .record(waited);
                    return Ok(permit);
                }
                () = tokio::time::sleep(rate_wait.unwrap_or(left).min(left)) => {
                    if left.is_zero() {
                        return Err(refused(priority, LATE));
                    }
                    self.serve();
                }
            }
        }
    }

    /// A call worked.
    pub fn worked(&self) {
        let mut state = self.state.lock();
        let in_flight = state.gate.in_flight();
        if let Some(adaptive) = &mut state.adaptive {
            adaptive.on_success(in_flight);
            let limit = adaptive.limit() as usize;
            state.gate.set_limit(limit);
        }
    }

    /// The server said that it is too much.
    pub fn pushed_back(&self) {
        let now = self.env.monotonic();
        let mut state = self.state.lock();
        if let Some(adaptive) = &mut state.adaptive {
            adaptive.on_pushback(now);
            let limit = adaptive.limit();
            state.gate.set_limit(limit as usize);
            metrics::gauge!(telemetry::CLIENT_IN_FLIGHT_LIMIT).set(f64::from(limit));
        }
    }

    /// The calls that may be in flight.
    #[cfg(test)]
    pub fn limit(&self) -> u32 {
        self.state.lock().adaptive.as_ref().map_or(u32::MAX, AdaptiveLimit::limit)
    }

    /// Lets go whoever may. The permits are handed over outside the lock: one
    /// that nobody takes comes back through its drop.
    fn serve(self: &Arc<CallGate>) {
        let now = self.env.monotonic();
        let mut admitted = Vec::new();
        {
            let mut state = self.state.lock();
            while let Some(waiter) = state.gate.next(now) {
                admitted.push(waiter);
            }
        }
        for waiter in admitted {
            let _ = waiter.send(Permit { gate: self.clone() });
        }
    }
}

fn refused(priority: Priority, reason: &'static str) -> ClientError {
    metrics::counter!(telemetry::CLIENT_GATE_REFUSED, "priority" => priority.name()).increment(1);
    ClientError::Overloaded { reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::SystemEnv;
    use crate::resilience::{AdaptiveLimitOptions, RateLimitOptions};

    const MS: Duration = Duration::from_millis(1);

    fn gate(options: PolicyOptions) -> (Arc<CallGate>, EnvRef) {
        let env = SystemEnv::shared();
        (CallGate::new(&options, &env), env)
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_goes_when_another_is_done() {
        let (gate, env) = gate(PolicyOptions { in_flight_max: 1, ..PolicyOptions::default() });
        let first = gate.enter(Priority::Normal, MS * 1_000).await.expect("it is empty");
        let waiter = {
            let gate = gate.clone();
            tokio::spawn(async move { gate.enter(Priority::Normal, MS * 1_000).await.map(|_| ()) })
        };
        tokio::time::sleep(MS * 300).await;
        assert!(!waiter.is_finished());
        drop(first);
        waiter.await.expect("no panic").expect("its turn");
        assert_eq!(env.monotonic(), MS * 300);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_the_deadline_and_leaves_no_trace() {
        let (gate, env) = gate(PolicyOptions { in_flight_max: 1, queue_max: 1, ..PolicyOptions::default() });
        let _first = gate.enter(Priority::Normal, MS * 10_000).await.expect("it is empty");
        for _ in 0..3 {
            let before = env.monotonic();
            let late = gate.enter(Priority::Normal, before + MS * 50).await;
            assert!(matches!(late, Err(ClientError::Overloaded { .. })));
            assert!(env.monotonic() - before >= MS * 50, "it waited, so it had a place");
        }
        let cancelled = tokio::time::timeout(MS, gate.enter(Priority::Normal, MS * 10_000)).await;
        assert!(cancelled.is_err());
        assert_eq!(gate.state.lock().gate.queued(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_lets_waiters_go_one_after_the_other() {
        let rate = RateLimitOptions::TokenBucket { per_second: 20, burst: 1 };
        let (gate, env) = gate(PolicyOptions { rate: Some(rate), ..PolicyOptions::default() });
        let callers = (0..11).map(|_| {
            let gate = gate.clone();
            tokio::spawn(async move { gate.enter(Priority::Normal, MS * 10_000).await.map(drop) })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.expect("no panic").expect("its turn");
        }
        let took = env.monotonic();
        assert!(took >= MS * 500 && took < MS * 600, "{took:?}");
    }

    /// Both limits at once: whoever is held back by one must not miss the other.
    #[tokio::test(start_paused = true)]
    async fn rate_and_limit_together_lose_no_waiter() {
        let rate = RateLimitOptions::SlidingWindow { calls_max: 3, window: MS * 100 };
        let (gate, _) =
            gate(PolicyOptions { rate: Some(rate), in_flight_max: 2, ..PolicyOptions::default() });
        let callers = (0..30).map(|call| {
            let gate = gate.clone();
            tokio::spawn(async move {
                let _permit = gate.enter(Priority::ALL[call % 4], MS * 10_000).await?;
                tokio::time::sleep(MS * (call as u32 % 7) * 11).await;
                Ok::<(), ClientError>(())
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.expect("no panic").expect("its turn");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pushback_leaves_less_in_flight() {
        let adaptive = AdaptiveLimitOptions { limit_min: 1, limit_max: 4, ..AdaptiveLimitOptions::default() };
        let (gate, _) = gate(PolicyOptions { adaptive: Some(adaptive), ..PolicyOptions::default() });
        gate.pushed_back();
        let _one = gate.enter(Priority::Normal, MS * 100).await.expect("a turn");
        let _two = gate.enter(Priority::Normal, MS * 100).await.expect("a turn");
        assert!(gate.enter(Priority::Normal, MS * 100).await.is_err(), "70 % of 4 is 2");
    }
}
