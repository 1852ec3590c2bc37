//! A sliding window: never more than so many calls in any stretch of its length,
//! wherever the stretch begins. Exact, because each call is remembered until it
//! has left the window; the memory is one time for each call allowed.

use std::collections::VecDeque;
use std::time::Duration;

/// The calls of the last while.
#[derive(Clone, Debug)]
pub struct SlidingWindow {
    calls_max: usize,
    window: Duration,
    /// When the calls were made, oldest first; at most `calls_max`.
    calls: VecDeque<Duration>,
}

impl SlidingWindow {
    /// At most `calls_max` calls (1 when it is 0) in any stretch of `window`.
    pub fn new(calls_max: u32, window: Duration) -> SlidingWindow {
        SlidingWindow { calls_max: calls_max.max(1) as usize, window, calls: VecDeque::new() }
    }

    /// Makes a call at `now`.
    ///
    /// # Errors
    /// How long until one may be made.
    pub fn take(&mut self, now: Duration) -> Result<(), Duration> {
        // Time that went back must not make the queue unsorted.
        let now = self.calls.back().map_or(now, |newest| now.max(*newest));
        while self.calls.front().is_some_and(|oldest| *oldest + self.window <= now) {
            self.calls.pop_front();
        }
        match self.wait_for(now, 1) {
            Duration::ZERO => {
                self.calls.push_back(now);
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// How long until `count` calls more could have been made, at the least.
    pub fn wait_for(&self, now: Duration, count: u32) -> Duration {
        let place = self.calls.len() + (count.max(1) as usize);
        let Some(leaver) = place.checked_sub(self.calls_max + 1) else { return Duration::ZERO };
        match self.calls.get(leaver) {
            Some(made) => (*made + self.window).saturating_sub(now),
            // Those that must leave first have not even been made.
            None => self.window,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn no_stretch_of_its_length_has_more_than_allowed() {
        let mut window = SlidingWindow::new(10, MS * 100);
        let mut made: Vec<u32> = Vec::new();
        for at in 0..2_000 {
            // Attempts come in lumps, at changing distances.
            for _ in 0..(at * 7919 % 5) {
                if window.take(MS * at).is_ok() {
                    made.push(at);
                }
            }
        }
        assert!(made.len() > 150, "it lets through what it may: {}", made.len());
        for start in 0..2_000 {
            let inside = made.iter().filter(|at| (start..start + 100).contains(*at)).count();
            assert!(inside <= 10, "{inside} calls from {start} on");
        }
    }

    #[test]
    fn it_says_how_long_to_wait() {
        let mut window = SlidingWindow::new(2, MS * 100);
        assert_eq!(window.take(MS * 10), Ok(()));
        assert_eq!(window.take(MS * 40), Ok(()));
        assert_eq!(window.take(MS * 50), Err(MS * 60));
        assert_eq!(window.wait_for(MS * 50, 2), MS * 90);
        assert_eq!(window.wait_for(MS * 50, 3), MS * 100);
        assert_eq!(window.take(MS * 110), Ok(()));
        assert_eq!(window.take(MS * 110), Err(MS * 30));
    }
}
