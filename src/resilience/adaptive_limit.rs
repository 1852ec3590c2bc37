//! How much may be in flight at a server that says when it is too much: a step
//! up while it is well, a share down when it pushes back (additive increase,
//! multiplicative decrease).

use std::time::Duration;

/// Where the limit may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdaptiveLimitOptions {
    /// It never falls below this; at least 1.
    pub limit_min: u32,
    /// It starts here and never rises above.
    pub limit_max: u32,
    /// What is left of it after a pushback, in per cent; 1 to 99.
    pub decrease_percent: u8,
    /// Pushbacks within this time of a decrease are of the same trouble and
    /// change nothing.
    pub cooldown: Duration,
}

impl Default for AdaptiveLimitOptions {
    fn default() -> Self {
        AdaptiveLimitOptions {
            limit_min: 4,
            limit_max: 1_024,
            decrease_percent: 70,
            cooldown: Duration::from_millis(200),
        }
    }
}

/// The limit is kept in millionths, for it rises in small steps.
const MICRO: u64 = 1_000_000;

/// A limit on calls in flight that follows the server's word.
#[derive(Clone, Debug)]
pub struct AdaptiveLimit {
    options: AdaptiveLimitOptions,
    micro: u64,
    cooling_until: Duration,
}

impl AdaptiveLimit {
    /// A limit at its largest.
    pub fn new(options: AdaptiveLimitOptions) -> AdaptiveLimit {
        let micro = u64::from(options.limit_max.max(options.limit_min).max(1)) * MICRO;
        AdaptiveLimit { options, micro, cooling_until: Duration::ZERO }
    }

    /// How much may be in flight.
    pub fn limit(&self) -> u32 {
        u32::try_from(self.micro / MICRO).unwrap_or(u32::MAX)
    }

    /// A call worked while `in_flight` were on their way. The limit rises by one
    /// for as many successes as it is large, and only while it is made use of.
    pub fn on_success(&mut self, in_flight: usize) {
        if in_flight as u64 * 2 * MICRO >= self.micro {
            let most = u64::from(self.options.limit_max.max(self.options.limit_min).max(1)) * MICRO;
            self.micro = (self.micro + MICRO * MICRO / self.micro).min(most);
        }
    }

    /// The server said at `now` that it is too much.
    pub fn on_pushback(&mut self, now: Duration) {
        if now >= self.cooling_until {
            let least = u64::from(self.options.limit_min.max(1)) * MICRO;
            self.micro = (self.micro * u64::from(self.options.decrease_percent.min(99)) / 100).max(least);
            self.cooling_until = now + self.options.cooldown;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn limit() -> AdaptiveLimit {
        AdaptiveLimit::new(AdaptiveLimitOptions {
            limit_min: 2,
            limit_max: 100,
            decrease_percent: 50,
            cooldown: MS * 100,
        })
    }

    #[test]
    fn one_trouble_takes_one_share_and_never_more_than_the_least() {
        let mut limit = limit();
        for _ in 0..50 {
            limit.on_pushback(MS * 1_000);
        }
        assert_eq!(limit.limit(), 50);
        for round in 0..20 {
            limit.on_pushback(MS * (2_000 + round * 100));
        }
        assert_eq!(limit.limit(), 2);
    }

    #[test]
    fn it_rises_by_one_for_a_limit_full_of_successes() {
        let mut limit = limit();
        limit.on_pushback(MS);
        for _ in 0..51 {
            limit.on_success(50);
        }
        assert_eq!(limit.limit(), 51);
        for _ in 0..100_000 {
            limit.on_success(100);
        }
        assert_eq!(limit.limit(), 100);
    }

    #[test]
    fn what_is_not_used_does_not_grow() {
        let mut limit = limit();
        limit.on_pushback(MS);
        for _ in 0..1_000 {
            limit.on_success(3);
        }
        assert_eq!(limit.limit(), 50);
    }

    /// A server that takes 20 at a time: the limit saws below and around it.
    #[test]
    fn it_finds_what_a_server_can_take() {
        let mut limit = limit();
        let (mut refused, mut sum) = (0, 0);
        for round in 0..2_000 {
            let in_flight = limit.limit() as usize;
            for _ in 0..in_flight.min(20) {
                limit.on_success(in_flight);
            }
            if in_flight > 20 {
                refused += 1;
                limit.on_pushback(MS * round * 100);
            }
            sum += in_flight;
        }
        assert!((12..=20).contains(&(sum / 2_000)), "{}", sum / 2_000);
        assert!(refused < 400, "{refused}");
    }
}
