//! The report: RESULTS.md and its charts, from the results file alone.
//!
//! A figure is the median of its rounds, a ratio that of two medians. Only measurements under the
//! setting of the newest line count, so figures of different builds never stand side by side.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::bench::Side;
use crate::chart::{self, Bar, Span};
use crate::curves;
use crate::figures::number;
use crate::results::{Line, Results, Setting};
use crate::rows::{self, Bound, Goal, Row};

/// What a linearizable read may cost of what a call costs at least.
const READ_OF_BARE_MAX: f64 = 1.4;

/// Writes `RESULTS.md` and `charts/` into `directory`.
///
/// # Errors
/// When there is nothing to report, or it cannot be written.
pub fn write(results: &Results, directory: &Path) -> Result<()> {
    let setting = results.newest().context("nothing is measured yet")?;
    let report = Report { results, setting };
    let charts = directory.join("charts");
    fs::create_dir_all(&charts)?;
    fs::write(directory.join("RESULTS.md"), report.text())?;
    fs::write(charts.join("cpu.svg"), report.cpu_chart())?;
    fs::write(charts.join("throughput.svg"), report.throughput_chart())?;
    fs::write(charts.join("latency.svg"), report.latency_chart())?;
    for curve in curves::ALL {
        if let Some(svg) = curve.chart(&|row, side, metric| report.median(row, side, metric)) {
            fs::write(charts.join(curve.file()), svg)?;
        }
    }
    Ok(())
}

struct Report<'a> {
    results: &'a Results,
    setting: &'a Setting,
}

/// How a goal stands.
struct Standing {
    etcd: Option<f64>,
    ours: Option<f64>,
    /// Ours as a part of etcd's.
    ratio: Option<f64>,
    /// Not known while a figure is missing.
    met: Option<bool>,
}

impl Report<'_> {
    fn lines(&self, row: &str, side: Side) -> Vec<&Line> {
        self.results.rounds(row, side.name(), self.setting)
    }

    /// The median of the rounds.
    fn median(&self, row: &str, side: Side, metric: &str) -> Option<f64> {
        let values = self.lines(row, side).into_iter().filter_map(|line| line.figures.get(metric)).collect();
        median(values)
    }

    fn standing(&self, row: &Row, goal: &Goal) -> Standing {
        let [etcd, ours] = [Side::Etcd, Side::Mainstay].map(|side| self.median(row.name, side, goal.metric));
        let ratio = etcd.zip(ours).map(|(etcd, ours)| ours / etcd).filter(|ratio| ratio.is_finite());
        let met = match goal.bound {
            Bound::AtMostOfEtcd(most) => ratio.map(|ratio| ratio <= most),
            Bound::AtLeastOfEtcd(least) => ratio.map(|ratio| ratio >= least),
            Bound::AtMost(most) => ours.map(|ours| ours <= most),
            Bound::AtLeast(least) => ours.map(|ours| ours >= least),
        };
        Standing { etcd, ours, ratio, met }
    }

    fn text(&self) -> String {
        let parts =
            [self.head(), self.goals(), self.floor(), self.curves(), self.everything(), self.reproduce()];
        parts.join("\n")
    }

    fn head(&self) -> String {
        let Setting { etcd, mainstay, seconds, machine } = self.setting;
        let all = self.results.of(self.setting);
        let rounds = all.iter().map(|line| line.round).max().unwrap_or(0);
        let newest = all.iter().map(|line| line.at).max().unwrap_or(0);
        format!(
            "# etcd and Mainstay, side by side\n\n\
             Written by `make bench-compare` from `results.jsonl`; do not edit.\n\n\
             | | |\n|---|---|\n\
             | machine | {machine} |\n\
             | etcd | {etcd} |\n\
             | Mainstay | {mainstay}: the hash is the program's |\n\
             | last measured | {} |\n\
             | figures | medians of {rounds} rounds, {seconds} s each after a warm-up of a fifth of that |\n\
             | order | row by row, etcd and Mainstay in turn, a new cluster each time |\n\
             | servers | three nodes on loopback unless a row says otherwise, default settings on both sides, \
             given only names, addresses and directories; data on one file system |\n\
             | durability | the same: a write is acknowledged when a majority has synced its log (fsync) to disk |\n\
             | client | the crate `etcd-client` on both sides; it shares the machine's cores with the servers |\n\n\
             The client caps throughput and takes CPU from the servers, so **CPU per operation, of all server \
             nodes together, is the figure to judge by first**; operations per second are a lower bound of what \
             the faster side can do.\n\n\
             ![CPU](charts/cpu.svg)\n\n![throughput](charts/throughput.svg)\n\n![latency](charts/latency.svg)\n",
            date(newest),
        )
    }

    /// One line for each goal.
    fn goals(&self) -> String {
        let mut text = String::from(
            "## What had to be reached\n\n\
             | row | load | figure | etcd | Mainstay | Mainstay / etcd | goal | |\n\
             |---|---|---|--:|--:|--:|---|---|\n",
        );
        for row in rows::all() {
            for (i, goal) in row.goals.iter().enumerate() {
                let at = self.standing(&row, goal);
                let name = if i == 0 { (row.name, row.load) } else { ("", "") };
                let verdict = match at.met {
                    Some(true) => "met",
                    Some(false) => "**missed**",
                    None => "not measured",
                };
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {} | {} | {} | {} | {verdict} |",
                    name.0,
                    name.1,
                    words(goal.metric),
                    shown(at.etcd),
                    shown(at.ours),
                    at.ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}")),
                    goal.bound,
                );
            }
        }
        text
    }

    /// What a call costs at least.
    fn floor(&self) -> String {
        let Some(bare) = self.median("bare", Side::Bare, "cpu_us_per_op") else { return String::new() };
        let read = self.median("range-linearizable", Side::Mainstay, "cpu_us_per_op");
        let of_bare = read.map_or(String::new(), |read| {
            let verdict = if read / bare <= READ_OF_BARE_MAX { "met" } else { "**missed**" };
            format!(
                " A linearizable read of Mainstay costs {:.2} times that (goal ≤ {READ_OF_BARE_MAX}, {verdict}).",
                read / bare
            )
        });
        format!(
            "## What a call costs at least\n\n\
             A server made of the same gRPC library, in one process, that answers every read with a constant \
             uses {} µs of CPU per call under the same clients, and serves {} calls per second.{of_bare}\n",
            number(bare),
            shown(self.median("bare", Side::Bare, "ops_per_s")),
        )
    }

    /// How cost grows.
    fn curves(&self) -> String {
        let median = |row: &str, side, metric: &str| self.median(row, side, metric);
        let sections: Vec<String> = curves::ALL.iter().filter_map(|curve| curve.section(&median)).collect();
        if sections.is_empty() {
            return String::new();
        }
        format!("## How cost grows\n\n{}", sections.join("\n"))
    }

    /// Every figure of every row and side.
    fn everything(&self) -> String {
        let mut text = String::from(
            "## All figures\n\n\
             Spread is that of CPU per operation between the rounds: highest less lowest, of the median.\n\n\
             | row | | rounds | ops/s | p50 ms | p99 ms | p99.9 ms | CPU µs/op | spread | RSS MiB | errors | more |\n\
             |---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n",
        );
        for row in rows::all().into_iter().chain(curves::points()) {
            for side in row.sides {
                let lines = self.lines(row.name, *side);
                if lines.is_empty() {
                    continue;
                }
                let figure = |metric| shown(self.median(row.name, *side, metric));
                let cpu: Vec<f64> = lines.iter().filter_map(|line| line.figures.cpu_us_per_op).collect();
                let errors: u64 = lines.iter().map(|line| line.figures.errors).sum();
                let own: BTreeSet<&String> =
                    lines.iter().flat_map(|line| line.figures.extra.keys()).collect();
                let own: Vec<String> =
                    own.into_iter().map(|name| format!("{} {}", words(name), figure(name))).collect();
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {errors} | {} |",
                    row.name,
                    side.name(),
                    lines.len(),
                    figure("ops_per_s"),
                    figure("p50_ms"),
                    figure("p99_ms"),
                    figure("p999_ms"),
                    figure("cpu_us_per_op"),
                    spread(&cpu),
                    figure("rss_mib"),
                    own.join(", "),
                );
            }
        }
        text
    }

    fn reproduce(&self) -> String {
        format!(
            "## To measure it yourself\n\n\
             `make bench-compare` builds Mainstay, gets etcd if there is none, measures what `results.jsonl` does \
             not have for these programs and this machine, and writes this page. \
             `make bench-compare SECONDS={} ROUNDS=3` says how long; `cargo bench --profile release --bench compare \
             -- --help` lists more: single rows, one side, another etcd, measuring again. A measurement that is \
             interrupted goes on where it stopped. Leave the machine alone meanwhile.\n",
            self.setting.seconds
        )
    }

    fn bars(&self, metric: &str) -> Vec<Bar> {
        let bar = |row: &Row| {
            let goal = row.goals.iter().find(|goal| goal.metric == metric);
            let at = self.standing(row, goal.unwrap_or(&Goal { metric: "", bound: Bound::AtMost(0.0) }));
            let far = goal.and_then(|goal| match goal.bound {
                Bound::AtMostOfEtcd(part) | Bound::AtLeastOfEtcd(part) => Some(part),
                Bound::AtMost(_) | Bound::AtLeast(_) => None,
            });
            Some(Bar {
                label: row.name.to_owned(),
                ratio: at.ratio?,
                goal: far.zip(at.met),
                note: format!("({} : {})", number(at.ours?), number(at.etcd?)),
            })
        };
        rows::all().iter().filter_map(bar).collect()
    }

    fn cpu_chart(&self) -> String {
        let title = "Server CPU per operation, as a part of etcd's";
        chart::ratios(
            title,
            "less is better; the tick is the goal, orange misses it; (Mainstay : etcd, µs)",
            &self.bars("cpu_us_per_op"),
        )
    }

    fn throughput_chart(&self) -> String {
        let title = "Operations per second, as a multiple of etcd's";
        chart::ratios(
            title,
            "more is better, capped by the client; the tick is the goal, orange misses it",
            &self.bars("ops_per_s"),
        )
    }

    fn latency_chart(&self) -> String {
        let side = |row: &Row, side| {
            let quantiles = ["p50_ms", "p99_ms", "p999_ms"].map(|name| self.median(row.name, side, name));
            let [p50, p99, p999] = quantiles;
            Some([p50?, p99?, p999?])
        };
        let spans: Vec<Span> = rows::all()
            .iter()
            .map(|row| Span {
                label: row.name.to_owned(),
                etcd: side(row, Side::Etcd),
                mainstay: side(row, Side::Mainstay),
            })
            .filter(|span| span.etcd.is_some() || span.mainstay.is_some())
            .collect();
        chart::spans("Latency", "p50, p99 and p99.9; less is better", &spans)
    }
}

/// The middle, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some((low + high) / 2.0)
}

fn spread(values: &[f64]) -> String {
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    match median(values.to_vec()) {
        Some(median) if median > 0.0 && values.len() > 1 => {
            format!("{:.0} %", (high - low) / median * 100.0)
        }
        _ => "–".to_owned(),
    }
}

fn shown(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), number)
}

/// A metric in words; its unit is the end of its name.
fn words(metric: &str) -> String {
    match metric {
        "ops_per_s" => "ops/s".to_owned(),
        "cpu_us_per_op" => "CPU µs/op".to_owned(),
        "p99_ms" => "p99 ms".to_owned(),
        own => own.replace("_us", " µs").replace("_mib", " MiB").replace("kib_", "KiB ").replace('_', " "),
    }
}

/// A day, from seconds since 1970, as the system's `date` writes it.
fn date(seconds: u64) -> String {
    let written = Command::new("date").args(["--utc", "--date", &format!("@{seconds}"), "+%F"]).output();
    match written {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => format!("{seconds} s after 1970"),
    }
}
