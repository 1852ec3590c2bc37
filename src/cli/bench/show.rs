//! What a load looks like: while it runs, a line on the terminal; afterwards a summary or JSON.

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::LoadArgs;
use crate::cli::error::CliError;
use crate::cli::output::Output;
use crate::cli::progress;
use crate::load::{Outcome, Plan, Tally, Until};

const TICK: Duration = Duration::from_millis(200);
/// The longest bar of the histogram, in characters.
const BAR_CHARS_MAX: u64 = 40;

/// The line on the terminal. Dropping it leaves the task to end with the runtime; [`Progress::end`] ends it.
pub struct Progress {
    begun: Instant,
    bar: ProgressBar,
    task: JoinHandle<()>,
}

impl Progress {
    /// Shows what is counted until the end. Of `per_op` counts one makes an operation of the plan.
    pub fn start(tally: Arc<Tally>, plan: &Plan, per_op: u64) -> Progress {
        let begun = Instant::now();
        let (bar, until) = match plan.until {
            Until::Ops(ops) => (progress::items(ops * per_op, "done"), None),
            Until::Time(time) => (progress::items(time.as_secs(), "s"), Some(time)),
        };
        let task = tokio::spawn(redraw(bar.clone(), tally, begun, until.is_some()));
        Progress { begun, bar, task }
    }

    /// How long it has lasted.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Removes the line.
    pub fn end(self) {
        self.task.abort();
        self.bar.finish_and_clear();
    }
}

async fn redraw(bar: ProgressBar, tally: Arc<Tally>, begun: Instant, by_time: bool) {
    let mut ticks = tokio::time::interval(TICK);
    let (mut before, mut at) = (0, begun);
    loop {
        ticks.tick().await;
        if bar.is_hidden() {
            // No terminal: nobody looks, and quantiles cost time.
            return;
        }
        let (done, now) = (tally.done(), Instant::now());
        let per_s = done.saturating_sub(before) as f64 / (now - at).as_secs_f64().max(1e-3);
        (before, at) = (done, now);
        let p99_ms = tally.quantile(0.99).as_secs_f64() * 1e3;
        let errors = match tally.errors() {
            0 => String::new(),
            errors => format!("  {errors} errors"),
        };
        bar.set_position(if by_time { begun.elapsed().as_secs() } else { done });
        bar.set_message(format!("{per_s:.0}/s  p99 {}{errors}", ms(p99_ms)));
    }
}

/// What came of a load.
pub struct Report<'a> {
    /// The verb.
    pub verb: &'static str,
    /// What was asked for.
    pub load: &'a LoadArgs,
    /// What came of it.
    pub outcome: &'a Outcome,
}

impl Report<'_> {
    /// Prints it.
    ///
    /// # Errors
    /// When not one operation succeeded; it is printed nevertheless.
    pub fn print(&self, out: &Output) -> Result<(), CliError> {
        out.either(|| self.json(), self.text())?;
        let outcome = self.outcome;
        if outcome.ops() > 0 {
            return Ok(());
        }
        let most = outcome.failures.iter().max_by_key(|(_, times)| **times);
        let why = most.map_or("none was begun", |(what, _)| what);
        Err(CliError::Unavailable(format!("not one operation succeeded: {why}")))
    }

    fn json(&self) -> Value {
        let (load, outcome) = (self.load, self.outcome);
        let histogram: Vec<Value> = outcome
            .doubling()
            .iter()
            .map(|(up_to_ms, count)| json!({ "up_to_ms": up_to_ms, "count": count }))
            .collect();
        json!({
            "verb": self.verb,
            "clients": load.clients,
            "conns": load.conns,
            "rate": load.rate,
            "seconds": outcome.took.as_secs_f64(),
            "ops": outcome.ops(),
            "ops_per_s": outcome.ops_per_s(),
            "errors": outcome.errors(),
            "failures": outcome.failures,
            "not_begun": outcome.late,
            "latency_ms": {
                "min": outcome.min_ms(),
                "mean": outcome.mean_ms(),
                "p50": outcome.quantile_ms(0.5),
                "p90": outcome.quantile_ms(0.9),
                "p99": outcome.quantile_ms(0.99),
                "p999": outcome.quantile_ms(0.999),
                "max": outcome.max_ms(),
            },
            "histogram": histogram,
        })
    }

    fn text(&self) -> String {
        let (load, outcome) = (self.load, self.outcome);
        let mut lines = vec![
            format!("{}: {} clients on {} connections", self.verb, load.clients, load.conns),
            String::new(),
            format!(
                "operations  {} in {:.1} s, {:.0} per second",
                outcome.ops(),
                outcome.took.as_secs_f64(),
                outcome.ops_per_s()
            ),
        ];
        if outcome.late > 0 {
            lines
                .push(format!("not begun   {}: the rate was more than the clients could keep", outcome.late));
        }
        for (what, times) in &outcome.failures {
            lines.push(format!("failed      {times} times: {what}"));
        }
        if outcome.ops() > 0 {
            let quantiles = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];
            let all: Vec<String> =
                quantiles.iter().map(|(name, q)| format!("{name} {}", ms(outcome.quantile_ms(*q)))).collect();
            lines.push(format!(
                "latency     {}  max {}  mean {}",
                all.join("  "),
                ms(outcome.max_ms()),
                ms(outcome.mean_ms())
            ));
            lines.push(String::new());
            lines.extend(histogram(&outcome.doubling()));
        }
        lines.join("\n")
    }
}

/// A duration for a person: three significant digits and a unit.
fn ms(ms: f64) -> String {
    let (value, unit) = match ms {
        ms if ms < 1.0 => (ms * 1e3, "µs"),
        ms if ms < 1e3 => (ms, "ms"),
        ms => (ms / 1e3, "s"),
    };
    let digits = if value >= 99.95 { 0 } else { 1 + usize::from(value < 9.995) };
    format!("{value:.digits$} {unit}")
}

fn histogram(steps: &[(f64, u64)]) -> Vec<String> {
    let most = steps.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let line = |(up_to_ms, count): &(f64, u64)| {
        let bar = "█".repeat((count * BAR_CHARS_MAX).div_ceil(most) as usize);
        format!("  ≤ {:>8}  {count:>10}  {bar}", ms(*up_to_ms)).trim_end().to_owned()
    };
    steps.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_three_digits_and_the_unit_that_fits() {
        let all: Vec<String> = [0.0004, 0.25, 1.0, 9.996, 42.25, 999.4, 12_345.0].map(ms).to_vec();
        assert_eq!(all, ["0.40 µs", "250 µs", "1.00 ms", "10.0 ms", "42.2 ms", "999 ms", "12.3 s"]);
    }

    #[test]
    fn the_longest_bar_is_the_most_and_a_single_operation_is_seen() {
        let lines = histogram(&[(1.023, 1_000), (2.047, 1), (4.095, 0)]);
        assert_eq!(lines[0].matches('█').count(), 40);
        assert_eq!(lines[1].matches('█').count(), 1);
        assert!(lines[2].ends_with(" 0"));
    }
}
