//! A three-state breaker: it stops calls to an endpoint that keeps failing, and
//! finds out with single probes when it is back.
//!
//! It opens after so many failures in a row, or when too large a share of the
//! calls of a rolling window failed: the first finds an endpoint that is down,
//! the second one that is sick.
//!
//! Invariants: only a *closed* breaker admits freely; an *open* one admits
//! nothing before its time; a *half-open* one has exactly one probe out. A probe
//! that never reports back is given up after `probe_timeout`, so that a caller
//! who was cancelled cannot hold the breaker half-open for ever.

use std::time::Duration;

use super::backoff::{BackoffOptions, fraction};
use super::window::RollingCounts;

/// When a breaker opens although successes come in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerRatio {
    /// Opens when at least this many of a hundred calls failed; 1 to 100.
    pub failures_percent: u8,
    /// Over the calls of this time; from 10 ms.
    pub window: Duration,
    /// If they are at least this many.
    pub calls_min: u32,
}

impl Default for BreakerRatio {
    fn default() -> Self {
        BreakerRatio { failures_percent: 50, window: Duration::from_secs(10), calls_min: 20 }
    }
}

/// When a breaker opens and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerOptions {
    /// Failures in a row that open it; at least 1.
    pub failures_max: u32,
    /// The share of failures that opens it; `None` looks at failures in a row only.
    pub ratio: Option<BreakerRatio>,
    /// How long it stays open, growing while probes fail. The wait is drawn
    /// from the upper half of the ceiling, so that it is never near zero.
    pub open: BackoffOptions,
    /// A probe without an outcome after this long counts as lost, and the next
    /// caller probes.
    pub probe_timeout: Duration,
}

impl Default for BreakerOptions {
    fn default() -> Self {
        BreakerOptions {
            failures_max: 5,
            ratio: None,
            open: BackoffOptions::exponential(Duration::from_millis(200), Duration::from_secs(10)),
            probe_timeout: Duration::from_secs(10),
        }
    }
}

/// What a breaker is doing, for metrics and for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls pass.
    Closed,
    /// Calls are refused until the time has come for a probe.
    Open,
    /// One probe is out; all others are refused until it reports.
    HalfOpen,
}

impl BreakerState {
    /// The state as a metric's value: 0 closed, 1 half-open, 2 open.
    pub fn as_metric(self) -> f64 {
        match self {
            BreakerState::Closed => 0.0,
            BreakerState::HalfOpen => 1.0,
            BreakerState::Open => 2.0,
        }
    }
}

/// Whether a call may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Make it and report how it went.
    Pass,
    /// Make it and report how it went: it decides for everyone.
    Probe,
    /// Do not make it; ask again after this long.
    Refuse {
        /// How long until a call may be admitted.
        retry_after: Duration,
    },
}

#[derive(Clone, Copy, Debug)]
enum State {
    Closed { failures: u32 },
    Open { until: Duration },
    HalfOpen { probe_lost_at: Duration },
}

/// The breaker of one endpoint.
#[derive(Clone, Debug)]
pub struct Breaker {
    options: BreakerOptions,
    state: State,
    /// How often it has opened since it was last closed.
    openings: u32,
    /// The calls of the window; `None` when no ratio is looked at.
    counts: Option<RollingCounts>,
    /// The newest time it was told: a success counts as of then.
    now: Duration,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(options: BreakerOptions) -> Breaker {
        let counts = options.ratio.map(|ratio| RollingCounts::new(ratio.window));
        Breaker { options, state: State::Closed { failures: 0 }, openings: 0, counts, now: Duration::ZERO }
    }

    /// Asks to make a call at `now`. Whoever is told `Pass` or `Probe` reports
    /// with [`Breaker::on_success`] or [`Breaker::on_failure`].
    pub fn admit(&mut self, now: Duration) -> Admission {
        self.now = self.now.max(now);
        match self.state {
            State::Closed { .. } => Admission::Pass,
            State::Open { until: at } | State::HalfOpen { probe_lost_at: at } if now < at => {
                Admission::Refuse { retry_after: at - now }
            }
            State::Open { .. } | State::HalfOpen { .. } => {
                self.state = State::HalfOpen { probe_lost_at: now + self.options.probe_timeout };
                Admission::Probe
            }
        }
    }

    /// A call worked, whoever made it: also one that did not ask, as a heartbeat.
    /// Closes the breaker.
    pub fn on_success(&mut self) {
        if !matches!(self.state, State::Closed { .. }) {
            self.forget_counts();
        }
        if let Some(counts) = &mut self.counts {
            counts.add(self.now, false);
        }
        self.state = State::Closed { failures: 0 };
        self.openings = 0;
    }

    /// A call failed at `now`. `random` spreads the time of the next probe.
    pub fn on_failure(&mut self, now: Duration, random: u64) {
        self.now = self.now.max(now);
        match &mut self.state {
            State::Closed { failures } => {
                *failures += 1;
                let in_a_row = *failures >= self.options.failures_max.max(1);
                if self.share_is_too_large() || in_a_row {
                    self.open(now, random);
                }
            }
            // Calls admitted before it opened may report late; they change nothing.
            State::Open { .. } => {}
            State::HalfOpen { .. } => self.open(now, random),
        }
    }

    /// Counts a failure into the window and looks at its share.
    fn share_is_too_large(&mut self) -> bool {
        let (Some(counts), Some(ratio)) = (&mut self.counts, self.options.ratio) else { return false };
        counts.add(self.now, true);
        let (calls, failures) = counts.sums(self.now);
        calls >= u64::from(ratio.calls_min) && failures * 100 >= calls * u64::from(ratio.failures_percent)
    }

    /// What happened before it closed or opened says nothing about after.
    fn forget_counts(&mut self) {
        self.counts = self.options.ratio.map(|ratio| RollingCounts::new(ratio.window));
    }

    /// What it is doing.
    pub fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    fn open(&mut self, now: Duration, random: u64) {
        self.forget_counts();
        self.openings = self.openings.saturating_add(1);
        let half = self.options.open.ceiling(self.openings) / 2;
        self.state = State::Open { until: now + half + fraction(half, random) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker() -> Breaker {
        Breaker::new(BreakerOptions {
            failures_max: 3,
            ratio: None,
            open: BackoffOptions::exponential(SECOND, SECOND * 8),
            probe_timeout: SECOND * 5,
        })
    }

    fn opened() -> Breaker {
        let mut breaker = breaker();
        for _ in 0..3 {
            assert_eq!(breaker.admit(SECOND), Admission::Pass);
            breaker.on_failure(SECOND, u64::MAX);
        }
        breaker
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let mut breaker = breaker();
        for _ in 0..10 {
            breaker.on_failure(SECOND, 0);
            breaker.on_failure(SECOND, 0);
            breaker.on_success();
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert_eq!(opened().state(), BreakerState::Open);
    }

    #[test]
    fn an_open_one_refuses_until_its_time_and_then_lets_one_probe_out() {
        let mut breaker = opened();
        assert!(matches!(breaker.admit(SECOND), Admission::Refuse { .. }));
        assert_eq!(breaker.admit(SECOND * 2), Admission::Probe);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        let Admission::Refuse { retry_after } = breaker.admit(SECOND * 3) else { panic!("a second probe") };
        assert_eq!(retry_after, SECOND * 4);
    }

    #[test]
    fn a_probe_decides() {
        let mut breaker = opened();
        assert_eq!(breaker.admit(SECOND * 2), Admission::Probe);
        breaker.on_success();
        assert_eq!(breaker.state(), BreakerState::Closed);

        let mut breaker = opened();
        assert_eq!(breaker.admit(SECOND * 2), Admission::Probe);
        breaker.on_failure(SECOND * 2, 0);
        // The second opening lasts from one second, half the doubled ceiling.
        assert_eq!(breaker.admit(SECOND * 2), Admission::Refuse { retry_after: SECOND });
        assert_eq!(breaker.admit(SECOND * 3), Admission::Probe);
    }

    #[test]
    fn a_lost_probe_does_not_hold_it_half_open() {
        let mut breaker = opened();
        assert_eq!(breaker.admit(SECOND * 2), Admission::Probe);
        assert_eq!(breaker.admit(SECOND * 7), Admission::Probe);
    }

    #[test]
    fn a_success_from_outside_closes_it() {
        let mut breaker = opened();
        breaker.on_success();
        assert_eq!(breaker.admit(SECOND), Admission::Pass);
    }

    #[test]
    fn a_late_failure_does_not_prolong_an_opening() {
        let mut breaker = opened();
        breaker.on_failure(SECOND * 2 - Duration::from_millis(1), u64::MAX);
        assert_eq!(breaker.admit(SECOND * 2), Admission::Probe);
    }

    fn sick(calls_min: u32) -> Breaker {
        let ratio = BreakerRatio { failures_percent: 50, window: SECOND * 10, calls_min };
        Breaker::new(BreakerOptions { failures_max: 1_000, ratio: Some(ratio), ..BreakerOptions::default() })
    }

    #[test]
    fn a_large_share_of_failures_opens_it_once_there_are_enough_calls() {
        let mut breaker = sick(8);
        for call in 0..4 {
            assert_eq!(breaker.state(), BreakerState::Closed, "call {call}");
            breaker.on_success();
            breaker.on_failure(SECOND, 0);
        }
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn a_small_share_of_failures_leaves_it_closed() {
        let mut breaker = sick(8);
        for second in 0..100 {
            breaker.admit(SECOND * second / 10);
            breaker.on_success();
            breaker.on_success();
            breaker.on_failure(SECOND * second / 10, 0);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn failures_that_left_the_window_do_not_count() {
        let mut breaker = sick(8);
        for second in 0..7 {
            breaker.on_failure(SECOND + Duration::from_millis(second), 0);
        }
        for _ in 0..6 {
            breaker.admit(SECOND * 30);
            breaker.on_success();
        }
        breaker.on_failure(SECOND * 30, 0);
        breaker.on_failure(SECOND * 30, 0);
        assert_eq!(breaker.state(), BreakerState::Closed, "2 of 8, not 9 of 15");
    }

    #[test]
    fn what_opened_it_is_forgotten_when_it_closes() {
        let mut breaker = sick(2);
        breaker.on_failure(SECOND, 0);
        breaker.on_failure(SECOND, 0);
        assert_eq!(breaker.state(), BreakerState::Open);
        assert_eq!(breaker.admit(SECOND * 2), Admission::Probe);
        breaker.on_success();
        breaker.on_success();
        breaker.on_failure(SECOND * 2, 0);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }
}
