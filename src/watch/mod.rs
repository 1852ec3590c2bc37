//! Who watches what, and what they have yet to see.
//!
//! The applying thread hands changes to the [`Hub`] and goes on; it waits for
//! no watcher. The newest changes lie in one ring shared by all; a watcher is a
//! cursor with a short list of the revisions in the ring that concern it, never
//! a queue of copies. A watcher that stands before the ring, or has fallen too
//! far behind, reads the past from disk, a bounded piece each time its stream
//! asks for more, until it meets the ring again.
//!
//! Invariants, for each watcher:
//! - it sees the events of its range in revision order, each once, none missing,
//!   from its start on;
//! - the events of one revision come in one message, unless it asked for
//!   fragments, and then without another message of that watcher between them;
//! - progress to a revision is announced only after every event up to it;
//! - when an event it has not seen may be gone, it is told so and ends.
//!
//! Locks are taken in the order: index, stream, ring. The ring's is held for
//! moving pointers only, because the applying thread takes it.

mod cursor;
mod history;
mod hub;
mod index;
mod ring;
mod stream;

#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::time::Duration;

pub use hub::Hub;
pub use ring::WatchEvent;
pub use stream::WatchStream;

use crate::types::{KeyRange, Revision, Space};

/// What the operator may tune of the hub.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Bytes of newest changes kept in memory; beyond it the oldest leave, and
    /// who has not seen them reads them from disk.
    pub ring_bytes_max: usize,
    /// How long a watcher with `progress_notify` may hear nothing, at least 100 ms.
    pub progress_interval: Duration,
    /// Size in bytes at which a message is full. A single larger revision is sent
    /// whole all the same, unless the watcher takes fragments.
    pub message_bytes: usize,
    /// Size in bytes that no fragment exceeds, unless it is a single event
    /// (etcd's: the request limit and 512 KiB).
    pub fragment_bytes: usize,
    /// Reads of the past that may run at once; others wait their turn.
    pub catch_up_reads_max: usize,
    /// Read the past on the task that needs it, not on the pool for blocking
    /// work: for a simulation, where one thread makes runs repeatable.
    pub inline_reads: bool,
}

impl Default for HubOptions {
    fn default() -> Self {
        HubOptions {
            ring_bytes_max: 32 << 20,
            progress_interval: Duration::from_secs(600),
            message_bytes: 256 << 10,
            fragment_bytes: (1536 + 512) << 10,
            catch_up_reads_max: 4,
            inline_reads: false,
        }
    }
}

/// What one watcher wants.
#[derive(Clone, Debug)]
pub struct WatchSpec {
    /// The space watched.
    pub space: Space,
    /// The keys watched.
    pub range: KeyRange,
    /// The first revision wanted; 0 is "from now on".
    pub start: Revision,
    /// Fill in the key before each change.
    pub prev_kv: bool,
    /// Leave puts out.
    pub no_put: bool,
    /// Leave deletes out.
    pub no_delete: bool,
    /// Send a progress message when nothing else was sent for the hub's interval.
    pub progress_notify: bool,
    /// Messages above the hub's size limit may split a revision.
    pub fragment: bool,
}

impl WatchSpec {
    /// Every change of `range` in `space`, from `start` on.
    pub fn new(space: Space, range: KeyRange, start: Revision) -> WatchSpec {
        WatchSpec {
            space,
            range,
            start,
            prev_kv: false,
            no_put: false,
            no_delete: false,
            progress_notify: false,
            fragment: false,
        }
    }
}

/// What a stream of watchers has to say.
#[derive(Clone, Debug)]
pub struct WatchMessage {
    /// The watcher; -1 when the message is about the whole stream.
    pub watch_id: i64,
    /// With events or progress, the revision up to which the watcher has now been
    /// sent everything, at least the last event's. Otherwise the store's.
    pub revision: Revision,
    /// What is said.
    pub kind: WatchMessageKind,
}

/// What is said.
#[derive(Clone, Debug)]
pub enum WatchMessageKind {
    /// The watcher exists; comes before its first events.
    Created,
    /// Changes, in order.
    Events {
        /// The changes.
        events: Vec<Arc<WatchEvent>>,
        /// Whether the watcher wants the key before each change.
        prev_kv: bool,
        /// Whether more of the same message follows in the next one.
        fragment: bool,
    },
    /// Everything up to `revision` was sent.
    Progress,
    /// The watcher's start or position is below the compact mark; nothing
    /// follows. Its id stays taken until it is canceled, as in etcd.
    Compacted {
        /// The mark.
        compact_revision: Revision,
    },
    /// The watcher is gone because the client asked.
    Canceled,
    /// No watcher was created; the message has id -1.
    Refused(String),
}

/// Why a watcher was not created. The messages are etcd's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// The client chose an id that is in use on the stream.
    #[error("mvcc: duplicate watch ID provided on the WatchStream")]
    DuplicateId,
    /// The range holds no key.
    #[error("mvcc: watcher range is empty")]
    EmptyRange,
}
