//! Applies one command to everything replicated, and publishes what it made.
//!
//! `Machine` is owned by the one thread that applies; everyone else reads
//! through [`Published`]. Nothing here waits, asks a clock or draws a random
//! number: equal commands make equal states on every replica.

use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::sync::watch;

pub use crate::storage::layout::LogPosition;
use crate::storage::{Snapshot, StorageError};
use crate::types::{Alarm, LeaseId, Reply, Revision, RevisionEvents, Space};

/// One committed entry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where it stands in the log.
    pub position: LogPosition,
    /// The leader's stamp, milliseconds since 1970; 0 for entries without a command.
    pub time_ms: u64,
    /// What it carries.
    pub payload: Payload,
}

/// What an entry carries.
#[derive(Clone, Debug)]
pub enum Payload {
    /// Nothing: a new leader's first entry.
    Blank,
    /// A `types::Command` as `storage::codec` encoded it.
    Command(Bytes),
    /// A membership, as the raft room encoded it; kept, not understood.
    Membership(Bytes),
}

/// One consistent state of the store, as readers see it. Cheap to clone the
/// `Arc` of, not to be held for longer than one chunk of work: it pins files.
pub struct View {
    /// The data.
    pub data: Snapshot,
    /// The store's revision in `data`.
    pub revision: Revision,
    /// Compact mark of the user space; revisions below are gone.
    pub compacted_user: Revision,
    /// Compact mark of the system space.
    pub compacted_system: Revision,
    /// The last entry in `data`.
    pub applied: LogPosition,
    /// Raised alarms, sorted.
    pub alarms: Arc<[Alarm]>,
    /// The cluster version, as `major << 16 | minor`; 0 before it is first set.
    pub cluster_version: u32,
}

impl View {
    /// The compact mark of a space.
    pub fn compacted(&self, space: Space) -> Revision {
        match space {
            Space::User => self.compacted_user,
            Space::System => self.compacted_system,
        }
    }
}

/// Where the newest [`View`] is found, and how to wait for one.
pub struct Published {
    view: ArcSwap<View>,
    applied_index: watch::Sender<u64>,
}

impl Published {
    /// Starts with a first view.
    pub fn new(view: View) -> Published {
        let (applied_index, _) = watch::channel(view.applied.index);
        Published { view: ArcSwap::from_pointee(view), applied_index }
    }

    /// The newest view.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Swaps a newer view in, and wakes who waits for it.
    pub fn publish(&self, view: View) {
        let index = view.applied.index;
        self.view.store(Arc::new(view));
        self.applied_index.send_replace(index);
    }

    /// The index of the last applied entry, and its changes.
    pub fn applied_index(&self) -> watch::Receiver<u64> {
        self.applied_index.subscribe()
    }
}

/// What applying changed beside the data, for those who keep state beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A lease was granted, with its TTL in seconds.
    LeaseGranted(LeaseId, i64),
    /// A lease is gone.
    LeaseGone(LeaseId),
    /// A lease's remaining seconds were recorded.
    LeaseCheckpoint(LeaseId, i64),
    /// A session was opened or renewed: its id, its TTL in seconds, and the log
    /// index of the renewal.
    SessionRenewed(u64, u64, u64),
    /// A session is gone.
    SessionGone(u64),
    /// A space has a new compact mark, to be swept in the background.
    Compacted(Space, Revision),
    /// The state was replaced by a snapshot; read everything again from the view.
    Replaced,
}

/// Hears what each applied chunk made. Called by the applying thread after the
/// view was published and before replies go out; must not block.
pub trait Observer: Send + Sync + 'static {
    /// `events` in revision order; `effects` in log order.
    fn on_chunk(&self, view: &Arc<View>, events: Vec<Arc<RevisionEvents>>, effects: Vec<Effect>);
}

/// The replicated state machine.
pub struct Machine {}

impl Machine {
    /// Applies a chunk of consecutive entries: one atomic batch (or several, at
    /// entry boundaries), one published view, then the observers. One reply for
    /// each entry.
    ///
    /// # Errors
    /// Anything that not every replica would meet: the node must stop.
    pub fn apply(&mut self, _entries: Vec<Entry>) -> Result<Vec<Reply>, StorageError> {
        todo!("scaffold")
    }
}
