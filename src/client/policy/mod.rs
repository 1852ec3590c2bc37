//! How a client meets trouble: the options, and the state that all its calls
//! share. The order, from the outside in:
//!
//! 1. the gate: limits on what is in flight and on the rate, by priority;
//! 2. the deadline, which covers everything from the gate on and travels with
//!    each attempt as what is left of it;
//! 3. the request id of a write;
//! 4. attempts, each at an endpoint that this call has not failed at, with a
//!    limit of its own if the call may be repeated in doubt, and hedged if that
//!    is on and the call is a read;
//! 5. between attempts the budget and the backoff, or the wait that the server
//!    asked for.
//!
//! Breakers are not here but with the endpoints that they stand before.

mod gate;
mod ids;
mod options;

pub use options::{HedgeDelay, PolicyOptions, RequestIds};

pub(super) use gate::CallGate;
pub(super) use ids::{Ids, OpenSession, Unopened, WriteId};

use std::time::Duration;

use parking_lot::Mutex;

use crate::env::EnvRef;
use crate::resilience::{Backoff, BackoffKind, Budget, Latency};
use crate::telemetry;

/// What the attempts of all calls have taught.
pub(super) struct Experience {
    lessons: Mutex<Lessons>,
    is_adaptive: bool,
    env: EnvRef,
}

struct Lessons {
    budget: Budget,
    latency: Latency,
    /// For the adaptive kind, which looks at all calls; others begin anew with each.
    backoff: Backoff,
}

impl Experience {
    pub fn new(options: &PolicyOptions, env: &EnvRef) -> Experience {
        let lessons = Lessons {
            budget: Budget::new(options.budget),
            latency: Latency::new(),
            backoff: Backoff::new(options.backoff),
        };
        let is_adaptive = options.backoff.kind == BackoffKind::Adaptive;
        Experience { lessons: Mutex::new(lessons), is_adaptive, env: env.clone() }
    }

    /// An attempt worked; `time` if it tells how long such calls take.
    pub fn worked(&self, time: Option<Duration>) {
        let mut lessons = self.lessons.lock();
        lessons.budget.on_success();
        lessons.backoff.reset();
        if let Some(time) = time {
            lessons.latency.record(time);
        }
    }

    /// An attempt failed in a way that another might mend; whether the budget
    /// has one.
    pub fn failed(&self) -> bool {
        let mut lessons = self.lessons.lock();
        let allowed = lessons.budget.on_failure();
        metrics::gauge!(telemetry::CLIENT_BUDGET_TOKENS).set(f64::from(lessons.budget.milli_tokens()) / 1e3);
        allowed
    }

    /// The wait before the next attempt of the call whose own backoff is `own`.
    pub fn next_wait(&self, own: &mut Backoff) -> Duration {
        let random = self.env.random_u64();
        let wait = own.next_wait(random);
        match self.is_adaptive {
            true => self.lessons.lock().backoff.next_wait(random),
            false => wait,
        }
    }

    /// How long a read may take before a second one is sent; `None` while too
    /// little is known.
    pub fn hedge_delay(&self, delay: HedgeDelay) -> Option<Duration> {
        match delay {
            HedgeDelay::Fixed(delay) => Some(delay),
            HedgeDelay::Percentile(percent) => self.lessons.lock().latency.percentile(percent),
        }
    }

    /// Pays for a second read; whether the budget has it.
    pub fn pay_for_hedge(&self) -> bool {
        self.lessons.lock().budget.spend()
    }
}
