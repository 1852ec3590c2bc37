//! A limit on calls a second, of either kind.

use std::time::Duration;

use super::{SlidingWindow, TokenBucket};

/// How many calls a second, and in which manner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateLimitOptions {
    /// Evenly, with bursts.
    TokenBucket {
        /// Calls a second in the long run; at least 1.
        per_second: u32,
        /// Calls at once after a pause; at least 1.
        burst: u32,
    },
    /// Never more than so many in any stretch of time.
    SlidingWindow {
        /// Calls in one stretch; from 1 to 1,000,000, at 16 bytes each.
        calls_max: u32,
        /// The length of the stretch; not zero.
        window: Duration,
    },
}

/// A running limit.
#[derive(Clone, Debug)]
pub enum RateLimit {
    /// Evenly, with bursts.
    TokenBucket(TokenBucket),
    /// Never more than so many in any stretch of time.
    SlidingWindow(SlidingWindow),
}

impl RateLimit {
    /// A limit that nothing has been taken from.
    pub fn new(options: RateLimitOptions) -> RateLimit {
        match options {
            RateLimitOptions::TokenBucket { per_second, burst } => {
                RateLimit::TokenBucket(TokenBucket::new(per_second, burst))
            }
            RateLimitOptions::SlidingWindow { calls_max, window } => {
                RateLimit::SlidingWindow(SlidingWindow::new(calls_max, window))
            }
        }
    }

    /// Makes a call at `now`.
    ///
    /// # Errors
    /// How long until one may be made.
    pub fn take(&mut self, now: Duration) -> Result<(), Duration> {
        match self {
            RateLimit::TokenBucket(bucket) => bucket.take(now),
            RateLimit::SlidingWindow(window) => window.take(now),
        }
    }

    /// How long until `count` calls more could have been made, at the least.
    pub fn wait_for(&self, now: Duration, count: u32) -> Duration {
        match self {
            RateLimit::TokenBucket(bucket) => bucket.wait_for(now, count),
            RateLimit::SlidingWindow(window) => window.wait_for(now, count),
        }
    }
}
