//! How long to wait before trying again: exponential, capped, with full jitter.
//!
//! Full jitter draws the wait evenly from zero to the current ceiling, which
//! spreads callers that failed together better than any wait with a floor.

use std::time::Duration;

/// How the ceiling of the wait grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackoffOptions {
    /// The ceiling of the first wait; not zero.
    pub base: Duration,
    /// The ceiling never grows past this.
    pub cap: Duration,
}

impl Default for BackoffOptions {
    fn default() -> Self {
        BackoffOptions { base: Duration::from_millis(50), cap: Duration::from_secs(5) }
    }
}

impl BackoffOptions {
    /// The ceiling of the wait after `failures` failures in a row: `base`
    /// doubled for each after the first, at most `cap`.
    pub fn ceiling(&self, failures: u32) -> Duration {
        let doubled = 1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
        self.base.saturating_mul(doubled).min(self.cap)
    }
}

/// Counts the failures in a row and says how long to wait after each.
#[derive(Clone, Debug)]
pub struct Backoff {
    options: BackoffOptions,
    failures: u32,
}

impl Backoff {
    /// A backoff without a failure so far.
    pub fn new(options: BackoffOptions) -> Backoff {
        Backoff { options, failures: 0 }
    }

    /// Counts one more failure and gives the wait before the next attempt,
    /// drawn with `random` evenly from zero to the ceiling.
    pub fn next_wait(&mut self, random: u64) -> Duration {
        self.failures = self.failures.saturating_add(1);
        fraction(self.options.ceiling(self.failures), random)
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The failures in a row so far.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

/// The part of `whole` that `random` is of all numbers.
pub(super) fn fraction(whole: Duration, random: u64) -> Duration {
    let nanos = whole.as_nanos().min(u128::from(u64::MAX));
    // Below 2^64 * 2^64, and the shift brings it back below 2^64.
    let part = (nanos * u128::from(random)) >> 64;
    Duration::from_nanos(u64::try_from(part).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(base_ms: u64, cap_ms: u64) -> BackoffOptions {
        BackoffOptions { base: Duration::from_millis(base_ms), cap: Duration::from_millis(cap_ms) }
    }

    #[test]
    fn the_ceiling_doubles_up_to_the_cap() {
        let options = options(100, 1_000);
        let ceilings: Vec<u128> = (0..7).map(|n| options.ceiling(n).as_millis()).collect();
        assert_eq!(ceilings, [100, 100, 200, 400, 800, 1_000, 1_000]);
        assert_eq!(options.ceiling(u32::MAX).as_millis(), 1_000);
    }

    #[test]
    fn the_wait_is_drawn_from_zero_to_the_ceiling() {
        let mut backoff = Backoff::new(options(100, 1_000));
        assert_eq!(backoff.next_wait(0), Duration::ZERO);
        assert_eq!(backoff.next_wait(u64::MAX / 2 + 1), Duration::from_millis(100));
        assert!(backoff.next_wait(u64::MAX) <= Duration::from_millis(400));
        assert_eq!(backoff.failures(), 3);
    }

    #[test]
    fn a_success_starts_over() {
        let mut backoff = Backoff::new(options(100, 10_000));
        for _ in 0..5 {
            backoff.next_wait(7);
        }
        backoff.reset();
        assert!(backoff.next_wait(u64::MAX) <= Duration::from_millis(100));
    }

    #[test]
    fn extreme_settings_do_not_overflow() {
        let options = BackoffOptions { base: Duration::MAX, cap: Duration::MAX };
        let mut backoff = Backoff::new(options);
        for _ in 0..100 {
            backoff.next_wait(u64::MAX);
        }
    }
}
