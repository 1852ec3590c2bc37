//! `watch`: prints changes as they happen, and runs a command for each if asked.
//!
//! A watch outlives its connection: the client goes on from the revision after
//! the last one it handed out, on whichever endpoint answers, so nothing is
//! missed or repeated. Filters are the SDK's: the server sends the smallest range
//! that has every key they can match.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};
use tokio::process::Command;

use super::Context;
use super::args::{RangeArgs, os_string};
use super::error::CliError;
use super::kv::{Show, kv_lines};
use super::output::{kv_json, say};
use crate::client::{Filter, FilterError, WatchOptions};
use crate::types::{Event, EventKind, Revision};

/// `mainstay watch`.
#[derive(Clone, Debug, Args)]
pub struct WatchCommand {
    /// The keys to watch.
    #[command(flatten)]
    pub keys: RangeArgs,

    /// Begin with the changes of this revision; 0 is from now on.
    #[arg(long, default_value_t = 0, value_name = "REVISION")]
    pub rev: i64,

    /// Print what was there before, too.
    #[arg(long)]
    pub prev_kv: bool,

    /// Print only changes that match; of several filters all must. A filter is `put` or `delete`, or one of
    /// `key:`, `prefix:`, `suffix:`, `contains:`, `glob:` and `regex:` with a pattern for the key, or `not:` before
    /// another filter. In a glob `*` is any run within one segment of a path, `**` any run, `?` one character, and
    /// the pattern describes the whole key; a regex finds something anywhere unless `^` and `$` tie it.
    #[arg(long, value_name = "FILTER")]
    pub filter: Vec<Filter>,

    /// Say now and then how far the watch has come, also when nothing changes.
    #[arg(long)]
    pub progress_notify: bool,

    /// End after this many changes.
    #[arg(long, value_name = "N")]
    pub max_events: Option<u64>,

    /// Create this file once the watch is in place, for scripts that must not write before.
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,

    /// Print keys and values as hexadecimal escapes.
    #[arg(long)]
    pub hex: bool,

    /// A command to run for each change, with ETCD_WATCH_REVISION, ETCD_WATCH_EVENT_TYPE, ETCD_WATCH_KEY and
    /// ETCD_WATCH_VALUE in its environment.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Runs `watch`.
pub async fn watch(context: &Context, command: WatchCommand) -> Result<(), CliError> {
    if command.rev < 0 || command.max_events == Some(0) {
        return Err(CliError::Usage("--rev and --max-events count from 1".to_owned()));
    }
    let wrong = |e: FilterError| CliError::Usage(e.to_string());
    let keys = Filter::range(command.keys.range()?).map_err(wrong)?;
    let filter = Filter::all(command.filter.iter().cloned().chain([keys]));
    let nothing = || CliError::Usage("no change of these keys can match every --filter".to_owned());
    let (no_put, no_delete) = (!filter.wants(EventKind::Put), !filter.wants(EventKind::Delete));
    if no_put && no_delete {
        return Err(nothing());
    }
    let options = WatchOptions {
        start: Revision(command.rev),
        prev_kv: command.prev_kv,
        progress_notify: command.progress_notify,
        no_put,
        no_delete,
        ..WatchOptions::new(filter.covering_range().ok_or_else(nothing)?)
    };
    let mut watch = context.api().await?.watch(options).await?;
    if let Some(path) = &command.ready_file {
        std::fs::write(path, b"").map_err(|e| CliError::file(path, e))?;
    }
    let mut printed = 0;
    loop {
        let batch = watch.next().await?;
        for event in batch.events.iter().filter(|event| filter.matches(event)) {
            print(context, &command, event)?;
            run(&command, event).await?;
            printed += 1;
            if command.max_events.is_some_and(|max| printed >= max) {
                return Ok(());
            }
        }
        if batch.events.is_empty() && command.progress_notify {
            let revision = batch.revision;
            if context.out.is_json() {
                context.out.json_line(&json!({ "progress": revision.0 }))?;
            } else {
                context.out.line(format!("progress: everything up to revision {revision} was sent"))?;
            }
        }
    }
}

fn print(context: &Context, command: &WatchCommand, event: &Event) -> Result<(), CliError> {
    let word = kind_word(event.kind);
    if context.out.is_json() {
        return context.out.json_line(&event_json(event));
    }
    let show = Show { hex: command.hex, ..Show::default() };
    let mut text = format!("{word}\n").into_bytes();
    text.extend(kv_lines(event.prev.as_slice(), show));
    text.extend(kv_lines(std::slice::from_ref(&event.kv), show));
    context.out.raw(&text)
}

fn event_json(event: &Event) -> Value {
    let mut object = Map::new();
    object.insert("type".to_owned(), json!(kind_word(event.kind)));
    object.insert("kv".to_owned(), kv_json(&event.kv, event.kind == EventKind::Put));
    if let Some(prev) = &event.prev {
        object.insert("prev_kv".to_owned(), kv_json(prev, true));
    }
    Value::Object(object)
}

fn kind_word(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Put => "PUT",
        EventKind::Delete => "DELETE",
    }
}

/// Runs the user's command for one event and waits for it. Its failure is said, and does not end the watch.
async fn run(command: &WatchCommand, event: &Event) -> Result<(), CliError> {
    let Some((program, arguments)) = command.command.split_first() else { return Ok(()) };
    let status = Command::new(program)
        .args(arguments)
        .env("ETCD_WATCH_REVISION", event.kv.mod_revision.to_string())
        .env("ETCD_WATCH_EVENT_TYPE", kind_word(event.kind))
        .env("ETCD_WATCH_KEY", environment_safe(&event.kv.key))
        .env("ETCD_WATCH_VALUE", environment_safe(&event.kv.value))
        .status()
        .await
        .map_err(|e| CliError::io(format!("running {}", program.to_string_lossy()), e))?;
    if !status.success() {
        say(format!("{} ended with {}", program.to_string_lossy(), super::supervise::status_text(status)));
    }
    Ok(())
}

/// A variable cannot hold a NUL byte: what has one is cut there.
fn environment_safe(bytes: &[u8]) -> OsString {
    os_string(bytes.iter().copied().take_while(|byte| *byte != 0).collect())
}
