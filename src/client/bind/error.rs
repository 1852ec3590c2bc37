//! Why keys are no `T`, in words that name the key and the place.

use std::sync::Arc;

use thiserror::Error;

use super::Format;
use crate::client::ClientError;

/// The longest reason that is kept, in characters: a reason quotes values, and
/// values may be long.
const REASON_CHARS_MAX: usize = 300;

/// Why a binding has no value, or not the newest one.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// The keys cannot be read from the cluster.
    #[error("the keys below `{prefix}` cannot be read: {source}")]
    Read {
        /// What is bound.
        prefix: String,
        /// Why not.
        source: Arc<ClientError>,
    },
    /// There is no key at all. [`super::Bind::or_default`] allows that.
    #[error("there is no key below `{prefix}`; create one, or bind with or_default()")]
    Absent {
        /// What is bound.
        prefix: String,
    },
    /// A key or its value is not UTF-8.
    #[error("the {what} of key `{key}` is not UTF-8: byte {at}")]
    NotUtf8 {
        /// The key; what is not UTF-8 in it is replaced.
        key: String,
        /// Whether it is the name or the value.
        what: &'static str,
        /// The first byte that is wrong, counted from 0.
        at: usize,
    },
    /// Two keys name the same place, or one is a value where the other needs a folder.
    #[error(
        "key `{other}` has no place beside key `{key}`, which is a value at the same path; remove one of them"
    )]
    Conflict {
        /// The key that is a value.
        key: String,
        /// The key that is the same path or below it.
        other: String,
    },
    /// A key has too many segments.
    #[error("key `{key}` has {depth} segments below the prefix; a binding reads at most {max}")]
    TooDeep {
        /// The key.
        key: String,
        /// How many it has.
        depth: usize,
        /// How many it may have.
        max: usize,
    },
    /// A value is not what its format says.
    #[error("the value of key `{key}` is no {format}{}: {reason}", place(*line, *column))]
    Syntax {
        /// The key.
        key: String,
        /// The format it was read as.
        format: Format,
        /// The line, from 1, where there is one.
        line: Option<usize>,
        /// The column, from 1, where there is one.
        column: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// The keys can be read and do not make a `T`.
    #[error("{}{}: {reason}", field(path), of_key(key.as_deref()))]
    Field {
        /// The field, names and positions joined by dots; empty for the whole.
        path: String,
        /// The key that has it, if one has.
        key: Option<String>,
        /// What is wrong.
        reason: String,
    },
    /// The check refused the value.
    #[error("the check refused it: {reason}")]
    Refused {
        /// The check's words.
        reason: String,
    },
    /// Reading or checking a value panicked.
    #[error("reading or checking it panicked: {reason}")]
    Panicked {
        /// The panic's message, if it was text.
        reason: String,
    },
    /// The binding's task has ended, because its runtime did.
    #[error("the binding has ended with its runtime")]
    Ended,
}

impl BindError {
    /// The key that is to blame, where one is.
    pub fn key(&self) -> Option<&str> {
        match self {
            BindError::NotUtf8 { key, .. }
            | BindError::Conflict { key, .. }
            | BindError::TooDeep { key, .. }
            | BindError::Syntax { key, .. } => Some(key),
            BindError::Field { key, .. } => key.as_deref(),
            _ => None,
        }
    }
}

fn place(line: Option<usize>, column: Option<usize>) -> String {
    match (line, column) {
        (Some(line), Some(column)) => format!(" at line {line} column {column}"),
        (Some(line), None) => format!(" at line {line}"),
        _ => String::new(),
    }
}

fn field(path: &str) -> String {
    if path.is_empty() { "the whole".to_owned() } else { format!("field `{path}`") }
}

fn of_key(key: Option<&str>) -> String {
    key.map_or(String::new(), |key| format!(" (key `{key}`)"))
}

/// Cuts a reason that quotes too much.
pub(super) fn short(reason: impl std::fmt::Display) -> String {
    let reason = reason.to_string();
    match reason.char_indices().nth(REASON_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &reason[..end]),
        None => reason,
    }
}
