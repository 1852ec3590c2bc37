//! Child processes that are nodes: started, watched, restarted when they die,
//! stopped together.
//!
//! Every child is in a process group of its own, so that Ctrl-C in a terminal
//! reaches the supervisor alone and the stop is graceful; and every child is
//! told its parent's process id, so that it ends itself should the supervisor
//! be killed. Nothing here speaks to the nodes over the network.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::error::CliError;
use super::output::say;

/// How long after its death a node is started again the first time.
const RESTART_DELAY_MIN: Duration = Duration::from_millis(200);
/// The longest wait between two starts.
const RESTART_DELAY_MAX: Duration = Duration::from_secs(10);
/// A node that lived this long has recovered: its next restart is quick again.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// How long nodes may take to stop before they are killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);
/// How much of the end of a node's log is shown when it does not start.
const LOG_TAIL_LINES: usize = 12;

/// One node to run.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Its name, for messages.
    pub name: String,
    /// The arguments of `mainstay`, from the verb on.
    pub args: Vec<OsString>,
    /// Where its output goes; appended to.
    pub log: PathBuf,
}

/// What a node is doing.
enum State {
    Running {
        child: Child,
        since: Instant,
    },
    Waiting {
        until: Instant,
    },
    /// Ended by its own decision; a restart would change nothing.
    Ended,
}

struct Node {
    spec: NodeSpec,
    state: State,
    delay: Duration,
}

/// The nodes, and whoever starts them again.
pub struct Supervisor {
    program: PathBuf,
    nodes: Vec<Node>,
}

impl Supervisor {
    /// Starts all nodes, from the same executable that is running now.
    ///
    /// The caller must stay on the thread that calls this for as long as the nodes are to live: the system ties a
    /// child's death signal to the thread that started it.
    pub fn start(specs: Vec<NodeSpec>) -> Result<Supervisor, CliError> {
        let program =
            std::env::current_exe().map_err(|e| CliError::io("finding mainstay's own program", e))?;
        let mut supervisor = Supervisor { program, nodes: Vec::new() };
        for spec in specs {
            let child = supervisor.spawn(&spec)?;
            let state = State::Running { child, since: Instant::now() };
            supervisor.nodes.push(Node { spec, state, delay: RESTART_DELAY_MIN });
        }
        Ok(supervisor)
    }

    fn spawn(&self, spec: &NodeSpec) -> Result<Child, CliError> {
        let log = open_log(&spec.log)?;
        let log_too = log.try_clone().map_err(|e| CliError::file(&spec.log, e))?;
        let parent = rustix::process::getpid().as_raw_nonzero().get().to_string();
        let mut command = Command::new(&self.program);
        // Settings meant for another node must not slip in; how to log is everybody's.
        for (name, _) in std::env::vars_os() {
            let bytes = name.as_bytes();
            if bytes.starts_with(b"MAINSTAY_") && !bytes.starts_with(b"MAINSTAY_LOG_") {
                command.env_remove(name);
            }
        }
        command
            .args(&spec.args)
            .args(["--parent-pid", &parent])
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log_too)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| CliError::io(format!("starting {}", spec.name), e))
    }

    /// Waits until a node dies or is due to be started again, and acts on it. Cancel-safe: call it in a loop.
    pub async fn tend(&mut self) -> Result<(), CliError> {
        let (index, event) = self.next_event().await;
        match event {
            Event::Died(status) => self.on_death(index, status),
            Event::Due => {
                let child = self.spawn(&self.nodes[index].spec)?;
                say(format!("{}: started again (pid {})", self.nodes[index].spec.name, pid_text(&child)));
                self.nodes[index].state = State::Running { child, since: Instant::now() };
            }
        }
        Ok(())
    }

    /// Fails as soon as a node dies; never returns otherwise. For the time before the cluster is ready.
    pub async fn first_death(&mut self) -> CliError {
        loop {
            let (index, event) = self.next_event().await;
            if let Event::Died(status) = event {
                let node = &mut self.nodes[index];
                node.state = State::Ended;
                return CliError::Failed(format!(
                    "{} did not start ({}); the end of {}:\n{}",
                    node.spec.name,
                    status_text(status),
                    node.spec.log.display(),
                    log_tail(&node.spec.log)
                ));
            }
        }
    }

    async fn next_event(&mut self) -> (usize, Event) {
        let waits = self.nodes.iter_mut().enumerate().map(|(index, node)| {
            Box::pin(async move {
                match &mut node.state {
                    State::Running { child, .. } => match child.wait().await {
                        Ok(status) => (index, Event::Died(status)),
                        // Only a programming error makes `wait` fail; treat the child as gone.
                        Err(_) => (index, Event::Died(ExitStatus::from_raw(0))),
                    },
                    State::Waiting { until } => {
                        tokio::time::sleep_until(*until).await;
                        (index, Event::Due)
                    }
                    State::Ended => std::future::pending().await,
                }
            })
        });
        futures_util::future::select_all(waits).await.0
    }

    fn on_death(&mut self, index: usize, status: ExitStatus) {
        let node = &mut self.nodes[index];
        if let State::Running { since, .. } = &node.state
            && since.elapsed() >= HEALTHY_AFTER
        {
            node.delay = RESTART_DELAY_MIN;
        }
        if status.code() == Some(i32::from(super::serve::EXIT_FINAL)) {
            say(format!(
                "{}: ended and is not started again ({}); see {}",
                node.spec.name,
                status_text(status),
                node.spec.log.display()
            ));
            node.state = State::Ended;
            return;
        }
        say(format!(
            "{}: died ({}); starting it again in {:.1} s; its log is {}",
            node.spec.name,
            status_text(status),
            node.delay.as_secs_f64(),
            node.spec.log.display()
        ));
        node.state = State::Waiting { until: Instant::now() + node.delay };
        node.delay = (node.delay * 2).min(RESTART_DELAY_MAX);
    }

    /// Asks every node to stop, waits for them, and kills what has not stopped in time. Returns how many were killed.
    pub async fn stop(mut self) -> usize {
        for node in &self.nodes {
            if let State::Running { child, .. } = &node.state {
                signal(child, Signal::TERM);
            }
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut killed = 0;
        for node in &mut self.nodes {
            let State::Running { child, .. } = &mut node.state else { continue };
            if tokio::time::timeout_at(deadline, child.wait()).await.is_err() {
                say(format!("{}: did not stop in {} s; killing it", node.spec.name, STOP_TIMEOUT.as_secs()));
                // An error means that it has ended after all.
                let _ = child.kill().await;
                killed += 1;
            }
        }
        killed
    }
}

enum Event {
    Died(ExitStatus),
    Due,
}

/// Sends a signal to a child that has not been waited for, so its id cannot have been given to another process.
fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
        // The only possible failure is that it has just ended, which is what is wanted.
        let _ = kill_process(pid, signal);
    }
}

fn pid_text(child: &Child) -> String {
    child.id().map_or_else(|| "none".to_owned(), |id| id.to_string())
}

/// How a process ended, in words.
pub fn status_text(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "for an unknown reason".to_owned(),
    }
}

fn open_log(path: &Path) -> Result<File, CliError> {
    OpenOptions::new().create(true).append(true).open(path).map_err(|e| CliError::file(path, e))
}

/// The last lines of a log.
pub fn log_tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LOG_TAIL_LINES);
    lines[from..].iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

/// Makes this process end when the one with `parent` ends. Fails if it has ended already.
pub fn die_with_parent(parent: u32) -> Result<(), CliError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|e| CliError::io("tying the node to its supervisor", e.into()))?;
    // The parent may have ended before the line above: then nobody sends the signal.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get() as u32);
    if now != Some(parent) {
        return Err(CliError::Failed(format!("the supervisor (pid {parent}) has ended; not starting")));
    }
    Ok(())
}
