//! How long calls take: a percentile of the newest few hundred, for deciding
//! when one takes suspiciously long.

use std::time::Duration;

/// How many calls are remembered.
const SAMPLES_MAX: usize = 256;
/// With fewer there is no percentile.
const SAMPLES_MIN: usize = 20;

/// The times of the newest calls.
#[derive(Clone, Debug, Default)]
pub struct Latency {
    /// In microseconds, the newest over the oldest.
    samples: Vec<u32>,
    next: usize,
}

impl Latency {
    /// Nothing known yet.
    pub fn new() -> Latency {
        Latency::default()
    }

    /// A call took `time`.
    pub fn record(&mut self, time: Duration) {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        match self.samples.get_mut(self.next) {
            Some(oldest) => *oldest = micros,
            None => self.samples.push(micros),
        }
        self.next = (self.next + 1) % SAMPLES_MAX;
    }

    /// The time that `percent` of a hundred calls stay within; `None` while too
    /// few are known.
    pub fn percentile(&self, percent: u8) -> Option<Duration> {
        if self.samples.len() < SAMPLES_MIN {
            return None;
        }
        let mut sorted = self.samples.clone();
        let rank = (sorted.len() * usize::from(percent.min(100))).div_ceil(100).max(1) - 1;
        let (_, micros, _) = sorted.select_nth_unstable(rank);
        Some(Duration::from_micros(u64::from(*micros)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn few_calls_say_nothing() {
        let mut latency = Latency::new();
        for _ in 0..SAMPLES_MIN - 1 {
            latency.record(MS);
        }
        assert_eq!(latency.percentile(95), None);
        latency.record(MS);
        assert_eq!(latency.percentile(95), Some(MS));
    }

    #[test]
    fn percentiles_are_of_the_values_that_were_seen() {
        let mut latency = Latency::new();
        for ms in (1..=100).rev() {
            latency.record(MS * ms);
        }
        assert_eq!(latency.percentile(50), Some(MS * 50));
        assert_eq!(latency.percentile(95), Some(MS * 95));
        assert_eq!(latency.percentile(100), Some(MS * 100));
        assert_eq!(latency.percentile(0), Some(MS));
    }

    #[test]
    fn old_calls_are_forgotten() {
        let mut latency = Latency::new();
        for _ in 0..1_000 {
            latency.record(MS * 500);
        }
        for _ in 0..SAMPLES_MAX {
            latency.record(MS);
        }
        assert_eq!(latency.percentile(100), Some(MS));
    }
}
