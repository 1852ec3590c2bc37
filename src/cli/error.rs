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

    /// The exit code that says it.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Usage(_) => USAGE,
            CliError::NotFound(_) => NOT_FOUND,
            CliError::Conflict(_) => CONFLICT,
            CliError::Unavailable(_) => UNAVAILABLE,
            CliError::Client(error) => client_exit_code(error),
            CliError::Child(code) => *code,
            CliError::OutputClosed | CliError::Failed(_) | CliError::Io { .. } => ERROR,
        }
    }

    /// Whether the same could work a moment later.
    pub fn may_retry(&self) -> bool {
        match self {
            CliError::Client(error) => error.may_retry(),
            CliError::Unavailable(_) => true,
            _ => false,
        }
    }

    /// Whether an answer did not fit into a message: fewer keys at once may.
    pub fn is_too_large(&self) -> bool {
        let CliError::Client(ClientError::Refused { message, .. }) = self else { return false };
        ["too large", "larger than", "would have more than"].iter().any(|words| message.contains(words))
    }

    /// Whether a lease could not be created because it is there.
    pub fn is_lease_exists(&self) -> bool {
        matches!(self, CliError::Client(ClientError::Refused { message, .. })
            if message == "etcdserver: lease already exists")
    }

    /// An error while doing `what`.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> CliError {
        CliError::Io { what: what.into(), source }
    }
}

/// gRPC's numbers for the codes that matter here.
const INVALID_ARGUMENT: i32 = 3;
const GRPC_NOT_FOUND: i32 = 5;
const ALREADY_EXISTS: i32 = 6;
const FAILED_PRECONDITION: i32 = 9;
const OUT_OF_RANGE: i32 = 11;

fn client_exit_code(error: &ClientError) -> u8 {
    match error {
        ClientError::Refused { code, message } => match i32::from(*code) {
            GRPC_NOT_FOUND => NOT_FOUND,
            // etcd says this with the code of a malformed request.
            INVALID_ARGUMENT if message == "etcdserver: key not found" => NOT_FOUND,
            INVALID_ARGUMENT => USAGE,
            ALREADY_EXISTS | FAILED_PRECONDITION | OUT_OF_RANGE => CONFLICT,
            _ => ERROR,
        },
        ClientError::NotDone { .. }
        | ClientError::Unknown { .. }
        | ClientError::Unreachable { .. }
        | ClientError::Overloaded { .. } => UNAVAILABLE,
        ClientError::AnswerLost { .. } => CONFLICT,
        ClientError::Compacted { .. } => CONFLICT,
        ClientError::LeaseGone { .. } => NOT_FOUND,
        ClientError::BadAddress(_)
        | ClientError::NoEndpoints
        | ClientError::BadMetadata { .. }
        | ClientError::WrongCluster { .. }
        | ClientError::BadOption { .. } => USAGE,
        ClientError::WatchCanceled { .. }
        | ClientError::Protocol(_)
        | ClientError::Unsupported { .. }
        | ClientError::Cache(_) => ERROR,
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
