//! The page as text, for terminals and logs.

use std::fmt::{self, Write as _};

use super::{Report, latency_line};
use crate::judge::verdict::Held;

/// The whole page.
pub fn page(report: &Report) -> String {
    let mut page = String::new();
    write_page(&mut page, report).expect("writing to a string does not fail");
    page
}

fn write_page(page: &mut String, report: &Report) -> fmt::Result {
    writeln!(page, "workloads  {}", report.workloads.join(", "))?;
    writeln!(page, "nemesis    {}", report.nemesis)?;
    writeln!(page, "seed       {}", report.seed)?;
    writeln!(page, "replay     {}", report.replay)?;
    writeln!(page, "build      {}", report.version)?;
    let (driven, took) = (report.driven.as_secs_f64(), report.took.as_secs_f64());
    writeln!(page, "time       {driven:.0} s driven, {took:.0} s in all")?;
    write_calls(page, report)?;
    write_faults(page, report)?;
    write_verdicts(page, report)?;
    let objections = report.objections();
    if objections.is_empty() {
        return writeln!(page, "\nPASSED");
    }
    writeln!(page, "\nFAILED")?;
    objections.iter().try_for_each(|objection| writeln!(page, "  {objection}"))
}

fn write_calls(page: &mut String, report: &Report) -> fmt::Result {
    writeln!(page, "\n{:<14} {:>8} {:>8} {:>8}", "calls", "ok", "failed", "unknown")?;
    for (workload, tally) in report.tallies() {
        writeln!(page, "{workload:<14} {:>8} {:>8} {:>8}", tally.ok, tally.failed, tally.unknown)?;
    }
    writeln!(page, "latency of acknowledged calls: {}", latency_line(&report.history.ops))?;
    let events: usize = report.history.watches.iter().map(|stream| stream.items.len()).sum();
    writeln!(page, "{} watch streams, {events} responses", report.history.watches.len())
}

fn write_faults(page: &mut String, report: &Report) -> fmt::Result {
    let (planned, effective) = report.faults();
    writeln!(page, "\nfaults: {effective} of {planned} took effect")?;
    for fault in &report.history.faults {
        let (from, to) = (fault.started_ns as f64 / 1e9, fault.healed_ns as f64 / 1e9);
        let effect = match &fault.effect {
            Ok(evidence) => evidence.clone(),
            Err(reason) => format!("NO EFFECT: {reason}"),
        };
        writeln!(page, "  {from:>6.1} to {to:>6.1} s  {:<22} {effect}", fault.name)?;
        if let Some(error) = &fault.heal_error {
            writeln!(page, "  {:>18} not healed: {error}", "")?;
        }
    }
    Ok(())
}

fn write_verdicts(page: &mut String, report: &Report) -> fmt::Result {
    writeln!(page, "\nclaims")?;
    for (workload, verdict) in &report.verdicts {
        let (mark, findings) = match &verdict.outcome {
            Held::Yes => ("holds", Vec::new()),
            Held::No(findings) => ("VIOLATED", findings.clone()),
            Held::Undecided(reason) => ("UNDECIDED", vec![reason.clone()]),
        };
        writeln!(page, "  {mark:<9} {workload:<12} {} ({} checked)", verdict.claim, verdict.checked)?;
        let note = Some(&verdict.note).filter(|note| !note.is_empty());
        findings.iter().chain(note).try_for_each(|line| writeln!(page, "            {line}"))?;
    }
    Ok(())
}
