//! How far something long has come, on stderr and only on a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar with a known end, counted in items.
pub fn items(total: u64, what: &str) -> ProgressBar {
    styled(Some(total), &format!("{{bar:32}} {{human_pos}}/{{human_len}} {what}  {{msg}}"))
}

/// A bar without a known end, counted in items.
pub fn counter(what: &str) -> ProgressBar {
    styled(None, &format!("{{spinner}} {{human_pos}} {what}  {{elapsed}}  {{msg}}"))
}

/// A bar without a known end, counted in bytes.
pub fn bytes() -> ProgressBar {
    styled(None, "{spinner} {binary_bytes}  {binary_bytes_per_sec}  {elapsed}  {msg}")
}

fn styled(total: Option<u64>, template: &str) -> ProgressBar {
    // Draws nothing when stderr is no terminal.
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
    bar.set_style(ProgressStyle::with_template(template).expect("the templates of this file are correct"));
    if total.is_none() {
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}
