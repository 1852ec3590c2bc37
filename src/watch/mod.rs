//! (scaffold) Who watches what, and what they have yet to see.

use std::sync::Arc;

use crate::machine::{Published, View};
use crate::types::{Event, KeyRange, Revision, RevisionEvents, Space};

/// Takes events in revision order from the applying thread and never blocks it.
pub struct Hub {}

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

/// What a stream of watchers has to say.
#[derive(Clone, Debug)]
pub struct WatchMessage {
    /// The watcher; -1 when the message is about the whole stream.
    pub watch_id: i64,
    /// The store's revision when the message was made.
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
        events: Vec<Arc<Event>>,
        /// Whether more of the last revision follows in the next message.
        fragment: bool,
    },
    /// Everything up to `revision` was sent.
    Progress,
    /// The watcher's start or position is below the compact mark.
    Compacted {
        /// The mark.
        compact_revision: Revision,
    },
    /// The watcher is gone because the client asked.
    Canceled,
}

/// The watchers of one gRPC stream; owned by the task that serves it.
pub struct WatchStream {}

/// Why a watcher was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// The client chose an id that is in use on the stream.
    #[error("etcdserver: mvcc: watcher duplicate ID provided on the WatchStream")]
    DuplicateId,
    /// The range holds no key.
    #[error("etcdserver: mvcc: watcher range is empty")]
    EmptyRange,
}

impl Hub {
    /// A hub over the published state.
    pub fn new(_published: Arc<Published>) -> Arc<Hub> {
        todo!("scaffold")
    }

    /// Takes the events of an applied chunk. Called by the applying thread.
    pub fn publish(&self, _view: &Arc<View>, _events: Vec<Arc<RevisionEvents>>) {
        todo!("scaffold")
    }

    /// The state was replaced by a snapshot: every watcher catches up from disk.
    pub fn reset(&self) {
        todo!("scaffold")
    }

    /// A stream without watchers.
    pub fn stream(self: &Arc<Self>) -> WatchStream {
        todo!("scaffold")
    }
}

impl WatchStream {
    /// Adds a watcher. Without an id the least free one from 0 is taken.
    ///
    /// # Errors
    /// [`CreateError`]; the stream goes on.
    pub fn create(&mut self, _id: Option<i64>, _spec: WatchSpec) -> Result<i64, CreateError> {
        todo!("scaffold")
    }

    /// Removes a watcher; a `Canceled` message follows. Unknown ids are ignored.
    pub fn cancel(&mut self, _id: i64) {
        todo!("scaffold")
    }

    /// Asks for one progress message (id -1) as soon as every watcher has been
    /// sent everything up to the revision it then names.
    pub fn request_progress(&mut self) {
        todo!("scaffold")
    }

    /// The next message. Cancel-safe.
    pub async fn next(&mut self) -> WatchMessage {
        todo!("scaffold")
    }
}
