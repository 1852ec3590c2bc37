//! Runs the system's own tools (`ip`, `mount`, `mkfs.ext4`) and never waits for
//! one without a deadline.
//!
//! What fails here is the harness's trouble, not the cluster's: the error names
//! the command and carries what it said.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::process::Command;

/// Longer than any of them takes on a machine that is busy.
const DEADLINE: Duration = Duration::from_secs(15);

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// When it cannot be started, does not succeed, or is not done at the deadline.
pub async fn run<A: AsRef<OsStr>>(program: &str, args: &[A]) -> anyhow::Result<String> {
    let words: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
    let shown = || format!("`{program} {}`", words.join(OsStr::new(" ")).to_string_lossy());
    let mut command = Command::new(program);
    command.args(&words).stdin(Stdio::null()).kill_on_drop(true);
    let Ok(output) = tokio::time::timeout(DEADLINE, command.output()).await else {
        bail!("{} was not done after {DEADLINE:?}", shown());
    };
    let output = output.with_context(|| format!("{} cannot be started", shown()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}: {}", shown(), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Like [`run`], for a command written as one line in which no word has a space.
///
/// # Errors
/// As [`run`].
pub async fn line(words: &str) -> anyhow::Result<String> {
    let mut words = words.split_whitespace();
    let program = words.next().context("an empty command")?;
    run(program, &words.collect::<Vec<_>>()).await
}

/// Does something that may block, such as a call on a disk that hangs, aside and with a deadline.
///
/// # Errors
/// When it is not done in time, and its own.
pub async fn aside<T: Send + 'static>(
    what: &str,
    within: Duration,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    match tokio::time::timeout(within, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result.with_context(|| what.to_owned()),
        Ok(Err(panicked)) => bail!("{what}: {panicked}"),
        Err(_) => bail!("{what} was not done after {within:?}"),
    }
}

/// A path as a word of a command line.
pub fn word(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("{} is not text", path.display()))
}
