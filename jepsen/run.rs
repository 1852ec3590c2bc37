//! One run: hosts up, workloads and faults side by side, heal, read, judge.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::context::Context;
use crate::full_history::FullHistory;
use crate::hosts::isolation::Inside;
use crate::hosts::{Hosts, Shape};
use crate::judge::verdict::Verdict;
use crate::judge::{edn, history::History};
use crate::nemesis::{self, Nemesis, Rhythm};
use crate::probe;
use crate::report::{NodeTrouble, Report};
use crate::results::Line;
use crate::workloads::{self, Workload};

/// What one run shall do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub workloads: Vec<&'static str>,
    pub nemesis: String,
    pub rhythm: Rhythm,
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

/// Hosts that faults may make members of, at most.
const SPARES: usize = 2;
/// The workload that is part of every run.
const CONVERGENCE: &str = "convergence";
/// After healing, every member must serve within this time.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(60);
/// Reads at the end that take longer than this mean that something hangs.
const FINISH_TIME_MAX: Duration = Duration::from_secs(60);
/// Workloads notice the stop sign between two calls, which have deadlines.
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

impl Plan {
    /// The arguments that ask for this run.
    pub fn arguments(&self) -> Vec<String> {
        let out = self.out.parent().unwrap_or(&self.out);
        let named = [
            ("--workload", self.workloads.join(",")),
            ("--nemesis", self.nemesis.clone()),
            ("--time", self.time.as_secs().to_string()),
            ("--seed", self.seed.to_string()),
            ("--nodes", self.members.to_string()),
            ("--rate", self.rate.to_string()),
            ("--hold", self.rhythm.hold.as_secs_f64().to_string()),
            ("--breathe", self.rhythm.breathe.as_secs_f64().to_string()),
            ("--binary", self.binary.display().to_string()),
            ("--out", out.display().to_string()),
        ];
        let mutant = self.mutant.clone().map(|name| ("--mutant", name));
        named.into_iter().chain(mutant).flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }

    /// The command that does this run again.
    pub fn replay(&self) -> String {
        format!("cargo test --release --test jepsen -- {}", self.arguments().join(" "))
    }

    /// Does it, writes its page, and returns what it showed.
    ///
    /// # Errors
    /// Only when the harness could not begin; what goes wrong later is in the report.
    pub async fn run(&self, inside: &Inside) -> anyhow::Result<Report> {
        let began = Instant::now();
        let faults = self.faults(inside).await?;
        // Members must agree after every run; asked last, when nobody else writes.
        let others = self.workloads.iter().copied().filter(|name| *name != CONVERGENCE);
        let chosen = others.chain([CONVERGENCE]).map(workloads::by_name);
        let chosen = chosen.collect::<anyhow::Result<Vec<_>>>()?;
        let hosts = self.hosts(inside, &faults).await?;
        hosts.start_all().await.context("the cluster did not start")?;
        let context = Arc::new(Context::new(self.seed, hosts, self.rate));

        let mut harness = Vec::new();
        let full_history = FullHistory::begin(context.clone());
        let driven = self.drive(&context, &chosen, faults, &mut harness).await;
        let mut verdicts = vec![("cluster", settle(&context).await)];
        for workload in &chosen {
            let finished = tokio::time::timeout(FINISH_TIME_MAX, workload.finish(context.clone())).await;
            note(&mut harness, workload.name(), finished);
        }
        let finished = tokio::time::timeout(FINISH_TIME_MAX, full_history.finish()).await;
        note(&mut harness, "full history", finished);
        harness.extend(context.hosts.complaints());
        let nodes = trouble(&context.hosts);
        let history = context.history();
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

    /// The faults that were asked for, if this machine can do them all.
    async fn faults(&self, inside: &Inside) -> anyhow::Result<nemesis::Plan> {
        let plan = nemesis::Plan::parse(&self.nemesis)?;
        let (plan, left_out) = plan.fitted(self.members, SPARES)?;
        if !left_out.is_empty() {
            println!("too small a cluster for: {}", left_out.join(", "));
        }
        let mut missing = Vec::new();
        for (ability, found) in probe::all(&plan.abilities(), &inside.run, &self.binary).await {
            match found {
                Ok(evidence) => println!("can do {ability:?}: {evidence}"),
                Err(reason) => missing.push(format!("{ability:?}: {reason:#}")),
            }
        }
        ensure!(missing.is_empty(), "this machine cannot do what the faults need: {}", missing.join("; "));
        Ok(plan)
    }

    async fn hosts(&self, inside: &Inside, faults: &nemesis::Plan) -> anyhow::Result<Hosts> {
        let spares = faults.entries().iter().map(|entry| entry.needs.spares).max().unwrap_or(0);
        let mut shape = Shape::new(&inside.run, self.members, spares, self.binary.clone());
        shape.environment.extend(self.mutant.clone().map(|name| ("MAINSTAY_MUTANT".to_owned(), name)));
        let hosts = Hosts::create(shape).await.context("the hosts could not be made")?;
        nemesis::prepare(faults, &hosts).await?;
        Ok(hosts)
    }

    /// Clients and faults until the time is over; every fault is healed on return.
    async fn drive(
        &self,
        context: &Arc<Context>,
        chosen: &[Box<dyn Workload>],
        faults: nemesis::Plan,
        harness: &mut Vec<String>,
    ) -> Duration {
        let began = Instant::now();
        let workers: Vec<_> = chosen
            .iter()
            .map(|workload| (workload.name(), tokio::spawn(workload.drive(context.clone()))))
            .collect();
        let nemesis = Nemesis::start(context, faults, self.rhythm);
        tokio::time::sleep(self.time).await;
        // The last fault is healed before clients stop: they also see how the cluster comes back.
        if let Err(error) = nemesis.stop().await {
            harness.push(format!("{error:#}"));
        }
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
        driven
    }

    /// The page, the histories as EDN, and the nodes' logs when something is wrong.
    fn keep(&self, report: &Report, hosts: &Hosts) -> anyhow::Result<()> {
        report.write(&self.out)?;
        Line::of(report, self.members).save(&self.out)?;
        for workload in &self.workloads {
            let text = match *workload {
                "register" => edn::register(&report.history, workload),
                "append" => edn::append(&report.history, workload),
                "set" => edn::set(&report.history, workload),
                "bank" => edn::bank(&report.history, workload),
                _ => edn::generic(&report.history, workload),
            };
            fs::write(self.out.join(format!("{workload}.edn")), text)?;
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
    let mut seen = HashSet::new();
    verdicts.retain(|(_, verdict)| seen.insert((verdict.claim, verdict.checked)));
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
