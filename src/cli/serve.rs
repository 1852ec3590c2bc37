//! `serve`: one node, from its settings to its end.
//!
//! This is where the rooms are put together, and the order is the point: the
//! settings are checked before anything is touched, the ports are open before
//! the data, peers can reach the node before it takes part, and the end runs
//! backwards.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use clap::Args;

use super::error::{CliError, ERROR, OK, USAGE};
use super::output::say;
use super::signals::Signals;
use super::supervise::die_with_parent;
use crate::env::{EnvRef, SystemEnv};
use crate::mutant;
use crate::node::{ExitReason, MakeTransport, Node, NodeError, NodeParts};
use crate::raft::{Fatal, GrpcTransport};
use crate::server::control::GrpcDialer;
use crate::server::{Listeners, Server};
use crate::settings::{ServeFlags, Settings, Sources};
use crate::storage::DataDirOptions;
use crate::telemetry;

/// The node ended by a decision that a restart would not change: it was removed from its cluster, or its data
/// directory is not for it. A supervisor should not start it again.
pub const EXIT_FINAL: u8 = 7;

/// What `serve --help` says about exit codes.
const HELP: &str = "Exit codes:
  0   stopped because it was asked to (SIGTERM, SIGINT; a second signal ends it at once)
  1   an error; start it again
  2   the settings are wrong
  7   removed from the cluster, or the data directory is not this node's: starting it again changes nothing
  70  it could not be sure of its state any more; start it again, and read why

A flag wins over a variable (MAINSTAY_DATA_DIR for --data-dir), a variable over the settings file.";

/// `mainstay serve`.
#[derive(Clone, Debug, Args)]
#[command(after_help = HELP)]
pub struct ServeCommand {
    /// The settings.
    #[command(flatten)]
    flags: ServeFlags,

    /// End when the process with this id, which must be the parent, ends.
    #[arg(long, hide = true, value_name = "PID")]
    parent_pid: Option<u32>,
}

/// Runs `serve` and returns its exit code.
pub fn serve(command: ServeCommand) -> u8 {
    match try_serve(&command) {
        Ok(code) => code,
        Err(error) => {
            say(format!("error: {error}"));
            error.exit_code()
        }
    }
}

fn try_serve(command: &ServeCommand) -> Result<u8, CliError> {
    if let Some(parent) = command.parent_pid {
        die_with_parent(parent)?;
    }
    let read_file = |path: &Path| std::fs::read_to_string(path);
    let sources = Sources { flags: &command.flags, variables: variables()?, read_file: &read_file };
    let settings = Settings::load(&sources).map_err(|error| CliError::Usage(error.to_string()))?;
    telemetry::init_log(&settings.log).map_err(|error| CliError::Usage(error.to_string()))?;
    mutant::choose().map_err(CliError::Usage)?;
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    // The threads that write the log and apply need a core, too.
    let workers =
        std::thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1).max(1));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .thread_name("mainstay")
        .build()
        .map_err(|e| CliError::io("starting the runtime", e))?;
    let result = runtime.block_on(run(settings));
    // What has not ended by now was asked to and did not: it must not hold up the end.
    runtime.shutdown_background();
    result
}

/// The variables of the environment that may be settings.
fn variables() -> Result<Vec<(String, String)>, CliError> {
    let ours = std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"MAINSTAY_"));
    let ours = ours.filter(|(name, _)| !name.to_str().is_some_and(mutant::is_switch));
    ours.map(|(name, value)| match (name.into_string(), value.into_string()) {
        (Ok(name), Ok(value)) => Ok((name, value)),
        (Ok(name), Err(_)) => Err(CliError::Usage(format!("{name} is not UTF-8"))),
        (Err(name), _) => Err(CliError::Usage(format!("the variable {name:?} is not UTF-8"))),
    })
    .collect()
}

async fn run(settings: Settings) -> Result<u8, CliError> {
    let mut signals = Signals::listen()?;
    let fatal = Fatal::exit_process();
    fatal.on_panic();
    let metrics = telemetry::metrics_recorder().map_err(|error| CliError::Failed(error.to_string()))?;
    let env = SystemEnv::shared();
    let listeners =
        Listeners::open(&settings.server).await.map_err(|error| CliError::Failed(error.to_string()))?;
    let stop_limit = settings.server.stop_timeout;
    let parts = parts(&settings, &env, fatal);
    let node = tokio::select! {
        node = Node::start(parts) => match node {
            Ok(node) => node,
            Err(error) => return Ok(start_failed(&error)),
        },
        _ = signals.next() => {
            tracing::info!("stopped before the node had a cluster");
            return Ok(OK);
        }
    };
    let exit = node.exit().clone();
    tracing::info!(
        node = format!("{:x}", node.id()),
        cluster = format!("{:x}", node.cluster_id()),
        data_dir = %settings.node.data_dir.display(),
        clients = ?listeners.client_addresses(),
        peers = ?listeners.peer_addresses(),
        "mainstay {} serves",
        env!("CARGO_PKG_VERSION")
    );
    let server = Server::start(node.clone(), listeners, settings.server, env, Some(metrics));
    node.run();
    let reason = tokio::select! {
        reason = exit.wait() => reason,
        signal = signals.next() => {
            tracing::info!(signal, limit_ms = stop_limit.as_millis() as u64, "asked to stop");
            exit.announce(ExitReason::Stopped);
            ExitReason::Stopped
        }
    };
    tokio::select! {
        () = server.stop() => {}
        _ = signals.next() => {
            tracing::warn!("asked to stop once more: ending at once");
            return Ok(ERROR);
        }
    }
    Ok(match reason {
        ExitReason::Stopped => OK,
        ExitReason::Removed | ExitReason::Refused(_) => EXIT_FINAL,
        ExitReason::Failed(_) => ERROR,
    })
}

fn parts(settings: &Settings, env: &EnvRef, fatal: Fatal) -> NodeParts {
    // A connection on which nothing comes back for two of these is given up: well before a new leader would be needed.
    let keep_alive = settings.node.election_timeout;
    let transport: MakeTransport =
        Box::new(move |directory| Arc::new(GrpcTransport::new(directory, keep_alive)));
    NodeParts {
        options: settings.node.clone(),
        env: env.clone(),
        fatal,
        transport,
        dialer: Arc::new(GrpcDialer),
        watch: settings.watch.clone(),
        data_dir: DataDirOptions::default(),
        inline: false,
        log: None,
    }
}

fn start_failed(error: &NodeError) -> u8 {
    tracing::error!(%error, "the node does not start");
    match error {
        NodeError::Invalid(_) => USAGE,
        NodeError::NotAdmitted(_) => EXIT_FINAL,
        _ => ERROR,
    }
}
