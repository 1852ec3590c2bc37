//! `dev`: a cluster on this machine for trying things out, for as long as the
//! command runs.
//!
//! The nodes are child processes on loopback. Ports are free ones unless they
//! are chosen; with a kept data directory they are remembered there, because
//! the members' addresses are part of what they store.

use std::ffi::OsString;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use super::Context;
use super::error::CliError;
use super::output::say;
use super::signals::Signals;
use super::supervise::{NodeSpec, Supervisor};
use crate::types::LeaseId;

/// How long the cluster may take to become ready before that is an error.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// How often readiness is looked at.
const READY_POLL: Duration = Duration::from_millis(30);
/// Where a kept directory remembers its shape.
const SHAPE_FILE: &str = "dev.json";

/// `mainstay dev`.
#[derive(Clone, Debug, Args)]
pub struct DevCommand {
    /// How many nodes.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=9))]
    nodes: u16,

    /// Keep the data here, and go on with it the next time. Without it, the data is under a temporary directory that
    /// is removed at the end.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// The first of 2 x N ports in a row: the first node's for clients, the first node's for peers, the second
    /// node's, and so on. Free ports are used without it.
    #[arg(long, value_name = "PORT")]
    base_port: Option<u16>,
}

/// What a data directory was founded with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Shape {
    /// Each node's client port and peer port.
    ports: Vec<(u16, u16)>,
}

/// Runs `dev`.
pub async fn dev(context: &Context, command: DevCommand) -> Result<(), CliError> {
    let begun = Instant::now();
    let mut signals = Signals::listen()?;
    // Removed when it is dropped, also on the way out of an error.
    let temporary = match &command.data_dir {
        Some(_) => None,
        None => Some(
            tempfile::Builder::new()
                .prefix("mainstay-dev-")
                .tempdir()
                .map_err(|e| CliError::io("making a temporary directory", e))?,
        ),
    };
    let directory = match (&command.data_dir, &temporary) {
        (Some(directory), _) => directory.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => unreachable!("one of them is there"),
    };
    std::fs::create_dir_all(&directory).map_err(|e| CliError::file(&directory, e))?;
    let directory = directory.canonicalize().map_err(|e| CliError::file(&directory, e))?;
    let shape = shape(&command, &directory)?;
    let endpoints: Vec<String> = shape.ports.iter().map(|(client, _)| url(*client)).collect();

    let mut supervisor = Supervisor::start(specs(&shape, &directory))?;
    let ready = tokio::select! {
        ready = wait_ready(context, &endpoints) => ready,
        death = supervisor.first_death() => Err(death),
        _ = signals.next() => Err(CliError::Failed("interrupted before the cluster was ready".to_owned())),
    };
    if let Err(error) = ready {
        supervisor.stop().await;
        return Err(error);
    }
    announce(context, &endpoints, &directory, temporary.is_some(), begun.elapsed())?;

    let result = loop {
        tokio::select! {
            tended = supervisor.tend() => if let Err(error) = tended {
                break Err(error);
            },
            _ = signals.next() => {
                say("stopping");
                break Ok(());
            }
        }
    };
    // A second signal ends the wait: the children are killed when the supervisor is dropped.
    let killed = tokio::select! {
        killed = supervisor.stop() => killed,
        _ = signals.next() => {
            return Err(CliError::Failed("interrupted while stopping; the nodes were killed".to_owned()));
        }
    };
    if let Some(temporary) = temporary {
        let path = temporary.path().to_owned();
        temporary.close().map_err(|e| CliError::file(path, e))?;
    }
    match (result, killed) {
        (Ok(()), 0) => Ok(()),
        (Ok(()), n) => Err(CliError::Failed(format!("{n} nodes had to be killed"))),
        (Err(error), _) => Err(error),
    }
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// The ports: as chosen, as remembered, or free ones.
fn shape(command: &DevCommand, directory: &Path) -> Result<Shape, CliError> {
    let file = directory.join(SHAPE_FILE);
    let remembered: Option<Shape> = match std::fs::read_to_string(&file) {
        Ok(text) => Some(serde_json::from_str(&text).map_err(|e| {
            CliError::Usage(format!("{} is damaged ({e}); name another --data-dir", file.display()))
        })?),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(CliError::file(file, e)),
    };
    let count = usize::from(command.nodes);
    if let Some(shape) = remembered {
        if shape.ports.len() != count {
            return Err(CliError::Usage(format!(
                "{} holds a cluster of {} nodes; use --nodes {} or another --data-dir",
                directory.display(),
                shape.ports.len(),
                shape.ports.len()
            )));
        }
        if command.base_port.is_some_and(|base| Some(base) != shape.ports.first().map(|ports| ports.0)) {
            return Err(CliError::Usage(format!(
                "{} holds a cluster on other ports; leave out --base-port or use another --data-dir",
                directory.display()
            )));
        }
        check_free(&shape)?;
        return Ok(shape);
    }
    let shape = match command.base_port {
        Some(base) => {
            let port = |offset: usize| {
                u16::try_from(usize::from(base) + offset).ok().filter(|port| *port > 0).ok_or_else(|| {
                    CliError::Usage(format!(
                        "--base-port {base}: there are no {} ports from there on",
                        2 * count
                    ))
                })
            };
            let ports: Result<Vec<_>, CliError> =
                (0..count).map(|i| Ok((port(2 * i)?, port(2 * i + 1)?))).collect();
            let shape = Shape { ports: ports? };
            check_free(&shape)?;
            shape
        }
        None => free_ports(count)?,
    };
    let text = serde_json::to_string(&shape).map_err(|e| CliError::Failed(e.to_string()))?;
    std::fs::write(&file, text).map_err(|e| CliError::file(file, e))?;
    Ok(shape)
}

fn check_free(shape: &Shape) -> Result<(), CliError> {
    for port in shape.ports.iter().flat_map(|(client, peer)| [*client, *peer]) {
        TcpListener::bind(("127.0.0.1", port)).map_err(|e| {
            CliError::Failed(format!(
                "port {port} cannot be used ({e}); stop what uses it or choose other ports"
            ))
        })?;
    }
    Ok(())
}

/// Ports that are free now. They are held all at once while they are drawn, so that they differ.
fn free_ports(nodes: usize) -> Result<Shape, CliError> {
    let draw = || TcpListener::bind(("127.0.0.1", 0)).map_err(|e| CliError::io("finding a free port", e));
    let held: Vec<TcpListener> = (0..2 * nodes).map(|_| draw()).collect::<Result<_, _>>()?;
    let port = |listener: &TcpListener| {
        listener
            .local_addr()
            .map(|address| address.port())
            .map_err(|e| CliError::io("finding a free port", e))
    };
    let ports: Result<Vec<_>, CliError> =
        held.chunks_exact(2).map(|pair| Ok((port(&pair[0])?, port(&pair[1])?))).collect();
    Ok(Shape { ports: ports? })
}

fn specs(shape: &Shape, directory: &Path) -> Vec<NodeSpec> {
    let peers: Vec<String> = shape
        .ports
        .iter()
        .enumerate()
        .map(|(i, (_, peer))| format!("node{}={}", i + 1, url(*peer)))
        .collect();
    let spec = |(i, (client, peer)): (usize, &(u16, u16))| {
        let name = format!("node{}", i + 1);
        let mut args: Vec<OsString> = vec!["serve".into()];
        let mut flag = |flag: &str, value: OsString| args.extend([flag.into(), value]);
        flag("--name", name.clone().into());
        flag("--data-dir", directory.join(&name).into());
        flag("--listen-client-urls", url(*client).into());
        flag("--advertise-client-urls", url(*client).into());
        flag("--listen-peer-urls", url(*peer).into());
        flag("--initial-advertise-peer-urls", url(*peer).into());
        flag("--initial-cluster", peers.join(",").into());
        flag("--initial-cluster-state", "new".into());
        flag("--initial-cluster-token", "mainstay-dev".into());
        // All of them share this machine's memory.
        flag("--block-cache-bytes", "64MiB".into());
        flag("--record-cache-bytes", "64MiB".into());
        NodeSpec { log: directory.join(format!("{name}.log")), name, args }
    };
    shape.ports.iter().enumerate().map(spec).collect()
}

/// Waits until every node follows a leader, every member has started, and a write goes through.
async fn wait_ready(context: &Context, endpoints: &[String]) -> Result<(), CliError> {
    let mut last = String::new();
    let ready = async {
        loop {
            match is_ready(context, endpoints).await {
                Ok(()) => return,
                Err(error) => last = error.to_string(),
            }
            sleep(READY_POLL).await;
        }
    };
    let in_time = timeout(READY_TIMEOUT, ready).await;
    in_time.map_err(|_| {
        CliError::Unavailable(format!("the cluster is not ready after {} s: {last}", READY_TIMEOUT.as_secs()))
    })
}

async fn is_ready(context: &Context, endpoints: &[String]) -> Result<(), CliError> {
    let not_yet = |why: String| Err(CliError::Unavailable(why));
    for endpoint in endpoints {
        let api = context.api_at(std::slice::from_ref(endpoint)).await?;
        if api.status().await?.leader == 0 {
            return not_yet(format!("{endpoint} has no leader yet"));
        }
    }
    let api = context.api_at(endpoints).await?;
    let members = api.members(true).await?;
    let started = members.iter().filter(|member| !member.client_urls.is_empty()).count();
    if started < endpoints.len() {
        return not_yet(format!("{started} of {} members have started", endpoints.len()));
    }
    // A write that goes through the log and changes no revision.
    let (lease, _) = api.lease_grant(LeaseId::NONE, 60).await?;
    api.lease_revoke(lease).await
}

fn announce(
    context: &Context,
    endpoints: &[String],
    directory: &Path,
    is_temporary: bool,
    took: Duration,
) -> Result<(), CliError> {
    let list = endpoints.join(",");
    if context.out.is_json() {
        return context.out.json_line(&json!({
            "ready": true,
            "endpoints": endpoints,
            "data_dir": directory.display().to_string(),
            "data_is_temporary": is_temporary,
            "took_ms": took.as_millis() as u64,
        }));
    }
    say(format!(
        "{} ready after {:.1} s; data and logs are under {}{}",
        match endpoints.len() {
            1 => "one node is".to_owned(),
            n => format!("{n} nodes are"),
        },
        took.as_secs_f64(),
        directory.display(),
        if is_temporary { ", which is removed at the end" } else { "" }
    ));
    context.out.line(format!("export MAINSTAY_ENDPOINTS={list}"))?;
    say("\ntry, in another terminal, with the line above:");
    say("  mainstay put greeting hello && mainstay get greeting");
    say("  mainstay watch --prefix \"\"");
    say("  mainstay endpoint status");
    // Without the scheme: etcdctl 3.4 puts a URL whole where HTTP/2 wants host and port.
    let plain = list.replace("http://", "");
    say(format!("or with etcd's client:\n  ETCDCTL_API=3 etcdctl --endpoints {plain} get greeting"));
    say("\nCtrl-C stops it");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(nodes: u16, base_port: Option<u16>) -> DevCommand {
        DevCommand { nodes, data_dir: None, base_port }
    }

    #[test]
    fn ports_are_free_differ_and_are_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let first = shape(&command(3, None), directory.path()).unwrap();
        let mut ports: Vec<u16> = first.ports.iter().flat_map(|(a, b)| [*a, *b]).collect();
        ports.sort();
        ports.dedup();
        assert_eq!(ports.len(), 6);
        assert_eq!(shape(&command(3, None), directory.path()).unwrap(), first);
        assert!(matches!(shape(&command(1, None), directory.path()), Err(CliError::Usage(_))));
    }

    #[test]
    fn a_port_in_use_is_an_error_that_names_it() {
        let held = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = held.local_addr().unwrap().port();
        let directory = tempfile::tempdir().unwrap();
        let message = shape(&command(1, Some(port)), directory.path()).unwrap_err().to_string();
        assert!(message.contains(&format!("port {port}")), "{message}");
        assert!(shape(&command(3, Some(65_533)), directory.path()).is_err());
    }
}
