//! A token bucket: so many calls a second, with bursts up to its size.
//!
//! Kept as the time at which the bucket would be full again (the generic cell
//! rate algorithm), so that no tick refills it and no rounding adds up. Its rate
//! can be changed while it runs, and its clock is the caller's: that is why it
//! is written here instead of taken from a crate.

use std::time::Duration;

/// A bucket of tokens.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// The time in which one token comes.
    interval: Duration,
    burst: u32,
    /// When the bucket is full again; full when that is past.
    full_at: Duration,
}

impl TokenBucket {
    /// A full bucket: `per_second` calls a second, `burst` at once; both count
    /// as 1 when they are 0.
    pub fn new(per_second: u32, burst: u32) -> TokenBucket {
        TokenBucket { interval: interval(per_second), burst: burst.max(1), full_at: Duration::ZERO }
    }

    /// Takes a token at `now`.
    ///
    /// # Errors
    /// How long until there is one.
    pub fn take(&mut self, now: Duration) -> Result<(), Duration> {
        match self.wait_for(now, 1) {
            Duration::ZERO => {
                self.full_at = self.full_at.max(now) + self.interval;
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// How long until `count` tokens more could have been taken.
    pub fn wait_for(&self, now: Duration, count: u32) -> Duration {
        let full_at = self.full_at.max(now);
        let taken_then = full_at + self.interval.saturating_mul(count);
        taken_then.saturating_sub(self.interval.saturating_mul(self.burst)).saturating_sub(now)
    }

    /// Lets `per_second` calls through from `now` on; the tokens stay.
    pub fn set_rate(&mut self, now: Duration, per_second: u32) {
        let missing = self.full_at.saturating_sub(now).as_nanos() / self.interval.as_nanos().max(1);
        self.interval = interval(per_second);
        let missing = u32::try_from(missing).unwrap_or(u32::MAX).min(self.burst);
        self.full_at = now + self.interval.saturating_mul(missing);
    }
}

fn interval(per_second: u32) -> Duration {
    Duration::from_nanos(1_000_000_000 / u64::from(per_second.max(1))).max(Duration::from_nanos(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_burst_and_then_the_rate() {
        let mut bucket = TokenBucket::new(100, 5);
        let now = MS * 1_000;
        assert_eq!((0..20).filter(|_| bucket.take(now).is_ok()).count(), 5);
        assert_eq!(bucket.take(now), Err(MS * 10));
        assert_eq!(bucket.take(now + MS * 9), Err(MS));
        assert_eq!(bucket.take(now + MS * 10), Ok(()));
        let taken = (10..=1_010).filter(|at| bucket.take(now + MS * *at).is_ok()).count();
        assert_eq!(taken, 100, "100 in the second after");
    }

    #[test]
    fn what_was_not_used_is_kept_up_to_the_burst() {
        let mut bucket = TokenBucket::new(100, 5);
        while bucket.take(MS).is_ok() {}
        assert_eq!((0..20).filter(|_| bucket.take(MS * 31).is_ok()).count(), 3);
        assert_eq!((0..20).filter(|_| bucket.take(MS * 100_000).is_ok()).count(), 5);
    }

    #[test]
    fn waiting_is_told_by_the_place_in_the_queue() {
        let mut bucket = TokenBucket::new(100, 2);
        assert_eq!(bucket.wait_for(MS, 2), Duration::ZERO);
        while bucket.take(MS).is_ok() {}
        assert_eq!(bucket.wait_for(MS, 1), MS * 10);
        assert_eq!(bucket.wait_for(MS, 3), MS * 30);
    }

    #[test]
    fn the_rate_changes_while_it_runs() {
        let mut bucket = TokenBucket::new(100, 4);
        while bucket.take(MS).is_ok() {}
        bucket.set_rate(MS, 1_000);
        assert_eq!(bucket.take(MS), Err(MS));
        bucket.set_rate(MS, 0);
        assert_eq!(bucket.take(MS), Err(MS * 1_000));
    }
}
