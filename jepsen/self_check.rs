//! `--self-check WHAT`: the harness's parts, tried on a real cluster without
//! workloads and judges.
//!
//! `hosts`; `faults [NAME...]`; `power TIMES`, power failures of all nodes at
//! once. The last takes `--mutant NAME` with `--binary PATH` of a build that has
//! it, and is how the harness is calibrated: with a log that is not synced it
//! must fail.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::faults;
use crate::hosts::isolation::Inside;
use crate::hosts::{self, Shape};

/// Runs the check that the arguments after `--self-check` name.
pub async fn run(inside: &Inside, args: &[String]) -> anyhow::Result<()> {
    let (mut binary, mut mutant, mut members, mut logs) = (None, None, 3, None);
    let mut words = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value")).cloned();
        match arg.as_str() {
            "--binary" => binary = Some(PathBuf::from(value()?)),
            "--mutant" => mutant = Some(value()?),
            "--logs" => logs = Some(PathBuf::from(value()?)),
            "--members" => members = value()?.parse()?,
            _ => words.push(arg.clone()),
        }
    }
    let built = OsString::from(env!("CARGO_BIN_EXE_mainstay"));
    let mut shape = Shape::new(&inside.run, members, 2, binary.unwrap_or(built.into()));
    shape.logs = logs.unwrap_or(shape.logs);
    shape.environment.extend(mutant.map(|name| ("MAINSTAY_MUTANT".to_owned(), name)));
    match words.split_first().map(|(what, rest)| (what.as_str(), rest)) {
        Some(("hosts", [])) => hosts::check::run(shape).await,
        Some(("faults", names)) => faults::check::run(shape, names, Duration::from_secs(2)).await,
        Some(("power", [times])) => {
            let names = vec!["power-all".to_owned(); times.parse()?];
            faults::check::run(shape, &names, Duration::ZERO).await
        }
        _ => bail!("--self-check takes: hosts | faults [NAME...] | power TIMES"),
    }
}
