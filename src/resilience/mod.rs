//! What keeps trouble at one endpoint from spreading: a breaker, a backoff and a
//! retry budget.
//!
//! Each is a small value that its owner feeds with the time and with chance;
//! none of them waits, calls or logs. Time is [`crate::env::Env::monotonic`],
//! chance is [`crate::env::Env::random_u64`], so that a simulation sees the
//! same decisions from the same seed.

mod backoff;
mod breaker;
mod budget;

pub use backoff::{Backoff, BackoffOptions};
pub use breaker::{Admission, Breaker, BreakerOptions, BreakerState};
pub use budget::{Budget, BudgetOptions};
