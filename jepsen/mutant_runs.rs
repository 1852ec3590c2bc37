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
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{bail, ensure};
use mainstay::mutant::Mutant;
use tokio::time::Instant;

use crate::args::{Args, run_folder};
use crate::report::{CONTRADICTED, NODE_ENDED};
use crate::results::{Line, command_line};
use crate::run::Plan;

/// How long one mutant may stay unseen.
const LIMIT: Duration = Duration::from_secs(600);
/// How long clients and faults are at work in one run.
const DRIVEN: Duration = Duration::from_secs(30);
/// Runs without a verdict after which a mutant is given up.
const BROKEN_MAX: usize = 3;
/// The file of the build that has the bugs, beside the product's.
const BINARY: &str = "mainstay-mutants";
/// The table's place in `RESULTS.md`.
const MARKS: [&str; 2] = ["<!-- mutants -->", "<!-- /mutants -->"];

/// One bug, and what should show it.
struct Trial {
    mutant: Mutant,
    workloads: &'static [&'static str],
    nemesis: &'static str,
    /// Beginnings of the claims of which it breaks at least one.
    claims: &'static [&'static str],
}

const LINEARIZABLE: &str = "every key is a linearizable register";
const NOTHING_LOST: &str = "no element that was acknowledged or read is lost";
const AGREE: &str = "hashes at one revision are equal";
const SERVES: &str = "every member serves again after healing";
const UNIQUE: &str = "every write has a revision of its own";
const REPLAY: &str = "a replay in the order of revisions";
const RELIABLE: &str = "reliable: ";
const CONTINUED: &str = "continued: ";
const RESUMABLE: &str = "resumable: ";
const AGREED: &str = "agreed: ";

const TRIALS: [Trial; 12] = [
    Trial {
        mutant: Mutant::LogNotSynced,
        workloads: &["set", "register"],
        nemesis: "power-all,power-majority",
        claims: &[NOTHING_LOST, LINEARIZABLE],
    },
    Trial {
        mutant: Mutant::VoteNotSynced,
        workloads: &["register"],
        nemesis: "power-all,kill-all",
        claims: &[LINEARIZABLE, UNIQUE, NODE_ENDED, SERVES],
    },
    Trial {
        mutant: Mutant::ReadWithoutReadIndex,
        workloads: &["register"],
        nemesis: "partition-leader-alone",
        claims: &[LINEARIZABLE],
    },
    Trial {
        mutant: Mutant::LeaseReadPausedClock,
        workloads: &["register"],
        nemesis: "pause-leader",
        claims: &[LINEARIZABLE],
    },
    Trial {
        mutant: Mutant::AckBeforeQuorum,
        workloads: &["set", "register"],
        nemesis: "partition-leader-alone",
        claims: &[NOTHING_LOST, LINEARIZABLE],
    },
    Trial {
        mutant: Mutant::ReplayNotIdempotent,
        workloads: &["kv", "convergence"],
        nemesis: "rolling-restart,kill-one",
        claims: &[AGREE, UNIQUE, REPLAY],
    },
    Trial {
        mutant: Mutant::WatchSkipsOnResume,
        workloads: &["watch"],
        nemesis: "kill-one",
        claims: &[RELIABLE, RESUMABLE, CONTINUED, AGREED],
    },
    Trial {
        mutant: Mutant::ProgressBeforeEvents,
        workloads: &["watch"],
        nemesis: "none",
        claims: &["bookmarkable: "],
    },
    Trial {
        mutant: Mutant::CompactionDropsTombstone,
        workloads: &["watch", "convergence"],
        nemesis: "compact+rolling-restart",
        claims: &[RELIABLE, RESUMABLE, CONTINUED, AGREED, REPLAY, AGREE],
    },
    Trial {
        mutant: Mutant::SnapshotInstallSilent,
        workloads: &["watch"],
        nemesis: "snapshot-behind",
        claims: &[RELIABLE, RESUMABLE, CONTINUED, AGREED],
    },
    Trial {
        mutant: Mutant::LeaseByWallClock,
        workloads: &["lease"],
        nemesis: "clock-jump",
        claims: &["no lease ends before its time", "a lease that nobody keeps alive ends in time"],
    },
    Trial {
        mutant: Mutant::UnsafeMembershipChange,
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
///
/// # Errors
/// When the build is not there, or the harness cannot run at all.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let binary = binary(&args.binary)?;
    let seed = args.seed.unwrap_or_else(|| rand::random::<u32>().into());
    println!("seed {seed}");
    let chosen = |trial: &&Trial| args.mutant.as_deref().is_none_or(|name| trial.mutant.name() == name);
    let trials: Vec<&Trial> = TRIALS.iter().filter(chosen).collect();
    ensure!(!trials.is_empty(), "there is no mutant {:?}", args.mutant);
    for mutant in Mutant::ALL {
        let tried = TRIALS.iter().any(|trial| trial.mutant == *mutant);
        ensure!(tried, "nothing is said to catch {}", mutant.name());
    }

    let mut innocent = true;
    for trial in &trials {
        let plan = plan(args, trial, &binary, None, seed)?;
        let Ran::Judged(objections) = ran(&plan)? else {
            bail!("the run that should pass left no result: {}", plan.replay());
        };
        innocent &= objections.is_empty();
        say(&format!("no bug, {} under {}", plan.workloads.join("+"), trial.nemesis), &objections);
    }
    let mut rows = Vec::new();
    for trial in trials {
        let row = attempt(args, trial, &binary, seed)?;
        println!("{}: {}", row.mutant, row.result());
        rows.push(row);
    }
    let table = table(&rows, innocent);
    println!("\n{table}");
    if args.mutant.is_none() {
        keep(&table)?;
    }
    Ok(innocent && rows.iter().all(|row| row.caught.is_some()))
}

fn say(what: &str, objections: &[String]) {
    println!("{what}: {}", if objections.is_empty() { "passed".to_owned() } else { objections.join("; ") });
}

/// The mutants' build, beside the product's.
fn binary(product: &Path) -> anyhow::Result<PathBuf> {
    let path = product.with_file_name(BINARY);
    ensure!(
        path.is_file(),
        "there is no {}; build it: cargo build --release --bin {BINARY} --features mutants",
        path.display()
    );
    Ok(path)
}

fn plan(args: &Args, trial: &Trial, binary: &Path, mutant: Option<&str>, seed: u64) -> anyhow::Result<Plan> {
    let folder = args.out().join("mutants").join(mutant.unwrap_or("none"));
    Ok(Plan {
        workloads: trial.workloads.to_vec(),
        nemesis: trial.nemesis.to_owned(),
        time: DRIVEN,
        seed,
        binary: binary.to_owned(),
        mutant: mutant.map(str::to_owned),
        out: run_folder(&folder, trial.nemesis, seed),
        ..args.plan()?
    })
}

/// What a run came to.
enum Ran {
    /// Why it did not pass; empty when it did.
    Judged(Vec<String>),
    /// There is no verdict, and this is what was said last.
    Broke(String),
}

/// Does a run as a process of its own.
fn ran(plan: &Plan) -> anyhow::Result<Ran> {
    if plan.out.exists() {
        fs::remove_dir_all(&plan.out)?;
    }
    let mut command = Command::new(std::env::current_exe()?);
    let output = command.args(plan.arguments()).stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    if let Ok(line) = Line::load(&plan.out) {
        return Ok(Ran::Judged(line.objections));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Ok(Ran::Broke(said.lines().rfind(|line| !line.is_empty()).unwrap_or_default().to_owned()))
}

/// Runs a mutant under one seed after the other, until it is caught or the time is over.
fn attempt(args: &Args, trial: &Trial, binary: &Path, seed: u64) -> anyhow::Result<Row> {
    let began = Instant::now();
    let mut row = Row {
        mutant: trial.mutant.name(),
        nemesis: trial.nemesis,
        workloads: trial.workloads.join(", "),
        caught: None,
        seed,
        runs: 0,
    };
    let mut broke = 0;
    while row.caught.is_none() && began.elapsed() < LIMIT && broke < BROKEN_MAX {
        row.seed = seed + row.runs as u64;
        row.runs += 1;
        let objections = match ran(&plan(args, trial, binary, Some(row.mutant), row.seed)?)? {
            Ran::Judged(objections) => objections,
            // A bug may well keep a cluster from coming up. That is no claim broken; the next seed may get further.
            Ran::Broke(said) => {
                broke += 1;
                vec![said]
            }
        };
        row.caught = broken(trial, &objections).map(|claim| (claim, began.elapsed()));
        if row.caught.is_none() {
            say(&format!("{} under seed {}", row.mutant, row.seed), &objections);
        }
    }
    Ok(row)
}

/// The first claim out of the trial's list that the run contradicts.
fn broken(trial: &Trial, objections: &[String]) -> Option<String> {
    let claims = objections.iter().filter_map(|objection| {
        let (_, claim) = objection.split_once(CONTRADICTED)?;
        Some(claim.to_owned())
    });
    let ended = objections.iter().any(|objection| objection.starts_with(NODE_ENDED));
    let mut claims = claims.chain(ended.then(|| NODE_ENDED.to_owned()));
    claims.find(|claim| trial.claims.iter().any(|expected| claim.starts_with(expected)))
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
    let date = command_line("date", &["-u", "+%Y-%m-%d %H:%M"]);
    let commit = command_line("git", &["rev-parse", "--short", "HEAD"]);
    let _ = writeln!(
        page,
        "{date} UTC, commit {commit}: {caught} of {} caught. The same build with no bug chosen {control} under \
         each of these.\n",
        rows.len()
    );
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
    let path = Path::new("jepsen/RESULTS.md");
    let page = fs::read_to_string(path)?;
    let [begin, end] = MARKS;
    let Some((head, rest)) = page.split_once(begin) else { bail!("{} has no {begin}", path.display()) };
    let tail = rest.split_once(end).map_or("", |(_, tail)| tail);
    fs::write(path, format!("{head}{begin}\n\n{table}\n{end}{tail}"))?;
    Ok(())
}
