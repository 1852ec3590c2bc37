//! What keeps trouble at one endpoint from spreading: backoffs, breakers, retry
//! budgets, limits on rates and on what is in flight, and a gate with priorities.
//!
//! Each is a small value that its owner feeds with the time and with chance;
//! none of them waits, calls or logs. Time is [`crate::env::Env::monotonic`],
//! chance is [`crate::env::Env::random_u64`], so that a simulation sees the
//! same decisions from the same seed. Rate limits are among them, and not a
//! crate's, for that reason: a crate's clock is its own, and its quotas are
//! fixed when they are made.

mod adaptive_limit;
mod backoff;
mod breaker;
mod budget;
mod gate;
mod latency;
mod rate_limit;
mod sliding_window;
mod token_bucket;
mod window;

pub use adaptive_limit::{AdaptiveLimit, AdaptiveLimitOptions};
pub use backoff::{Backoff, BackoffKind, BackoffOptions};
pub use breaker::{Admission, Breaker, BreakerOptions, BreakerRatio, BreakerState};
pub use budget::{Budget, BudgetOptions};
pub use gate::{Entry, Gate, GateRefusal, Priority, Ticket};
pub use latency::Latency;
pub use rate_limit::{RateLimit, RateLimitOptions};
pub use sliding_window::SlidingWindow;
pub use token_bucket::TokenBucket;
