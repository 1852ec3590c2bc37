//! `import`: text files, JSON lines or another etcd's content become keys.
//!
//! Keys are written in batches, several batches in flight. Writing a key again
//! with the same value is harmless, so a batch whose fate is unknown is simply
//! written again; there is no other way it could be lost or doubled.

use std::ffi::OsString;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use super::Context;
use super::api::Api;
use super::args::bytes_of;
use super::error::CliError;
use super::output::{bytes_text, get_bytes, say};
use super::tree::{Skipped, not_found_or_io, read_text, walk};
use super::{migrate, progress};
use crate::types::{LeaseId, Put, Space, Txn, TxnOp};

/// The most keys in one transaction; etcd's limit is 128 operations.
pub const BATCH_OPS_MAX: usize = 100;
/// The most bytes of keys and values in one transaction, unless one value alone is larger. A third of etcd's limit of
/// 1.5 MiB, so that a batch is never refused for its size.
pub const BATCH_BYTES_MAX: usize = 512 << 10;
/// Batches in flight. Four keep three nodes' disks busy; the next one waits.
const BATCHES_IN_FLIGHT: usize = 4;
/// How often a batch is tried again when the cluster is not available.
const RETRIES_MAX: u32 = 8;
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// `mainstay import`.
#[derive(Clone, Debug, Args)]
pub struct ImportCommand {
    /// A directory, whose text files become keys (at most 1 MiB each, world-readable; symbolic links are not
    /// followed), or a file of JSON lines that `mainstay export` wrote; `-` is standard input.
    #[arg(value_name = "PATH", required_unless_present = "from_etcd", conflicts_with = "from_etcd")]
    pub path: Option<PathBuf>,

    /// Put this before every key: the file `hosts` becomes `etc/hosts` with `--prefix etc/`. With --from-etcd: take
    /// only the keys that begin with it.
    #[arg(long, value_name = "PREFIX", default_value = "")]
    pub prefix: OsString,

    /// Take over the content of the etcd (or Mainstay) at this URL: keys, values, and leases with their remaining
    /// time. Revisions and versions begin anew.
    #[arg(long, value_name = "URL")]
    pub from_etcd: Option<String>,

    /// Import files that not everybody may read, too.
    #[arg(long, conflicts_with = "from_etcd")]
    pub private: bool,

    /// List every file that is left out, with the reason.
    #[arg(long, conflicts_with = "from_etcd")]
    pub show_skipped: bool,

    /// Write nothing; print what would be written.
    #[arg(long, conflicts_with = "from_etcd")]
    pub dry_run: bool,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Keys written.
    pub keys: u64,
    /// Bytes of their values.
    pub bytes: u64,
    /// Transactions they were written in.
    pub txns: u64,
}

/// Runs `import`.
pub async fn import(context: &Context, command: ImportCommand) -> Result<(), CliError> {
    if let Some(url) = &command.from_etcd {
        return migrate::migrate(context, url, bytes_of(&command.prefix)).await;
    }
    let path = command.path.clone().unwrap_or_default();
    if path == Path::new("-") {
        return import_lines(context, &command, Box::new(std::io::stdin().lock())).await;
    }
    let meta = std::fs::metadata(&path).map_err(|e| not_found_or_io(&path, e))?;
    if meta.is_dir() {
        return import_tree(context, &command, &path).await;
    }
    let file = std::fs::File::open(&path).map_err(|e| CliError::file(&path, e))?;
    import_lines(context, &command, Box::new(std::io::BufReader::new(file))).await
}

async fn import_tree(context: &Context, command: &ImportCommand, root: &Path) -> Result<(), CliError> {
    let begun = context.env.monotonic();
    let found = walk(root, command.private)?;
    let mut skipped = found.skipped.clone();
    let mut skipped_paths = found.skipped_paths;
    let bar = progress::items(found.files.len() as u64, "files");
    let mut writer = Writer::new(context, bar.clone(), command.dry_run).await?;
    for candidate in found.files {
        match read_text(&candidate.path) {
            Err(why) => {
                skipped.add(why);
                skipped_paths.push((candidate.path, why));
                bar.inc(1);
            }
            Ok(value) => {
                let key = [&bytes_of(&command.prefix)[..], &candidate.name].concat();
                writer.put(key.into(), value.into(), LeaseId::NONE).await?;
            }
        }
    }
    let imported = writer.finish().await?;
    bar.finish_and_clear();
    if command.show_skipped {
        for (path, why) in &skipped_paths {
            say(format!("left out: {} ({})", path.display(), why.words()));
        }
    }
    let took = context.env.monotonic().saturating_sub(begun);
    report(context, "files", &imported, &skipped, took, command.dry_run)
}

fn report(
    context: &Context,
    what: &str,
    imported: &Imported,
    skipped: &Skipped,
    took: Duration,
    dry_run: bool,
) -> Result<(), CliError> {
    let reasons: Vec<String> =
        skipped.reasons().map(|(why, count)| format!("{count} {}", why.words())).collect();
    let mut text = format!(
        "{} {} {what}, {}, in {} transactions, in {:.1} s",
        if dry_run { "would import" } else { "imported" },
        imported.keys,
        bytes_text(imported.bytes),
        imported.txns,
        took.as_secs_f64()
    );
    if skipped.total() > 0 {
        text.push_str(&format!("; left out {}: {}", skipped.total(), reasons.join(", ")));
    }
    if !context.out.is_json() {
        return context.out.line(text);
    }
    let skipped_json: Map<String, Value> =
        skipped.reasons().map(|(why, count)| (why.words().to_owned(), json!(count))).collect();
    context.out.json(&json!({
        "keys": imported.keys, "bytes": imported.bytes, "transactions": imported.txns,
        "skipped": skipped.total(), "skipped_reasons": skipped_json, "dry_run": dry_run,
        "took_ms": took.as_millis() as u64,
    }))
}

/// Reads what `export` wrote. Leases are not recreated: their ids mean nothing in another cluster.
async fn import_lines(
    context: &Context,
    command: &ImportCommand,
    input: Box<dyn BufRead + '_>,
) -> Result<(), CliError> {
    let begun = context.env.monotonic();
    let bar = progress::counter("keys");
    let mut writer = Writer::new(context, bar.clone(), command.dry_run).await?;
    for (number, line) in input.lines().enumerate() {
        let line = line.map_err(|e| CliError::io(format!("reading line {}", number + 1), e))?;
        if line.trim().is_empty() {
            continue;
        }
        let (key, value) = parse_exported_line(&line).map_err(|why| {
            CliError::Usage(format!(
                "line {}: {why}; JSON lines as `mainstay export` writes them are expected",
                number + 1
            ))
        })?;
        let key = [&bytes_of(&command.prefix)[..], &key].concat();
        writer.put(key.into(), value.into(), LeaseId::NONE).await?;
    }
    let imported = writer.finish().await?;
    bar.finish_and_clear();
    let took = context.env.monotonic().saturating_sub(begun);
    report(context, "keys", &imported, &Skipped::default(), took, command.dry_run)
}

/// The key and the value in a line that `export` wrote.
///
/// # Errors
/// What is wrong with it.
pub fn parse_exported_line(line: &str) -> Result<(Vec<u8>, Vec<u8>), String> {
    let value: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let object = value.as_object().ok_or("not an object")?;
    let key = get_bytes(object, "key").filter(|key| !key.is_empty()).ok_or("the key is missing")?;
    let value = get_bytes(object, "value").ok_or("the value is missing")?;
    Ok((key, value))
}

/// Gathers puts into batches and writes them, several at a time.
pub struct Writer<'a> {
    context: &'a Context,
    api: Option<Api>,
    bar: ProgressBar,
    batch: Vec<Put>,
    batch_bytes: usize,
    in_flight: FuturesUnordered<LocalBoxFuture<'a, Result<Imported, CliError>>>,
    done: Imported,
}

impl<'a> Writer<'a> {
    /// A writer to the cluster; with `dry_run`, one that only prints the keys.
    pub async fn new(context: &'a Context, bar: ProgressBar, dry_run: bool) -> Result<Writer<'a>, CliError> {
        let api = if dry_run { None } else { Some(context.api().await?) };
        Ok(Writer {
            context,
            api,
            bar,
            batch: Vec::new(),
            batch_bytes: 0,
            in_flight: FuturesUnordered::new(),
            done: Imported::default(),
        })
    }

    /// Takes one key. It is written when its batch is full, at the latest by [`Writer::finish`].
    pub async fn put(&mut self, key: Bytes, value: Bytes, lease: LeaseId) -> Result<(), CliError> {
        if self.api.is_none() {
            self.context.out.line(&key)?;
            self.done.keys += 1;
            self.done.bytes += value.len() as u64;
            self.bar.inc(1);
            return Ok(());
        }
        let bytes = key.len() + value.len();
        if self.batch.len() >= BATCH_OPS_MAX || self.batch_bytes + bytes > BATCH_BYTES_MAX {
            self.flush().await?;
        }
        self.batch_bytes += bytes;
        let put = Put {
            space: Space::User,
            key,
            value,
            lease,
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        };
        self.batch.push(put);
        Ok(())
    }

    /// Sends the batch on its way, after waiting for one of those in flight if there are enough.
    async fn flush(&mut self) -> Result<(), CliError> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if batch.is_empty() {
            return Ok(());
        }
        while self.in_flight.len() >= BATCHES_IN_FLIGHT {
            self.one_done().await?;
        }
        let Some(api) = self.api.clone() else { return Ok(()) };
        self.in_flight.push(Box::pin(write_batch(api, batch)));
        Ok(())
    }

    async fn one_done(&mut self) -> Result<(), CliError> {
        if let Some(written) = self.in_flight.next().await {
            let written = written?;
            self.bar.inc(written.keys);
            self.done.keys += written.keys;
            self.done.bytes += written.bytes;
            self.done.txns += written.txns;
        }
        Ok(())
    }

    /// Writes the rest, waits for everything, and says how much it was.
    pub async fn finish(mut self) -> Result<Imported, CliError> {
        self.flush().await?;
        while !self.in_flight.is_empty() {
            self.one_done().await?;
        }
        Ok(self.done)
    }
}

/// Writes one batch, again and again while the cluster is not available.
async fn write_batch(api: Api, batch: Vec<Put>) -> Result<Imported, CliError> {
    let keys = batch.len() as u64;
    let bytes = batch.iter().map(|put| put.value.len() as u64).sum();
    let txn = Txn { success: batch.into_iter().map(TxnOp::Put).collect(), ..Txn::default() };
    let mut attempt = 0;
    loop {
        match api.txn(txn.clone()).await {
            Ok(_) => return Ok(Imported { keys, bytes, txns: 1 }),
            Err(error) if error.may_retry() && attempt < RETRIES_MAX => {
                attempt += 1;
                tokio::time::sleep(RETRY_DELAY * attempt).await;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written() {
        assert_eq!(parse_exported_line(r#"{"key":"a","value":"b"}"#), Ok((b"a".to_vec(), b"b".to_vec())));
        assert_eq!(
            parse_exported_line(r#"{"key":"a","value":"/wA=","value_encoding":"base64","version":3}"#),
            Ok((b"a".to_vec(), vec![0xff, 0]))
        );
        for wrong in ["", "[]", "{}", r#"{"key":"","value":""}"#, r#"{"key":"a"}"#, r#"{"key":1,"value":""}"#]
        {
            assert!(parse_exported_line(wrong).is_err(), "{wrong}");
        }
    }
}
