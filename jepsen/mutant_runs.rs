//! The proof of the harness itself: twelve builds that are wrong on purpose are
//! each run under a workload and faults that should show it, until a claim
//! that the bug breaks is seen broken.
//!
//! What counts is a contradicted claim out of the mutant's own list, or a node
//! that ended by itself where the bug makes nodes do that; a run that fails for
//! another reason proves nothing and is followed by the next seed. Before the
//! twelve, the same build with no bug chosen must pass under all those faults.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::args::Args;
use crate::report::Report;
use crate::run::Plan;

/// How long one mutant may stay unseen.
const LIMIT: Duration = Duration::from_secs(600);
/// How long clients and faults are at work in one run.
const DRIVEN: Duration = Duration::from_secs(30);
/// The file of the build that has the bugs, beside the product's.
const BINARY: &str = "mainstay-mutants";
/// Stands for a node that ended by itself or panicked, among the claims.
const NODE_ENDED: &str = "no node ends by itself";
/// The table's place in `RESULTS.md`.
const MARKS: [&str; 2] = ["<!-- mutants -->", "<!-- /mutants -->"];

/// One bug, and what should show it.
struct Trial {
    mutant: &'static str,
    workloads: &'static [&'static str],
    nemesis: &'static str,
    /// Beginnings of the claims of which it breaks at least one.
    claims: &'static [&'static str],
}

const LINEARIZABLE: &str = "every key is a linearizable register";
const NOTHING_LOST: &str = "no element is lost";
const AGREE: &str = "members agree";
const SERVES: &str = "every member serves again after healing";
const WATCHES: &str = "watch";
const REVISIONS: &str = "revision";

const TRIALS: [Trial; 12] = [
    Trial {
        mutant: "log-not-synced",
        workloads: &["set", "register"],
        nemesis: "power-all,power-majority",
        claims: &[NOTHING_LOST, LINEARIZABLE],
    },
    Trial {
        mutant: "vote-not-synced",
        workloads: &["register"],
        nemesis: "power-all,kill-all",
        claims: &[NODE_ENDED, SERVES],
    },
    Trial {
        mutant: "read-without-read-index",
        workloads: &["register"],
        nemesis: "partition-leader-alone",
        claims: &[LINEARIZABLE],
    },
    Trial {
        mutant: "lease-read-trusting-paused-clock",
        workloads: &["register"],
        nemesis: "pause-leader",
        claims: &[LINEARIZABLE],
    },
    Trial {
        mutant: "ack-before-quorum",
        workloads: &["set", "register"],
        nemesis: "partition-leader-alone",
        claims: &[NOTHING_LOST, LINEARIZABLE],
    },
    Trial {
        mutant: "replay-not-idempotent",
        workloads: &["kv", "convergence"],
        nemesis: "rolling-restart,kill-one",
        claims: &[AGREE, REVISIONS],
    },
    Trial { mutant: "watch-skips-on-resume", workloads: &["watch"], nemesis: "kill-one", claims: &[WATCHES] },
    Trial { mutant: "progress-before-events", workloads: &["watch"], nemesis: "none", claims: &[WATCHES] },
    Trial {
        mutant: "compaction-drops-tombstone",
        workloads: &["watch", "convergence"],
        nemesis: "compact+kill-one",
        claims: &[WATCHES, REVISIONS, AGREE],
    },
    Trial {
        mutant: "snapshot-install-silent",
        workloads: &["watch"],
        nemesis: "snapshot-behind",
        claims: &[WATCHES],
    },
    Trial {
        mutant: "lease-by-wall-clock",
        workloads: &["lease"],
        nemesis: "clock-jump",
        claims: &["leases end when they must"],
    },
    Trial {
        mutant: "unsafe-membership-change",
        workloads: &["set", "register", "convergence"],
        nemesis: "wiped-member",
        claims: &[NOTHING_LOST, LINEARIZABLE, AGREE],
    },
];

/// What became of one trial.
struct Row {
    mutant: &'static str,
    nemesis: &'static str,
    workloads: String,
    /// The claim that was broken, and how long it took.
    caught: Option<(String, Duration)>,
    seed: u64,
    runs: usize,
}

/// Runs the control and the twelve; whether all that must be seen was seen.
pub async fn run(args: &Args) -> anyhow::Result<bool> {
    let binary = binary(&args.binary)?;
    let seed = args.seed.unwrap_or_else(rand::random::<u32>().into());
    println!("seed {seed}");
    let trials = TRIALS.iter().filter(|trial| args.mutant.as_deref().is_none_or(|name| trial.mutant == name));
    let trials: Vec<&Trial> = trials.collect();
    ensure!(!trials.is_empty(), "there is no mutant {:?}", args.mutant);

    let mut innocent = true;
    for (index, trial) in trials.iter().enumerate() {
        let plan = plan(args, trial, &binary, None, seed + index as u64);
        let report = plan.run().await?;
        let objections = report.objections();
        innocent &= objections.is_empty();
        say(&format!("no bug, {} under {}", plan.workloads.join("+"), trial.nemesis), &objections.join("; "));
    }
    let mut rows = Vec::new();
    for trial in trials {
        let row = attempt(args, trial, &binary, seed).await?;
        say(trial.mutant, &row.result());
        rows.push(row);
    }
    let table = table(&rows, innocent);
    println!("\n{table}");
    if args.mutant.is_none() {
        keep(&table)?;
    }
    Ok(innocent && rows.iter().all(|row| row.caught.is_some()))
}

fn say(what: &str, result: &str) {
    println!("{what}: {}", if result.is_empty() { "passed" } else { result });
}

/// The mutants' build, beside the product's unless it was named itself.
fn binary(given: &Path) -> anyhow::Result<PathBuf> {
    let path = given.with_file_name(BINARY);
    ensure!(
        path.is_file(),
        "there is no {}; build it: cargo build --release --bin {BINARY} --features mutants",
        path.display()
    );
    Ok(path)
}

fn plan(args: &Args, trial: &Trial, binary: &Path, mutant: Option<&str>, seed: u64) -> Plan {
    Plan {
        workloads: trial.workloads.to_vec(),
        nemesis: trial.nemesis.to_owned(),
        time: DRIVEN,
        seed,
        members: args.nodes,
        rate: args.rate,
        binary: binary.to_owned(),
        mutant: mutant.map(str::to_owned),
        out: args.out(&format!("mutants/{}-{seed}", mutant.unwrap_or("control"))),
    }
}

/// Runs a mutant under one seed after the other, until it is caught or the time is over.
async fn attempt(args: &Args, trial: &Trial, binary: &Path, seed: u64) -> anyhow::Result<Row> {
    let began = Instant::now();
    let mut row = Row {
        mutant: trial.mutant,
        nemesis: trial.nemesis,
        workloads: trial.workloads.join(", "),
        caught: None,
        seed,
        runs: 0,
    };
    while row.caught.is_none() && began.elapsed() < LIMIT {
        row.seed = seed + row.runs as u64;
        row.runs += 1;
        let plan = plan(args, trial, binary, Some(trial.mutant), row.seed);
        // A bug may well keep a cluster from coming up; the next seed may get further.
        match plan.run().await {
            Ok(report) => {
                row.caught = broken(trial, &report).map(|claim| (claim, began.elapsed()));
                if row.caught.is_none() {
                    say(
                        &format!("{} under seed {}", trial.mutant, row.seed),
                        &report.objections().join("; "),
                    );
                }
            }
            Err(error) => say(&format!("{} under seed {}", trial.mutant, row.seed), &format!("{error:#}")),
        }
    }
    Ok(row)
}

/// The first claim out of the trial's list that the run contradicts.
fn broken(trial: &Trial, report: &Report) -> Option<String> {
    let mut claims: Vec<String> =
        report.violations().into_iter().map(|(_, claim)| claim.to_owned()).collect();
    if !report.nodes.exits.is_empty() || !report.nodes.panics.is_empty() {
        claims.push(NODE_ENDED.to_owned());
    }
    claims.into_iter().find(|claim| trial.claims.iter().any(|expected| claim.starts_with(expected)))
}

impl Row {
    fn result(&self) -> String {
        match &self.caught {
            Some((claim, after)) => {
                format!("caught after {} s by: {claim} (seed {})", after.as_secs(), self.seed)
            }
            None => format!("NOT CAUGHT in {} runs", self.runs),
        }
    }
}

fn table(rows: &[Row], innocent: bool) -> String {
    let mut page = String::new();
    let caught = rows.iter().filter(|row| row.caught.is_some()).count();
    let control = if innocent { "passed" } else { "DID NOT PASS" };
    let _ =
        writeln!(page, "{caught} of {} caught. The same build with no bug chosen {control}.\n", rows.len());
    let _ = writeln!(
        page,
        "| mutant | workloads | faults | caught by | after | seed |\n|---|---|---|---|---|---|"
    );
    for row in rows {
        let (claim, after) = match &row.caught {
            Some((claim, after)) => (claim.as_str(), format!("{} s", after.as_secs())),
            None => ("NOT CAUGHT", format!("{} runs", row.runs)),
        };
        let Row { mutant, workloads, nemesis, seed, .. } = row;
        let _ = writeln!(page, "| {mutant} | {workloads} | {nemesis} | {claim} | {after} | {seed} |");
    }
    page
}

/// Puts the table into its place in `RESULTS.md`.
fn keep(table: &str) -> anyhow::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("jepsen/RESULTS.md");
    let page = fs::read_to_string(&path)?;
    let [begin, end] = MARKS;
    let Some((head, rest)) = page.split_once(begin) else {
        anyhow::bail!("{} has no {begin}", path.display())
    };
    let tail = rest.split_once(end).map_or("", |(_, tail)| tail);
    fs::write(path, format!("{head}{begin}\n\n{table}\n{end}{tail}"))?;
    Ok(())
}
