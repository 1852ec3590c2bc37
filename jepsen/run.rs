//! One run: hosts up, workloads and faults side by side, heal, read, judge.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::context::Context;
use crate::full_history::FullHistory;
use crate::hosts::{Hosts, Shape};
use crate::judge::verdict::Verdict;
use crate::judge::{edn, history::History};
use crate::nemesis::Schedule;
use crate::report::{NodeTrouble, Report};
use crate::workloads::{self, Workload};

/// What one run shall do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub workloads: Vec<&'static str>,
    pub nemesis: String,
    pub time: Duration,
    pub seed: u64,
    pub members: usize,
    /// Calls per second and workload.
    pub rate: u32,
    pub binary: PathBuf,
    /// The deliberate bug, when the binary is the one that has them.
    pub mutant: Option<String>,
    /// Where the page, the histories and, after a failure, the nodes' logs go.
    pub out: PathBuf,
}

/// After healing, every member must serve within this time.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(60);
/// Reads at the end that take longer than this mean that something hangs.
const FINISH_TIME_MAX: Duration = Duration::from_secs(60);
/// Workloads notice the stop sign between two calls, which have deadlines.
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

impl Plan {
    /// The command that does this run again.
    pub fn replay(&self) -> String {
        let mutant = self.mutant.as_ref().map(|name| format!(" --mutant {name}")).unwrap_or_default();
        format!(
            "cargo test --release --test jepsen -- --workload {} --nemesis {} --time {} --seed {} --nodes {} \
             --rate {}{mutant}",
            self.workloads.join(","),
            self.nemesis,
            self.time.as_secs(),
            self.seed,
            self.members,
            self.rate
        )
    }

    /// Does it, writes its page, and returns what it showed.
    ///
    /// # Errors
    /// Only when the harness could not begin; what goes wrong later is in the report.
    pub async fn run(&self) -> anyhow::Result<Report> {
        let began = Instant::now();
        let schedule = Schedule::parse(&self.nemesis, self.seed)?;
        let chosen = self.workloads.iter().map(|name| workloads::by_name(name));
        let chosen = chosen.collect::<anyhow::Result<Vec<_>>>()?;
        let hosts = self.hosts(&schedule).await?;
        hosts.start_all().await.context("the cluster did not start")?;
        let context = Arc::new(Context::new(self.seed, hosts, self.rate));

        let mut harness = Vec::new();
        let full_history = FullHistory::begin(context.clone());
        let driven = self.drive(&context, &chosen, schedule, &mut harness).await;
        let mut verdicts = vec![("cluster", settle(&context).await)];
        for workload in &chosen {
            let finished = tokio::time::timeout(FINISH_TIME_MAX, workload.finish(context.clone())).await;
            note(&mut harness, workload.name(), finished);
        }
        note(&mut harness, "full history", tokio::time::timeout(FINISH_TIME_MAX, full_history.finish()).await);
        let nodes = trouble(&context.hosts);
        let history = context.history();
        context.hosts.stop_all().await;
        verdicts.extend(judge(&chosen, &history));

        let report = Report {
            seed: self.seed,
            workloads: self.workloads.clone(),
            nemesis: self.nemesis.clone(),
            replay: self.replay(),
            version: version(&self.binary),
            driven,
            took: began.elapsed(),
            history,
            verdicts,
            nodes,
            harness,
        };
        self.keep(&report, &context.hosts)?;
        Ok(report)
    }

    async fn hosts(&self, schedule: &Schedule) -> anyhow::Result<Hosts> {
        let mut shape = Shape::new(self.members, self.binary.clone());
        shape.spares = schedule.spares();
        let hosts = Hosts::create(shape).await.context("the hosts could not be made")?;
        for host in &hosts.hosts {
            host.set_environment("MAINSTAY_MUTANT", self.mutant.as_deref());
        }
        schedule.prepare(&hosts)?;
        Ok(hosts)
    }

    /// Clients and faults until the time is over; every fault is healed on return.
    async fn drive(
        &self,
        context: &Arc<Context>,
        chosen: &[Box<dyn Workload>],
        schedule: Schedule,
        harness: &mut Vec<String>,
    ) -> Duration {
        let began = Instant::now();
        let workers: Vec<_> =
            chosen.iter().map(|w| (w.name(), tokio::spawn(w.drive(context.clone())))).collect();
        let nemesis = tokio::spawn(schedule.drive(context.clone()));
        tokio::time::sleep(self.time).await;
        context.stop();
        let driven = began.elapsed();
        for (name, worker) in workers {
            match tokio::time::timeout(STOP_TIME_MAX, worker).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => harness.push(format!("{name}: {error:#}")),
                Ok(Err(panic)) => harness.push(format!("{name}: {panic}")),
                Err(_) => harness.push(format!("{name} did not stop")),
            }
        }
        match nemesis.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => harness.push(format!("nemesis: {error:#}")),
            Err(panic) => harness.push(format!("nemesis: {panic}")),
        }
        driven
    }

    /// The page, the histories as EDN, and the nodes' logs when something is wrong.
    fn keep(&self, report: &Report, hosts: &Hosts) -> anyhow::Result<()> {
        report.write(&self.out)?;
        for (name, text) in edn::files(&report.history) {
            fs::write(self.out.join(name), text)?;
        }
        if report.objections().is_empty() {
            return Ok(());
        }
        fs::write(self.out.join("history.txt"), format!("{:#?}", report.history))?;
        for host in &hosts.hosts {
            if host.log.exists() {
                fs::copy(&host.log, self.out.join(format!("{}.log", host.name)))?;
            }
        }
        Ok(())
    }
}

type Finished = Result<anyhow::Result<()>, tokio::time::error::Elapsed>;

fn note(harness: &mut Vec<String>, name: &str, finished: Finished) {
    match finished {
        Ok(Ok(())) => {}
        Ok(Err(error)) => harness.push(format!("{name}: {error:#}")),
        Err(_) => harness.push(format!("{name} did not finish its reads")),
    }
}

async fn settle(context: &Arc<Context>) -> Verdict {
    let settled = context.hosts.settle(SETTLE_TIME_MAX).await;
    let findings = settled.err().map(|error| vec![format!("{error:#}")]).unwrap_or_default();
    Verdict::from_findings("every member serves again after healing", context.hosts.members().len(), findings)
}

fn judge(chosen: &[Box<dyn Workload>], history: &History) -> Vec<(&'static str, Verdict)> {
    let mut verdicts = Vec::new();
    for workload in chosen {
        verdicts.extend(workload.judge(history).into_iter().map(|verdict| (workload.name(), verdict)));
    }
    // Claims about the whole database come from every workload that makes them; one of each is enough.
    let mut seen = BTreeMap::new();
    verdicts.retain(|(_, verdict)| match verdict.checked {
        0 => true,
        checked => seen.insert((verdict.claim, checked), ()).is_none(),
    });
    verdicts
}

fn trouble(hosts: &Hosts) -> NodeTrouble {
    let mut trouble = NodeTrouble::default();
    for host in &hosts.hosts {
        let unexpected = host.exits().into_iter().filter(|(_, expected)| !expected);
        trouble.exits.extend(unexpected.map(|(exit, _)| format!("{}: {exit}", host.name)));
        let log = fs::read_to_string(&host.log).unwrap_or_default();
        let panics = log.lines().filter(|line| line.contains("panicked at"));
        trouble.panics.extend(panics.map(|line| format!("{}: {line}", host.name)));
    }
    trouble
}

/// What the binary says it is.
fn version(binary: &Path) -> String {
    let output = std::process::Command::new(binary).arg("--version").output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}
