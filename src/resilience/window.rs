//! Calls and failures of the last while, counted in ten pieces: a piece leaves
//! the window as a whole, so that the memory is fixed.

use std::time::Duration;

/// How many pieces a window is counted in.
const PIECES: u64 = 10;

/// The counts of one rolling window.
#[derive(Clone, Debug)]
pub(super) struct RollingCounts {
    piece: Duration,
    /// The piece that `counts` ends with, numbered from time zero.
    newest: u64,
    /// Calls and failures of each piece, by its number modulo their count.
    counts: [(u64, u64); PIECES as usize],
}

impl RollingCounts {
    pub fn new(window: Duration) -> RollingCounts {
        let piece = (window / PIECES as u32).max(Duration::from_millis(1));
        RollingCounts { piece, newest: 0, counts: [(0, 0); PIECES as usize] }
    }

    /// Counts one call that ended at `now`.
    pub fn add(&mut self, now: Duration, failed: bool) {
        self.roll(now);
        let count = &mut self.counts[(self.newest % PIECES) as usize];
        count.0 += 1;
        count.1 += u64::from(failed);
    }

    /// The calls of the window that ends at `now`, and how many of them failed.
    pub fn sums(&mut self, now: Duration) -> (u64, u64) {
        self.roll(now);
        self.counts.iter().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1))
    }

    fn roll(&mut self, now: Duration) {
        let at = (now.as_nanos() / self.piece.as_nanos()).min(u128::from(u64::MAX)) as u64;
        // Time that went back counts as the newest there was.
        for number in (self.newest + 1..=at).take(PIECES as usize) {
            self.counts[(number % PIECES) as usize] = (0, 0);
        }
        self.newest = self.newest.max(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_is_older_than_the_window_is_gone() {
        let mut counts = RollingCounts::new(MS * 100);
        counts.add(MS * 5, true);
        counts.add(MS * 55, false);
        assert_eq!(counts.sums(MS * 99), (2, 1));
        assert_eq!(counts.sums(MS * 105), (1, 0));
        assert_eq!(counts.sums(MS * 155), (0, 0));
    }

    #[test]
    fn a_long_silence_empties_it_whatever_the_remainder() {
        for silence in 100..130 {
            let mut counts = RollingCounts::new(MS * 100);
            for at in 0..100 {
                counts.add(MS * at, true);
            }
            let (calls, failures) = counts.sums(MS * (99 + silence));
            assert_eq!((calls, failures), (0, 0), "after {silence} ms");
        }
    }

    #[test]
    fn time_that_goes_back_loses_nothing() {
        let mut counts = RollingCounts::new(MS * 100);
        counts.add(MS * 500, true);
        counts.add(MS * 300, false);
        assert_eq!(counts.sums(MS * 500), (2, 1));
    }
}
