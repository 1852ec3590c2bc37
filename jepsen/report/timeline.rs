//! Latencies and faults over time, as SVG.

use std::fmt::Write as _;

use crate::judge::history::{History, Op, Outcome};

const WIDTH: f64 = 1200.0;
const LEFT: f64 = 60.0;
const PLOT_TOP: f64 = 20.0;
const PLOT_HEIGHT: f64 = 300.0;
/// Each fault has a row of its own below the plot when it overlaps others.
const ROW: f64 = 16.0;
/// More dots make the page slow and show no more.
const DOTS_MAX: usize = 6_000;
/// The latency axis is logarithmic, from 0.1 ms to 10 s.
const LATENCY_MIN_MS: f64 = 0.1;
const DECADES: f64 = 5.0;

struct Scale {
    end_s: f64,
}

impl Scale {
    fn x(&self, ns: u64) -> f64 {
        LEFT + (WIDTH - LEFT - 10.0) * (ns as f64 / 1e9 / self.end_s).min(1.0)
    }

    fn y(&self, latency_ms: f64) -> f64 {
        let decades = (latency_ms.max(LATENCY_MIN_MS) / LATENCY_MIN_MS).log10().min(DECADES);
        PLOT_TOP + PLOT_HEIGHT * (1.0 - decades / DECADES)
    }
}

/// The picture: a dot for each call (sampled), coloured by outcome; a bar for each fault.
pub fn svg(history: &History) -> String {
    let last_ns = history.ops.iter().map(|op| op.returned_ns).max().unwrap_or(0);
    let scale = Scale { end_s: (last_ns as f64 / 1e9).max(1.0) };
    let mut body = String::new();
    let rows = faults(&mut body, history, &scale);
    axes(&mut body, &scale);
    dots(&mut body, &history.ops, &scale);
    let height = PLOT_TOP + PLOT_HEIGHT + 30.0 + ROW * rows as f64;
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" xmlns=\"http://www.w3.org/2000/svg\" font-family=\"sans-serif\" \
         font-size=\"11\">{body}</svg>"
    )
}

fn axes(body: &mut String, scale: &Scale) {
    for decade in 0..=DECADES as i32 {
        let latency_ms = LATENCY_MIN_MS * 10f64.powi(decade);
        let y = scale.y(latency_ms);
        let _ =
            write!(body, "<line x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>");
        let _ = write!(body, "<text x=\"4\" y=\"{:.1}\">{latency_ms} ms</text>", y + 4.0);
    }
    let step_s = (scale.end_s / 10.0).ceil().max(1.0);
    let y = PLOT_TOP + PLOT_HEIGHT + 14.0;
    let mut at_s = 0.0;
    while at_s <= scale.end_s {
        let x = scale.x((at_s * 1e9) as u64);
        let _ = write!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\">{at_s} s</text>");
        at_s += step_s;
    }
}

fn dots(body: &mut String, ops: &[Op], scale: &Scale) {
    let step = ops.len().div_ceil(DOTS_MAX).max(1);
    // Doubtful calls are few and matter: every one of them is drawn.
    let shown = ops
        .iter()
        .enumerate()
        .filter(|(index, op)| index % step == 0 || matches!(op.outcome, Outcome::Unknown(_)));
    for (_, op) in shown {
        let colour = match op.outcome {
            Outcome::Ok(_) => "#2a7",
            Outcome::Failed(_) => "#999",
            Outcome::Unknown(_) => "#d33",
        };
        let latency_ms = (op.returned_ns - op.invoked_ns) as f64 / 1e6;
        let (x, y) = (scale.x(op.invoked_ns), scale.y(latency_ms));
        let _ = write!(body, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"1.4\" fill=\"{colour}\"/>");
    }
}

/// Draws the bars and returns how many rows they take.
fn faults(body: &mut String, history: &History, scale: &Scale) -> usize {
    let mut row_ends: Vec<f64> = Vec::new();
    for fault in &history.faults {
        let (from, to) = (scale.x(fault.started_ns), scale.x(fault.healed_ns.max(fault.started_ns)));
        let colour = if fault.effect.is_ok() { "#e90" } else { "#bbb" };
        let width = (to - from).max(2.0);
        let _ = write!(
            body,
            "<rect x=\"{from:.1}\" y=\"{PLOT_TOP}\" width=\"{width:.1}\" height=\"{PLOT_HEIGHT}\" fill=\"{colour}\" \
             opacity=\"0.15\"/>"
        );
        let label_end = from + width.max(7.0 * fault.name.len() as f64);
        let free = row_ends.iter().position(|end| *end < from);
        let row = free.unwrap_or_else(|| {
            row_ends.push(0.0);
            row_ends.len() - 1
        });
        row_ends[row] = label_end;
        let y = PLOT_TOP + PLOT_HEIGHT + 20.0 + ROW * row as f64;
        let _ = write!(
            body,
            "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"3\" fill=\"{colour}\"/>\
             <text x=\"{from:.1}\" y=\"{:.1}\">{}</text>",
            y + 13.0,
            fault.name
        );
    }
    row_ends.len()
}
