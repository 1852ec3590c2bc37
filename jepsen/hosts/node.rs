//! A host's node process: its command line, its start, its end, and who
//! notices either.
//!
//! One task waits for each process and is the only one that learns its exit
//! status, so that an end nobody asked for is never missed.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::Running;
use super::cgroup::Group;

/// How long a killed process may take to be gone. A disk that hangs can hold it until it is healed.
const DEATH_TIME_MAX: Duration = Duration::from_secs(10);

/// Node processes of one host, one after the other.
#[derive(Clone)]
pub struct Node {
    shared: Arc<Shared>,
}

struct Shared {
    running: watch::Sender<Running>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    starts: u64,
    /// What the harness does to end it, if it does.
    ending: Option<Signal>,
    last_exit: Option<ExitStatus>,
    exits: Vec<(String, bool)>,
    expect_exit: bool,
    environment: Vec<(String, String)>,
    group: Option<Group>,
}

/// What a start needs to know.
pub struct Launch<'a> {
    pub namespace: &'a str,
    pub binary: &'a Path,
    pub flags: &'a [String],
    pub log: &'a Path,
}

impl Node {
    pub fn new() -> Node {
        let running = watch::Sender::new(Running::No);
        Node { shared: Arc::new(Shared { running, state: Mutex::default() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("nobody panics while holding it")
    }

    pub fn running(&self) -> Running {
        *self.shared.running.borrow()
    }

    /// The process id.
    pub fn pid(&self) -> anyhow::Result<u32> {
        match self.running() {
            Running::Yes { pid } => Ok(pid),
            Running::No => bail!("the node does not run"),
        }
    }

    pub fn exits(&self) -> Vec<(String, bool)> {
        self.state().exits.clone()
    }

    pub fn expect_exit(&self, expected: bool) {
        self.state().expect_exit = expected;
    }

    pub fn set_environment(&self, key: &str, value: Option<&str>) {
        let mut state = self.state();
        state.environment.retain(|(known, _)| known != key);
        state.environment.extend(value.map(|value| (key.to_owned(), value.to_owned())));
    }

    /// The control group for this and the next starts.
    pub fn set_group(&self, group: Option<Group>) -> anyhow::Result<()> {
        if let (Some(group), Running::Yes { pid }) = (&group, self.running()) {
            group.take(pid)?;
        }
        self.state().group = group;
        Ok(())
    }

    /// Starts it and leaves it to a task that waits for its end.
    pub fn start(&self, launch: &Launch<'_>) -> anyhow::Result<u32> {
        let mut state = self.state();
        if let Running::Yes { pid } = self.running() {
            bail!("the node runs already as {pid}");
        }
        state.starts += 1;
        let mut log = OpenOptions::new().create(true).append(true).open(launch.log)?;
        let mut words: Vec<String> = state.environment.iter().map(|(k, v)| format!("{k}={v}")).collect();
        words.extend(launch.flags.iter().cloned());
        writeln!(log, "---- start {}: {}", state.starts, words.join(" "))?;
        let child =
            command(launch, &state.environment, &log)?.spawn().context("nsenter cannot be started")?;
        let pid = child.id().context("a process that was just started has an id")?;
        if let Some(group) = &state.group {
            group.take(pid)?;
        }
        state.ending = None;
        state.last_exit = None;
        self.shared.running.send_replace(Running::Yes { pid });
        tokio::spawn(self.clone().wait_for(child, log));
        Ok(pid)
    }

    async fn wait_for(self, mut child: Child, mut log: File) {
        let status = child.wait().await;
        let mut state = self.state();
        let said = match &status {
            Ok(status) => status.to_string(),
            Err(error) => format!("cannot be waited for: {error}"),
        };
        let _ = writeln!(log, "---- ended: {said}");
        let asked_for = match (state.ending, &status) {
            (Some(Signal::KILL), Ok(status)) => status.signal() == Some(Signal::KILL.as_raw()),
            (Some(Signal::TERM), Ok(status)) => status.success(),
            _ => false,
        };
        if !asked_for {
            let expected = state.expect_exit;
            state.exits.push((said, expected));
        }
        state.last_exit = status.ok();
        self.shared.running.send_replace(Running::No);
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let raw = i32::try_from(self.pid()?)?;
        let pid = Pid::from_raw(raw).context("process 0")?;
        kill_process(pid, signal).with_context(|| format!("sending {signal:?} to {raw}"))
    }

    /// Ends it with a signal; returns how it ended.
    pub async fn end(&self, signal: Signal, within: Duration) -> anyhow::Result<Option<ExitStatus>> {
        if self.running() == Running::No {
            return Ok(None);
        }
        self.state().ending = Some(signal);
        if let Err(error) = self.signal(signal) {
            // It may have ended just before.
            ensure!(self.running() == Running::No, error);
        }
        self.wait_end(within).await
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(&self) -> anyhow::Result<()> {
        self.end(Signal::KILL, DEATH_TIME_MAX).await.map(drop)
    }

    /// Waits for the end, however it comes.
    pub async fn wait_end(&self, within: Duration) -> anyhow::Result<Option<ExitStatus>> {
        let mut running = self.shared.running.subscribe();
        let ended = tokio::time::timeout(within, running.wait_for(|running| *running == Running::No)).await;
        match ended {
            Ok(_) => Ok(self.state().last_exit),
            Err(_) => bail!("the node {:?} still runs after {within:?}", self.running()),
        }
    }
}

/// The node's command line: in its host's network, with the environment it is given and no other.
fn command(launch: &Launch<'_>, environment: &[(String, String)], log: &File) -> anyhow::Result<Command> {
    let mut command = Command::new("nsenter");
    // Not `ip netns exec`, which would give the node mounts of its own: they would hold every other host's disk.
    command.arg(format!("--net=/run/netns/{}", launch.namespace));
    command.args(["env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", "RUST_BACKTRACE=1"]);
    command.args(environment.iter().map(|(key, value)| format!("{key}={value}")));
    command.arg(launch.binary).arg("serve").args(launch.flags);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    Ok(command)
}

/// The state of a process as the kernel shows it: `R`, `S`, `D`, `T` and so on.
///
/// # Errors
/// When there is no such process.
pub fn process_state(pid: u32) -> anyhow::Result<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit(')').next().context("a stat line")?;
    after_name.trim().chars().next().context("a stat line with a state")
}
