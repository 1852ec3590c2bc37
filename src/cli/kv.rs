//! `get`, `put`, `del` and `compact`.

use std::ffi::OsString;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use bytes::Bytes;
use clap::Args;
use serde_json::{Value, json};

use super::Context;
use super::args::{Consistency, GetArgs, RangeArgs, bytes_of, parse_consistency, parse_lease};
use super::error::CliError;
use super::explain;
use super::output::{Output, cell, kv_json, plain, say};
use crate::types::{
    Compare, CompareOp, CompareTarget, DeleteRange, KeyRange, KeyValue, LeaseId, Put, RangeReply, Revision,
    Space, Txn, TxnOp, TxnOpReply,
};

/// `mainstay get`.
#[derive(Clone, Debug, Args)]
pub struct GetCommand {
    /// What to read.
    #[command(flatten)]
    pub get: GetArgs,

    /// strong (or l): see every write acknowledged before; bounded=5s: be no older than that; eventual (or s): what the
    /// cache or any member has, also without a leader.
    #[arg(long, default_value = "strong", value_name = "CONSISTENCY", value_parser = parse_consistency)]
    pub consistency: Consistency,

    /// Read one key through a cache in this directory, which is this tool's own; eventual reads work offline then.
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Say on stderr (with -o json, in the document) how the read was routed and answered.
    #[arg(long)]
    pub explain: bool,

    /// Print values without their keys.
    #[arg(long)]
    pub print_value_only: bool,

    /// Print the value's bytes and nothing else, not even a newline (one key, with --print-value-only).
    #[arg(long, requires = "print_value_only", conflicts_with = "hex")]
    pub raw: bool,

    /// Print keys and values as hexadecimal escapes.
    #[arg(long)]
    pub hex: bool,
}

/// What `put` takes, also inside a transaction.
#[derive(Clone, Debug, Args)]
pub struct PutOpArgs {
    /// The key.
    #[arg(value_name = "KEY")]
    pub key: OsString,

    /// The value; read from standard input when it is not given.
    #[arg(value_name = "VALUE", conflicts_with = "ignore_value")]
    pub value: Option<OsString>,

    /// Attach the key to this lease.
    #[arg(long, value_name = "ID", value_parser = parse_lease)]
    pub lease: Option<LeaseId>,

    /// Print what was there before.
    #[arg(long)]
    pub prev_kv: bool,

    /// Keep the value that is there.
    #[arg(long)]
    pub ignore_value: bool,

    /// Keep the lease that is there.
    #[arg(long, conflicts_with = "lease")]
    pub ignore_lease: bool,
}

impl PutOpArgs {
    /// The put meant, with an empty value.
    pub fn put(&self) -> Result<Put, CliError> {
        let key = bytes_of(&self.key);
        if key.is_empty() {
            return Err(CliError::Usage("the key is empty".to_owned()));
        }
        Ok(Put {
            space: Space::User,
            key,
            value: Bytes::new(),
            lease: self.lease.unwrap_or(LeaseId::NONE),
            prev_kv: self.prev_kv,
            ignore_value: self.ignore_value,
            ignore_lease: self.ignore_lease,
        })
    }
}

/// `mainstay put`.
#[derive(Clone, Debug, Args)]
pub struct PutCommand {
    /// What to set.
    #[command(flatten)]
    pub put: PutOpArgs,

    /// Set the key only if it does not exist; exit code 4 if it does.
    #[arg(long, conflicts_with = "if_rev")]
    pub if_absent: bool,

    /// Set the key only if its mod revision is still this one; exit code 4 if it is not.
    #[arg(long, value_name = "REVISION")]
    pub if_rev: Option<i64>,

    /// Print keys and values as hexadecimal escapes.
    #[arg(long)]
    pub hex: bool,
}

/// What `del` takes, also inside a transaction.
#[derive(Clone, Debug, Args)]
pub struct DelOpArgs {
    /// The keys.
    #[command(flatten)]
    pub keys: RangeArgs,

    /// Print what was there before.
    #[arg(long)]
    pub prev_kv: bool,
}

/// `mainstay del`.
#[derive(Clone, Debug, Args)]
pub struct DelCommand {
    /// What to remove.
    #[command(flatten)]
    pub del: DelOpArgs,

    /// Print keys and values as hexadecimal escapes.
    #[arg(long)]
    pub hex: bool,
}

/// `mainstay compact`.
#[derive(Clone, Debug, Args)]
pub struct CompactCommand {
    /// Forget the history before this revision, which stays readable itself.
    #[arg(value_name = "REVISION")]
    pub revision: i64,

    /// Answer only once the old revisions are gone from the disk.
    #[arg(long)]
    pub physical: bool,
}

/// How keys and values are printed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Show {
    /// As hexadecimal escapes.
    pub hex: bool,
    /// Keys were asked for, values were not.
    pub keys_only: bool,
    /// Values without keys.
    pub value_only: bool,
}

/// Runs `get`.
pub async fn get(context: &Context, command: GetCommand) -> Result<(), CliError> {
    let query = command.get.query()?;
    let explained = match command.explain || command.cache_dir.is_some() {
        true => Some(explain::read(context, &command, &query).await?),
        false => None,
    };
    let (revision, reply) = match &explained {
        Some(explained) => (explained.revision, explained.reply.clone()),
        None => {
            let serializable = command.consistency == Consistency::Eventual;
            context.api().await?.range(&query, serializable).await?
        }
    };
    let explained = explained.filter(|_| command.explain);
    let is_single = matches!(query.range, KeyRange::Single(_));
    let show = Show { hex: command.hex, keys_only: query.keys_only, value_only: command.print_value_only };
    let out = &context.out;
    if out.is_json() {
        let mut document = range_json(revision, &reply, !query.keys_only);
        if let Some(explained) = &explained {
            document["explain"] = explained.json();
        }
        out.json(&document)?;
    } else if query.count_only {
        out.line(reply.count.to_string())?;
    } else if command.raw {
        if let (true, Some(kv)) = (is_single, reply.kvs.first()) {
            out.raw(&kv.value)?;
        } else if !is_single {
            return Err(CliError::Usage("--raw prints one key: leave out --prefix and the range".to_owned()));
        }
    } else if out.is_table() && !is_single && !show.value_only {
        table(out, &reply.kvs, show)?;
        if reply.more {
            say(format!("{} of {} keys", reply.kvs.len(), reply.count));
        }
    } else {
        out.raw(&kv_lines(&reply.kvs, show))?;
    }
    if let Some(explained) = explained.filter(|_| !out.is_json()) {
        explained.say();
    }
    if is_single && reply.kvs.is_empty() && !query.count_only {
        return Err(CliError::NotFound(format!(
            "the key `{}` does not exist",
            String::from_utf8_lossy(query.range.start())
        )));
    }
    Ok(())
}

/// Runs `put`.
pub async fn put(context: &Context, command: PutCommand) -> Result<(), CliError> {
    let mut put = command.put.put()?;
    if !put.ignore_value {
        put.value = match &command.put.value {
            Some(value) => bytes_of(value),
            None => value_from_stdin()?,
        };
    }
    let api = context.api().await?;
    let guard = match (command.if_absent, command.if_rev) {
        (true, _) => Some(0),
        (false, revision) => revision,
    };
    let (revision, prev) = match guard {
        None => api.put(put).await?,
        Some(expected) => {
            let key = put.key.clone();
            let compare = Compare {
                space: Space::User,
                range: KeyRange::Single(key.clone()),
                op: CompareOp::Equal,
                target: CompareTarget::Mod(expected),
            };
            let txn = Txn { compare: vec![compare], success: vec![TxnOp::Put(put)], failure: vec![] };
            let (revision, reply) = api.txn(txn).await?;
            if !reply.succeeded {
                let key = String::from_utf8_lossy(&key).into_owned();
                return Err(CliError::Conflict(match expected {
                    0 => format!("the key `{key}` exists already"),
                    _ => format!("the key `{key}` was not last changed at revision {expected}"),
                }));
            }
            let prev = reply.responses.into_iter().find_map(|response| match response {
                TxnOpReply::Put { prev } => prev,
                _ => None,
            });
            (revision, prev)
        }
    };
    let out = &context.out;
    if out.is_json() {
        return out.json(&json!({
            "revision": revision.0,
            "prev_kv": prev.as_ref().map(|kv| kv_json(kv, true)),
        }));
    }
    out.line("OK")?;
    out.raw(&kv_lines(prev.as_slice(), Show { hex: command.hex, ..Show::default() }))
}

/// Runs `del`.
pub async fn del(context: &Context, command: DelCommand) -> Result<(), CliError> {
    let range = command.del.keys.range()?;
    let delete = DeleteRange { space: Space::User, range, prev_kv: command.del.prev_kv };
    let (revision, deleted, prev) = context.api().await?.delete(delete).await?;
    let out = &context.out;
    if out.is_json() {
        let prev: Vec<Value> = prev.iter().map(|kv| kv_json(kv, true)).collect();
        return out.json(&json!({ "revision": revision.0, "deleted": deleted, "prev_kvs": prev }));
    }
    out.line(deleted.to_string())?;
    out.raw(&kv_lines(&prev, Show { hex: command.hex, ..Show::default() }))
}

/// Runs `compact`.
pub async fn compact(context: &Context, command: CompactCommand) -> Result<(), CliError> {
    if command.revision < 1 {
        return Err(CliError::Usage("the revision must be at least 1".to_owned()));
    }
    context.api().await?.compact(Revision(command.revision), command.physical).await?;
    context.out.either(
        || json!({ "compacted": command.revision }),
        format!("compacted revision {}", command.revision),
    )
}

/// A value from standard input, as it comes; etcdctl keeps the last newline too.
fn value_from_stdin() -> Result<Bytes, CliError> {
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        say("reading the value from standard input; end it with Ctrl-D");
    }
    let mut value = Vec::new();
    stdin.read_to_end(&mut value).map_err(|e| CliError::io("reading standard input", e))?;
    Ok(value.into())
}

/// A range as JSON.
pub fn range_json(revision: Revision, reply: &RangeReply, with_values: bool) -> Value {
    let kvs: Vec<Value> = reply.kvs.iter().map(|kv| kv_json(kv, with_values)).collect();
    json!({ "revision": revision.0, "count": reply.count, "more": reply.more, "kvs": kvs })
}

/// Keys and values on lines of their own, as etcdctl prints them.
pub fn kv_lines(kvs: &[KeyValue], show: Show) -> Vec<u8> {
    let mut text = Vec::new();
    for kv in kvs {
        if !show.value_only {
            text.extend(plain(&kv.key, show.hex));
            text.push(b'\n');
        }
        if !show.keys_only {
            text.extend(plain(&kv.value, show.hex));
            text.push(b'\n');
        }
    }
    text
}

fn table(out: &Output, kvs: &[KeyValue], show: Show) -> Result<(), CliError> {
    let mut headers = vec!["KEY", "VALUE", "VERSION", "MOD REVISION", "LEASE"];
    if show.keys_only {
        headers.remove(1);
    }
    let rows = kvs.iter().map(|kv| {
        let mut row = vec![cell(&kv.key, show.hex)];
        if !show.keys_only {
            row.push(cell(&kv.value, show.hex));
        }
        let lease = if kv.lease.is_some() { kv.lease.to_string() } else { String::new() };
        row.extend([kv.version.to_string(), kv.mod_revision.to_string(), lease]);
        row
    });
    out.rows(&headers, rows.collect())
}
