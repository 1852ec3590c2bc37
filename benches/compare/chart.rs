//! Charts as SVG, written by hand: bars of a part of etcd's figure, and spans of latencies. It knows
//! shapes and nothing of rows.

use std::fmt::Write;

const ROW_PX: f64 = 26.0;
const LABEL_PX: f64 = 170.0;
const PLOT_PX: f64 = 520.0;
const NOTE_PX: f64 = 190.0;
const TOP_PX: f64 = 52.0;
const BOTTOM_PX: f64 = 34.0;

const ETCD: &str = "#8a94a6";
const MAINSTAY: &str = "#2f6fde";
const MISSED: &str = "#d9822b";
const GRID: &str = "#e3e7ee";
const TEXT: &str = "#222b38";

/// One bar: a part of etcd's figure.
#[derive(Clone, Debug)]
pub struct Bar {
    /// The row's name.
    pub label: String,
    /// The part.
    pub ratio: f64,
    /// How far it has to reach, and whether it does.
    pub goal: Option<(f64, bool)>,
    /// The figures behind it.
    pub note: String,
}

/// Latencies of one row on one side, in milliseconds: p50, p99, p99.9.
#[derive(Clone, Debug)]
pub struct Span {
    /// The row's name.
    pub label: String,
    /// etcd's.
    pub etcd: Option<[f64; 3]>,
    /// Mainstay's.
    pub mainstay: Option<[f64; 3]>,
}

struct Canvas {
    svg: String,
    rows: usize,
}

impl Canvas {
    fn new(title: &str, subtitle: &str, rows: usize) -> Canvas {
        let width = LABEL_PX + PLOT_PX + NOTE_PX;
        let height = TOP_PX + rows as f64 * ROW_PX + BOTTOM_PX;
        let svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
        );
        let mut canvas = Canvas { svg, rows };
        canvas.text(12.0, 20.0, "start", title, "font-size=\"15\" font-weight=\"600\"");
        canvas.text(12.0, 38.0, "start", subtitle, "fill-opacity=\"0.7\"");
        canvas
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str, more: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let line =
            format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{TEXT}\" {more}>");
        self.svg.push_str(&format!("{line}{text}</text>\n"));
    }

    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        let _ = writeln!(
            self.svg,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{fill}\" rx=\"2\"/>",
            width.max(1.0)
        );
    }

    fn dot(&mut self, x: f64, y: f64, fill: &str) {
        let _ = writeln!(self.svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{fill}\"/>");
    }

    /// A vertical line through the rows, with its value below.
    fn mark(&mut self, x: f64, label: &str, strong: bool) {
        let bottom = TOP_PX + self.rows as f64 * ROW_PX;
        let colour = if strong { ETCD } else { GRID };
        let _ = writeln!(
            self.svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP_PX}\" y2=\"{bottom:.1}\" stroke=\"{colour}\"/>"
        );
        self.text(x, bottom + 16.0, "middle", label, "fill-opacity=\"0.7\"");
    }

    fn end(mut self) -> String {
        self.svg.push_str("</svg>\n");
        self.svg
    }
}

fn row_top(i: usize) -> f64 {
    TOP_PX + i as f64 * ROW_PX
}

/// Bars of parts of etcd's figure; etcd is the line at 1, a black tick is the goal.
pub fn ratios(title: &str, subtitle: &str, bars: &[Bar]) -> String {
    let mut canvas = Canvas::new(title, subtitle, bars.len());
    let reach = bars.iter().flat_map(|bar| [bar.ratio, bar.goal.map_or(0.0, |(goal, _)| goal)]);
    let most = reach.fold(1.2_f64, f64::max).min(10.0) * 1.05;
    let x = |ratio: f64| LABEL_PX + (ratio / most).min(1.0) * PLOT_PX;
    let step = if most > 4.0 {
        1.0
    } else if most > 2.0 {
        0.5
    } else {
        0.2
    };
    for i in 0..=(most / step) as usize {
        let at = i as f64 * step;
        canvas.mark(x(at), &format!("{}", (at * 10.0).round() / 10.0), (at - 1.0).abs() < 1e-9);
    }
    for (i, bar) in bars.iter().enumerate() {
        let top = row_top(i);
        let colour = if bar.goal.is_none_or(|(_, met)| met) { MAINSTAY } else { MISSED };
        canvas.text(LABEL_PX - 8.0, top + 17.0, "end", &bar.label, "");
        canvas.rect(LABEL_PX, top + 5.0, x(bar.ratio) - LABEL_PX, ROW_PX - 10.0, colour);
        if let Some((goal, _)) = bar.goal {
            canvas.rect(x(goal) - 1.0, top + 2.0, 2.0, ROW_PX - 4.0, TEXT);
        }
        let note = format!("{:.2}  {}", bar.ratio, bar.note);
        canvas.text(LABEL_PX + PLOT_PX + 8.0, top + 17.0, "start", &note, "");
    }
    canvas.end()
}

/// Latencies from p50 over p99 to p99.9, on a logarithmic scale.
pub fn spans(title: &str, subtitle: &str, spans: &[Span]) -> String {
    let mut canvas = Canvas::new(title, subtitle, spans.len());
    let all = || spans.iter().flat_map(|span| [span.etcd, span.mainstay]).flatten().flatten();
    let least = all().fold(1.0_f64, f64::min).max(0.001).log10().floor();
    let most = all().fold(1.0_f64, f64::max).log10().ceil().max(least + 1.0);
    let x = |ms: f64| LABEL_PX + (ms.max(0.001).log10() - least) / (most - least) * PLOT_PX;
    for power in least as i32..=most as i32 {
        canvas.mark(x(10_f64.powi(power)), &format!("{} ms", 10_f64.powi(power)), false);
    }
    for (i, span) in spans.iter().enumerate() {
        let top = row_top(i);
        canvas.text(LABEL_PX - 8.0, top + 17.0, "end", &span.label, "");
        for (latencies, y, colour) in [(span.etcd, top + 8.0, ETCD), (span.mainstay, top + 18.0, MAINSTAY)] {
            let Some([p50, p99, p999]) = latencies else { continue };
            canvas.rect(x(p50), y - 1.0, x(p999) - x(p50), 2.0, colour);
            [p50, p99, p999].into_iter().for_each(|ms| canvas.dot(x(ms), y, colour));
        }
    }
    let (legend_x, y) = (LABEL_PX + PLOT_PX + 16.0, TOP_PX + 12.0);
    for (i, (name, colour)) in [("etcd", ETCD), ("Mainstay", MAINSTAY)].into_iter().enumerate() {
        let y = y + 18.0 * i as f64;
        canvas.dot(legend_x, y - 4.0, colour);
        canvas.text(legend_x + 8.0, y, "start", name, "");
    }
    canvas.end()
}

/// One line of a chart of costs: a value for each place on the axis, as far as it was measured.
#[derive(Clone, Debug)]
pub struct Course {
    /// What costs, and where.
    pub label: String,
    /// Whether it is Mainstay's.
    pub ours: bool,
    /// The costs.
    pub values: Vec<Option<f64>>,
}

impl Course {
    /// The highest cost as a multiple of the first.
    pub fn growth(&self) -> String {
        let first = self.values.first().copied().flatten();
        let most = self.values.iter().flatten().copied().fold(f64::MIN, f64::max);
        first.filter(|first| *first > 0.0).map_or("–".to_owned(), |first| format!("× {:.2}", most / first))
    }
}

/// Costs over places that are equally far apart, from zero up.
pub fn courses(title: &str, places: &[&str], courses: &[Course]) -> String {
    const ROWS: usize = 10;
    let mut canvas = Canvas::new(title, "less is better; over all nodes; flat is best", ROWS);
    let most =
        courses.iter().flat_map(|course| course.values.iter().flatten()).fold(1e-9_f64, |m, v| m.max(*v));
    let height = ROWS as f64 * ROW_PX;
    let x = |place: usize| LABEL_PX + (place as f64 + 0.5) / places.len() as f64 * PLOT_PX;
    let y = |value: f64| TOP_PX + (1.0 - value / (most * 1.05)) * height;
    for (place, label) in places.iter().enumerate() {
        canvas.mark(x(place), label, false);
    }
    for part in 0..=4 {
        let value = most * f64::from(part) / 4.0;
        canvas.text(
            LABEL_PX - 8.0,
            y(value) + 4.0,
            "end",
            &crate::figures::number(value),
            "fill-opacity=\"0.7\"",
        );
    }
    for course in courses {
        let colour = if course.ours { MAINSTAY } else { ETCD };
        let points: Vec<(f64, f64)> =
            course.values.iter().enumerate().filter_map(|(place, v)| Some((x(place), y((*v)?)))).collect();
        let line: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            canvas.svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            line.join(" ")
        );
        points.iter().for_each(|(x, y)| canvas.dot(*x, *y, colour));
        if let Some((x, y)) = points.last() {
            canvas.text(x + 8.0, y + 4.0, "start", &course.label, "");
        }
    }
    canvas.end()
}
