//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::run::Plan;
use crate::workloads;

/// Tests a real cluster on hosts of its own under faults, and judges what its clients saw.
///
/// Exit code 0: every claim holds and the run was worth running.
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
    #[arg(long, default_value_t = 100)]
    pub rate: u32,
    /// The server to test
    #[arg(long, default_value = env!("CARGO_BIN_EXE_mainstay"))]
    pub binary: PathBuf,
    /// Which deliberate bug the server shall have (the mutants' build only)
    #[arg(long)]
    pub mutant: Option<String>,
    /// Where pages, histories and logs go
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// The ten-minute suite instead of one run
    #[arg(long)]
    pub suite: bool,
    /// The matrix of workloads and faults instead of one run; goes on where it stopped
    #[arg(long)]
    pub matrix: bool,
    /// How long the matrix may take, in minutes
    #[arg(long, default_value_t = 60)]
    pub minutes: u64,
    /// Judges a million generated calls and prints how long that took
    #[arg(long)]
    pub judge_speed: bool,
    /// Checks a part of the harness itself: `hosts` or `faults`
    #[arg(long)]
    pub self_check: Option<String>,
    /// Cargo hands this to every test; it means nothing here
    #[arg(long, hide = true)]
    pub nocapture: bool,
}

impl Args {
    /// The run that was asked for.
    pub fn plan(&self) -> anyhow::Result<Plan> {
        let seed = self.seed.unwrap_or_else(rand::random::<u32>().into());
        let all = self.workload == "all";
        let named = self.workload.split(',').map(workloads::by_name);
        let named = named.collect::<anyhow::Result<Vec<_>>>();
        let workloads =
            if all { workloads::NAMES.to_vec() } else { named?.iter().map(|workload| workload.name()).collect() };
        Ok(Plan {
            workloads,
            nemesis: self.nemesis.clone(),
            time: Duration::from_secs(self.time),
            seed,
            members: self.nodes,
            rate: self.rate,
            binary: self.binary.clone(),
            mutant: self.mutant.clone(),
            out: self.out(&format!("{}-{}-{seed}", self.workload.replace(',', "+"), self.nemesis)),
        })
    }

    /// Where the results of the run called `name` go.
    pub fn out(&self, name: &str) -> PathBuf {
        let root = self.out.clone().unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("jepsen"));
        root.join(name)
    }
}
