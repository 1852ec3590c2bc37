//! One page for each run: what was done, what happened, what holds.
//!
//! A [`Report`] is the run's verdict; `text` and `html` show the same facts and
//! decide nothing.

mod html;
mod text;
mod timeline;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use crate::judge::history::{History, Op, Outcome};
use crate::judge::verdict::{Held, Verdict};

/// How many calls ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub ok: usize,
    pub failed: usize,
    pub unknown: usize,
}

/// What became of the nodes' processes.
#[derive(Clone, Debug, Default)]
pub struct NodeTrouble {
    /// Nodes that ended by themselves although no fault asked for it.
    pub exits: Vec<String>,
    /// Panics in their logs.
    pub panics: Vec<String>,
}

/// Everything that is said about one run.
pub struct Report {
    pub seed: u64,
    pub workloads: Vec<&'static str>,
    pub nemesis: String,
    /// The command that does the same again.
    pub replay: String,
    /// Which build was tested.
    pub version: String,
    /// How long workloads were driven.
    pub driven: Duration,
    /// From the first host made to the last verdict.
    pub took: Duration,
    pub history: History,
    pub verdicts: Vec<(&'static str, Verdict)>,
    pub nodes: NodeTrouble,
    /// Trouble of the harness itself: a run that has any proves nothing.
    pub harness: Vec<String>,
}

/// Fewer acknowledged calls per driven second, for each workload, and the run was not worth running.
const ACKNOWLEDGED_PER_SECOND_MIN: f64 = 2.0;
/// What an objection says before a claim that was contradicted, and before a node that ended.
pub const CONTRADICTED: &str = "does not hold: ";
pub const NODE_ENDED: &str = "a node ended by itself: ";
/// The least share of the faults that must have taken effect.
const EFFECT_SHARE_MIN: f64 = 0.9;

impl Tally {
    /// Counts one call.
    pub fn add(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Ok(_) => self.ok += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Unknown(_) => self.unknown += 1,
        }
    }
}

impl Report {
    /// Calls by workload.
    pub fn tallies(&self) -> BTreeMap<&'static str, Tally> {
        let mut tallies: BTreeMap<&'static str, Tally> = BTreeMap::new();
        for op in &self.history.ops {
            tallies.entry(op.workload).or_default().add(&op.outcome);
        }
        tallies
    }

    /// How many faults there were, and how many were seen to take effect.
    pub fn faults(&self) -> (usize, usize) {
        let took_effect = self.history.faults.iter().filter(|fault| fault.effect.is_ok()).count();
        (self.history.faults.len(), took_effect)
    }

    /// Why the run does not count as passed; empty when it does.
    pub fn objections(&self) -> Vec<String> {
        let mut objections: Vec<String> =
            self.harness.iter().map(|what| format!("harness: {what}")).collect();
        for (workload, verdict) in &self.verdicts {
            match verdict.outcome {
                Held::Yes => {}
                Held::No(_) => objections.push(format!("{workload}: {CONTRADICTED}{}", verdict.claim)),
                Held::Undecided(_) => objections.push(format!("{workload}: undecided: {}", verdict.claim)),
            }
        }
        objections.extend(self.nodes.exits.iter().map(|exit| format!("{NODE_ENDED}{exit}")));
        objections.extend(self.nodes.panics.iter().map(|panic| format!("a panic: {panic}")));
        objections.extend(self.not_worth_running());
        objections
    }

    fn not_worth_running(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        let (planned, effective) = self.faults();
        if self.nemesis != "none" && planned == 0 {
            reasons.push("no fault was injected".to_owned());
        }
        if (effective as f64) < planned as f64 * EFFECT_SHARE_MIN {
            reasons.push(format!("only {effective} of {planned} faults took effect"));
        }
        for fault in &self.history.faults {
            if let Some(error) = &fault.heal_error {
                reasons.push(format!("{} was not healed: {error}", fault.name));
            }
        }
        let tallies = self.tallies();
        for workload in &self.workloads {
            let ok = tallies.get(workload).map_or(0, |tally| tally.ok);
            let least = (self.driven.as_secs_f64() * ACKNOWLEDGED_PER_SECOND_MIN) as usize;
            if ok < least {
                reasons.push(format!("{workload}: only {ok} calls were acknowledged, {least} are the least"));
            }
        }
        let empty = self.verdicts.iter().filter(|(_, verdict)| verdict.checked == 0 && verdict.held());
        reasons.extend(
            empty.map(|(workload, verdict)| format!("{workload}: checked nothing: {}", verdict.claim)),
        );
        reasons
    }

    /// Writes the page as `report.txt` and `report.html` into `directory`.
    pub fn write(&self, directory: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        fs::write(directory.join("report.txt"), text::page(self))?;
        fs::write(directory.join("report.html"), html::page(self))?;
        Ok(())
    }

    /// The page as text.
    pub fn text(&self) -> String {
        text::page(self)
    }
}

/// Latencies of acknowledged calls in milliseconds at the given shares (0.5 is the median).
fn latencies_ms(ops: &[Op], shares: &[f64]) -> Vec<f64> {
    let acknowledged = ops.iter().filter(|op| op.reply().is_some());
    let mut latencies: Vec<u64> = acknowledged.map(|op| op.returned_ns - op.invoked_ns).collect();
    latencies.sort_unstable();
    let at = |share: f64| {
        let index = (latencies.len() as f64 * share) as usize;
        latencies.get(index.min(latencies.len().saturating_sub(1))).copied().unwrap_or(0)
    };
    shares.iter().map(|share| at(*share) as f64 / 1e6).collect()
}

/// The shares of [`latencies_ms`] that pages show, with their names.
const SHARES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)];

fn latency_line(ops: &[Op]) -> String {
    let shares: Vec<f64> = SHARES.iter().map(|(_, share)| *share).collect();
    let values = latencies_ms(ops, &shares);
    let named = SHARES.iter().zip(values).map(|((name, _), value)| format!("{name} {value:.1}"));
    format!("{} ms", named.collect::<Vec<_>>().join(", "))
}
