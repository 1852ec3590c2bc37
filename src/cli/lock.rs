//! `lock` and `elect`: hold something that only one may hold, for as long as a
//! command or this process runs.
//!
//! What is held hangs on a lease that is kept alive here. When it cannot be
//! renewed in its time, what was held may be another's already: the command is
//! told to stop, and the exit code says so. As every lock of this kind it keeps
//! honest programs apart; it does not stop a paused one from acting late. The
//! command therefore gets the key and its revision, to guard its writes with.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::Context;
use super::api::Held;
use super::args::{bytes_of, os_string};
use super::error::CliError;
use super::output::{kv_json, plain, say};
use super::signals::Signals;
use crate::client::ClientError;
use crate::types::LeaseId;

/// The wait between two attempts to get or renew something.
const RETRY_DELAY: Duration = Duration::from_millis(300);

/// Times to live that are neither shorter than servers grant nor longer than anybody waits.
fn ttl() -> impl clap::builder::TypedValueParser<Value = i64> {
    clap::value_parser!(i64).range(2..=86_400)
}

/// `mainstay lock`.
#[derive(Clone, Debug, Args)]
pub struct LockCommand {
    /// The lock's name.
    #[arg(value_name = "NAME")]
    name: OsString,
    /// How many seconds after this process dies the lock is free.
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = ttl())]
    ttl: i64,
    /// A command to run while the lock is held, with ETCD_LOCK_KEY and ETCD_LOCK_REV in its environment. Without one,
    /// the lock is held until this process is interrupted.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// `mainstay elect`.
#[derive(Clone, Debug, Args)]
pub struct ElectCommand {
    /// The election's name.
    #[arg(value_name = "NAME")]
    name: OsString,
    /// What to tell about oneself when elected.
    #[arg(value_name = "PROPOSAL", required_unless_present = "listen", conflicts_with = "listen")]
    proposal: Option<OsString>,
    /// Take no part: print the leader, and every change of it.
    #[arg(short, long)]
    listen: bool,
    /// How many seconds after this process dies another may be elected.
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = ttl())]
    ttl: i64,
    /// A command to run while elected, with ETCD_LOCK_KEY and ETCD_LOCK_REV in its environment.
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "listen")]
    command: Vec<OsString>,
}

enum What {
    Lock(Bytes),
    Election(Bytes, Bytes),
}

impl What {
    fn word(&self) -> &'static str {
        match self {
            What::Lock(_) => "the lock",
            What::Election(..) => "the election",
        }
    }
}

/// Runs `lock`.
pub async fn lock(context: &Context, command: LockCommand) -> Result<(), CliError> {
    if command.name.is_empty() {
        return Err(CliError::Usage("the lock needs a name".to_owned()));
    }
    hold(context, What::Lock(bytes_of(&command.name)), command.ttl, &command.command).await
}

/// Runs `elect`.
pub async fn elect(context: &Context, command: ElectCommand) -> Result<(), CliError> {
    if command.name.is_empty() {
        return Err(CliError::Usage("the election needs a name".to_owned()));
    }
    let name = bytes_of(&command.name);
    if command.listen {
        return listen(context, name).await;
    }
    let proposal = command.proposal.as_deref().map(bytes_of).unwrap_or_default();
    hold(context, What::Election(name, proposal), command.ttl, &command.command).await
}

/// Prints the leader whenever it changes, until interrupted.
async fn listen(context: &Context, name: Bytes) -> Result<(), CliError> {
    let mut connected = false;
    loop {
        let result: Result<(), CliError> = async {
            let mut stream = context.api().await?.observe(name.clone()).await?;
            connected = true;
            loop {
                let kv = stream.next().await?;
                if context.out.is_json() {
                    context.out.json_line(&kv_json(&kv, true))?;
                } else {
                    context.out.line([&plain(&kv.key, false)[..], b"\n", &kv.value].concat())?;
                }
            }
        }
        .await;
        match result {
            Err(error) if connected && error.may_retry() => {
                say(format!("interrupted ({error}); trying again"));
                tokio::time::sleep(RETRY_DELAY).await;
            }
            other => return other,
        }
    }
}

/// Gets `what`, runs the command (or waits) while it is held, gives it back.
async fn hold(context: &Context, what: What, ttl: i64, command: &[OsString]) -> Result<(), CliError> {
    let mut signals = Signals::listen()?;
    let (lease, ttl) = context.api().await?.lease_grant(LeaseId::NONE, ttl).await?;
    let alive = keep_alive(context, lease, ttl);
    tokio::pin!(alive);
    let result = tokio::select! {
        lost = &mut alive => Err(lost),
        signal = signals.next() => Err(CliError::Child(128 + signal)),
        got = acquire(context, &what, lease) => match got {
            Err(error) => Err(error),
            Ok(held) => {
                let done = while_held(context, &what, &held, command, &mut alive, &mut signals).await;
                let released = release(context, &held).await;
                done.and(released)
            }
        },
    };
    // Also frees what was held if releasing failed, and what was only waited for.
    if let Ok(api) = context.api().await {
        // The lease expires by itself in any case.
        let _ = api.lease_revoke(lease).await;
    }
    result
}

async fn acquire(context: &Context, what: &What, lease: LeaseId) -> Result<Held, CliError> {
    loop {
        let result = async {
            let api = context.api().await?;
            match what {
                What::Lock(name) => api.lock(name.clone(), lease).await,
                What::Election(name, proposal) => api.campaign(name.clone(), proposal.clone(), lease).await,
            }
        };
        match result.await {
            // The place in the queue is a key with our lease: asking again finds it.
            Err(error) if error.may_retry() => {
                say(format!("still waiting for {} ({error})", what.word()));
                tokio::time::sleep(RETRY_DELAY).await;
            }
            other => return other,
        }
    }
}

async fn release(context: &Context, held: &Held) -> Result<(), CliError> {
    context.api().await?.release(held).await
}

/// Renews the lease until that is no longer possible; then says why.
async fn keep_alive(context: &Context, lease: LeaseId, ttl: i64) -> CliError {
    let mut keeper = match context.api().await {
        Ok(api) => api.lease_keeper(lease),
        Err(error) => return error,
    };
    let ttl = Duration::from_secs(ttl.unsigned_abs());
    // Counted from before the request: the server's clock for the lease begins later.
    let mut renewed = Instant::now();
    loop {
        tokio::time::sleep_until(renewed + ttl / 3).await;
        loop {
            let begun = Instant::now();
            let left = (renewed + ttl).saturating_duration_since(begun);
            match tokio::time::timeout(left, keeper.keep()).await {
                Ok(Ok(_)) => {
                    renewed = begun;
                    break;
                }
                Ok(Err(ClientError::LeaseGone { .. })) => {
                    return CliError::Conflict("the lease expired: another may hold it now".to_owned());
                }
                Ok(Err(error)) if !error.may_retry() => return error.into(),
                Ok(Err(_)) => tokio::time::sleep(RETRY_DELAY).await,
                Err(_) => {
                    return CliError::Unavailable(
                        "the lease could not be renewed in its time: another may hold it now".to_owned(),
                    );
                }
            }
        }
    }
}

async fn while_held(
    context: &Context,
    what: &What,
    held: &Held,
    command: &[OsString],
    mut alive: impl Future<Output = CliError> + Unpin,
    signals: &mut Signals,
) -> Result<(), CliError> {
    let Some((program, arguments)) = command.split_first() else {
        say_held(context, what, held)?;
        return tokio::select! {
            lost = &mut alive => Err(lost),
            _ = signals.next() => Ok(()),
        };
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env("ETCD_LOCK_KEY", os_string(held.key.to_vec()))
        .env("ETCD_LOCK_REV", held.revision.to_string())
        .spawn()
        .map_err(|e| CliError::io(format!("running {}", program.to_string_lossy()), e))?;
    let mut lost = None;
    loop {
        tokio::select! {
            status = child.wait() => {
                let status = status.map_err(|e| CliError::io("waiting for the command", e))?;
                return match lost {
                    Some(error) => Err(error),
                    None => child_result(status),
                };
            }
            error = &mut alive, if lost.is_none() => {
                say(format!("{error}; stopping the command"));
                lost = Some(error);
                tell(&child, Signal::TERM);
            }
            _ = signals.next() => tell(&child, Signal::TERM),
        }
    }
}

fn say_held(context: &Context, what: &What, held: &Held) -> Result<(), CliError> {
    let mut key = serde_json::Map::new();
    super::output::put_bytes(&mut key, "key", &held.key);
    key.insert("revision".to_owned(), json!(held.revision.0));
    if context.out.is_json() {
        return context.out.json_line(&key.into());
    }
    context.out.line(&held.key)?;
    if let What::Election(_, proposal) = what {
        context.out.line(proposal)?;
    }
    Ok(())
}

fn tell(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
        // The only possible failure is that it has just ended.
        let _ = kill_process(pid, signal);
    }
}

fn child_result(status: ExitStatus) -> Result<(), CliError> {
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        (Some(code), _) => Err(CliError::Child(u8::try_from(code).unwrap_or(1))),
        (None, signal) => Err(CliError::Child(u8::try_from(128 + signal.unwrap_or(0)).unwrap_or(1))),
    }
}
