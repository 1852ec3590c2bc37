//! `watch`: prints changes as they happen, and runs a command for each if asked.
//!
//! A watch outlives its connection: it goes on from the revision after the last
//! one printed, on whichever endpoint answers, so nothing is missed or repeated.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use tokio::process::Command;

use super::Context;
use super::api::{WatchItem, WatchRequest};
use super::args::{RangeArgs, os_string};
use super::error::CliError;
use super::kv::{Show, kv_lines};
use super::output::{kv_json, say};
use crate::types::{Event, EventKind, Revision};

/// The wait before the first attempt to reconnect; doubled after each, up to the next constant.
const RECONNECT_DELAY_MIN: Duration = Duration::from_millis(100);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(5);

/// A kind of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A key was set.
    Put,
    /// A key was removed.
    Delete,
}

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

    /// Print only changes of this kind.
    #[arg(long, value_enum, value_name = "KIND")]
    pub filter: Option<Kind>,

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
    let mut request = WatchRequest {
        range: command.keys.range()?,
        start: Revision(command.rev),
        prev_kv: command.prev_kv,
        only: command.filter.map(|kind| match kind {
            Kind::Put => EventKind::Put,
            Kind::Delete => EventKind::Delete,
        }),
        progress_notify: command.progress_notify,
    };
    let mut printed = 0;
    let mut delay = RECONNECT_DELAY_MIN;
    let mut ready_file = command.ready_file.clone();
    let mut connected_once = false;
    loop {
        match follow(context, &command, &mut request, &mut printed, &mut ready_file, &mut connected_once).await {
            Ok(()) => return Ok(()),
            Err(error) if connected_once && error.may_retry() => {
                say(format!("the watch was interrupted ({error}); going on from revision {}", request.start));
                tokio::time::sleep(delay).await;
                delay = (delay * 2).min(RECONNECT_DELAY_MAX);
            }
            Err(error) => return Err(error),
        }
        if request.start > Revision(0) && connected_once {
            delay = RECONNECT_DELAY_MIN.max(delay / 2);
        }
    }
}

/// One connection's worth of the watch. Ends well only when enough was printed.
async fn follow(
    context: &Context,
    command: &WatchCommand,
    request: &mut WatchRequest,
    printed: &mut u64,
    ready_file: &mut Option<PathBuf>,
    connected_once: &mut bool,
) -> Result<(), CliError> {
    let mut stream = context.api().await?.watch(request.clone()).await?;
    loop {
        match stream.next().await? {
            WatchItem::Created { revision } => {
                *connected_once = true;
                if request.start == Revision(0) {
                    // From here on a broken connection must not lose what happens in between.
                    request.start = revision.next();
                }
                if let Some(path) = ready_file.take() {
                    std::fs::write(&path, b"").map_err(|e| CliError::file(&path, e))?;
                }
            }
            WatchItem::Progress { revision } => {
                request.start = request.start.max(revision.next());
                if command.progress_notify {
                    context.out.either(
                        || json!({ "progress": revision.0 }),
                        format!("progress: everything up to revision {revision} was sent"),
                    )?;
                }
            }
            WatchItem::Compacted { revision } => {
                return Err(CliError::Conflict(format!(
                    "the history before revision {revision} is compacted; read the keys and watch from there"
                )));
            }
            WatchItem::Events(events) => {
                for event in &events {
                    print(context, command, event)?;
                    run(command, event).await?;
                    *printed += 1;
                    if command.max_events.is_some_and(|max| *printed >= max) {
                        return Ok(());
                    }
                }
                if let Some(last) = events.last() {
                    request.start = last.kv.mod_revision.next();
                }
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
