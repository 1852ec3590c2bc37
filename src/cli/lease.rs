//! `lease grant | revoke | keep-alive | timetolive | list`.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::Context;
use super::args::parse_lease;
use super::error::CliError;
use super::output::{put_bytes, say};
use crate::types::LeaseId;

/// The wait before a renewal that failed is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// `mainstay lease`.
#[derive(Clone, Debug, Subcommand)]
pub enum LeaseCommand {
    /// Create a lease: keys attached to it are removed when it is not kept alive.
    Grant {
        /// Its time to live in seconds.
        #[arg(value_name = "TTL")]
        ttl: i64,
        /// Its id; the cluster chooses one when none is given.
        #[arg(long, value_name = "ID", value_parser = parse_lease)]
        id: Option<LeaseId>,
    },
    /// Remove a lease and the keys attached to it.
    Revoke {
        /// The lease.
        #[arg(value_name = "ID", value_parser = parse_lease)]
        id: LeaseId,
    },
    /// Keep a lease alive until interrupted.
    #[command(visible_alias = "keepalive")]
    KeepAlive(KeepAlive),
    /// How long a lease has left.
    #[command(visible_alias = "time-to-live")]
    Timetolive {
        /// The lease.
        #[arg(value_name = "ID", value_parser = parse_lease)]
        id: LeaseId,
        /// List the keys attached to it.
        #[arg(long)]
        keys: bool,
    },
    /// All leases.
    List,
}

/// `mainstay lease keep-alive`.
#[derive(Clone, Debug, Args)]
pub struct KeepAlive {
    /// The lease.
    #[arg(value_name = "ID", value_parser = parse_lease)]
    id: LeaseId,
    /// Renew it once and end.
    #[arg(long)]
    once: bool,
}

/// Runs `lease`.
pub async fn lease(context: &Context, command: LeaseCommand) -> Result<(), CliError> {
    let out = &context.out;
    match command {
        LeaseCommand::Grant { ttl, id } => {
            if ttl < 1 {
                return Err(CliError::Usage("the time to live must be at least 1 second".to_owned()));
            }
            let (id, ttl) = context.api().await?.lease_grant(id.unwrap_or(LeaseId::NONE), ttl).await?;
            out.either(
                || json!({ "id": id.to_string(), "ttl_s": ttl }),
                format!("lease {id} granted with TTL({ttl}s)"),
            )
        }
        LeaseCommand::Revoke { id } => {
            context.api().await?.lease_revoke(id).await?;
            out.either(|| json!({ "id": id.to_string(), "revoked": true }), format!("lease {id} revoked"))
        }
        LeaseCommand::KeepAlive(command) => keep_alive(context, command).await,
        LeaseCommand::Timetolive { id, keys } => time_to_live(context, id, keys).await,
        LeaseCommand::List => {
            let ids = context.api().await?.leases().await?;
            if out.is_json() {
                let ids: Vec<String> = ids.iter().map(LeaseId::to_string).collect();
                return out.json(&json!({ "leases": ids }));
            }
            if out.is_table() {
                return out.rows(&["LEASE"], ids.iter().map(|id| vec![id.to_string()]).collect());
            }
            let mut text = format!("found {} leases\n", ids.len());
            for id in ids {
                text.push_str(&format!("{id}\n"));
            }
            out.raw(text.as_bytes())
        }
    }
}

async fn keep_alive(context: &Context, command: KeepAlive) -> Result<(), CliError> {
    let id = command.id;
    let mut keeper = context.api().await?.lease_keeper(id);
    loop {
        let wait = match keeper.keep().await {
            Ok(ttl) => {
                context.out.either(
                    || json!({ "id": id.to_string(), "ttl_s": ttl }),
                    format!("lease {id} keepalived with TTL({ttl})"),
                )?;
                if command.once {
                    return Ok(());
                }
                Duration::from_millis((ttl.unsigned_abs() * 1000 / 3).max(100))
            }
            Err(error) if error.may_retry() && !command.once => {
                say(format!("not renewed ({error}); trying again"));
                RETRY_DELAY
            }
            Err(error) => return Err(error.into()),
        };
        tokio::time::sleep(wait).await;
    }
}

async fn time_to_live(context: &Context, id: LeaseId, keys: bool) -> Result<(), CliError> {
    let lease = context.api().await?.lease_time_to_live(id, keys).await?;
    if lease.ttl_s < 0 {
        return Err(CliError::NotFound(format!("lease {id} does not exist or has expired")));
    }
    let out = &context.out;
    if out.is_json() {
        let keys: Vec<Value> = lease
            .keys
            .iter()
            .map(|key| {
                let mut object = Map::new();
                put_bytes(&mut object, "key", key);
                Value::Object(object)
            })
            .collect();
        return out.json(&json!({
            "id": id.to_string(), "ttl_s": lease.ttl_s, "granted_ttl_s": lease.granted_ttl_s, "keys": keys,
        }));
    }
    let mut text =
        format!("lease {id} granted with TTL({}s), remaining({}s)", lease.granted_ttl_s, lease.ttl_s);
    if keys {
        let keys: Vec<String> =
            lease.keys.iter().map(|key| String::from_utf8_lossy(key).into_owned()).collect();
        text.push_str(&format!(", attached keys([{}])", keys.join(" ")));
    }
    out.line(text)
}
