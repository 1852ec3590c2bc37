//! Why a command failed, and the exit code that says so to a script.
//!
//! This is the only table of exit codes; nothing here prints.

use std::path::PathBuf;

use thiserror::Error;

use crate::client::ClientError;

/// Everything went well.
pub const OK: u8 = 0;
/// Something failed that no other code describes.
pub const ERROR: u8 = 1;
/// The command line, a settings file or the input is not understood.
pub const USAGE: u8 = 2;
/// The key, lease, member or file that was named does not exist.
pub const NOT_FOUND: u8 = 3;
/// What is there does not allow it: it exists already, has changed, or is compacted.
pub const CONFLICT: u8 = 4;
/// The cluster cannot be reached, has no leader, or did not answer in time.
pub const UNAVAILABLE: u8 = 6;

/// What `--help` says about them.
pub const HELP: &str = "Exit codes:
  0  done
  1  an error that no other code describes
  2  usage: the command line, a settings file or the input is not understood
  3  not found: the key, lease or member does not exist
  4  conflict: it exists already, it has changed, or its revision is compacted
  6  unavailable: no endpoint answered, there is no leader, or the time ran out
  (lock and elect with a command end with the command's own code)";

/// Why a command failed.
#[derive(Debug, Error)]
pub enum CliError {
    /// The command line or the input is not understood; the message names the fix.
    #[error("{0}")]
    Usage(String),
    /// What was named does not exist.
    #[error("{0}")]
    NotFound(String),
    /// What is there does not allow it.
    #[error("{0}")]
    Conflict(String),
    /// The cluster does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// Anything else, in words.
    #[error("{0}")]
    Failed(String),
    /// The cluster answered with an error, or not at all.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// A file, a pipe or a process failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A command run under a lock ended with this code; it has said why itself.
    #[error("the command ended with code {0}")]
    Child(u8),
    /// The reader of our output has gone (`mainstay get ... | head`): not an error worth words.
    #[error("the output was closed")]
    OutputClosed,
}

impl CliError {
    /// An error of the file at `path`.
    pub fn file(path: impl Into<PathBuf>, source: std::io::Error) -> CliError {
        CliError::Io { what: path.into().display().to_string(), source }
    }

    /// An error while doing `what`.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> CliError {
        CliError::Io { what: what.into(), source }
    }
}

/// Writing to stdout failed.
pub fn stdout_error(source: std::io::Error) -> CliError {
    if source.kind() == std::io::ErrorKind::BrokenPipe {
        CliError::OutputClosed
    } else {
        CliError::io("writing the output", source)
    }
}
