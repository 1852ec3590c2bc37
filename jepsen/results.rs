//! The record of runs, kept with the sources: one line of JSON for each run in
//! `results.jsonl`, from which the tables of `RESULTS.md` are made.
//!
//! Lines are only ever added, so that the matrix fills over many sittings.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::report::Report;

/// One run, as it is remembered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    pub date: String,
    pub commit: String,
    pub seed: u64,
    pub nemesis: String,
    pub members: usize,
    pub workloads: Vec<String>,
    pub passed: bool,
    /// Calls, by outcome.
    pub ok: usize,
    pub failed: usize,
    pub unknown: usize,
    /// For each fault: how often it took effect, and for how long in all.
    pub faults: BTreeMap<String, FaultTime>,
    /// Why it did not pass.
    pub objections: Vec<String>,
}

/// How often and how long a fault was at work in a run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct FaultTime {
    pub times: usize,
    pub seconds: f64,
}

/// A cell of the matrix counts when its workload ran this long under the fault.
pub const CELL_SECONDS_MIN: f64 = 10.0;

/// Ends the part of `RESULTS.md` that is not made from the record.
const MARK: &str = "<!-- below this line: written by `make jepsen-long` -->";

fn folder() -> PathBuf {
    PathBuf::from("jepsen")
}

/// What a command says, on one line; nothing when it does not work.
pub fn command_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

impl Line {
    /// What is remembered of `report`.
    pub fn of(report: &Report, members: usize) -> Line {
        let mut faults: BTreeMap<String, FaultTime> = BTreeMap::new();
        for fault in report.history.faults.iter().filter(|fault| fault.effect.is_ok()) {
            let time = faults.entry(fault.name.to_owned()).or_default();
            time.times += 1;
            time.seconds += fault.healed_ns.saturating_sub(fault.started_ns) as f64 / 1e9;
        }
        let tallies = report.tallies();
        let objections = report.objections();
        Line {
            date: command_line("date", &["-u", "+%Y-%m-%d %H:%M"]),
            commit: command_line("git", &["rev-parse", "--short", "HEAD"]),
            seed: report.seed,
            nemesis: report.nemesis.clone(),
            members,
            workloads: report.workloads.iter().map(|name| (*name).to_owned()).collect(),
            passed: objections.is_empty(),
            ok: tallies.values().map(|tally| tally.ok).sum(),
            failed: tallies.values().map(|tally| tally.failed).sum(),
            unknown: tallies.values().map(|tally| tally.unknown).sum(),
            faults,
            objections,
        }
    }

    /// How many faults took effect.
    pub fn fault_times(&self) -> usize {
        self.faults.values().map(|time| time.times).sum()
    }

    /// Leaves it in the run's folder, for whoever started the run.
    pub fn save(&self, folder: &Path) -> anyhow::Result<()> {
        fs::write(folder.join("line.json"), serde_json::to_string(self)?)?;
        Ok(())
    }

    /// What the run with this folder left.
    pub fn load(folder: &Path) -> anyhow::Result<Line> {
        let text = fs::read_to_string(folder.join("line.json")).context("the run left no result")?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Adds it to the record.
    pub fn append(&self) -> anyhow::Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(folder().join("results.jsonl"))?;
        writeln!(file, "{}", serde_json::to_string(self)?)?;
        Ok(())
    }
}

/// Every run on record.
pub fn read() -> anyhow::Result<Vec<Line>> {
    let text = fs::read_to_string(folder().join("results.jsonl")).unwrap_or_default();
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Seconds of each workload under each fault, over all runs that passed.
pub fn cells(lines: &[Line]) -> BTreeMap<(String, String), f64> {
    let mut cells = BTreeMap::new();
    for line in lines.iter().filter(|line| line.passed) {
        for (fault, time) in &line.faults {
            for workload in &line.workloads {
                *cells.entry((fault.clone(), workload.clone())).or_insert(0.0) += time.seconds;
            }
        }
    }
    cells
}

/// How often power failed at all nodes at once in runs that passed.
pub fn power_failures_of_all(lines: &[Line]) -> usize {
    let passed = lines.iter().filter(|line| line.passed);
    passed.filter_map(|line| line.faults.get("power-all")).map(|time| time.times).sum()
}

/// Writes the tables of `RESULTS.md` anew from the record.
pub fn render(faults: &[&str], workloads: &[&str]) -> anyhow::Result<()> {
    let lines = read()?;
    let path = folder().join("RESULTS.md");
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let head = kept.split(MARK).next().unwrap_or_default().trim_end();
    let page = format!("{head}\n\n{MARK}\n\n{}", tables(&lines, faults, workloads));
    fs::write(path, page)?;
    Ok(())
}

fn tables(lines: &[Line], faults: &[&str], workloads: &[&str]) -> String {
    let mut page = String::new();
    let passed: Vec<&Line> = lines.iter().filter(|line| line.passed).collect();
    let calls: usize = passed.iter().map(|line| line.ok + line.failed + line.unknown).sum();
    let injected: usize = passed.iter().map(|line| line.fault_times()).sum();
    let _ = writeln!(
        page,
        "{} runs on record, {} passed: {calls} calls, {injected} faults that took effect, among them {} power \
         failures of all nodes at once.\n",
        lines.len(),
        passed.len(),
        power_failures_of_all(lines)
    );
    matrix(&mut page, lines, faults, workloads);
    let _ = writeln!(
        page,
        "\n## Runs\n\n| date (UTC) | commit | seed | nodes | nemesis | calls | faults | result |"
    );
    let _ = writeln!(page, "|---|---|---|---|---|---|---|---|");
    for line in lines {
        let calls = line.ok + line.failed + line.unknown;
        let result =
            if line.passed { "passed".to_owned() } else { line.objections.join("; ").replace('|', "/") };
        let Line { date, commit, seed, members, nemesis, .. } = line;
        let faults = line.fault_times();
        let _ = writeln!(
            page,
            "| {date} | {commit} | {seed} | {members} | {nemesis} | {calls} | {faults} | {result} |"
        );
    }
    page
}

fn matrix(page: &mut String, lines: &[Line], faults: &[&str], workloads: &[&str]) {
    let cells = cells(lines);
    let filled = |fault: &str, workload: &str| {
        cells.get(&(fault.to_owned(), workload.to_owned())).copied().unwrap_or_default()
    };
    let all = faults.iter().flat_map(|fault| workloads.iter().map(move |workload| filled(fault, workload)));
    let done = all.filter(|seconds| *seconds >= CELL_SECONDS_MIN).count();
    let _ = writeln!(
        page,
        "## Matrix\n\nSeconds that each workload ran under each fault, in runs where every claim held; a cell counts \
         from {CELL_SECONDS_MIN} on: {done} of {} do.\n",
        faults.len() * workloads.len()
    );
    let _ = writeln!(page, "| fault | {} |", workloads.join(" | "));
    let _ = writeln!(page, "|---{}|", "|---".repeat(workloads.len()));
    for fault in faults {
        let row: Vec<String> =
            workloads.iter().map(|workload| format!("{:.0}", filled(fault, workload))).collect();
        let _ = writeln!(page, "| {fault} | {} |", row.join(" | "));
    }
}
