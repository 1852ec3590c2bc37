//! What can be chosen about a client's calls.

use std::time::Duration;

use crate::client::ClientError;
use crate::resilience::{AdaptiveLimitOptions, BackoffOptions, BudgetOptions, RateLimitOptions};

/// How a client meets trouble. See each field for its unit and range; what is
/// out of range is refused when the client is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyOptions {
    /// How long one call may take, all attempts and waits together; from 1 ms.
    /// Streams and waiting for a lock or an election have no limit. 10 s.
    pub request_timeout: Duration,
    /// How long the first attempt of a call may take, if it is safe to repeat;
    /// each further one may take twice as long. From 1 ms. 3 s.
    pub attempt_timeout: Duration,
    /// How many attempts a call has at most, from 1 to 100. 8.
    pub attempts_max: u32,
    /// The waits between attempts; `base` is not zero and not above `cap`.
    pub backoff: BackoffOptions,
    /// When to stop trying again because too much fails; what never left, because
    /// there was no connection, does not count. At least 1,000 thousandths. By
    /// default about one call in five may be a retry, and a burst of 250.
    pub budget: BudgetOptions,
    /// Whether a read that takes long is sent to a second endpoint as well, and
    /// after how long. Off.
    pub hedge: Option<HedgeDelay>,
    /// Calls in flight, from 1. 1,024.
    pub in_flight_max: u32,
    /// Calls that wait for their turn; beyond it they are refused. 4,096.
    pub queue_max: u32,
    /// How many calls may begin in a time. No limit.
    pub rate: Option<RateLimitOptions>,
    /// Whether calls in flight are fewer while the server says that it is too
    /// much; `limit_max` is no more than `in_flight_max`. On.
    pub adaptive: Option<AdaptiveLimitOptions>,
    /// Whether writes carry request ids, so that they may be repeated in doubt.
    pub request_ids: RequestIds,
    /// How long the server remembers the writes of a client that is gone, from
    /// 20 s, or ten times `request_timeout` if that is more. 2 min.
    pub session_ttl: Duration,
}

/// When a second read is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HedgeDelay {
    /// After what so many of a hundred calls stay within, from 50 to 99.
    Percentile(u8),
    /// After a fixed time.
    Fixed(Duration),
}

/// Whether writes carry request ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RequestIds {
    /// They do where the server knows them: a session is opened with the first
    /// write. A server that does not, as a real etcd, is remembered, and its
    /// writes are not repeated in doubt.
    #[default]
    Auto,
    /// They do not.
    Off,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        PolicyOptions {
            request_timeout: Duration::from_secs(10),
            attempt_timeout: Duration::from_secs(3),
            attempts_max: 8,
            backoff: BackoffOptions::exponential(Duration::from_millis(25), Duration::from_secs(1)),
            budget: BudgetOptions { milli_tokens_max: 500_000, milli_tokens_per_success: 200 },
            hedge: None,
            in_flight_max: 1_024,
            queue_max: 4_096,
            rate: None,
            adaptive: Some(AdaptiveLimitOptions::default()),
            request_ids: RequestIds::Auto,
            session_ttl: Duration::from_secs(120),
        }
    }
}

const MS: Duration = Duration::from_millis(1);
/// Twice the shortest time to live that the server gives a session.
const SESSION_TTL_MIN: Duration = Duration::from_secs(20);

impl PolicyOptions {
    /// The defaults without request ids: nothing is asked of a server but the
    /// calls themselves, and they fail sooner.
    pub fn plain() -> PolicyOptions {
        PolicyOptions { request_ids: RequestIds::Off, attempts_max: 5, ..PolicyOptions::default() }
    }

    /// Refuses what cannot be meant.
    ///
    /// # Errors
    /// [`ClientError::BadOption`] with the field and what would be right.
    pub fn check(&self) -> Result<(), ClientError> {
        let must = |holds: bool, option: &'static str, reason: &str| match holds {
            true => Ok(()),
            false => Err(ClientError::BadOption { option, reason: reason.to_owned() }),
        };
        must(self.request_timeout >= MS, "policy.request_timeout", "must be at least 1 ms")?;
        must(self.attempt_timeout >= MS, "policy.attempt_timeout", "must be at least 1 ms")?;
        must((1..=100).contains(&self.attempts_max), "policy.attempts_max", "must be from 1 to 100")?;
        let backoff = self.backoff;
        let grows = !backoff.base.is_zero() && backoff.base <= backoff.cap;
        must(grows, "policy.backoff", "base must be above zero and not above cap")?;
        let budget = self.budget.milli_tokens_max >= 1_000;
        must(
            budget,
            "policy.budget",
            "milli_tokens_max must be at least 1,000; attempts_max 1 turns retries off",
        )?;
        must(self.in_flight_max >= 1, "policy.in_flight_max", "must be at least 1")?;
        let hedge = match self.hedge {
            Some(HedgeDelay::Percentile(percent)) => (50..=99).contains(&percent),
            Some(HedgeDelay::Fixed(delay)) => delay < self.request_timeout,
            None => true,
        };
        must(hedge, "policy.hedge", "must be a percentile from 50 to 99, or a time below request_timeout")?;
        let rate = match self.rate {
            Some(RateLimitOptions::TokenBucket { per_second, burst }) => per_second >= 1 && burst >= 1,
            Some(RateLimitOptions::SlidingWindow { calls_max, window }) => {
                (1..=1_000_000).contains(&calls_max) && window >= MS
            }
            None => true,
        };
        let reason =
            "per_second and burst must be at least 1; calls_max from 1 to 1,000,000; window from 1 ms";
        must(rate, "policy.rate", reason)?;
        let adaptive = self.adaptive.is_none_or(|adaptive| {
            (1..=adaptive.limit_max).contains(&adaptive.limit_min)
                && (1..=99).contains(&adaptive.decrease_percent)
        });
        let reason = "limit_min must be from 1 to limit_max, decrease_percent from 1 to 99";
        must(adaptive, "policy.adaptive", reason)?;
        let least = SESSION_TTL_MIN.max(self.request_timeout * 10);
        let ids = self.request_ids == RequestIds::Off || self.session_ttl >= least;
        must(ids, "policy.session_ttl", "must be at least 20 s and ten times request_timeout")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_named() {
        let base = PolicyOptions::default;
        assert!(base().check().is_ok() && PolicyOptions::plain().check().is_ok());
        let zero = Duration::ZERO;
        let rate = |rate| PolicyOptions { rate: Some(rate), ..base() };
        let bad = [
            ("policy.request_timeout", PolicyOptions { request_timeout: zero, ..base() }),
            ("policy.attempt_timeout", PolicyOptions { attempt_timeout: zero, ..base() }),
            ("policy.attempts_max", PolicyOptions { attempts_max: 0, ..base() }),
            ("policy.attempts_max", PolicyOptions { attempts_max: 101, ..base() }),
            ("policy.backoff", PolicyOptions { backoff: BackoffOptions::exponential(zero, MS), ..base() }),
            ("policy.backoff", PolicyOptions { backoff: BackoffOptions::exponential(MS * 2, MS), ..base() }),
            ("policy.hedge", PolicyOptions { hedge: Some(HedgeDelay::Percentile(100)), ..base() }),
            ("policy.hedge", PolicyOptions { hedge: Some(HedgeDelay::Fixed(Duration::MAX)), ..base() }),
            ("policy.in_flight_max", PolicyOptions { in_flight_max: 0, ..base() }),
            ("policy.rate", rate(RateLimitOptions::TokenBucket { per_second: 0, burst: 1 })),
            ("policy.rate", rate(RateLimitOptions::SlidingWindow { calls_max: 1, window: zero })),
            ("policy.session_ttl", PolicyOptions { session_ttl: MS, ..base() }),
        ];
        for (name, options) in bad {
            match options.check() {
                Err(ClientError::BadOption { option, reason }) => {
                    assert!(option == name && !reason.is_empty(), "{option} for {name}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}
