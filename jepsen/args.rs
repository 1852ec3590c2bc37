//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;

use crate::nemesis::Rhythm;
use crate::run::Plan;
use crate::workloads;

/// Tests a real cluster on hosts of its own under faults, and judges what its clients saw.
///
/// Exit code 0: every claim holds and the run was worth running. Needs root.
#[derive(Debug, Parser)]
#[command(name = "jepsen", max_term_width = 110)]
pub struct Args {
    /// Workloads, separated by commas, or `all`
    #[arg(long, default_value = "register")]
    pub workload: String,
    /// `none`, a fault, `A+B` (together), `A,B` (in turn), `pairs` or `all`
    #[arg(long, default_value = "none")]
    pub nemesis: String,
    /// Seconds that clients and faults are at work
    #[arg(long, default_value_t = 60)]
    pub time: u64,
    /// Everything random comes from it; drawn when it is not given
    #[arg(long)]
    pub seed: Option<u64>,
    /// Members that the cluster begins with
    #[arg(long, default_value_t = 3)]
    pub nodes: usize,
    /// Calls per second and workload
    #[arg(long, default_value_t = 40)]
    pub rate: u32,
    /// Seconds that a fault stays, on average
    #[arg(long, default_value_t = 3.0)]
    pub hold: f64,
    /// Seconds between two faults, on average
    #[arg(long, default_value_t = 2.0)]
    pub breathe: f64,
    /// The server to test
    #[arg(long, default_value = env!("CARGO_BIN_EXE_mainstay"))]
    pub binary: PathBuf,
    /// Which deliberate bug the server shall have (the mutants' build only)
    #[arg(long)]
    pub mutant: Option<String>,
    /// Where pages, histories and logs go; a folder for each run
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// The ten-minute suite instead of one run
    #[arg(long)]
    pub suite: bool,
    /// The matrix of workloads and faults instead of one run; goes on where it stopped
    #[arg(long)]
    pub matrix: bool,
    /// The proof of the harness by deliberate bugs; of one, when `--mutant` names it
    #[arg(long)]
    pub mutants: bool,
    /// How long the matrix may take, in minutes
    #[arg(long, default_value_t = 60)]
    pub minutes: u64,
    /// Judges a million generated calls and prints how long that took
    #[arg(long)]
    pub judge_speed: bool,
    /// Checks a part of the harness itself: `hosts`, `faults [NAME...]` or `power TIMES`
    #[arg(long, num_args = 1.., allow_hyphen_values = true)]
    pub self_check: Vec<String>,
}

impl Args {
    /// The run that was asked for.
    pub fn plan(&self) -> anyhow::Result<Plan> {
        let seed = self.seed.unwrap_or_else(|| rand::random::<u32>().into());
        Ok(Plan {
            workloads: self.workloads()?,
            nemesis: self.nemesis.clone(),
            rhythm: Rhythm {
                hold: Duration::from_secs_f64(self.hold),
                breathe: Duration::from_secs_f64(self.breathe),
            },
            time: Duration::from_secs(self.time),
            seed,
            members: self.nodes,
            rate: self.rate,
            binary: self.binary.clone(),
            mutant: self.mutant.clone(),
            out: run_folder(&self.out(), &self.nemesis, seed),
        })
    }

    fn workloads(&self) -> anyhow::Result<Vec<&'static str>> {
        if self.workload == "all" {
            return Ok(workloads::names());
        }
        let named = self.workload.split(',').map(workloads::by_name).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(named.iter().map(|workload| workload.name()).collect())
    }

    /// The folder of all results.
    pub fn out(&self) -> PathBuf {
        let usual = || PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("jepsen");
        self.out.clone().unwrap_or_else(usual)
    }
}

/// Where the run with these faults and this seed leaves what it has.
pub fn run_folder(out: &Path, nemesis: &str, seed: u64) -> PathBuf {
    let first = nemesis.split(',').next().unwrap_or_default();
    let others = if first.len() < nemesis.len() { "-and-others" } else { "" };
    out.join(format!("{first}{others}-{seed}"))
}
