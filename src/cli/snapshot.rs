//! `snapshot save | status | restore`.
//!
//! A saved snapshot ends with the SHA-256 of everything before it. It is
//! checked while it arrives, and the file gets its name only when it is whole
//! and on the disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Context;
use super::error::CliError;
use super::output::bytes_text;
use super::progress;
use super::recover::{node_error, report};
use super::tree::not_found_or_io;
use crate::node::{InitialMember, RestoreSnapshot, restore_snapshot};
use crate::storage::{StateOptions, archive};

/// Bytes of the hash at the end of a snapshot.
const HASH_BYTES: usize = 32;

/// `mainstay snapshot`.
#[derive(Clone, Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Save the store of the first endpoint that answers as a file
    Save {
        /// The file; it must not exist.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Check a saved file and say what is in it
    Status {
        /// The file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Make the data directory of a new cluster's member of a saved file
    Restore(RestoreCommand),
}

/// Runs `snapshot`.
pub async fn snapshot(context: &Context, command: SnapshotCommand) -> Result<(), CliError> {
    match command {
        SnapshotCommand::Save { file } => save(context, &file).await,
        SnapshotCommand::Status { file } => status(context, &file),
        SnapshotCommand::Restore(command) => restore(context, command).await,
    }
}

async fn save(context: &Context, path: &Path) -> Result<(), CliError> {
    if path.exists() {
        return Err(CliError::Conflict(format!("{} exists already; name a new file", path.display())));
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let begun = context.env.monotonic();
    // Removed when it is dropped, unless it gets its name.
    let mut partial = tempfile::Builder::new()
        .prefix(".mainstay-snapshot-")
        .tempfile_in(directory)
        .map_err(|e| CliError::file(directory, e))?;
    let bar = progress::bytes();
    let mut stream = context.api().await?.snapshot().await?;
    let mut check = TailHash::default();
    while let Some(piece) = stream.next().await? {
        check.take(&piece.bytes);
        partial.write_all(&piece.bytes).map_err(|e| CliError::file(path, e))?;
        bar.set_length(bar.position() + piece.bytes.len() as u64 + piece.remaining_bytes);
        bar.inc(piece.bytes.len() as u64);
    }
    let bytes = check.total;
    if !check.whole() {
        return Err(CliError::Failed(format!(
            "the snapshot arrived damaged ({} received): its SHA-256 does not match; try again",
            bytes_text(bytes)
        )));
    }
    partial.as_file().sync_all().map_err(|e| CliError::file(path, e))?;
    partial.persist_noclobber(path).map_err(|e| CliError::file(path, e.error))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| CliError::file(directory, e))?;
    bar.finish_and_clear();
    let took = context.env.monotonic().saturating_sub(begun);
    context.out.either(
        || json!({ "saved": path.display().to_string(), "bytes": bytes, "took_ms": took.as_millis() as u64 }),
        format!(
            "Snapshot saved at {} ({}, in {:.1} s)",
            path.display(),
            bytes_text(bytes),
            took.as_secs_f64()
        ),
    )
}

fn status(context: &Context, path: &Path) -> Result<(), CliError> {
    std::fs::metadata(path).map_err(|e| not_found_or_io(path, e))?;
    let status =
        archive::status(path, &std::env::temp_dir()).map_err(|error| CliError::Failed(error.to_string()))?;
    let out = &context.out;
    if out.is_json() {
        return out.json(&json!({
            "hash": format!("{:08x}", status.hash),
            "revision": status.revision.0,
            "total_keys": status.total_keys,
            "size_bytes": status.size_bytes,
            "cluster_id": format!("{:x}", status.cluster),
            "raft_term": status.last.term,
            "raft_index": status.last.index,
        }));
    }
    out.rows(
        &["HASH", "REVISION", "TOTAL KEYS", "TOTAL SIZE"],
        vec![vec![
            format!("{:08x}", status.hash),
            status.revision.to_string(),
            status.total_keys.to_string(),
            bytes_text(status.size_bytes),
        ]],
    )
}

/// `mainstay snapshot restore`.
///
/// Run it once for each member of the new cluster, with the same file, --initial-cluster and token, and start the
/// members then with the same settings. The new cluster has another id than the old one.
#[derive(Clone, Debug, Args)]
pub struct RestoreCommand {
    /// The file.
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The data directory to make; it must not exist, or be empty.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,

    /// Which of the members this is.
    #[arg(long, value_name = "NAME", default_value = "default")]
    name: String,

    /// All members of the new cluster; this one alone if it is not given.
    #[arg(long, value_name = "NAME=URL,...")]
    initial_cluster: Option<String>,

    /// Keeps clusters with equal members apart.
    #[arg(long, value_name = "TOKEN", default_value = "mainstay-cluster")]
    initial_cluster_token: String,

    /// Where the members will reach this one, if --initial-cluster is not given.
    #[arg(long, value_delimiter = ',', value_name = "URL,...", default_value = "http://localhost:2380")]
    initial_advertise_peer_urls: Vec<String>,
}

async fn restore(context: &Context, command: RestoreCommand) -> Result<(), CliError> {
    std::fs::metadata(&command.file).map_err(|e| not_found_or_io(&command.file, e))?;
    let members = match &command.initial_cluster {
        Some(text) => initial_members(text)?,
        None => vec![InitialMember {
            name: command.name.clone(),
            peer_urls: command.initial_advertise_peer_urls.clone(),
        }],
    };
    let request = RestoreSnapshot {
        file: command.file,
        data_dir: command.data_dir.clone(),
        name: command.name,
        members,
        token: command.initial_cluster_token,
        state: StateOptions::default(),
    };
    let restored = restore_snapshot(request, &context.env).await.map_err(node_error)?;
    report(context, &restored, &command.data_dir.display().to_string())
}

/// Reads `name=url,name=url`; a name may come several times, once for each URL.
fn initial_members(text: &str) -> Result<Vec<InitialMember>, CliError> {
    let mut members: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some((name, url)) if !name.is_empty() && url.starts_with("http://") => {
                members.entry(name.to_owned()).or_default().push(url.trim_end_matches('/').to_owned());
            }
            _ => {
                return Err(CliError::Usage(format!(
                    "--initial-cluster: `{part}` is not NAME=http://HOST:PORT"
                )));
            }
        }
    }
    Ok(members.into_iter().map(|(name, peer_urls)| InitialMember { name, peer_urls }).collect())
}

/// Hashes everything but the last 32 bytes, which are the hash to expect.
#[derive(Default)]
struct TailHash {
    hasher: Sha256,
    tail: Vec<u8>,
    total: u64,
}

impl TailHash {
    fn take(&mut self, chunk: &[u8]) {
        self.total += chunk.len() as u64;
        self.tail.extend_from_slice(chunk);
        let settled = self.tail.len().saturating_sub(HASH_BYTES);
        self.hasher.update(&self.tail[..settled]);
        self.tail.drain(..settled);
    }

    fn whole(self) -> bool {
        self.tail.len() == HASH_BYTES && self.hasher.finalize()[..] == self.tail[..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_whole_only_with_its_own_hash_at_the_end() {
        let content = b"some content".repeat(10);
        let hash = Sha256::digest(&content);
        let whole = |bytes: &[u8], step: usize| {
            let mut check = TailHash::default();
            bytes.chunks(step).for_each(|chunk| check.take(chunk));
            check.whole()
        };
        let good = [&content[..], &hash[..]].concat();
        for step in [1, 7, 31, 32, 33, 1000] {
            assert!(whole(&good, step), "{step}");
        }
        let mut flipped = good.clone();
        flipped[5] ^= 1;
        assert!(!whole(&flipped, 9));
        assert!(!whole(&good[..good.len() - 1], 9));
        assert!(!whole(b"", 9));
    }
}
