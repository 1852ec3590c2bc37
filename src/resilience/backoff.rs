//! How long to wait before trying again.
//!
//! Every kind but the fixed one draws the wait evenly from zero to its current
//! ceiling (full jitter), which spreads callers that failed together better than
//! any wait with a floor.

use std::time::Duration;

/// How the ceiling of the wait grows with failures in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackoffKind {
    /// It doubles.
    #[default]
    Exponential,
    /// It grows by `base`.
    Linear,
    /// It is `base` each time, and the wait is exactly that, without jitter.
    Fixed,
    /// It is `base` times 1, 1, 2, 3, 5, 8 and so on.
    Fibonacci,
    /// It moves between `base` and `cap` with the share of attempts that failed
    /// lately. A success brings it down a step and not to the start, so this is
    /// for a backoff that outlives one call.
    Adaptive,
}

/// How long the waits are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackoffOptions {
    /// How the ceiling grows.
    pub kind: BackoffKind,
    /// The ceiling of the first wait; not zero.
    pub base: Duration,
    /// The ceiling never grows past this.
    pub cap: Duration,
}

impl Default for BackoffOptions {
    fn default() -> Self {
        BackoffOptions::exponential(Duration::from_millis(50), Duration::from_secs(5))
    }
}

impl BackoffOptions {
    /// The ceiling doubles from `base` to `cap`.
    pub const fn exponential(base: Duration, cap: Duration) -> BackoffOptions {
        BackoffOptions { kind: BackoffKind::Exponential, base, cap }
    }

    /// The same with another kind.
    pub const fn with_kind(self, kind: BackoffKind) -> BackoffOptions {
        BackoffOptions { kind, base: self.base, cap: self.cap }
    }

    /// The ceiling of the wait after `failures` failures in a row; for the
    /// adaptive kind, when all of them happened lately and nothing else did.
    pub fn ceiling(&self, failures: u32) -> Duration {
        let factor = match self.kind {
            BackoffKind::Exponential => 1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX),
            BackoffKind::Linear => failures.max(1),
            BackoffKind::Fixed => 1,
            BackoffKind::Fibonacci => fibonacci(failures),
            BackoffKind::Adaptive => {
                let share = (0..failures.min(64)).fold(0, |share, _| grown(share));
                return self.at_share(share);
            }
        };
        self.base.saturating_mul(factor).min(self.cap)
    }

    /// The ceiling when `share` of 65,536 attempts failed lately.
    fn at_share(&self, share: u32) -> Duration {
        let room = self.cap.saturating_sub(self.base);
        self.base.min(self.cap) + fraction(room, u64::from(share) << 48)
    }
}

/// What a whole share is.
const SHARE_MAX: u32 = 1 << 16;

/// The share after one more failure: a quarter of the way up.
fn grown(share: u32) -> u32 {
    (share + (SHARE_MAX - share).div_ceil(4)).min(SHARE_MAX - 1)
}

fn fibonacci(n: u32) -> u32 {
    // The 47th is the last that fits.
    let pair = (1..n.min(47)).fold((1u32, 1u32), |(a, b), _| (b, a.saturating_add(b)));
    pair.0
}

/// Counts the failures in a row and says how long to wait after each.
#[derive(Clone, Debug)]
pub struct Backoff {
    options: BackoffOptions,
    failures: u32,
    /// The share of attempts that failed lately, for the adaptive kind.
    share: u32,
}

impl Backoff {
    /// A backoff without a failure so far.
    pub fn new(options: BackoffOptions) -> Backoff {
        Backoff { options, failures: 0, share: 0 }
    }

    /// Counts one more failure and gives the wait before the next attempt,
    /// drawn with `random`.
    pub fn next_wait(&mut self, random: u64) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.share = grown(self.share);
        match self.options.kind {
            BackoffKind::Fixed => self.options.ceiling(1),
            BackoffKind::Adaptive => fraction(self.options.at_share(self.share), random),
            _ => fraction(self.options.ceiling(self.failures), random),
        }
    }

    /// Starts over after a success; the adaptive kind goes down a step.
    pub fn reset(&mut self) {
        self.failures = 0;
        self.share -= self.share.div_ceil(4);
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
        BackoffOptions::exponential(Duration::from_millis(base_ms), Duration::from_millis(cap_ms))
    }

    const KINDS: [BackoffKind; 5] = [
        BackoffKind::Exponential,
        BackoffKind::Linear,
        BackoffKind::Fixed,
        BackoffKind::Fibonacci,
        BackoffKind::Adaptive,
    ];

    fn ceilings(kind: BackoffKind) -> Vec<u128> {
        (1..8).map(|n| options(100, 1_000).with_kind(kind).ceiling(n).as_millis()).collect()
    }

    #[test]
    fn each_kind_grows_in_its_own_way() {
        assert_eq!(ceilings(BackoffKind::Linear), [100, 200, 300, 400, 500, 600, 700]);
        assert_eq!(ceilings(BackoffKind::Fixed), [100; 7]);
        assert_eq!(ceilings(BackoffKind::Fibonacci), [100, 100, 200, 300, 500, 800, 1_000]);
        let adaptive = ceilings(BackoffKind::Adaptive);
        assert!(adaptive.is_sorted() && adaptive[0] > 100 && adaptive[6] > 800 && adaptive[6] <= 1_000);
    }

    #[test]
    fn a_fixed_wait_has_no_jitter() {
        let mut backoff = Backoff::new(options(100, 1_000).with_kind(BackoffKind::Fixed));
        for random in [0, 1, u64::MAX] {
            assert_eq!(backoff.next_wait(random), Duration::from_millis(100));
        }
    }

    #[test]
    fn the_adaptive_kind_follows_the_share_of_failures() {
        let waits = |failures: u32, successes: u32| {
            let mut backoff = Backoff::new(options(10, 1_000).with_kind(BackoffKind::Adaptive));
            let mut last = Duration::ZERO;
            for _ in 0..50 {
                for _ in 0..failures {
                    last = backoff.next_wait(u64::MAX);
                }
                for _ in 0..successes {
                    backoff.reset();
                }
            }
            last
        };
        let (seldom, half, always) = (waits(1, 9), waits(1, 1), waits(1, 0));
        assert!(seldom < half && half < always, "{seldom:?} {half:?} {always:?}");
        assert!(seldom < Duration::from_millis(350) && always > Duration::from_millis(990));
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
        for kind in KINDS {
            let options = BackoffOptions { kind, base: Duration::MAX, cap: Duration::MAX };
            let mut backoff = Backoff::new(options);
            for _ in 0..100 {
                backoff.next_wait(u64::MAX);
            }
            options.ceiling(u32::MAX);
        }
    }
}
