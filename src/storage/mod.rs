//! The disk: the log's files and the state's RocksDB, and everything that knows
//! a byte of them.
//!
//! `layout` is the one catalogue of keys and tags; `codec` the one way values
//! become bytes. No other room names `rocksdb`.

pub mod codec;
mod content;
mod dir;
mod identity;
pub mod layout;
pub mod log;
mod state;

pub mod archive;
pub mod snapshot;

pub use dir::{DataDir, DataDirOptions, DiskSpace};
pub use identity::{Identity, Standing};
pub use state::{Batch, CacheCounts, Cursor, Item, Read, Snapshot, StateDb, StateOptions, WeakStateDb};

/// Why the disk could not do what it was asked.
///
/// Every one of these stops the node: a failed write or fsync is never retried,
/// and a damaged record is never served.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// RocksDB, or the file system below it, failed.
    #[error("storage engine: {0}")]
    Engine(#[from] rocksdb::Error),
    /// A record is not what was written.
    #[error("corrupt {what}: {reason}")]
    Corrupt {
        /// Which record.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be used.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The data directory belongs to something else, or is not usable; the
    /// message says what to do.
    #[error("{0}")]
    Refused(String),
}
